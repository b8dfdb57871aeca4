"""Subjects: SAM's masks as its own predictor gives them, the choice among them, and batches that survive bad photos."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from far_train.data.images import Photo, load_mask, load_photo, to_uint8
from far_train.data.sam import build_sam
from far_train.data.settings import ExtractConfig
from far_train.data.subjects import (
    AUTOMATIC_POINTS,
    Prompt,
    Subject,
    SubjectExtractor,
    choose_mask,
    clean_mask,
    extract_folder,
    subject_from_mask,
)
from far_train.utils.errors import OutputError, PhotoError, SubjectError

from .tiny_sam import TINY, tiny_sam

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "two_dogs"


def photo(height: int = 40, width: int = 60, mask: torch.Tensor | None = None, **kwargs) -> Photo:
    image = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(1))
    return Photo("a", image, mask, Path("a.jpg"), **kwargs)


def rectangle(top: int, bottom: int, left: int, right: int, height: int = 40, width: int = 60) -> torch.Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


class Scripted(SubjectExtractor):
    """An extractor whose SAM gives these masks and scores, and that notes what it was asked."""

    def __init__(self, masks, scores, config=None):
        super().__init__(tiny_sam(), config)
        self.answer = torch.stack(masks), torch.tensor(scores)
        self.asked = []

    def predict(self, image, prompt):
        self.asked.append((image, prompt))
        return self.answer


# Prompts


@pytest.mark.parametrize(
    "fields",
    [
        {"box": (10, 0, 5, 20)},
        {"box": (0, 20, 5, 20)},
        {"box": (0, 0, 5)},
        {"box": (0, 0, float("nan"), 5)},
        {"box": (0, 0, "5", 5)},
        {"box": 5},
        {"points": ((1, 2, 3),)},
        {"points": ((1, 2),)},
        {"points": (1, 2, 1)},
        {"points": ((float("inf"), 2, 1),)},
        {"points": ((1, 2, 0),)},
    ],
)
def test_malformed_prompts_are_refused_by_name(fields):
    with pytest.raises(SubjectError, match=rf"^{next(iter(fields))}: "):
        Prompt(**fields)


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(box=(0, 0, 61, 40)),
        Prompt(box=(-1, 0, 60, 40)),
        Prompt(box=(0, 0, 60, 40.5)),
        Prompt(points=((61, 5, 1),)),
        Prompt(points=((5, -1, 1),)),
        Prompt(points=((5, 5, 1), (5, 41, 0))),
    ],
)
def test_prompts_outside_the_photo_are_refused(prompt):
    with pytest.raises(SubjectError, match=r"a\.jpg: (box|points): .*outside the photo, which is 60x40 px"):
        SubjectExtractor(tiny_sam()).extract(photo(), prompt)


def test_prompts_on_the_very_edge_are_inside():
    Prompt(box=(0, 0, 60, 40), points=((0, 0, 1), (60, 40, 0))).check_inside(60, 40)


def test_a_prompt_follows_its_photo_when_that_was_scaled_down():
    extractor = Scripted([rectangle(5, 35, 10, 50)] * 3, [0.5, 0.4, 0.3])
    prompt = Prompt(box=(40, 20, 240, 80), points=((100, 50, 1), (4, 6, 0)))
    extractor.extract(photo(full_size=(80, 240)), prompt)
    assert extractor.asked[0][1] == Prompt(box=(10, 10, 60, 40), points=((25, 25, 1), (1, 3, 0)))


# Masks


def test_clean_mask_keeps_the_largest_part_and_fills_its_holes():
    mask = rectangle(5, 30, 10, 40) | rectangle(33, 36, 50, 55)
    expected = rectangle(5, 30, 10, 40).float()
    mask[10:14, 20:25] = False
    assert torch.equal(clean_mask(mask), expected)
    soft = torch.where(mask, 0.5, 0.499)
    assert torch.equal(clean_mask(soft), expected)
    assert torch.equal(clean_mask(expected), expected)


def test_clean_mask_refuses_by_area_with_the_numbers():
    small, large = rectangle(0, 4, 0, 6), rectangle(0, 40, 0, 59)
    with pytest.raises(SubjectError, match=r"1\.00%.*min_area \(3\.00%\)"):
        clean_mask(small)
    with pytest.raises(SubjectError, match=r"98\.33%.*max_area \(95\.00%\)"):
        clean_mask(large)
    with pytest.raises(SubjectError, match="empty"):
        clean_mask(torch.zeros(40, 60))
    loose = ExtractConfig(min_area=0.01, max_area=0.99)
    assert clean_mask(small, loose).sum() == 24 and clean_mask(large, loose).sum() == 40 * 59


def test_small_parts_do_not_add_up_to_a_subject():
    dots = torch.zeros(40, 60, dtype=torch.bool)
    dots[::2, ::2] = True
    assert dots.float().mean() > 0.2
    with pytest.raises(SubjectError, match="min_area"):
        clean_mask(dots)


def test_choose_mask_takes_the_best_scored_usable_one():
    frame, dot, good = rectangle(0, 40, 0, 60), rectangle(0, 2, 0, 2), rectangle(5, 30, 10, 40)
    other = rectangle(10, 20, 10, 40)
    for masks, scores in (
        ([frame, good, other], [0.9, 0.8, 0.7]),
        ([other, dot, good], [0.7, 0.99, 0.8]),
        ([good, other, frame], [0.6, 0.5, float("nan")]),
    ):
        mask, score = choose_mask(torch.stack(masks), torch.tensor(scores))
        assert torch.equal(mask, good.float())
        assert score == pytest.approx(scores[[m is good for m in masks].index(True)])
    with pytest.raises(SubjectError, match=r"score 0\.90: .*max_area.*score 0\.80: .*min_area.*give a box"):
        choose_mask(torch.stack([dot, frame]), torch.tensor([0.8, 0.9]))


def test_a_photos_own_mask_is_taken_as_it_is():
    soft = torch.linspace(0, 1, 2400).reshape(40, 60)
    extractor = Scripted([rectangle(5, 30, 10, 40)] * 3, [1.0, 1.0, 1.0])
    subject = extractor.extract(photo(mask=soft))
    assert torch.equal(subject.mask, soft) and subject.score is None and not extractor.asked


def test_a_rough_mask_tells_sam_where_to_look():
    rough, found = rectangle(4, 20, 6, 31).float(), rectangle(5, 30, 10, 40)
    extractor = Scripted([found] * 3, [0.7, 0.9, 0.8], ExtractConfig(use_masks="hint"))
    subject = extractor.extract(photo(mask=rough, full_size=(80, 120)), Prompt((0, 0, 9, 9), ((100, 70, 0),)))
    assert torch.equal(subject.mask, found.float()) and subject.score == pytest.approx(0.9)
    assert extractor.asked[0][1] == Prompt((6, 4, 31, 20), ((50, 35, 0),))  # the mask's box in place of the given one
    with pytest.raises(SubjectError, match=r"a\.jpg: the mask is empty"):
        extractor.extract(photo(mask=torch.zeros(40, 60)))


def test_missing_empty_and_misfit_masks_are_refused():
    cases = (
        (None, r"a\.mask\.png.*alpha.*segment-anything"),
        (torch.full((40, 60), 0.3), "empty.*brightest value is 76 of 255"),
        (torch.ones(60, 40), "40x60 px.*60x40 px"),
    )
    for mask, message in cases:
        with pytest.raises(SubjectError, match=rf"a\.jpg: .*{message}"):
            subject_from_mask(photo(mask=mask))


# Segment-anything


def predict_directly(sam, image, **prompt):
    from segment_anything import SamPredictor

    predictor = SamPredictor(sam)
    predictor.set_image(to_uint8(image))
    return predictor.predict(**prompt)[:2]


CROSS = np.array([[x * 60, y * 40] for x, y in AUTOMATIC_POINTS])
CASES = {
    "box": (Prompt(box=(5, 6, 50, 30)), {"box": np.array([5, 6, 50, 30])}),
    "points": (
        Prompt(points=((20, 10, 1), (3, 35, 0))),
        {"point_coords": np.array([[20, 10], [3, 35]]), "point_labels": np.array([1, 0])},
    ),
    "both": (
        Prompt(box=(5, 6, 50, 30), points=((20, 10, 0),)),
        {"box": np.array([5, 6, 50, 30]), "point_coords": np.array([[20, 10]]), "point_labels": np.array([0])},
    ),
    "automatic": (Prompt(), {"point_coords": CROSS, "point_labels": np.ones(5)}),
}


@pytest.mark.parametrize("case", CASES)
def test_masks_and_scores_are_those_of_sam_predictor(case):
    sam, image = tiny_sam(), photo().image
    prompt, direct = CASES[case]
    masks, scores = SubjectExtractor(sam).predict(image, prompt)
    expected_masks, expected_scores = predict_directly(sam, image, **direct)
    assert masks.shape == (3, 40, 60) and masks.dtype == torch.bool and scores.shape == (3,)
    assert np.array_equal(masks.numpy(), expected_masks) and np.array_equal(scores.numpy(), expected_scores)
    assert 0.02 < masks.float().mean() < 0.98  # else any two sets of masks would be alike
    for name, (other, _) in CASES.items():
        if name != case:  # the prompt matters
            assert not torch.equal(SubjectExtractor(sam).predict(image, other)[1], scores)


def test_extract_cleans_the_chosen_mask():
    sam, config = tiny_sam(), ExtractConfig(min_area=0.001, max_area=0.999)
    extractor = SubjectExtractor(sam, config)
    subject = extractor.extract(photo(), CASES["box"][0])
    mask, score = choose_mask(*map(torch.from_numpy, predict_directly(sam, photo().image, **CASES["box"][1])), config)
    assert isinstance(subject, Subject) and subject.name == "a"
    assert torch.equal(subject.mask, mask) and subject.score == score
    assert torch.equal(subject.image, photo().image)
    assert set(subject.mask.unique().tolist()) == {0.0, 1.0}


def test_extract_names_the_photo_without_a_subject():
    with pytest.raises(SubjectError, match=r"a\.jpg: no usable mask.*max_area"):
        Scripted([torch.ones(40, 60, dtype=torch.bool)] * 3, [0.9, 0.8, 0.7]).extract(photo())


def test_a_model_that_is_no_sam_is_refused():
    with pytest.raises(SubjectError, match="Linear is not a segment-anything model.*image_encoder"):
        SubjectExtractor(torch.nn.Linear(2, 2))
    decoder = type("MaskDecoderHQ", (), {})()
    with pytest.raises(SubjectError, match="sam_model: this is HQ-SAM"):
        SubjectExtractor(SimpleNamespace(image_encoder=1, prompt_encoder=1, mask_decoder=decoder, preprocess=1))


def test_missing_package_says_how_to_install_it(monkeypatch):
    extractor = SubjectExtractor(tiny_sam())
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(SubjectError, match="pip install segment-anything"):
        extractor.extract(photo())
    with pytest.raises(SubjectError, match="pip install segment-anything"):
        build_sam(TINY)


# Folders


@pytest.fixture
def folder(tmp_path):
    """Three photos without masks, one with a mask file, one with alpha, one that is no picture."""
    place = tmp_path / "photos"
    place.mkdir()
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for name in ("1.jpg", "2.png", "10.png", "masked.jpg"):
        pixels.save(place / name)
    Image.fromarray(rectangle(5, 30, 10, 40).numpy()).convert("L").save(place / "masked.mask.png")
    cut = pixels.copy()
    cut.putalpha(Image.fromarray(rectangle(3, 30, 10, 40).numpy()).convert("L"))
    cut.save(place / "cut.png")
    (place / "broken.jpg").write_bytes(b"no picture")
    return place


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_becomes_pairs_and_bad_photos_are_named(folder, tmp_path):
    good, frame = rectangle(8, 30, 8, 50), torch.ones(40, 60, dtype=torch.bool)
    extractor = Scripted([good, frame, frame], [0.8, 0.9, 0.9])
    out, calls = tmp_path / "out", []
    for _ in range(2):  # the folder may exist
        report = extract_folder(folder, out, extractor, progress=lambda done, total: calls.append((done, total)))
    assert [(line.photo, line.status) for line in report] == [
        ("1.jpg", "ok"),
        ("2.png", "ok"),
        ("10.png", "ok"),
        ("broken.jpg", "skipped"),
        ("cut.png", "ok"),
        ("masked.jpg", "ok"),
    ]
    assert report[0].detail == pytest.approx(0.8) and report[4].detail == report[5].detail == "own mask"
    assert "broken.jpg: is no" in report[3].detail
    assert names(out) == sorted(f"{n}{s}" for n in ("1", "2", "10", "cut", "masked") for s in (".png", ".mask.png"))
    assert torch.equal(load_mask(out / "10.mask.png"), good.float())
    assert torch.equal(load_mask(out / "cut.mask.png"), rectangle(3, 30, 10, 40).float())
    assert torch.equal(load_photo(out / "2.png").image, load_photo(folder / "2.png").image)
    assert calls == [(i, 6) for i in range(1, 7)] * 2
    assert names(folder) == ["1.jpg", "10.png", "2.png", "broken.jpg", "cut.png", "masked.jpg", "masked.mask.png"]


def test_an_undetected_photo_is_skipped_and_its_old_pair_set_aside(folder, tmp_path, caplog):
    good, frame = rectangle(8, 30, 8, 50), torch.ones(40, 60, dtype=torch.bool)
    extract_folder(folder, tmp_path / "out", Scripted([good] * 3, [0.8] * 3))
    report = extract_folder(folder, tmp_path / "out", Scripted([frame] * 3, [0.8] * 3))
    assert [line.status for line in report] == ["skipped"] * 4 + ["ok"] * 2
    assert "1.jpg: no usable mask" in report[0].detail
    assert f"{tmp_path / 'out' / '1.png'}: is from an earlier run, but its photo is now skipped" in caplog.text
    assert names(tmp_path / "out") == ["cut.mask.png", "cut.png", "leftovers", "masked.mask.png", "masked.png"]
    assert names(tmp_path / "out" / "leftovers") == sorted(f"{n}{s}" for n in (1, 2, 10) for s in (".png", ".mask.png"))


def test_prompts_by_file_name(folder, tmp_path):
    extractor = Scripted([rectangle(8, 30, 8, 50)] * 3, [0.8] * 3)
    box, point = Prompt(box=(0, 0, 30, 20)), Prompt(points=((30, 20, 1),))
    extract_folder(folder, tmp_path / "out", extractor, {"1.jpg": box, "10": point})
    assert [prompt for _, prompt in extractor.asked] == [box, Prompt(), point]
    with pytest.raises(SubjectError, match=r"no photo '1\.jpeg'.*did you mean '1\.jpg'"):
        extract_folder(folder, tmp_path / "out", extractor, {"1.jpeg": box})
    extractor.asked.clear()
    extract_folder(folder, tmp_path / "out", extractor, box, ExtractConfig(max_side=64))
    assert [prompt for _, prompt in extractor.asked] == [box] * 3


def test_photos_are_scaled_to_max_side(tmp_path):
    (tmp_path / "in").mkdir()
    picture = Image.new("RGBA", (300, 150), (9, 9, 9, 0))
    picture.paste((9, 9, 9, 255), (50, 20, 200, 150))
    picture.save(tmp_path / "in" / "a.png")
    extract_folder(tmp_path / "in", tmp_path / "out", config=ExtractConfig(max_side=100))
    assert load_photo(tmp_path / "out" / "a.png").image.shape == (50, 100, 3)


def test_without_sam_and_mask_both_ways_are_named(folder, tmp_path):
    with pytest.raises(SubjectError, match=r"1\.jpg: .*1\.mask\.png.*alpha.*segment-anything"):
        extract_folder(folder, tmp_path / "out")


def test_a_folder_without_any_subject_is_an_error(folder, tmp_path):
    for name in ("masked.jpg", "cut.png"):
        (folder / name).unlink()
    with pytest.raises(SubjectError, match=r"(?s)none of its 4 photos.*1\.jpg: .*max_area.*broken\.jpg: is no"):
        extract_folder(folder, tmp_path / "out", Scripted([torch.ones(40, 60, dtype=torch.bool)] * 3, [0.9] * 3))
    with pytest.raises(PhotoError, match="no such folder"):
        extract_folder(tmp_path / "none", tmp_path / "out")


def test_photos_of_one_name_do_not_overwrite_each_other(tmp_path):
    place = tmp_path / "in"
    place.mkdir()
    mask = Image.new("L", (20, 20))
    mask.paste(255, (5, 5, 15, 20))
    for level, name in enumerate(("a.bmp", "A.png", "a.webp", "a.mask.jpg", "a_png.tif")):
        Image.new("RGB", (20, 20), (level * 40,) * 3).save(place / name)
        mask.save(place / f"{Path(name).stem}.mask.png")
    report = extract_folder(place, tmp_path / "out")
    assert len(report) == 5 and all(line.status == "ok" for line in report)
    pictures = [n for n in names(tmp_path / "out") if not n.endswith(".mask.png")]
    assert len({n.casefold() for n in pictures}) == 5
    levels = {round(float(load_photo(tmp_path / "out" / n).image.mean() * 255 / 40)) for n in pictures}
    assert levels == {0, 1, 2, 3, 4}
    assert all(load_mask(p).mean() == 0.375 for p in (tmp_path / "out").glob("*.mask.png"))


def test_the_photos_own_folder_is_no_place_for_the_subjects(folder):
    before = names(folder)
    with pytest.raises(OutputError, match="choose another"):
        extract_folder(folder, folder / ".." / folder.name, Scripted([rectangle(8, 30, 8, 50)] * 3, [0.8] * 3))
    assert names(folder) == before


def test_real_photos_with_their_masks(tmp_path):
    if not DATA.is_dir():
        pytest.skip(f"the photos of {DATA} are not here")
    for concept in ("corgi", "chow"):
        report = extract_folder(DATA / concept, tmp_path / concept, config=ExtractConfig(max_side=256))
        assert [(line.photo, line.status) for line in report] == [(f"{i:02d}.jpg", "ok") for i in range(5)]
        for line in report:
            mask = load_photo(tmp_path / concept / line.photo.replace(".jpg", ".png")).mask
            clean = clean_mask(mask)  # a segmented dog is one piece of plausible size
            both, either = torch.minimum(clean, mask).sum(), torch.maximum(clean, mask).sum()
            assert both / either > 0.9
