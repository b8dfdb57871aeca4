"""Stable Diffusion 2.1 at its real size, with random weights: loading, one training step, export.

Needs about 12 GB of memory, 3 GB of disk and a few minutes on two cores: ``make test-full-size``.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from far_train.data.concepts import Concept
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.mini.tiny import random_states, single_file_state
from far_train.models.export import export_lora
from far_train.models.families import SD21, V_STATISTIC
from far_train.models.layers import kv_weights
from far_train.models.loading import load_base, packaged_configs
from far_train.models.weights import FarWeights
from far_train.training.recipe import train
from far_train.training.settings import TrainConfig
from far_train.utils.errors import BaseModelError

pytestmark = pytest.mark.full_size


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 768-v single file in the original layout, fp16, as SD 2.1 is distributed."""
    configs = packaged_configs(SD21, "v_prediction")
    states = random_states(configs)
    states["unet"][V_STATISTIC] = torch.linspace(-0.3, 0.3, 320)  # the spread by which v-prediction is told
    state = {k: v.half() for k, v in single_file_state(configs, states).items()}
    path = tmp_path_factory.mktemp("full") / "sd21-768-v.safetensors"
    save_file(state, path)
    return path


def peak_memory() -> float:
    """The most memory this process has had so far, in GB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    return float("nan")


def test_load_train_export(checkpoint: Path, concepts: list[Concept], tmp_path: Path, capsys: pytest.CaptureFixture):
    started = time.perf_counter()
    base = load_base(checkpoint)
    loaded = time.perf_counter()
    counts = {part: sum(p.numel() for p in m.parameters()) for part, m in base.parts.items()}
    assert counts == {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}
    assert all(not p.is_meta for m in base.parts.values() for p in m.parameters())
    assert (base.prediction_type, base.native_size) == ("v_prediction", 768)

    fusion = ConceptFusion(concepts, config=FusionConfig(size=768, count=1))
    config = TrainConfig(steps=1, batch_size=1, prior_batch_size=0, sample_every=0, device="cpu", precision="fp32")
    before = {k: v.clone() for k, v in kv_weights(base.unet).items()}
    assert len(before) == 32 and sum(v.numel() for v in before.values()) == 25_559_040  # what trainable kv changes
    weights = train(base, fusion, config, tmp_path / "run")
    trained = time.perf_counter()
    deltas = weights.low_rank_deltas.values()
    assert len(deltas) == 128 and sum(d.up.numel() + d.down.numel() for d in deltas) == 1_659_904
    assert all(d.up.any() for d in deltas)
    assert all(torch.equal(before[k], v) for k, v in kv_weights(base.unet).items())

    export_lora(weights, tmp_path / "lora.safetensors")
    lora = load_file(tmp_path / "lora.safetensors")
    assert len(lora) == 3 * 128
    last = "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_v"
    assert lora[f"{last}.lora_down.weight"].shape == (8, 1024)
    FarWeights.load(tmp_path / "run" / "weights.safetensors").check_fits(base)
    with capsys.disabled():
        print(
            f"\nSD 2.1 at 768 px, fp32, batch 1: load {loaded - started:.0f} s, encode + one step + save "
            f"{trained - loaded:.0f} s, peak memory {peak_memory():.1f} GB"
        )


def test_contradicting_prediction_type(checkpoint: Path):
    with pytest.raises(BaseModelError, match="looks like v_prediction"):
        load_base(checkpoint, prediction_type="epsilon")


def test_incomplete_file(checkpoint: Path, tmp_path: Path):
    state = load_file(checkpoint)
    state.pop("first_stage_model.decoder.conv_out.weight")
    with pytest.raises(BaseModelError, match="vae lacks 1 of"):
        load_base(state)
