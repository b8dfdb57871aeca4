"""One composite, one seeded training and its export, to the bit: moving code about must not change what it computes.

Kernels differ between releases of torch and between processors, so a digest holds where it was recorded; elsewhere
test_golden's tolerances speak.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from far_train.models.export import export_lora
from far_train.training.recipe import train
from far_train.training.settings import TrainConfig

RECORDED_ON = ("2.14.1", "AVX512")
COMPOSITE = "038075c547b14c87"
TRAINED = {"lora": "d14aeb67f7b9a366", "kv": "5273ac4228e9be8c"}
EXPORTED = {"lora": "72eded11e16b4677", "kv": "ddbd4c832dc8dad0"}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The first 16 hex digits of SHA-256 over names, kinds and values in the order of the names."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


@pytest.fixture(autouse=True)
def recorded_here() -> None:
    here = (torch.__version__.split("+")[0], torch.backends.cpu.get_cpu_capability())
    if here != RECORDED_ON:
        pytest.skip(f"the digests were recorded on torch {RECORDED_ON[0]} with {RECORDED_ON[1]}; here: {here}")


def test_a_composite_has_the_pixels_that_it_always_had(fusion):
    composite = fusion.composite(5)
    masks = {f"mask {i}": mention.mask for i, mention in enumerate(composite.mentions)}
    assert digest({"image": composite.image} | masks) == COMPOSITE


@pytest.mark.parametrize("trainable", TRAINED)
def test_a_seeded_training_and_its_export_have_the_values_that_they_always_had(
    base, fusion, tmp_path: Path, trainable: str
):
    config = TrainConfig(
        steps=4,
        batch_size=2,
        prior_batch_size=1,
        train_seed=7,
        trainable=trainable,
        precision="fp32",
        output_preservation=False,
        background_weight=0.3,
    )
    weights = train(base, fusion, config, tmp_path / "run")
    weights.save(tmp_path / "weights.safetensors")
    export_lora(weights, tmp_path / "lora.safetensors")
    # Recorded before the file named the text encoder of an embedding.
    values = {
        k.replace("embedding.clip_h.", "embedding."): v for k, v in load_file(tmp_path / "weights.safetensors").items()
    }
    assert digest(values) == TRAINED[trainable]
    assert digest(load_file(tmp_path / "lora.safetensors")) == EXPORTED[trainable]
