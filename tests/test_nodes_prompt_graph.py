"""Finding prompts whose CLIP doesn't know the tokens that they use."""

from __future__ import annotations

from .nodes_pack import pack_module

prompt_graph = pack_module("nodes.prompt_graph")
unpatched_prompts = prompt_graph.unpatched_prompts


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


def test_texts_that_come_from_nodes_which_only_hold_them():
    held = node("PrimitiveStringMultiline", value="a <corgi-dog> dog")
    made = node("FaR_Concept", images=["far", 0], token="<chow-dog>")
    text = node("CLIPTextEncode", clip=["base", 1], text=["held", 0])
    assert found(held=held, text=text) == {"text": ["<corgi-dog>"]}
    assert found(held=held, text=node("CLIPTextEncode", clip=["far", 1], text=["held", 0])) == {}
    assert found(made=made, prior=node("FaR_ClassPrior", clip=["base", 1], concepts=["made", 0])) == {}
    assert found(model=node("Detailer", model=["base", 0], clip=["base", 1], text="a dog")) == {}


def test_a_posted_graph_is_looked_over_with_the_tokens_that_were_applied(monkeypatch):
    monkeypatch.setattr(prompt_graph, "_applied", set())
    monkeypatch.setattr(prompt_graph, "_noted", set())
    graph = GRAPH | {"text": node("CLIPTextEncode", clip=["base", 1], text="a <corgi-dog> dog")}
    assert prompt_graph.plain_text_notes(graph, "alice") == {}
    prompt_graph.remember_tokens(["<corgi-dog>"])
    note = "<corgi-dog> will be read as plain text here: connect the CLIP of FaR Apply Weights"
    assert prompt_graph.plain_text_notes(graph, "alice") == {"text": note}
    odd = {"a": None, "b": [], "c": {"class_type": "FaR_ApplyWeights"}, "d": {"inputs": {}}}
    assert prompt_graph.plain_text_notes(graph | odd, "alice") == {"text": note}
    mended = graph | {"text": node("CLIPTextEncode", clip=["far", 1], text="a <corgi-dog> dog")}
    others = GRAPH | {"text": node("KSampler", model=["far", 0])}  # a node of that id in another workflow
    assert prompt_graph.plain_text_notes(mended, "bob") == prompt_graph.plain_text_notes(others, "alice") == {}
    fixed = "fixed: placeholder tokens are read as such here"
    assert [prompt_graph.plain_text_notes(mended, "alice") for _ in range(2)] == [{"text": fixed}, {}]
    without = {name: graph[name] for name in ("base", "text")}
    for nothing in (without, odd, {}, None, "text", [graph]):
        assert prompt_graph.plain_text_notes(nothing, "alice") == {}


def test_graphs_that_go_in_circles_or_miss_nodes():
    loop = {"x": node("A", clip=["y", 0]), "y": node("B", clip=["x", 0])}
    text = node("CLIPTextEncode", clip=["x", 0], text="<corgi-dog>")
    assert found(**loop, text=text) == {"text": ["<corgi-dog>"]}
    gone = node("CLIPTextEncode", clip=["gone", 0], text="<corgi-dog>")
    assert found(text=gone) == {"text": ["<corgi-dog>"]}
