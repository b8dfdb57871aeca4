"""Reading texts that people wrote, in whatever editor."""

from __future__ import annotations

from pathlib import Path

from .errors import UnreadableFile


def read_words(path: Path) -> str:
    """A text that people wrote, without the mark that some editors put in front.

    Raises UnreadableFile, which names the file, and for another encoding than UTF-8 the fix.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UnreadableFile(f"{path}: can't be read ({e.strerror or e})") from e
    except UnicodeDecodeError as e:
        raise UnreadableFile(f"{path}: can't be read as UTF-8 (byte {e.start + 1}); save it as UTF-8 text") from e
    if "\0" in text:
        raise UnreadableFile(f"{path}: can't be read as UTF-8 (it looks like UTF-16); save it as UTF-8 text")
    return text
