"""Loading a base of each family: from files, folders and shards, in any precision, with the markers of merges."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from far_train.mini.tiny import random_states, single_file_state, tiny_configs, write_folder
from far_train.models.base import BaseModel
from far_train.models.families import SDXL, Family
from far_train.models.loading import load_base
from far_train.models.settings import SampleConfig
from far_train.training.class_images import prior_key
from far_train.training.run_folder import run_identity
from far_train.training.settings import TrainConfig
from far_train.utils.errors import BaseModelError

MARKER = torch.tensor([])
UNET_FILE = "diffusion_pytorch_model.safetensors"


def same_weights(a: BaseModel, b: BaseModel) -> bool:
    ours, theirs = ({f"{p}.{k}": v for p in m.parts for k, v in m.parts[p].state_dict().items()} for m in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def single_file(family: Family) -> tuple[dict[str, Tensor], dict]:
    configs = tiny_configs(family=family)
    return single_file_state(configs, random_states(configs, family=family), family), configs


def test_folder_single_file_and_state_dict_give_the_same_base(family: Family, family_folder: Path, tmp_path: Path):
    folder = load_base(family_folder)
    state, configs = single_file(family)
    save_file(state, tmp_path / "tiny.safetensors")
    single, memory = load_base(tmp_path / "tiny.safetensors", config=family_folder), load_base(state, config=configs)
    assert same_weights(folder, single) and same_weights(folder, memory)
    assert folder.family is single.family is memory.family is family
    assert folder.digest == single.digest == memory.digest and folder.fingerprint == single.fingerprint
    assert folder.prediction_type == family.default_prediction
    assert len(folder.text_encoders) == len(family.text_encoders) and (folder.native_size, folder.downscale) == (128, 8)
    assert folder.tokenizer_size == 49408 and folder.alphas_cumprod.shape == (1000,)


def test_everything_is_loaded_frozen_and_in_fp32(family: Family):
    """Also the VAE of a file in fp16, whose values would overflow in SDXL's."""
    state, configs = single_file(family)
    base = load_base({k: v.half() for k, v in state.items()}, config=configs)
    for part in base.parts.values():
        assert not part.training
        assert all(p.dtype == torch.float32 and not p.requires_grad and not p.is_meta for p in part.parameters())
        assert all(not b.is_meta for b in part.buffers())
    base.to("cpu", torch.float16)
    assert base.vae.dtype == torch.float32 and base.unet.dtype == torch.float16
    assert all(encoder.dtype == torch.float16 for encoder in base.text_encoders)


# ---- folders


def rename_weights(folder: Path, ending: str) -> None:
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ending)))


def shard(path: Path, names: tuple[str, str]) -> None:
    state = load_file(path)
    for name, part in zip(names, (0, 1)):
        save_file({k: v for i, (k, v) in enumerate(sorted(state.items())) if i % 2 == part}, path.with_name(name))
    path.unlink()


def test_folders_with_reduced_weights_alone(family_folder: Path, tmp_path: Path):
    shutil.copytree(family_folder, tmp_path / "base")
    rename_weights(tmp_path / "base", ".fp16.safetensors")
    assert same_weights(load_base(tmp_path / "base"), load_base(family_folder))


def test_full_precision_goes_before_reduced(family_folder: Path, tmp_path: Path):
    shutil.copytree(family_folder, tmp_path / "base")
    for path in (tmp_path / "base").glob("*/*.safetensors"):
        halved = {k: v.half() for k, v in load_file(path).items()}
        save_file(halved, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert same_weights(load_base(tmp_path / "base"), load_base(family_folder))


@pytest.mark.parametrize(
    "names",
    [
        ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"),
        (
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        ),
        (
            "diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
            "diffusion_pytorch_model-00002-of-00002.fp16.safetensors",
        ),
    ],
    ids=["plain", "variant before", "variant behind"],
)
def test_shards_are_put_together(tiny_folder: Path, tmp_path: Path, names: tuple[str, str]):
    shutil.copytree(tiny_folder, tmp_path / "base")
    unet = tmp_path / "base" / "unet"
    shard(unet / UNET_FILE, names)
    assert same_weights(load_base(tmp_path / "base"), load_base(tiny_folder))
    (unet / names[1]).unlink()
    with pytest.raises(BaseModelError, match="base/unet holds 1 of 2 shards of its weights; fetch the others"):
        load_base(tmp_path / "base")


def test_files_of_other_names(tiny_folder: Path, tmp_path: Path):
    shutil.copytree(tiny_folder, tmp_path / "base")
    unet = tmp_path / "base" / "unet"
    (unet / UNET_FILE).rename(unet / "own.safetensors")
    assert same_weights(load_base(tmp_path / "base"), load_base(tiny_folder))
    shutil.copy(unet / "own.safetensors", unet / "other.safetensors")
    with pytest.raises(BaseModelError, match=f"base/unet holds other.safetensors, own.safetensors.*named {UNET_FILE}"):
        load_base(tmp_path / "base")
    shutil.copy(unet / "own.safetensors", unet / "diffusion_pytorch_model.non_ema.safetensors")
    assert load_base(tmp_path / "base").family.key == "sd21"  # the one whose name says that it is such a part


def test_a_folder_of_a_transformer_is_refused_by_name(tmp_path: Path):
    (tmp_path / "flux" / "transformer").mkdir(parents=True)
    with pytest.raises(BaseModelError, match=r"flux is a diffusion transformer; FaR needs"):
        load_base(tmp_path / "flux")
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(BaseModelError, match=r"flux is a diffusion transformer \(FluxPipeline\); FaR needs"):
        load_base(tmp_path / "flux")


def test_variants_of_the_families_are_refused_as_folders(tmp_path: Path):
    """Their configs agree with their weights, which alone would make them other sizes of a family."""
    configs = tiny_configs()
    configs["unet"]["in_channels"] = 9
    write_folder(tmp_path / "inpainting", configs, random_states(configs))
    with pytest.raises(BaseModelError, match="inpainting is an inpainting model; FaR needs"):
        load_base(tmp_path / "inpainting")
    configs = tiny_configs(family=SDXL)
    configs["unet"]["cross_attention_dim"] = 1280
    write_folder(tmp_path / "refiner", configs, random_states(configs, family=SDXL))
    shutil.rmtree(tmp_path / "refiner" / "text_encoder")  # as the refiner has it
    with pytest.raises(BaseModelError, match="refiner is the SDXL refiner; FaR needs"):
        load_base(tmp_path / "refiner")


# ---- markers


def test_prediction_types_are_stated_or_the_familys(family: Family):
    state, configs = single_file(family)
    for stated in ("epsilon", "v_prediction"):
        base = load_base(state, config=configs, prediction_type=stated)
        assert base.prediction_type == base.scheduler["prediction_type"] == stated
    marked = load_base({**state, "v_pred": MARKER}, config=configs)
    assert marked.prediction_type == "v_prediction" and not marked.zero_terminal_snr
    with pytest.raises(BaseModelError, match="epsilon is stated but the state dict looks like v_prediction"):
        load_base({**state, "v_pred": MARKER}, config=configs, prediction_type="epsilon")


def test_zero_terminal_snr_changes_the_schedule(family: Family, caplog: pytest.LogCaptureFixture):
    """By Lin et al. 2024 (arXiv 2305.08891), algorithm 1: √ᾱ is shifted to end at 0 and scaled to begin as before."""
    state, configs = single_file(family)
    plain = load_base(state, config=configs, prediction_type="v_prediction")
    base = load_base({**state, "v_pred": MARKER, "ztsnr": MARKER}, config=configs)
    roots = plain.alphas_cumprod.double().sqrt()
    expected = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
    assert base.zero_terminal_snr and base.alphas_cumprod[-1] == 0
    assert torch.allclose(base.alphas_cumprod.double(), expected, atol=1e-5)
    assert base.scheduler["timestep_spacing"] == "trailing"  # sampling must begin where the noise is pure
    assert not caplog.messages


def test_runs_and_pictures_of_another_schedule_are_others(fusion):
    state, configs = single_file(SDXL)
    bases = [load_base({**state, "v_pred": MARKER} | more, config=configs) for more in ({}, {"ztsnr": MARKER})]
    assert bases[0].fingerprint == bases[1].fingerprint
    plain, other = (run_identity(base, fusion, TrainConfig()) for base in bases)
    assert plain != other and "zero_terminal_snr" not in plain["base"]
    assert prior_key(bases[0], SampleConfig(), 128) != prior_key(bases[1], SampleConfig(), 128)


def test_zero_terminal_snr_without_v_prediction(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """ComfyUI passes over the marker; a folder whose scheduler says so contradicts itself."""
    state, configs = single_file(SDXL)
    with caplog.at_level(logging.WARNING):
        base = load_base({**state, "ztsnr": MARKER}, config=configs)
    assert base.prediction_type == "epsilon" and not base.zero_terminal_snr
    assert "is marked ztsnr but predicts noise" in caplog.text
    configs["scheduler"]["rescale_betas_zero_snr"] = True
    write_folder(tmp_path / "base", configs, random_states(configs, family=SDXL))
    with pytest.raises(BaseModelError, match=r"zero terminal SNR \(rescale_betas_zero_snr\)"):
        load_base(tmp_path / "base")
