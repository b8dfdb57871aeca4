"""Loading a base: from all three sources, completely or not at all."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from far_train.mini.tiny import random_states, single_file_state, tiny_configs, write_folder
from far_train.models.families import SD21, V_STATISTIC, prediction_by_norm
from far_train.models.fingerprint import kv_digest
from far_train.models.layers import kv_weights
from far_train.models.loading import check_prediction_type, load_base, packaged_configs
from far_train.utils.errors import BaseModelError


@pytest.fixture(scope="module")
def configs():
    return tiny_configs()


@pytest.fixture(scope="module")
def ldm_state(configs):
    return single_file_state(configs, random_states(configs))


def test_digest_ignores_precision_but_not_content(base):
    weights = kv_weights(base.unet)
    assert kv_digest({k: v.half() for k, v in weights.items()}) == base.digest
    changed = {k: v.clone() for k, v in weights.items()}
    next(iter(changed.values()))[0, 0] += 0.1
    assert kv_digest(changed) != base.digest


def test_missing_weights_are_named(ldm_state, configs):
    broken = {k: v for k, v in ldm_state.items() if k != "model.diffusion_model.out.2.bias"}
    with pytest.raises(BaseModelError, match=r"lacks 1 of \d+ tensors, such as conv_out.bias"):
        load_base(broken, config=configs)


def test_configs_beside_a_folder_are_refused(tiny_folder, configs):
    with pytest.raises(BaseModelError, match="base_config: .* is a folder, which has its own"):
        load_base(tiny_folder, config=configs)


def test_wrong_shape_is_named(ldm_state, configs):
    broken = {**ldm_state, "model.diffusion_model.out.2.bias": torch.zeros(7)}
    with pytest.raises(BaseModelError, match=r"conv_out.bias is \[7\], expected \[4\]"):
        load_base(broken, config=configs)


def test_a_lora_is_no_base(tmp_path: Path):
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(BaseModelError, match="no Stable Diffusion UNet"):
        load_base(tmp_path / "lora.safetensors")


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(BaseModelError, match="there is no file"):
        load_base(tmp_path / "absent.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(BaseModelError, match="can't read"):
        load_base(tmp_path / "cut.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(BaseModelError, match="never unpickles"):
        load_base(tmp_path / "model.ckpt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BaseModelError, match="diffusers' layout"):
        load_base(tmp_path / "folder")


def test_libraries_that_cannot_be_imported_are_told_from_a_damaged_file(tiny_folder: Path, monkeypatch):
    """As transformers 4 fails where it finds a broken tensorflow."""

    class Broken(ModuleType):
        def __getattr__(self, name: str) -> None:
            raise RuntimeError(
                f"Failed to import {name} because of the following error:\nDescriptors cannot be created"
            )

    monkeypatch.setitem(sys.modules, "diffusers", Broken("diffusers"))
    with pytest.raises(BaseModelError, match="can't be imported .Descriptors cannot be created.*USE_TF=0") as error:
        load_base(tiny_folder)
    assert "damaged" not in str(error.value)


def test_folder_without_a_weight_file(tiny_folder: Path, tmp_path: Path, configs):
    write_folder(tmp_path, configs, random_states(configs))
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="vae holds no .safetensors"):
        load_base(tmp_path)


def test_folder_with_an_incomplete_part(tmp_path: Path, configs):
    write_folder(tmp_path, configs, random_states(configs))
    path = tmp_path / "text_encoder" / "model.safetensors"
    state = load_file(path)
    state.pop(next(k for k in state if k.endswith("final_layer_norm.weight")))
    save_file(state, path)
    with pytest.raises(BaseModelError, match="text_encoder lacks 1 of"):
        load_base(tmp_path)


def test_prediction_type_must_agree(tiny_folder: Path, ldm_state, configs):
    assert load_base(ldm_state, config=configs, prediction_type="epsilon").prediction_type == "epsilon"
    with pytest.raises(BaseModelError, match="scheduler says v_prediction"):
        load_base(tiny_folder, prediction_type="epsilon")
    with pytest.raises(BaseModelError, match="unknown"):
        load_base(tiny_folder, prediction_type="sample")


def test_prediction_type_is_measured_on_full_size_files():
    """The statistic is read off the layer that only the full size has; a contradiction stops."""
    spread = torch.linspace(-1, 1, 320)
    assert prediction_by_norm({V_STATISTIC: 0.3 * spread}) == "v_prediction"
    assert prediction_by_norm({V_STATISTIC: 0.1 * spread}) == "epsilon"
    assert prediction_by_norm({}) is None
    with pytest.raises(BaseModelError, match="looks like epsilon"):
        check_prediction_type("v_prediction", "epsilon", "file")


def test_packaged_variants():
    v, e = packaged_configs(SD21, "v_prediction"), packaged_configs(SD21, "epsilon")
    assert (v["unet"]["sample_size"], e["unet"]["sample_size"]) == (96, 64)
    assert (v["scheduler"]["prediction_type"], e["scheduler"]["prediction_type"]) == ("v_prediction", "epsilon")


def test_markers_of_merges_are_obeyed(ldm_state, configs, caplog):
    """ComfyUI reads both names; without the first a v-prediction merge would be trained for noise."""
    epsilon = {**configs, "scheduler": {**configs["scheduler"], "prediction_type": "epsilon"}}
    marker = torch.tensor([])
    assert load_base(ldm_state, config=epsilon).prediction_type == "epsilon" and not caplog.messages
    assert load_base({**ldm_state, "v_pred": marker}, config=epsilon).prediction_type == "v_prediction"
    with pytest.raises(BaseModelError, match="epsilon is stated but the state dict looks like v_prediction"):
        load_base({**ldm_state, "v_pred": marker}, config=configs, prediction_type="epsilon")
