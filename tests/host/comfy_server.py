"""A real ComfyUI as a subprocess, for tests that must see the pack from the outside.

The host runs in its own process because its top-level packages (`nodes`, `comfy`, `server`, …) would clash with this
repository's `nodes/`. Everything here is standard library, so the tests need nothing beyond pytest's own environment.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .find_host import REPO, Host, HostError

if TYPE_CHECKING:
    from typing import Self

TEST_PACK = Path(__file__).resolve().parent / "packs" / "far_test_nodes"


class PromptRejected(RuntimeError):
    """The host refused a prompt (or a part of it) at validation. `node_errors` maps node id → the host's report."""

    def __init__(self, message: str, node_errors: Mapping[str, Any]):
        super().__init__(message)
        self.node_errors = dict(node_errors)


class ExecutionFailed(RuntimeError):
    """A queued prompt ended in an error or an interrupt. `errors` lists the nodes concerned."""

    def __init__(self, errors: list[NodeError]):
        super().__init__("\n".join(str(error) for error in errors) or "the prompt failed without saying why")
        self.errors = errors


@dataclass(frozen=True)
class NodeError:
    """One node's complaint: while validating (`kind` is the host's error type) or executing (the exception's type)."""

    node_id: str
    node_type: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"node {self.node_id} ({self.node_type}): {self.kind}: {self.message}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ComfyServer:
    """Context manager: a host on a free port of 127.0.0.1 with a base directory of its own.

    packs: custom node folders to link into custom_nodes, by default the test pack and, once the repository has an
        `__init__.py`, the pack itself as ComfyUI-FaR.
    base: an existing base directory to reuse (kept on exit); by default a temporary one (deleted on exit).
    args: further command line arguments of the host.
    start_timeout: seconds until the host must serve; a cold start reads gigabytes of libraries.
    """

    def __init__(
        self,
        host: Host,
        packs: Mapping[str, Path] | None = None,
        base: Path | None = None,
        args: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
        start_timeout: float = 240,
    ):
        self.host = host
        self.packs = dict(default_packs() if packs is None else packs)
        self.args = list(args)
        self.env = dict(env or {})
        self.start_timeout = start_timeout
        self._temporary = tempfile.TemporaryDirectory(prefix="far-host-") if base is None else None
        self.base = Path(self._temporary.name if self._temporary else base)
        self.port = 0
        self.client_id = uuid.uuid4().hex
        self._process: subprocess.Popen | None = None
        self._starts = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_file(self) -> Path:
        """The log of the current (or last) start; earlier starts' logs stay beside it."""
        return self.base / f"server-{self._starts}.log"

    def folder(self, name: str) -> Path:
        """A folder of the base directory: input, output, temp, models/loras, …; made if missing."""
        path = self.base / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    # --- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._temporary:
            self._temporary.cleanup()

    def start(self) -> Self:
        """Start the host and wait until it answers. Raises HostError with the log's tail if it doesn't."""
        if self._process is not None:
            raise HostError("the host is already running: call stop() or restart()")
        self._prepare_base()
        self._starts += 1
        self.port = _free_port()
        command = [
            str(self.host.python),
            "main.py",
            *(["--cpu"] if os.environ.get("COMFYUI_DEVICE", "cpu") == "cpu" else []),
            "--base-directory",
            str(self.base),
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--disable-auto-launch",
            # The database would otherwise be written into the host's own folder, which may be read-only.
            "--database-url",
            f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}",
            # Paid online nodes: slow to import, and with them the front end calls the internet.
            "--disable-api-nodes",
            *self.args,
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "PYTHONPATH"))}
        # One thread: on tensors this small more of them only wait for each other, ten times as long on a busy machine.
        environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **self.env}
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.host.path,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._until("serve", self.start_timeout, self._serves)
        return self

    def stop(self, grace: float = 10) -> None:
        """End the host and everything it started."""
        process, self._process = self._process, None
        if process is None:
            return
        for how in ("SIGTERM", "SIGKILL"):
            self._signal(process, how)
            try:
                process.wait(grace)
                break
            except subprocess.TimeoutExpired:
                continue
        self._signal(process, "SIGKILL")  # Children that outlived their parent.

    def restart(self) -> Self:
        """Stop and start with the same base directory: files survive, memory and caches don't."""
        self.stop()
        return self.start()

    @staticmethod
    def _signal(process: subprocess.Popen, name: str) -> None:
        try:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, getattr(signal, name))  # start_new_session made its pid the group's id.
            elif process.poll() is None:
                process.kill()
        except ProcessLookupError:
            pass

    def _prepare_base(self) -> None:
        for name in ("custom_nodes", "models", "input", "output", "temp", "user/default"):
            self.folder(name)  # The host stops at once if custom_nodes is missing.
        settings = self.base / "user" / "default" / "comfy.settings.json"
        if not settings.exists():  # Without this, a first visit to the front end opens the template browser.
            settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")
        for name, target in self.packs.items():
            link = self.base / "custom_nodes" / name
            if not link.exists():
                link.symlink_to(Path(target).resolve(), target_is_directory=True)

    def _serves(self) -> bool:
        try:
            self._request("/system_stats", timeout=5)
            return True
        except (urllib.error.URLError, OSError):
            return False

    def _until(self, what: str, seconds: float, done: Any, every: float = 0.2) -> Any:
        """Call `done()` until it returns something true; HostError when the host dies or time is up."""
        deadline = time.monotonic() + seconds
        while True:
            result = done()
            if result:
                return result
            code = self._process.poll() if self._process else "not started"
            if code is not None:
                raise HostError(f"ComfyUI ended (code {code}) before it could {what}:\n{self.log()[-4000:]}")
            if time.monotonic() > deadline:
                raise HostError(f"ComfyUI did not {what} within {seconds:g} s:\n{self.log()[-4000:]}")
            time.sleep(every)

    # --- talk ---------------------------------------------------------------------------------------------------

    def _request(self, path: str, body: Any = None, timeout: float = 30) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        """GET any of the host's JSON routes."""
        return json.loads(self._request(path) or b"null")

    def post(self, path: str, body: Any) -> Any:
        """POST JSON to any of the host's routes; None where it answers with nothing."""
        return json.loads(self._request(path, body) or b"null")

    def object_info(self) -> dict[str, Any]:
        """Every node class that the host knows: id → inputs, outputs, tooltips, category."""
        return self.get("/object_info")

    def log(self) -> str:
        """What this start has printed so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""

    def start_log(self) -> str:
        """What this start printed until it served: what tests provoke later is not in it."""
        return self.log().split("Starting server")[0]

    def queue(self, prompt: Mapping[str, Any], client_id: str | None = None) -> str:
        """Queue an API-format prompt; returns its id. Raises PromptRejected if any node did not validate.

        ``client_id``: whose prompt it is, by default the server's own; "" queues it without any.
        The host accepts a prompt if one output is valid, and reports the others in a 200; that is a failure here.
        """
        client_id = self.client_id if client_id is None else client_id
        body = {"prompt": prompt} | ({"client_id": client_id} if client_id else {})
        try:
            answer = self.post("/prompt", body)
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read() or b"{}")
            node_errors = answer.get("node_errors") or {}
            reasons = "\n".join(map(str, self.errors(answer))) or json.dumps(answer.get("error"))
            raise PromptRejected(f"the host refused the prompt:\n{reasons}", node_errors) from None
        if answer.get("node_errors"):
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            self.interrupt(answer["prompt_id"])
            reasons = "\n".join(map(str, self.errors(answer)))
            raise PromptRejected(f"a part of the prompt is invalid:\n{reasons}", answer["node_errors"])
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 300) -> dict[str, Any]:
        """Wait until a prompt has ended, well or badly; returns its history entry (written after the last node)."""
        path = f"/history/{urllib.parse.quote(prompt_id)}"
        return self._until(f"finish prompt {prompt_id}", timeout, lambda: self.get(path).get(prompt_id), every=0.05)

    def wait_running(self, prompt_id: str, timeout: float = 60) -> None:
        """Wait until a prompt has left the queue and is being executed (or has ended)."""

        def running() -> bool:
            state = self.get("/queue")
            return all(item[1] != prompt_id for item in state["queue_pending"])

        self._until(f"begin prompt {prompt_id}", timeout, running)

    def run(self, prompt: Mapping[str, Any], timeout: float = 300) -> dict[str, Any]:
        """Queue, wait, and return {node id: its ui output}. Raises ExecutionFailed if a node did."""
        entry = self.wait(self.queue(prompt), timeout)
        if entry["status"]["status_str"] != "success":
            raise ExecutionFailed(self.errors(entry))
        return entry["outputs"]

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Cancel what runs now, as the front end's red button does; with an id, only if that prompt is running."""
        self.post("/interrupt", {} if prompt_id is None else {"prompt_id": prompt_id})

    def cancel(self, prompt_id: str, timeout: float = 60) -> dict[str, Any]:
        """Interrupt a running prompt until it ends, since one that is just starting forgets it; its history entry."""
        path = f"/history/{urllib.parse.quote(prompt_id)}"

        def ended() -> Any:
            self.interrupt(prompt_id)
            return self.get(path).get(prompt_id)

        return self._until(f"cancel prompt {prompt_id}", timeout, ended)

    def file(self, image: Mapping[str, str]) -> Path:
        """The file behind one item of a ui output: {"filename", "subfolder", "type"} → path."""
        return self.base / image["type"] / image["subfolder"] / image["filename"]

    @staticmethod
    def messages(entry: Mapping[str, Any], event: str) -> list[dict[str, Any]]:
        """The status messages of one kind in a history entry, e.g. execution_cached → [{"nodes": [...], …}]."""
        return [data for name, data in entry.get("status", {}).get("messages", []) if name == event]

    @classmethod
    def cached(cls, entry: Mapping[str, Any]) -> set[str]:
        """Ids of the nodes that a run took from the host's cache instead of executing them."""
        return {str(node) for data in cls.messages(entry, "execution_cached") for node in data["nodes"]}

    @classmethod
    def errors(cls, entry: Mapping[str, Any]) -> list[NodeError]:
        """Every complaint in an answer of POST /prompt (`node_errors`) or in a history entry (execution messages)."""
        found = [
            NodeError(
                str(node_id),
                report.get("class_type", "?"),
                error["type"],
                f"{error['message']} ({error['details']})" if error.get("details") else error["message"],
            )
            for node_id, report in (entry.get("node_errors") or {}).items()
            for error in report["errors"]
        ]
        for data in cls.messages(entry, "execution_error"):
            found.append(
                NodeError(
                    str(data["node_id"]), data["node_type"], data["exception_type"], data["exception_message"].strip()
                )
            )
        for data in cls.messages(entry, "execution_interrupted"):
            found.append(NodeError(str(data["node_id"]), data["node_type"], "interrupted", "the run was cancelled"))
        return found


def default_packs() -> dict[str, Path]:
    """custom_nodes name → folder: the test pack, and this repository once it is a node pack."""
    packs = {"far_test_nodes": TEST_PACK}
    if (REPO / "__init__.py").is_file():
        packs["ComfyUI-FaR"] = REPO
    return packs
