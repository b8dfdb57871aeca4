"""Pieces of API-format prompts that several host tests share."""

from __future__ import annotations

from typing import Any

from far_train.models.families import FAMILIES

from .comfy_server import ComfyServer


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def tiny_base(weights_seed: int = 0, prediction: str = "", family: str = "sd21", **more: Any) -> dict[str, Any]:
    """A loader with two residual blocks per level, as full-size models have them, and so with their layers' names.

    ``prediction``: default the family's.
    """
    inputs = {"prediction": prediction or FAMILIES[family].default_prediction, "family": family, "res_blocks": 2}
    return node("FaRTest_TinyCheckpoint", weights_seed=weights_seed, **inputs | more)


def encoded(text: str, clip: list) -> dict[str, Any]:
    return node("CLIPTextEncode", clip=clip, text=text)


def predicted(name: str, model: list, conditioning: list) -> dict[str, Any]:
    return node("FaRTest_Predict", model=model, conditioning=conditioning, name=name)


def defaults(comfy: ComfyServer, kind: str) -> dict[str, Any]:
    """Every widget's default: a queued prompt must name all required inputs."""
    values = {}
    for name, (choices, *about) in comfy.object_info()[kind]["input"]["required"].items():
        if about and "default" in about[0]:
            values[name] = about[0]["default"]
        elif isinstance(choices, list):
            values[name] = choices[0]
    return values
