#!/usr/bin/env python3
"""Open the workflow templates in a running ComfyUI's front end, check them there, and take their pictures.

    python -m pip install playwright pillow && python -m playwright install chromium
    python scripts/screenshot.py --host http://127.0.0.1:8188 --out /tmp/pictures
    python scripts/screenshot.py --host http://127.0.0.1:8188 --write --results    # the README's picture

Playwright is no requirement of the project; --browser takes an installed Chromium instead of Playwright's own.
With --results, the nodes show what the host's last successful run of the same template gave, so queue it before.
Leaves with status 1 if a template opens a dialog (missing nodes or models), or if a node is marked as faulty.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from api_twins import Level

REPOSITORY = Path(__file__).resolve().parents[1]
WORKFLOWS = REPOSITORY / "workflows"
README_PICTURE = {"2 Train two dogs": REPOSITORY / "docs" / "train-graph.jpg"}
PACK = "ComfyUI-FaR"  # the pack's folder in custom_nodes
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
LEFT, TOP, MARGIN = 70, 110, 24  # what the front end's bars cover, and the space around the graph, in pixels
README_WIDTH, README_BYTES = 1500, 250_000

# The front end's furniture that would stand before the graph.
SETTINGS = {
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "Comfy.TutorialCompleted": True,
}

BOUNDS = """() => {
    const boxes = [...app.graph._groups.map(g => [...g._bounding]),
                   ...app.graph._nodes.map(n => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30])];
    const [left, top] = [0, 1].map(i => Math.min(...boxes.map(b => b[i])));
    const [right, bottom] = [0, 1].map(i => Math.max(...boxes.map(b => b[i] + b[i + 2])));
    return [left, top, right - left, bottom - top];
}"""
LOOK_AT = """([x, y, scale]) => {
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset[0] = x;
    app.canvas.ds.offset[1] = y;
    app.canvas.setDirty(true, true);
}"""
READY = "() => window.app?.graph && window.app.extensionManager?.setting"
FAULTS = """() => [
    ...[...document.querySelectorAll('.p-dialog')].map(d => 'a dialog: ' + d.innerText.slice(0, 200)),
    ...[app.graph, ...app.graph.subgraphs.values()].flatMap(graph => graph._nodes)
        .filter(n => n.has_errors || !LiteGraph.registered_node_types[n.type])
        .map(n => `node ${n.id} (${n.title}) is marked as faulty`)]"""
SHOW_RESULT = """([node, output]) => app.api.dispatchCustomEvent(
    'executed', {node, display_node: node, output, prompt_id: 'shown'})"""


def get_json(url: str) -> Any:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as answer:
        return json.load(answer)


def last_results(host: str, graph: dict[str, Any]) -> dict[str, Any]:
    """Node id → what it showed in the last successful run of a workflow whose nodes have the same ids and titles."""
    titles = {f"{level.prefix}{node['id']}": node.get("title") for level, node in Level.of(graph, graph).walk()}
    for entry in reversed(list(get_json(f"{host}/history").values())):
        prompt = entry["prompt"][2]
        if entry["status"]["status_str"] == "success" and all(
            titles.get(node_id) == node.get("_meta", {}).get("title") for node_id, node in prompt.items()
        ):
            return entry["outputs"]
    return {}


@contextmanager
def front_end(host: str, browser: str | None = None) -> Iterator[tuple[Any, list[str]]]:
    """A Playwright page of a host's front end, set up and without furniture; a list gets what goes wrong in it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play, tempfile.TemporaryDirectory() as profile:
        context = play.chromium.launch_persistent_context(
            profile, executable_path=browser, args=list(FLAGS), viewport={"width": 1600, "height": 1000}
        )
        page, crashes = context.pages[0], []
        page.on("pageerror", lambda error: crashes.append(f"an error in the page: {error}"))
        # Before the page is there: a new host would open its template browser by itself.
        page.request.post(f"{host}/api/settings", data=SETTINGS, fail_on_status_code=True)
        page.goto(host, wait_until="domcontentloaded", timeout=120_000)
        page.wait_for_function(READY, timeout=120_000)
        page.wait_for_timeout(5000)  # extensions and the host's node types are set up after the graph exists
        yield page, crashes
        context.close()


def open_template(page: Any, host: str, name: str) -> tuple[dict[str, Any], list[str]]:
    """Open a template as the template browser does; returns its graph, and what the front end finds wrong with it."""
    graph = get_json(f"{host}/api/workflow_templates/{PACK}/{urllib.parse.quote(name)}.json")
    page.evaluate("([graph, name]) => app.loadGraphData(graph, true, true, name)", [graph, name])
    page.wait_for_timeout(2000)
    return graph, page.evaluate(FAULTS)


def photograph(page: Any, host: str, name: str, scale: float, with_results: bool) -> tuple[bytes, list[str]]:
    """Open a template; returns a PNG of the graph, and what is wrong with it."""
    graph, faults = open_template(page, host, name)
    if with_results:
        for node_id, output in last_results(host, graph).items():
            page.evaluate(SHOW_RESULT, [node_id, output])
    left, top, width, height = page.evaluate(BOUNDS)
    size = {"width": round(width * scale) + 2 * MARGIN, "height": round(height * scale) + 2 * MARGIN}
    page.set_viewport_size({"width": size["width"] + LEFT, "height": size["height"] + TOP})
    page.wait_for_timeout(1000)
    page.evaluate(LOOK_AT, [(LEFT + MARGIN) / scale - left, (TOP + MARGIN) / scale - top, scale])
    page.wait_for_timeout(4000)  # pictures arrive one by one, and text fields follow the canvas
    return page.screenshot(clip={"x": LEFT, "y": TOP, **size}), faults


def as_jpeg(png: bytes, width: int, most: int) -> bytes:
    """A JPEG of a screenshot, at most ``width`` pixels wide and ``most`` bytes large."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((width, 2 * width), Image.Resampling.LANCZOS)
    for quality in range(90, 20, -5):
        written = io.BytesIO()
        picture.save(written, "JPEG", quality=quality, optimize=True, progressive=True)
        if written.tell() <= most:
            break
    return written.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="http://127.0.0.1:8188", help="a running ComfyUI with this pack")
    parser.add_argument("--out", type=Path, help="folder for PNG files of the whole graphs")
    parser.add_argument("--write", action="store_true", help="write the README's picture")
    parser.add_argument("--results", action="store_true", help="show the results of the last run of each template")
    parser.add_argument("--scale", type=float, default=1.0, help="zoom of the pictures (default 1)")
    parser.add_argument("--template", metavar="NAME", help="only the template of this name (default: all)")
    parser.add_argument("--browser", help="path of a Chromium")
    arguments = parser.parse_args()
    host, faulty = arguments.host.rstrip("/"), False
    with front_end(host, arguments.browser) as (page, crashes):
        for path in sorted(WORKFLOWS.glob(f"{arguments.template or '*'}.json")):
            png, faults = photograph(page, host, path.stem, arguments.scale, arguments.results)
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                (arguments.out / f"{path.stem}.png").write_bytes(png)
            if arguments.write and path.stem in README_PICTURE:
                README_PICTURE[path.stem].write_bytes(as_jpeg(png, README_WIDTH, README_BYTES))
            faults += crashes
            crashes.clear()
            faulty |= bool(faults)
            print(f"{path.stem}: {'; '.join(faults) or 'in order'}")
    return int(faulty)


if __name__ == "__main__":
    sys.exit(main())
