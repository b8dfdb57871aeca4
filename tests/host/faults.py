"""A host whose pack can be made to fail or to wait, and that says what it holds in memory."""

from __future__ import annotations

import time
from pathlib import Path

from .comfy_server import ComfyServer
from .graphs import node

FAULTS = Path(__file__).parent / "packs" / "far_test_faults"


def held_bytes(comfy: ComfyServer) -> int:
    """Bytes of tensors in the host's process once it has let go of all results."""
    deadline = time.monotonic() + 120
    while True:  # asked again: the host's worker can miss a request that comes just before it begins to wait for one
        comfy.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(0.1)
        if not comfy.get("/far_test/state")["asked_to_free"]:
            break
        assert time.monotonic() < deadline, "it never freed its memory"
    comfy.run({"1": node("FaRTest_LiveModels")})  # the same worker: once this has run, it is through with freeing
    return comfy.get("/far_test/state?memory=1")["bytes"]


def fault(comfy: ComfyServer, name: str | None) -> None:
    comfy.post("/far_test/fault", {"name": name})


def wait_reached(comfy: ComfyServer) -> None:
    """Until a run waits at the gate that :func:`fault` has set."""
    deadline = time.monotonic() + 120
    while not comfy.get("/far_test/state")["reached"]:
        assert time.monotonic() < deadline, "it never came there"
        time.sleep(0.05)
