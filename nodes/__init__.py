"""The ComfyUI face of far_train: thin nodes that convert sockets to its types, call one function, convert back."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    attention,
    concepts,
    evaluate,
    fusion,
    host_folders,
    host_ui,
    mini,
    photos,
    priors,
    train_options,
    training,
    weights,
)
from .previews import errors_shown


class FarExtension(ComfyExtension):
    """Everything that the pack adds to the host."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        host_folders.register_model_folders()
        host_ui.listen_to_prompts()
        host_ui.shorten_error_names()
        modules = (photos, priors, concepts, fusion, train_options, training, weights, attention, evaluate, mini)
        return [errors_shown(node) for module in modules for node in module.NODES]
