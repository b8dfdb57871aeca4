"""The sockets of the pack: what each type carries, and what differs between host versions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image

from ..far_train.models.weights import FarWeights
from ..far_train.utils.errors import ConfigError

CATEGORY = "FaR"
# Words of input ids as labels spell them.
ABBREVIATIONS = {"clip": "CLIP", "vae": "VAE", "lora": "LoRA", "sam": "SAM", "lr": "learning rate"}

Model = io.Model
Clip = getattr(io, "Clip", None) or io.CLIP
Vae = getattr(io, "Vae", None) or io.VAE

FarConcepts = io.Custom("FAR_CONCEPTS")  # Carried(far_train.data.concepts.Concept, …)
FarPrior = io.Custom("FAR_PRIOR")  # Carried(far_train.data.concepts.ClassPicture, …)
FarDataset = io.Custom("FAR_DATASET")  # a far_train.data.concepts.TrainingSet
FarOptions = io.Custom("FAR_OPTIONS")  # nodes.train_options.Options
FarWeightsSocket = io.Custom("FAR_WEIGHTS")  # CarriedWeights
BoundingBox = io.Custom("BOUNDING_BOX")  # boxes of the host's newer nodes; other packs send BBOX
SamModel = io.Custom("SAM_MODEL")  # the segment-anything instance that other packs use


def base_inputs(
    model: str = "The base model that will be trained: Stable Diffusion 1.5, 2.1 or XL.",
    clip: str = "Its CLIP.",
    vae: str | None = "Its VAE.",
) -> list[io.Input]:
    """The sockets of a base model with these tooltips; without VAE if it has none."""
    inputs = [Model.Input("model", tooltip=model), Clip.Input("clip", tooltip=clip)]
    return inputs if vae is None else [*inputs, Vae.Input("vae", tooltip=vae)]


class ReportsMemory:
    """Mixin of what travels through sockets: ComfyUI 0.8 asks for its bytes when it decides what to forget first.

    0.33 doesn't ask; it counts tensors in lists and tuples alone.
    """

    def get_ram_usage(self) -> int:
        return bytes_in(tuple(self) if isinstance(self, tuple) else vars(self))


class Carried(ReportsMemory, tuple):
    """A tuple of concepts or regularization images."""


class CarriedWeights(ReportsMemory, FarWeights):
    """FaR weights in a socket."""

    @classmethod
    def of(cls, weights: FarWeights) -> CarriedWeights:
        return cls(weights.embeddings, weights.deltas, weights.provenance, weights.low_rank_deltas)


def bytes_in(value: Any) -> int:
    """Memory of all tensors and pictures in nested tuples, lists, mappings and dataclasses, in bytes."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Image.Image):
        return value.width * value.height * len(value.getbands())
    if isinstance(value, Mapping):
        return sum(bytes_in(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(bytes_in(v) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return bytes_in(vars(value))
    return 0


def check_sockets(**given: tuple[Any, type, str]) -> None:
    """Refuse what a queue sent in place of a link: the host checks types of links, but not of values written down.

    Each keyword is an input's name with (its value, the class that it must have, what that is called).
    Raises ConfigError naming the input.
    """
    for name, (value, kind, called) in given.items():
        if not isinstance(value, kind):
            raise ConfigError(f"{name}: expected {called} of another node, got {type(value).__name__}; connect one")


def check_choice(refusal: bool | str) -> None:
    """Raise what ``validate_inputs`` says of a choice: the host doesn't ask it about values that come through links."""
    if refusal is not True:
        raise ConfigError(str(refusal))


def unknown_choice() -> float:
    """For ``fingerprint_inputs`` of a choice that comes through a link, which the host doesn't tell: never the same.

    A new object each time: the host compares by identity first.
    """
    return float("nan")


def all_of(name: str, given: Sequence[Any], kind: type, called: str) -> list[Any]:
    """The things of all lists of a socket that takes several. Raises ConfigError naming the input."""
    found = []
    for value in given:
        check_sockets(**{name: (value, Carried, called)})
        for thing in value:
            check_sockets(**{name: (thing, kind, called)})
        found += value
    return found


def schema(**settings: Any) -> io.Schema:
    """A node's schema in the pack's category; settings that this host doesn't know (search_aliases …) are skipped.

    Ids of several words are shown with spaces: ``lora_rank`` as "LoRA rank".
    """
    for node_input in settings.get("inputs", ()):
        if node_input.display_name is None and "_" in node_input.id:
            node_input.display_name = label(node_input.id)
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(**{"category": CATEGORY} | {name: value for name, value in settings.items() if name in known})


def label(input_id: str) -> str:
    """An input's id in words."""
    return " ".join(ABBREVIATIONS.get(word, word) for word in input_id.split("_"))
