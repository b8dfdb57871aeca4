"""Photos and their subjects in the real host: what folders hold, what SAM finds, and what users are told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from far_train.data.images import load_photo
from far_train.data.sam import load_sam
from far_train.data.settings import ExtractConfig
from far_train.data.subjects import SubjectExtractor
from far_train.utils.errors import SubjectError

from .comfy_server import ComfyServer, PromptRejected
from .graphs import node
from .photos import SIZES, extraction, photo_folder, pictures, refusal, saved, subject

# FaR_LoadPhotos


def test_photos_of_mixed_sizes_come_as_lists_upright_with_their_masks(comfy: ComfyServer):
    folder = photo_folder(comfy, "mixed", masks=False)
    _, mask = subject(*SIZES["a"])
    Image.fromarray(mask).save(folder / "a.mask.png")
    picture, alpha = subject(*SIZES["b"])
    Image.fromarray(np.dstack([picture, alpha])).save(folder / "b.png")
    turned = Image.fromarray(subject(50, 80)[0])
    exif = turned.getexif()
    exif[0x0112] = 6  # stored lying on its side
    turned.save(folder / "d.jpg", exif=exif)
    (folder / "e.png").write_bytes(b"\x89PNG cut off")
    (folder / "f10.png").write_bytes((folder / "c.png").read_bytes())
    (folder / "f9.png").write_bytes((folder / "c.png").read_bytes())

    prompt = {
        "1": node("FaR_LoadPhotos", folder="mixed", max_side=1024),
        **saved(["1", 0], ["1", 1]),
        "3": node("PreviewAny", source=["1", 2]),
    }
    outputs = comfy.run(prompt)
    images, masks = pictures(comfy, outputs["90"]), pictures(comfy, outputs["92"])
    sizes = [SIZES["a"], SIZES["b"], SIZES["c"], (80, 50), SIZES["c"], SIZES["c"]]
    assert [i.shape[:2] for i in images] == sizes
    assert [m.shape[:2] for m in masks] == sizes
    assert np.array_equal(images[0], subject(*SIZES["a"])[0])
    assert np.array_equal(masks[0][..., 0], mask) and np.array_equal(masks[1][..., 0], alpha)
    assert not any(m.any() for m in masks[2:])
    assert outputs["3"]["text"] == ["a", "b", "c", "d", "f9", "f10"]
    (told,) = outputs["1"]["text"]
    warning, counts = told.splitlines()
    assert counts == "6 photos, 2 of them with a mask" and warning.startswith("skipped") and "e.png" in warning
    assert outputs["1"]["images"], "the node shows no preview"


def test_large_photos_are_scaled_down(comfy: ComfyServer):
    photo_folder(comfy, "large", sizes={"a": (300, 200)})
    prompt = {"1": node("FaR_LoadPhotos", folder="large", max_side=128), **saved(["1", 0], ["1", 1])}
    outputs = comfy.run(prompt)
    assert pictures(comfy, outputs["90"])[0].shape[:2] == (128, 85)
    assert pictures(comfy, outputs["92"])[0].shape[:2] == (128, 85)


def test_a_changed_photo_is_noticed(comfy: ComfyServer):
    folder = photo_folder(comfy, "changing")
    prompt = {"1": node("FaR_LoadPhotos", folder="changing", max_side=1024), **saved(["1", 0], ["1", 1])}
    comfy.run(prompt)
    assert "1" in comfy.cached(comfy.wait(comfy.queue(prompt)))
    Image.fromarray(subject(*SIZES["a"], (0, 0, 250))[0]).save(folder / "a.png")
    entry = comfy.wait(comfy.queue(prompt))
    assert "1" not in comfy.cached(entry)
    assert pictures(comfy, entry["outputs"]["90"])[0][60, 80].tolist() == [0, 0, 250]


def test_an_empty_folder_is_refused_before_anything_runs(comfy: ComfyServer):
    (comfy.folder("input") / "empty").mkdir(exist_ok=True)
    prompt = {"1": node("FaR_LoadPhotos", folder="empty", max_side=1024), **saved(["1", 0], ["1", 1])}
    with pytest.raises(PromptRejected, match="folder: .*empty: holds no photos"):
        comfy.queue(prompt)


def test_a_missing_folder_is_refused_before_anything_runs(comfy: ComfyServer):
    prompt = {"1": node("FaR_LoadPhotos", folder="../models", max_side=1024), **saved(["1", 0], ["1", 1])}
    with pytest.raises(PromptRejected, match=r"there is no folder '\.\./models'"):
        comfy.queue(prompt)


def test_a_folder_of_broken_photos_is_explained(comfy: ComfyServer):
    folder = comfy.folder("input") / "broken"
    folder.mkdir(exist_ok=True)
    (folder / "a.jpg").write_bytes(b"no picture")
    prompt = {"1": node("FaR_LoadPhotos", folder="broken", max_side=1024), **saved(["1", 0], ["1", 1])}
    node_id, words = refusal(comfy, prompt)
    assert node_id == "1" and "none of its 1 photo " in words and "a.jpg" in words


# FaR_LoadSAM, FaR_ExtractSubject


def expected(folder: Path, sam_file: Path, min_area: float) -> dict[str, np.ndarray | None]:
    """What the library itself finds."""
    extractor = SubjectExtractor(load_sam(sam_file), ExtractConfig(min_area=min_area))
    found = {}
    for stem in SIZES:
        try:
            found[stem] = extractor.extract(load_photo(folder / f"{stem}.png")).mask.numpy() * 255
        except SubjectError:
            found[stem] = None
    return found


def test_subjects_are_found_and_a_photo_without_one_is_reported(comfy: ComfyServer, sam_file: Path):
    folder = photo_folder(comfy, "unmasked", masks=False)
    Image.new("RGB", (140, 100)).save(folder / "c.png")
    areas = {k: m.mean() / 255 for k, m in expected(folder, sam_file, 0.0).items() if m is not None}
    min_area = float(np.mean(sorted(areas.values())[:2]))  # at least the smallest falls away
    found = expected(folder, sam_file, min_area)
    kept = [stem for stem, mask in found.items() if mask is not None]
    assert 0 < len(kept) < 3

    outputs = comfy.run(extraction("unmasked", min_area))
    masks = pictures(comfy, outputs["92"])
    assert len(masks) == len(kept) == len(pictures(comfy, outputs["90"]))
    for stem, mask, image in zip(kept, masks, pictures(comfy, outputs["90"])):
        assert np.mean(mask[..., 0] != found[stem]) < 0.01
        assert np.array_equal(image, np.asarray(Image.open(folder / f"{stem}.png")))
    report = outputs["4"]["text"][0].splitlines()
    assert len(report) == 3
    *skipped, last = outputs["3"]["text"][0].splitlines()
    assert last == f"a subject in {len(kept)} of 3 photos" and skipped == [r for r in report if "skipped" in r]
    for stem, line in zip(SIZES, report):
        assert f"({stem})" in line
        assert line.startswith("skipped: ") == (stem not in kept) and ("): score" in line) == (stem in kept)
    assert outputs["5"]["images"] and outputs["3"]["images"]


def test_boxes_and_points_per_photo(comfy: ComfyServer, sam_file: Path):
    photo_folder(comfy, "prompted", masks=False)
    points = json.dumps({"1": {"box": [40, 20, 120, 100]}, "b": [[50, 80]], "3": {"box": [0, 0, 500, 50]}})
    outputs = comfy.run(extraction("prompted", 0.0, points))
    report = outputs["4"]["text"][0].splitlines()
    assert "score" in report[0] and "score" in report[1]
    assert report[2].startswith("skipped: photo 3 (c)") and "outside the photo" in report[2]
    node_id, words = refusal(comfy, extraction("prompted", 0.0, '{"9": [[1, 1]]}'))
    assert node_id == "3" and "there is no photo '9'" in words


def test_photos_that_have_masks_need_no_sam(comfy: ComfyServer):
    folder = photo_folder(comfy, "own_masks")
    prompt = extraction("own_masks", masks=["1", 1])
    del prompt["2"], prompt["3"]["inputs"]["sam_model"]
    outputs = comfy.run(prompt)
    masks = pictures(comfy, outputs["92"])
    assert all(np.array_equal(m[..., 0], subject(*size)[1]) for m, size in zip(masks, SIZES.values()))
    assert outputs["4"]["text"][0].count("own mask") == 3
    (folder / "b.mask.png").unlink()
    node_id, words = refusal(comfy, prompt)
    assert node_id == "3" and "photo 2 (b) has no mask" in words and "sam_model" in words


def test_no_subject_in_any_photo(comfy: ComfyServer, sam_file: Path):
    photo_folder(comfy, "nothing", masks=False)
    node_id, words = refusal(comfy, extraction("nothing", points='{"1": {"box": [0, 0, 999, 9]}}', min_area=0.9))
    assert node_id == "3" and "none of the 3 photos shows a usable subject" in words


def test_a_file_that_is_no_sam_is_explained(comfy: ComfyServer, sam_file: Path):
    save_file({"image_encoder.x": torch.zeros(2)}, sam_file.with_name("other.safetensors"))
    prompt = extraction("unmasked")
    prompt["2"]["inputs"]["model_name"] = "other.safetensors"
    node_id, words = refusal(comfy, prompt)
    assert node_id == "2" and "is not a segment-anything file" in words
    prompt["2"]["inputs"]["model_name"] = "missing.pth"
    with pytest.raises(PromptRejected, match="there is no 'missing.pth' in models/sams"):
        comfy.queue(prompt)
