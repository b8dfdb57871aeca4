"""File names from what users type, and sizes of a base that a graph shows no config of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from far_train.mini.tiny import random_states, tiny_configs
from far_train.models.families import SD21, SDXL
from far_train.utils.files import write_tensors

from .nodes_pack import pack_module

naming = pack_module("nodes.naming")
layout = pack_module("nodes.layout")
errors = pack_module("far_train.utils.errors")
runs = pack_module("far_train.training.run_folder")


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("two dogs", "two dogs"),
        (" ../../etc/passwd ", "etc-passwd"),
        ("C:\\Users\\me", "C-Users-me"),
        ("", "run"),
        ("...", "run"),
        ("aux", "run-aux"),
        ("con.2024", "run-con.2024"),
        ("Con.txt", "run-Con.txt"),
        ("Möpse & Hunde?", "Möpse - Hunde"),
        ("a" * 300, "a" * 80),
        ("name. ", "name"),
    ],
)
def test_names_are_made_safe(typed: str, name: str):
    assert naming.file_name(typed, "run") == name


def test_links_count_as_taken_names(tmp_path: Path):
    """Whatever lies in the output folder, nothing is written through it to somewhere else."""
    outside, folder = tmp_path / "outside", tmp_path / "output"
    folder.mkdir()
    source = tmp_path / "weights.safetensors"
    write_tensors(source, {"a": torch.zeros(2)}, {})
    for target in (outside, outside / "w.safetensors"):  # to nowhere, and then to a folder
        for name in ("w", "w.safetensors"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target)
        assert naming.place(source, folder, "w").name == "w-2.safetensors"
        assert runs.find_run(folder, "w", {}) == (folder / "w-2", False)
        assert not outside.exists() or not any(outside.iterdir())
        outside.mkdir(exist_ok=True)


def test_place_never_overwrites_and_never_doubles(tmp_path: Path):
    def made(value: float) -> Path:
        path = tmp_path / "made" / "weights.safetensors"
        write_tensors(path, {"x": torch.full((2,), value)}, {"a": "1", "b": "2"})
        return path

    folder = tmp_path / "models"
    assert naming.place(made(1), folder, "w").name == "w.safetensors"
    assert naming.place(made(2), folder, "w").name == "w-2.safetensors"
    assert naming.place(made(1), folder, "w").name == "w.safetensors"
    (folder / "w-3.safetensors").write_bytes(b"damaged")
    assert naming.place(made(3), folder, "w").name == "w-4.safetensors"


TWENTY_FOUR = {f"encoder.layers.{i}.mlp.fc1.weight": torch.zeros(1) for i in range(24)}


@pytest.mark.parametrize(("index", "count"), [(None, 24), (-1, 24), (-2, 23), (0, 1), (22, 23), (-25, 24)])
def test_text_layers_are_counted_as_the_host_counts_them(index: int | None, count: int):
    assert layout.text_layer_count(SD21.text_encoders[0], TWENTY_FOUR, index) == count


def test_text_layers_of_sdxl_are_the_last_but_one_of_all():
    """The first encoder could end earlier; the second one's pooled output comes from its last layer."""
    first, second = SDXL.text_encoders
    assert layout.text_layer_count(first, TWENTY_FOUR, -2) == layout.text_layer_count(second, TWENTY_FOUR, -2) == 24
    assert layout.text_layer_count(first, TWENTY_FOUR, -3) == 23
    for spec, index, run in ((first, -1, 24), (first, None, 24), (second, -3, 22), (second, -1, 24)):
        with pytest.raises(errors.BaseModelError, match=f"stops at layer {run} of 24 of {spec.comfy_name}"):
            layout.text_layer_count(spec, TWENTY_FOUR, index)


@pytest.mark.parametrize(
    ("unet", "text", "message"),
    [
        ({"context_dim": 1280}, ["clip_g"], "MODEL is the SDXL refiner"),
        ({"context_dim": 768}, ["clip_h"], "MODEL is Stable Diffusion 1.5, CLIP is Stable Diffusion 2.1's"),
        ({"adm_in_channels": 2048}, ["clip_h"], "MODEL is an unCLIP model"),
        ({"context_dim": 64, "adm_in_channels": 1600}, ["clip_h"], "takes vectors beside the text, unlike Stable Diff"),
        ({"context_dim": 64}, ["clip_l", "clip_g"], "takes no vectors beside the text, unlike Stable Diffusion XL"),
        ({"in_channels": 9}, ["clip_h"], "MODEL is an inpainting model"),
        ({"context_dim": None}, ["clip_h"], "MODEL is Kind"),
        ({}, ["clip_l"], "MODEL is Stable Diffusion 2.1, CLIP is Stable Diffusion 1.5's"),
        ({}, ["clip_l", "clip_h"], "it has clip_l and clip_h, not clip_l or clip_h or clip_l and clip_g"),
        ({}, [], "no known text encoder"),
    ],
)
def test_other_families_are_named(unet: dict, text: list[str], message: str):
    known = {"context_dim": 1024, "transformer_depth": [1], "channel_mult": [1], "in_channels": 4}
    assert layout.find_family(known, "Kind", ["clip_h"]).key == "sd21"
    with pytest.raises(errors.BaseModelError, match=message):
        layout.find_family(known | unet, "Kind", text)


def test_the_depths_of_transformers_follow_the_levels():
    ldm = {"model_channels": 320, "channel_mult": [1, 2, 4], "num_res_blocks": 2, "num_head_channels": 64,
           "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
           "transformer_depth_middle": 10, "context_dim": 2048, "in_channels": 4, "out_channels": 4,
           "adm_in_channels": 2816, "use_linear_in_transformer": True}  # fmt: skip
    found = layout.unet_config(SDXL, ldm)
    assert found["transformer_layers_per_block"] == [1, 2, 10]
    assert found["down_block_types"] == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    # SSD-1B, whose blocks were pruned unevenly.
    pruned = {"transformer_depth": [0, 0, 2, 2, 4, 4], "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4]}
    for change in (pruned | {"transformer_depth_middle": -1}, {"transformer_depth": [0, 0, 2, 1, 10, 10]}):
        with pytest.raises(errors.BaseModelError, match="differ within a level"):
            layout.unet_config(SDXL, ldm | change)


def test_a_vae_of_another_kind_is_refused():
    configs = tiny_configs()
    states = random_states(configs)
    text = {k.removeprefix("text_model."): v for k, v in states["text_encoder"].items()}
    unet = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "transformer_depth": [1, 0],
            "num_head_channels": 16, "context_dim": 32, "in_channels": 4, "out_channels": 4}  # fmt: skip
    encoder = layout.TextEncoder(text, heads=2, activation="gelu", layers=2)
    about = {"prediction_type": "epsilon", "scaling_factor": 0.18215}
    with pytest.raises(errors.BaseModelError, match="VAE is not Stable Diffusion's"):
        layout.component_configs(SD21, unet, [encoder], {"decoder.x": torch.zeros(1)}, **about)
