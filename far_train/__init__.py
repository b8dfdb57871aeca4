"""Fuse-and-Refine: teach Stable Diffusion several look-alike subjects at once.

A plain PyTorch library; it knows nothing of ComfyUI. ``python -m far_train --help`` lists its commands.
"""

__version__ = "0.1.0"
