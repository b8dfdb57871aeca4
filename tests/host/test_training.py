"""Training in the graph: what it makes, what it leaves alone, and that nothing is trained twice or lost."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from torch import nn

from far_train.data.concepts import ClassPicture, Concept
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.models.layers import kv_layers, kv_weights
from far_train.models.loading import load_base
from far_train.models.weights import FarWeights
from far_train.training.recipe import train
from far_train.training.run_folder import read_metrics
from far_train.training.settings import TrainConfig

from .comfy_server import ComfyServer, ExecutionFailed
from .find_host import Host
from .graphs import defaults, encoded, node, predicted
from .listener import NODE_TEXT, PREVIEW, Listener
from .tiny_weights import diffusers_configs

QUICK = {"prior_batch_size": 1, "sample_steps": 1, "sample_every": 1000}


def training(
    comfy: ComfyServer, name: str, steps: int = 2, train_seed: int = 0, options: dict | None = None, **more
) -> dict:
    """Tiny base and two balls → FaR_Train → curve and samples."""
    chosen = {**defaults(comfy, "FaR_TrainOptions"), **QUICK, **(options or {})}
    inputs = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "dataset": ["2", 0], "options": ["3", 0]}
    inputs |= {"steps": steps, "batch_size": 1, "train_seed": train_seed, "name": name}
    return {
        "1": node("FaRTest_TinyCheckpoint", weights_seed=0, prediction="v_prediction", res_blocks=2),
        "2": node("FaRTest_Dataset", count=3, fusion_seed=0),
        "3": node("FaR_TrainOptions", **chosen),
        "4": node("FaR_Train", **inputs | more),
        "5": node("PreviewImage", images=["4", 1]),
        "6": node("PreviewImage", images=["4", 2]),
    }


def run_folder(comfy: ComfyServer, name: str) -> Path:
    return comfy.base / "output" / "far" / name


def steps_of(folder: Path) -> list[int]:
    return [m["step"] for m in read_metrics(folder / "metrics.jsonl")]


def state_of(folder: Path) -> dict[str, int]:
    """Every file of a folder with the time of its last change."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def cancel_after_a_checkpoint(comfy: ComfyServer, prompt: dict, folder: Path) -> dict:
    """Queue, wait for the first checkpoint, press cancel; returns the history entry."""
    prompt_id = comfy.queue(prompt)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/checkpoint-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.1)
    return comfy.cancel(prompt_id)


def test_a_training_gives_pictures_and_a_finished_run(comfy: ComfyServer):
    prompt = training(comfy, "first", sample_prompt="a <red-ball> ball\n\n a <blue-ball> ball ")
    prompt["7"] = node("FaR_SaveWeights", weights=["4", 0], name="first", export_lora=False, export_embeddings=False,
                       lora_rank=0)  # fmt: skip
    outputs = comfy.run(prompt)
    curve = Image.open(comfy.file(outputs["5"]["images"][0]))
    assert sum(n > 0 for n in curve.convert("L").histogram()) > 10  # lines and letters, not an empty canvas
    assert [Image.open(comfy.file(i)).size for i in outputs["6"]["images"]] == [(128, 128)] * 2
    folder = run_folder(comfy, "first")
    assert steps_of(folder) == [1, 2]
    kept = FarWeights.load(comfy.base / "models" / "far" / "first.safetensors")
    run = FarWeights.load(folder / "weights.safetensors")
    assert kept.provenance == run.provenance
    assert kept.digest() == run.digest() and any(run.delta(name).any() for name in run.shapes())


def test_progress_and_pictures_are_seen_while_it_trains(comfy: ComfyServer):
    with Listener(comfy) as seen:
        comfy.run(training(comfy, "watched", steps=4, options={"sample_every": 2}))
    progress = [(d["value"], d["max"]) for kind, d in seen.events if kind == "progress" and d["node"] == "4"]
    assert (5, 5) in progress  # the pictures encoded, and then the steps, of which newer hosts leave some out
    steps = [value for value, of in progress if of == 4]
    assert steps == sorted(steps) and {2, 4} <= set(steps)
    assert [kind for kind, _ in seen.binaries].count(PREVIEW) >= 2
    picture = next(payload for kind, payload in seen.binaries if kind == PREVIEW)
    assert b"JFIF" in picture[:2000]
    assert any(kind == NODE_TEXT and b"encoding (5 pictures)" in text for kind, text in seen.binaries)
    told = [text for node_id, text in seen.said if node_id == "4"]
    assert told[0] == "encoding (5 pictures)"  # and not that it has started, or succeeded, before the first step
    assert all(line.startswith(("encoding", "step ")) for line in told)


def test_a_training_is_checked_at_its_end(comfy: ComfyServer):
    """By the oracle, which needs no SAM. A run that is loaded again still says what it was found to be."""
    for sample_steps, beginning in ((1, "checked is trained\n"), (2, "checked is trained already: loaded from ")):
        options = {"check_with": "FaR mini oracle (built in)", "sample_steps": sample_steps}
        with Listener(comfy) as seen:
            comfy.run(training(comfy, "checked", steps=1, options=options))
            seen.catch_up()
        told = [text for node_id, text in seen.texts if node_id == "4"][-1]
        assert told.startswith(beginning)
        assert [re.sub(r" \(.+\)", "", line) for line in told.splitlines()[1:]] == [
            f"{who}: right in 0 of 4" for who in ("together", "<red-ball> alone", "<blue-ball> alone")
        ]
    folder = run_folder(comfy, "checked")
    assert (folder / "check.json").is_file() and Image.open(folder / "check.jpg").width > 1000


def test_step_rate_time_left_and_memory_are_told(comfy: ComfyServer):
    with Listener(comfy) as seen:
        comfy.run(training(comfy, "told", steps=40))
    told = [payload.decode(errors="replace") for kind, payload in seen.binaries if kind == NODE_TEXT]
    line = next(text for text in told if "step " in text)
    assert re.search(r"step \d+ of 40, loss \d\.\d+, [\d.]+ (steps/s|s/step), \d+ s left$", line)  # no memory on a CPU
    assert [kind for kind, _ in seen.binaries].count(PREVIEW) >= 1  # the curve, without any sample pictures


def test_a_dry_run_refuses_what_a_training_would(comfy: ComfyServer):
    """Also where the images that it tries out are not at fault: here it is the last one's caption."""
    comfy.run({"2": training(comfy, "")["2"], "8": node("FaR_SaveDataset", dataset=["2", 0], name="long")})
    folder = comfy.folder("output") / "far" / "datasets" / "long"
    path = folder / "composites" / "0002.txt"
    path.write_text(path.read_text().strip() + ", very" * 80)
    prompt = training(comfy, "dry-long", dry_run=True) | {"2": node("FaR_LoadDataset", folder="long")}
    with pytest.raises(ExecutionFailed, match="0002.txt.*shorten it"):
        comfy.run(prompt)


def test_a_dry_run_tells_the_cost_and_trains_nothing(comfy: ComfyServer):
    prompt = training(comfy, "dry", steps=30, dry_run=True, options={"sample_every": 10})
    prompt["7"] = node("FaR_SaveWeights", weights=["4", 0], name="dry", export_lora=False, export_embeddings=False,
                       lora_rank=0)  # fmt: skip
    entry = comfy.wait(comfy.queue(prompt))
    assert entry["status"]["status_str"] == "success" and set(entry["outputs"]) == {"4"}  # nothing behind it ran
    lines = entry["outputs"]["4"]["text"][0].splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "pictures to encode", "steps", "sample pictures", "in all", "memory"
    ]  # fmt: skip
    assert "encode: 5," in lines[0] and "steps: 30," in lines[1] and "pictures: 9," in lines[2]
    assert not run_folder(comfy, "dry").exists()
    comfy.run(training(comfy, "dry", steps=30, dry_run=False))
    assert "7" in comfy.wait(comfy.queue(prompt))["outputs"]  # what is trained already costs nothing


def test_a_training_goes_on_from_given_weights_as_another_run(comfy: ComfyServer):
    comfy.run(training(comfy, "start", options={"low_rank_lr": 1e-3}))
    start = training(comfy, "start", options={"low_rank_lr": 1e-3})
    prompt = training(comfy, "start", continue_from=["14", 0])
    prompt |= {"14": start["4"], "3": start["3"]}
    comfy.run(prompt)
    first, on = (FarWeights.load(run_folder(comfy, n) / "weights.safetensors") for n in ("start", "start-2"))
    about = [json.loads((run_folder(comfy, n) / "run.json").read_text()) for n in ("start", "start-2")]
    assert "continue_from" not in about[0] and about[1]["continue_from"] == first.digest()
    for token in first.embeddings:  # two steps away from the start, and not from nothing
        assert 0 < float((on.embeddings[token]["clip_h"] - first.embeddings[token]["clip_h"]).norm()) < 0.5


def test_memory_is_given_back_however_a_training_ends(comfy: ComfyServer):
    def live_models() -> str:
        return comfy.run({"1": node("FaRTest_LiveModels")})["1"]["text"][0]

    comfy.run(training(comfy, "memory"))
    assert live_models() == "0"
    folder = run_folder(comfy, "memory-cancelled")
    prompt = training(comfy, "memory-cancelled", steps=500, options={"save_every": 1})
    cancel_after_a_checkpoint(comfy, prompt, folder)
    assert live_models() == "0"
    for checkpoint in folder.glob("checkpoints/*.safetensors"):
        checkpoint.write_bytes(b"damaged")
    with pytest.raises(ExecutionFailed, match="node 4 .FaR_Train.*checkpoints are damaged"):
        comfy.run(prompt)
    assert live_models() == "0"


@pytest.mark.parametrize("trainable", ["kv", "attention"])
def test_the_graph_learns_what_the_library_learns(comfy: ComfyServer, tmp_path: Path, trainable: str):
    """The same base, read from ComfyUI's own file, and the same dataset: the same losses and the same weights."""
    settings = {"trainable": trainable, "kv_lr": 1e-3, "low_rank_lr": 1e-3, "prior_batch_size": 1}
    prompt = training(comfy, f"in-graph-{trainable}", steps=3, options=settings)
    prompt["7"] = node("FaRTest_SaveBase", model=["1", 0], clip=["1", 1], vae=["1", 2], name="trained-on")
    comfy.run(prompt)
    folder = run_folder(comfy, f"in-graph-{trainable}")
    base = load_base(comfy.folder("output") / "trained-on.safetensors", config=diffusers_configs())
    config = TrainConfig.from_dict({**settings, "steps": 3, "batch_size": 1, "sample_every": 0, "device": "cpu"})
    weights = train(base, balls(), config, tmp_path / "run")

    theirs, ours = read_metrics(folder / "metrics.jsonl"), read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [m["loss"] for m in theirs] == pytest.approx([m["loss"] for m in ours], rel=1e-3)
    learned = FarWeights.load(folder / "weights.safetensors")
    assert learned.provenance.base_digest == weights.provenance.base_digest
    assert learned.shapes() == weights.shapes()
    for name in weights.shapes():
        ours, theirs = weights.delta(name).float(), learned.delta(name).float()
        # Adam's first steps are signs of gradients, so that rounding shows in the smallest of them.
        assert float((theirs - ours).norm() / ours.norm()) < 0.05


def balls() -> ConceptFusion:
    """The test pack's dataset, made here."""

    def disc(colour):
        rows, columns = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
        mask = ((rows - 48) ** 2 + (columns - 48) ** 2 < 28.8**2).float()
        return mask[..., None] * torch.tensor(colour) + (1 - mask[..., None]) * 0.5, mask

    colours = {"<red-ball>": (0.9, 0.1, 0.1), "<blue-ball>": (0.1, 0.1, 0.9)}
    concepts = [Concept(t, "ball", *((part,) for part in disc(c))) for t, c in colours.items()]
    priors = [ClassPicture("ball", *disc((0.1, 0.8, 0.3 * i))) for i in range(2)]
    return ConceptFusion(concepts, priors, (), FusionConfig(size=128, count=3))


def test_model_clip_and_vae_are_left_as_they_were(comfy: ComfyServer):
    """Pictures drawn with the very same objects before and after a training are equal to the last bit."""
    loader = training(comfy, "untouched")["1"]

    def drawing(name: str) -> dict:
        return {
            "1": loader,
            "10": encoded("a <red-ball> ball", ["1", 1]),
            "11": predicted(name, ["1", 0], ["10", 0]),
            "12": node("EmptyLatentImage", width=128, height=128, batch_size=1),
            "13": node("KSampler", model=["1", 0], positive=["10", 0], negative=["10", 0], latent_image=["12", 0],
                       seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0),
            "14": node("VAEDecode", vae=["1", 2], samples=["13", 0]),
            "15": node("SaveImage", images=["14", 0], filename_prefix=name),
        }  # fmt: skip

    before = comfy.run(drawing("before-training"))
    comfy.run(training(comfy, "untouched"))
    entry = comfy.wait(comfy.queue(drawing("after-training")))
    assert "1" in comfy.cached(entry) and "13" not in comfy.cached(entry)  # the same base, drawn with anew
    pictures = [Image.open(comfy.file(o["15"]["images"][0])) for o in (before, entry["outputs"])]
    assert ImageChops.difference(*pictures).getbbox() is None
    tensors = [load_file(comfy.folder("output") / f"{n}-training.safetensors") for n in ("before", "after")]
    assert torch.equal(tensors[0]["context"], tensors[1]["context"])
    assert torch.equal(tensors[0]["prediction"], tensors[1]["prediction"])


def test_the_same_training_is_never_done_twice_even_after_a_restart(host: Host):
    with ComfyServer(host) as comfy:
        comfy.run(training(comfy, "once"))
        folder = run_folder(comfy, "once")
        Image.new("RGB", (64, 64)).save(folder / "samples" / "step-best.png")  # the user's
        before = state_of(comfy.base / "output" / "far")
        # Other sample prompts don't change what is learned, but make the host execute the node again.
        again = comfy.run(training(comfy, "once", sample_prompt="a ball"))
        assert "once is trained already" in comfy.log()
        assert len(again["6"]["images"]) == 3
        comfy.restart()
        comfy.run(training(comfy, "once"))
        assert "once is trained already" in comfy.log()
        assert state_of(comfy.base / "output" / "far") == before
        assert steps_of(folder) == [1, 2]


def test_a_cancelled_training_goes_on_when_queued_again(comfy: ComfyServer):
    folder = run_folder(comfy, "cancelled")
    prompt = training(comfy, "cancelled", steps=25, options={"save_every": 2})
    with Listener(comfy) as seen:
        entry = cancel_after_a_checkpoint(comfy, prompt, folder)
        seen.catch_up()
    assert [(e.kind, e.node_type) for e in comfy.errors(entry)] == [("interrupted", "FaR_Train")]
    begun = read_metrics(folder / "metrics.jsonl")
    assert 2 <= len(begun) < 25
    # Saved at the step where it stopped, and not only at a multiple of save_every.
    assert (folder / "checkpoints" / f"checkpoint-{len(begun):08d}.safetensors").exists()

    stands = f"stopped at step {len(begun)} of 25 and saved; press Run to resume"
    assert seen.texts[-1] == ("4", stands)

    # A training right after a cancel, before the cancelled one is taken up.
    comfy.run(training(comfy, "after-cancel", train_seed=3))
    with Listener(comfy) as seen:
        comfy.run(prompt)
        seen.catch_up()
    assert seen.said[0] == ("4", f"resumes from step {len(begun)}\nencoding (5 pictures)")
    assert any(f"resumes from step {len(begun)}\nstep " in text for _, text in seen.said)
    assert read_metrics(folder / "metrics.jsonl")[: len(begun)] == begun  # seconds and all: not trained again
    assert steps_of(folder) == list(range(1, 26))
    assert not run_folder(comfy, "cancelled-2").exists()


def test_a_changed_setting_that_begins_another_run_is_told(comfy: ComfyServer):
    with Listener(comfy) as seen:
        comfy.run(training(comfy, "renewed", steps=3))
        comfy.run(training(comfy, "renewed", steps=2))
        changed = {"embedding_lr": 0.001, "prior_weight": 0.5, "weight_decay": 0.1}
        comfy.run(training(comfy, "renewed", steps=4, train_seed=1, options=changed))
        seen.catch_up()
    first, second, third = [text for _, text in seen.said if "encoding" in text]
    assert first == "encoding (5 pictures)"
    assert second == (
        "changed: steps (3 then, 2 now); this starts a new run, renewed-2, at step 1; renewed is kept\n"
        "encoding (5 pictures)"
    )
    assert "and 2 more; this starts a new run, renewed-3, at step 1; renewed-2 is kept" in third
    assert all("renewed-2, begins" in text for _, text in seen.texts if "of 2, loss" in text)


def test_another_seed_trains_anew_beside_the_first(comfy: ComfyServer):
    comfy.run(training(comfy, "seeds"))
    before = state_of(run_folder(comfy, "seeds"))
    comfy.run(training(comfy, "seeds", train_seed=1))
    assert state_of(run_folder(comfy, "seeds")) == before
    first, second = (FarWeights.load(run_folder(comfy, n) / "weights.safetensors") for n in ("seeds", "seeds-2"))
    assert any(not torch.equal(first.delta(k), second.delta(k)) for k in first.shapes())
    # Back to the first seed: both are found again.
    comfy.run(training(comfy, "seeds", sample_prompt="a ball"))
    assert not run_folder(comfy, "seeds-3").exists()


def test_a_time_limit_lets_the_run_rest(comfy: ComfyServer):
    slow = {"save_every": 1, "time_limit": 0.01}
    with pytest.raises(ExecutionFailed, match="FaR_Train.*time limit of 0.01 minutes is over; queue the graph again"):
        comfy.run(training(comfy, "limited", steps=15, options=slow))
    comfy.run(training(comfy, "limited", steps=15, options={"save_every": 1}))
    assert steps_of(run_folder(comfy, "limited")) == list(range(1, 16))


def test_what_the_graph_does_to_the_base_is_trained_on(comfy: ComfyServer):
    """A LoRA on MODEL is part of the base, and MODEL's own prediction type is believed."""
    whole = {"trainable": "kv"}  # changes whose sum with the matrices has the same bits everywhere
    comfy.run(training(comfy, "patched", options=whole))
    prompt = training(comfy, "on-patched", options=whole, model=["8", 0], clip=["7", 1])
    prompt |= {
        "7": node("FaR_ApplyWeights", model=["1", 0], clip=["1", 1], weights=["9", 0], strength=4.0),
        "8": node("ModelSamplingDiscrete", model=["7", 0], sampling="eps", zsnr=False),
        "9": training(comfy, "patched", options=whole)["4"],
        "10": node("FaRTest_SaveBase", model=["1", 0], clip=["1", 1], vae=["1", 2], name="unpatched"),
    }
    comfy.run(prompt)
    about = json.loads((run_folder(comfy, "on-patched") / "run.json").read_text())["base"]
    assert about["prediction_type"] == "epsilon"
    base = load_base(comfy.folder("output") / "unpatched.safetensors", config=diffusers_configs())
    weights = FarWeights.load(run_folder(comfy, "patched") / "weights.safetensors")
    changed = {k: w + 4 * weights.deltas[k] for k, w in kv_weights(base.unet).items()}
    before = base.fingerprint
    for name, (layer, part) in kv_layers(base.unet).items():
        getattr(layer, part).weight = nn.Parameter(changed[name])
    assert about["fingerprint"] == base.fingerprint != before


def test_a_lora_on_clip_alone_is_another_base(comfy: ComfyServer):
    """The run of the base without it must not be taken for this one's, nor that of another strength."""
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    generator = torch.Generator().manual_seed(0)
    halves = {"lora_up.weight": torch.randn(256, 4, generator=generator)}
    halves |= {"lora_down.weight": torch.randn(4, 64, generator=generator)}
    path = comfy.folder("models/loras") / "clip-alone.safetensors"
    save_file({f"{layer}.{name}": half for name, half in halves.items()}, path)
    comfy.run(training(comfy, "clip-lora"))
    for strength in (0.5, 1.0):
        prompt = training(comfy, "clip-lora", model=["7", 0], clip=["7", 1])
        prompt["7"] = node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name=path.name,
                           strength_model=1.0, strength_clip=strength)  # fmt: skip
        comfy.run(prompt)
    folders = [run_folder(comfy, name) for name in ("clip-lora", "clip-lora-2", "clip-lora-3")]
    assert [steps_of(folder) for folder in folders] == [[1, 2]] * 3
    assert len({FarWeights.load(folder / "weights.safetensors").digest() for folder in folders}) == 3
    before = [state_of(folder) for folder in folders]
    comfy.run(prompt | {"4": {**prompt["4"], "inputs": {**prompt["4"]["inputs"], "sample_prompt": ""}}})
    assert [state_of(folder) for folder in folders] == before  # what is the same is still not trained twice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"20": node("FaRTest_ForeignModel", context_width=768)}, "MODEL is Stable Diffusion 1.5, CLIP is"),
        ({"20": node("FaRTest_ForeignModel", context_width=2048)}, "MODEL is Stable Diffusion XL, CLIP is"),
        ({"20": node("ModelSamplingDiscrete", model=["1", 0], sampling="lcm", zsnr=False)}, "neither v nor ε"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(comfy: ComfyServer, change: dict, message: str):
    with pytest.raises(ExecutionFailed, match="node 4 .FaR_Train.") as failed:
        comfy.run(training(comfy, "refused", model=["20", 0]) | change)
    assert message in str(failed.value)
    assert not run_folder(comfy, "refused").exists()


def test_a_name_stays_in_the_output_folder(comfy: ComfyServer):
    comfy.run(training(comfy, "../../CON"))
    assert (run_folder(comfy, "run-CON") / "weights.safetensors").exists()


def test_bad_options_are_reported_at_their_node(comfy: ComfyServer):
    with pytest.raises(ExecutionFailed, match="node 3 .FaR_TrainOptions.*both learning rates are 0"):
        comfy.run(training(comfy, "options", options={"embedding_lr": 0.0, "low_rank_lr": 0.0}))
