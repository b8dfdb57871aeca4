"""Keep two processes from writing into one folder at the same time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import OutputError

log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the lock file ``path`` until the context ends; if the process dies, the system frees it.

    Its folder must exist. Where the file system has no locks, a line in the log says so. Raises OutputError with the
    words ``busy`` while somebody else holds it.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(busy) from None
    except (NotImplementedError, OSError) as e:
        log.warning("%s: can't be locked (%s); see to it that no other process writes there.", path, e)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes it when it is released
            path.unlink()
        lock.release()
