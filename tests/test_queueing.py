"""Queueing a workflow on a running host: inputs by title, complaints in words, results on disk; the host is faked."""

from __future__ import annotations

import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from far_train.cli import comfy_client, comfy_run
from far_train.cli.comfy_client import RunningHost, read_workflow, set_inputs
from far_train.cli.comfy_progress import Step, running_step
from far_train.cli.comfy_run import run_workflow, save
from far_train.cli.main import main
from far_train.utils.errors import Interrupted, QueueError


def node(kind: str, title: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


WORKFLOW = {
    "1": node("CheckpointLoaderSimple", "Stable Diffusion 2.1", ckpt_name="a.safetensors"),
    "2": node("FaR_Train", "Learn", steps=100, name="dogs", points="", model=["1", 0], fine=True),
    "3": node("SaveImage", "Pictures", images=["2", 0]),
    "4": node("SaveImage", "pictures", images=["2", 1]),
}


class FakeHost(ThreadingHTTPServer):
    """The host's routes that queueing uses; ``turns`` counts how often its queue is asked for before the end."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: tuple[int, dict] = (200, {"prompt_id": "p", "node_errors": {}})
        self.entry: dict = {"status": {"status_str": "success", "messages": []}, "outputs": {}}
        self.turns = 2
        self.running = True
        self.posts: list[tuple[str, dict]] = []
        self.viewed: list[str] = []
        self.frames: list[bytes] = []  # what a listener to the WebSocket is sent
        self.heard = b""  # what it sends

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHost

    def log_message(self, *_):
        pass

    def reply(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        host = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        host.posts.append((self.path, body))
        if self.path == "/prompt":
            self.reply(json.dumps(host.answer[1]).encode(), host.answer[0])
            return
        if self.path == "/interrupt" or body == {"delete": ["p"]} and not host.running:
            host.turns = 0
        self.reply(b"")

    def do_GET(self):
        host, path = self.server, urllib.parse.urlsplit(self.path)
        if path.path == "/queue":
            host.turns -= 1
            sent = next((body for path, body in host.posts if path == "/prompt"), {})
            mine = [[7, "p", {}, {"client_id": sent.get("client_id")}, []]] if host.turns >= 0 else []
            others = [[1, "x", {}, {}, []]]
            state = {"queue_running": mine if host.running else others, "queue_pending": [] if host.running else mine}
            self.reply(json.dumps(state).encode())
        elif path.path == "/history/p":
            self.reply(json.dumps({"p": host.entry} if host.turns < 0 and host.entry else {}).encode())
        elif path.path == "/view":
            query = dict(urllib.parse.parse_qsl(path.query))
            host.viewed.append(query["filename"])
            self.reply(f"content of {query['filename']}".encode())
        elif path.path == "/ws" and host.frames:
            assert dict(urllib.parse.parse_qsl(path.query)).keys() == {"clientId"}
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n" + b"".join(host.frames))
            while heard := self.rfile.read1(64):
                host.heard += heard
        else:
            self.reply(b"", 404)


@pytest.fixture
def fake(monkeypatch) -> Iterator[FakeHost]:
    monkeypatch.setattr(comfy_client, "POLL_SECONDS", 0.01)
    host = FakeHost()
    threading.Thread(target=host.serve_forever, daemon=True).start()
    yield host
    host.shutdown()
    host.server_close()


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(WORKFLOW), encoding="utf-8")
    return path


# ---- inputs


@pytest.mark.parametrize(
    ("assignment", "where", "value"),
    [
        ("Learn.steps=5", ("2", "steps"), 5),
        ("learn . steps = 7", ("2", "steps"), 7),
        ("2.fine=false", ("2", "fine"), False),
        ("Learn.name=2024", ("2", "name"), "2024"),
        ('Learn.name="two dogs"', ("2", "name"), "two dogs"),
        ("Learn.name=a=b", ("2", "name"), "a=b"),
        ("Learn.points=[[1, 2]]", ("2", "points"), "[[1, 2]]"),
        ("Stable Diffusion 2.1.ckpt_name=b.safetensors", ("1", "ckpt_name"), "b.safetensors"),
        ('Learn.model=["3", 0]', ("2", "model"), ["3", 0]),
    ],
)
def test_inputs_are_set_by_title(assignment, where, value):
    changed = set_inputs(WORKFLOW, [assignment])
    assert changed[where[0]]["inputs"][where[1]] == value
    changed[where[0]]["inputs"][where[1]] = WORKFLOW[where[0]]["inputs"][where[1]]
    assert changed == WORKFLOW


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("steps=5", ["TITLE.input=value"]),
        ("Learn.steps", ["TITLE.input=value"]),
        ("Lern.steps=5", ["no node 'Lern'", "did you mean 'Learn'?"]),
        ("zzz.steps=5", ["the workflow has: Stable Diffusion 2.1, Learn"]),
        ("Learn.stepps=5", ["'Learn' has no input 'stepps'", "did you mean 'steps'?"]),
        ("Learn.zzz=5", ["it has: steps, name"]),
        ("Pictures.images=5", ["several nodes", "3, 4"]),
        ("Learn.model=5", ["linked to 'Stable Diffusion 2.1'"]),
    ],
)
def test_wrong_assignments_are_explained(assignment, words):
    with pytest.raises(QueueError) as refused:
        set_inputs(WORKFLOW, [assignment])
    assert all(w in str(refused.value) for w in words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "can't be read"),
        ("[]", "no workflow"),
        ("{}", "no workflow"),
        ('{"1": {"class_type": "A"}}', "no workflow"),
        ('{"nodes": [], "links": []}', "workflows/api"),
    ],
)
def test_other_files_are_refused(tmp_path, content, words):
    path = tmp_path / "w.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(QueueError, match=words):
        read_workflow(path)


# ---- runs


def test_results_are_fetched(fake, tmp_path):
    fake.entry["outputs"] = {
        "3": {"images": [{"filename": "dogs_1.png", "subfolder": "a", "type": "output"}], "animated": [False]},
        "2": {
            "images": [{"filename": "tmp_xyz.png", "subfolder": "", "type": "temp"}],
            "text": ["trained"],
        },
    }
    told = []
    files = run_workflow(WORKFLOW, RunningHost(fake.url), tmp_path / "out", told.append)
    assert [f.name for f in files] == ["dogs_1.png"] and fake.viewed == ["dogs_1.png"]
    assert (tmp_path / "out" / "dogs_1.png").read_text() == "content of dogs_1.png"
    assert any("running" in t for t in told) and "Learn: trained" in told
    path, body = fake.posts[0]
    assert path == "/prompt" and body["prompt"] == WORKFLOW and body["client_id"]


def test_previews_are_fetched_where_they_are_wanted(fake, tmp_path):
    workflow = {"1": node("PreviewImage", "Loss curve: with/without"), "2": node("PreviewImage", "···")}
    shown = [{"filename": f"tmp_{i}.png", "subfolder": "", "type": "temp"} for i in range(3)]
    fake.entry["outputs"] = {"1": {"images": shown[:2]}, "2": {"images": shown[2:]}}
    told = []
    assert run_workflow(workflow, RunningHost(fake.url), tmp_path, told.append) == [] and fake.viewed == []
    assert told[-1] == "nothing was saved, and 3 temporary previews were left on the host; --previews fetches them"
    fake.turns = 2
    files = run_workflow(workflow, RunningHost(fake.url), tmp_path, previews=True)
    names = ["Loss curve with without.png", "Loss curve with without-2.png", "preview.png"]  # named by their node
    assert [f.name for f in files] == names
    assert [f.read_text() for f in files] == [f"content of tmp_{i}.png" for i in range(3)]


# ---- progress


def frame(payload: bytes | dict, opcode: int = 1, final: bool = True) -> bytes:
    """One frame of a server: lengths beyond 125 have two bytes of their own."""
    payload = json.dumps(payload).encode() if isinstance(payload, dict) else payload
    size = bytes([len(payload)]) if len(payload) < 126 else b"\x7e" + len(payload).to_bytes(2, "big")
    return bytes([0x80 * final | opcode]) + size + payload


def state(value: float, total: float = 300.0, running: str = "running", **more: str) -> dict:
    return {"value": value, "max": total, "state": running, "prompt_id": "p", **more}


def progress(**nodes: dict) -> dict:
    return {"type": "progress_state", "data": {"prompt_id": "p", "nodes": nodes}}


@pytest.mark.parametrize(
    ("nodes", "step"),
    [
        ({}, None),
        ({"1": state(1, 1, "finished")}, None),
        ({"1": state(1, 1, "finished"), "2": state(12.0)}, Step("2", 12, 300)),
        ({"2": state(12.0), "3": state(0, 1)}, Step("3", 0, 1)),
        ({"2.0.0.7": state(5, 9, display_node_id="2")}, Step("2", 5, 9)),
    ],
)
def test_the_node_that_began_last_is_at_work(nodes, step):
    assert running_step(nodes) == step


def test_a_step_in_words():
    assert Step("2", 12, 300).words("Learn") == "Learn: 12 of 300"
    assert Step("2", 0, 1).words("Learn") == "Learn"  # it doesn't count


def test_node_and_step_are_told_while_it_runs(fake):
    """The host's frames come in pieces, with pictures and pings between them."""
    text = json.dumps(progress(**{"1": state(1, 1, "finished"), "2": state(12.0)})).encode()
    assert len(text) > 125
    fake.frames = [
        frame({"type": "status", "data": {}}),
        frame(b"\0\0\0\1 a picture", opcode=2),
        frame(text[:40], final=False),
        frame(b"ping", opcode=9),
        frame(text[40:], opcode=0),
    ]
    fake.turns = 1000  # ends when the step is told
    told: list[str] = []

    def say(line: str) -> None:
        told.append(line)
        if line.startswith("Learn"):
            fake.turns = 1

    run_workflow(WORKFLOW, RunningHost(fake.url), None, say)
    assert fake.turns < 1 and [line.split(" (")[0] for line in told if line.startswith("Learn")] == ["Learn: 12 of 300"]
    assert fake.heard == bytes([0x8A, 0x84]) + bytes(4) + b"ping"  # a pong, masked with zeros


@pytest.mark.parametrize("frames", [[b"\x81\x02[]"], [b"\x81\x01{"], [b"\x88\x00"], [frame(progress(x={}))]])
def test_a_run_goes_on_without_progress(fake, frames):
    """Messages that can't be understood, and a connection that is closed, end no run."""
    fake.frames = frames
    told: list[str] = []
    run_workflow(WORKFLOW, RunningHost(fake.url), None, told.append)
    assert any(line.startswith("running") for line in told)


# ---- files


def test_a_file_of_the_same_name_is_kept(tmp_path):
    assert save(b"1", tmp_path, "a.png") == save(b"1", tmp_path, "../x/a.png") == tmp_path / "a.png"
    assert save(b"2", tmp_path, "..\\a.png") == tmp_path / "a-2.png"
    assert (tmp_path / "a.png").read_bytes() == b"1"


COMPLAINT = {
    "2": {
        "class_type": "FaR_Train",
        "errors": [
            {
                "type": "value_smaller_than_min",
                "message": "Value is smaller than min",
                "details": "steps: -1",
                "extra_info": {"input_name": "steps"},
            }
        ],
    }
}


def test_a_refused_workflow_is_explained(fake):
    fake.answer = (400, {"error": {"message": "outputs failed"}, "node_errors": COMPLAINT})
    with pytest.raises(QueueError, match=r"'Learn', steps: Value is smaller than min \(steps: -1\)"):
        run_workflow(WORKFLOW, RunningHost(fake.url))
    fake.answer = (400, {"error": {"message": "Prompt has no outputs", "details": ""}, "node_errors": {}})
    with pytest.raises(QueueError, match="Prompt has no outputs"):
        run_workflow(WORKFLOW, RunningHost(fake.url))


def test_a_workflow_that_is_valid_in_part_is_taken_back(fake):
    fake.answer = (200, {"prompt_id": "p", "node_errors": COMPLAINT})
    with pytest.raises(QueueError, match="a part of the workflow is invalid:\n'Learn', steps"):
        run_workflow(WORKFLOW, RunningHost(fake.url))
    assert ("/queue", {"delete": ["p"]}) in fake.posts and ("/interrupt", {"prompt_id": "p"}) in fake.posts


def test_a_failing_node_is_named(fake):
    message = {"node_id": "2", "node_type": "FaR_Train", "exception_message": "too few photos\n"}
    fake.entry["status"] = {"status_str": "error", "messages": [["execution_error", message]]}
    with pytest.raises(QueueError, match="'Learn' failed: too few photos$"):
        run_workflow(WORKFLOW, RunningHost(fake.url))
    fake.entry["status"]["messages"] = [["execution_interrupted", {"node_id": "2"}]]
    with pytest.raises(Interrupted, match="'Learn'"):
        run_workflow(WORKFLOW, RunningHost(fake.url))


def test_a_vanished_workflow_ends_the_wait(fake):
    fake.entry = {}
    with pytest.raises(QueueError, match="no longer has this workflow"):
        run_workflow(WORKFLOW, RunningHost(fake.url))


@pytest.mark.parametrize("running", [True, False])
def test_ctrl_c_stops_it_on_the_host(fake, monkeypatch, running):
    fake.turns, fake.running, fake.entry = 10_000, running, fake.entry if running else {}
    presses = iter([KeyboardInterrupt])

    def say(text: str) -> None:
        if text.startswith(("running", "waiting")) and (press := next(presses, None)):
            raise press

    with pytest.raises(Interrupted):
        run_workflow(WORKFLOW, RunningHost(fake.url), None, say)
    assert ("/queue", {"delete": ["p"]}) in fake.posts
    assert (("/interrupt", {"prompt_id": "p"}) in fake.posts) == running  # others' runs are left alone


@pytest.mark.parametrize("arrived", [True, False])
def test_ctrl_c_before_the_host_has_answered(fake, monkeypatch, arrived):
    monkeypatch.setattr(comfy_run, "LATE_SECONDS", 0.05)
    fake.turns = 10_000 if arrived else 0

    class Slow(RunningHost):
        def ask(self, path: str, *arguments, **options) -> bytes:
            answer = super().ask(path, *arguments, **options)
            if path != "/prompt":
                return answer
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="was asked to stop" if arrived else "before the host had queued .* delete"):
        run_workflow(WORKFLOW, Slow(fake.url))
    assert (("/interrupt", {"prompt_id": "p"}) in fake.posts) == arrived


def test_ctrl_c_where_the_host_is_gone(fake):
    def say(text: str) -> None:
        if text.startswith("running"):
            fake.shutdown()
            fake.server_close()
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="no longer answers .*may still run there"):
        run_workflow(WORKFLOW, RunningHost(fake.url), None, say)


def test_no_host(tmp_path):
    with pytest.raises(QueueError, match="no ComfyUI answers at http://127.0.0.1:9 "):
        run_workflow(WORKFLOW, RunningHost("127.0.0.1:9"))
    for wrong in ("ftp://x", "http://[::1", "127.0.0.1:many"):
        with pytest.raises(QueueError, match="is no address"):
            RunningHost(wrong)


def test_the_command(fake, file, tmp_path, capsys):
    fake.entry["outputs"] = {"3": {"images": [{"filename": "a.png", "subfolder": "", "type": "output"}]}}
    argv = ["queue", str(file), "--host", fake.url, "--set", "Learn.steps=5", "--set", "1.ckpt_name=b"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    sent = fake.posts[0][1]["prompt"]
    assert sent["2"]["inputs"]["steps"] == 5 and sent["1"]["inputs"]["ckpt_name"] == "b"
    assert (tmp_path / "out" / "a.png").exists() and "1 file →" in capsys.readouterr().out
    assert main(["queue", "--workflow", str(file), "--host", fake.url, "--set", "Learn.stps=5"]) == 2
    assert "did you mean 'steps'?" in capsys.readouterr().err
    fake.turns = 2
    fake.entry["status"] = {"status_str": "error", "messages": [["execution_interrupted", {"node_id": "2"}]]}
    assert main(["queue", str(file), "--host", fake.url]) == 130
