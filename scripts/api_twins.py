#!/usr/bin/env python3
"""Make workflows/api/*.json (API format, what queues take) from workflows/*.json (what people edit in the front end).

    python scripts/api_twins.py --host http://127.0.0.1:8188            # a running ComfyUI with this pack
    python scripts/api_twins.py --host http://127.0.0.1:8188 --check    # write nothing, only say what is out of date
    python scripts/api_twins.py --host http://127.0.0.1:8188 --fit      # after a node got inputs: templates first

The front end's format keeps the widgets' values without their names; the names come from the running host. Queues know
no subgraphs: their nodes stand in the twin one by one, as the front end would queue them.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
NOTES = ("Note", "MarkdownNote")  # live in the front end alone
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEEDS = ("seed", "noise_seed")
CONTROL = "control_after_generate"  # a widget that the front end adds behind a seed; queues don't know it
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
ENTRY, EXIT = -10, -20  # what a subgraph's links begin and end at where they leave it

Schema = dict[str, Any]  # one node's entry of the host's /object_info


class TwinError(Exception):
    """A workflow that can't be turned into API format; the message names the node."""


def parts(graph: dict[str, Any]) -> list[dict[str, Any]]:
    """The top level of a graph and its subgraphs, each with ``nodes``, ``links`` and ``groups``."""
    return [graph, *graph.get("definitions", {}).get("subgraphs", ())]


def links_of(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The links of a part with names for their ends: a graph's top level stores lists, a subgraph stores objects."""
    return [link if isinstance(link, dict) else dict(zip(LINK, link)) for link in part["links"]]


def is_virtual(node: dict[str, Any], graph: dict[str, Any]) -> bool:
    """Whether a node only exists in the front end: a note, or a subgraph's frame."""
    return node["type"] in NOTES or node["type"] in (part["id"] for part in parts(graph)[1:])


@dataclass
class Level:
    """The top level of a graph, or a subgraph where it is used."""

    nodes: dict[int, dict[str, Any]]
    links: dict[int, dict[str, Any]]
    prefix: str = ""  # of its nodes' ids in the queue
    frame: dict[str, Any] | None = None  # the node that stands for it one level up
    above: Level | None = None
    inside: dict[int, Level] = field(default_factory=dict)  # by the id of the frame

    @classmethod
    def of(cls, part: dict[str, Any], graph: dict[str, Any], **place: Any) -> Level:
        """A part of a graph with the subgraphs in it. Raises TwinError if one is muted."""
        level = cls({n["id"]: n for n in part["nodes"]}, {link["id"]: link for link in links_of(part)}, **place)
        subgraphs = {subgraph["id"]: subgraph for subgraph in parts(graph)[1:]}
        for number, node in level.nodes.items():
            if node["type"] in subgraphs:
                refuse_muted(node)
                place = {"prefix": f"{level.prefix}{number}:", "frame": node, "above": level}
                level.inside[number] = cls.of(subgraphs[node["type"]], graph, **place)
        return level

    def source(self, number: int) -> Any:
        """What queues get for a link: id and output of the node that it comes from, or the value that is set on the
        subgraph's frame; None if the node's own value holds."""
        origin, slot = self.links[number]["origin_id"], self.links[number]["origin_slot"]
        if origin == ENTRY:
            outer = self.frame["inputs"][slot].get("link")
            if outer is not None:
                return self.above.source(outer)
            widgets = [i for i, entry in enumerate(self.frame["inputs"]) if "widget" in entry]
            return dict(zip(widgets, self.frame.get("widgets_values") or ())).get(slot)
        if origin in self.inside:
            inner = self.inside[origin]
            ends = {link["target_slot"]: n for n, link in inner.links.items() if link["target_id"] == EXIT}
            return inner.source(ends[slot])
        return [f"{self.prefix}{origin}", slot]

    def walk(self) -> Iterator[tuple[Level, dict[str, Any]]]:
        """All nodes that stand for themselves, each with its level."""
        for number, node in sorted(self.nodes.items()):
            if number in self.inside:
                yield from self.inside[number].walk()
            else:
                yield self, node


def refuse_muted(node: dict[str, Any]) -> None:
    if node.get("mode", 0) != 0:
        raise TwinError(f"{name_of(node)}: is muted or bypassed; a template's nodes all take part")


def name_of(node: dict[str, Any]) -> str:
    return f"node {node['id']} ({node.get('title') or node['type']})"


def inputs_of(schema: Schema) -> dict[str, list[Any]]:
    """All inputs in the order in which the front end shows them: name → [type, options]."""
    declared = schema["input"]
    return {name: [*spec, {}][:2] for kind in ("required", "optional") for name, spec in declared.get(kind, {}).items()}


def widget_names(schema: Schema) -> list[str]:
    """What stands in a node's ``widgets_values``, in order."""
    names = []
    for name, (kind, options) in inputs_of(schema).items():
        if not is_widget(kind, options):
            continue
        names.append(name)
        if has_control(name, kind, options):
            names.append(CONTROL)
    return names


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput")


def has_control(name: str, kind: Any, options: dict[str, Any]) -> bool:
    return bool(options.get(CONTROL, kind == "INT" and name in SEEDS))


def fit(graph: dict[str, Any], schemas: dict[str, Schema]) -> None:
    """Bring a graph's nodes to the host's schemas, in place: what is new gets its default, what is gone is dropped.

    Values and links stay with the names that the nodes' own inputs give them. Raises TwinError.
    """
    for part in parts(graph):
        fit_part(part, [node for node in part["nodes"] if not is_virtual(node, graph)], schemas)


def fit_part(part: dict[str, Any], nodes: list[dict[str, Any]], schemas: dict[str, Schema]) -> None:
    """Bring some nodes of one part of a graph to the host's schemas, in place. Raises TwinError."""
    for node in nodes:
        if node["type"] not in schemas:
            raise TwinError(f"{name_of(node)}: the host has no node type {node['type']}")
        schema, old = schemas[node["type"]], {i["name"]: i for i in node["inputs"]}
        had: list[str] = []
        for name in (i["name"] for i in node["inputs"] if "widget" in i):
            had += [name, CONTROL] if has_control(name, *inputs_of(schema).get(name, ("", {}))) else [name]
        values = dict(zip(had, node.get("widgets_values") or []))
        optional = schema["input"].get("optional", {})
        sockets, widgets = [], []
        for name, (kind, options) in inputs_of(schema).items():
            entry = {"name": name, "type": "COMBO" if isinstance(kind, list) else kind}
            entry["link"] = old.get(name, {}).get("link")
            if name in optional and not is_widget(kind, options):
                entry["shape"] = 7
            if is_widget(kind, options):
                entry["widget"] = {"name": name}
                choices = (kind if isinstance(kind, list) else options.get("options")) or [None]
                values.setdefault(name, options.get("default", choices[0]))
            (widgets if "widget" in entry else sockets).append(entry)
        node["inputs"] = sockets + widgets
        node["widgets_values"] = [values.get(name, "randomize") for name in widget_names(schema)]
        outputs = zip(schema["output_name"], schema["output"], schema["output_is_list"])
        links = [o["links"] for o in node["outputs"]]
        node["outputs"] = [
            {"name": name, "type": kind, "links": links[i] if i < len(links) else []} | ({"shape": 6} if many else {})
            for i, (name, kind, many) in enumerate(outputs)
        ]
        slots = {i["link"]: slot for slot, i in enumerate(node["inputs"]) if i["link"] is not None}
        for stored, link in zip(part["links"], links_of(part)):
            if link["target_id"] == node["id"]:
                if link["id"] not in slots:
                    raise TwinError(f"{name_of(node)}: the input of link {link['id']} is gone")
                stored["target_slot" if isinstance(stored, dict) else LINK.index("target_slot")] = slots[link["id"]]


def to_api(graph: dict[str, Any], schemas: dict[str, Schema]) -> dict[str, Any]:
    """The API format of a graph: node id → inputs by name, type and title. Raises TwinError."""
    twin = {}
    for level, node in Level.of(graph, graph).walk():
        if node["type"] in NOTES:
            continue
        if node["type"] not in schemas:
            raise TwinError(f"{name_of(node)}: the host has no node type {node['type']}")
        refuse_muted(node)
        schema = schemas[node["type"]]
        names, values = widget_names(schema), node.get("widgets_values") or []
        if len(names) != len(values):
            raise TwinError(
                f"{name_of(node)}: holds {len(values)} widget values, the host's node has {len(names)}: {names}"
            )
        inputs = {name: value for name, value in zip(names, values) if name != CONTROL}
        linked = {i["name"]: level.source(i["link"]) for i in node.get("inputs", ()) if i.get("link") is not None}
        twin[f"{level.prefix}{node['id']}"] = {
            "inputs": inputs | {name: source for name, source in linked.items() if source is not None},
            "class_type": node["type"],
            "_meta": {"title": node.get("title") or schema["display_name"]},
        }
    return twin


def twin_text(path: Path, schemas: dict[str, Schema]) -> str:
    """The text of the API twin of a workflow file."""
    try:
        twin = to_api(json.loads(path.read_text(encoding="utf-8")), schemas)
    except TwinError as e:
        raise TwinError(f"{path.name}: {e}") from e
    return json.dumps(twin, indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--host", default="http://127.0.0.1:8188", help="a running ComfyUI with this pack")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a twin is out of date")
    parser.add_argument("--fit", action="store_true", help="bring the templates to the host's nodes before")
    arguments = parser.parse_args()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{arguments.host}/object_info", timeout=60) as answer:
            schemas = json.load(answer)
    except OSError as e:
        print(f"no ComfyUI answers at {arguments.host} ({e}); start one with this pack installed", file=sys.stderr)
        return 2
    stale = 0
    for path in sorted(WORKFLOWS.glob("*.json")):
        twin = WORKFLOWS / "api" / path.name
        try:
            if arguments.fit and not arguments.check:
                graph = json.loads(path.read_text(encoding="utf-8"))
                fit(graph, schemas)
                path.write_text(json.dumps(graph, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            text = twin_text(path, schemas)
        except TwinError as e:
            print(e, file=sys.stderr)
            return 2
        if twin.exists() and twin.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if arguments.check:
            print(f"{twin.relative_to(WORKFLOWS.parent)} is out of date")
        else:
            twin.parent.mkdir(exist_ok=True)
            twin.write_text(text, encoding="utf-8")
            print(f"wrote {twin.relative_to(WORKFLOWS.parent)}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
