"""Workflows that strangers made: hostile values in every input of every node, queued as anybody can queue them."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from .comfy_server import ComfyServer, PromptRejected, default_packs
from .find_host import Host
from .graphs import defaults, encoded, node, tiny_base
from .test_training import training

WATCH = Path(__file__).parent / "packs" / "far_test_watch"
SECONDS = 60.0  # after which a case hangs; those that train take a few

PATHS = (
    *("../../canary", "/etc/passwd", "..\\..\\canary", "C:\\Windows\\win.ini", "CON", "NUL", "a\0b", "link", "-rf"),
    *("input/../../canary", "a" * 300, "é" * 300, ".", "..", "~/.ssh/id_rsa", "file:///etc/passwd"),
    *("http://127.0.0.1:1/x", "\\\\server\\share"),
)
TEXTS = (
    *("", " ", "\0", "<>", "<red-ball>", "<RED ball>", "dog; rm -rf /", "__import__('os').system('id')", "{{7*7}}"),
    *("%s%n", "$(id)", "[" * 100_000, '{"1": [[1, 2]]}', "[[1e999, 2]]", "[[" + "9" * 400 + ", 2]]", "[[NaN, 1]]"),
    *('{"<red-ball>": 1e400}', '{"<red-ball>": ' + "9" * 400 + "}", "<red-ball>=nan", "<red-ball>=1e999"),
    *("embedding:../../canary", "a" * 100_000, "\U0001f600" * 50, "\n" * 1000),
)
NUMBERS = (-1, 0, 1, 3, 65, 2**31, 2**53, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"))
OTHERS = (None, True, [], {}, [[]], ["1"], {"__type__": "x"}, "text", 5, ["1", 7], ["99", 0], ["nobody", -1], [1, 0])


@pytest.fixture(scope="module")
def watched(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A host with the watching pack, things to load, and canaries that nothing may touch."""
    server = ComfyServer(host, {**default_packs(), "far_test_watch": WATCH}, args=["--cache-lru", "60"])
    photos = server.folder("input/ball")
    for i in range(2):
        picture, mask = Image.new("RGB", (64, 64), "grey"), Image.new("L", (64, 64))
        ImageDraw.Draw(picture).ellipse((16 + i, 16, 48, 48), "red")
        ImageDraw.Draw(mask).ellipse((16 + i, 16, 48, 48), 255)
        picture.save(photos / f"{i}.png")
        mask.save(photos / f"{i}.mask.png")
    outside = tmp_path_factory.mktemp("outside")
    (outside / "canary").write_text("untouched")
    server.folder("output/far/datasets")
    for place in ("output/far/link", "output/far/datasets/link", "models/far/link.safetensors"):
        server.folder(str(Path(place).parent))
        (server.base / place).symlink_to(outside)
    with server:
        prompt = training(server, "red", steps=1)
        prompt["7"] = node("FaR_SaveWeights", weights=["4", 0], name="red", export_lora=False, export_embeddings=False,
                           lora_rank=0)  # fmt: skip
        prompt["8"] = node("FaR_SaveDataset", dataset=["2", 0], name="red")
        server.run(prompt)
        yield server
    assert [(p.name, p.read_text()) for p in outside.iterdir()] == [("canary", "untouched")]


def genuine(comfy: ComfyServer) -> dict[str, Any]:
    """A graph with every node of the pack that has inputs, on small things."""
    base = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    fusion = {**defaults(comfy, "FaR_ConceptFusion"), "size": 64, "count": 2}
    training_inputs = comfy.object_info()["FaR_Train"]["input"]["optional"]
    options = {**defaults(comfy, "FaR_TrainOptions"), "prior_batch_size": 1, "sample_steps": 1, "attention_cells": 8}
    return {
        "1": tiny_base(res_blocks=2),
        "2": node("FaR_LoadPhotos", folder="ball", max_side=64),
        "3": node("FaR_LoadSAM", model_name="FaR mini SAM (built in)"),
        "4": node("FaR_ExtractSubject", images=["2", 0], masks=["2", 1], names=["2", 2], sam_model=["3", 0],
                  box_format="x0, y0, x1, y1", points="", min_area=0.0),
        "5": node("FaR_Concept", images=["4", 0], masks=["4", 1], token="<red-ball>", noun="ball", invert_mask=False),
        "6": node("FaR_PriorFromImages", images=["2", 0], masks=["2", 1], noun="ball", invert_mask=False),
        "7": node("FaR_ConceptFusion", concepts=["5", 0], prior=["6", 0], backgrounds=["2", 0], background_captions="",
                  **fusion),
        "8": node("FaR_SaveDataset", dataset=["7", 0], name="fuzzed"),
        "9": node("FaR_LoadDataset", folder="red"),
        "10": node("FaR_TrainOptions", **options),
        "11": node("FaR_Train", **base, dataset=["9", 0], options=["10", 0], steps=1, batch_size=1, train_seed=0,
                   name="fuzzed", sample_prompt="",
                   **{k: v for k, v in {"continue_from": ["12", 0], "dry_run": False}.items() if k in training_inputs}),
        "12": node("FaR_LoadWeights", file="red.safetensors"),
        "13": node("FaR_SaveWeights", weights=["12", 0], name="fuzzed", export_lora=True, export_embeddings=True,
                   lora_rank=2),
        "14": node("FaR_ApplyWeights", model=["1", 0], clip=["1", 1], weights=["12", 0], strength=1.0,
                   concept_strength=""),
        "15": node("FaR_ClassPrior", **base, concepts=["5", 0], count=1, prior_seed=0, steps=1, guidance=1.0, size=64),
        "16": node("FaR_MiniPhotos", subject="rex", count=1),
        "17": encoded("a <red-ball> ball", ["14", 1]),
    } | newer(comfy)  # fmt: skip


def newer(comfy: ComfyServer) -> dict[str, Any]:
    """Nodes that a host lists only if the pack has them."""
    graph = {
        "20": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "21": node("FaR_AttentionProbe", model=["14", 0], clip=["14", 1], latent=["20", 0], image=["2", 0],
                   text="a <red-ball> ball", concepts="", when="0.5", probe_seed=0, cells=4),
        "22": node("FaR_Evaluate", images=["2", 0], masks=["2", 1], concepts=["5", 0], presence=0.6,
                   encoder="FaR mini oracle (built in)"),
        "23": node("FaR_EmptyScenes", model=["1", 0], clip=["1", 1], vae=["1", 2], scenes="a wall | at a wall", each=1,
                   scene_seed=0, steps=1, guidance=1.0, size=64),
        "24": node("FaR_DatasetDoctor", concepts=["5", 0], dataset=["9", 0], size=64),
    }  # fmt: skip
    known = comfy.object_info()
    return {number: about for number, about in graph.items() if about["class_type"] in known}


def ancestors(graph: dict[str, Any], target: str) -> dict[str, Any]:
    """The part of a graph that a node needs."""
    part = {target: graph[target]}
    for value in graph[target]["inputs"].values():
        if isinstance(value, list) and len(value) == 2 and value[0] in graph and value[0] not in part:
            part |= ancestors(graph, value[0])
    return part


def mutated(graph: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """A prompt with one or two inputs of one node replaced: (prompt, the node's id, {input: value})."""
    target = rng.choice([n for n, about in graph.items() if about["class_type"].startswith("FaR_")])
    about = graph[target] | {"inputs": dict(graph[target]["inputs"])}
    prompt = ancestors(graph, target) | {target: about}
    changes: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(list(about["inputs"]))
        value = about["inputs"][name]
        if isinstance(value, list) or rng.random() < 0.1:
            new = rng.choice(OTHERS)
        elif isinstance(value, str):
            new = rng.choice((*PATHS, *TEXTS))
        elif isinstance(value, (int, float)):
            new = rng.choice(NUMBERS)
        about["inputs"][name] = changes[name] = new
    if rng.random() < 0.05:
        name = rng.choice(list(about["inputs"]))
        del about["inputs"][name]
        changes[name] = "(deleted)"
    prompt["sink"] = node("PreviewAny", source=[target, 0])
    return prompt, target, changes


def fuzz(comfy: ComfyServer, seed: int, count: int) -> None:
    """Queue ``count`` mutated prompts and judge what each of them did; prints the histogram."""
    graph = genuine(comfy)
    comfy.run(graph | {f"sink-{n}": node("PreviewAny", source=[n, 0]) for n in graph}, timeout=600)
    comfy.get("/far_test/watch")  # what libraries do once
    histogram: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    wrong = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        prompt, target, changes = mutated(graph, rng)
        kind = prompt[target]["class_type"]
        case = f"seed {seed}, case {number}, {kind}, {str(changes)[:200]}"
        started = time.monotonic()
        try:
            entry = comfy.wait(comfy.queue(prompt), SECONDS)
        except PromptRejected as e:
            histogram["refused by validation"] += 1
            broken_link = "exception_during" in str(e)  # the host's words for links that lead nowhere
            if not broken_link and not any(name in str(e) for name in changes):
                wrong.append(f"{case}: refused, but without the input's name: {str(e)[:300]}")
        else:
            reached[kind] += 1
            errors = comfy.errors(entry)
            histogram["executed: " + (errors[0].kind.rpartition(".")[2] if errors else "success")] += 1
            for error in errors:
                if not error.kind.startswith("FaR."):
                    wrong.append(f"{case}: {error.kind}: {error.message[:300]}")
                elif not names_the_input(error.message, changes):
                    wrong.append(f"{case}: {error.kind} doesn't name the input: {error.message[:300]}")
        if seen := comfy.get("/far_test/watch"):
            wrong.append(f"{case}: the host's process did {sorted(set(seen))[:5]}")
        if time.monotonic() - started > SECONDS:
            wrong.append(f"{case}: took {time.monotonic() - started:.0f} s")
    share = sum(reached.values()) / count
    print(f"\n{count} workflows, {share:.0%} reached execution: {json.dumps(histogram)}\n  of {json.dumps(reached)}")
    assert wrong == [], "\n".join([f"{len(wrong)} of {count}", *wrong[:40]])
    assert share >= 0.3


def names_the_input(message: str, changes: dict[str, Any]) -> bool:
    """Whether an error says which input it is about: by its name, or the singular of it."""
    return any(name in message or name.rstrip("s") in message for name in changes)


def test_the_watch_sees_what_it_is_for(watched: ComfyServer):
    watched.post("/far_test/watch", {})
    seen = "\n".join(watched.get("/far_test/watch"))
    for word in ("read /", "write /", "os.remove", "pickle.find_class", "eval", "socket.connect", "subprocess.Popen"):
        assert word in seen, word


def test_every_node_is_fuzzed(watched: ComfyServer):
    fuzzed = {about["class_type"] for about in genuine(watched).values()}
    nodes = {k: v["input"] for k, v in watched.object_info().items() if k.startswith("FaR_")}
    assert {k for k, inputs in nodes.items() if any(inputs.get(kind) for kind in ("required", "optional"))} <= fuzzed


def test_hostile_workflows(watched: ComfyServer):
    fuzz(watched, 0, 60)


@pytest.mark.torture
def test_a_thousand_hostile_workflows(watched: ComfyServer):
    fuzz(watched, 1, 1000)
