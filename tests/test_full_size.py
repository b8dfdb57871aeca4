"""The model families at their real sizes, with random weights: loading, one training step, export.

Needs about 16 GB of memory and 12 GB of disk: ``make test-full-size``. Pictures are small: no weight has another shape
for larger ones, and a processor without bf16 would take minutes for them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.speed.work import our_run, random_base, work_config
from far_train.data.concepts import Concept
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.mini.tiny import single_file_state
from far_train.models.attention_maps import AttentionRecorder, supervised_layers
from far_train.models.conditioning import TextConditioner, plain_vocabulary
from far_train.models.export import export_lora
from far_train.models.families import SD15, SD21, SDXL, V_STATISTIC, Family
from far_train.models.layers import kv_weights
from far_train.models.loading import build_parts, load_base, packaged_configs
from far_train.models.weights import FarWeights
from far_train.training.estimate import LiveBytes
from far_train.training.recipe import train
from far_train.training.settings import TrainConfig
from far_train.utils.errors import BaseModelError

pytestmark = pytest.mark.full_size
RANDOM = torch.randn(1_000_003).mul_(0.02).half()  # a prime number of values, so that hardly any two rows are the same


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> Iterator[None]:
    """Large models gain from threads; the other tests' small ones don't (see conftest.py)."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    """Writes single files in the original layout, in fp16, as the families are distributed."""
    folder = tmp_path_factory.mktemp("full")

    def write(family: Family) -> Path:
        path = folder / f"{family.key}.safetensors"
        if not path.exists():
            configs = packaged_configs(family, family.default_prediction)
            parts = build_parts(family, configs)
            states = {part: {k: random_weight(k, t) for k, t in m.state_dict().items()} for part, m in parts.items()}
            if family is SD21:  # the spread by which v-prediction is told
                states["unet"][V_STATISTIC] = torch.linspace(-0.3, 0.3, 320).half()
            save_file(single_file_state(configs, states, family), path)
        return path

    return write


def random_weight(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """fp16 values of about the size that trained ones have: small matrices, norms of one, no biases."""
    if tensor.ndim > 1:
        count = tensor.numel()
        return RANDOM.repeat(-(-count // len(RANDOM)))[:count].reshape(tensor.shape)
    return torch.zeros(tensor.shape, dtype=torch.float16) + ("norm" in name and name.endswith("weight"))


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [({}, 7.0, 8.5), ({"fp8_base": True}, 5.0, 6.0)],
    ids=["bf16", "fp8"],
)
def test_sdxl_at_1024_px_fits_8_gb_in_fp8(settings: dict, low: float, high: float):
    """GB of weights, AdamW's moments and one checkpointed step, counted without computing it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        base = random_base(packaged_configs(SDXL, "epsilon"), dtype=torch.bfloat16, family=SDXL)
        config = work_config(1, device="cpu", precision="bf16", memory="lean", **settings)
        with our_run(base, 1024, config) as run:
            with LiveBytes() as counted:
                run.take_step()
            learned = list(run.state.adapter.named_parameters().values())
            modules = base.parts.values()
            held = [t for m in modules for t in (*m.parameters(), *m.buffers())] + learned
            weights = sum({id(t): t.numel() * t.element_size() for t in held}.values())
    moments = sum(2 * 4 * p.numel() for p in learned)
    assert low < (weights + moments + counted.peak) / 1e9 < high


def peak_memory() -> float:
    """The most memory this process has had so far, in GB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**20
    return float("nan")


class Expected(NamedTuple):
    family: Family
    size: int  # native, in pixels
    text_encoder: int  # parameters
    unet: int
    kv: int  # what trainable kv changes
    low_rank: int  # what trainable lora trains at rank 8
    width: int


TRAINED = [
    Expected(SD15, 512, 123_060_480, 859_520_964, 19_169_280, 1_594_368, 768),
    Expected(SD21, 768, 340_387_840, 865_910_724, 25_559_040, 1_659_904, 1024),
]


SIZE = 128  # pixels


@pytest.mark.parametrize("expected", TRAINED, ids=lambda e: e.family.key)
def test_load_train_export(
    checkpoint: Callable[[Family], Path],
    expected: Expected,
    concepts: list[Concept],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    family, path = expected.family, checkpoint(expected.family)
    started = time.perf_counter()
    base = load_base(path)
    loaded = time.perf_counter()
    counts = {part: sum(p.numel() for p in m.parameters()) for part, m in base.parts.items()}
    assert counts == {"unet": expected.unet, "vae": 83_653_863, "text_encoder": expected.text_encoder}
    assert all(not p.is_meta for m in base.parts.values() for p in m.parameters())
    assert (base.family, base.native_size) == (family, expected.size)
    assert base.prediction_type == family.default_prediction

    fusion = ConceptFusion(concepts, config=FusionConfig(size=SIZE, count=1))
    config = TrainConfig(steps=1, batch_size=1, prior_batch_size=0, sample_every=0, device="cpu", precision="fp32")
    before = {k: v.clone() for k, v in kv_weights(base.unet).items()}
    assert len(before) == 32 and sum(v.numel() for v in before.values()) == expected.kv
    weights = train(base, fusion, config, tmp_path / "run")
    trained = time.perf_counter()
    deltas = weights.low_rank_deltas.values()
    assert len(deltas) == 128 and sum(d.up.numel() + d.down.numel() for d in deltas) == expected.low_rank
    assert all(d.up.any() for d in deltas)
    assert all(torch.equal(before[k], v) for k, v in kv_weights(base.unet).items())

    export_lora(weights, tmp_path / "lora.safetensors")
    lora = load_file(tmp_path / "lora.safetensors")
    assert len(lora) == 3 * 128
    last = "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_v"
    assert lora[f"{last}.lora_down.weight"].shape == (8, expected.width)
    FarWeights.load(tmp_path / "run" / "weights.safetensors").check_fits(base)
    with capsys.disabled():
        print(
            f"\n{family.title} at {SIZE} px, fp32, batch 1: load {loaded - started:.0f} s, "
            f"encode + one step + save {trained - loaded:.0f} s, peak memory so far {peak_memory():.1f} GB"
        )


@torch.no_grad()
def test_sdxl_is_loaded_and_runs_in_bf16(checkpoint: Callable[[Family], Path], capsys: pytest.CaptureFixture):
    """With its own conditioning and the maps of its supervised layers."""
    path = checkpoint(SDXL)
    started = time.perf_counter()
    base = load_base(path)
    loaded = time.perf_counter()
    counts = {part: sum(p.numel() for p in m.parameters()) for part, m in base.parts.items()}
    assert counts == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
    assert (base.family, base.native_size, base.prediction_type) == (SDXL, 1024, "epsilon")
    base.to("cpu", torch.bfloat16)
    assert base.vae.dtype == torch.float32
    vocabulary, side = plain_vocabulary(base), SIZE // base.downscale
    conditioning = TextConditioner(base).encode([vocabulary.tokenize("a photo of a dog")], (SIZE, SIZE))
    assert conditioning.context.shape == (1, 77, 2048) and conditioning.pooled.shape == (1, 1280)
    layers = supervised_layers(base.unet, side, side, side // 4, SDXL.supervised_modules)
    recorder = AttentionRecorder(base.unet, layers)
    encoded = time.perf_counter()
    with recorder.recording(torch.ones(1, 1, 77)):
        latents = torch.randn(1, 4, side, side, dtype=torch.bfloat16)
        noise = base.unet(latents, 500, conditioning.context, **conditioning.unet_kwargs()).sample
        maps = recorder.maps(side, side)
    assert noise.shape == latents.shape and torch.isfinite(noise).all()
    assert maps.shape == (1, 1, side // 4, side // 4) and torch.allclose(maps, torch.ones_like(maps), atol=1e-3)
    with capsys.disabled():
        print(
            f"\n{SDXL.title}, bf16: load {loaded - started:.0f} s, one pass at {SIZE} px "
            f"{time.perf_counter() - encoded:.0f} s, peak memory so far {peak_memory():.1f} GB"
        )


def test_contradicting_prediction_type(checkpoint: Callable[[Family], Path]):
    with pytest.raises(BaseModelError, match="looks like v_prediction"):
        load_base(checkpoint(SD21), prediction_type="epsilon")


@pytest.mark.parametrize("family", [SD15, SD21], ids=lambda f: f.key)
def test_incomplete_file(checkpoint: Callable[[Family], Path], family: Family):
    state = load_file(checkpoint(family))
    state.pop("first_stage_model.decoder.conv_out.weight")
    with pytest.raises(BaseModelError, match="vae lacks 1 of"):
        load_base(state)
