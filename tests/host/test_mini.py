"""The embedded small model in the real host: its MODEL, CLIP and VAE, and the full pipeline on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from far_train.data.dataset import DatasetFolder
from far_train.data.images import to_pil
from far_train.data.subjects import SubjectExtractor
from far_train.mini.shipped import FUSING, SIZE, SUBJECTS, sample_photos, small_base, small_sam
from far_train.models.base import BaseModel
from far_train.models.conditioning import TextConditioner, plain_vocabulary
from far_train.models.layers import kv_weights
from far_train.models.weights import FarWeights, Provenance
from far_train.training.recipe import train
from far_train.training.run_folder import read_metrics
from far_train.training.settings import TrainConfig

from .comfy_server import ComfyServer, ExecutionFailed, PromptRejected
from .find_host import REPO
from .graphs import defaults, encoded, node, predicted
from .photos import concept, photo_folder, pictures
from .tiny_weights import TOLERANCE, difference, our_result

PROMPTS = (
    "a photo of a red cat with a hat and a blue robot, on the beach",  # words of its world
    "dog",  # nearly all padding
    "",
    "an unheard-of Zeppelin (no, two!) above " + "the moon and " * 15,  # spelt words, brackets, near the limit
)
OPTIONS = {"prior_batch_size": 1, "sample_steps": 1, "attention_cells": 8}


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return small_base()


def mini() -> dict[str, Any]:
    return node("FaR_MiniCheckpoint")


def written(comfy: ComfyServer, name: str) -> dict[str, Tensor]:
    return load_file(comfy.folder("output") / f"{name}.safetensors")


def drawn(first: int, model: list, clip: list, text: str, prefix: str, steps: int = 2, count: int = 1) -> dict:
    """Stock nodes from ``first`` on: text → KSampler → VAEDecode → SaveImage, on the VAE of node 1."""
    positive, negative, empty, sampled, decoded, saved = (str(first + i) for i in range(6))
    return {
        positive: encoded(text, clip),
        negative: encoded("", clip),
        empty: node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=count),
        sampled: node("KSampler", model=model, positive=[positive, 0], negative=[negative, 0], latent_image=[empty, 0],
                      seed=1, steps=steps, cfg=5.0, sampler_name="ddim", scheduler="normal", denoise=1.0),
        decoded: node("VAEDecode", vae=["1", 2], samples=[sampled, 0]),
        saved: node("SaveImage", images=[decoded, 0], filename_prefix=prefix),
    }  # fmt: skip


def random_weights(base: BaseModel) -> FarWeights:
    """Weights for two dogs that nobody trained, with deltas half as large as the matrices that they change."""
    generator = torch.Generator().manual_seed(5)
    names = [name for name, _ in list(SUBJECTS.values())[:2]]
    return FarWeights(
        embeddings={
            n.token: {"clip_h": torch.randn(2, base.unet.config.cross_attention_dim, generator=generator)}
            for n in names
        },
        deltas={
            k: (0.5 * w.std() * torch.randn(w.shape, generator=generator)).half()
            for k, w in kv_weights(base.unet).items()
        },
        provenance=Provenance(
            family=base.family.key,
            base_digest=base.digest,
            prediction_type=base.prediction_type,
            nouns={n.token: n.noun for n in names},
            steps=1,
            size=SIZE,
        ),
    )


# ---- FaR_MiniCheckpoint


def test_text_and_prediction_equal_those_of_diffusers(comfy: ComfyServer, base: BaseModel):
    prompt = {"1": mini()}
    for i, text in enumerate(PROMPTS):
        # Brackets weigh in the host, so that those of a prompt are escaped there.
        escaped = text.replace("(", "\\(").replace(")", "\\)")
        prompt |= {f"1{i}": encoded(escaped, ["1", 1]), f"2{i}": predicted(f"mini-{i}", ["1", 0], [f"1{i}", 0])}
    comfy.run(prompt)
    vocabulary = plain_vocabulary(base)
    for i, text in enumerate(PROMPTS):
        theirs = written(comfy, f"mini-{i}")
        with torch.no_grad():
            prompts = [vocabulary.tokenize(text)] * len(theirs["latents"])
            context = TextConditioner(base).encode(prompts, (SIZE, SIZE)).context
            prediction = base.unet(theirs["latents"], theirs["timesteps"], context).sample
        assert difference(context, theirs["context"]) < TOLERANCE, text
        assert difference(prediction, theirs["prediction"]) < TOLERANCE, text
    first, second = (written(comfy, f"mini-{i}")["context"] for i in (0, 1))
    assert difference(first, second) > 0.01  # the words do reach the encoder


def test_the_vae_equals_that_of_diffusers(comfy: ComfyServer, base: BaseModel):
    comfy.run({"1": mini(), "2": node("FaRTest_Pixels", vae=["1", 2], name="mini-pixels")})
    theirs = written(comfy, "mini-pixels")
    with torch.no_grad():
        decoded = base.vae.decode(theirs["latents"]).sample / 2 + 0.5
        latents = base.vae.encode(theirs["pixels"].permute(0, 3, 1, 2) * 2 - 1).latent_dist.mean
    assert difference(decoded.clamp(0, 1).permute(0, 2, 3, 1), theirs["decoded"]) < TOLERANCE
    assert difference(latents, theirs["encoded"]) < TOLERANCE


def test_a_modifier_token_after_applied_weights(comfy: ComfyServer, base: BaseModel):
    weights = random_weights(base)
    weights.save(comfy.folder("models/far") / "mini.safetensors")
    text = "a photo of a <rex-dog> dog and a <Max-Dog> dog, on the beach"
    logged = len(comfy.log())
    comfy.run(
        {
            "1": mini(),
            "2": node("FaR_LoadWeights", file="mini.safetensors"),
            "3": node("FaR_ApplyWeights", model=["1", 0], clip=["1", 1], weights=["2", 0], strength=1.0),
            "4": encoded(text, ["3", 1]),
            "5": predicted("mini-applied", ["3", 0], ["4", 0]),
        }
    )
    assert "another base" not in comfy.log()[logged:]
    theirs = written(comfy, "mini-applied")
    ours, prediction = our_result(small_base(), weights, theirs, text)
    assert difference(ours.context, theirs["context"]) < TOLERANCE
    assert difference(prediction, theirs["prediction"]) < TOLERANCE


def test_stock_nodes_draw_with_it(comfy: ComfyServer):
    prompt = {"1": mini()} | drawn(10, ["1", 0], ["1", 1], PROMPTS[0], "mini", count=2)
    first, second = pictures(comfy, comfy.run(prompt)["15"])
    assert first.shape == second.shape == (SIZE, SIZE, 3)
    assert first.std() > 2 and np.abs(first.astype(int) - second).mean() > 1


# ---- FaR_MiniPhotos


@pytest.mark.parametrize(("subject", "count"), [("rex", 3), ("dot", 1)])
def test_sample_photos_are_the_librarys(comfy: ComfyServer, subject: str, count: int):
    prompt = {
        "1": node("FaR_MiniPhotos", subject=subject, count=count),
        "2": node("SaveImage", images=["1", 0], filename_prefix=f"mini-{subject}"),
        "3": node("PreviewAny", source=["1", 1]),
    }
    outputs = comfy.run(prompt)
    expected = sample_photos(subject, count)
    for picture, photo in zip(pictures(comfy, outputs["2"]), expected, strict=True):
        assert picture.shape == (SIZE, SIZE, 3)
        assert np.abs(picture.astype(int) - np.asarray(to_pil(photo.image))).max() <= 1
    assert outputs["3"]["text"] == [p.name for p in expected]
    assert SUBJECTS[subject][1].noun in outputs["1"]["text"][0] and outputs["1"]["images"]


def test_an_unknown_subject_is_refused(comfy: ComfyServer):
    with pytest.raises(PromptRejected, match="FaR_MiniPhotos.*subject"):
        comfy.queue({"1": node("FaR_MiniPhotos", subject="rover", count=1), "2": node("PreviewImage", images=["1", 0])})


# ---- the built-in SAM


def test_the_built_in_sam_finds_what_the_library_finds(comfy: ComfyServer):
    name = next(
        option for option in comfy.object_info()["FaR_LoadSAM"]["input"]["required"]["model_name"][1]["options"]
        if "built in" in option
    )  # fmt: skip
    prompt = {
        "1": node("FaR_MiniPhotos", subject="rex", count=2),
        "2": node("FaR_LoadSAM", model_name=name),
        "3": node("FaR_ExtractSubject", images=["1", 0], names=["1", 1], sam_model=["2", 0],
                  box_format="x0, y0, x1, y1", points="", min_area=0.0),
        "4": node("MaskToImage", mask=["3", 1]),
        "5": node("SaveImage", images=["4", 0], filename_prefix="mini-mask"),
    }  # fmt: skip
    masks = pictures(comfy, comfy.run(prompt)["5"])
    extractor = SubjectExtractor(small_sam())
    for mask, photo in zip(masks, sample_photos("rex", 2), strict=True):
        assert np.mean((mask[..., 0] > 127) != (extractor.extract(photo).mask.numpy() > 0.5)) < 0.01


def test_a_rough_mask_is_a_hint_for_sam(comfy: ComfyServer):
    """As one paints it in the mask editor: much too wide, and SAM finds the outline in it."""
    find = {"box_format": "x0, y0, x1, y1", "points": "", "min_area": 0.0, "sam_model": ["2", 0]}
    prompt = {
        "1": node("FaR_MiniPhotos", subject="rex", count=1),
        "2": node("FaR_LoadSAM", model_name="FaR mini SAM (built in)"),
        "3": node("FaR_ExtractSubject", images=["1", 0], **find),
        "4": node("GrowMask", mask=["3", 1], expand=8, tapered_corners=False),
    }
    for place, use in (("5", "as they are"), ("6", "as hints for SAM")):
        prompt[place] = node("FaR_ExtractSubject", images=["1", 0], masks=["4", 0], use_masks=use, **find)
    for place in ("3", "5", "6"):
        prompt |= {f"1{place}": node("MaskToImage", mask=[place, 1])}
        prompt |= {f"2{place}": node("SaveImage", images=[f"1{place}", 0], filename_prefix=f"hint-{place}")}
    outputs = comfy.run(prompt)
    exact, rough, found = (pictures(comfy, outputs[f"2{n}"])[0][..., 0] > 127 for n in ("3", "5", "6"))
    assert rough.sum() > 1.5 * exact.sum()  # kept as it is
    assert (found & exact).sum() / (found | exact).sum() > 0.8
    del prompt["6"]["inputs"]["sam_model"]
    with pytest.raises(ExecutionFailed, match="node 6 .*use_masks: 'as hints for SAM' needs a sam_model"):
        comfy.run(prompt)


# ---- the full pipeline


def line(comfy: ComfyServer, name: str, **training: Any) -> dict[str, Any]:
    """Photos of two dogs → subjects → concepts → class pictures → fusion → training (32) and its folder (33)."""
    prompt = {"1": mini(), "2": node("FaR_LoadSAM", model_name="FaR mini SAM (built in)")}
    before: dict[str, Any] = {}
    for i, subject in enumerate(("rex", "max")):
        photos, cut, concept = (str(number + i) for number in (10, 12, 14))
        prompt |= {
            photos: node("FaR_MiniPhotos", subject=subject, count=2),
            cut: node("FaR_ExtractSubject", images=[photos, 0], names=[photos, 1], sam_model=["2", 0],
                      box_format="x0, y0, x1, y1", points="", min_area=0.0),
            concept: node("FaR_Concept", images=[cut, 0], masks=[cut, 1], token=f"<{subject}-dog>", noun="dog",
                          invert_mask=False, **before),
        }  # fmt: skip
        before = {"concepts": [concept, 0]}
    base = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    return prompt | {
        "20": node("FaR_ClassPrior", **base, **before, sam_model=["2", 0], count=2, prior_seed=0, steps=2, guidance=5.0,
                   size=0),
        "21": node("FaR_ConceptFusion", **{**defaults(comfy, "FaR_ConceptFusion"), "size": SIZE, "count": 4},
                   **before, prior=["20", 0]),
        "31": node("FaR_TrainOptions", **{**defaults(comfy, "FaR_TrainOptions"), **OPTIONS}),
        "32": node("FaR_Train", **base, options=["31", 0],
                   **{"dataset": ["21", 0], "steps": 2, "batch_size": 1, "train_seed": 0, "name": name} | training),
        "33": node("PreviewAny", source=["32", 3]),
    }  # fmt: skip


def test_the_graph_learns_on_it_what_the_library_learns(comfy: ComfyServer, base: BaseModel, tmp_path: Path):
    """FaR_Train reads MODEL, CLIP and VAE back: weights, words and prediction type must survive both ways."""
    prompt = line(comfy, "mini-equal", dataset=["34", 0])
    before = {n: prompt[n] for n in prompt if int(n) < 30}
    before["22"] = node("FaR_SaveDataset", dataset=["21", 0], name="mini-equal")
    comfy.run(before)  # saved first, since pixels in files have fewer digits than those in memory
    prompt = {n: prompt[n] for n in ("1", "31", "32", "33")} | {"34": node("FaR_LoadDataset", folder="mini-equal")}
    run = Path(comfy.run(prompt)["33"]["text"][0])
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))["base"]
    assert about["prediction_type"] == base.prediction_type == "v_prediction"
    dataset = DatasetFolder(comfy.folder("output") / "far" / "datasets" / "mini-equal")
    config = TrainConfig(**OPTIONS, steps=2, batch_size=1, sample_every=0, device="cpu")
    train(small_base(), dataset, config, tmp_path / "run")
    theirs, ours = read_metrics(run / "metrics.jsonl"), read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [m["loss"] for m in theirs] == pytest.approx([m["loss"] for m in ours], rel=1e-3)


def test_from_photos_to_pictures_of_both(comfy: ComfyServer):
    prompt = line(comfy, "mini-line")
    prompt["40"] = node("FaR_ApplyWeights", model=["1", 0], clip=["1", 1], weights=["32", 0], strength=1.0)
    text = "a photo of a <rex-dog> dog and a <max-dog> dog, on the beach"
    prompt |= drawn(50, ["40", 0], ["40", 1], text, "mini-both")
    outputs = comfy.run(prompt)
    (picture,) = pictures(comfy, outputs["55"])
    assert picture.shape == (SIZE, SIZE, 3) and picture.std() > 2
    class_pictures = Path(outputs["20"]["text"][0].rpartition(" in ")[2])
    assert [Image.open(p).size for p in sorted(class_pictures.glob("dog/????.png"))] == [(SIZE, SIZE)] * 2
    assert f"4 pictures of {SIZE} px" in outputs["21"]["text"][0]
    run = Path(outputs["33"]["text"][0])
    assert [m["step"] for m in read_metrics(run / "metrics.jsonl")] == [1, 2]
    learned = FarWeights.load(run / "weights.safetensors")
    assert list(learned.embeddings) == ["<rex-dog>", "<max-dog>"]
    assert any(learned.delta(name).any() for name in learned.shapes())


def test_the_small_ones_fuse_as_the_demo_does(comfy: ComfyServer):
    """What suits the small world is in the templates too, since the nodes' defaults are for Stable Diffusion 2.1."""
    for path in [next((REPO / "workflows" / "api").glob(f"{number} *.json")) for number in (0, 6)]:
        prompt = json.loads(path.read_text(encoding="utf-8"))
        (fusion,) = (i for i, entry in prompt.items() if entry["class_type"] == "FaR_ConceptFusion")
        inputs = prompt[fusion]["inputs"]
        for name in ("concepts", "prior", "backgrounds", "background_captions"):
            del inputs[name]
        photo_folder(comfy, "as_the_demo", sizes={"a": (128, 128)})
        prompt = {
            "1": node("FaR_LoadPhotos", folder="as_the_demo", max_side=1024),
            "2": concept(["1", 0], ["1", 1]),
            "3": node("FaR_ConceptFusion", **inputs | {"concepts": ["2", 0], "backgrounds": ["1", 0]}),
            "4": node("FaR_SaveDataset", dataset=["3", 0], name=f"fused as {path.stem[0]}"),
        }
        comfy.run(prompt)
        dataset = comfy.base / "output/far/datasets" / f"fused as {path.stem[0]}" / "dataset.json"
        made = json.loads(dataset.read_text(encoding="utf-8"))["about"]["fusion"]
        made["background_weights"] = {k: share for k, share in made["background_weights"].items() if share}
        assert made == FUSING.replace(count=inputs["count"]).to_dict()
