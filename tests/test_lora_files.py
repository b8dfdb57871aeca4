"""The exported LoRA: the very change that was learned, in every loader that people use.

What ComfyUI makes of the same files stands in tests/host/test_weights.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from far_train.mini.shipped import small_base
from far_train.models.base import BaseModel
from far_train.models.export import export_lora
from far_train.models.families import SD15, SD21, SDXL
from far_train.models.layers import attention_projections
from far_train.models.loading import build_parts, packaged_configs
from far_train.models.lora_files import kohya_names
from far_train.models.weights import FarWeights
from far_train.utils.errors import WeightsError

from .test_weights import make_low_rank, make_weights

MAKERS = [make_weights, make_low_rank]


def kohya_name(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def tiny_sdxl_name(module: str) -> str:
    """In kohya's UNet for SDXL, which is the original one, of the size of the tiny base: one layer per block."""
    for ours, theirs in (
        ("down_blocks.1.attentions.0.", "input_blocks.3.1."),
        ("down_blocks.2.attentions.0.", "input_blocks.5.1."),
        ("mid_block.attentions.0.", "middle_block.1."),
        ("up_blocks.0.attentions.0.", "output_blocks.0.1."),
        ("up_blocks.0.attentions.1.", "output_blocks.1.1."),
        ("up_blocks.1.attentions.0.", "output_blocks.2.1."),
        ("up_blocks.1.attentions.1.", "output_blocks.3.1."),
    ):
        module = module.replace(ours, theirs)
    return module


OWN_NAMES = {"sdxl": tiny_sdxl_name}  # of modules in kohya's UNet, where it isn't diffusers'


def merged_as_kohya_does(unet: nn.Module, file: dict[str, Tensor], own_name: Callable) -> dict[str, Tensor]:
    """Weights of all linear layers after a merge like sd-scripts': by module name, alpha over rank times up down.
    Nothing of the file may be left over."""
    left = set(file)
    weights = {}
    for name, module in unet.named_modules():
        key = kohya_name(own_name(name))
        if isinstance(module, nn.Linear):
            weights[name] = module.weight.detach().clone()
            if f"{key}.lora_up.weight" in file:
                up, down = (file[f"{key}.lora_{half}.weight"].float() for half in ("up", "down"))
                weights[name] += float(file[f"{key}.alpha"]) / down.shape[0] * (up @ down)
                left -= {f"{key}.lora_up.weight", f"{key}.lora_down.weight", f"{key}.alpha"}
    assert not left
    return weights


def true_changes(base: BaseModel, weights: FarWeights) -> dict[str, Tensor]:
    """The learned change of each changed layer, by its name in diffusers' UNet."""
    names = {id(module): name for name, module in base.unet.named_modules()}
    found = attention_projections(base.unet)
    return {names[id(getattr(*found[layer]))]: weights.delta(layer).float() for layer in weights.shapes()}


@pytest.mark.parametrize("make", MAKERS)
def test_a_merge_as_kohyas_tools_do_it_gives_the_learned_change(family_base, tmp_path: Path, make: Callable):
    base, weights = family_base, make(family_base)
    export_lora(weights, tmp_path / "lora.safetensors")
    names = OWN_NAMES.get(base.family.key, lambda module: module)
    merged = merged_as_kohya_does(base.unet, load_file(tmp_path / "lora.safetensors"), names)
    truth = true_changes(base, weights)
    for name, weight in merged.items():
        change = weight - base.unet.get_submodule(name).weight
        assert torch.allclose(change, truth.get(name, torch.zeros(())).expand_as(change), atol=1e-6), name


@pytest.mark.parametrize("make", MAKERS)
def test_diffusers_translates_every_name(family_base, tmp_path: Path, make: Callable):
    """As its loader does before it hands the tensors to peft."""
    import diffusers
    from diffusers.utils import convert_unet_state_dict_to_peft

    weights = make(family_base)
    export_lora(weights, tmp_path / "lora.safetensors")
    pipeline = getattr(diffusers, family_base.family.pipeline)
    more = {"unet_config": family_base.unet.config} if family_base.family == SDXL else {}
    found, alphas = pipeline.lora_state_dict(str(tmp_path), weight_name="lora.safetensors", **more)[:2]
    state = convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in found.items()})
    truth = true_changes(family_base, weights)
    assert state.keys() == {f"{name}.lora_{half}.weight" for name in truth for half in "AB"}
    assert len(alphas) == len(truth)
    for name, change in truth.items():
        down, up = (state[f"{name}.lora_{half}.weight"].float() for half in "AB")
        assert torch.allclose(up @ down, change, atol=1e-6), name


@pytest.mark.parametrize("make", MAKERS)
def test_diffusers_own_loader_gives_the_learned_change(base, tmp_path: Path, make: Callable):
    pytest.importorskip("peft", reason="diffusers loads LoRA files through peft: make test-peft")
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    weights = make(base)
    export_lora(weights, tmp_path / "lora.safetensors")
    truth = true_changes(base, weights)
    before = {name: base.unet.get_submodule(name).weight.clone() for name in truth}
    pipe = StableDiffusionPipeline(
        **base.parts,
        tokenizer=base.tokenizer,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, change in truth.items():
        now = pipe.unet.get_submodule(name).weight
        assert torch.allclose(now - before[name], change, atol=1e-6) and float(change.abs().max()) > 0.01, name


def test_exact_files_hold_the_very_numbers(base, tmp_path: Path):
    weights = make_weights(base)
    for rank in (None, 10_000):
        export_lora(weights, tmp_path / "lora.safetensors", rank)
        file, names = load_file(tmp_path / "lora.safetensors"), kohya_names(weights.deltas, SD21)
        assert len(file) == 3 * len(weights.deltas)
        for layer, delta in weights.deltas.items():
            up, down = (file[f"{names[layer]}.lora_{half}.weight"] for half in ("up", "down"))
            assert torch.equal(up.float() @ down.float(), delta.float()) and up.shape[1] == min(delta.shape)
            assert float(file[f"{names[layer]}.alpha"]) == min(delta.shape)


def test_a_chosen_rank_is_the_best_of_that_rank(base, tmp_path: Path):
    for make, rank in ((make_weights, 4), (make_low_rank, 1)):
        weights = make(base)
        export_lora(weights, tmp_path / "lora.safetensors", rank)
        file, names = load_file(tmp_path / "lora.safetensors"), kohya_names(weights.shapes(), SD21)
        for layer in weights.shapes():
            change = weights.delta(layer).float()
            up, down = (file[f"{names[layer]}.lora_{half}.weight"].float() for half in ("up", "down"))
            assert up.shape[1] == down.shape[0] == rank == float(file[f"{names[layer]}.alpha"])
            best = torch.linalg.svdvals(change)[rank:].square().sum()
            assert (up @ down - change).square().sum() <= 1.01 * best  # no matrix of this rank comes closer


def test_low_rank_deltas_stay_as_they_were_learned(base, tmp_path: Path):
    weights = make_low_rank(base)
    for rank in (None, 5):
        export_lora(weights, tmp_path / "lora.safetensors", rank)
        file, names = load_file(tmp_path / "lora.safetensors"), kohya_names(weights.low_rank_deltas, SD21)
        for layer, delta in weights.low_rank_deltas.items():
            assert torch.equal(file[f"{names[layer]}.lora_up.weight"], delta.up)
            assert torch.equal(file[f"{names[layer]}.lora_down.weight"], delta.down)


def stable_diffusion_unet() -> nn.Module:
    return build_parts(SD21, packaged_configs(SD21, "epsilon"))["unet"]


def test_full_size_names_of_sdxl():
    """70 transformer blocks with two attentions of four matrices, in kohya's words."""
    depths = {"input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10}
    depths |= {"middle_block_1": 10} | {f"output_blocks_{i}_1": 10 if i < 3 else 2 for i in range(6)}
    expected = {
        f"lora_unet_{place}_transformer_blocks_{block}_attn{kind}_to_{part}"
        for place, depth in depths.items()
        for block in range(depth)
        for kind in (1, 2)
        for part in ("q", "k", "v", "out_0")
    }
    unet = build_parts(SDXL, packaged_configs(SDXL, "epsilon"))["unet"]
    names = kohya_names(attention_projections(unet), SDXL)
    assert set(names.values()) == expected and len(names) == 560
    key = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
    assert names[key] == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    with pytest.raises(WeightsError, match="a UNet without attention on its first level; is it SDXL's"):
        kohya_names(names, SD21)


def sd15_unet() -> nn.Module:
    return build_parts(SD15, packaged_configs(SD15, "epsilon"))["unet"]


@pytest.mark.parametrize(
    "unet", [stable_diffusion_unet, sd15_unet, lambda: small_base().unet], ids=["full size", "SD 1.5", "small"]
)
def test_names_are_those_of_diffusers_modules(unet: Callable[[], nn.Module]):
    unet = unet()
    modules = {id(module): name for name, module in unet.named_modules()}
    found = attention_projections(unet)
    assert kohya_names(found, SD21) == {
        layer: kohya_name(modules[id(getattr(*place))]) for layer, place in found.items()
    }


@pytest.mark.parametrize("layer", ["input_blocks.6.1.attn2.to_k", "time_embed.0", "input_blocks.2.0.attn2.to_k"])
def test_layers_without_a_place_are_refused(layer: str):
    levels = [f"input_blocks.{i}.1.attn2.to_k" for i in (1, 2, 4, 5)]
    with pytest.raises(WeightsError, match=f"weights: {layer}"):
        kohya_names([*levels, layer], SD21)
