"""Files that a node made, edited or deleted by a person: an unchanged prompt takes notice, and only then runs again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .comfy_server import ComfyServer, ExecutionFailed
from .graphs import node
from .photos import concept, photo_folder, pictures
from .test_fusion import drawing_priors
from .test_training import run_folder, state_of, steps_of, training


def rerun(comfy: ComfyServer, prompt: dict, node_id: str) -> tuple[bool, dict]:
    """Whether the node is executed, and what the nodes show."""
    entry = comfy.wait(comfy.queue(prompt))
    if entry["status"]["status_str"] != "success":
        raise ExecutionFailed(comfy.errors(entry))
    return node_id not in comfy.cached(entry), entry["outputs"]


def told_folder(outputs: dict, node_id: str) -> Path:
    return Path(outputs[node_id]["text"][0].rpartition(" in ")[2])


def painted(path: Path, shade: int, side: int = 64) -> None:
    Image.new("L", (side, side), shade).save(path)


def test_edited_masks_and_deleted_pictures_of_a_class_are_noticed(comfy: ComfyServer):
    """Masks count without a SAM, too."""
    prompt = drawing_priors(comfy, seed=21)
    folder = told_folder(comfy.run(prompt), "40") / "disc"
    assert not rerun(comfy, prompt, "40")[0]  # the node has written files, and nobody else
    for shade, masked in ((255, 1), (0, 0)):
        painted(folder / "0000.mask.png", shade)
        executed, outputs = rerun(comfy, prompt, "40")
        assert executed and f"2 regularization images, {masked} of them with a mask" in outputs["40"]["text"][0]
        assert not rerun(comfy, prompt, "40")[0]
    (folder / "0001.png").unlink()
    assert rerun(comfy, prompt, "40")[0] and (folder / "0001.png").exists()
    assert not rerun(comfy, prompt, "40")[0]


def test_a_mask_painted_black_stays_and_a_wrong_one_is_named(comfy: ComfyServer, sam_file: Path):
    prompt = drawing_priors(comfy, seed=22, sam_model=["2", 0])
    prompt["2"] = node("FaR_LoadSAM", model_name=sam_file.name)
    folder = told_folder(comfy.run(prompt), "40") / "disc"
    for name in ("0000.mask.png", "0001.mask.png"):
        painted(folder / name, 0)
    before = state_of(folder)
    executed, outputs = rerun(comfy, prompt, "40")
    assert executed and "2 regularization images, 0 of them with a mask" in outputs["40"]["text"][0]
    assert state_of(folder) == before
    for shade, side, words in ((90, 64, "mask is empty: its brightest value is 90"), (255, 32, "mask is 32x32 px")):
        painted(folder / "0001.mask.png", shade, side)
        with pytest.raises(ExecutionFailed, match=f"node 40 .*disc/0001.*{words}"):
            comfy.run(prompt)


def test_a_replaced_scene_is_noticed(comfy: ComfyServer):
    base = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    settings = {"scenes": "a wall", "each": 2, "scene_seed": 21, "steps": 2, "guidance": 5.0, "size": 64}
    prompt = {
        "1": node("FaRTest_TinyCheckpoint", weights_seed=0, prediction="v_prediction"),
        "45": node("FaR_EmptyScenes", **base, **settings),
        "46": node("SaveImage", images=["45", 0], filename_prefix="scene"),
    }
    folder = told_folder(comfy.run(prompt), "45")
    assert not rerun(comfy, prompt, "45")[0]
    Image.new("RGB", (64, 64), (255, 0, 0)).save(next(folder.glob("*-0000.png")))
    executed, outputs = rerun(comfy, prompt, "45")
    first, second = pictures(comfy, outputs["46"])
    assert executed and (first == (255, 0, 0)).all() and not (second == (255, 0, 0)).all()
    assert not rerun(comfy, prompt, "45")[0]


def test_a_deleted_run_is_trained_again(comfy: ComfyServer):
    prompt = training(comfy, "deleted")
    comfy.run(prompt)
    assert not rerun(comfy, prompt, "4")[0]
    shutil.rmtree(run_folder(comfy, "deleted"))
    assert rerun(comfy, prompt, "4")[0] and steps_of(run_folder(comfy, "deleted")) == [1, 2]
    assert not rerun(comfy, prompt, "4")[0]


def test_deleted_weights_are_saved_again(comfy: ComfyServer):
    prompt = training(comfy, "kept")
    prompt["7"] = node(
        "FaR_SaveWeights", weights=["4", 0], name="kept", export_lora=True, export_embeddings=False, lora_rank=0
    )
    files = [Path(line) for line in comfy.run(prompt)["7"]["text"][0].splitlines()]
    assert not rerun(comfy, prompt, "7")[0]
    for path in files:
        path.unlink()
    assert rerun(comfy, prompt, "7")[0] and all(path.exists() for path in files) and len(files) == 2
    assert not rerun(comfy, prompt, "7")[0]


def test_an_edited_dataset_is_trained_as_it_is(comfy: ComfyServer):
    """Its node's output goes straight to the training; a folder that is gone is written again."""
    prompt = training(comfy, "on-saved") | {"7": node("FaR_SaveDataset", dataset=["2", 0], name="on saved")}
    prompt["4"]["inputs"]["dataset"] = ["7", 0]
    comfy.run(prompt)
    assert not rerun(comfy, prompt, "7")[0]
    folder = comfy.folder("output") / "far" / "datasets" / "on saved"
    (folder / "composites" / "0001.png").unlink()
    assert rerun(comfy, prompt, "7")[0] and run_folder(comfy, "on-saved-2").exists()
    assert not rerun(comfy, prompt, "7")[0]
    shutil.rmtree(folder)
    assert rerun(comfy, prompt, "7")[0] and len(list(folder.glob("composites/*[0-9].png"))) == 3


def test_the_sheet_shows_the_first_of_each_class(comfy: ComfyServer):
    """Two nouns share its 24 places, and not the last noun alone."""
    photo_folder(comfy, "sheet")
    prompt = drawing_priors(comfy, count=13, steps=1, seed=23, concepts=["21", 0])
    prompt["21"] = concept(["10", 0], ["10", 1], token="<a-plate>", noun="plate", concepts=["20", 0])
    prompt["42"] = node("SaveImage", images=["40", 1], filename_prefix="sheet")
    outputs = comfy.run(prompt)
    folder = told_folder(outputs, "40")
    (before,) = pictures(comfy, outputs["42"])
    for name in ("disc/0012.png", "plate/0012.png"):  # past the share of each
        Image.new("RGB", (64, 64), (255, 0, 255)).save(folder / name)
    (sheet,) = pictures(comfy, rerun(comfy, prompt, "40")[1]["42"])
    assert np.array_equal(sheet, before)
    for name in ("disc/0000.png", "plate/0011.png"):
        Image.new("RGB", (64, 64), (255, 0, 255)).save(folder / name)
        (sheet,) = pictures(comfy, rerun(comfy, prompt, "40")[1]["42"])
        assert not np.array_equal(sheet, before)
        before = sheet


def by_link(prompt: dict, node_id: str, name: str) -> dict:
    """The prompt with a choice of a node that comes through a link."""
    choice = prompt[node_id]["inputs"][name]
    linked = {**prompt[node_id], "inputs": {**prompt[node_id]["inputs"], name: ["71", 0]}}
    switch = node("ComfySwitchNode", switch=True, on_true=["70", 0], on_false=["70", 0])
    return prompt | {"70": node("PrimitiveString", value=choice), "71": switch, node_id: linked}


def test_what_a_linked_choice_names_is_looked_at_every_time(comfy: ComfyServer, sam_file: Path):
    """The host doesn't tell a node which file that is before it runs."""
    folder = photo_folder(comfy, "by_link")
    photos = {
        "1": node("FaR_LoadPhotos", folder="by_link", max_side=1024),
        "2": node("PreviewImage", images=["1", 0]),
    }
    dataset = {
        "1": node("FaR_LoadDataset", folder="by link"),
        "2": node("PreviewAny", source=["1", 2]),
    }
    sam = {"1": node("FaR_LoadSAM", model_name=sam_file.name), "2": node("PreviewAny", source=["1", 0])}
    weights = {"1": node("FaR_LoadWeights", file="by link.safetensors"), "2": node("PreviewAny", source=["1", 1])}
    made = training(comfy, "by-link")
    made["7"] = node("FaR_SaveDataset", dataset=["2", 0], name="by link")
    made["8"] = node("FaR_SaveWeights", weights=["4", 0], name="by link", export_lora=False, export_embeddings=False,
                     lora_rank=0)  # fmt: skip
    comfy.run(made)
    for prompt, name in ((photos, "folder"), (dataset, "folder"), (sam, "model_name"), (weights, "file")):
        linked = by_link(prompt, "1", name)
        comfy.run(linked)
        executed, _ = rerun(comfy, linked, "1")
        assert executed, name
        comfy.run(prompt)
        assert not rerun(comfy, prompt, "1")[0], name  # written down, it is looked up in time
    linked = by_link(photos, "1", "folder")
    comfy.run(linked)
    (folder / "a.mask.png").unlink()
    assert rerun(comfy, linked, "1")[1]["1"]["text"] == ["3 photos, 2 of them with a mask"]
