"""The pack in a real browser: every template opens, the small one is run by its button, and mistakes are told."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from ..test_workflows import inside, overlap
from .comfy_server import ComfyServer
from .find_host import REPO, script

locales = script("locales")
TEMPLATES = sorted((REPO / "workflows").glob("*.json"))
SMALL = TEMPLATES[0]
MINUTES = 60_000  # milliseconds
LOWERED = {
    "Photos of Rex": {"count": 2},
    "Photos of Max": {"count": 2},
    "Regularization images": {"count": 2, "steps": 2},
    "Empty places": {"each": 1, "steps": 2},
    "Photos and composites": {"composites": 4},
    "Settings for a small model": {"prior_batch_size": 1, "sample_steps": 2},
    "Learn Rex and Max": {"steps": 2, "batch_size": 1},
    "Draw": {"steps": 2},
}

PROMPT = "async () => (await app.graphToPrompt()).output"
ALL = "const all = [app.graph, ...app.graph.subgraphs.values()].flatMap(graph => graph._nodes);"
SET_WIDGETS = (
    f"values => {{ {ALL}"
    """ for (const node of all)
    for (const [name, value] of Object.entries(values[node.title] ?? {}))
        node.widgets.find(w => w.name === name).value = value; }"""
)
LOADED_PICTURES = """title => { const node = app.canvas.graph._nodes.find(n => n.title === title);
    return (node.imgs ?? []).filter(i => i.complete && i.naturalWidth).map(i => [i.naturalWidth, i.naturalHeight]); }"""
BOXES = """() => app.canvas.graph._nodes.map(
    n => [n.title, n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]])"""
FRAMES = """() => app.canvas.graph._groups.map(({title, _bounding: [x, y, w, h]}) => [title, x, y, x + w, y + h])"""
SEE_ALL = """() => { const [x, y] = [0, 1].map(i => Math.min(...app.canvas.graph._nodes.map(n => n.pos[i])));
    Object.assign(app.canvas.ds, {scale: 0.3, offset: [300 - x, 400 - y]}); app.canvas.setDirty(true, true); }"""
ENTER = """title => { const node = app.graph._nodes.find(n => n.title === title);
    app.canvas.openSubgraph(node.subgraph, node); }"""
TRANSLATED = """keys => { const {$t} = document.querySelector('#vue-app').__vue_app__.config.globalProperties;
    return Object.fromEntries(keys.map(key => [key, $t(key)])); }"""
CONNECT = """([from, to, input]) => { const [a, b] = [from, to].map(kind => LiteGraph.createNode(kind));
    [a, b].forEach(node => app.graph.add(node));
    const link = a.connect(0, b, b.inputs.findIndex(i => i.name === input));
    [a, b].forEach(node => app.graph.remove(node));
    return link != null; }"""
DIALOGS = "() => [...document.querySelectorAll('.p-dialog, .p-toast-message')].map(d => d.innerText)"


@dataclass
class FrontEnd:
    """The front end of the shared host in a browser, with what went wrong in the page so far."""

    url: str
    page: Any
    crashes: list[str]
    screenshot: Any

    def open(self, template: Path) -> list[str]:
        _, faults = self.screenshot.open_template(self.page, self.url, template.stem)
        return [*faults, *self.crashes]

    def run(self) -> None:
        self.page.get_by_role("button", name="Run", exact=True).first.click()

    def dialogs(self) -> str:
        return "\n".join(self.page.evaluate(DIALOGS))


@pytest.fixture(scope="module")
def front_end(comfy: ComfyServer) -> Iterator[FrontEnd]:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if importlib.util.find_spec("playwright") is None or browser is None:
        pytest.skip("no Chromium, or no playwright in the Python of the tests (python -m pip install playwright)")
    screenshot = script("screenshot")
    with screenshot.front_end(comfy.url, browser) as (page, crashes):
        yield FrontEnd(comfy.url, page, crashes, screenshot)


def apart(page: Any) -> bool:
    """Whether no node on the canvas lies on another one."""
    return not any(overlap(a, b) for (_, *a), (_, *b) in combinations(page.evaluate(BOXES), 2))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_templates_open(front_end: FrontEnd, template_files, template: Path):
    """No dialog about missing nodes or models, no faulty node, none across a group's edge; and the front end would
    queue just the API twin."""
    front_end.page.evaluate("() => app.refreshComboInNodes()")
    assert front_end.open(template) == []
    for (node, *box), (group, *frame) in product(front_end.page.evaluate(BOXES), front_end.page.evaluate(FRAMES)):
        assert inside(box, frame) or not overlap(box, frame), (node, group)
    queued = front_end.page.evaluate(PROMPT)
    twin = json.loads((template.parent / "api" / template.name).read_text(encoding="utf-8"))
    assert {k: (n["class_type"], n["inputs"]) for k, n in queued.items()} == {
        k: (n["class_type"], n["inputs"]) for k, n in twin.items()
    }


def test_the_small_one_runs_by_its_button(front_end: FrontEnd):
    """Pictures and words appear on the nodes, which then neither overlap nor hide anything."""
    assert front_end.open(SMALL) == []
    page = front_end.page
    page.evaluate(SET_WIDGETS, LOWERED)
    page.evaluate(SEE_ALL)  # the front end loads the pictures of nodes that are on screen
    front_end.run()
    there = f"([title, count]) => ({LOADED_PICTURES})(title).length === count"
    page.wait_for_function(there, arg=["Rex and Max", 4], timeout=2 * MINUTES)
    assert page.evaluate(LOADED_PICTURES, "Rex and Max") == [[128, 128]] * 4
    for title, count in {"Samples while it learned": 3, "Composites": 4, "Loss curve": 1}.items():
        page.wait_for_function(there, arg=[title, count])  # made before, yet it may load after
    assert apart(page)
    # On the subgraph's frame; and as text, though the front end would read a token as HTML.
    assert "2 concepts: <rex-dog> dog, <max-dog> dog" in page.inner_text("body")
    page.evaluate(ENTER, "Photos and composites")
    page.evaluate(SEE_ALL)
    for title in ("Photos of Rex", "Cut out Max", "Name Rex", "Regularization images", "Training pictures"):
        page.wait_for_function(there, arg=[title, 1])
    assert apart(page)
    assert front_end.dialogs() == "" and front_end.crashes == []


def test_why_a_node_is_refused_stands_on_it(front_end: FrontEnd):
    """Where the rest of the graph is valid, the front end itself gives the refused node a red frame and no words."""
    assert front_end.open(SMALL) == []
    page = front_end.page
    page.evaluate(SET_WIDGETS, LOWERED | {"Photos and composites": {"Max: token": "max dog"}})
    front_end.run()
    page.get_by_text("token: 'max dog' is not a placeholder token (write it as <max-dog>)").wait_for(timeout=MINUTES)
    marked = page.evaluate("() => app.graph._nodes.filter(n => n.has_errors).map(n => n.title)")
    assert marked == ["Photos and composites"]  # the subgraph of Name Max


def test_an_error_while_running_is_shown_in_words(front_end: FrontEnd):
    assert front_end.open(SMALL) == []
    page = front_end.page
    wrong = {"Learn Rex and Max": LOWERED["Learn Rex and Max"] | {"sample_prompt": "a photo of a <rx-dog> dog"}}
    page.evaluate(SET_WIDGETS, LOWERED | wrong)
    page.evaluate(SEE_ALL)  # the front end hides what stands on nodes that are off screen
    front_end.run()
    # On the node itself: newer front ends keep an error's own words behind a button.
    message = page.get_by_text("sample_prompt: there is no <rx-dog> in the dataset; it has: <rex-dog>, <max-dog>")
    message.first.wait_for(timeout=MINUTES)
    page.keyboard.press("Escape")


@pytest.mark.parametrize("sender", ["FaRTest_BoundingBox", "FaRTest_BBox"])
def test_boxes_of_either_type_can_be_drawn_to_the_node(front_end: FrontEnd, sender: str):
    """The front end refuses a link of the wrong type without a word."""
    assert front_end.page.evaluate(CONNECT, [sender, "FaR_ExtractSubject", "box"])
    assert not front_end.page.evaluate(CONNECT, [sender, "FaR_ExtractSubject", "masks"])


@pytest.mark.parametrize("language", ["en", "zh"])
def test_names_and_tooltips_in_other_languages(front_end: FrontEnd, language):
    """Every text as the front end shows it: its message format must not eat or break any of them."""
    page = front_end.page
    page.evaluate("language => app.extensionManager.setting.set('Comfy.Locale', language)", language)
    page.wait_for_timeout(3000)
    expected = {
        ".".join(("nodeDefs", *path)): re.sub(r"\{'(.)'\}", r"\1", text)
        for path, text in locales.texts(locales.read(language))
    }
    shown = page.evaluate(TRANSLATED, list(expected))
    page.evaluate("() => app.extensionManager.setting.set('Comfy.Locale', 'en')")
    assert shown == expected
