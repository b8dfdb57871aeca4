"""The workflow templates as files: links, places, groups, and what the front end and the registry want to know."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from .host.find_host import script

api_twins = script("api_twins")
REPOSITORY = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
VERSION = re.search(r'^version = "(.+)"', (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
NOTES = ("Note", "MarkdownNote")
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
NEWER = {"SAM3_Detect": "0.33.0"}  # nodes that the oldest supported ComfyUI lacks, and where they were tried
TITLE_BAR = 30  # pixels above a node's position
GROUP_BAR = 30  # pixels below a group's upper edge

Box = tuple[float, float, float, float]  # left, top, right, bottom


def parts(graph: dict) -> list[dict]:
    """The top level and the subgraphs."""
    return [graph, *graph.get("definitions", {}).get("subgraphs", ())]


def all_nodes(graph: dict) -> list[dict]:
    return [node for part in parts(graph) for node in part["nodes"]]


def ends(link: list | dict) -> list:
    """Number, origin, output, target, input and type of a link; subgraphs store them by name."""
    return [link[name] for name in LINK] if isinstance(link, dict) else link


def box_of(node: dict) -> Box:
    (x, y), (width, height) = node["pos"], node["size"]
    return (x, y - TITLE_BAR, x + width, y + height)


def group_box(group: dict) -> Box:
    x, y, width, height = group["bounding"]
    return (x, y, x + width, y + height)


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(small: Box, large: Box) -> bool:
    return small[0] >= large[0] and small[1] >= large[1] and small[2] <= large[2] and small[3] <= large[3]


def test_there_are_ten_with_thumbnails_and_twins():
    assert len(WORKFLOWS) == 10
    for path in WORKFLOWS:
        assert 0 < path.with_suffix(".jpg").stat().st_size <= 150_000
        assert (path.parent / "api" / path.name).is_file()
    twins = {p.name for p in (REPOSITORY / "workflows" / "api").iterdir()}
    assert twins == {p.name for p in WORKFLOWS}


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def text(request) -> str:
    return request.param.read_text(encoding="utf-8")


@pytest.fixture
def graph(text) -> dict:
    return json.loads(text)


def test_links_match_at_both_ends(graph):
    """A subgraph's links begin at its node -10 and end at its node -20 where they leave it."""
    numbers = [node["id"] for node in all_nodes(graph)]
    assert len(set(numbers)) == len(numbers) and max(numbers) <= graph["last_node_id"]
    for part in parts(graph):
        entry = {"id": -10, "outputs": [slot | {"links": slot["linkIds"]} for slot in part.get("inputs", ())]}
        leave = {"id": -20, "inputs": [slot | {"link": slot["linkIds"][0]} for slot in part.get("outputs", ())]}
        nodes = {n["id"]: {"inputs": [], "outputs": []} | n for n in (*part["nodes"], entry, leave)}
        links = {ends(link)[0]: ends(link) for link in part["links"]}
        assert len(links) == len(part["links"]) and max(links, default=0) <= graph["last_link_id"]
        for number, source, output, target, slot, kind in links.values():
            sent, received = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
            assert number in sent["links"] and received["link"] == number
            assert sent["type"] == kind and kind in received["type"].split(",")  # some inputs take several types
        arriving = [i["link"] for node in nodes.values() for i in node["inputs"] if i.get("link") is not None]
        starting = [number for node in nodes.values() for o in node["outputs"] for number in o["links"] or ()]
        assert sorted(arriving) == sorted(starting) == sorted(links)


def test_a_subgraph_shows_what_it_takes_and_gives(graph):
    frames = {node["type"]: node for node in graph["nodes"]}
    for subgraph in parts(graph)[1:]:
        frame = frames[subgraph["id"]]
        assert frame["title"] == subgraph["name"]
        for side in ("inputs", "outputs"):
            shown, held = ([(slot["name"], slot["type"]) for slot in of[side]] for of in (frame, subgraph))
            assert shown == held
        for taken, slot in zip(frame["inputs"], subgraph["inputs"]):
            assert ("widget" in taken) == (taken["link"] is None), slot["name"]


def test_twins_take_what_is_set_on_a_subgraph_before_what_its_nodes_hold():
    graph = json.loads(WORKFLOWS[0].read_text(encoding="utf-8"))
    (frame,) = (node for node in graph["nodes"] if node["title"] == "Draw both")
    ((inner, sampler),) = (found for found in api_twins.Level.of(graph, graph).walk() if found[1]["title"] == "Draw")
    (seed,) = (entry["link"] for entry in sampler["inputs"] if entry["name"] == "seed")
    assert inner.prefix == f"{frame['id']}:" and inner.source(seed) is None
    frame["widgets_values"] = [5, "a photo"]
    assert inner.source(seed) == 5
    frame["mode"] = 4
    with pytest.raises(api_twins.TwinError, match="Draw both.*muted or bypassed"):
        api_twins.Level.of(graph, graph)


def test_nothing_overlaps_and_groups_hold_nodes(graph):
    for part in parts(graph):
        boxes = {node["id"]: box_of(node) for node in part["nodes"]}
        for (first, a), (second, b) in combinations(boxes.items(), 2):
            assert not overlap(a, b), (first, second)
        groups = [group_box(group) for group in part["groups"]]
        assert not any(overlap(a, b) for a, b in combinations(groups, 2))
        for left, top, right, bottom in groups:
            free = (left, top + GROUP_BAR, right, bottom)
            assert any(inside(box, free) for box in boxes.values())
            assert all(inside(box, free) or not overlap(box, (left, top, right, bottom)) for box in boxes.values())


def test_it_can_be_read_when_it_opens(graph):
    """New front ends fit the whole graph into three quarters of the window; below 57 % they draw no text."""
    assert len(graph["nodes"]) <= 12
    boxes = [box_of(node) for node in graph["nodes"]]
    left, top = (min(box[i] for box in boxes) for i in (0, 1))
    right, bottom = (max(box[i] for box in boxes) for i in (2, 3))
    assert min(0.75 * 1600 / (right - left), 0.75 * 860 / (bottom - top)) >= 0.6


def test_it_opens_where_one_begins_to_read(graph):
    """Old front ends open where the file says: in a small window, the note 'Start here' is on screen."""
    scale, (x, y) = graph["extra"]["ds"]["scale"], graph["extra"]["ds"]["offset"]
    assert scale >= 0.6
    (note,) = (node for node in graph["nodes"] if node["title"] == "Start here")
    left, top, right, bottom = (scale * (side + shift) for side, shift in zip(box_of(note), (x, y, x, y)))
    assert 70 <= left and 80 <= top and right <= 1200 and bottom <= 700


def test_every_node_has_a_title_of_its_own_and_says_where_it_comes_from(graph):
    nodes, frames = all_nodes(graph), {part["id"] for part in parts(graph)[1:]}
    titles = [node["title"] for node in nodes]
    assert all(titles) and len(set(titles)) == len(titles)
    for node in nodes:
        if node["type"] not in NOTES and node["type"] not in frames:
            ours = node["type"].startswith("FaR_")
            source = (node["properties"]["cnr_id"], node["properties"]["ver"])
            assert source == (("comfyui-far", VERSION) if ours else ("comfy-core", NEWER.get(node["type"], "0.8.0")))


def test_concepts_get_the_names_of_their_photos():
    """So that messages name files."""
    twins = [json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8")) for path in WORKFLOWS]
    concepts = [n["inputs"] for twin in twins for n in twin.values() if n["class_type"] == "FaR_Concept"]
    assert concepts and all(c.get("names", [None])[0] == c["images"][0] for c in concepts)


def test_checkpoint_loaders_offer_their_model(graph):
    loaders = [node for node in all_nodes(graph) if node["type"] == "CheckpointLoaderSimple"]
    built_in = [node for node in all_nodes(graph) if node["type"] == "FaR_MiniCheckpoint"]
    assert bool(loaders) != bool(built_in)  # what needs no download must not offer one
    for node in loaders:
        (model,) = node["properties"]["models"]
        assert model["name"] == node["widgets_values"][0] and model["directory"] == "checkpoints"
        # The front end downloads from few places, only this kind of file, and shows all others in red.
        assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(".safetensors")


def test_no_absolute_paths(text):
    assert not re.search(r'"(/|~|[A-Za-z]:[\\/]|file:)', text)
    assert not re.search(r"/(home|root|Users|tmp|work)/", text)


def test_version_is_the_front_ends(graph):
    assert graph["version"] == 0.4 and graph["config"] == {}
