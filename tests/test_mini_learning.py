"""The trainings of the small models, on toys: they learn, stop and go on, measure, and export what loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.small_models import learn, small_sam
from benchmarks.small_models.autoencoder import (
    autoencoder_config,
    build_autoencoder,
    learn_autoencoder,
    load_autoencoder,
    measure_autoencoder,
)
from benchmarks.small_models.diffusion import diffusion_configs, learn_diffusion
from benchmarks.small_models.encoded_scenes import token_table
from benchmarks.small_models.gates import BASE_GATES, PROMPT_KINDS, base_prompts, judge, measure_base, measure_oracle
from benchmarks.small_models.held_out import all_identities, held_out_identities
from benchmarks.small_models.oracle_training import learn_oracle
from benchmarks.small_models.scene_pool import PoolConfig, ScenePool, fill_pool
from benchmarks.small_models.small_sam import SPEC, learn_sam, measure_sam
from benchmarks.small_models.words import known_words, vocabulary, write_tokenizer
from far_train.data.sam import build_sam, load_sam
from far_train.data.subjects import Prompt, SubjectExtractor
from far_train.mini.identity import Identity, identity_codes, identity_from_codes
from far_train.mini.oracle import Detection, Oracle, Reading, load_oracle, read_pictures
from far_train.mini.world import render_scene, world_words
from far_train.models.base import BaseModel
from far_train.models.conditioning import TextConditioner
from far_train.models.families import SD21
from far_train.models.loading import build_parts, load_base
from far_train.models.sampling import draw_pictures
from far_train.models.settings import SampleConfig
from far_train.models.tokens import Vocabulary
from far_train.utils.errors import BaseModelError, CheckpointError, DatasetError, Interrupted, OutputError

from .learning_runs import losses, quick

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "global_attn_indexes": [1], "window_size": 4, "image_size": 64}
SMALL |= {"patch_size": 8, "prompt_dim": 32, "decoder_heads": 2, "decoder_mlp_dim": 64, "iou_dim": 32}


def fell(folder: Path, name: str = "loss") -> bool:
    values = losses(folder, name)
    return float(np.mean(values[-3:])) < 0.97 * float(np.mean(values[:3]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished toy of each training, as the command line leaves it."""
    out = tmp_path_factory.mktemp("runs")
    settings = {"picture_size": 64, "chunk": 8}
    pool = fill_pool(out / "pool", PoolConfig(count=24, **settings))
    everyone = fill_pool(out / "pool-oracle", PoolConfig(count=16, pool_seed=2, hold_out=False, **settings))
    learn_autoencoder(pool, out / "autoencoder", quick(), blocks=(32, 32, 32, 32))
    learn_diffusion(
        out / "autoencoder",
        pool,
        out / "diffusion",
        quick(steps=24, batch_size=8),
        blocks=(32, 32, 32, 32),
        text_width=32,
        text_layers=1,
    )
    learn_sam(pool, out / "sam", quick(steps=40), spec=SMALL)
    vae, _ = load_autoencoder(out / "autoencoder")
    learn_oracle(everyone, out / "oracle", quick(), autoencoder=vae, widths=(16, 16, 24, 32))
    return out


# ---- words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from transformers import CLIPTokenizerFast

    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def test_every_known_word_is_one_token(tokenizer):
    plain = {w: tokenizer(w, add_special_tokens=False)["input_ids"] for w in known_words()}
    assert {w for w, ids in plain.items() if len(ids) != 1} == set()
    assert len({ids[0] for ids in plain.values()}) == len(plain)
    assert set(world_words()) <= set(plain)


def test_the_table_is_small_and_has_clips_special_tokens(tokenizer):
    size = len(vocabulary())
    assert size < 3000 and len(tokenizer) == size
    assert sorted(vocabulary().values()) == list(range(size))
    # CLIP takes its pooled output at the largest id.
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, size - 2, size - 1)


@pytest.mark.parametrize(
    "text", ["a photo of a red dog and another cat, in a meadow", "zebra's x-ray 42!", "café 東京 🐶"]
)
def test_anything_can_be_written(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert max(ids) < len(vocabulary())
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_captions_of_the_pool_need_no_spelling(tokenizer, runs):
    pool = ScenePool(runs / "pool", PoolConfig(count=24, picture_size=64, chunk=8))
    texts = [text for number in range(3) for options in pool.captions(number) for text in options]
    for text in texts:
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == len(text.replace(",", " ,").split())
    assert any(", " in t for t in texts) and len(set(texts)) > len(texts) / 3
    assert token_table(pool.captions(2), tokenizer).shape == (8, 6, 77)


# ---- scenes


def test_a_pool_holds_the_worlds_scenes(runs):
    pool = ScenePool(runs / "pool", PoolConfig(count=24, picture_size=64, chunk=8))
    rows = torch.tensor([3, 17])
    held_out = held_out_identities()
    for k, row in enumerate(rows.tolist()):
        scene = render_scene(1, row, 64, held_out=held_out)
        assert float((pool.take("images", rows)[k].float() / 255 - scene.image).abs().max()) < 0.003
        owners = pool.take("labels", rows)[k]
        assert all(torch.equal(owners == i + 1, m > 0.5) for i, m in enumerate(scene.masks))
        codes = pool.take("subjects", rows)[k].tolist()
        assert [identity_from_codes(c) for c in codes if c[0] >= 0] == [s.identity for s in scene.sprites]
    everyone = pool.take("subjects", torch.arange(24)).reshape(-1, 6).tolist()
    assert not {identity_from_codes(c) for c in everyone if c[0] >= 0} & held_out
    assert all(identity_from_codes(identity_codes(i)) == i for i in all_identities()[::97])


def test_filling_goes_on_where_it_stopped_also_on_other_processes(tmp_path):
    config = PoolConfig(count=6, picture_size=64, chunk=2)
    stops = iter([True])
    with pytest.raises(Interrupted):
        fill_pool(tmp_path / "a", config, should_stop=lambda: next(stops))
    first = (tmp_path / "a" / "scenes-00000.safetensors").stat().st_mtime_ns
    resumed = fill_pool(tmp_path / "a", config, workers=1)
    assert (tmp_path / "a" / "scenes-00000.safetensors").stat().st_mtime_ns == first
    whole = fill_pool(tmp_path / "b", config)
    rows = torch.arange(6)
    assert torch.equal(resumed.take("images", rows), whole.take("images", rows))
    with pytest.raises(DatasetError, match="other settings"):
        fill_pool(tmp_path / "a", config.replace(pool_seed=5))
    (tmp_path / "b" / "scenes-00001.safetensors").write_bytes(b"half")
    with pytest.raises(DatasetError, match="scenes-00001"):
        ScenePool(tmp_path / "b", config)


# ---- the models


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_shipped_sizes_fit_their_budget(tokenizer):
    with torch.device("meta"):
        vae, sam, oracle = build_autoencoder(autoencoder_config()), build_sam(SPEC), Oracle()
    parts = build_parts(SD21, diffusion_configs(autoencoder_config(), Path("unused")))
    sizes = {"vae": count(vae), "sam": count(sam), "oracle": count(oracle)}
    sizes |= {name: count(parts[name]) for name in ("unet", "text_encoder")}
    limits = {"vae": 3e6, "sam": 2e6, "oracle": 2e6, "unet": 9e6, "text_encoder": 2e6}
    assert {name: n for name, n in sizes.items() if n > limits[name]} == {}
    assert 2 * sum(sizes.values()) < learn.MOST_BYTES - 300_000  # fp16, and room for configs and cards
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 8
    channels = [*vae.config.block_out_channels, *parts["unet"].config.block_out_channels]
    assert all(c % 32 == 0 for c in channels)


@pytest.mark.parametrize("model", ["autoencoder", "diffusion", "sam", "oracle"])
def test_each_training_learns(runs, model):
    assert fell(runs / model)
    assert all(np.isfinite(losses(runs / model)))


def test_a_training_of_scenes_resumes_to_the_bit(runs, tmp_path):
    pool = ScenePool(runs / "pool", PoolConfig(count=24, picture_size=64, chunk=8))
    whole = learn_sam(pool, tmp_path / "whole", quick(steps=4), spec=SMALL)
    calls = iter([False, False, True])
    with pytest.raises(Interrupted):
        learn_sam(pool, tmp_path / "cut", quick(steps=4), spec=SMALL, should_stop=lambda: next(calls))
    again = learn_sam(pool, tmp_path / "cut", quick(steps=4), spec=SMALL)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_latents_get_unit_spread(runs):
    vae, config = load_autoencoder(runs / "autoencoder")
    pool = ScenePool(runs / "pool", PoolConfig(count=24, picture_size=64, chunk=8))
    means = vae.encode(pool.pictures(torch.arange(24))).latent_dist.mean
    assert float(means.std() * config["scaling_factor"]) == pytest.approx(1, abs=0.02)
    figures = measure_autoencoder(vae, None, 64, count=4)
    assert 0 < figures["psnr_worst"] <= figures["psnr"] < 60 and figures["reached"] == (figures["psnr"] >= 27)
    with pytest.raises(BaseModelError, match="train it first"):
        load_autoencoder(runs / "nothing")


def test_the_base_loads_and_draws(runs):
    base = load_base(runs / "diffusion" / "base")
    assert isinstance(base, BaseModel) and base.prediction_type == "v_prediction" and base.native_size == 64
    assert base.downscale == 8 and base.scheduler["clip_sample"] is False
    words = Vocabulary(base.tokenizer, (), base.tokenizer_size)
    assert base.tokenizer_size == len(vocabulary())
    picture = draw_pictures(base, words, ["a photo of a red dog"], SampleConfig(sampling_steps=2))
    assert picture.shape == (1, 64, 64, 3) and bool(picture.isfinite().all())


def test_prompts_are_read_causally_as_in_training(runs):
    base = load_base(runs / "diffusion" / "base")
    words = Vocabulary(base.tokenizer, (), base.tokenizer_size)
    one, other = TextConditioner(base).encode([words.tokenize(t) for t in ("a red dog", "a red cat")], (64, 64)).context
    assert torch.allclose(one[:3], other[:3], atol=1e-5) and not torch.allclose(one[3], other[3])
    ids = torch.tensor([words.tokenize("a red dog").ids])
    assert token_table([["a red dog"]], base.tokenizer)[0, 0].tolist() == ids[0].tolist()


def test_sam_loads_and_answers_the_product(runs):
    sam = load_sam(runs / "sam" / "sam.safetensors")
    scene = render_scene(5, 1, 64, sprites=1)
    for prompt in (Prompt(box=(8, 8, 56, 56)), Prompt(points=((32, 40, 1),)), Prompt()):
        masks, scores = SubjectExtractor(sam).predict(scene.image, prompt)
        assert masks.shape == (3, 64, 64) and scores.shape == (3,)
    figures = measure_sam(sam, None, count=3)
    assert 0 <= figures["iou_point"] <= 1 and figures["sprites"] > 0


def test_batched_prediction_is_segment_anythings_own():
    sam, generator = build_sam(SMALL), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 64, 64, 3), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[4.0, 5, 40, 50]]).repeat(3, 1)
    with torch.no_grad():
        embeddings = small_sam.embed(sam, images)
        masks, scores = small_sam.predict(sam, embeddings, boxes=boxes)
        sparse, dense = sam.prompt_encoder(points=None, boxes=boxes[:1], masks=None)
        own = sam.mask_decoder.predict_masks(embeddings[1:2], sam.prompt_encoder.get_dense_pe(), sparse, dense)
        alone = sam.image_encoder(sam.preprocess(images[1:2].permute(0, 3, 1, 2)))
    assert torch.allclose(embeddings[1:2], alone, atol=1e-4)
    assert torch.allclose(masks[1:2], own[0], atol=1e-4) and torch.allclose(scores[1:2], own[1], atol=1e-4)


def test_prompts_for_sam_lie_where_they_should():
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
    labels[0, 10:20, 30:50] = 1
    masks, shows = small_sam.draw_targets(labels, generator)
    assert shows.tolist() == [True, False] and torch.equal(masks[0], labels[0] == 1)
    assert small_sam.draw_boxes(masks[:1], generator, jitter=0).tolist() == [[30, 10, 50, 20]]
    for _ in range(20):
        points, marks = small_sam.draw_points(masks[:1], 5, generator)
        inside = [bool(masks[0, int(y), int(x)]) for x, y in points[0]]
        assert inside == marks[0].bool().tolist() and inside[0]


# ---- measuring


def test_the_oracle_returns_structures(runs):
    oracle = load_oracle(runs / "oracle" / "oracle.safetensors")
    scene = render_scene(5, 2, 64, sprites=2)
    (reading,) = read_pictures(oracle, scene.image[None])
    assert reading.background and 0 < reading.background_probability <= 1
    for found in reading.subjects:
        assert isinstance(found.identity, Identity) and 0 <= found.confidence <= 1
        assert found.mask.shape == (64, 64) and found.mask.any()
    with pytest.raises(BaseModelError, match="is not an oracle"):
        load_oracle(runs / "sam" / "sam.safetensors")


def test_perfect_maps_are_read_back_exactly():
    """The decoding alone: maps made from the truth give the truth."""
    from benchmarks.small_models.oracle_training import cell_targets, shape_logit
    from benchmarks.small_models.scene_pool import label_map
    from far_train.mini.oracle import HEADS, _read_one

    for index in range(20):
        scene = render_scene(6, index, 128)
        target = cell_targets(label_map(scene)[None])
        inside, centres = target["inside"][0], target["centres"][0]
        owner = inside.argmax(0)
        y, x = torch.meshgrid(*(torch.arange(float(n)) for n in owner.shape), indexing="ij")
        maps = {"subject": inside.sum(0) - 0.5, "centre": 20 * (target["spot"][0] - 0.4), "place": torch.arange(10.0)}
        maps["offset"] = torch.stack([centres[owner][..., 0] - x, centres[owner][..., 1] - y])
        codes = torch.tensor([identity_codes(s.identity) for s in scene.sprites] or [[0] * 6])
        for i, (field, n) in enumerate(HEADS.items()):
            answers = shape_logit(codes) if field == "shape" else codes[:, i]
            right = answers[owner.clamp(max=len(answers) - 1)]
            maps[field] = 9.0 * nn.functional.one_hot(right, n).permute(2, 0, 1).float()
        reading = _read_one(maps)
        assert [s.identity for s in reading.subjects] == [s.identity for s in scene.sprites], index


def read(*identities: Identity) -> Reading:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    return Reading(tuple(Detection(i, 1.0, {}, mask) for i in identities), "beach", 1.0)


def test_verdicts_need_exactly_the_named_subjects():
    dog = Identity("dog", "red", "blue", "plain", "hat", "floppy")
    other = Identity("dog", "green", "white", "banded", "none", "pointed")
    nearly = Identity("dog", "green", "white", "banded", "crown", "pointed")
    cat = Identity("cat", "red", "blue", "plain", "hat", "curly")
    assert judge("class", [dog], read(dog))["class"]
    assert not judge("class", [dog], read(cat))["class"] and not judge("class", [dog], read(dog, dog))["class"]
    assert judge("two_colours", [dog, cat], read(cat, dog))["two_colours"]
    assert not judge("two_colours", [dog, other], read(dog, dog))["two_colours"]
    verdict = judge("two_same_class", [dog, other], read(nearly, dog))
    assert verdict == {
        "two_same_class": True,
        "two_same_class_all_attributes": False,
        "two_same_class_colours": True,
    }
    assert not judge("two_same_class", [dog, other], read(dog))["two_same_class"]


def test_gate_prompts_are_fixed_and_known_words(tokenizer):
    for kind in PROMPT_KINDS:
        prompts = base_prompts(kind, 40)
        assert prompts == base_prompts(kind, 40) and len({p for p, _, _ in prompts}) > 20
        for prompt, _, _ in prompts:
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            assert len(ids) == len(prompt.replace(",", " ,").split()) <= 75


def test_gates_are_measured(runs, tmp_path):
    oracle, (vae, _) = load_oracle(runs / "oracle" / "oracle.safetensors"), load_autoencoder(runs / "autoencoder")
    figures = measure_oracle(oracle, vae, tmp_path, count=6, size=64)
    assert 0 <= figures["class"] <= 1 and set(figures["confusion"]) == {"noun", *figures["by_attribute"]}
    base = load_base(runs / "diffusion" / "base")
    settings = SampleConfig(sampling_steps=1, sample_batch=2)
    figures = measure_base(base, oracle, tmp_path, count=2, config=settings)
    assert set(BASE_GATES) <= set(figures) and not figures["reached"]
    assert (tmp_path / "gate-two_same_class.png").exists() and (tmp_path / "figures.json").exists()


# ---- export


def test_export_halves_and_loads(runs, monkeypatch):
    monkeypatch.setattr(learn, "SPEC", SMALL)
    target = learn.export(runs)
    base = load_base(target / "base")
    whole = load_base(runs / "diffusion" / "base")
    gap = base.unet.conv_in.weight - whole.unet.conv_in.weight
    assert float(gap.abs().max()) < 1e-3
    load_sam(target / "sam" / "sam.safetensors")
    load_oracle(target / "oracle" / "oracle.safetensors")
    for part in ("base", "sam", "oracle"):
        card = (target / part / "card.md").read_text(encoding="utf-8")
        assert "Seed 0" in card and "minutes" in card and "MIT" in card and "benchmarks.small_models.learn" in card
    monkeypatch.setattr(learn, "MOST_BYTES", 1000)
    with pytest.raises(OutputError, match="30 MB"):
        learn.export(runs)
    with pytest.raises(CheckpointError, match="diffusion, sam, oracle"):
        learn.export(runs / "nothing")


def test_the_decoder_alone_leaves_the_latents_as_they_are(runs, tmp_path):
    pool = ScenePool(runs / "pool", PoolConfig(count=24, picture_size=64, chunk=8))
    start, blocks = runs / "autoencoder" / "vae", (32, 32, 32, 32)
    options = {"blocks": blocks, "start": start, "decoder_only": True}
    taught = learn_autoencoder(pool, tmp_path, quick(steps=3), **options)
    before, _ = load_autoencoder(runs / "autoencoder")
    for name, value in taught.state_dict().items():
        decodes = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(value, before.state_dict()[name]) != decodes, name
    assert taught.config.scaling_factor == before.config.scaling_factor
    with pytest.raises(BaseModelError, match="name its folder"):
        learn_autoencoder(pool, tmp_path / "other", quick(), blocks=blocks, decoder_only=True)


def test_the_command_line_trains_stops_and_reports(tmp_path, capsys):
    flags = ["--out", str(tmp_path), "--count", "4", "--chunk", "4", "--picture-size", "64", "--device", "cpu"]
    assert learn.main(["pool", *flags]) == 0
    short = ["--batch-size", "2", "--warmup", "1", "--log-every", "1"]
    assert learn.main(["autoencoder", *flags, *short, "--steps", "1", "--crop", "32"]) == 0
    assert learn.main(["autoencoder", *flags, *short, "--steps", "9", "--crop", "32", "--pause-after", "0"]) == 130
    more = ["--out", str(tmp_path), "--count", "8", *flags[4:]]  # other processes render what is missing meanwhile
    assert learn.main(["diffusion", *more, *short, "--steps", "1", "--workers", "1"]) == 0
    assert load_base(tmp_path / "diffusion" / "base").native_size == 64
    assert len(list((tmp_path / "pool").glob("scenes-*.safetensors"))) == 2
    assert learn.main(["diffusion", "--out", str(tmp_path / "empty"), *flags[2:], *short, "--steps", "1"]) == 2
    assert "train it first" in capsys.readouterr().err
    assert learn.main(["export", "--out", str(tmp_path)]) == 2
