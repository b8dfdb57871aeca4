"""Dataset folders in the real host: the host's own folder for them, and edits that the next training learns."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from far_train.data.dataset import write_dataset
from far_train.models.weights import FarWeights

from ..cats import SIZE, fuse_cats
from .comfy_server import ComfyServer, PromptRejected
from .graphs import defaults, node
from .listener import Listener
from .photos import refusal
from .test_training import training


@pytest.fixture(scope="module")
def cats(comfy: ComfyServer) -> Path:
    """output/far/datasets/cats, with six composites."""
    return write_dataset(fuse_cats(), comfy.folder("output/far/datasets") / "cats").folder


def loading(name: str) -> dict:
    return {"1": node("FaR_LoadDataset", folder=name), "2": node("PreviewImage", images=["1", 1])}


def test_datasets_in_the_hosts_own_folder(comfy: ComfyServer, cats: Path):
    """It may hold one of the same name, and sets of other programs."""
    for name in ("cats", "sets/cats"):
        shutil.copytree(cats, comfy.folder("datasets") / name)
    (comfy.folder("datasets") / "cats/composites/0003.png").unlink()
    (comfy.folder("datasets/other") / "dataset.json").write_text("{}")
    offered = comfy.object_info()["FaR_LoadDataset"]["input"]["required"]["folder"][1]["options"]
    theirs = [name for name in offered if name.startswith("datasets/")]
    assert "cats" in offered
    if "datasets" not in comfy.get("/models"):  # before 0.33
        assert not theirs
        with pytest.raises(PromptRejected, match="there is no dataset 'datasets/cats'"):
            comfy.queue(loading("datasets/cats"))
        return
    assert theirs == ["datasets/cats", "datasets/sets/cats"]
    for name, count in (("cats", 6), ("datasets/cats", 5), ("datasets/sets/cats", 6)):
        assert f"{count} pictures" in comfy.run(loading(name))["1"]["text"][0]
    with pytest.raises(PromptRejected, match=r"there is no dataset 'datasets/other' in .*datasets, .*input; make one"):
        comfy.queue(loading("datasets/other"))


def test_the_next_training_learns_edited_masks_and_captions(comfy: ComfyServer, cats: Path):
    folder = comfy.folder("output/far/datasets") / "edited"
    shutil.copytree(cats, folder)
    options = {**defaults(comfy, "FaR_TrainOptions"), "prior_batch_size": 1, "sample_every": 0}
    base = {"model": ["3", 0], "clip": ["3", 1], "vae": ["3", 2]}
    training = {"steps": 1, "batch_size": 6, "train_seed": 0, "name": "edited"}
    prompt = {
        "1": node("FaR_LoadDataset", folder="edited"),
        "3": node("FaRTest_TinyCheckpoint", weights_seed=0, prediction="v_prediction"),
        "4": node("FaR_TrainOptions", **options),
        "5": node("FaR_Train", **base, dataset=["1", 0], options=["4", 0], **training),
        "6": node("PreviewImage", images=["5", 1]),
    }
    mask, caption = folder / "composites/0000.0.mask.png", folder / "composites/0000.txt"
    comfy.run(prompt)
    assert {"1", "5"} <= set(comfy.cached(comfy.wait(comfy.queue(prompt))))
    redrawn = Image.new("L", (SIZE, SIZE))
    redrawn.paste(255, (10, 20, 30, 30))
    with Listener(comfy) as seen:
        redrawn.save(mask)
        comfy.run(prompt)
        seen.catch_up()
    told = next(text for node_id, text in seen.said if node_id == "5")
    assert told.startswith(
        "changed: dataset (its content changed); this starts a new run, edited-2, at step 1; edited is"
    )
    first, second = (comfy.folder("output/far") / name / "weights.safetensors" for name in ("edited", "edited-2"))
    assert FarWeights.load(first).digest() != FarWeights.load(second).digest()

    caption.write_text(caption.read_text().strip() + ", at noon\n")
    assert "1" not in comfy.cached(comfy.wait(comfy.queue(loading("edited"))))

    (folder / "priors").rename(folder / "priors-off")  # no file of it changes
    assert "1" not in comfy.cached(comfy.wait(comfy.queue(loading("edited"))))

    caption.write_text("a photo of a cat")
    node_id, words = refusal(comfy, prompt)
    assert node_id == "1" and "0000.txt: " in words and "is missing" in words


def test_the_next_training_on_a_dataset_encodes_nothing(comfy: ComfyServer):
    comfy.run(training(comfy, "encodes", train_seed=1))
    kept = list((comfy.base / "output" / "far" / "encodings").rglob("*.safetensors"))
    for path in kept:
        os.utime(path, (1, 1))
    comfy.run(training(comfy, "finds", train_seed=2))
    assert sum(path.stat().st_mtime > 1 for path in kept) == 1  # it was used
