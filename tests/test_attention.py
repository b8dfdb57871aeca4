"""Attention maps: the right layers, the right columns, the model's own softmax."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel

from far_train.models.attention_maps import AttentionRecorder, cross_attention_layers, layer_stride, supervised_layers
from far_train.models.base import BaseModel
from far_train.models.conditioning import Conditioning
from far_train.models.families import SD15, SD21, SDXL, Family
from far_train.models.loading import packaged_configs


def full_unet(family: Family = SD21) -> UNet2DConditionModel:
    """A UNet of the published size, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(packaged_configs(family, family.default_prediction)["unet"])


@pytest.mark.parametrize("family", [SD15, SD21], ids=lambda f: f.key)
@pytest.mark.parametrize("side", [64, 96])
def test_sd_supervises_its_five_stride_4_layers(family: Family, side: int):
    """16×16 maps at 512 px and 24×24 at 768 px."""
    layers = supervised_layers(full_unet(family), side, side, 16, family.supervised_modules)
    assert len(layers) == 5
    assert sum(n.startswith("down_blocks.2.") for n in layers) == 2
    assert sum(n.startswith("up_blocks.1.") for n in layers) == 3


@pytest.mark.parametrize("side", [64, 96, 128])
def test_sdxl_supervises_eight_of_its_sixty_deepest_layers(side: int):
    """32×32 maps at 1024 px, where no others are smaller; 16×16 at 512 px."""
    unet = full_unet(SDXL)
    everywhere = supervised_layers(unet, side, side)
    layers = supervised_layers(unet, side, side, 16, SDXL.supervised_modules)
    assert len(everywhere) == 60 and set(layers) < set(everywhere)
    expected = [
        f"up_blocks.0.attentions.{i}.transformer_blocks.{j}.attn2" for i, j in itertools.product((0, 1), (2, 3, 4, 5))
    ]
    assert layers == expected
    assert {layer_stride(name, 3) for name in layers} == {4}


def test_a_unet_without_these_modules_is_supervised_by_size_alone(base):
    assert supervised_layers(base.unet, 16, 16, 16, ["up_blocks.9"]) == supervised_layers(base.unet, 16, 16)


@pytest.mark.parametrize(("family", "count"), [(SD15, 16), (SD21, 16), (SDXL, 70)], ids=lambda x: getattr(x, "key", x))
def test_numbers_of_cross_attention_layers(family: Family, count: int):
    assert len(cross_attention_layers(full_unet(family))) == count


@torch.no_grad()
def test_maps_of_each_family_are_recorded(family_base: BaseModel):
    """On the layers that training supervises; tokens that are all selected share all probability."""
    modules, context = family_base.family.supervised_modules, family_base.unet.config.cross_attention_dim
    layers = supervised_layers(family_base.unet, 16, 16, 4, modules)
    assert len(layers) >= 2 and len(layers) < len(cross_attention_layers(family_base.unet))
    assert all(any(name.startswith(f"{m}.") for m in modules) for name in layers) or not modules
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(1, 48, generator=generator) if family_base.family.size_conditions else None
    sizes = None if pooled is None else torch.tensor([[128.0, 128, 0, 0, 128, 128]])
    conditioning = Conditioning(torch.randn(1, 77, context, generator=generator), pooled, sizes)
    recorder = AttentionRecorder(family_base.unet, layers)
    with recorder.recording(torch.ones(1, 1, 77)):
        latents = torch.randn(1, 4, 16, 16, generator=generator)
        family_base.unet(latents, 0, conditioning.context, **conditioning.unet_kwargs())
        maps = recorder.maps(16, 16)
    assert maps.shape == (1, 1, 4, 4) and torch.allclose(maps, torch.ones_like(maps), atol=1e-5)


def test_a_small_model_supervises_its_own_16_by_16_maps(base):
    layers = supervised_layers(base.unet, 16, 16)
    assert layers and all(layer_stride(n, 4) == 1 for n in layers)
    assert all(layer_stride(n, 4) == 2 for n in supervised_layers(base.unet, 32, 32))


def test_too_small_pictures_take_the_largest_maps(base):
    assert all(layer_stride(n, 4) == 1 for n in supervised_layers(base.unet, 8, 8))


def inputs(batch=2):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, 4, 16, 16, generator=generator),
        torch.arange(batch) * 100,
        torch.randn(batch, 77, 32, generator=generator),
    )


def test_recording_changes_no_output(base):
    latents, times, context = inputs()
    with torch.no_grad():
        before = base.unet(latents, times, context).sample
        recorder = AttentionRecorder(base.unet, supervised_layers(base.unet, 16, 16))
        with recorder.recording(torch.zeros(2, 1, 77)):
            during = base.unet(latents, times, context).sample
        recorder.remove()
        after = base.unet(latents, times, context).sample
    assert torch.allclose(before, during, atol=1e-5)
    assert torch.equal(before, after)


def test_a_recorder_that_fails_halfway_leaves_the_unet_as_it_was(base, monkeypatch):
    layers, before = supervised_layers(base.unet, 16, 16), base.unet.attn_processors
    last = base.unet.get_submodule(layers[-1])
    set_processor, calls = last.set_processor, []

    def run_out_of_memory_once(processor):
        calls.append(processor)
        if len(calls) == 1:
            raise MemoryError
        set_processor(processor)

    monkeypatch.setattr(last, "set_processor", run_out_of_memory_once)
    with pytest.raises(MemoryError):
        AttentionRecorder(base.unet, layers)
    assert len(layers) > 1 and all(p is before[name] for name, p in base.unet.attn_processors.items())


def test_maps_are_the_models_own_softmax(base):
    """Against the attention scores that diffusers itself computes from the layer's inputs."""
    latents, times, context = inputs()
    layers = supervised_layers(base.unet, 16, 16)
    expected, hooks = [], []

    def read(layer, args, kwargs):
        hidden = args[0]
        query, key = layer.to_q(hidden), layer.to_k(kwargs["encoder_hidden_states"])
        scores = layer.get_attention_scores(layer.head_to_batch_dim(query), layer.head_to_batch_dim(key))
        expected.append(scores.unflatten(0, (2, -1)).mean(1))  # [B, cells, tokens]

    for name in layers:
        hooks.append(base.unet.get_submodule(name).register_forward_pre_hook(read, with_kwargs=True))
    recorder = AttentionRecorder(base.unet, layers)
    select = torch.zeros(2, 2, 77)
    select[:, 0, 5] = 1
    select[:, 1, [7, 9]] = 0.5  # a group of two tokens is averaged
    with torch.no_grad(), recorder.recording(select):
        base.unet(latents, times, context)
        maps = recorder.maps(16, 16)
    for hook in hooks:
        hook.remove()
    mean = torch.stack(expected).mean(0)
    assert maps.shape == (2, 2, 16, 16)
    assert torch.allclose(maps[:, 0].flatten(1), mean[..., 5], atol=1e-6)
    assert torch.allclose(maps[:, 1].flatten(1), (mean[..., 7] + mean[..., 9]) / 2, atol=1e-6)


def test_maps_of_pictures_that_are_not_square(base):
    generator = torch.Generator().manual_seed(0)
    recorder = AttentionRecorder(base.unet, supervised_layers(base.unet, 16, 24))
    with torch.no_grad(), recorder.recording(torch.ones(1, 1, 77) / 77):
        base.unet(torch.randn(1, 4, 16, 24, generator=generator), 0, torch.randn(1, 77, 32, generator=generator))
        maps = recorder.maps(16, 24)
    assert maps.shape == (1, 1, 16, 24)
    assert torch.allclose(maps, torch.full_like(maps, 1 / 77), atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_keys_but_not_values_of_the_own_layer(base, checkpointing: bool):
    """With frozen queries a layer's map depends on its own W_K; the last supervised layer's W_V feels nothing."""
    latents, times, context = inputs()
    layers = supervised_layers(base.unet, 16, 16)
    recorder = AttentionRecorder(base.unet, layers)
    last = base.unet.get_submodule(layers[-1])
    for parameter in (last.to_k.weight, last.to_v.weight):
        parameter.requires_grad_()
    if checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()
    select = torch.zeros(2, 1, 77)
    select[:, 0, 3] = 1
    with recorder.recording(select):
        base.unet(latents, times, context)
        recorder.maps(16, 16).square().sum().backward()
    assert last.to_k.weight.grad.abs().sum() > 0
    assert last.to_v.weight.grad is None or not last.to_v.weight.grad.any()
