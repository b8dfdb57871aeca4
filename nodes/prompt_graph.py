"""Looking over a queued graph for a mistake that no node sees by itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

APPLY = "FaR_ApplyWeights"
# Nodes whose own text may hold the tokens whatever their CLIP is: strengths by token, prompts of sample pictures.
KNOWING = (APPLY, "FaR_Train")


def unpatched_prompts(graph: Mapping[str, Any], tokens: Collection[str]) -> dict[str, list[str]]:
    """Nodes whose text holds some of ``tokens`` but whose CLIP doesn't come through FaR Apply Weights.

    ``graph`` is a queued prompt in API format, node id → {"class_type", "inputs"}. Returns the tokens by node id: such
    a node would read them as plain text, without a word.
    """
    found = {}
    for node_id, node in graph.items():
        inputs = node.get("inputs", {})
        clip, texts = inputs.get("clip"), [v.lower() for v in inputs.values() if isinstance(v, str)]
        held = [t for t in tokens if any(t in text for text in texts)]
        if held and node["class_type"] not in KNOWING and _is_link(clip) and not _comes_through(graph, clip[0], set()):
            found[node_id] = held
    return found


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
