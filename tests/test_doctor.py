"""The doctor: each finding on pictures and captions made for it, none where all is well, and the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from far_train.cli.main import main
from far_train.data.alike import background_histogram, difference_hash, hash_distance, intersection
from far_train.data.captions import Name
from far_train.data.concepts import Concept
from far_train.data.dataset import DatasetFolder, write_dataset
from far_train.data.doctor import (
    Finding,
    examine_captions,
    examine_concepts,
    examine_dataset,
    examine_names,
    examine_photos,
    sort_findings,
)
from far_train.data.fusion import ConceptFusion
from far_train.data.images import Photo, save_mask, save_pair
from far_train.data.settings import FusionConfig

from .command_line import refused

SIDE = 144
CORGI, PUG = Name("dog", "<corgi-dog>"), Name("dog", "<pug-dog>")
PLACES = [(0.1, 0.1, 0.6), (0.6, 0.1, 0.1), (0.1, 0.6, 0.1), (0.6, 0.6, 0.1)]  # in bins of their own


def picture(seed: int, place: tuple[float, float, float]) -> Tensor:
    """A picture [144, 144, 3] of tiles, each a little lighter than ``place`` by chance: another hash for each seed."""
    tiles = 0.1 * torch.rand(8, 9, generator=torch.Generator().manual_seed(seed))
    tiles = tiles.repeat_interleave(SIDE // 8, 0).repeat_interleave(SIDE // 9, 1)
    return torch.tensor(place) + tiles[..., None]


def box_mask(left: int, top: int, right: int, bottom: int) -> Tensor:
    mask = torch.zeros(SIDE, SIDE)
    mask[top:bottom, left:right] = 1
    return mask


MIDDLE = box_mask(30, 30, 110, 110)


def concept(token: str = "<corgi-dog>", seed: int = 0, **changes) -> Concept:
    """Four photos without a fault, or with ``changes``."""
    images = tuple(picture(seed + i, place) for i, place in enumerate(PLACES))
    return replace(Concept(token, "dog", images, (MIDDLE,) * 4), **changes)


def with_mask(mask: Tensor) -> Concept:
    """The mask on the second of the four photos."""
    return concept(masks=(MIDDLE, mask, MIDDLE, MIDDLE))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset folder of two concepts without a fault."""
    fusion = ConceptFusion([concept(), concept("<pug-dog>", 10)], (), (), FusionConfig(size=128, count=12))
    return write_dataset(fusion, tmp_path / "dogs").folder


# ---- no findings


def test_nothing_is_found_where_nothing_is_wrong(dataset: Path):
    assert examine_concepts([concept(), concept("<pug-dog>", 10)], size=144) == []
    assert examine_dataset(DatasetFolder(dataset), size=128) == []


# ---- measures


def test_a_difference_hash_is_where_brightness_rises():
    rising = (torch.arange(9) / 8).expand(8, 9)[..., None].expand(8, 9, 3)
    assert difference_hash(rising).all() and not difference_hash(rising.flip(1)).any()
    assert hash_distance(difference_hash(rising), difference_hash(rising.flip(1))) == 64
    dent = rising.clone()
    dent[3, 4] = 0  # lower than its left neighbor; the right one is still higher
    assert hash_distance(difference_hash(rising), difference_hash(dent)) == 1


def test_a_background_histogram_leaves_the_subject_out():
    image, mask = torch.zeros(4, 4, 3), torch.zeros(4, 4)
    image[:, 2:] = 1.0
    mask[:, 3] = 1  # what is left: 8 black pixels and 4 white ones
    histogram = background_histogram(image, mask)
    assert histogram[0] == pytest.approx(8 / 12) and histogram[63] == pytest.approx(4 / 12) and histogram.sum() == 1
    black = background_histogram(torch.zeros(4, 4, 3), mask)
    assert intersection(histogram, black) == pytest.approx(8 / 12) and intersection(black, black) == 1
    assert not background_histogram(image, torch.ones(4, 4)).any()


# ---- photos


@pytest.mark.parametrize(("count", "words"), [(1, "one photo, which is allowed"), (2, "only 2 photos"), (3, None)])
def test_few_photos(count: int, words: str | None):
    few = concept(images=concept().images[:count], masks=(MIDDLE,) * count)
    findings = examine_concepts([few])
    assert [(f.severity, f.concept, f.file) for f in findings] == [("warning", "<corgi-dog>", "")] * (words is not None)
    assert all(str(words) in f.sentence for f in findings)


def test_near_duplicates():
    first, *others = concept().images
    found = examine_concepts([concept(images=(first, *others[:2], first * 0.9 + 0.05))])
    (duplicate,) = found
    assert duplicate.severity == "warning" and duplicate.file == "photo 4" and "same as photo 1" in duplicate.sentence


@pytest.mark.parametrize(
    ("box", "severity", "words"),
    [
        ((0, 30, 80, 110), "warning", "at the left:"),
        ((30, 0, 144, 110), "warning", "at the top and right:"),
        ((30, 64, 110, 144), "note", "at the bottom: composites show it on the lower edge only"),
    ],
)
def test_subjects_that_the_photo_cuts_off(box: tuple[int, int, int, int], severity: str, words: str):
    (finding,) = examine_concepts([with_mask(box_mask(*box))])
    assert (finding.severity, finding.file) == (severity, "photo 2") and words in finding.sentence


def test_a_subject_may_touch_the_edge_with_a_tip():
    mask = MIDDLE.clone()
    mask[60:67, :30] = 1  # 7 of its 80 rows: less than a tenth
    assert examine_concepts([with_mask(mask)]) == []
    mask[60:68, :30] = 1
    assert len(examine_concepts([with_mask(mask)])) == 1


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (1 - MIDDLE, "it looks inverted"),
        (torch.ones(SIDE, SIDE), "the mask covers 100.00% of the frame"),
        (box_mask(60, 60, 70, 70), "the subject covers 0.48% of the frame"),
    ],
)
def test_masks_that_mark_something_else(mask: Tensor, words: str):
    (finding,) = examine_concepts([with_mask(mask)])
    assert (finding.severity, finding.file) == ("warning", "photo 2") and words in finding.sentence


def test_photos_and_subjects_below_the_native_size():
    assert examine_concepts([concept()], size=144) == examine_concepts([concept()]) == []
    findings = examine_concepts([concept()], size=145)
    assert [f.file for f in findings] == ["photo 1", "photo 2", "photo 3", "photo 4"]
    assert all("144×144 px, less than the base's native 145 px" in f.sentence for f in findings)
    assert examine_concepts([with_mask(box_mask(30, 30, 60, 102))], size=144) == []  # 72 px: half of the size
    (finding,) = examine_concepts([with_mask(box_mask(30, 30, 60, 101))], size=144)
    assert finding.file == "photo 2" and "its subject is 71 px large" in finding.sentence


def test_one_place_in_all_photos():
    alike = tuple(picture(i, PLACES[0]) for i in range(4))
    (finding,) = examine_concepts([concept(images=alike)])
    assert finding.file == "" and "4 photos seem to be taken in one place" in finding.sentence
    assert "at least 100% of their colors" in finding.sentence
    assert examine_concepts([concept(images=(*alike[:3], concept().images[3]))]) == []  # a second place
    assert len(examine_concepts([concept(images=alike[:2], masks=(MIDDLE,) * 2)])) == 1  # two are few, and no more


def test_photos_without_masks_are_examined_too():
    images = concept().images[:2]
    photos = [Photo(name, image, None, Path(f"{name}.jpg")) for name, image in zip("abc", (*images, images[0]))]
    (duplicate,) = examine_photos(photos, size=144, concept="corgi")
    assert duplicate.line.startswith("warning: corgi, c.jpg: it looks nearly the same as a.jpg")


# ---- names


def test_tokens_that_are_words():
    (finding,) = examine_names([Name("dog", "<biscuit>"), CORGI, Name("dog", "<qzxv>")])
    assert (finding.severity, finding.concept) == (
        "note",
        "<biscuit>",
    ) and "the ordinary word 'biscuit'" in finding.sentence


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ("<my-dog1>", "<my-dog2>", True),
        ("<my-dog>", "<mydog>", True),
        ("<my-dog>", "<my-dogs>", True),
        ("<my-dog>", "<my-old-dog>", False),
        ("<my-dog>", "<my-god>", False),
    ],
)
def test_tokens_that_are_alike(first: str, second: str, alike: bool):
    for names in ([first, second], [second, first]):
        findings = examine_names([Name("dog", token) for token in names])
        assert [(f.severity, f.concept) for f in findings] == [("note", names[1])] * alike


# ---- captions


def found_words(captions: list[str], names: tuple[Name, ...] = (CORGI, PUG)) -> dict[str, str]:
    return {f.concept: f.sentence for f in examine_captions(captions, names)}


def test_a_word_of_one_concepts_captions():
    """'harness' in 5 of 6 captions with the corgi (83 %), 'red' in all, in none of the pug's own; 'grass' in all."""
    corgi = ["a photo of a <corgi-dog> dog in a red Harness, on the grass"] * 4
    both = ["a photo of a <pug-dog> dog and a <Corgi-Dog> dog in a red harness, on the grass"]
    bare = ["a picture of a <corgi-dog> dog, red, on the grass"]
    pug = ["a photo of a <pug-dog> dog, on the grass"] * 6
    found = found_words(corgi + both + bare + pug)
    assert found.keys() == {"<corgi-dog>"}
    assert "in common that others lack: 'harness' (83%), 'red' (100%). They" in found["<corgi-dog>"]


def test_how_many_captions_make_a_word_common():
    own = ["a photo of a <corgi-dog> dog, wet"] * 4 + ["a photo of a <corgi-dog> dog"]
    assert found_words(own) == {}  # 80 %: not more
    own = ["a photo of a <corgi-dog> dog, wet"] * 5
    others = ["a photo of a dog"] * 4
    assert "'wet'" in found_words(own + ["a photo of a dog, wet", *others, "a photo of a dog"])["<corgi-dog>"]  # 17 %
    assert found_words(own + ["a photo of a dog, wet", *others]) == {}  # 20 %: not less
    assert found_words(own[:4]) == {}  # too few to tell


def test_captions_without_others():
    found = found_words(["a photo of a <corgi-dog> dog, wet"] * 5, (CORGI,))
    assert "words in common: 'wet' (100%)" in found["<corgi-dog>"]


def test_words_of_names_and_templates_dont_count():
    caption = "a photo collage of another <teddy-bear> teddy bear and a dog far away, an image of it"
    assert found_words([caption] * 5, (Name("teddy bear", "<teddy-bear>"), CORGI)) == {}


# ---- datasets


def test_a_repainted_mask_and_edited_captions(dataset: Path):
    folder = dataset / "composites"
    save_mask(folder / "0003.0.mask.png", 1 - box_mask(30, 30, 110, 110)[:128, :128])
    for path in folder.glob("*.txt"):
        caption = path.read_text(encoding="utf-8")
        path.write_text(caption.replace("<pug-dog> dog", "<pug-dog> dog wearing goggles"), encoding="utf-8")
    steps: list[tuple[int, int]] = []
    mask, words = examine_dataset(DatasetFolder(dataset), on_progress=lambda *step: steps.append(step))
    assert mask.file == str(folder / "0003.png") and "looks inverted" in mask.sentence
    assert words.concept == "<pug-dog>" and "'goggles' (100%), 'wearing' (100%)" in words.sentence
    assert steps == [(i, 12) for i in range(13)]


def test_a_dataset_below_the_native_size(dataset: Path):
    (finding,) = examine_dataset(DatasetFolder(dataset), size=192)
    assert finding.line.startswith("warning: its pictures are 128 px a side, less than the base's native 192 px; ")


def test_warnings_come_first_and_nothing_twice():
    note, warning = Finding("note", "<x>", "", "b", "c"), Finding("warning", "<x>", "1.png", "b", "c")
    assert sort_findings([note, warning, note]) == [warning, note]
    assert warning.line == "warning: <x>, 1.png: b; c"


# ---- the command


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    """A folder of two subjects, the second cut off at the bottom."""
    for i, mask in enumerate((MIDDLE, box_mask(30, 64, 110, 144))):
        save_pair(tmp_path / "subjects" / f"{i}.png", concept().images[i], mask)
    return tmp_path / "subjects"


def test_the_command_prints_a_line_for_each_finding(subjects: Path, capsys):
    assert main(["doctor", "--concept", "<corgi-dog>", "dog", str(subjects), "--size", "160"]) == 0
    lines = capsys.readouterr().out.splitlines()
    small = "it has 144×144 px, less than the base's native 160 px, and is enlarged to a blur"
    cut = "the photo cuts the subject off at the bottom: composites show it on the lower edge only"
    assert [line.split(";")[0] for line in lines[1:]] == [
        f"warning: <corgi-dog>, {subjects / '0.png'}: {small}",
        f"warning: <corgi-dog>, {subjects / '1.png'}: {small}",
        f"note: <corgi-dog>, {subjects / '1.png'}: {cut}",
    ]
    assert lines[0].startswith("warning: <corgi-dog>: it has only 2 photos")


def test_the_command_on_photos_and_a_dataset(subjects: Path, dataset: Path, capsys):
    assert main(["doctor", "--photos", str(subjects), "--dataset", str(dataset)]) == 0
    assert capsys.readouterr().out.startswith(f"warning: {subjects}: it has only 2 photos")
    assert main(["doctor", "--dataset", str(dataset)]) == 0
    assert capsys.readouterr().out == "no findings\n"


def test_the_command_refuses_bad_input(subjects: Path, tmp_path: Path, capsys):
    refused(capsys, ["doctor"], "none given", "dataset")
    refused(capsys, ["doctor", "--photos", subjects, "--size", "0"], "size: 0")
    refused(capsys, ["doctor", "--photos", tmp_path / "nowhere"], "there is no such folder")
    refused(capsys, ["doctor", "--dataset", subjects], "no dataset.json")
