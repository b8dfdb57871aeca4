"""The workflow templates as files: links, places, groups, and what the front end and the registry want to know."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
VERSION = re.search(r'^version = "(.+)"', (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
NOTES = ("Note", "MarkdownNote")
NEWER = {"SAM3_Detect": "0.33.0"}  # nodes that the oldest supported ComfyUI lacks, and where they were tried
TITLE_BAR = 30  # pixels above a node's position
GROUP_BAR = 30  # pixels below a group's upper edge

Box = tuple[float, float, float, float]  # left, top, right, bottom


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
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and max(nodes) <= graph["last_node_id"]
    links = {link[0]: link for link in graph["links"]}
    assert len(links) == len(graph["links"]) and max(links) <= graph["last_link_id"]
    for number, source, output, target, slot, kind in graph["links"]:
        sent, received = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in sent["links"] and received["link"] == number
        assert sent["type"] == kind and kind in received["type"].split(",")  # some inputs take several types
    ends = [i["link"] for node in graph["nodes"] for i in node["inputs"] if i.get("link") is not None]
    starts = [number for node in graph["nodes"] for o in node["outputs"] for number in o["links"] or ()]
    assert sorted(ends) == sorted(starts) == sorted(links)


def test_nothing_overlaps_and_groups_hold_nodes(graph):
    boxes = {node["id"]: box_of(node) for node in graph["nodes"]}
    for (first, a), (second, b) in combinations(boxes.items(), 2):
        assert not overlap(a, b), (first, second)
    groups = [group_box(group) for group in graph["groups"]]
    assert groups and not any(overlap(a, b) for a, b in combinations(groups, 2))
    for left, top, right, bottom in groups:
        free = (left, top + GROUP_BAR, right, bottom)
        assert any(inside(box, free) for box in boxes.values())
        assert all(inside(box, free) or not overlap(box, (left, top, right, bottom)) for box in boxes.values())
    for node in graph["nodes"]:
        assert node["type"] in NOTES or any(inside(boxes[node["id"]], group) for group in groups), node["title"]


def test_it_opens_where_one_begins_to_read(graph):
    """In a small window, what the note 'Start here' says is on screen and not hidden below a zoom of 60 %."""
    scale, (x, y) = graph["extra"]["ds"]["scale"], graph["extra"]["ds"]["offset"]
    assert scale >= 0.6
    (note,) = (node for node in graph["nodes"] if node["title"] == "Start here")
    left, top, right, bottom = (scale * (side + shift) for side, shift in zip(box_of(note), (x, y, x, y)))
    assert 70 <= left and 80 <= top and right <= 1200 and bottom <= 700


def test_every_node_has_a_title_of_its_own_and_says_where_it_comes_from(graph):
    titles = [node["title"] for node in graph["nodes"]]
    assert all(titles) and len(set(titles)) == len(titles)
    assert any(node["type"] in NOTES for node in graph["nodes"])
    for node in graph["nodes"]:
        if node["type"] not in NOTES:
            ours = node["type"].startswith("FaR_")
            source = (node["properties"]["cnr_id"], node["properties"]["ver"])
            assert source == (("comfyui-far", VERSION) if ours else ("comfy-core", NEWER.get(node["type"], "0.8.0")))


def test_concepts_get_the_names_of_their_photos():
    """So that messages name files."""
    twins = [json.loads((path.parent / "api" / path.name).read_text(encoding="utf-8")) for path in WORKFLOWS]
    concepts = [n["inputs"] for twin in twins for n in twin.values() if n["class_type"] == "FaR_Concept"]
    assert concepts and all(c.get("names", [None])[0] == c["images"][0] for c in concepts)


def test_checkpoint_loaders_offer_their_model(graph):
    loaders = [node for node in graph["nodes"] if node["type"] == "CheckpointLoaderSimple"]
    built_in = [node for node in graph["nodes"] if node["type"] == "FaR_MiniCheckpoint"]
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
