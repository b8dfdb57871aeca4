"""Photos, subjects and concepts in the real host: what folders, LoadImage and segmenters send, what users are told."""

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

from ..tiny_sam import save_tiny, tiny_sam
from .comfy_server import ComfyServer, ExecutionFailed, PromptRejected

NODES = (
    "FaR_LoadPhotos",
    "FaR_LoadSAM",
    "FaR_ExtractSubject",
    "FaR_Concept",
    "FaR_ClassPrior",
    "FaR_PriorFromImages",
    "FaR_EmptyScenes",
    "FaR_ConceptFusion",
    "FaR_SaveDataset",
    "FaR_LoadDataset",
    "FaR_MiniCheckpoint",
    "FaR_MiniPhotos",
    "FaR_TrainOptions",
    "FaR_Train",
    "FaR_SaveWeights",
    "FaR_LoadWeights",
    "FaR_ApplyWeights",
    "FaR_AttentionProbe",
    "FaR_Evaluate",
)
SIZES = {"a": (120, 160), "b": (160, 100), "c": (96, 96)}  # height, width


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def subject(height: int, width: int, colour: tuple[int, int, int] = (230, 30, 30)) -> tuple[np.ndarray, np.ndarray]:
    """A coloured disc on greenish ground and its mask, uint8."""
    rows, columns = np.indices((height, width))
    inside = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (0.3 * min(height, width)) ** 2
    picture = np.where(inside[..., None], np.array(colour), np.array((128, 150, 128))).astype(np.uint8)
    return picture, (255 * inside).astype(np.uint8)


def photo_folder(comfy: ComfyServer, name: str, masks: bool = True, sizes: dict = SIZES) -> Path:
    """Photos of mixed sizes in a folder of the host's input folder."""
    folder = comfy.folder("input") / name
    folder.mkdir(exist_ok=True)
    for stem, size in sizes.items():
        picture, mask = subject(*size)
        Image.fromarray(picture).save(folder / f"{stem}.png")
        if masks:
            Image.fromarray(mask).save(folder / f"{stem}.mask.png")
    return folder


@pytest.fixture(scope="module")
def sam_file(comfy: ComfyServer) -> Path:
    """A small SAM with random weights in models/sams."""
    return save_tiny(comfy.folder("models/sams") / "tiny.safetensors", tiny_sam(3))


def pictures(comfy: ComfyServer, output: dict) -> list[np.ndarray]:
    """The saved pictures of a SaveImage node, in order."""
    return [np.asarray(Image.open(comfy.file(item)).convert("RGB")) for item in output["images"]]


def saved(image: list, mask: list) -> dict:
    """Nodes 90 to 92: save images and masks where a test can read them."""
    return {
        "90": node("SaveImage", images=image, filename_prefix="image"),
        "91": node("MaskToImage", mask=mask),
        "92": node("SaveImage", images=["91", 0], filename_prefix="mask"),
    }


def refusal(comfy: ComfyServer, prompt: dict) -> tuple[str, str]:
    """The id of the node at which a prompt fails, and its words."""
    with pytest.raises(ExecutionFailed) as failed:
        comfy.run(prompt)
    (error,) = failed.value.errors
    return error.node_id, error.message


def concept(images: list, masks: list, **changes) -> dict:
    return node(
        "FaR_Concept",
        **{"images": images, "masks": masks, "token": "<red-disc>", "noun": "disc", "invert_mask": False} | changes,
    )


def preview_of(node_id: str = "2") -> dict:
    """An output node that makes the host run the concept of ``node_id``."""
    return node(
        "FaR_ConceptFusion",
        concepts=[node_id, 0],
        size=64,
        count=2,
        fusion_seed=0,
        flip=0.5,
        original=1.0,
        solo=0.0,
        pair=0.0,
        triple=0.0,
        beside_prior=0.0,
    )


# The nodes


def test_every_node_appears_without_a_warning(comfy: ComfyServer):
    info = comfy.object_info()
    for name in NODES:
        assert info[name]["category"] == "FaR"
        assert info[name]["description"]
        inputs = {**info[name]["input"].get("required", {}), **info[name]["input"].get("optional", {})}
        for key, value in inputs.items():
            assert value[1]["tooltip"], f"{name}: no tooltip on {key}"
        assert all(info[name]["output_tooltips"])
    log = comfy.start_log()
    assert "IMPORT FAILED" not in log and "Traceback" not in log
    assert "WARNING" not in log.split("Import times")[0]


def test_every_node_has_a_help_page(comfy: ComfyServer):
    info = comfy.object_info()
    for name in (name for name in info if name.startswith("FaR_")):
        page = comfy._request(f"/extensions/ComfyUI-FaR/docs/{name}.md").decode()
        inputs = info[name]["input"]
        for key in (*inputs.get("required", {}), *inputs.get("optional", {})):
            assert f"`{key}`" in page, f"{name}.md says nothing about {key}"


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
    assert counts == "6 photos, 2 of them with a mask" and warning.startswith("left out") and "e.png" in warning
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


def test_an_empty_folder_is_named(comfy: ComfyServer):
    (comfy.folder("input") / "empty").mkdir(exist_ok=True)
    prompt = {"1": node("FaR_LoadPhotos", folder="empty", max_side=1024), **saved(["1", 0], ["1", 1])}
    node_id, words = refusal(comfy, prompt)
    assert node_id == "1" and "empty" in words and "holds no photos" in words


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


def extraction(folder: str, min_area: float = 0.03, points: str = "", **changes) -> dict:
    return {
        "1": node("FaR_LoadPhotos", folder=folder, max_side=1024),
        "2": node("FaR_LoadSAM", model_name="tiny.safetensors"),
        "3": node(
            "FaR_ExtractSubject",
            **{
                "images": ["1", 0],
                "names": ["1", 2],
                "sam_model": ["2", 0],
                "box_format": "x0, y0, x1, y1",
                "points": points,
                "min_area": min_area,
            }
            | changes,
        ),
        **saved(["3", 0], ["3", 1]),
        "4": node("PreviewAny", source=["3", 2]),
        "5": node("PreviewImage", images=["3", 3]),
    }


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
    *left_out, last = outputs["3"]["text"][0].splitlines()
    assert last == f"a subject in {len(kept)} of 3 photos" and left_out == [r for r in report if "left out" in r]
    for stem, line in zip(SIZES, report):
        assert f"({stem})" in line
        assert line.startswith("left out: ") == (stem not in kept) and ("): score" in line) == (stem in kept)
    assert outputs["5"]["images"] and outputs["3"]["images"]


def test_boxes_and_points_per_photo(comfy: ComfyServer, sam_file: Path):
    photo_folder(comfy, "prompted", masks=False)
    points = json.dumps({"1": {"box": [40, 20, 120, 100]}, "b": [[50, 80]], "3": {"box": [0, 0, 500, 50]}})
    outputs = comfy.run(extraction("prompted", 0.0, points))
    report = outputs["4"]["text"][0].splitlines()
    assert "score" in report[0] and "score" in report[1]
    assert report[2].startswith("left out: photo 3 (c)") and "outside the photo" in report[2]
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


# FaR_Concept and the masks of other nodes


@pytest.fixture(scope="module")
def loaded(comfy: ComfyServer) -> None:
    """input/opaque.png, and input/cut_out.png with transparent surroundings."""
    picture, alpha = subject(100, 120)
    Image.fromarray(picture).save(comfy.folder("input") / "opaque.png")
    Image.fromarray(np.dstack([picture, alpha])).save(comfy.folder("input") / "cut_out.png")


def test_load_image_without_alpha(comfy: ComfyServer, loaded: None):
    """Its mask is 64×64 zeros."""
    prompt = {"1": node("LoadImage", image="opaque.png"), "2": concept(["1", 0], ["1", 1]), "3": preview_of()}
    node_id, words = refusal(comfy, prompt)
    assert node_id == "2" and "the photo's mask is empty" in words and "LoadImage" in words


def test_load_image_with_alpha(comfy: ComfyServer, loaded: None):
    """Its mask is 1 − alpha."""
    prompt = {"1": node("LoadImage", image="cut_out.png"), "2": concept(["1", 0], ["1", 1]), "3": preview_of()}
    node_id, words = refusal(comfy, prompt)
    assert node_id == "2" and "photo 1" in words and "switch invert_mask on" in words
    prompt["2"] = concept(["1", 0], ["1", 1], invert_mask=True)
    outputs = comfy.run(prompt)
    assert outputs["2"]["text"] == ["<red-disc> disc: 1 photo"]


def test_masks_of_stock_nodes(comfy: ComfyServer, loaded: None):
    Image.fromarray(subject(100, 120)[1]).save(comfy.folder("input") / "mask.png")
    prompt = {
        "1": node("LoadImage", image="opaque.png"),
        "4": node("LoadImage", image="mask.png"),
        "5": node("ImageToMask", image=["4", 0], channel="red"),
        "2": concept(["1", 0], ["5", 0]),
        "3": preview_of(),
        "7": concept(["1", 0], ["5", 0], token="<whole-disc>", concepts=["2", 0]),
        "8": preview_of("7"),
    }
    outputs = comfy.run(prompt)
    assert "2 concepts: <red-disc> disc, <whole-disc> disc" in outputs["8"]["text"][0]
    prompt["6"] = node("SolidMask", value=1.0, width=120, height=100)
    prompt["7"]["inputs"]["masks"] = ["6", 0]
    node_id, words = refusal(comfy, prompt)
    assert node_id == "8" and "concept <whole-disc>, photo 1: the mask covers 100.00% of the frame" in words
    prompt["6"]["inputs"]["width"] = 100
    node_id, words = refusal(comfy, prompt)
    assert node_id == "7" and "photo 1: its mask is 100×100 pixels, but the photo 120×100" in words


def test_photos_without_masks_are_left_out_by_number(comfy: ComfyServer):
    folder = photo_folder(comfy, "one_missing")
    (folder / "b.mask.png").unlink()
    prompt = {
        "1": node("FaR_LoadPhotos", folder="one_missing", max_side=1024),
        "2": concept(["1", 0], ["1", 1]),
        "3": preview_of(),
    }
    outputs = comfy.run(prompt)
    assert outputs["2"]["text"] == ["left out, since their masks are empty: photo 2\n<red-disc> disc: 2 photos"]


def test_batches_meet_batches(comfy: ComfyServer, loaded: None):
    prompt = {
        "1": node("LoadImage", image="opaque.png"),
        "4": node("RepeatImageBatch", image=["1", 0], amount=3),
        "5": node("LoadImage", image="cut_out.png"),
        "6": node("InvertMask", mask=["5", 1]),
        "7": node("MaskToImage", mask=["6", 0]),
        "8": node("RepeatImageBatch", image=["7", 0], amount=3),
        "9": node("ImageToMask", image=["8", 0], channel="red"),
        "2": concept(["4", 0], ["9", 0]),
        "3": preview_of(),
    }
    assert comfy.run(prompt)["2"]["text"] == ["<red-disc> disc: 3 photos"]
    prompt["2"] = concept(["4", 0], ["6", 0])
    node_id, words = refusal(comfy, prompt)
    assert node_id == "2" and "3 photos but 1 mask;" in words


def test_bad_names_are_refused_with_a_suggestion(comfy: ComfyServer, loaded: None):
    prompt = {
        "1": node("LoadImage", image="cut_out.png"),
        "3": preview_of(),
        "2": concept(["1", 0], ["1", 1], token="Red Disc", invert_mask=True),
    }
    with pytest.raises(PromptRejected, match="write it as <red-disc>"):
        comfy.queue(prompt)
    prompt["2"] = concept(["1", 0], ["1", 1], noun="<disc>", invert_mask=True)
    node_id, words = refusal(comfy, prompt)
    assert node_id == "2" and "no class noun" in words
    prompt["2"] = concept(["1", 0], ["1", 1], invert_mask=True)
    prompt["4"] = concept(["1", 0], ["1", 1], invert_mask=True, concepts=["2", 0])
    prompt["5"] = preview_of("4")
    node_id, words = refusal(comfy, prompt)
    assert node_id == "4" and "give each its own" in words
