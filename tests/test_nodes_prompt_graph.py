"""Finding prompts whose CLIP doesn't know the tokens that they use."""

from __future__ import annotations

from .nodes_pack import pack_module

unpatched_prompts = pack_module("nodes.prompt_graph").unpatched_prompts


def node(kind: str, **inputs):
    return {"class_type": kind, "inputs": inputs}


GRAPH = {
    "base": node("CheckpointLoaderSimple", ckpt_name="a <corgi-dog>.safetensors"),
    "far": node("FaR_ApplyWeights", model=["base", 0], clip=["base", 1], concept_strength="<corgi-dog>=1"),
    "lora": node("LoraLoader", model=["far", 0], clip=["far", 1]),
    "beside": node("LoraLoader", model=["far", 0], clip=["base", 1]),  # MODEL is patched, its CLIP isn't
    "switch": node("Switch", a=["lora", 1], b=["base", 1]),
}


def found(**nodes):
    return unpatched_prompts(GRAPH | nodes, ["<corgi-dog>", "<chow-dog>"])


def test_prompts_behind_the_weights_are_fine():
    for source in (["far", 1], ["lora", 1], ["switch", 0]):
        assert found(text=node("CLIPTextEncode", clip=source, text="a <corgi-dog> dog")) == {}


def test_prompts_beside_the_weights_are_found_with_their_tokens():
    for source in (["base", 1], ["beside", 1]):
        text = "a <Corgi-Dog> dog and a <chow-dog> dog"
        assert found(text=node("CLIPTextEncode", clip=source, text=text)) == {"text": ["<corgi-dog>", "<chow-dog>"]}


def test_other_prompts_and_other_nodes_are_left_alone():
    assert (
        found(
            plain=node("CLIPTextEncode", clip=["base", 1], text="a dog"),
            note=node("Note", text="<corgi-dog>"),
            linked=node("CLIPTextEncode", clip=["base", 1], text=["elsewhere", 0]),
            training=node("FaR_Train", clip=["base", 1], sample_prompt="a <corgi-dog> dog"),
        )
        == {}
    )


def test_graphs_that_go_in_circles_or_miss_nodes():
    loop = {"x": node("A", clip=["y", 0]), "y": node("B", clip=["x", 0])}
    text = node("CLIPTextEncode", clip=["x", 0], text="<corgi-dog>")
    assert found(**loop, text=text) == {"text": ["<corgi-dog>"]}
    gone = node("CLIPTextEncode", clip=["gone", 0], text="<corgi-dog>")
    assert found(text=gone) == {"text": ["<corgi-dog>"]}
