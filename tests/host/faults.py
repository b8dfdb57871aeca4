"""A host whose pack can be made to fail or to wait, and that says what it holds in memory."""

from __future__ import annotations

import time
from pathlib import Path

from .comfy_server import ComfyServer
from .graphs import node

FAULTS = Path(__file__).parent / "packs" / "far_test_faults"


def held_bytes(comfy: ComfyServer) -> int:
    """Bytes of tensors in the host's process once it has let go of all results."""
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    comfy.run({"1": node("FaRTest_LiveModels")})
    comfy.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)  # its worker frees between prompts
    return comfy.get("/far_test/state?memory=1")["bytes"]


def fault(comfy: ComfyServer, name: str | None) -> None:
    comfy.post("/far_test/fault", {"name": name})


def wait_reached(comfy: ComfyServer) -> None:
    """Until a run waits at the gate that :func:`fault` has set."""
    deadline = time.monotonic() + 120
    while not comfy.get("/far_test/state")["reached"]:
        assert time.monotonic() < deadline, "it never came there"
        time.sleep(0.05)
