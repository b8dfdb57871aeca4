"""The dataset folder: a training set on disk that users can inspect and edit.

    dataset.json                 concepts, picture size, and which mask belongs to which mention
    composites/0000.png          the training pictures …
    composites/0000.txt          … their captions; edit them freely, but keep the mentions and their order
    composites/0000.0.mask.png   … and one mask per mention
    priors/0000.png, .txt        regularization images

To remove a composite, delete its picture. To add a regularization image, put it in priors/ with its caption.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.ahead import computed_ahead, spare_threads
from ..utils.errors import CaptionError, DatasetError, FarError, OutputError, UnreadableFile
from ..utils.files import check_empty, make_folder, parse_json, write_json, write_text
from ..utils.locks import locked
from ..utils.text_files import read_words
from .captions import Name, check_noun, check_token, locate_mentions
from .concepts import Composite, TrainingSet, picture_at
from .folders import OTHER_PICTURES, SUFFIXES, describe_unread, list_photos
from .images import load_mask, load_photo, save_mask, save_picture
from .masks import describe_faint

SCHEMA = 1


def write_dataset(
    training_set: TrainingSet,
    folder: Path,
    *,
    about: dict[str, Any] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> DatasetFolder:
    """Build every composite and regularization image and write the folder.

    ``about`` is stored in dataset.json for the reader. The folder gets its name only when it is complete. Raises
    OutputError if it exists and isn't empty, or can't be written.
    """
    folder = Path(folder)
    if folder.resolve() == Path.cwd():
        raise OutputError(f"{folder}: is the current folder, which can't be replaced; choose another folder")
    check_empty(folder)
    place = folder.resolve()
    with _writing(folder):
        place.parent.mkdir(parents=True, exist_ok=True)
    busy = f"{folder}: another process is writing this dataset; wait for it, or choose another folder"
    with locked(place.with_name(f"{place.name}.lock"), busy):
        check_empty(folder)  # somebody may just have finished it
        _write(training_set, folder, place, about or {}, on_progress)
    return DatasetFolder(folder)


def _write(
    training_set: TrainingSet, folder: Path, place: Path, about: dict[str, Any], on_progress: Callable[[int, int], None]
) -> None:
    """Write to ``place``, the full path of ``folder``."""
    unfinished = place.with_name(f"{place.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    make_folder(unfinished)
    try:
        instances, priors = training_set.composite_count(), training_set.prior_count()

        def write(i: int) -> dict[str, Any]:
            folder, number = ("composites", i) if i < instances else ("priors", i - instances)
            return _write_picture(unfinished / folder, f"{number:04d}", picture_at(training_set, i))

        entries = []
        with computed_ahead(write, instances + priors, spare_threads()) as written:
            for i in range(instances + priors):
                on_progress(i, instances + priors)
                entries.append(next(written))
        names = [{"token": n.token, "noun": n.noun} for n in training_set.names]
        write_json(
            unfinished / "dataset.json",
            {
                "schema": SCHEMA,
                "size": training_set.size,
                "concepts": names,
                "composites": entries[:instances],
                "about": about,
            },
        )
        with _writing(folder):
            if place.exists():
                place.rmdir()
            unfinished.replace(place)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    on_progress(instances + priors, instances + priors)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OutputError(f"{folder}: can't be written ({e.strerror or e}); choose another folder") from e


def _write_picture(folder: Path, stem: str, composite: Composite) -> dict[str, Any]:
    """Write a picture with its caption and the masks of its mentions; returns its entry of dataset.json."""
    save_picture(folder / f"{stem}.png", composite.image)
    write_text(folder / f"{stem}.txt", composite.caption + "\n")
    mentions = []
    for i, mention in enumerate(composite.mentions):
        save_mask(folder / f"{stem}.{i}.mask.png", mention.mask)
        mentions.append({"token": mention.name.token, "noun": mention.name.noun, "mask": f"{stem}.{i}.mask.png"})
    return {"image": f"{stem}.png", "layout": composite.layout, "mentions": mentions}


class DatasetFolder:
    """A ``TrainingSet`` that reads its pictures from a dataset folder when asked for them.

    Opening the folder checks everything but the pixels, which are checked when they are read. ``notes`` says what isn't
    used. Raises DatasetError, TokenError, CaptionError, PhotoError, each naming the file.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        about = self._read_index()
        try:
            self.size = int(about["size"])
            self.names = tuple(Name(check_noun(c["noun"]), check_token(c["token"])) for c in about["concepts"])
            composites = [_Entry.read(self.folder / "composites", e) for e in about["composites"]]
        except FarError as e:
            raise type(e)(f"{self.folder / 'dataset.json'}: {e}") from e
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise DatasetError(f"{self.folder / 'dataset.json'}: {e!r} is missing or invalid; run 'fuse' again") from e
        if not self.names or len({n.token for n in self.names}) < len(self.names):
            raise DatasetError(f"{self.folder / 'dataset.json'}: no concepts, or one listed twice; run 'fuse' again")
        self._composites = [e for e in composites if e.image.exists()]
        if not self._composites:
            raise DatasetError(f"{self.folder}: holds no composites; run 'fuse' again")
        self._refuse_strangers(composites)
        self.notes: list[str] = []
        if gone := [e.image.stem for e in composites if not e.image.exists()]:
            some = ", ".join(gone[:5]) + (", …" if len(gone) > 5 else "")
            self.notes.append(f"{self.folder}: {len(gone)} of {len(composites)} composites were deleted ({some}).")
        for entry in self._composites:
            entry.check(set(self.names))
        self._check_all_shown()
        self._priors = _list_pictures(self.folder / "priors")
        for path in self._priors:
            _read_caption(path)
        if self._priors and (unread := describe_unread(self.folder / "priors")):
            self.notes.append(unread)

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / "dataset.json"
        if not path.is_file():
            raise DatasetError(f"{self.folder}: is not a dataset folder (no dataset.json); make one with 'fuse'")
        try:
            about = json.loads(read_words(path))
        except UnreadableFile as e:
            raise DatasetError(str(e)) from e
        except (ValueError, RecursionError) as e:
            raise DatasetError(f"{path}: can't be read ({e}); run 'fuse' again") from e
        if not isinstance(about, dict) or about.get("schema") != SCHEMA:
            raise DatasetError(f"{path}: its schema is not {SCHEMA}, the one this version reads; run 'fuse' again")
        return about

    def _refuse_strangers(self, composites: list[_Entry]) -> None:
        """Raise DatasetError for pictures that dataset.json doesn't list: renamed, or saved in another format."""
        folder = self.folder / "composites"
        known = {e.image.name for e in composites} | {mask.name for e in composites for _, mask in e.subjects}
        kinds = tuple(f".{kind}" for kind in OTHER_PICTURES) + SUFFIXES
        pictures = (
            p for p in sorted(folder.iterdir()) if p.name.lower().endswith(kinds) and not p.name.startswith(".")
        )
        strangers = [p for p in pictures if p.name not in known]
        if not strangers:
            return
        gone = [e.image.name for e in composites if not e.image.exists()]
        lost = f" ({', '.join(gone[:5])} {'is' if len(gone) == 1 else 'are'} missing)" if gone else ""
        raise DatasetError(
            f"{', '.join(map(str, strangers[:5]))}: not listed in dataset.json{lost}; restore a composite's name and "
            "format (PNG), and move other pictures out of the folder"
        )

    def _check_all_shown(self) -> None:
        shown = {name for entry in self._composites for name, _ in entry.subjects}
        for name in self.names:
            if name not in shown:
                raise DatasetError(
                    f"{self.folder}: no composite shows {name.token}; run 'fuse' again with more of them"
                )

    def digest(self) -> str:
        digest = hashlib.sha256()
        for content in self.file_digests().values():
            digest.update(bytes.fromhex(content))
        digest.update(repr([[n for n, _ in e.subjects] for e in self._composites]).encode())
        return digest.hexdigest()

    def file_digests(self) -> dict[str, str]:
        """The SHA-256 of every file used for training, by its path in the folder. Raises DatasetError."""
        files: list[Path] = []
        for entry in self._composites:
            files += [entry.image, entry.image.with_suffix(".txt"), *(mask for _, mask in entry.subjects)]
        for picture in self._priors:
            files += [picture, picture.with_suffix(".txt")]
        digests = {}
        for path in files:
            try:
                content = path.read_bytes()
            except OSError as e:
                raise DatasetError(f"{path}: can't be read ({e.strerror or e}); restore it") from e
            digests[path.relative_to(self.folder).as_posix()] = hashlib.sha256(content).hexdigest()
        return digests

    def describe_changes(self, kept: Path) -> str:
        """A sentence naming the files that differ from :meth:`file_digests` in a JSON file; "" if none or unknown."""
        try:
            before, now = dict(parse_json(read_words(kept))), self.file_digests()
        except (UnreadableFile, ValueError, TypeError):
            return ""
        kinds = {
            "changed": [f for f in now if f in before and now[f] != before[f]],
            "gone": [f for f in before if f not in now],
            "new": [f for f in now if f not in before],
        }
        return "; ".join(
            f"{kind}: {', '.join(files[:5])}{', …' if len(files) > 5 else ''}" for kind, files in kinds.items() if files
        )

    def captions(self) -> Iterator[tuple[Path, str]]:
        """Every caption with its file; those of regularization images come last."""
        for image in (*(e.image for e in self._composites), *self._priors):
            yield image.with_suffix(".txt"), _read_caption(image)

    def composite_count(self) -> int:
        return len(self._composites)

    def composite(self, index: int) -> Composite:
        entry = self._composites[index]
        image = self._picture(entry.image)
        subjects = [(name, load_mask(path)) for name, path in entry.subjects]
        for (_, mask), (_, path) in zip(subjects, entry.subjects):
            if mask.shape != image.shape[:2]:
                raise DatasetError(
                    f"{path}: the mask is {mask.shape[1]}×{mask.shape[0]} pixels, its picture {self.size}×{self.size}; "
                    "save it at the picture's size"
                )
            if faint := describe_faint(mask):
                raise DatasetError(f"{path}: the mask {faint}, or delete {entry.image.name}")
        return Composite.build(
            image, _read_caption(entry.image), subjects, entry.layout, str(entry.image.with_suffix(".txt"))
        )

    def prior_count(self) -> int:
        return len(self._priors)

    def prior(self, index: int) -> Composite:
        path = self._priors[index]
        return Composite(self._picture(path), _read_caption(path), (), "prior")

    def _picture(self, path: Path) -> Any:
        image = load_photo(path).image
        if image.shape[:2] != (self.size, self.size):
            raise DatasetError(
                f"{path}: is {image.shape[1]}×{image.shape[0]} pixels, the dataset {self.size}×{self.size}; resize it"
            )
        return image


class _Entry:
    """One composite of the index: its picture, its layout, and (name, mask file) of each mention."""

    def __init__(self, image: Path, layout: str, subjects: list[tuple[Name, Path]]):
        self.image, self.layout, self.subjects = image, layout, subjects

    @classmethod
    def read(cls, folder: Path, entry: dict[str, Any]) -> _Entry:
        subjects = []
        for mention in entry["mentions"]:
            token = check_token(mention["token"]) if mention["token"] is not None else None
            subjects.append((Name(check_noun(mention["noun"]), token), folder / plain_name(mention["mask"])))
        return cls(
            folder / plain_name(entry["image"]),
            str(entry["layout"] if "layout" in entry else entry["recipe"]),
            subjects,
        )

    def check(self, concepts: set[Name]) -> None:
        """Check that masks exist, concepts are known, and the caption mentions all subjects in order."""
        for name, mask in self.subjects:
            if name.token and name not in concepts:
                raise DatasetError(f"{self.image}: shows {name.phrase}, which is not a concept in dataset.json")
            if not mask.exists():
                raise DatasetError(f"{mask}: is missing; restore it, or delete {self.image.name}")
        locate_mentions(_read_caption(self.image), [n for n, _ in self.subjects], str(self.image.with_suffix(".txt")))


def find_datasets(root: Path) -> list[str]:
    """Dataset folders below ``root``, relative, with forward slashes, in order.

    They have a dataset.json, which other programs write as well, and composites. Hidden folders and those inside of a
    dataset are left out; links are followed no further than to a dataset.
    """
    found = []
    for place, folders, _ in os.walk(root):
        shown = [Path(place, name) for name in folders if not name.startswith(".")]
        datasets = [f for f in shown if (f / "dataset.json").is_file() and (f / "composites").is_dir()]
        found += [folder.relative_to(root).as_posix() for folder in datasets]
        folders[:] = [folder.name for folder in shown if folder not in datasets]
    return sorted(found)


def plain_name(name: str) -> str:
    """Return ``name`` if it is a file name without a path. Raises DatasetError."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
        raise DatasetError(f"{name!r} is not a plain file name")
    return name


def _list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder; none if it is missing or holds only captions."""
    if not folder.is_dir() or not any(p.suffix.lower() in SUFFIXES for p in folder.iterdir()):
        return []
    return list_photos(folder)


def _read_caption(image: Path) -> str:
    path = image.with_suffix(".txt")
    if not path.exists():
        raise CaptionError(f"{path}: is missing; every picture needs a caption")
    try:
        caption = read_words(path).strip()
    except UnreadableFile as e:
        raise CaptionError(str(e)) from e
    if not caption:
        raise CaptionError(f"{path}: is empty; every picture needs a caption")
    return caption
