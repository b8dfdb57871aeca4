"""Regularization images, Concept Fusion and dataset folders in the real host."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from far_train.data.dataset import DatasetFolder

from .comfy_server import ComfyServer, ExecutionFailed, PromptRejected
from .graphs import node
from .listener import Listener
from .photos import photo_folder, pictures, refusal

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "two_dogs"
AUTOMATIC = dict.fromkeys(("original", "solo", "pair", "triple", "beside_prior"), -1.0)


def fusing(comfy: ComfyServer, folders: dict[str, str], noun: str = "disc", size: int = 128, **changes) -> dict:
    """Photos → concepts → fusion (node 50), one concept per folder: token → folder of the input folder."""
    prompt: dict = {}
    before = None
    for i, (token, folder) in enumerate(folders.items()):
        photos, concept = str(10 + i), str(20 + i)
        prompt[photos] = node("FaR_LoadPhotos", folder=folder, max_side=1024)
        prompt[concept] = node(
            "FaR_Concept",
            images=[photos, 0],
            masks=[photos, 1],
            token=token,
            noun=noun,
            invert_mask=False,
            **({"concepts": [before, 0]} if before else {}),
        )
        before = concept
    prompt["50"] = node(
        "FaR_ConceptFusion",
        **{"concepts": [before, 0], "size": size, "count": 6, "fusion_seed": 3, "flip": 0.5} | AUTOMATIC | changes,
    )
    return prompt


@pytest.fixture(scope="module")
def folders(comfy: ComfyServer) -> dict[str, str]:
    """Two concepts, whose photos have different sizes."""
    photo_folder(comfy, "fuse_one")
    photo_folder(comfy, "fuse_two", sizes={"a": (90, 140), "b": (150, 150)})
    return {"<disc-one>": "fuse_one", "<disc-two>": "fuse_two"}


def report(outputs: dict, node_id: str = "50") -> str:
    return outputs[node_id]["text"][0]


# FaR_ConceptFusion


def test_photos_of_mixed_sizes_become_composites(comfy: ComfyServer, folders: dict[str, str]):
    prompt = fusing(comfy, folders) | {"60": node("SaveImage", images=["50", 1], filename_prefix="preview")}
    outputs = comfy.run(prompt)
    previews = pictures(comfy, outputs["60"])
    assert [p.shape for p in previews] == [(128, 128, 3)] * 6
    assert all(p.std() > 5 for p in previews)
    text = report(outputs)
    assert "2 concepts: <disc-one> disc, <disc-two> disc" in text and "6 pictures of 128 px" in text
    assert "original 10%, solo 25%, pair 65%" in text and text.startswith("No background pictures")
    wanting = report(comfy.run(fusing(comfy, folders, beside_prior=0.25)))
    assert "'beside_prior' (20% of the composites) is skipped" in wanting.splitlines()[0]
    assert outputs["50"]["images"], "the node shows no sheet"


def test_an_unchanged_fusion_comes_from_the_cache_and_a_seed_changes_it(comfy: ComfyServer, folders: dict[str, str]):
    prompt = fusing(comfy, folders, fusion_seed=11) | {"60": node("SaveImage", images=["50", 1], filename_prefix="x")}
    first = pictures(comfy, comfy.run(prompt)["60"])
    assert "50" in comfy.cached(comfy.wait(comfy.queue(prompt)))
    prompt["50"]["inputs"]["fusion_seed"] = 12
    second = pictures(comfy, comfy.run(prompt)["60"])
    assert any(not np.array_equal(a, b) for a, b in zip(first, second))


def test_priors_and_backgrounds_with_their_words(comfy: ComfyServer, folders: dict[str, str]):
    photo_folder(comfy, "fuse_prior", sizes={"a": (100, 100), "b": (80, 120)})
    scenes = comfy.folder("input") / "fuse_scenes"
    scenes.mkdir(exist_ok=True)
    for i, size in enumerate(((200, 120), (100, 160))):
        Image.new("RGB", size, (40 * i, 90, 200)).save(scenes / f"{i}.png")
    given = {"prior": ["31", 0], "backgrounds": ["32", 0], "background_captions": "by the sea\n"}
    prompt = fusing(comfy, folders, **given, beside_prior=0.25, count=30) | {
        "30": node("FaR_LoadPhotos", folder="fuse_prior", max_side=1024),
        "31": node("FaR_PriorFromImages", images=["30", 0], masks=["30", 1], noun=" Disc", invert_mask=False),
        "32": node("FaR_LoadPhotos", folder="fuse_scenes", max_side=1024),
        "60": node("FaR_SaveDataset", dataset=["50", 0], name="with priors"),
    }
    outputs = comfy.run(prompt)
    assert "2 pictures of a disc, 2 of them with a mask" in outputs["31"]["text"][0]
    assert "beside_prior 20%" in report(outputs) and "scene 45%" in report(outputs)
    assert "30 pictures of 128 px, 2 regularization images" in report(outputs)
    dataset = DatasetFolder(comfy.folder("output") / "far" / "datasets" / "with priors")
    captions = [dataset.composite(i).caption for i in range(30)]
    assert any("by the sea" in caption for caption in captions)
    assert any(any(m.name.token is None for m in dataset.composite(i).mentions) for i in range(30))

    prompt["50"]["inputs"]["background_captions"] = "by the sea\nin a garden\non a roof"
    node_id, words = refusal(comfy, prompt)
    assert node_id == "50" and "3 lines for 2 backgrounds" in words


def test_a_size_that_no_base_takes_is_refused_before_anything_runs(comfy: ComfyServer, folders: dict[str, str]):
    with pytest.raises(PromptRejected, match="size: 100 is not a multiple of 64; try 128"):
        comfy.queue(fusing(comfy, folders, size=100))


def test_layouts_can_be_weighted(comfy: ComfyServer, folders: dict[str, str]):
    outputs = comfy.run(fusing(comfy, folders, original=0.0, solo=0.0, pair=0.7))
    assert "layouts: pair 100%" in report(outputs)
    outputs = comfy.run(fusing(comfy, folders, pair=0.0))
    assert "layouts: original 29%, solo 71%" in report(outputs)
    node_id, words = refusal(comfy, fusing(comfy, folders, **dict.fromkeys(AUTOMATIC, 0.0)))
    assert node_id == "50" and "all shares are 0" in words


def test_a_shadow_can_be_left_out(comfy: ComfyServer, folders: dict[str, str]):
    def previews(**changes: float) -> list[np.ndarray]:
        fused = fusing(comfy, folders, original=0.0, **changes)
        fused["60"] = node("SaveImage", images=["50", 1], filename_prefix="shadow")
        return [picture.astype(int) for picture in pictures(comfy, comfy.run(fused)["60"])]

    usual, same, none = previews(), previews(shadow=0.35), previews(shadow=0.0)
    for with_one, again, without in zip(usual, same, none):
        assert np.array_equal(with_one, again)
        assert (with_one <= without).all() and (with_one < without - 10).any()


def test_one_concept_alone(comfy: ComfyServer):
    photo_folder(comfy, "fuse_single")
    outputs = comfy.run(fusing(comfy, {"<lone-disc>": "fuse_single"}))
    assert "1 concept: <lone-disc> disc" in report(outputs)


# FaR_SaveDataset, FaR_LoadDataset, FaR_DatasetDoctor


def test_a_dataset_survives_saving_and_loading(comfy: ComfyServer, folders: dict[str, str]):
    save = fusing(comfy, folders, fusion_seed=21) | {"60": node("FaR_SaveDataset", dataset=["50", 0], name="round")}
    assert "written to" in report(comfy.run(save), "60")
    folder = comfy.folder("output") / "far" / "datasets" / "round"
    dataset = DatasetFolder(folder)
    assert dataset.composite_count() == 6 and dataset.size == 128
    assert [n.token for n in dataset.names] == list(folders)
    assert (folder / "contact-sheet.jpg").is_file()

    load = {
        "1": node("FaR_LoadDataset", folder="round"),
        "2": node("SaveImage", images=["1", 1], filename_prefix="loaded"),
        "3": node("FaR_SaveDataset", dataset=["1", 0], name="copy"),
    }
    outputs = comfy.run(load)
    assert len(outputs["2"]["images"]) == 6 and "6 pictures of 128 px" in report(outputs, "1")
    copied = DatasetFolder(comfy.folder("output") / "far" / "datasets" / "copy")
    assert copied.digest() == dataset.digest()

    # An edit is seen, an unchanged folder is not read again.
    assert "1" in comfy.cached(comfy.wait(comfy.queue(load)))
    (folder / "composites" / "0003.png").unlink()
    outputs = comfy.run(load)
    assert "5 pictures" in report(outputs, "1")
    assert report(outputs, "3").endswith("copy-2")


def test_nothing_is_written_twice_or_overwritten(comfy: ComfyServer, folders: dict[str, str]):
    def save(seed: int, name: str = "kept") -> str:
        prompt = fusing(comfy, folders, fusion_seed=seed)
        prompt["60"] = node("FaR_SaveDataset", dataset=["50", 0], name=name)
        return report(comfy.run(prompt), "60")

    parent = comfy.folder("output") / "far" / "datasets"
    assert save(31).endswith("kept")
    before = {p: p.stat().st_mtime_ns for p in (parent / "kept").rglob("*")}
    assert save(32).endswith("kept-2")
    assert "holds this dataset already" in save(31)
    assert {p: p.stat().st_mtime_ns for p in (parent / "kept").rglob("*")} == before
    assert not (parent / "kept-3").exists()
    save(33, "../../escaped")
    assert not list(comfy.base.glob("escaped*")) and not list((comfy.base / "output").glob("escaped*"))


def test_the_command_lines_folder_loads_from_the_input_folder(comfy: ComfyServer, folders: dict[str, str]):
    prompt = fusing(comfy, folders, fusion_seed=41) | {"60": node("FaR_SaveDataset", dataset=["50", 0], name="moved")}
    comfy.run(prompt)
    target = comfy.folder("input") / "sets" / "moved"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(comfy.folder("output") / "far" / "datasets" / "moved", target)
    assert "input/sets/moved" in comfy.object_info()["FaR_LoadDataset"]["input"]["required"]["folder"][1]["options"]
    load = {"1": node("FaR_LoadDataset", folder="input/sets/moved"), "2": node("PreviewImage", images=["1", 1])}
    assert len(comfy.run(load)["2"]["images"]) == 6
    (target / "composites" / "0000.txt").write_text("a photo of nothing", encoding="utf-8")
    node_id, words = refusal(comfy, load)
    assert node_id == "1" and "0000.txt" in words and "is missing" in words
    load["1"]["inputs"]["folder"] = "nowhere"
    with pytest.raises(PromptRejected, match="there is no dataset 'nowhere'"):
        comfy.queue(load)


# FaR_ClassPrior


def drawing_priors(comfy: ComfyServer, count: int = 2, steps: int = 2, seed: int = 0, **changes) -> dict:
    photo_folder(comfy, "fuse_one")
    prompt = fusing(comfy, {"<disc-one>": "fuse_one"}, prior=["40", 0])
    return prompt | {
        "1": node("FaRTest_TinyCheckpoint", weights_seed=0, prediction="v_prediction"),
        "40": node(
            "FaR_ClassPrior",
            **{
                "model": ["1", 0],
                "clip": ["1", 1],
                "vae": ["1", 2],
                "concepts": ["20", 0],
                "count": count,
                "prior_seed": seed,
                "steps": steps,
                "guidance": 5.0,
                "size": 64,
            }
            | changes,
        ),
        "41": node("PreviewImage", images=["40", 1]),
    }


def drawn(comfy: ComfyServer) -> dict[Path, int]:
    files = (comfy.folder("output") / "far" / "priors").glob("*/disc/????.png")
    return {p: p.stat().st_mtime_ns for p in files}


def test_class_pictures_are_drawn_once_and_more_are_added(comfy: ComfyServer):
    before = drawn(comfy)
    outputs = comfy.run(drawing_priors(comfy))
    first = {p: t for p, t in drawn(comfy).items() if p not in before}
    assert len(first) == 2
    assert "2 regularization images, 0 of them with a mask" in outputs["40"]["text"][0]
    assert all(np.asarray(Image.open(p)).shape == (64, 64, 3) for p in first)
    assert "2 regularization images" in report(outputs)

    comfy.run(drawing_priors(comfy, count=3))
    later = {p: t for p, t in drawn(comfy).items() if p not in before}
    assert len(later) == 3 and all(later[p] == t for p, t in first.items())

    other = drawing_priors(comfy)
    other["1"]["inputs"]["weights_seed"] = 5
    comfy.run(other)
    known = {p.parent.parent for p in before | later}
    assert len({p.parent.parent for p in drawn(comfy)} - known) == 1
    assert json.loads(next(iter(first)).parents[1].joinpath("settings.json").read_text())["steps"] == 2


def test_masks_of_class_pictures_are_made_once(comfy: ComfyServer, sam_file: Path):  # noqa: F811
    prompt = drawing_priors(comfy, seed=7, sam_model=["2", 0])
    prompt["2"] = node("FaR_LoadSAM", model_name="tiny.safetensors")
    outputs = comfy.run(prompt)
    folder = Path(outputs["40"]["text"][0].rpartition(" in ")[2])
    masks = list(folder.glob("disc/*.mask.png"))
    assert f"2 regularization images, {len(masks)} of them with a mask" in outputs["40"]["text"][0]
    mended = folder / "disc" / "0000.mask.png"
    Image.new("L", (64, 64), 255).save(mended)
    prompt["40"]["inputs"]["count"] = 1
    assert "1 regularization image, 1 of them with a mask" in comfy.run(prompt)["40"]["text"][0]


def test_a_cancel_keeps_what_is_drawn(comfy: ComfyServer):
    before = set(drawn(comfy))
    prompt = drawing_priors(comfy, count=500, steps=4, seed=8)
    prompt_id = comfy.queue(prompt)
    deadline = time.monotonic() + 120
    while len(set(drawn(comfy)) - before) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    entry = comfy.cancel(prompt_id)
    assert [(e.node_id, e.kind) for e in comfy.errors(entry)] == [("40", "interrupted")]
    kept = {p: t for p, t in drawn(comfy).items() if p not in before}
    assert 2 <= len(kept) < 500
    prompt["40"]["inputs"]["count"] = len(kept)
    comfy.run(prompt)
    assert {p: t for p, t in drawn(comfy).items() if p not in before} == kept


def test_a_foreign_base_is_refused_in_words(comfy: ComfyServer):
    prompt = drawing_priors(comfy, size=80)
    with pytest.raises(ExecutionFailed, match="node 40 .*size: 80 px does not fit"):
        comfy.run(prompt)


# FaR_EmptyScenes


def among_scenes(comfy: ComfyServer, folders: dict[str, str], scenes: str, **changes) -> dict:
    base = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    settings = {"scenes": scenes, "each": 2, "scene_seed": 0, "steps": 2, "guidance": 5.0, "size": 64} | changes
    return fusing(comfy, folders, backgrounds=["45", 0], background_captions=["45", 1], count=8) | {
        "1": node("FaRTest_TinyCheckpoint", weights_seed=0, prediction="v_prediction"),
        "45": node("FaR_EmptyScenes", **base, **settings),
        "60": node("FaR_SaveDataset", dataset=["50", 0], name="among_scenes"),
    }


def test_empty_scenes_are_drawn_once_and_stand_behind_the_subjects(comfy: ComfyServer, folders: dict[str, str]):
    prompt = among_scenes(comfy, folders, "an empty beach | on the beach\n\nan empty room")
    with Listener(comfy) as listener:
        outputs = comfy.run(prompt)
        listener.catch_up()
    told = [words for node_id, words in listener.texts if node_id == "45"]
    assert told[0] == "images: 0 of 4" and re.fullmatch(r"images: 3 of 4, \d+ s left", told[3])
    text = outputs["45"]["text"][0]
    assert text.startswith("4 empty scenes in ")
    folder = Path(text.rpartition(" in ")[2])
    assert folder.is_relative_to(comfy.folder("output") / "far" / "scenes")
    first = {p: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    assert len(first) == 4 and all(np.asarray(Image.open(p)).shape == (64, 64, 3) for p in first)
    saved = comfy.folder("output") / "far" / "datasets" / "among_scenes"
    assert any(p.read_text().strip().endswith(", on the beach") for p in saved.rglob("*.txt"))

    prompt["45"]["inputs"]["scenes"] += "\nan empty wood | in a wood"
    prompt["60"]["inputs"]["name"] = "among_more_scenes"
    assert comfy.run(prompt)["45"]["text"][0] == f"6 empty scenes in {folder}"
    later = {p: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    assert len(later) == 6 and later.items() > first.items()


def test_scenes_that_say_nothing_are_refused_in_words(comfy: ComfyServer, folders: dict[str, str]):
    for scenes, words in (("\n", "scenes: there are none"), ("a wall\n| at sea", "scenes: line 2 says nothing before")):
        with pytest.raises(ExecutionFailed, match=f"node 45 .*{words}"):
            comfy.run(among_scenes(comfy, folders, scenes))


# Real photos


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no sample photos at {DATA}")
def test_two_dogs(comfy: ComfyServer):
    for name in ("corgi", "chow", "class_prior"):
        link = comfy.folder("input") / "two_dogs" / name
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            shutil.copytree(DATA / name, link)
    prompt = fusing(
        comfy,
        {"<corgi-dog>": "two_dogs/corgi", "<chow-dog>": "two_dogs/chow"},
        noun="dog",
        size=256,
        prior=["31", 0],
        count=8,
    ) | {
        "30": node("FaR_LoadPhotos", folder="two_dogs/class_prior", max_side=512),
        "31": node("FaR_PriorFromImages", images=["30", 0], masks=["30", 1], noun="dog", invert_mask=False),
        "60": node("FaR_SaveDataset", dataset=["50", 0], name="two_dogs"),
    }
    outputs = comfy.run(prompt)
    assert "5 photos, 5 of them with a mask" in outputs["10"]["text"][0]
    text = report(outputs)
    assert "2 concepts: <corgi-dog> dog, <chow-dog> dog" in text and "12 regularization images" in text
    assert "is skipped" not in text
    dataset = DatasetFolder(comfy.folder("output") / "far" / "datasets" / "two_dogs")
    assert dataset.composite_count() == 8 and dataset.prior_count() == 12
    assert all(m.mask.max() > 0.5 for i in range(8) for m in dataset.composite(i).mentions)


def test_the_doctor_examines_concepts_and_a_dataset(comfy: ComfyServer, folders: dict[str, str]):
    """The photos of both discs have one ground, and those of the second are but two."""
    prompt = fusing(comfy, folders, count=2) | {
        "60": node("FaR_DatasetDoctor", concepts=["21", 0], dataset=["50", 0], size=192),
        "61": node("PreviewAny", source=["60", 0]),
    }
    outputs = comfy.run(prompt)
    assert outputs["60"]["text"] == outputs["61"]["text"]
    told = report(outputs, "60")
    assert "warning: <disc-one>: its 3 photos seem to be taken in one place" in told
    assert "warning: <disc-two>: it has only 2 photos" in told
    assert "warning: <disc-two>, photo 1: it has 140×90 px, less than the base's native 192 px" in told
    assert "warning: its pictures are 128 px a side, less than the base's native 192 px" in told
    words = refusal(comfy, {"60": node("FaR_DatasetDoctor", size=0)})[1]
    assert "concepts, dataset: neither is connected" in words
