"""Training on MODEL and CLIP that FaR weights have been applied to already."""

from __future__ import annotations

import pytest

from .comfy_server import ComfyServer, ExecutionFailed
from .graphs import node
from .listener import Listener
from .test_training import run_folder, training

APPLIED = "MODEL and CLIP come through FaR Apply Weights (<red-ball>, <blue-ball>)"


def on_top(comfy: ComfyServer, name: str, **more) -> dict:
    """A training of another seed on what the first one has learned."""
    first = training(comfy, "below")
    prompt = training(comfy, name, train_seed=1, model=["7", 0], clip=["7", 1], **more)
    applying = node("FaR_ApplyWeights", model=["1", 0], clip=["1", 1], weights=["8", 0], strength=1.0)
    return prompt | {"7": applying, "8": first["4"]}


def test_weights_are_not_applied_twice(comfy: ComfyServer):
    for dry_run in (False, True):
        with pytest.raises(ExecutionFailed, match="node 4 .FaR_Train.: FaR.ConfigError: continue_from: ") as failed:
            comfy.run(on_top(comfy, "twice", continue_from=["8", 0], dry_run=dry_run))
        assert APPLIED in str(failed.value) and "connect the checkpoint's MODEL and CLIP" in str(failed.value)
    assert not run_folder(comfy, "twice").exists()


def test_a_training_on_applied_weights_says_that_it_needs_them(comfy: ComfyServer):
    told = []
    for more in ({"dry_run": True}, {}, {"sample_prompt": "a ball"}):
        with Listener(comfy) as seen:
            comfy.run(on_top(comfy, "above", **more))
            seen.catch_up()
        told.append([text for node_id, text in seen.texts if node_id == "4"][-1])
    assert all(f"{APPLIED}: the result only works on top of those weights." in text for text in told)
    dry, trained, loaded = (text.splitlines()[1] for text in told)
    assert dry.startswith("dry run of above") and loaded.startswith("above is trained already")
    assert " is trained" not in trained
