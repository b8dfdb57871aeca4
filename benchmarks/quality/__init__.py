"""The quality benchmark: how well each method learns several subjects at once, measured in the small world.

docs/explanation/benchmark.md says what it measures, and what it can't say about Stable Diffusion 2.1.
"""
