"""Test-only node pack: tiny but genuine models, and nodes that look at what the pack's nodes made.

Not part of what users install.
"""

from __future__ import annotations

import gc
from contextlib import suppress

from comfy_api.latest import ComfyExtension, io

from .dynamic import NODES as DYNAMIC
from .probes import NODES as PROBES
from .registry import NODES as REGISTRY
from .shapes import NODES as SHAPES
from .tiny import TinyCheckpoint

with suppress(ImportError):  # one test hides them
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

# Trainings collect garbage often, and tests train often: leave out the million objects that imports made for good.
gc.collect()
gc.freeze()


class TestExtension(ComfyExtension):
    """The pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TinyCheckpoint, *DYNAMIC, *PROBES, *SHAPES, *REGISTRY]


async def comfy_entrypoint() -> ComfyExtension:
    """The host's door into the pack."""
    return TestExtension()
