"""Dataset folders: what is written comes back, what people edit is followed, what they break is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from far_train.data.dataset import DatasetFolder, find_datasets, write_dataset
from far_train.data.fusion import ConceptFusion
from far_train.utils.errors import CaptionError, DatasetError, PhotoError, TokenError

from .cats import SIZE, fuse_cats


@pytest.fixture(scope="module")
def fused() -> ConceptFusion:
    return fuse_cats()


@pytest.fixture(scope="module")
def written(fused, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "cats"
    write_dataset(fused, folder, about={"made": "by a test"})
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(written, tmp_path / "cats"))


def composite_with(folder: Path, token: str, count: int = 2) -> int:
    """A composite with ``count`` mentions of which one is ``token``."""
    dataset = DatasetFolder(folder)
    composites = [dataset.composite(i).mentions for i in range(dataset.composite_count())]
    return next(
        i
        for i, mentions in enumerate(composites)
        if len(mentions) == count and token in {m.name.token for m in mentions}
    )


def edit_index(folder: Path, change) -> None:
    path = folder / "dataset.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


# ---- there and back


def test_what_is_written_comes_back(fused, written):
    dataset = DatasetFolder(written)
    assert (dataset.names, dataset.size) == (fused.names, SIZE)
    assert (dataset.composite_count(), dataset.prior_count()) == (6, 2)
    for i in range(6):
        there, back = fused.composite(i), dataset.composite(i)
        assert torch.equal((there.image * 255).round(), (back.image * 255).round())
        assert (there.caption, there.layout) == (back.caption, back.layout)
        assert [(m.name, m.spans) for m in there.mentions] == [(m.name, m.spans) for m in back.mentions]
        for a, b in zip(there.mentions, back.mentions):
            assert torch.equal((a.mask * 255).round(), (b.mask * 255).round())
    for i in range(2):
        there, back = fused.prior(i), dataset.prior(i)
        assert torch.equal((there.image * 255).round(), (back.image * 255).round())
        assert (there.caption, back.mentions) == (back.caption, ())


def test_the_folder_can_be_read_by_people(written):
    index = json.loads((written / "dataset.json").read_text())
    assert index["about"] == {"made": "by a test"}
    assert index["concepts"] == [{"token": "<tom>", "noun": "cat"}, {"token": "<felix>", "noun": "cat"}]
    assert {p.name for p in written.iterdir()} == {"composites", "priors", "dataset.json"}
    assert (written / "composites" / "0000.txt").read_text().count("\n") == 1
    with (
        Image.open(written / "composites" / "0000.png") as picture,
        Image.open(written / "composites" / "0000.0.mask.png") as mask,
    ):
        assert (picture.mode, picture.size, mask.mode, mask.size) == ("RGB", (SIZE, SIZE), "L", (SIZE, SIZE))


# ---- edited


def test_an_edited_caption_is_followed(folder):
    i = composite_with(folder, "<tom>")
    names = [m.name for m in DatasetFolder(folder).composite(i).mentions]
    first, second = names
    caption = f"look: the sleepy {first.phrase.upper()} near a {second.phrase}!"
    path = folder / "composites" / f"{i:04d}.txt"
    path.write_text(f"\ufeff{caption}\r\n", encoding="utf-8")
    composite = DatasetFolder(folder).composite(i)
    assert composite.caption == caption
    for mention in composite.mentions:
        assert caption[slice(*mention.spans.noun)].lower() == "cat"
        token = mention.spans.token and caption[slice(*mention.spans.token)].lower()
        assert token == mention.name.token


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cat", "dog", "class noun 'cat' is missing"),
        ("<tom>", "", "'<tom>' is missing"),
        ("<tom>", "<tim>", "'<tom>' is missing"),
    ],
)
def test_a_mention_taken_out_of_a_caption_is_named(folder, old, new, message):
    path = folder / "composites" / f"{composite_with(folder, '<tom>'):04d}.txt"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CaptionError) as error:
        DatasetFolder(folder)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_a_caption_swapped_around_is_refused(folder):
    """Its masks would go to the wrong cats."""
    i = composite_with(folder, "<tom>")
    path = folder / "composites" / f"{i:04d}.txt"
    first, second = (m.name.phrase for m in DatasetFolder(folder).composite(i).mentions)
    path.write_text(f"a photo of a {second} and a {first}")
    with pytest.raises(CaptionError, match=f"{path.name}: .*missing behind"):
        DatasetFolder(folder)


@pytest.mark.parametrize(("text", "message"), [(None, "is missing"), (b" \n", "is empty"), (b"\xff\xfe\x00", "read")])
@pytest.mark.parametrize("kind", ["composites", "priors"])
def test_a_caption_that_is_none_is_named(folder, kind, text, message):
    path = folder / kind / "0001.txt"
    path.unlink() if text is None else path.write_bytes(text)
    with pytest.raises(CaptionError, match=message) as error:
        DatasetFolder(folder)
    assert str(path) in str(error.value)


def test_a_deleted_picture_is_left_out(folder):
    before = [DatasetFolder(folder).composite(i).caption for i in range(6)]
    (folder / "composites" / "0000.png").unlink()
    dataset = DatasetFolder(folder)
    assert dataset.notes == [f"{folder}: 1 of 6 composites were deleted (0000)."]
    assert [dataset.composite(i).caption for i in range(dataset.composite_count())] == before[1:]


def test_class_pictures_can_be_added_and_deleted(folder):
    Image.new("RGB", (SIZE, SIZE), "red").save(folder / "priors" / "my cat.jpg")
    (folder / "priors" / "my cat.txt").write_text("a painting of a cat")
    dataset = DatasetFolder(folder)
    assert dataset.prior_count() == 3 and dataset.prior(2).caption == "a painting of a cat"
    for picture in [*(folder / "priors").glob("*.png"), *(folder / "priors").glob("*.jpg")]:
        picture.unlink()
    assert DatasetFolder(folder).prior_count() == 0  # captions are left
    shutil.rmtree(folder / "priors")
    assert DatasetFolder(folder).prior_count() == 0


# ---- broken


def test_a_deleted_mask_is_named(folder):
    mask = folder / "composites" / "0001.0.mask.png"
    mask.unlink()
    with pytest.raises(DatasetError, match="is missing; restore it, or delete 0001.png") as error:
        DatasetFolder(folder)
    assert str(mask) in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Image.new("L", (32, SIZE), 255).save(p), "the mask is 32×64 pixels, its picture 64×64"),
        (lambda p: Image.new("L", (SIZE, SIZE), 0).save(p), "the mask is empty"),
    ],
)
def test_a_spoilt_mask_is_named(folder, make, message):
    mask = folder / "composites" / "0001.0.mask.png"
    make(mask)
    with pytest.raises(DatasetError, match=message) as error:
        DatasetFolder(folder).composite(1)
    assert str(mask) in str(error.value)


@pytest.mark.parametrize("name", ["composites/0001.png", "composites/0001.0.mask.png", "priors/0001.png"])
def test_a_truncated_picture_is_named(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-30])
    dataset = DatasetFolder(folder)
    with pytest.raises(PhotoError) as error:
        dataset.prior(1) if "priors" in name else dataset.composite(1)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["composites/0001.png", "priors/0001.png"])
def test_a_picture_of_another_size_is_named(folder, name):
    Image.new("RGB", (SIZE, 32)).save(folder / name)
    dataset = DatasetFolder(folder)
    with pytest.raises(DatasetError, match=f"{name}: is 64×32 pixels, the dataset 64×64"):
        dataset.prior(1) if "priors" in name else dataset.composite(1)


def test_a_concept_that_no_composite_shows_is_named(folder):
    dataset = DatasetFolder(folder)
    for i in range(6):
        if "<tom>" in dataset.composite(i).caption:
            (folder / "composites" / f"{i:04d}.png").unlink()
    with pytest.raises(DatasetError, match="no composite shows <tom>"):
        DatasetFolder(folder)


def test_a_dataset_without_composites_is_refused(folder):
    for picture in (folder / "composites").glob("????.png"):
        picture.unlink()
    with pytest.raises(DatasetError, match="holds no composites"):
        DatasetFolder(folder)


def test_files_vanishing_after_opening_are_named(folder):
    dataset = DatasetFolder(folder)
    (folder / "composites" / "0002.png").unlink()
    with pytest.raises(DatasetError, match="0002.png: can't be read"):
        dataset.digest()
    with pytest.raises(PhotoError, match="0002.png"):
        dataset.composite(2)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "..", "", "a\\b.png", "c:x.png", None, 5])
@pytest.mark.parametrize("field", ["image", "mask"])
def test_an_index_can_not_lead_out_of_its_folder(folder, field, name):
    def change(index):
        entry = index["composites"][0]
        (entry if field == "image" else entry["mentions"][0])[field] = name

    edit_index(folder, change)
    with pytest.raises(DatasetError, match="dataset.json.*is not a plain file name"):
        DatasetFolder(folder)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda d: d.pop("composites"), DatasetError),
        (lambda d: d.pop("size"), DatasetError),
        (lambda d: d.update(size="large"), DatasetError),
        (lambda d: d.update(schema=99), DatasetError),
        (lambda d: d.update(concepts=[]), DatasetError),
        (lambda d: d.update(concepts=5), DatasetError),
        (lambda d: d["concepts"].append(d["concepts"][0]), DatasetError),
        (lambda d: d["concepts"][0].update(token="tom"), TokenError),
        (lambda d: d["concepts"][0].update(noun="Cat!"), CaptionError),
        (lambda d: d["concepts"].pop(), DatasetError),  # a composite still shows it
        (lambda d: d["composites"][0]["mentions"].append({"noun": "cat"}), DatasetError),
        (lambda d: d["composites"][0].update(mentions="none"), DatasetError),
        (lambda d: d["composites"].append("0000.png"), DatasetError),
    ],
)
def test_a_broken_index_is_named(folder, change, error):
    edit_index(folder, change)
    with pytest.raises(error) as caught:
        DatasetFolder(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\0"])
def test_an_index_that_is_none_is_named(folder, text):
    (folder / "dataset.json").write_text(text)
    with pytest.raises(DatasetError, match="dataset.json"):
        DatasetFolder(folder)


def test_other_folders_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DatasetError, match="is not a dataset folder"):
            DatasetFolder(folder)


def test_datasets_are_found_and_nothing_else(folder, tmp_path):
    assert find_datasets(tmp_path / "nowhere") == []
    for place in ("sets/b", "sets/a", ".hidden/c", "cats/copy"):
        shutil.copytree(folder, tmp_path / place)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "dataset.json").write_text('{"labels": null}')  # of other programs
    (tmp_path / "linked").symlink_to(folder)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_datasets(tmp_path) == ["cats", "linked", "sets/a", "sets/b"]


# ---- digest


def test_the_digest_follows_every_file(written, folder):
    dataset = DatasetFolder(folder)
    before = dataset.digest()
    assert before == DatasetFolder(written).digest()  # wherever it lies
    used = [p for p in folder.rglob("*.*") if p.name != "dataset.json"]
    assert len(used) == 6 * 2 + sum(len(dataset.composite(i).mentions) for i in range(6)) + 2 * 2
    for path in used:
        content = path.read_bytes()
        if path.suffix == ".txt":
            path.write_bytes(content.strip() + b", at noon\n")
        else:
            with Image.open(path) as picture:
                changed = picture.copy()
            changed.putpixel((0, 0), 77 if changed.mode == "L" else (77, 7, 7))
            changed.save(path)
        assert DatasetFolder(folder).digest() != before, path
        path.write_bytes(content)
    os.utime(folder / "composites" / "0000.png", (1, 1))
    (folder / "notes.md").write_text("not a part")
    edit_index(folder, lambda d: d.update(about={"edited": True}))
    assert DatasetFolder(folder).digest() == before


def test_the_digest_follows_the_index(folder):
    before = DatasetFolder(folder).digest()

    def swap(index):
        entry = next(e for e in index["composites"] if len(e["mentions"]) == 2)
        one, two = entry["mentions"]
        one["mask"], two["mask"] = two["mask"], one["mask"]

    edit_index(folder, swap)
    swapped = DatasetFolder(folder).digest()
    (folder / "composites" / "0000.png").unlink()
    assert len({before, swapped, DatasetFolder(folder).digest()}) == 3


def test_the_digest_follows_what_a_mention_is_called(folder):
    """A caption may hold both words; then the index alone says which of them is the noun."""
    index = json.loads((folder / "dataset.json").read_text())
    mentions = next(e["mentions"] for e in index["composites"] if any(m["token"] is None for m in e["mentions"]))
    i = next(i for i, e in enumerate(index["composites"]) if e["mentions"] == mentions)
    words = [f"{m['token']} cat" if m["token"] else "cat kitten" for m in mentions]
    (folder / "composites" / f"{i:04d}.txt").write_text(f"a {words[0]} and a {words[1]}")
    before = DatasetFolder(folder).digest()

    def rename(index):
        next(m for m in index["composites"][i]["mentions"] if m["token"] is None)["noun"] = "kitten"

    edit_index(folder, rename)
    assert DatasetFolder(folder).digest() != before
