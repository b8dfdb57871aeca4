"""What nodes say, and that it goes to the client that queued the prompt and to nobody else."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from PIL import Image

from .comfy_server import ComfyServer, PromptRejected
from .graphs import defaults, node
from .listener import Listener
from .photos import SIZES, concept, photo_folder, preview_of
from .test_training import training

STRANGER = "stranger"
MISSING = "folder: there is no folder 'nowhere'"


def photos(folder: str, node_id: str = "1", max_side: int = 1024) -> dict:
    return {
        node_id: node("FaR_LoadPhotos", folder=folder, max_side=max_side),
        "80": node("PreviewImage", images=[node_id, 0]),
    }


@contextmanager
def listeners(comfy: ComfyServer) -> Iterator[tuple[Listener, Listener]]:
    """The client that queues by default, and another browser."""
    with Listener(comfy) as own, Listener(comfy, STRANGER) as other:
        yield own, other


@contextmanager
def long_run(comfy: ComfyServer, own: Listener, name: str) -> Iterator[None]:
    """A training of the default client that has begun and runs meanwhile."""
    prompt_id = comfy.queue(training(comfy, name, steps=100_000))
    try:
        own.wait_until(lambda: own.texts)
        yield
        assert prompt_id not in comfy.get(f"/history/{prompt_id}"), "the training ended too early"
    finally:
        comfy.cancel(prompt_id)


def nothing_seen(listener: Listener) -> bool:
    """Whether a client was sent neither texts, pictures nor progress of others."""
    listener.catch_up()
    return not listener.binaries and not any(kind == "progress" for kind, _ in listener.events)


def refused(comfy: ComfyServer, prompt: dict, client_id: str | None = None) -> str:
    with pytest.raises(PromptRejected) as answer:
        comfy.queue(prompt, client_id)
    return str(answer.value)


def test_texts_and_pictures_go_to_the_client_that_queued(comfy: ComfyServer):
    photo_folder(comfy, "mine")
    with listeners(comfy) as (own, other):
        comfy.run(photos("mine", "28:13"))  # as the front end queues node 13 in the subgraph of node 28
        comfy.run(training(comfy, "mine", steps=4, options={"sample_every": 2}))
        own.catch_up()
        assert {(shown_on, "3 photos, 3 of them with a mask") for shown_on in ("28:13", "28")} <= set(own.texts)
        assert ("4", "encoding (5 pictures)") in own.said
        assert nothing_seen(other)


def test_each_of_two_runs_in_the_queue_speaks_to_its_own_client(comfy: ComfyServer):
    photo_folder(comfy, "waiting")
    with listeners(comfy) as (own, other):
        with long_run(comfy, own, "running"):
            second = comfy.queue(photos("waiting", "14"), STRANGER)
        comfy.wait(second)
        for listener in (own, other):
            listener.catch_up()
        assert {node_id for node_id, _ in own.texts} == {"4"}
        assert other.texts == [("14", "3 photos, 3 of them with a mask")]


def test_a_prompt_without_a_client_speaks_to_nobody(comfy: ComfyServer):
    photo_folder(comfy, "nobody")
    with listeners(comfy) as (own, other):
        for prompt in (photos("nobody"), training(comfy, "nobody", options={"sample_every": 1})):
            entry = comfy.wait(comfy.queue(prompt, ""))
            assert entry["status"]["status_str"] == "success"
        assert "photos, 3 of them with a mask" in comfy.log()  # the log has it
        assert nothing_seen(own) and nothing_seen(other)


def test_a_refusal_is_shown_to_the_client_that_asked_while_another_runs(comfy: ComfyServer):
    photo_folder(comfy, "right")
    wholly, partly = photos("nowhere", "15"), photos("right") | {"16": node("FaR_LoadPhotos", folder="nowhere")}
    partly["16"]["inputs"]["max_side"] = 64
    partly["17"] = node("PreviewImage", images=["16", 0])
    with listeners(comfy) as (own, other):
        with long_run(comfy, own, "undisturbed"):
            for prompt in (wholly, partly):
                assert MISSING in refused(comfy, prompt, STRANGER)
            assert MISSING in refused(comfy, wholly, "")
        for listener in (own, other):
            listener.catch_up()
        assert [(n, t.split(" in ")[0]) for n, t in other.texts] == [("15", MISSING), ("16", MISSING)]
        assert {node_id for node_id, _ in own.texts} == {"4"}


def test_an_error_stands_on_its_node_in_the_browser_that_queued(comfy: ComfyServer):
    """Also on nodes that show nothing else; and its name is short."""
    (comfy.folder("input/unreadable") / "1.png").touch()
    nothing_learned = defaults(comfy, "FaR_TrainOptions") | {"embedding_lr": 0.0, "low_rank_lr": 0.0}
    options = {"32": node("FaR_TrainOptions", **nothing_learned), "33": node("PreviewAny", source=["32", 0])}
    cases = [(photos("unreadable", "31"), "31", "FaR.PhotoError"), (options, "32", "FaR.ConfigError")]
    with listeners(comfy) as (own, other):
        for prompt, node_id, kind in cases:
            (error,) = comfy.errors(comfy.wait(comfy.queue(prompt)))
            assert (error.node_id, error.kind) == (node_id, kind)
            own.catch_up()
            assert own.texts[-1] == (node_id, error.message)
        assert nothing_seen(other)


def test_a_cancel_is_no_error(comfy: ComfyServer):
    with Listener(comfy) as own:
        with long_run(comfy, own, "no-error"):
            pass
        own.catch_up()
        assert not any("Interrupt" in text for _, text in own.texts)


def test_a_refusal_is_not_shown_to_the_client_that_asked_before(comfy: ComfyServer):
    """Requests that share a connection, as behind a proxy, don't share what they say."""
    with listeners(comfy) as (own, other):
        connection = http.client.HTTPConnection("127.0.0.1", comfy.port, timeout=60)
        for body in ({"client_id": STRANGER}, {}, {"client_id": ["no text"]}, {"client_id": None}):
            connection.request("POST", "/prompt", json.dumps({"prompt": photos("nowhere")} | body))
            answer = json.loads(connection.getresponse().read())
            assert MISSING in answer["node_errors"]["1"]["errors"][0]["details"]
        connection.close()
        assert nothing_seen(own)
        other.catch_up()
        assert len(other.texts) == 1


def test_masks_of_whole_pictures_and_masks_for_photos_are_told(comfy: ComfyServer):
    """As the host's own folder loader sends them: *.mask.png among the photos."""
    folder = photo_folder(comfy, "doubtful")
    Image.new("L", SIZES["b"][::-1], 255).save(folder / "b.mask.png")
    (folder / "d.png").write_bytes((folder / "a.mask.png").read_bytes())
    (folder / "d.mask.png").write_bytes((folder / "a.mask.png").read_bytes())
    prompt = {
        "1": node("FaR_LoadPhotos", folder="doubtful", max_side=1024),
        "2": concept(["1", 0], ["1", 1]),
        "3": preview_of(),
        "4": node("FaR_ExtractSubject", images=["1", 0], masks=["1", 1], names=["1", 2], points="", min_area=0.03,
                  box_format="x0, y0, x1, y1"),
        "5": node("FaR_PriorFromImages", images=["1", 0], masks=["1", 1], noun="disc", invert_mask=False),
        "6": node("PreviewImage", images=["5", 1]),
    }  # fmt: skip
    outputs = comfy.run(prompt)
    labels = {"1": ("b", "d"), "2": ("photo 2", "photo 4"), "4": ("photo 2 (b)", "photo 4 (d)")}
    for node_id, (whole, drawn) in (labels | {"5": labels["2"]}).items():
        first, second, _ = outputs[node_id]["text"][0].splitlines()
        if node_id == "4":  # which leaves out what can't be a subject's mask
            assert first == f"skipped: {whole}: the mask covers 100.00% of the frame, more than max_area (95.00%)"
        else:
            assert first == f"{whole}: the mask covers more than 95% of the picture; all of it counts as the subject"
        assert second == f"{drawn}: has only two gray values; is it a mask and not a photo?"
