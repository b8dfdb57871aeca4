"""Test-only pack: makes the pack's library fail on demand, or wait in a phase of a training until it is cancelled.

POST /far_test/fault {"name": …} sets one of ``FAULTS`` or ``GATES`` or, without a name, none. GET /far_test/state tells
which gate is reached, what the process holds in tensors, and whether it has yet to free its memory as it was asked.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import torch
from aiohttp import web
from server import PromptServer

MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99999999999 bytes."
GATE_SECONDS = 30

undo: list[Callable[[], None]] = []
reached: list[str] = []


def far(module: str) -> Any:
    """A module of the pack as the host has loaded it."""
    pack = next(name for name in sys.modules if name.endswith("ComfyUI-FaR"))
    return importlib.import_module(f"{pack}.{module}")


def replace(owner: Any, name: str, value: Any) -> None:
    old = getattr(owner, name)
    undo.append(lambda: setattr(owner, name, old))
    setattr(owner, name, value)


def fail(owner: Any, name: str, error: Callable[[], Exception], times: int = 10**9) -> None:
    """The next ``times`` calls of a function raise; later ones are real."""
    real, calls = getattr(owner, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise error()
        return real(*args, **kwargs)

    replace(owner, name, failing)


def out_of_memory() -> Exception:
    return RuntimeError(MEMORY)


def full_disk() -> None:
    replace(far("far_train.utils.files"), "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=0)))


def broken_previews() -> None:
    live_view = far("nodes.live_view")
    replace(live_view, "PREVIEW_SECONDS", 0.0)
    replace(live_view, "FIRST_PREVIEW", 0.0)
    replace(live_view, "picture_grid", None)
    fail(live_view, "loss_curves", lambda: ValueError("a preview that fails"), times=3)


def noted_placements() -> None:
    """Not a fault: "reached" lists the models for which the host's models make room."""
    memory = far("nodes.host_memory")
    real = memory.on_compute_device

    def noting(module: torch.nn.Module) -> Any:
        reached.append(type(module).__name__)
        return real(module)

    replace(memory, "on_compute_device", noting)


FAULTS: dict[str, Callable[[], None]] = {
    "memory once": lambda: fail(far("far_train.training.step"), "forward_backward", out_of_memory, times=2),
    "memory": lambda: fail(far("far_train.training.step"), "forward_backward", out_of_memory),
    "memory while encoding": lambda: fail(far("far_train.training.build"), "cache_latents", out_of_memory),
    "base": lambda: fail(far("nodes.host_models"), "read_base", ZeroDivisionError),
    "disk": full_disk,
    "preview": broken_previews,
    "placements": noted_placements,
    "crash": lambda: fail(far("far_train.training.recipe"), "take_step", ZeroDivisionError),
    "crash while segmenting": lambda: fail(far("far_train.data.subjects"), "choose_mask", ZeroDivisionError),
}


def gate(module: str, owner: str, name: str) -> Callable[[], None]:
    """The first call of a function waits until the user cancels, or for :data:`GATE_SECONDS`."""

    def install() -> None:
        target = getattr(far(module), owner) if owner else far(module)
        real = getattr(target, name)

        def waiting(*args: Any, **kwargs: Any) -> Any:
            if not reached:
                reached.append(name)
                end = time.monotonic() + GATE_SECONDS
                while not comfy.model_management.processing_interrupted() and time.monotonic() < end:
                    time.sleep(0.02)
            return real(*args, **kwargs)

        replace(target, name, waiting)

    return install


GATES = {
    "priors": gate("far_train.training.class_images", "", "draw_pictures"),
    "encoding": gate("far_train.data.fusion", "ConceptFusion", "composite"),
    "step": gate("far_train.training.step", "", "forward_backward"),
    "save": gate("far_train.training.recipe", "", "save_checkpoint"),
    "segmenting": gate("far_train.data.subjects", "", "choose_mask"),
    "sampling": gate("far_train.training.recipe", "", "draw_pictures"),
}


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@PromptServer.instance.routes.post("/far_test/fault")
async def fault(request: web.Request) -> web.Response:
    while undo:
        undo.pop()()
    reached.clear()
    if name := (await request.json()).get("name"):
        (FAULTS | GATES)[name]()
    return web.json_response({})


@PromptServer.instance.routes.get("/far_test/state")
async def state(request: web.Request) -> web.Response:
    held = await asyncio.to_thread(live_bytes) if "memory" in request.query else None
    asked_to_free = bool(PromptServer.instance.prompt_queue.get_flags(reset=False))
    return web.json_response({"reached": list(reached), "bytes": held, "asked_to_free": asked_to_free})


NODE_CLASS_MAPPINGS: dict = {}
