"""A frozen UNet in 8 bits: how far it is off, what it saves, and that a LoRA is trained on it as on any other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.models import fp8
from far_train.models.families import SDXL, Family
from far_train.models.fp8 import FP8, Fp8Layers, dequantise, quantise
from far_train.models.loading import build_parts, packaged_configs
from far_train.training.estimate import LiveBytes
from far_train.training.recipe import TrainingRun, train
from far_train.training.settings import TrainConfig
from far_train.utils.errors import ConfigError

from .test_families_training import losses_on_one_batch
from .test_recipe import QUICK, state_of

CPU = torch.device("cpu")
FROZEN = (nn.Linear, nn.Conv2d)


@pytest.fixture
def unet(family_base) -> nn.Module:
    return family_base.unet.requires_grad_(False)


def predict(unet: nn.Module, family: Family, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The prediction for some noise, and the gradient of its mean square by the text."""
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 16, 16, generator=generator).to(dtype)
    context = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator).to(dtype).requires_grad_()
    more = {}
    if family.size_conditions:
        more["added_cond_kwargs"] = {"text_embeds": torch.ones(1, 48, dtype=dtype), "time_ids": torch.ones(1, 6)}
    prediction = unet(noisy, torch.tensor([500]), context, **more).sample
    prediction.square().mean().backward()
    return prediction.detach(), context.grad


def stored_bytes(unet: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*unet.parameters(), *unet.buffers()))


def test_values_by_hand():
    """The largest, 896, becomes 448 by the scale 2. Between 1 and 2 fp8 has eighths, near 0 steps of 2^-9."""
    weight = torch.tensor([[896.0, -3.3], [2.0**-9, 0.0]])
    content, scale = quantise(weight)
    assert float(scale) == 2 and content.dtype == torch.uint8
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dequantise(content, scale, dtype).tolist() == [[896, -3.25], [0, 0]]
    assert float(quantise(weight * 1.01)[1]) == 4 and float(quantise(weight / 2**14)[1]) == 2**-13
    assert not dequantise(*quantise(torch.zeros(2, 2)), torch.float32).any()


def test_no_value_is_off_by_more_than_a_sixteenth():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    content, scale = quantise(weight)
    error = (dequantise(content, scale, torch.float32) - weight).abs()
    assert (error <= torch.maximum(weight.abs() / 16, scale * 2**-10)).all()
    assert error.norm() > 0.01 * weight.norm()


def test_it_computes_with_the_rounded_weights(unet: nn.Module, family: Family):
    """Prediction and gradient are those of a UNet that holds the rounded values; both are near the original's."""
    original = predict(unet, family)
    rounded = copy.deepcopy(unet)
    for name, layer in rounded.named_modules():
        if isinstance(layer, FROZEN) and name.startswith(("down_blocks.", "mid_block.", "up_blocks.")):
            layer.weight.copy_(dequantise(*quantise(layer.weight), torch.float32))
    layers = Fp8Layers(unet, CPU)
    left = [name for name, layer in unet.named_modules() if isinstance(layer, FROZEN)]
    assert all(name.startswith(("conv_in", "conv_out", "time_embedding.", "add_embedding.")) for name in left)
    ours, theirs = predict(unet, family), predict(rounded, family)
    for value, expected, exact, most in zip(ours, theirs, original, (0.1, 0.3)):
        assert (value - expected).norm() < 1e-5 * expected.norm()
        assert 0.003 < (value - exact).norm() / exact.norm() < most
    layers.remove()
    assert all(torch.equal(value, exact) for value, exact in zip(predict(unet, family), original))


def test_bytes_stay_bytes_when_the_precision_changes(unet: nn.Module, family: Family):
    fp32, _ = predict(unet, family)
    Fp8Layers(unet, CPU)
    before, contents = predict(unet, family)[0], [b.clone() for n, b in unet.named_buffers() if n.endswith("content")]
    nn.Module.to(unet, dtype=torch.bfloat16)
    after = [b for n, b in unet.named_buffers() if n.endswith("content")]
    assert len(after) == len(contents) > 50 and all(torch.equal(a, b) for a, b in zip(contents, after))
    bf16, _ = predict(unet, family, torch.bfloat16)
    assert bf16.dtype == torch.bfloat16
    assert (bf16.float() - before).norm() < 0.02 * before.norm() < 0.02 * 1.2 * fp32.norm()


def test_full_size_sdxl_takes_half_of_what_it_takes_in_bf16():
    unet = build_parts(SDXL, packaged_configs(SDXL, "epsilon"))["unet"]  # without values, on the meta device
    before = stored_bytes(unet) // 2  # from fp32 to bf16
    Fp8Layers(unet, torch.device("meta"))
    nn.Module.to(unet, dtype=torch.bfloat16)
    assert before == 2 * 2_567_463_684
    assert stored_bytes(unet) == pytest.approx(0.5 * before, rel=0.01)


def test_no_copy_is_kept_for_the_backward_pass(unet: nn.Module, family: Family):
    def kept() -> int:
        text = torch.randn(1, 77, unet.config.cross_attention_dim, requires_grad=True)
        more = {"text_embeds": torch.ones(1, 48), "time_ids": torch.ones(1, 6)} if family.size_conditions else None
        with LiveBytes() as counted:
            _held = unet(torch.randn(1, 4, 16, 16), torch.tensor([500]), text, added_cond_kwargs=more).sample
            return counted.now

    plain = kept()
    Fp8Layers(unet, CPU)
    assert kept() <= plain


def test_a_training_on_it_leaves_the_base_exact(family_base, concepts, tmp_path: Path):
    before = state_of(family_base)
    fusion = ConceptFusion(concepts, config=FusionConfig(size=128, count=4))
    weights = train(family_base, fusion, QUICK.replace(prior_batch_size=0, fp8_base=True), tmp_path / "run")
    plain = train(family_base, fusion, QUICK.replace(prior_batch_size=0), tmp_path / "plain")
    after = state_of(family_base)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert weights.digest() != plain.digest() and weights.shapes() == plain.shapes()


def test_both_losses_fall_by_half_on_it(base, concepts, tmp_path: Path, monkeypatch):
    fusion = ConceptFusion(concepts, config=FusionConfig(size=128, count=4))
    settings = {"fp8_base": True, "steps": 80}
    before, after = losses_on_one_batch(base, fusion, tmp_path / "run", monkeypatch, **settings)
    assert (after < 0.5 * before).all(), (before, after)


def test_a_base_that_is_not_kept_stays_in_8_bits(family_base, fusion, tmp_path: Path):
    held = stored_bytes(family_base.unet)
    TrainingRun(family_base, fusion, QUICK.replace(fp8_base=True), tmp_path / "run", keep_base=False).close()
    assert stored_bytes(family_base.unet) < 0.35 * held  # a quarter of fp32, and the few layers that stay


def test_where_it_is_refused(base, fusion, tmp_path: Path, monkeypatch):
    with pytest.raises(ConfigError, match="fp8_base: kv changes the weights that it would round"):
        TrainConfig(fp8_base=True, trainable="kv")
    monkeypatch.setattr(fp8, "FP8", torch.bits8)  # a kind of number that this device has not
    with pytest.raises(ConfigError, match="fp8_base: cpu has no fp8 .*; switch it off or use another device"):
        train(base, fusion, QUICK.replace(fp8_base=True), tmp_path / "run")
    assert FP8 == torch.float8_e4m3fn and isinstance(base.unet.mid_block.attentions[0].proj_in, nn.Linear)


def test_runs_from_before_the_setting_go_on():
    """It is no part of what identifies a run until it is switched on."""
    plain, reduced = TrainConfig().result_shaping(), TrainConfig(fp8_base=True).result_shaping()
    assert "fp8_base" not in plain and reduced == plain | {"fp8_base": True}
