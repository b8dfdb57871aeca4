"""SD 1.5 and SDXL in the graph: what is trained, drawn and probed there is what the library makes of the base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from far_train.data.captions import Name
from far_train.evaluation.attention_focus import attention_maps, stretched
from far_train.mini.shipped import sample_photos
from far_train.models.apply import apply_weights
from far_train.models.attention_maps import supervised_layers
from far_train.models.families import FAMILIES, Family
from far_train.models.loading import load_base
from far_train.models.weights import FarWeights
from far_train.training.recipe import train
from far_train.training.run_folder import read_metrics
from far_train.training.settings import TrainConfig

from .comfy_server import ComfyServer, ExecutionFailed
from .graphs import node, tiny_base
from .photos import pictures
from .test_fusion import drawing_priors
from .test_training import balls, run_folder, training
from .tiny_weights import PROMPT, SIZE, TOKENS, applied, diffusers_configs, make_low_rank

OTHERS = pytest.mark.parametrize("family", [FAMILIES["sd15"], FAMILIES["sdxl"]], ids=["sd15", "sdxl"])
SETTINGS = {"low_rank_lr": 1e-3, "prior_batch_size": 1}
BASE = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}


def learning(comfy: ComfyServer, name: str, family: str, steps: int = 3, **more) -> dict:
    prompt = training(comfy, name, steps=steps, options=SETTINGS, **more)
    return prompt | {"1": tiny_base(family=family)}


@pytest.mark.parametrize(
    ("family", "prediction", "kind"),
    [
        ("sd15", "epsilon", "SD15"),
        ("sd21", "v_prediction", "SD20"),
        ("sd21", "epsilon", "SD20"),
        ("sdxl", "epsilon", "SDXL"),
    ],
)
def test_full_size_shapes_are_recognised(comfy: ComfyServer, family: str, prediction: str, kind: str):
    found = comfy.run({"1": node("FaRTest_FullSize", prediction=prediction, family=family)})["1"]["text"][0]
    assert found == kind


@OTHERS
def test_the_graph_learns_what_the_library_learns(comfy: ComfyServer, tmp_path: Path, family: Family):
    """The same base, read from ComfyUI's own file, and the same dataset: the same losses and the same weights."""
    name = f"learned-{family.key}"
    prompt = learning(comfy, name, family.key)
    prompt["7"] = node("FaRTest_SaveBase", **BASE, name=f"trained-{family.key}")
    outputs = comfy.run(prompt)
    assert len(outputs["6"]["images"]) == 3  # sample pictures of each concept, and of both
    base = load_base(comfy.folder("output") / f"trained-{family.key}.safetensors", config=diffusers_configs(family))
    config = TrainConfig.from_dict({**SETTINGS, "steps": 3, "batch_size": 1, "sample_every": 0, "device": "cpu"})
    about = json.loads((run_folder(comfy, name) / "run.json").read_text())["base"]
    assert about["fingerprint"] == base.fingerprint
    weights = train(base, balls(), config, tmp_path / "run")
    learned = FarWeights.load(run_folder(comfy, name) / "weights.safetensors")
    metrics = (read_metrics(folder / "metrics.jsonl") for folder in (run_folder(comfy, name), tmp_path / "run"))
    theirs, ours = ([m["loss"] for m in steps] for steps in metrics)
    assert theirs == pytest.approx(ours, rel=1e-3)
    assert learned.provenance.family == family.key
    assert learned.provenance.base_digest == weights.provenance.base_digest
    assert learned.shapes() == weights.shapes()
    for layer in weights.shapes():
        mine, host = weights.delta(layer).float(), learned.delta(layer).float()
        # Adam's first steps are signs of gradients, so that rounding shows in the smallest of them.
        assert float((host - mine).norm() / mine.norm()) < 0.05
    for token in weights.embeddings:
        for encoder in family.comfy_names:
            mine, host = weights.embeddings[token][encoder], learned.embeddings[token][encoder]
            assert torch.allclose(mine, host, atol=1e-3)


@OTHERS
def test_a_dry_run_tells_the_cost(comfy: ComfyServer, family: Family):
    entry = comfy.wait(comfy.queue(learning(comfy, f"dry-{family.key}", family.key, steps=30, dry_run=True)))
    text = entry["outputs"]["4"]["text"][0]
    assert "steps: 30," in text and "memory" in text
    assert not run_folder(comfy, f"dry-{family.key}").exists()


def test_all_k_and_v_of_sdxl_are_refused(comfy: ComfyServer):
    prompt = learning(comfy, "kv-sdxl", "sdxl")
    prompt["3"]["inputs"]["trainable"] = "kv"
    with pytest.raises(ExecutionFailed, match="node 4 .FaR_Train.*kv are 341 million parameters"):
        comfy.run(prompt)


def test_a_layer_that_sdxl_is_not_trained_with_is_refused(comfy: ComfyServer):
    """Set to −2, its own, CLIP Set Last Layer changes nothing; another one can't be trained with."""
    prompt = learning(comfy, "layer-sdxl", "sdxl", clip=["8", 0])
    prompt["8"] = node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-1)
    with pytest.raises(ExecutionFailed, match="CLIP stops at layer 3 of 3 of clip_l.*set it to -2"):
        comfy.run(prompt)
    comfy.run(learning(comfy, "layer-sdxl", "sdxl"))
    prompt["8"]["inputs"]["stop_at_clip_layer"] = -2
    comfy.run(prompt)
    assert "layer-sdxl is trained already" in comfy.log() and not run_folder(comfy, "layer-sdxl-2").exists()


def test_clip_skip_of_sd15_is_trained_with(comfy: ComfyServer):
    prompt = learning(comfy, "skip-sd15", "sd15", clip=["8", 0])
    prompt["8"] = node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-2)
    comfy.run(learning(comfy, "skip-sd15", "sd15"))
    comfy.run(prompt)
    losses = [read_metrics(run_folder(comfy, n) / "metrics.jsonl")[0]["loss"] for n in ("skip-sd15", "skip-sd15-2")]
    assert losses[0] != losses[1]


def test_zero_terminal_snr_is_trained_on(comfy: ComfyServer):
    """As in NoobAI's v-prediction model, whose MODEL samples so by itself."""
    prompt = learning(comfy, "ztsnr", "sdxl", model=["8", 0])
    prompt["1"] = tiny_base(family="sdxl", prediction="v_prediction")
    prompt["8"] = node("ModelSamplingDiscrete", model=["1", 0], sampling="v_prediction", zsnr=True)
    logged = len(comfy.log())
    comfy.run(prompt)
    about = json.loads((run_folder(comfy, "ztsnr") / "run.json").read_text())["base"]
    assert (about["prediction_type"], about["zero_terminal_snr"]) == ("v_prediction", True)
    log = comfy.log()[logged:]
    assert "noise schedule of its own" not in log and "MODEL is believed" not in log
    prompt["8"]["inputs"]["zsnr"] = False
    comfy.run(prompt)
    about = json.loads((run_folder(comfy, "ztsnr-2") / "run.json").read_text())["base"]
    assert "zero_terminal_snr" not in about


@OTHERS
def test_class_images_and_empty_scenes_are_drawn(comfy: ComfyServer, family: Family):
    prompt = drawing_priors(comfy, seed=20) | {"1": tiny_base(family=family.key)}
    scenes = {"scenes": "an empty beach | on the beach", "each": 2, "scene_seed": 0, "steps": 2}
    prompt["45"] = node("FaR_EmptyScenes", **BASE, **scenes, guidance=5.0, size=64)
    prompt["46"] = node("SaveImage", images=["45", 0], filename_prefix=f"scenes-{family.key}")
    outputs = comfy.run(prompt)
    assert "2 regularization images" in outputs["40"]["text"][0]
    first, second = pictures(comfy, outputs["46"])
    assert first.shape == second.shape == (64, 64, 3) and (first != second).any()


@OTHERS
def test_the_probes_maps_are_the_librarys(comfy: ComfyServer, saved: Callable[..., str], family: Family):
    """For SDXL of the supervised layers alone, though others have maps of their size."""
    path = comfy.folder("output") / f"probed-{family.key}.safetensors"
    comfy.run({"1": tiny_base(family=family.key), "2": node("FaRTest_SaveBase", **BASE, name=path.stem)})
    base = load_base(path, config=diffusers_configs(family))
    weights, timesteps = make_low_rank(base), (500, 250)
    prompt = applied(saved(weights), family=family.key)
    prompt |= {
        "4": node("FaR_MiniPhotos", subject="rex", count=1),
        "5": node("VAEEncode", pixels=["4", 0], vae=["1", 2]),
        "7": node("FaR_AttentionProbe", model=["3", 0], clip=["3", 1], latent=["5", 0], text=PROMPT,
                  concepts="\n".join([*TOKENS, "beach"]), when=", ".join(f"{1 - t / 999:.8f}" for t in timesteps),
                  probe_seed=3),
        "8": node("FaRTest_SaveMask", mask=["7", 1], name="family-maps"),
    }  # fmt: skip
    comfy.run(prompt)
    maps = load_file(comfy.folder("output") / "family-maps.safetensors")["mask"]
    vocabulary = apply_weights(weights, base)
    image = sample_photos("rex", 1)[0].image
    names = [*(Name("ball", token) for token in TOKENS), Name("beach")]
    ours = attention_maps(base, vocabulary, image, PROMPT, names, timestep=timesteps, noise_seed=3)
    for theirs, heat in zip(maps, ours, strict=True):
        assert float((theirs - stretched(heat, (SIZE, SIZE))).abs().max()) < 1e-3
    assert float((maps[0] - maps[1]).abs().max()) > 0.05
    chosen = supervised_layers(base.unet, 16, 16, modules=family.supervised_modules)
    everywhere = supervised_layers(base.unet, 16, 16, cells=4)
    assert (set(chosen) < set(everywhere)) == (family.key == "sdxl")
