"""Attention maps: the right layers, the right columns, the model's own softmax."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from far_train.models.attention_maps import AttentionRecorder, cross_attention_layers, layer_stride, supervised_layers
from far_train.models.families import SD21
from far_train.models.loading import packaged_configs


def full_unet():
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(packaged_configs(SD21, "v_prediction")["unet"])


@pytest.mark.parametrize("side", [64, 96])
def test_sd21_supervises_its_five_stride_4_layers(side: int):
    """16×16 maps at 512 px and 24×24 at 768 px."""
    layers = supervised_layers(full_unet(), side, side)
    assert len(layers) == 5
    assert sum(n.startswith("down_blocks.2.") for n in layers) == 2
    assert sum(n.startswith("up_blocks.1.") for n in layers) == 3


def test_sd21_has_16_cross_attention_layers():
    assert len(cross_attention_layers(full_unet())) == 16


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
