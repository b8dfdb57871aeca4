"""Heat maps in the real host: they are the library's, and looking changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from far_train.data.captions import Name
from far_train.evaluation.attention_focus import attention_maps, focus, stretched
from far_train.mini.shipped import SIZE, SUBJECTS, sample_photos, small_base
from far_train.models.apply import apply_weights
from far_train.models.weights import FarWeights

from .comfy_server import ComfyServer, ExecutionFailed
from .graphs import node
from .photos import pictures
from .test_mini import drawn, mini, random_weights

TEXT = "a photo of a <rex-dog> dog and a <max-dog> dog, on the beach"
TIMESTEPS = (500, 250)
WHEN = ", ".join(f"{1 - t / 999:.8f}" for t in TIMESTEPS)


@pytest.fixture(scope="module")
def weights(comfy: ComfyServer) -> FarWeights:
    weights = random_weights(small_base())
    weights.save(comfy.folder("models/far") / "probed.safetensors")
    return weights


def looking(**inputs: Any) -> dict[str, Any]:
    """Mini checkpoint → FaR_ApplyWeights → FaR_AttentionProbe (7) on a photo; its maps in output/maps, its report."""
    return {
        "1": mini(),
        "2": node("FaR_LoadWeights", file="probed.safetensors"),
        "3": node("FaR_ApplyWeights", model=["1", 0], clip=["1", 1], weights=["2", 0], strength=1.0),
        "4": node("FaR_MiniPhotos", subject="rex", count=1),
        "5": node("VAEEncode", pixels=["4", 0], vae=["1", 2]),
        "7": node("FaR_AttentionProbe", **{"model": ["3", 0], "clip": ["3", 1], "latent": ["5", 0], "text": TEXT,
                  "when": WHEN, "probe_seed": 3} | inputs),
        "8": node("FaRTest_SaveMask", mask=["7", 1], name="maps"),
        "9": node("PreviewAny", source=["7", 2]),
    }  # fmt: skip


def maps_of(comfy: ComfyServer, prompt: dict[str, Any]) -> tuple[Tensor, list[list[str]]]:
    """The maps [n, H, W], and the rows of the report."""
    table = comfy.run(prompt)["9"]["text"][0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return load_file(comfy.folder("output") / "maps.safetensors")["mask"], rows


def test_the_maps_are_the_librarys(comfy: ComfyServer, weights: FarWeights):
    maps, (head, _, *rows) = maps_of(comfy, looking(concepts="<rex-dog>\n<max-dog>, beach"))
    base = small_base()
    vocabulary = apply_weights(weights, base)
    names = [*(name for name, _ in list(SUBJECTS.values())[:2]), Name("beach")]
    image = sample_photos("rex", 1)[0].image
    ours = attention_maps(base, vocabulary, image, TEXT, names, timestep=TIMESTEPS, noise_seed=3)
    assert [row[1] for row in rows] == ["<rex-dog>", "<max-dog>", "beach"]
    for theirs, row, heat in zip(maps, rows, ours, strict=True):
        assert float((theirs - stretched(heat, (SIZE, SIZE))).abs().max()) < 1e-3
        assert float(row[head.index("mean %")]) == pytest.approx(100 * float(heat.mean()), abs=0.011)
        assert float(row[head.index("peak %")]) == pytest.approx(100 * float(heat.max()), abs=0.011)
    # The comparison can fail: other words, another noise level and another noise give other maps.
    assert float((maps[0] - maps[1]).abs().max()) > 0.05
    for change in ({"when": "0.9"}, {"probe_seed": 4}):
        assert float((maps_of(comfy, looking(concepts="beach", **change))[0][0] - maps[2]).abs().max()) > 0.01


def test_tokens_are_found_by_themselves_and_counted_against_masks(comfy: ComfyServer, weights: FarWeights):
    """Without words the applied tokens are taken; a mask for each gives the attention on both."""
    left = torch.zeros(SIZE, SIZE)
    left[:, : SIZE // 2] = 1
    prompt = looking(masks=["12", 0]) | {
        "10": node("SolidMask", value=0.0, width=SIZE, height=SIZE),
        "11": node("SolidMask", value=1.0, width=SIZE // 2, height=SIZE),
        "12": node("MaskComposite", destination=["10", 0], source=["11", 0], x=0, y=0, operation="add"),
    }
    maps, (head, _, *rows) = maps_of(comfy, prompt)
    base = small_base()
    vocabulary = apply_weights(weights, base)
    names = [name for name, _ in list(SUBJECTS.values())[:2]]
    image = sample_photos("rex", 1)[0].image
    ours = attention_maps(base, vocabulary, image, TEXT, names, timestep=TIMESTEPS, noise_seed=3)
    assert [row[1] for row in rows] == [name.token for name in names]
    for row, heat in zip(rows, ours, strict=True):
        expected = focus(heat, left)
        assert float(row[head.index("inside %")]) == pytest.approx(100 * expected.inside, abs=0.011)
        assert float(row[head.index("inside / outside")]) == pytest.approx(expected.ratio, rel=0.02)
        assert row[head.index("hottest cell inside")] == ("yes" if expected.hottest_inside else "no")


def test_sampling_before_and_after_is_the_same_to_the_last_bit(comfy: ComfyServer, weights: FarWeights):
    prompt = looking()
    drawing = {k: prompt[k] for k in "123"} | drawn(20, ["3", 0], ["3", 1], TEXT, "probed")
    (before,) = pictures(comfy, comfy.run(drawing)["25"])
    comfy.run(prompt)
    entry = comfy.wait(comfy.queue(drawing))
    (after,) = pictures(comfy, entry["outputs"]["25"])
    assert "3" in comfy.cached(entry) and "23" not in comfy.cached(entry)  # the same MODEL, sampled with anew
    assert (before == after).all()


def test_it_looks_through_what_other_packs_put_into_cross_attention(comfy: ComfyServer, weights: FarWeights):
    """An image prompt changes what later layers see, and so the maps; it still runs, and may be applied twice."""
    plain, _ = maps_of(comfy, looking())
    behind = looking(model=["31", 0]) | {
        "30": node("FaRTest_ImagePrompt", model=["3", 0], weight=0.5),
        "31": node("FaRTest_ImagePrompt", model=["30", 0], weight=0.5),
    }
    patched, _ = maps_of(comfy, behind)
    assert float((patched - plain).abs().max()) > 0.01
    before = looking()
    before["30"] = node("FaRTest_ImagePrompt", model=["1", 0], weight=1.0)
    before["3"]["inputs"]["model"] = ["30", 0]
    first, _ = maps_of(comfy, before)
    assert torch.allclose(first, patched, atol=1e-4)  # the same patch on either side of FaR Apply Weights


def test_a_picture_per_concept_and_latent(comfy: ComfyServer, weights: FarWeights):
    prompt = looking(latent=["32", 0], vae=["1", 2], concepts="dog") | {
        "32": node("RepeatLatentBatch", samples=["5", 0], amount=2),
        "33": node("SaveImage", images=["7", 0], filename_prefix="heat"),
    }
    maps, (_, _, *rows) = maps_of(comfy, prompt)
    assert [row[0] for row in rows] == ["1", "2"] and maps.shape == (2, SIZE, SIZE)
    assert not torch.equal(maps[0], maps[1])  # each picture has its own noise
    alone, _ = maps_of(comfy, looking(concepts="dog"))
    assert torch.allclose(maps[0], alone[0], atol=1e-4)
    assert [p.shape for p in pictures(comfy, comfy.run(prompt)["33"])] == [(SIZE, SIZE, 3)] * 2


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"concepts": "cat"}, "'cat' isn't in the text"),
        ({"text": "a photo of a dog"}, "holds none of the tokens"),
        ({"when": "later"}, "when: 'later' can't be read"),
        ({"when": "0.5, 2"}, "must hold numbers from 0"),
        ({"latent": "a picture"}, "latent: expected a LATENT"),
        ({"latent": ["12", 0]}, "latent: has 16 channels, not 4"),
        ({"sigmas": "many"}, "sigmas: expected SIGMAS of another node, got str"),
        ({"masks": ["10", 0]}, "masks: got 3 masks for 2 concepts on 1 picture"),
    ],
)
def test_what_cannot_be_looked_at_is_named(comfy: ComfyServer, weights: FarWeights, inputs: dict, message: str):
    three = {
        "10": node("ImageToMask", image=["11", 0], channel="red"),
        "11": node("RepeatImageBatch", image=["4", 0], amount=3),
        "12": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
    }
    with pytest.raises(ExecutionFailed, match="node 7 .FaR_AttentionProbe") as failed:
        comfy.run(looking(**inputs) | three)
    assert message in str(failed.value)
