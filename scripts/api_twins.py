#!/usr/bin/env python3
"""Make workflows/api/*.json (API format, what queues take) from workflows/*.json (what people edit in the front end).

    python scripts/api_twins.py --host http://127.0.0.1:8188            # a running ComfyUI with this pack
    python scripts/api_twins.py --host http://127.0.0.1:8188 --check    # write nothing, only say what is out of date
    python scripts/api_twins.py --host http://127.0.0.1:8188 --widen    # first add inputs that nodes have gained since

The front end's format keeps the widgets' values without their names; the names come from the running host.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
NOTES = ("Note", "MarkdownNote")  # live in the front end alone
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
CONTROL = "control_after_generate"  # a widget that the front end adds behind a seed; queues don't know it

Schema = dict[str, Any]  # one node's entry of the host's /object_info


class TwinError(Exception):
    """A workflow that can't be turned into API format; the message names the node."""


def inputs_of(schema: Schema) -> dict[str, list[Any]]:
    """All inputs in the order in which the front end shows them: name → [type, options]."""
    declared = schema["input"]
    return {name: [*spec, {}][:2] for kind in ("required", "optional") for name, spec in declared.get(kind, {}).items()}


def widget_names(schema: Schema) -> list[str]:
    """What stands in a node's ``widgets_values``, in order."""
    names = []
    for name, (kind, options) in inputs_of(schema).items():
        if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
            continue
        names.append(name)
        if options.get(CONTROL, kind == "INT" and name in ("seed", "noise_seed")):
            names.append(CONTROL)
    return names


def to_api(graph: dict[str, Any], schemas: dict[str, Schema]) -> dict[str, Any]:
    """The API format of a graph: node id → inputs by name, type and title. Raises TwinError."""
    sources = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    twin = {}
    for node in sorted(graph["nodes"], key=lambda n: n["id"]):
        if node["type"] in NOTES:
            continue
        where = f"node {node['id']} ({node.get('title') or node['type']})"
        if node["type"] not in schemas:
            raise TwinError(f"{where}: the host has no node type {node['type']}")
        if node.get("mode", 0) != 0:
            raise TwinError(f"{where}: is muted or bypassed; a template's nodes all take part")
        schema = schemas[node["type"]]
        names, values = widget_names(schema), node.get("widgets_values") or []
        if len(names) != len(values):
            raise TwinError(f"{where}: holds {len(values)} widget values, the host's node has {len(names)}: {names}")
        inputs = {name: value for name, value in zip(names, values) if name != CONTROL}
        linked = {i["name"]: sources[i["link"]] for i in node.get("inputs", ()) if i.get("link") is not None}
        twin[str(node["id"])] = {
            "inputs": inputs | linked,
            "class_type": node["type"],
            "_meta": {"title": node.get("title") or schema["display_name"]},
        }
    return twin


def widen(graph: dict[str, Any], schemas: dict[str, Schema]) -> list[str]:
    """Give a graph's nodes the inputs that their types have gained, unconnected and at their defaults; says which.

    New inputs are last in their schemas, so that links, which know inputs by place, and the values before stay right.
    """
    added = []
    for node in graph["nodes"]:
        schema = schemas.get(node["type"])
        if schema is None:
            continue
        declared, widgets = inputs_of(schema), widget_names(schema)
        known = [entry["name"] for entry in node.get("inputs", ())]
        for name in [n for n in declared if n not in known]:
            kind = declared[name][0]
            entry = {"name": name, "type": "COMBO" if isinstance(kind, list) else kind, "link": None}
            entry |= {"widget": {"name": name}} if name in widgets else {"shape": 7}
            node.setdefault("inputs", []).append(entry)
            added.append(f"{node.get('title') or node['type']}: {name}")
        values = node.setdefault("widgets_values", []) if widgets else []
        for name in widgets[len(values) :]:
            kind, options = declared[name]
            choices = kind if isinstance(kind, list) else options.get("options", [None])
            values.append(options.get("default", choices[0]))
    return added


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
    parser.add_argument("--widen", action="store_true", help="add the inputs that nodes have gained, at their defaults")
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
        if arguments.widen:
            graph = json.loads(path.read_text(encoding="utf-8"))
            if added := widen(graph, schemas):
                path.write_text(json.dumps(graph, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                print(f"{path.name}: added {', '.join(added)}")
        try:
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
