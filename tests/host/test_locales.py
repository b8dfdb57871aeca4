"""English texts are the nodes' own; the host serves all languages."""

from __future__ import annotations

from far_train.cli.comfy_client import RunningHost

from .comfy_server import ComfyServer
from .find_host import REPO, script

locales = script("locales")


def test_english_is_made_from_the_schemas(comfy: ComfyServer):
    """Every node and every input has a text, and none is left of what is gone."""
    made = locales.definitions(comfy.object_info())
    assert made == locales.read("en"), "run scripts/locales.py on a running ComfyUI"


def test_the_host_serves_them(comfy: ComfyServer):
    served = comfy.get("/i18n")
    for language in ("en", "zh"):
        nodes = served[language]["nodeDefs"]
        assert {k: v for k, v in nodes.items() if k.startswith("FaR_")} == locales.read(language)


def test_the_host_serves_the_help_pages_of_both_languages(comfy: ComfyServer):
    host = RunningHost(comfy.url)
    for node in locales.read("en"):
        for page in (f"{node}.md", f"{node}/zh.md"):
            served = host.ask(f"/extensions/ComfyUI-FaR/docs/{page}")
            assert served == (REPO / "web" / "docs" / page).read_bytes()
