"""Reports: overlays show the right masks, sheets hold all pictures, curves and pages survive odd input."""

from __future__ import annotations

import base64
import html
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from far_train.data.captions import Name
from far_train.data.concepts import Composite
from far_train.evaluation.sheets import (
    CLASS_COLOUR,
    COLOURS,
    Page,
    checkerboard,
    contact_sheet,
    dataset_sheet,
    loss_curves,
    overlay,
    picture_grid,
    running_mean,
    save_sheet,
)
from far_train.utils.errors import OutputError

NAMES = (Name("dog", "<a>"), Name("dog", "<b>"))


def composite() -> Composite:
    """Black, with <b> on the left third, <a> on the right third and a dog at the bottom of the middle."""
    masks = torch.zeros(3, 60, 60)
    masks[0, :, :20] = masks[1, :, 40:] = masks[2, 50:, 25:35] = 1
    names = (NAMES[1], NAMES[0], Name("dog"))
    return Composite.build(torch.zeros(60, 60, 3), "a <b> dog, a <a> dog and a dog", list(zip(names, masks)), "triple")


def is_tint(pixel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    """Black tinted in ``colour``: the same hue, and the picture still shows."""
    strength = pixel.sum() / sum(colour)
    return 0.15 < strength < 0.6 and np.abs(pixel - strength * np.array(colour)).max() <= 1.5


def test_an_overlay_tints_every_mask_in_its_concepts_colour():
    pixels = np.asarray(overlay(composite(), NAMES)).astype(int)
    tint = {place: pixels[y, x] for place, x, y in (("left", 8, 30), ("right", 52, 30), ("class", 30, 56))}
    for place, colour in (("left", COLOURS[1]), ("right", COLOURS[0]), ("class", CLASS_COLOUR)):
        assert is_tint(tint[place], colour), place
    assert (pixels[20, 30] == 0).all()  # outside all masks
    assert (pixels[30, 20] == COLOURS[1]).all() and (pixels[30, 39] == COLOURS[0]).all()  # outlines


def test_an_overlay_leaves_the_composite_alone():
    made = composite()
    overlay(made, NAMES)
    assert made.image.max() == 0


def test_more_concepts_than_colours_still_have_one():
    names = [Name("dog", f"<c-{i}>") for i in range(8)]
    shown = Composite.build(torch.zeros(20, 20, 3), "a <c-7> dog", [(names[7], torch.ones(20, 20))], "solo")
    assert is_tint(np.asarray(overlay(shown, names))[10, 10], COLOURS[1])


def test_a_checkerboard_shows_through_where_no_subject_is():
    mask = torch.zeros(64, 40)
    mask[:, :20] = 1
    pixels = np.asarray(checkerboard(torch.zeros(64, 40, 3), mask)).astype(int)
    assert (pixels[:, :20] == 0).all()
    assert set(np.unique(pixels[:, 20:])) == {round(0.65 * 255), round(0.85 * 255)}


def cells(sheet: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(sheet) == colour).all(-1).sum())


@pytest.mark.parametrize("count", [1, 3, 4, 9])
@pytest.mark.parametrize("labels", [False, True])
def test_a_contact_sheet_holds_all_pictures(count, labels):
    pictures = [Image.new("RGB", (30 + i, 30), (255, 0, i)) for i in range(count)]
    sheet = contact_sheet(pictures, [f"no {i}" for i in range(count)] if labels else (), columns=4, cell=32)
    assert sheet.width == min(count, 4) * 40 + 8
    for i in range(count):
        assert cells(sheet, (255, 0, i)) == 32 * round(30 * 32 / (30 + i)), i
    pixels = np.asarray(sheet).astype(int)
    is_text = (np.ptp(pixels, axis=-1) == 0) & (pixels[..., 0] > 128)
    assert is_text.any() == labels
    assert sheet.getpixel((0, 0)) == (32, 32, 32)  # white would glare in a dark front end


@pytest.mark.parametrize(
    ("count", "columns", "rows"),
    [(1, 1, 1), (3, 3, 1), (4, 4, 1), (5, 5, 1), (6, 3, 2), (7, 4, 2), (9, 3, 3), (10, 5, 2), (13, 5, 3), (24, 4, 6)],
)
def test_a_contact_sheet_has_few_empty_cells(count, columns, rows):
    sheet = contact_sheet([Image.new("RGB", (30, 30), "red")] * count, cell=32)
    assert sheet.size == (40 * columns + 8, 40 * rows + 8)


def test_contact_sheets_of_nothing_and_of_odd_shapes():
    assert contact_sheet([]).size[0] > 0
    assert cells(contact_sheet([Image.new("RGB", (900, 1), "red")], cell=64), (255, 0, 0)) == 64
    labelled = contact_sheet([Image.new("RGB", (9, 9), "red")] * 3, ["only one label"], cell=32)
    assert cells(labelled, (255, 0, 0)) == 3 * 32 * 32


def test_a_dataset_sheet_and_a_picture_grid():
    assert dataset_sheet([composite()] * 5, NAMES, columns=3, cell=60).width == 3 * 68 + 8
    assert cells(picture_grid(torch.ones(2, 8, 8, 3) * torch.tensor([1.0, 0, 0]), cell=32), (255, 0, 0)) == 2 * 32 * 32


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 1, "denoising": 0.5, "prior": 0.0, "refinement": 0.0}],
        [{"step": i, "denoising": 1.0, "prior": 1.0, "refinement": 1.0} for i in range(30)],
        [{"step": i, "denoising": float("nan"), "prior": float("inf"), "refinement": 1.0} for i in range(30)],
        [{"step": 1, "denoising": 1.0}, {"step": 2, "denoising": 1.0, "prior": 0.5}],
    ],
)
@pytest.mark.filterwarnings("error")
def test_curves_of_odd_metrics_are_pictures(metrics):
    picture = loss_curves(metrics, (300, 150))
    assert picture.size == (300, 150) and picture.mode == "RGB"


def test_curves_show_the_losses():
    """The same metrics with another curve give another picture."""
    flat, falling = ([{"step": i, "denoising": 1 / (1 + i * s)} for i in range(20)] for s in (0, 1))
    assert loss_curves(flat, (300, 150)).tobytes() != loss_curves(falling, (300, 150)).tobytes()


def test_running_means():
    values = np.array([1.0, 3.0, np.nan, 5.0, np.inf, np.nan])
    assert running_mean(values, share=0.34).tolist()[:5] == [1, 2, 3, 5, 5]  # two at a time
    assert np.isnan(running_mean(values, share=0.34)[5])
    assert running_mean(np.arange(4.0), share=0.01).tolist() == [0, 1, 2, 3]
    assert running_mean(np.array([])).shape == (0,)


def test_sheets_are_written_whole_or_not_at_all(tmp_path):
    sheet = Image.new("RGB", (10, 10), "red")
    for name in ("a.jpg", "a.png"):
        save_sheet(tmp_path / "new" / name, sheet)
        with Image.open(tmp_path / "new" / name) as picture:
            assert picture.size == (10, 10)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        save_sheet(tmp_path / "file" / "a.png", sheet)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.jpg", "a.png"]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def test_a_page_is_self_contained_and_escapes_its_words(tmp_path):
    words = "a <corgi-dog> dog & \"friends\" <script>alert('x')</script>"
    page = Page(words)
    page.section(words, words)
    page.picture(Image.new("RGBA", (8, 6), (255, 0, 0, 128)), words)
    page.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = Tags()
    reader.feed(text)
    assert not {"script", "corgi-dog", "link", "iframe"} & {t for t, _ in reader.tags}
    assert reader.text.count(words) == 5  # title, h1, h2, p, caption
    (image,) = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert image["alt"] == words
    data = base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"))
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (8, 6)
    assert not re.search(r"(src|href)=.(?!data:)", text) and "url(" not in text and "@import" not in text
    assert html.escape(words) in text
