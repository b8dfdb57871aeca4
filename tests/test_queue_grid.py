"""Grids of runs: every combination once, shared among hosts, gone on with, told in words; the hosts are faked."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from far_train.cli import comfy_client, comfy_grid
from far_train.cli.comfy_client import RunningHost
from far_train.cli.comfy_grid import GridRunner, collect, finished, plan, read_axis
from far_train.cli.main import main
from far_train.utils.errors import Interrupted, QueueError, RunFailed

from .command_line import refused


def node(kind: str, title: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}


WORKFLOW = {
    "1": node("CLIPTextEncode", "Prompt", text="a dog"),
    "2": node("KSampler", "Draw", seed=1, cfg=5.0, tiled=False, positive=["1", 0]),
    "3": node("SaveImage", "Pictures", images=["2", 0], seed="none"),
}


class Farm(ThreadingHTTPServer):
    """A host that ends each run after two looks at its queue. A picture's red is its seed, its green its cfg."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.prompts: list[dict] = []
        self.cancelled: list[str] = []
        self.fails: Callable[[dict], bool] = lambda prompt: False
        self.refuses = self.dies = self.hangs = False
        self.deleted: set[str] = set()  # pictures that are gone
        self.dropped: set[int] = set()  # prompts that were cleared from the queue
        self.answers_after = 0.0  # seconds until it says that a prompt is queued
        self.clients: list[str] = []
        self.looks = 0
        self.saves = True
        self.cached: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def seeds(self) -> list[int]:
        return [prompt["2"]["inputs"]["seed"] for prompt in self.prompts]


class Handler(BaseHTTPRequestHandler):
    server: Farm

    def log_message(self, *_):
        pass

    def reply(self, answer: object, status: int = 200) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        farm = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/prompt" and farm.refuses:
            error = {"message": "Value not in list", "details": "cfg: 99", "extra_info": {"input_name": "cfg"}}
            self.reply({"error": {}, "node_errors": {"2": {"errors": [error]}}}, 400)
        elif self.path == "/prompt":
            farm.prompts.append(body["prompt"])
            farm.clients.append(body["client_id"])
            farm.looks = 2
            time.sleep(farm.answers_after)
            self.reply({"prompt_id": f"p{len(farm.prompts) - 1}", "node_errors": {}})
        else:
            farm.cancelled += body.get("delete", [])
            farm.hangs = False
            self.reply({})

    def do_GET(self):
        farm, address = self.server, urllib.parse.urlsplit(self.path)
        number = len(farm.prompts) - 1
        if farm.dies and number >= 0:
            self.close_connection = True
        elif address.path == "/queue":
            farm.looks = 0 if number in farm.dropped else farm.looks - (not farm.hangs)
            running = [[0, f"p{number}", {}, {"client_id": farm.clients[-1]}, []]] if farm.looks > 0 else []
            self.reply({"queue_running": running, "queue_pending": []})
        elif address.path.startswith("/history/"):
            ended = farm.looks <= 0 and number not in farm.dropped
            self.reply({f"p{number}": self.entry(number)} if ended else {})
        else:
            query = dict(urllib.parse.parse_qsl(address.query))
            if query["filename"] in farm.deleted:
                return self.reply({}, 404)
            inputs = farm.prompts[int(query["filename"][1:].split(".")[0])]["2"]["inputs"]
            png = io.BytesIO()
            Image.new("RGB", (32, 32), (20 * inputs["seed"], int(10 * inputs["cfg"]), 0)).save(png, "PNG")
            self.reply(png.getvalue())

    def entry(self, number: int) -> dict:
        if self.server.fails(self.server.prompts[number]):
            message = {"node_id": "2", "exception_message": "out of memory"}
            return {"status": {"status_str": "error", "messages": [["execution_error", message]]}, "outputs": {}}
        image = {"filename": f"p{number}.png", "subfolder": "", "type": "output" if self.server.saves else "temp"}
        messages = [["execution_cached", {"nodes": self.server.cached}]]
        outputs = {"1": {"text": ["encoded"]}, "2": {"text": ["drawn"]}, "3": {"images": [image]}}
        return {"status": {"status_str": "success", "messages": messages}, "outputs": outputs}


@pytest.fixture
def farms(monkeypatch) -> Iterator[Callable[[], Farm]]:
    monkeypatch.setattr(comfy_client, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(comfy_client, "ANSWER_TIMEOUT", 0.05)
    made: list[Farm] = []

    def make() -> Farm:
        made.append(Farm())
        threading.Thread(target=made[-1].serve_forever, daemon=True).start()
        return made[-1]

    yield make
    for farm in made:
        farm.shutdown()
        farm.server_close()


@pytest.fixture
def farm(farms) -> Farm:
    return farms()


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(WORKFLOW), encoding="utf-8")
    return path


def grid(*assignments: str) -> list[comfy_grid.Run]:
    return plan(WORKFLOW, [read_axis(WORKFLOW, text) for text in assignments])


def run_grid(runs, farms, out: Path) -> list[str]:
    told: list[str] = []
    GridRunner(runs, [RunningHost(f.url) for f in farms], out, told.append).run()
    return told


# ---- axes


@pytest.mark.parametrize(
    ("assignment", "values"),
    [
        ("Draw.seed=1,2,3", (1, 2, 3)),
        ("Draw.seed=[1, 2]", (1, 2)),
        ("Draw.seed=3..5", (3, 4, 5)),
        ("draw . seed = -1 .. 1", (-1, 0, 1)),
        ("Draw.seed=7", (7,)),
        ("Draw.tiled=true,false", (True, False)),
        ("Prompt.text=a dog,two cats", ("a dog", "two cats")),
        ('Prompt.text=["a dog, on the moon", "a cat"]', ("a dog, on the moon", "a cat")),
        ("Pictures.seed=1..3", ("1..3",)),
        ("Pictures.seed=[1, 2]", ("1", "2")),
        ("Pictures.seed=1,2", ("1", "2")),
        ('Draw.positive=[["1", 0], ["4", 0]]', (["1", 0], ["4", 0])),
    ],
)
def test_values_are_read(assignment, values):
    axis = read_axis(WORKFLOW, assignment)
    assert axis.values == values
    assert [type(v) for v in axis.values] == [type(v) for v in values]


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("seed=1,2", ["grid: 'seed=1,2' can't be understood"]),
        ("Drow.seed=1", ["grid: there is no node 'Drow'", "did you mean 'Draw'?"]),
        ("Draw.sead=1", ["grid: 'Draw' has no input 'sead'", "did you mean 'seed'?"]),
        ("Draw.positive=1,2", ["grid: 'Draw.positive' is linked to 'Prompt'"]),
        ("Draw.seed=", ["has no values"]),
        ("Draw.seed=[]", ["has no values"]),
        ("Draw.seed=5..4", ["has no values"]),
        ("Draw.seed=0..99999999999999", ["too many", "split the grid"]),
        ("Draw.seed=0..18446744073709551615", ["too many", "split the grid"]),
    ],
)
def test_wrong_axes_are_explained(assignment, words):
    with pytest.raises(QueueError) as wrong:
        read_axis(WORKFLOW, assignment)
    assert all(w in str(wrong.value) for w in words)


def test_every_combination_once_and_the_last_axis_fastest():
    runs = grid("Draw.seed=1,2", "Draw.cfg=[5.0, 6.5, 5.0]")
    assert [(r.values["Draw.seed"], r.values["Draw.cfg"]) for r in runs] == [(1, 5.0), (1, 6.5), (2, 5.0), (2, 6.5)]
    assert runs[1].workflow["2"]["inputs"] == {"seed": 1, "cfg": 6.5, "tiled": False, "positive": ["1", 0]}
    assert WORKFLOW["2"]["inputs"]["cfg"] == 5.0
    assert runs[1].label == "seed=1, cfg=6.5" and runs[1].folder(Path()).name.startswith("seed=1, cfg=6.5-")
    assert len({r.digest for r in runs}) == 4
    with pytest.raises(QueueError, match=r"grid: 'Draw.seed' is given twice"):
        grid("Draw.seed=1,2", "2.seed=3")
    with pytest.raises(QueueError, match="all combinations: 1000000 runs are too many"):
        grid("Draw.seed=1..1000", "Draw.cfg=1..1000")


def test_axes_of_one_name_are_told_apart_and_long_values_cut():
    (run,) = grid("Draw.seed=1", "Pictures.seed=x")
    assert run.label == "Draw.seed=1, Pictures.seed=x"
    (run,) = grid(f'Prompt.text=["{"/a?" * 200}"]')
    name = run.folder(Path()).name
    assert len(run.label) < 80 and len(name) < 80 and not set("/?") & set(name)


# ---- runs


def test_a_grid_leaves_pictures_a_table_and_a_sheet(farm, tmp_path):
    runs = grid("Draw.seed=1,2", "Draw.cfg=5,6")
    told = run_grid(runs, [farm], tmp_path)
    assert farm.seeds == [1, 1, 2, 2]
    assert sum(line.startswith("done: ") for line in told) == 4
    assert any(line.endswith(" left") and "; 1 of 4" in line for line in told) and told[-1].endswith("; 4 of 4")
    table, sheet = collect(runs, tmp_path, columns=2)
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert [(r["Draw.seed"], r["Draw.cfg"], r["state"]) for r in rows] == [(s, c, "done") for s in "12" for c in "56"]
    for i, (run, row) in enumerate(zip(runs, rows)):
        assert (tmp_path / row["folder"] / row["files"]).is_file() and row["host"] == farm.url
        cell = comfy_grid.CELL
        text_height = (Image.open(sheet).height - 8) // 2 - cell - 8
        x, y = 8 + i % 2 * (cell + 8) + cell // 2, 8 + i // 2 * (cell + text_height + 8) + cell // 2
        red, green, _ = Image.open(sheet).getpixel((x, y))
        assert (round(red / 20), round(green / 10)) == (run.values["Draw.seed"], run.values["Draw.cfg"])


def test_a_long_column_becomes_several_sheets(tmp_path):
    """A JPEG of all 230 would be too high."""
    runs = grid("Draw.seed=1..230")
    about = {"saved": [], "shown": [], "seconds": 1.0, "host": "h"}
    for run in (runs[0], runs[229]):
        folder = run.folder(tmp_path)
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(about))
    sheets = collect(runs, tmp_path, 1)[1:]
    assert [path.name for path in sheets] == ["contact-sheet.jpg", "contact-sheet-2.jpg"]
    heights = [Image.open(path).height for path in sheets]
    assert heights[0] < 65_500 and heights[1] / heights[0] == pytest.approx(30 / 200, rel=0.01)


def test_a_half_done_grid_goes_on(farm, tmp_path):
    run_grid(grid("Draw.seed=1..2"), [farm], tmp_path)
    runs = grid("Draw.seed=0..3")
    (runs[2].folder(tmp_path) / "p1.png").unlink()  # a picture is gone: its run counts no more
    told = run_grid(runs, [farm], tmp_path)
    assert farm.seeds == [1, 2, 0, 2, 3] and told[0].startswith("1 of 4 runs are in")
    assert all(finished(run, tmp_path) for run in runs)
    assert run_grid(runs, [farm], tmp_path)[0].startswith("4 of 4") and len(farm.prompts) == 5


def test_what_cached_nodes_say_is_told_once(farm, tmp_path):
    farm.cached = ["1"]  # from a run before the grid
    told = run_grid(grid("Draw.seed=1..3"), [farm], tmp_path)
    assert [line for line in told if "encoded" in line] == ["seed=1: Prompt: encoded"]
    assert [line for line in told if "drawn" in line] == [f"seed={seed}: Draw: drawn" for seed in (1, 2, 3)]
    texts = [json.loads(path.read_text(encoding="utf-8"))["texts"] for path in tmp_path.glob("*/run.json")]
    assert texts == [[["Prompt", "encoded"], ["Draw", "drawn"]]] * 3


def test_previews_of_a_finished_grid_can_be_fetched_later(farm, file, tmp_path, capsys):
    farm.saves = False
    argv = ["queue", str(file), "--host", farm.url, "--grid", "Draw.seed=1,2", "--out", str(tmp_path / "out")]
    assert main(argv) == 0 and "--previews fetches them" in capsys.readouterr().out
    assert not list(tmp_path.glob("out/*/*.png"))
    assert main(argv) == 0 and len(farm.prompts) == 2
    assert main([*argv, "--previews"]) == 0 and len(farm.prompts) == 4
    assert {path.name for path in tmp_path.glob("out/*/*.png")} == {"Pictures.png"}
    for more in ([], ["--previews"]):
        assert main([*argv, *more]) == 0 and len(farm.prompts) == 4  # now they are there


def test_a_failing_run_does_not_stop_the_others(farm, file, tmp_path, capsys):
    farm.fails = lambda prompt: prompt["2"]["inputs"]["seed"] == 2
    out = tmp_path / "out"
    argv = ["queue", str(file), "--host", farm.url, "--grid", "Draw.seed=1..3", "--out", str(out)]
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert (
        "1 of 3 runs failed (the same command tries them again):\nseed=2: 'Draw' failed: out of memory" in captured.err
    )
    assert "2 of 3 runs → " in captured.out and (out / "contact-sheet.jpg").is_file()
    farm.fails = lambda prompt: False
    assert main(argv) == 0 and farm.seeds == [1, 2, 3, 2]


def test_a_refused_workflow_ends_the_grid(farm, tmp_path):
    farm.refuses = True
    with pytest.raises(QueueError, match=r"'Draw', cfg: Value not in list \(cfg: 99\)"):
        run_grid(grid("Draw.seed=1..3"), [farm], tmp_path)
    assert not list(tmp_path.glob("*/run.json"))


def test_hosts_share_the_runs_and_one_may_die(farms, tmp_path):
    first, second = farms(), farms()
    runs = grid("Draw.seed=1..6")
    run_grid(runs, [first, second], tmp_path)
    assert first.prompts and second.prompts and sorted(first.seeds + second.seeds) == [1, 2, 3, 4, 5, 6]
    second.dies = True
    runs = grid("Draw.seed=7..10")
    told = run_grid(runs, [first, second], tmp_path)
    assert any("waits for another host" in line for line in told)
    assert all(finished(run, tmp_path) for run in runs)
    first.dies = True
    with pytest.raises(QueueError, match="no host is left"):
        run_grid(grid("Draw.seed=11..12"), [first, second], tmp_path)


def test_a_lost_picture_or_a_cleared_queue_fails_its_run_alone(farm, tmp_path):
    farm.deleted, farm.dropped = {"p0.png"}, {1}
    runs = grid("Draw.seed=1..3")
    with pytest.raises(RunFailed) as failed:
        run_grid(runs, [farm], tmp_path)
    assert "2 of 3 runs failed" in str(failed.value) and "seed=1: the host doesn't give out p0.png" in str(failed.value)
    assert "seed=2: the host no longer has this workflow" in str(failed.value)
    assert [bool(finished(run, tmp_path)) for run in runs] == [False, False, True]


def test_a_workflow_whose_answer_comes_too_late_is_not_queued_again(farm, monkeypatch, tmp_path):
    monkeypatch.setattr(comfy_client, "SUBMIT_TIMEOUT", 0.5)
    farm.answers_after, farm.hangs = 1.0, True
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        farm.hangs = False

    (run,) = grid("Draw.seed=4")
    GridRunner([run], [RunningHost(farm.url)], tmp_path, say).run()
    assert farm.seeds == [4] and finished(run, tmp_path) and told[-1].startswith("done: ")


def test_ctrl_c_stops_the_run_on_the_host_and_keeps_what_is_done(farm, monkeypatch, tmp_path):
    runs = grid("Draw.seed=1..3")
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        farm.hangs = text.startswith("done: ") or farm.hangs  # the second run doesn't end by itself

    runner = GridRunner(runs, [RunningHost(farm.url)], tmp_path, say)
    join, presses = runner._join, iter([KeyboardInterrupt])

    def interrupted(workers) -> None:
        if next(presses, None):
            while len(farm.prompts) < 2:
                workers[0].join(0.01)
            raise KeyboardInterrupt
        join(workers)

    monkeypatch.setattr(runner, "_join", interrupted)
    with pytest.raises(Interrupted, match="stopped after 1 of 3 runs; the same command goes on"):
        runner.run()
    assert set(farm.cancelled) == {"p1"} and [bool(finished(run, tmp_path)) for run in runs] == [True, False, False]


# ---- the command


def test_a_dry_run_queues_nothing(farm, file, tmp_path, capsys):
    argv = ["queue", str(file), "--host", farm.url, "--grid", "Draw.seed=1..2", "--out", str(tmp_path / "out")]
    assert main([*argv, "--dry-run"]) == 0
    assert capsys.readouterr().out == "to do: seed=1\nto do: seed=2\n2 runs; nothing was queued\n"
    assert main(argv) == 0
    capsys.readouterr()
    assert main([*argv, "--dry-run", "--grid", "Draw.cfg=5.0,7"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["done: seed=1, cfg=5.0", "to do: seed=1, cfg=7"]
    assert len(farm.prompts) == 2
    refused(capsys, ["queue", file, "--dry-run", "--set", "Draw.sed=1"], "did you mean 'seed'?")


def test_what_does_not_fit_together(file, capsys):
    refused(capsys, ["queue", file, "--grid", "Draw.seed=1,2"], "out: a --grid needs a folder")
    refused(capsys, ["queue", file, "--host", "a", "--host", "b"], "host: several hosts share the runs of a --grid")
