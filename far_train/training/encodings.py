"""Encodings that outlive a run: what the VAE made of an image is kept by the image's content, and not computed again.

A resumed run, the next training on a dataset, and other datasets with the same regularization images find them. An
edited image is another image; captions and masks are never kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..models.fingerprint import fingerprint
from ..utils.errors import OutputError
from ..utils.files import write_tensors

log = logging.getLogger(__name__)

MOST_BYTES = 2 * 2**30  # of one VAE's encodings: some ten thousand images of 512 px


class Encodings:
    """The encoded images of one VAE below ``folder``.

    An encoding is the posterior's mean and standard deviation, [C, h, w] each. It holds for the VAE as it computes:
    with its weights, in its precision, on its kind of device. Use it as a context manager: new encodings are written in
    one file at its end, also after an error. Files that can't be read are ignored. Where nothing can be written, a
    warning says so.
    """

    def __init__(self, folder: Path, vae: nn.Module):
        about = f"{fingerprint(vae.state_dict())} on {next(vae.parameters()).device.type}"
        self.folder = Path(folder) / hashlib.sha256(about.encode()).hexdigest()[:16]
        self._new: dict[str, Tensor] = {}
        self._kept: dict[str, tuple[Path, str]] = {}  # an image's key to a file and the tensor's name in it
        for path in sorted(self.folder.glob("*.safetensors")):
            with suppress(Exception), safe_open(path, "pt") as file:  # a damaged header raises almost anything
                self._kept |= {name.split()[0]: (path, name) for name in file.keys()}

    def find(self, image: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of an image [H, W, 3] that was encoded before."""
        key = _key(image)
        path, name = self._kept.get(key, (None, ""))
        if path is None:
            return None
        try:
            with safe_open(path, "pt") as file:
                encoding = file.get_tensor(name)
        except Exception:  # it was deleted meanwhile, or is damaged
            return None
        with suppress(OSError):  # the file may be another user's
            os.utime(path)  # the longest unused goes first
        return tuple(encoding) if name == _name(key, encoding) else None

    def keep(self, image: Tensor, mean: Tensor, std: Tensor) -> None:
        """Remember what an image was encoded to."""
        encoding = torch.stack([mean, std])
        self._new[_name(_key(image), encoding)] = encoding

    def __enter__(self) -> Encodings:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._new:
            return
        name = hashlib.sha256(" ".join(sorted(self._new)).encode()).hexdigest()[:32]
        try:
            write_tensors(self.folder / f"{name}.safetensors", self._new, {})
        except OutputError as e:
            log.warning("Encoded images aren't kept for later runs: %s", e)
            return
        with suppress(OSError):  # another process may be deleting the same files
            self._forget_the_longest_unused()

    def _forget_the_longest_unused(self) -> None:
        files = sorted(
            ((path.stat(), path) for path in self.folder.glob("*.safetensors")), key=lambda f: -f[0].st_mtime
        )
        total = 0
        for number, (about, path) in enumerate(files):
            total += about.st_size
            if total > MOST_BYTES and number:  # the newest stays, however large it is
                path.unlink(missing_ok=True)


def _key(image: Tensor) -> str:
    return f"{image.shape[1]}x{image.shape[0]}-{_digest(image)}"


def _name(key: str, encoding: Tensor) -> str:
    """Of the tensor in a file; it tells what is in it, so that damage shows."""
    return f"{key} {_digest(encoding)}"


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()[:32]
