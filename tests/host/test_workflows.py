"""The workflow templates in the real host: they match its nodes, validate, and run to the end on photos of two dogs."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from far_train.cli.comfy_client import RunningHost, set_inputs
from far_train.cli.comfy_run import run_workflow
from far_train.data.sam import build_sam

from ..tiny_sam import TINY, save_tiny
from .comfy_server import ComfyServer
from .find_host import REPO, Host, script
from .graphs import tiny_base

WORKFLOWS = {path.stem[0]: path for path in sorted((REPO / "workflows").glob("*.json"))}
SMALL, PREPARE, TRAIN, DRAW, ONE, THREE, COMPARE, TRAIN_SDXL, DRAW_SDXL, PREPARE_SAM3 = WORKFLOWS.values()
PHOTOS = REPO.parent / "shared" / "data" / "two_dogs"
SIZE = 128

api_twins = script("api_twins")


def twin(path: Path) -> dict:
    return json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8"))


def with_tiny_base(workflow: dict) -> dict:
    """The workflow with the tiny base in the place of the checkpoint, which the host couldn't recognise."""
    workflow = copy.deepcopy(workflow)
    for node in workflow.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            node.update(tiny_base(family="sdxl" if "xl" in node["inputs"]["ckpt_name"] else "sd21"))
    return workflow


def by_title(workflow: dict, title: str) -> str:
    (found,) = (node_id for node_id, node in workflow.items() if node["_meta"]["title"] == title)
    return found


def need_nodes(comfy: ComfyServer, path: Path) -> None:
    """Skip where the host is older than a template's nodes."""
    missing = {node["class_type"] for node in twin(path).values()} - comfy.object_info().keys()
    assert missing <= {"SAM3_Detect"}
    if missing:
        pytest.skip(f"this ComfyUI has no {', '.join(missing)}")


# ---- the files


@pytest.mark.parametrize("path", WORKFLOWS.values(), ids=lambda p: p.stem)
def test_twins_are_up_to_date(comfy: ComfyServer, path: Path):
    """A twin that can be made has known node types and as many widgets as their schemas (see scripts/api_twins.py)."""
    need_nodes(comfy, path)
    made = api_twins.twin_text(path, comfy.object_info())
    assert json.loads(made) == twin(path), "run scripts/api_twins.py"


@pytest.mark.parametrize("path", WORKFLOWS.values(), ids=lambda p: p.stem)
def test_sockets_are_the_schemas(comfy: ComfyServer, path: Path):
    need_nodes(comfy, path)
    schemas = comfy.object_info()
    graph = json.loads(path.read_text(encoding="utf-8"))
    for node in (node for part in api_twins.parts(graph) for node in part["nodes"]):
        if api_twins.is_virtual(node, graph):
            continue
        schema = schemas[node["type"]]
        declared, widgets = api_twins.inputs_of(schema), api_twins.widget_names(schema)
        expected = {name: None if name in widgets else kind for name, (kind, _) in declared.items()}
        assert {i["name"]: None if "widget" in i else i["type"] for i in node["inputs"]} == expected, node["title"]
        outputs = list(zip(schema["output_name"], schema["output"]))
        if not node["type"].startswith("FaR_"):
            outputs = outputs[: len(node["outputs"])]  # a newer host's own nodes may have got some
        assert [(o["name"], o["type"]) for o in node["outputs"]] == outputs


def test_the_template_browser_lists_them(comfy: ComfyServer):
    assert set(comfy.get("/workflow_templates")["ComfyUI-FaR"]) == {path.stem for path in WORKFLOWS.values()}


def test_a_bad_graph_is_refused_in_words(comfy: ComfyServer):
    graph = json.loads(TRAIN.read_text(encoding="utf-8"))
    schemas = comfy.object_info()
    graph["nodes"][-1]["widgets_values"] = [1, 2, 3]
    with pytest.raises(api_twins.TwinError, match="Sample pictures.*3 widget values"):
        api_twins.to_api(graph, schemas)
    graph["nodes"][-1]["type"] = "NoSuchNode"
    with pytest.raises(api_twins.TwinError, match="no node type NoSuchNode"):
        api_twins.to_api(graph, schemas)


@pytest.mark.parametrize("path", WORKFLOWS.values(), ids=lambda p: p.stem)
def test_fitting_changes_only_what_differs(comfy: ComfyServer, template_files, path: Path):
    """As if a node had got an input and lost another one since the template was made."""
    need_nodes(comfy, path)
    schemas, graph = comfy.object_info(), json.loads(path.read_text(encoding="utf-8"))
    older = copy.deepcopy(graph)
    for part in api_twins.parts(older):
        for node in part["nodes"]:
            if node["type"] == "KSampler":
                (place,) = (i for i, entry in enumerate(node["inputs"]) if entry["name"] == "sampler_name")
                node["inputs"][place] |= {"name": "gone", "widget": {"name": "gone"}}
                node["inputs"].insert(0, {"name": "old", "type": "MASK", "link": None})
                node["widgets_values"][4] = "a value of an input that is gone"
                for link in part["links"]:
                    if isinstance(link, dict):
                        link["target_slot"] += link["target_id"] == node["id"]
                    else:
                        link[4] += link[3] == node["id"]
    api_twins.fit(older, schemas)
    for fitted_part, part in zip(api_twins.parts(older), api_twins.parts(graph)):
        for fitted, node in zip(fitted_part["nodes"], part["nodes"]):
            if not node["type"].startswith("FaR_"):
                del fitted["outputs"][len(node["outputs"]) :]  # what a newer host's own nodes have got
            if node["type"] == "KSampler":
                node["widgets_values"][4] = "euler"  # the host's default
    assert older == graph


# ---- validation: files of the right names are enough


@pytest.mark.parametrize("path", WORKFLOWS.values(), ids=lambda p: p.stem)
def test_templates_validate(comfy: ComfyServer, template_files, path: Path):
    need_nodes(comfy, path)
    prompt_id = comfy.queue(twin(path))  # raises if any node did not validate
    RunningHost(comfy.url).cancel(prompt_id)  # it may have begun, to fail on the empty files
    assert not any(comfy.get("/queue").values())


# ---- the whole line on what the pack brings


def test_the_small_one_runs_to_the_end_as_it_is(comfy: ComfyServer, tmp_path):
    """No node is replaced and no file is needed; only counts and steps are lowered."""
    changes = (
        "Photos of Rex.count=2",
        "Photos of Max.count=2",
        "Regularization images.count=2",
        "Regularization images.steps=2",
        "Empty places.scenes=an empty beach | on the beach",
        "Empty places.steps=2",
        "Training pictures.count=4",
        "Settings for a small model.prior_batch_size=1",
        "Settings for a small model.sample_steps=2",
        "Learn Rex and Max.steps=2",
        "Learn Rex and Max.batch_size=1",
        "Draw.steps=2",
    )
    logged = len(comfy.log())
    shown = run_workflow(set_inputs(twin(SMALL), changes), RunningHost(comfy.url), tmp_path, previews=True)
    assert "read as plain text" not in comfy.log()[logged:]
    pictures = [path for path in shown if path.stem.startswith("small-dogs_")]
    assert len({path.read_bytes() for path in pictures}) == 4
    samples = [path for path in shown if path.stem.startswith("Samples while it learned")]
    assert len(samples) == 3 and all(Image.open(p).size == (SIZE, SIZE) for p in (*pictures, *samples))
    titles = {
        "Photos of Rex",
        "Cut out Max",
        "Name Max",
        "Regularization images",
        "Empty places",
        "Training pictures",
        "Loss curve",
    }
    assert titles <= {path.stem for path in shown}
    run = comfy.base / "output" / "far" / "small-dogs"
    assert (run / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == 2


# ---- the whole line on photos


@pytest.fixture(scope="module")
def dogs(host: Host) -> Iterator[ComfyServer]:
    """A host with the photos and their masks in its input folder, and a small random SAM for the class pictures."""
    if not PHOTOS.is_dir():
        pytest.skip(f"the photos of two dogs are not there ({PHOTOS})")
    with ComfyServer(host) as server:
        for name in ("corgi", "chow"):
            shutil.copytree(PHOTOS / name, server.folder("input") / name)
        torch.manual_seed(3)
        save_tiny(server.folder("models/sams") / "tiny.safetensors", build_sam(TINY))
        yield server


def queue(server: ComfyServer, workflow: dict, out: Path, *changes: str) -> list[Path]:
    return run_workflow(set_inputs(with_tiny_base(workflow), changes), RunningHost(server.url), out, previews=True)


def with_few_steps(server: ComfyServer, workflow: dict) -> dict:
    """The workflow with a FaR Train Options node that keeps the sample pictures cheap."""
    options = api_twins.inputs_of(server.object_info()["FaR_TrainOptions"])
    defaults = {name: spec.get("default", (spec.get("options") or [None])[0]) for name, (_, spec) in options.items()}
    changes = {"sample_steps": 2, "prior_batch_size": 1, "attention_cells": 8}
    workflow["99"] = {
        "class_type": "FaR_TrainOptions",
        "inputs": defaults | changes,
        "_meta": {"title": "Options"},
    }
    workflow[by_title(workflow, "Learn the dogs")]["inputs"]["options"] = ["99", 0]
    return workflow


@pytest.fixture(scope="module")
def prepared(dogs: ComfyServer, tmp_path_factory) -> list[Path]:
    return queue(
        dogs,
        twin(PREPARE),
        tmp_path_factory.mktemp("prepare"),
        "Segment Anything.model_name=tiny.safetensors",
        "Photos of the corgi.max_side=256",
        "Photos of the chow.max_side=256",
        "Regularization images.count=2",
        "Regularization images.steps=2",
        "Empty places.scenes=an empty beach | on the beach",
        "Empty places.steps=2",
        f"Regularization images.size={SIZE}",
        f"Empty places.size={SIZE}",
        f"Training pictures.size={SIZE}",
        "Training pictures.count=6",
    )


@pytest.fixture(scope="module")
def trained(dogs: ComfyServer, prepared, tmp_path_factory) -> list[Path]:
    workflow = with_few_steps(dogs, twin(TRAIN))
    out = tmp_path_factory.mktemp("train")
    return queue(dogs, workflow, out, "Learn the dogs.steps=3", "Learn the dogs.batch_size=1")


def test_three_subjects_in_one_graph(dogs: ComfyServer, tmp_path):
    """The third has the second one's photos: what is tested is the graph."""
    # Another size than elsewhere: of nodes that the host finds in its cache it shows nothing again.
    changes = [f"Photos of {who}.max_side=240" for who in ("the corgi", "the chow", "the husky")]
    changes += ["Photos of the husky.folder=chow", "Segment Anything.model_name=tiny.safetensors"]
    changes += ["Regularization images.count=2", "Regularization images.steps=2", f"Regularization images.size={SIZE}"]
    changes += ["Empty places.each=1", "Empty places.steps=2", f"Empty places.size={SIZE}"]
    changes += [f"Training pictures.size={SIZE}", "Training pictures.count=8", "Training pictures.triple=1"]
    changes += ["Learn the dogs.steps=2", "Learn the dogs.batch_size=1", "Draw.steps=2"]
    changes += [f"Four pictures of 768 px.{side}={SIZE}" for side in ("width", "height")]
    shown = queue(dogs, with_few_steps(dogs, twin(THREE)), tmp_path, *changes)
    assert len([path for path in shown if path.stem.startswith("three-dogs_")]) == 4
    assert len([path for path in shown if path.stem.startswith("Sample pictures")]) == 4
    with safe_open(dogs.base / "models/far/three-dogs.safetensors", "pt") as weights:
        assert len(list(weights.keys())) == 3 + 2 * 128


def test_prepare_runs_to_the_end(dogs: ComfyServer, prepared):
    shown = {path.stem for path in prepared}
    assert {
        "Cut out the corgi",
        "Cut out the chow",
        "Name the chow",
        "Regularization images",
        "Training pictures",
    } <= shown
    dataset = dogs.base / "output/far/datasets/two-dogs"
    about = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    assert about["size"] == SIZE and "<corgi-dog>" in json.dumps(about) and "<chow-dog>" in json.dumps(about)
    assert (dataset / "contact-sheet.jpg").stat().st_size > 1000


def test_prepare_with_sam3_runs_to_the_end(dogs: ComfyServer, tmp_path):
    """SAM 3 itself is too large for a test: another node sends masks and boxes in its place."""
    workflow = twin(PREPARE_SAM3)
    for title in ("SAM 3.1", "What to look for"):
        del workflow[by_title(workflow, title)]
    detector = workflow[by_title(workflow, "Find every dog")]
    detector.update({"class_type": "FaRTest_Instances", "inputs": {"image": detector["inputs"]["image"]}})
    small = ("Photos of the dog.max_side=160", f"Training pictures.size={SIZE}", "Training pictures.count=2")
    shown = {path.stem for path in queue(dogs, workflow, tmp_path, *small)}
    assert {"Cut out the dog", "Name the dog", "Training pictures"} <= shown
    about = json.loads((dogs.base / "output/far/datasets/my-dog/dataset.json").read_text(encoding="utf-8"))
    assert about["size"] == SIZE and "<corgi-dog>" in json.dumps(about)


def test_train_runs_to_the_end_and_saves(dogs: ComfyServer, trained):
    with safe_open(dogs.base / "models/far/two-dogs.safetensors", "pt") as weights:
        assert len(list(weights.keys())) == 2 + 2 * 128  # an embedding for each dog, two halves for 128 projections
    pictures = [path for path in trained if path.stem.startswith("Sample pictures")]
    assert len(pictures) == 3 and all(Image.open(p).size == (SIZE, SIZE) for p in pictures)
    assert [p.stem for p in trained if "Loss" in p.stem] == ["Loss curve"]
    assert (dogs.base / "output/far/two-dogs/metrics.jsonl").read_text(encoding="utf-8").count("\n") == 3


def test_draw_with_the_command_and_the_weights(dogs: ComfyServer, trained, tmp_path):
    """The documented command on the template, and what the weights change in its pictures."""
    file, out = tmp_path / "draw.json", tmp_path / "pictures"
    file.write_text(json.dumps(with_tiny_base(twin(DRAW))), encoding="utf-8")
    small = [f"Four pictures of 768 px.{name}={SIZE}" for name in ("width", "height")]
    settings = [part for change in (*small, "Draw.steps=2") for part in ("--set", change)]
    command = [sys.executable, "-m", "far_train", "queue", str(file), "--host", dogs.url, "--out", str(out), *settings]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pictures = sorted(out.glob("two-dogs_*.png"))
    assert len(pictures) == 4 and all(Image.open(p).size == (SIZE, SIZE) for p in pictures)
    assert all(p.stat().st_size > 5000 for p in pictures)  # a constant picture (NaNs decode to black) is far smaller
    assert len({p.read_bytes() for p in pictures}) == 4
    without = [*command, "--set", "Teach it to the model.strength=0", "--set", "Pictures.filename_prefix=plain"]
    done = subprocess.run(without, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    plain = Image.open(sorted(out.glob("plain_*.png"))[0]).convert("RGB")
    assert plain.tobytes() != Image.open(pictures[0]).convert("RGB").tobytes()
    wrong = [*command, "--set", "What was learned.file=cats.safetensors"]
    done = subprocess.run(wrong, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "'What was learned', file:" in done.stderr and "models/far holds no file 'cats.safetensors'" in done.stderr


def test_two_dogs_on_sdxl(dogs: ComfyServer, prepared, tmp_path):
    """On the dataset of the other base, since what is tested is the graph."""
    workflow = with_few_steps(dogs, twin(TRAIN_SDXL))
    changes = ("Training pictures.folder=two-dogs", "Learn the dogs.steps=2", "Learn the dogs.batch_size=1")
    trained = queue(dogs, workflow, tmp_path / "train", *changes)
    samples = [path for path in trained if path.stem.startswith("Sample pictures")]
    assert len(samples) == 3 and all(Image.open(p).size == (SIZE, SIZE) for p in samples)
    with safe_open(dogs.base / "models/far/two-dogs-sdxl.safetensors", "pt") as weights:
        encoders = [key.split(".")[1] for key in weights.keys() if key.startswith("embedding.")]
    assert sorted(encoders) == ["clip_g", "clip_g", "clip_l", "clip_l"]
    small = [f"Two pictures of 1024 px.{side}={SIZE}" for side in ("width", "height")]
    shown = queue(dogs, twin(DRAW_SDXL), tmp_path / "draw", *small, "Draw.steps=2")
    pictures = [path for path in shown if path.stem.startswith("two-dogs-sdxl_")]
    assert len({path.read_bytes() for path in pictures}) == 2
    assert all(Image.open(p).size == (SIZE, SIZE) and p.stat().st_size > 5000 for p in pictures)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C to the whole console")
def test_ctrl_c_stops_the_run_on_the_host(dogs: ComfyServer, trained, tmp_path):
    file = tmp_path / "draw.json"
    file.write_text(json.dumps(with_tiny_base(twin(DRAW))), encoding="utf-8")
    small = ["--set", f"Four pictures of 768 px.width={SIZE}", "--set", "Draw.steps=9000", "--set", "Draw.seed=5"]
    command = [sys.executable, "-u", "-m", "far_train", "queue", str(file), "--host", dogs.url, *small]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Tests that run in the background of a shell hand on that Ctrl-C is to be ignored.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=REPO, preexec_fn=heed, **pipes) as process:
        for line in process.stdout:
            if line.startswith("queued as"):
                prompt_id = line.split()[-1]
            if line.startswith(("running", "Draw")):
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "asked to stop" in errors
    assert [error.kind for error in dogs.errors(dogs.get(f"/history/{prompt_id}")[prompt_id])] == ["interrupted"]
