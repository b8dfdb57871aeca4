"""Looking over a queued graph for a mistake that no node sees by itself."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

APPLY = "FaR_ApplyWeights"
# Nodes whose own text may hold the tokens whatever their CLIP is: strengths by token, prompts of sample pictures.
KNOWING = (APPLY, "FaR_Train")
MODELS = ("model", "clip", "vae")  # inputs that bring no text

_applied: set[str] = set()
_noted: set[tuple[str | None, str, str]] = set()  # what shows a note: the client, the node's id and its class
SETTLED = "fixed: placeholder tokens are read as such here"  # the front end ignores an empty text


def remember_tokens(tokens: Collection[str]) -> None:
    """Note tokens that FaR Apply Weights has applied, for :func:`plain_text_notes`."""
    _applied.update(tokens)


def plain_text_notes(graph: Any, client: str | None) -> dict[str, str]:
    """What to say on which nodes of a prompt that was just posted: see :func:`unpatched_prompts`.

    By all tokens that were applied since the host started. The host takes a FaR Apply Weights that hasn't changed from
    its cache, so that the node itself can't see what else has. A node that is right again says so: stock nodes would
    keep the note for ever. ``graph``: whatever ``client`` posted as a prompt.
    """
    if not isinstance(graph, Mapping):
        return {}
    known = {node_id: node for node_id, node in graph.items() if _is_node(node)}
    applies = any(node["class_type"] == APPLY for node in known.values())
    unpatched = unpatched_prompts(known, sorted(_applied)) if applies else {}
    kinds = {n: node["class_type"] for n, node in known.items() if n not in unpatched}
    # FaR's own nodes say something else when they run.
    settled = [n for n, kind in kinds.items() if (client, n, kind) in _noted and not kind.startswith("FaR_")]
    _noted.difference_update((client, n, kinds[n]) for n in settled)
    return dict.fromkeys(settled, SETTLED) | notes_of(unpatched, known, client)


def notes_of(unpatched: Mapping[str, Collection[str]], graph: Mapping[str, Any], client: str | None) -> dict[str, str]:
    """What to say on the nodes of a client's ``graph`` that :func:`unpatched_prompts` has found."""
    _noted.update((client, node_id, graph[node_id]["class_type"]) for node_id in unpatched)
    fix = "will be read as plain text here: connect the CLIP of FaR Apply Weights"
    return {node_id: f"{' and '.join(tokens)} {fix}" for node_id, tokens in unpatched.items()}


def unpatched_prompts(graph: Mapping[str, Any], tokens: Collection[str]) -> dict[str, list[str]]:
    """Nodes whose text holds some of ``tokens`` but whose CLIP doesn't come through FaR Apply Weights.

    ``graph`` is a queued prompt in API format, node id → {"class_type", "inputs"}. Returns the tokens by node id: such
    a node would read them as plain text, without a word. A text may also come from a node that only holds it.
    """
    found = {}
    for node_id, node in graph.items():
        inputs = node.get("inputs", {})
        clip, texts = inputs.get("clip"), [text.lower() for text in _texts(graph, inputs)]
        held = [t for t in tokens if any(t in text for text in texts)]
        if held and node["class_type"] not in KNOWING and _is_link(clip) and not _comes_through(graph, clip[0], set()):
            found[node_id] = held
    return found


def _texts(graph: Mapping[str, Any], inputs: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a node's inputs, written down or linked to a node like PrimitiveStringMultiline."""
    for name, value in inputs.items():
        if isinstance(value, str):
            yield value
        elif _is_link(value) and name not in MODELS:
            written = graph.get(value[0], {}).get("inputs", {}).values()
            if not any(map(_is_link, written)):
                yield from (text for text in written if isinstance(text, str))


def _is_node(node: Any) -> bool:
    return (
        isinstance(node, Mapping)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), Mapping)
    )


def _is_link(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], str)


def _comes_through(graph: Mapping[str, Any], node_id: str, seen: set[str]) -> bool:
    """Whether a CLIP made by this node has passed FaR Apply Weights: upstream by ``clip``, else by every link."""
    node = graph.get(node_id)
    if node is None or node_id in seen:
        return False
    if node["class_type"] == APPLY:
        return True
    seen.add(node_id)
    inputs = node.get("inputs", {})
    links = [inputs["clip"]] if _is_link(inputs.get("clip")) else [v for v in inputs.values() if _is_link(v)]
    return any(_comes_through(graph, link[0], seen) for link in links)
