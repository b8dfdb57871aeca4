"""Registries of odd inputs that users bring, with the exact message or result for each.

A case builds its input, as small as possible, below ``place``, runs the real command line or the library's entry, and
returns what it found and what is expected. Paths in messages start with ``PLACE``. Add a case for every new oddity.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from far_train.cli.main import main
from far_train.utils.errors import FarError

Found = tuple[Any, Any]  # what was found, what is expected
SIDE, SUBJECT = 64, (16, 12, 48, 52)  # a photo's side, and its subject's box


class Place:
    """A folder for one case, the tiny base, and the command line."""

    def __init__(self, path: Path, base: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture):
        self.path, self.base = path, base
        self._caplog, self._capsys = caplog, capsys

    def __truediv__(self, name: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log_everything(self) -> None:
        self._caplog.set_level("INFO")

    def run(self, *argv: Any) -> list[str]:
        """Everything that a command says except for its progress: warnings, output, error."""
        self._caplog.clear()
        self._capsys.readouterr()
        status = main([str(a) for a in argv])
        out, err = self._capsys.readouterr()
        at = err.find("far_train: error: ")
        assert (status == 0) == (at < 0), err
        errors = err[at:].strip().splitlines() if at >= 0 else []
        warned = [r.getMessage() for r in self._caplog.records if r.name.startswith("far_train")]
        return [self.plain(line) for line in (*warned, *out.splitlines(), *errors)]

    def refusal(self, call: Callable[[], Any]) -> str:
        """The message with which the library refuses."""
        with pytest.raises(FarError) as error:
            call()
        return self.plain(str(error.value))

    def plain(self, text: str) -> str:
        return text.replace(str(self.path), "PLACE")

    def dataset(self) -> Path:
        """A dataset folder of one concept, made by ``fuse``."""
        photo(self / "subjects/a.png", mask())
        fuse = ["fuse", "--concept", "<rex>", "dog", self / "subjects", "--out", self / "data"]
        self.run(*fuse, "--size", 2 * SIDE, "--count", 4)
        return self / "data"

    def train(self, *flags: Any) -> list[str]:
        quick = ["--steps", 2, "--sample-every", 0, "--batch-size", 1, "--prior-batch-size", 0, "--device", "cpu"]
        return self.run("train", "--base", self.base, "--dataset", self / "data", "--out", self / "run", *quick, *flags)


class Registry:
    """The cases of one test file, by name; used as a decorator that registers a case."""

    def __init__(self) -> None:
        self.cases: dict[str, Callable[[Place], Found]] = {}

    def __call__(self, name: str) -> Callable[[Callable[[Place], Found]], None]:
        def register(case: Callable[[Place], Found]) -> None:
            assert name not in self.cases
            self.cases[name] = case

        return register

    def check(self, name: str, place: Place) -> None:
        place.log_everything()
        found, expected = self.cases[name](place)
        assert found == expected


def mask(box: tuple[int, int, int, int] = SUBJECT, inside: int = 255, outside: int = 0) -> Image.Image:
    picture = Image.new("L", (SIDE, SIDE), outside)
    picture.paste(inside, box)
    return picture


def photo(path: Path, own: Image.Image | None = None, seed: int = 0) -> Path:
    """A photo of noise, with the mask that it brings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    if own is not None:
        own.save(path.with_name(f"{path.stem}.mask.png"))
    return path
