"""A ComfyUI that is running already: read a workflow, set its inputs, queue it, wait, say what is wrong with it.

It speaks HTTP with the standard library alone. The host tells its progress within a run only over a WebSocket, to which
``comfy_progress`` listens; ``comfy_run`` fetches what came out.
"""

from __future__ import annotations

import copy
import difflib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..utils.errors import HostLost, QueueError, RunFailed, UnreadableFile
from ..utils.text_files import read_words

DEFAULT_HOST = "http://127.0.0.1:8188"
POLL_SECONDS = 0.5
SUBMIT_TIMEOUT = 60.0  # seconds until a host has said that it has queued a workflow
LATE_SECONDS = 5.0  # to look in the queue for a workflow that Ctrl-C stopped before the host answered
ANSWER_TIMEOUT = 60.0  # seconds without an answer: loading a checkpoint can keep the host from answering for long
REPORT_SECONDS = 30.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")

Workflow = dict[str, dict[str, Any]]  # node id → {"class_type", "inputs", "_meta": {"title"}}: the API format


# ---- the workflow


def read_workflow(path: Path) -> Workflow:
    """An API-format workflow. Raises QueueError for anything else, also for the front end's own format."""
    try:
        workflow = json.loads(read_words(path))
    except UnreadableFile as e:
        raise QueueError(str(e)) from e
    except ValueError as e:
        raise QueueError(f"{path}: can't be read as a workflow ({e})") from e
    if isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list):
        raise QueueError(
            f"{path}: is in the front end's format; queue the file of that name in workflows/api, or save it with "
            "'Export (API)' in the front end's menu"
        )
    nodes = workflow.values() if isinstance(workflow, dict) else ()
    if not nodes or not all(isinstance(n, dict) and isinstance(n.get("inputs"), dict) for n in nodes):
        raise QueueError(f"{path}: is no workflow in API format; save one with 'Export (API)' in the front end's menu")
    return workflow


def title_of(workflow: Workflow, node_id: str) -> str:
    """A node's title, or its type where it has none."""
    node = workflow.get(node_id, {})
    return str(node.get("_meta", {}).get("title") or node.get("class_type", f"node {node_id}"))


def set_inputs(workflow: Workflow, assignments: Sequence[str]) -> Workflow:
    """A copy of a workflow with inputs replaced.

    ``assignments``: ``TITLE.input=value``; a node's number may stand for its title. The value is JSON, or plain text
    where it can't be read as JSON or where the input holds a text already. Raises QueueError.
    """
    workflow = copy.deepcopy(workflow)
    for assignment in assignments:
        node_id, name, text = find_input(workflow, "set", assignment)
        replace_input(workflow, "set", (node_id, name), value_of(text, workflow[node_id]["inputs"][name]))
    return workflow


def find_input(workflow: Workflow, flag: str, assignment: str) -> tuple[str, str, str]:
    """Node id, input name and right side of ``TITLE.input=text``; ``flag`` is what messages begin with.

    Raises QueueError that names the title or the input, and what is there.
    """
    place, equals, text = assignment.partition("=")
    title, dot, name = place.rpartition(".")
    if not (equals and dot):
        raise QueueError(f"{flag}: {assignment!r} can't be understood; write TITLE.input=value")
    node_id = _find_node(workflow, flag, title.strip())
    inputs, name = workflow[node_id]["inputs"], name.strip()
    if name not in inputs:
        raise QueueError(
            f"{flag}: '{title_of(workflow, node_id)}' has no input '{name}'{_suggestion(name, inputs, 'it has')}"
        )
    return node_id, name, text


def replace_input(workflow: Workflow, flag: str, place: tuple[str, str], value: Any) -> None:
    """Replace one input in place; a link gives way to another link alone. Raises QueueError."""
    node_id, name = place
    inputs = workflow[node_id]["inputs"]
    if isinstance(inputs[name], list) and not isinstance(value, list):
        source = title_of(workflow, str(inputs[name][0]))
        raise QueueError(
            f"{flag}: '{title_of(workflow, node_id)}.{name}' is linked to '{source}'; set that node's inputs"
        )
    inputs[name] = value


def value_of(text: str, current: Any) -> Any:
    """What is meant by ``text`` for an input that holds ``current``."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    # A name such as 2024, or points such as [[3, 4]]: where the widget holds a text, it takes text.
    return text if isinstance(current, str) and not isinstance(value, str) else value


def _find_node(workflow: Workflow, flag: str, title: str) -> str:
    if title in workflow:
        return title
    found = [node_id for node_id in workflow if title_of(workflow, node_id).lower() == title.lower()]
    if len(found) > 1:
        raise QueueError(f"{flag}: several nodes are called '{title}'; write the number of one: {', '.join(found)}")
    if not found:
        titles = dict.fromkeys(title_of(workflow, node_id) for node_id in workflow)
        raise QueueError(f"{flag}: there is no node '{title}'{_suggestion(title, titles, 'the workflow has')}")
    return found[0]


def _suggestion(name: str, known: Mapping[str, Any], there_is: str) -> str:
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean '{lower[near[0]]}'?" if near else f"; {there_is}: {', '.join(known)}"


# ---- the host


class StoppedWaiting(Exception):
    """Asked to stop while waiting."""


class RunningHost:
    """A ComfyUI that listens at ``url``."""

    def __init__(self, url: str = DEFAULT_HOST):
        url = url if "://" in url else f"http://{url}"
        try:
            parts = urllib.parse.urlsplit(url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # half a bracket, or a port that is no number
            known = False
        if not known:
            raise QueueError(f"host: {url!r} is no address; write it as {DEFAULT_HOST}")
        self.url = url.rstrip("/")
        # A proxy that the environment names can't reach this machine's own ports.
        handlers = [urllib.request.ProxyHandler({})] if parts.hostname in LOOPBACK else []
        self._opener = urllib.request.build_opener(*handlers)

    def ask(self, path: str, body: Any = None, timeout: float = 30) -> bytes:
        """The answer to a GET, or with a ``body`` to a POST of JSON. Raises urllib's errors."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        with self._opener.open(request, timeout=timeout) as answer:
            return answer.read()

    def ask_patiently(self, path: str) -> Any:
        """A GET of JSON that bears with a busy host. Raises HostLost when it stays silent."""
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while True:
            try:
                return json.loads(self.ask(path) or b"null")
            except (OSError, http.client.HTTPException, ValueError) as e:
                refused = isinstance(e, urllib.error.HTTPError) and e.code < 500  # above, a proxy may wait for the host
                if time.monotonic() > deadline or refused:
                    raise HostLost(f"{self.url} no longer answers ({e}); look at its log") from e
                time.sleep(POLL_SECONDS)

    def submit(self, workflow: Workflow, client_id: str) -> str:
        """Queue a workflow for a client of the host's WebSocket; returns its id.

        Raises QueueError, with every complaint, if any part of it is invalid.
        """
        try:
            # What cached nodes show gets into the history only for prompts of a client, even if it isn't listening.
            body = {"prompt": workflow, "client_id": client_id}
            answer = json.loads(self.ask("/prompt", body, timeout=SUBMIT_TIMEOUT))
        except urllib.error.HTTPError as e:
            answer = _json_of(e)
            raise QueueError(f"the host refuses the workflow:\n{_complaints(workflow, answer)}") from e
        except (OSError, http.client.HTTPException, ValueError) as e:
            with suppress(HostLost):  # a busy host may have queued it, although its answer comes too late
                if _timed_out(e) and (prompt_id := self.find_queued(client_id)):
                    return prompt_id
            raise HostLost(f"no ComfyUI answers at {self.url} ({getattr(e, 'reason', e)}); start it first") from e
        if answer.get("node_errors"):
            # The host would run the other branches; half a result is not what was asked for.
            with suppress(HostLost):
                self.cancel(answer["prompt_id"])
            raise QueueError(f"a part of the workflow is invalid:\n{_complaints(workflow, answer)}")
        return answer["prompt_id"]

    def find_queued(self, client_id: str, seconds: float = 0) -> str | None:
        """The id of what is queued or running for a client; looks for ``seconds`` where it isn't there yet.

        Raises HostLost.
        """
        deadline = time.monotonic() + seconds
        while True:
            queue = self.ask_patiently("/queue")
            for _, prompt_id, _, extra_data, *_ in queue["queue_running"] + queue["queue_pending"]:
                if extra_data.get("client_id") == client_id:
                    return prompt_id
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_SECONDS)

    def cancel(self, prompt_id: str) -> None:
        """Take a prompt out of the queue, or interrupt it if it is running; others are left alone.

        Says so again until the prompt has ended or ANSWER_TIMEOUT is over: one that just starts forgets what came
        before. Raises HostLost.
        """
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while True:
            try:
                self.ask("/queue", {"delete": [prompt_id]})
                # Hosts that don't know the field interrupt whatever runs, so look first.
                running = json.loads(self.ask("/queue"))["queue_running"]
                if all(item[1] != prompt_id for item in running):
                    return
                self.ask("/interrupt", {"prompt_id": prompt_id})
            except (OSError, http.client.HTTPException, ValueError) as e:
                raise HostLost(f"{self.url} no longer answers ({getattr(e, 'reason', e)})") from e
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)

    def wait(
        self,
        prompt_id: str,
        say: Callable[[str], None] = lambda text: None,
        stopped: Callable[[], bool] = lambda: False,
        at_work: Callable[[], tuple[str, str]] = lambda: ("running", "running"),
    ) -> dict[str, Any]:
        """Wait for a prompt's end; returns its entry in the history. ``say`` gets a line now and then.

        ``at_work``: the node at work, of which a change is told at once, and what to say of it.
        Raises HostLost, RunFailed if the host has dropped the prompt, StoppedWaiting once ``stopped`` says yes.
        """
        began, told, state = time.monotonic(), 0.0, ""
        path = f"/history/{urllib.parse.quote(prompt_id)}"
        while True:
            # In this order: the host moves a prompt from the queue to the history in one step.
            queue = self.ask_patiently("/queue")
            entry = self.ask_patiently(path).get(prompt_id)
            if entry is not None:
                return entry
            waiting = sorted(item[:2] for item in queue["queue_pending"])
            ahead = next((i for i, item in enumerate(waiting) if item[1] == prompt_id), None)
            if ahead is None and all(item[1] != prompt_id for item in queue["queue_running"]):
                raise RunFailed("the host no longer has this workflow: it was restarted, or its queue was cleared")
            before = state
            if ahead is None:
                state, words = at_work()
            else:
                state = words = f"waiting, {ahead + len(queue['queue_running'])} before it"
            now = time.monotonic()
            if state != before or now - told > REPORT_SECONDS:
                say(f"{words} ({now - began:.0f} s)")
                told = now
            if stopped():
                raise StoppedWaiting
            time.sleep(POLL_SECONDS)

    def fetch(self, file: Mapping[str, str]) -> bytes:
        """The content of a file that a node showed or saved. Raises HostLost, RunFailed if the host hasn't got it."""
        query = urllib.parse.urlencode({k: file.get(k, "") for k in ("filename", "subfolder", "type")})
        try:
            return self.ask(f"/view?{query}", timeout=300)
        except urllib.error.HTTPError as e:
            raise RunFailed(f"the host doesn't give out {file.get('filename')} ({e})") from e
        except (OSError, http.client.HTTPException) as e:
            raise HostLost(f"{self.url} no longer answers ({e}); look at its log") from e


def _timed_out(error: Exception) -> bool:
    return isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)


def _json_of(error: urllib.error.HTTPError) -> dict[str, Any]:
    try:
        answer = json.loads(error.read())
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"error": {"message": str(error)}}


def _complaints(workflow: Workflow, answer: Mapping[str, Any]) -> str:
    """What the host found wrong with a workflow, one line for each input."""
    lines = []
    for node_id, report in (answer.get("node_errors") or {}).items():
        for error in report["errors"]:
            name = (error.get("extra_info") or {}).get("input_name")
            where = f"'{title_of(workflow, str(node_id))}'" + (f", {name}" if name else "")
            details = str(error.get("details") or "")
            lines.append(f"{where}: {error['message']}" + (f" ({details})" if details and details != name else ""))
    if not lines:
        error = answer.get("error") or {}
        lines = [f"{error.get('message', error)} {error.get('details') or ''}".strip()]
    return "\n".join(lines)
