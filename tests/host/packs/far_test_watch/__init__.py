"""Test-only pack: watches what the host's process does to the world, and tells at GET /far_test/watch.

An audit hook sees what Python code opens, connects to, starts and unpickles. What the host itself, its Python and its
libraries may do is left out: reading their own files, and reading and writing in the host's base directory.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import re
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading

import folder_paths
from aiohttp import web
from server import PromptServer

BASE = os.path.realpath(folder_paths.base_path)
WRITABLE = [os.path.realpath(os.path.join(BASE, name)) for name in ("input", "output", "temp", "models", "user")]
WRITABLE += ["/dev/null"]
# The pack's own temporary folders; the host's base directory may lie beside them, as far-host-….
TEMPORARY = re.compile(re.escape(os.path.realpath(tempfile.gettempdir())) + r"/far-\w{8}(/.*)?")
CUSTOM = os.path.join(BASE, "custom_nodes")
PACKS = [os.path.realpath(os.path.join(CUSTOM, name)) for name in os.listdir(CUSTOM)]  # may be links
HOST = os.path.dirname(os.path.realpath(sys.modules["__main__"].__file__))
PYTHON = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())}
SYSTEM = ["/proc", "/sys", "/dev", "/usr", "/etc/fonts", "/etc/localtime", "/etc/mime.types", "/etc/ssl"]
READABLE = [CUSTOM, *PACKS, HOST, *PYTHON, *SYSTEM]
CACHES = [os.path.realpath(os.path.expanduser(p)) for p in ("~/.cache", "~/.config", "~/.triton")]
# Events that change files, with the place of the changed path among their arguments.
CHANGES = {"os.mkdir": 0, "os.rmdir": 0, "os.remove": 0, "os.symlink": 1, "os.link": 1, "os.truncate": 0}
CHANGES |= {"os.chmod": 0, "shutil.rmtree": 0, "shutil.copyfile": 1, "shutil.move": 1}
NEVER = "socket.connect socket.getaddrinfo subprocess.Popen os.system os.exec os.fork os.posix_spawn pickle.find_class"

seen: list[str] = []
_inside = threading.local()


def _within(path: str, roots: list[str]) -> bool:
    return bool(TEMPORARY.fullmatch(path)) or any(path == root or path.startswith(root + os.sep) for root in roots)


def _judge(event: str, args: tuple) -> None:
    if event == "open":
        path, mode, flags = args
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # a descriptor that is open already
        real = os.path.realpath(os.fsdecode(path))
        writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        allowed = WRITABLE if writes else [*WRITABLE, *READABLE, *CACHES]
        if not _within(real, allowed) and not real.endswith(".pyc") and "__pycache__" not in real:
            seen.append(f"{'write' if writes else 'read'} {real}")
    elif event in CHANGES:
        _judge_change(event, args[CHANGES[event]], args[-1] if event.startswith("os.") else -1)
    elif event == "os.rename":
        _judge_change(event, args[0], args[2])
        _judge_change(event, args[1], args[3])
    elif event in NEVER.split():
        seen.append(f"{event} {args[:2]!r}"[:200])
    elif event == "compile" and args[1] == "<string>" and not _by_the_library():
        seen.append(f"eval {args[0]!r}"[:200])


def _judge_change(event: str, path: str, folder: int) -> None:
    """``folder``: a descriptor that the path is relative to, where it is one."""
    if isinstance(folder, int) and folder >= 0 and os.path.exists(f"/proc/self/fd/{folder}") and event != "os.truncate":
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
    real = os.path.realpath(os.fsdecode(path))
    if not _within(real, WRITABLE) and "__pycache__" not in real:
        seen.append(f"{event} {real}")


def _by_the_library() -> bool:
    """Python's own modules evaluate type annotations, and the methods of dataclasses and named tuples."""
    file = sys._getframe(3).f_code.co_filename
    return file.startswith(os.path.dirname(os.__file__) + os.sep) and "site-packages" not in file


def _hook(event: str, args: tuple) -> None:
    if getattr(_inside, "hook", False):
        return
    _inside.hook = True
    try:
        _judge(event, args)
    except (TypeError, ValueError, OSError) as e:  # a name that can't be resolved can't be opened either
        if event != "open":
            seen.append(f"{event} {args!r}: {e}"[:200])
    finally:
        _inside.hook = False


@PromptServer.instance.routes.get("/far_test/watch")
async def watch(request: web.Request) -> web.Response:
    """What was seen since the last time."""
    found, seen[:] = list(seen), []
    return web.json_response(found)


@PromptServer.instance.routes.post("/far_test/watch")
async def misbehave(request: web.Request) -> web.Response:
    """Do what must be seen: whoever relies on this pack can ask whether it works."""
    outside = os.path.join(os.path.dirname(BASE), "far-test-outside")
    for attempt in (
        lambda: open(outside),
        lambda: open(outside, "w").close(),
        lambda: os.remove(outside),
        lambda: pickle.loads(pickle.dumps(collections.OrderedDict())),
        lambda: eval("1 + 1"),
        lambda: socket.create_connection(("127.0.0.1", 9), 1),
        lambda: subprocess.run(["true"]),
    ):
        with contextlib.suppress(OSError):
            attempt()
    return web.json_response({})


sys.addaudithook(_hook)
NODE_CLASS_MAPPINGS: dict = {}
