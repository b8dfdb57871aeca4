#!/usr/bin/env python3
"""Make locales/en/nodeDefs.json from the nodes' schemas, and say what the other languages lack.

    python scripts/locales.py --host http://127.0.0.1:8188            # a running ComfyUI with this pack
    python scripts/locales.py --host http://127.0.0.1:8188 --check    # write nothing, only say what is out of date

English is only ever written in the nodes. In another language, new texts arrive in English, and texts whose node or
input is gone are dropped; the script names both, and a text whose English changed has to be looked at by a person.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCALES = Path(__file__).resolve().parents[1] / "locales"
FILE = "nodeDefs.json"
SPECIAL = re.compile(r"[{}@|]")  # the front end's message format gives these a meaning of their own

Tree = dict[str, Any]  # node id → display_name, description, inputs → name, tooltip; outputs by number → the same


def escaped(text: str) -> str:
    """A text as the front end's message format (vue-i18n) wants it."""
    return SPECIAL.sub(lambda m: f"{{'{m[0]}'}}", text)


def definitions(schemas: dict[str, Any], prefix: str = "FaR_") -> Tree:
    """What the pack's nodes say, from the host's /object_info."""
    tree = {}
    for node_id, schema in sorted(schemas.items()):
        if not node_id.startswith(prefix):
            continue
        entry = {"display_name": escaped(schema["display_name"]), "description": escaped(schema["description"])}
        declared = {**schema["input"].get("required", {}), **schema["input"].get("optional", {})}
        for name, spec in declared.items():
            options = spec[1] if len(spec) > 1 else {}
            about = {"name": escaped(options.get("display_name") or name), "tooltip": escaped(options["tooltip"])}
            entry.setdefault("inputs", {})[name.replace(".", "_")] = about
        for i, (name, tooltip) in enumerate(zip(schema["output_name"], schema["output_tooltips"])):
            entry.setdefault("outputs", {})[str(i)] = {"name": escaped(name), "tooltip": escaped(tooltip)}
        tree[node_id] = entry
    return tree


def texts(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text of a tree with its path."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from texts(value, (*path, key))
        else:
            yield (*path, key), value


def merged(english: Tree, other: Tree) -> Tree:
    """The shape of ``english`` with the texts of ``other`` where it has them."""
    return {
        key: merged(value, other.get(key, {})) if isinstance(value, dict) else other.get(key, value)
        for key, value in english.items()
    }


def read(language: str) -> Tree:
    path = LOCALES / language / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--host", default="http://127.0.0.1:8188", help="a running ComfyUI with this pack")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is out of date")
    arguments = parser.parse_args()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{arguments.host}/object_info", timeout=60) as answer:
            english = definitions(json.load(answer))
    except OSError as e:
        print(f"no ComfyUI answers at {arguments.host} ({e}); start one with this pack installed", file=sys.stderr)
        return 2
    stale = 0
    for language in sorted({"en", *(p.name for p in LOCALES.iterdir())}):
        before = read(language)
        after = english if language == "en" else merged(english, before)
        old, new = dict(texts(before)), dict(texts(after))
        for path in sorted(new.keys() - old.keys()):
            print(f"{language}: new: {'.'.join(path)}: {new[path]}")
        for path in sorted(old.keys() - new.keys()):
            print(f"{language}: gone: {'.'.join(path)}")
        if language == "en":
            changed = sorted(path for path in old.keys() & new.keys() if old[path] != new[path])
            for path in changed:
                print(f"changed, look at the other languages: {'.'.join(path)}: {new[path]}")
        if before == after:
            continue
        stale += 1
        if not arguments.check:
            text = json.dumps(after, indent=2, ensure_ascii=False) + "\n"
            (LOCALES / language / FILE).write_text(text, encoding="utf-8")
            print(f"wrote locales/{language}/{FILE}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
