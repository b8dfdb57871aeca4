"""The small bench: how well several subjects are learned at once, counted in a world that knows who they are.

What it measures, and what it can't say about Stable Diffusion 2.1, stands in docs/explanation/benchmark.md.
"""
