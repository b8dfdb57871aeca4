"""Every node of the pack as the real host lists it."""

from __future__ import annotations

import pytest

from .comfy_server import ComfyServer
from .graphs import node

NODES = (
    "FaR_LoadPhotos",
    "FaR_LoadSAM",
    "FaR_ExtractSubject",
    "FaR_Concept",
    "FaR_ClassPrior",
    "FaR_PriorFromImages",
    "FaR_EmptyScenes",
    "FaR_ConceptFusion",
    "FaR_SaveDataset",
    "FaR_LoadDataset",
    "FaR_DatasetDoctor",
    "FaR_MiniCheckpoint",
    "FaR_MiniPhotos",
    "FaR_TrainOptions",
    "FaR_Train",
    "FaR_SaveWeights",
    "FaR_LoadWeights",
    "FaR_ApplyWeights",
    "FaR_AttentionProbe",
    "FaR_Evaluate",
)


def test_every_node_appears_without_a_warning(comfy: ComfyServer):
    info = comfy.object_info()
    for name in NODES:
        assert info[name]["category"] == "FaR"
        assert info[name]["description"]
        inputs = {**info[name]["input"].get("required", {}), **info[name]["input"].get("optional", {})}
        for key, value in inputs.items():
            assert value[1]["tooltip"], f"{name}: no tooltip on {key}"
        assert all(info[name]["output_tooltips"])
    log = comfy.start_log()
    assert "IMPORT FAILED" not in log and "Traceback" not in log
    assert "WARNING" not in log.split("Import times")[0]


@pytest.mark.parametrize(
    ("word", "nodes"),
    [
        ("lora", {"Train", "SaveWeights", "LoadWeights", "ApplyWeights"}),
        ("train", {"Train", "TrainOptions"}),
        ("dreambooth", {"Train", "Concept"}),
        ("personalization", {"Train", "Concept"}),
        ("sam", {"LoadSAM", "ExtractSubject"}),
        ("segment", {"LoadSAM", "ExtractSubject"}),
        ("rembg", {"ExtractSubject"}),
        ("subject", {"Concept", "ExtractSubject"}),
        ("character", {"Train", "Concept"}),
        ("training set", {"ConceptFusion", "SaveDataset", "LoadDataset"}),
        ("dataset", {"ConceptFusion", "SaveDataset", "LoadDataset"}),
    ],
)
def test_a_word_finds_the_nodes_that_are_meant(comfy: ComfyServer, word: str, nodes: set[str]):
    """By whole words of a node's name or its aliases; the front end finds parts of words, too."""
    info = comfy.object_info()
    if "search_aliases" not in info["FaR_Train"]:
        pytest.skip("this host knows no search aliases")
    terms = {name: [info[name]["display_name"].lower(), *info[name]["search_aliases"]] for name in NODES}
    found = {name for name in NODES if any(f" {word} " in f" {term} " for term in terms[name])}
    assert {f"FaR_{name}" for name in nodes} <= found


def test_every_node_has_a_help_page(comfy: ComfyServer):
    info = comfy.object_info()
    for name in (name for name in info if name.startswith("FaR_")):
        page = comfy._request(f"/extensions/ComfyUI-FaR/docs/{name}.md").decode()
        inputs = info[name]["input"]
        for key in (*inputs.get("required", {}), *inputs.get("optional", {})):
            assert f"`{key}`" in page, f"{name}.md says nothing about {key}"


def test_asking_twice_for_the_nodes_changes_nothing(comfy: ComfyServer):
    (told,) = comfy.run({"1": node("FaRTest_AskTwice")})["1"]["text"]
    assert told == f"{len(NODES)} nodes, 0 more, 0 twice"
