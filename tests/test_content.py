"""What the small base learns from: the content of every cell, and scenes that are encoded once, as they come."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch
from torch import nn
from transformers import CLIPTokenizerFast

from benchmarks.small_models.autoencoder import autoencoder_config, build_autoencoder, encode_means
from benchmarks.small_models.content import FIELDS, NONE, ContentReadout, content_codes, content_loss
from benchmarks.small_models.encoded_scenes import EncodedScenes, token_table
from benchmarks.small_models.scene_pool import PoolConfig, ScenePool, fill_pool, render_chunk
from benchmarks.small_models.words import write_tokenizer
from far_train.mini.identity import NOUNS, identity_codes
from far_train.mini.scenery import BACKGROUNDS
from far_train.mini.tiny import tiny_configs
from far_train.mini.world import render_scene
from far_train.models.families import SD21
from far_train.models.loading import build_parts

CELLS = 16


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> ScenePool:
    return fill_pool(tmp_path_factory.mktemp("pool"), PoolConfig(count=8, chunk=8, hold_out=False))


@pytest.fixture(scope="module")
def codes(pool) -> torch.Tensor:
    return content_codes(pool.chunks[0], CELLS)


def test_every_cell_names_the_sprite_on_it(codes):
    assert codes.shape == (8, len(FIELDS), CELLS, CELLS)
    for i in range(8):
        scene = render_scene(1, i)
        subject, noun, body, *_, place = codes[i]
        assert bool((place == BACKGROUNDS.index(scene.background)).all())
        assert torch.equal(subject == 0, noun == NONE)
        for sprite, mask in zip(scene.sprites, scene.masks):
            share = nn.functional.adaptive_avg_pool2d(mask[None], CELLS)[0]
            row, column = divmod(int(share.argmax()), CELLS)
            wanted = identity_codes(sprite.identity)
            assert (int(subject[row, column]), int(noun[row, column]), int(body[row, column])) == (1, *wanted[:2])


def test_shapes_are_told_apart_by_class(codes):
    noun, shape = codes[:, 1].long(), codes[:, 6].long()
    known = noun != NONE
    assert torch.equal(shape[known] // 2, noun[known]) and int(shape.max()) < 2 * len(NOUNS)


def test_loss_is_zero_for_the_truth_and_log_n_for_no_idea(codes):
    truth = {
        name: 50.0 * nn.functional.one_hot(codes[:, i].long().clamp(min=0), n).permute(0, 3, 1, 2).float()
        for i, (name, n) in enumerate(FIELDS.items())
    }
    assert float(content_loss(truth, codes)) < 1e-6
    nothing = {name: torch.zeros_like(logits) for name, logits in truth.items()}
    expected = torch.tensor([float(n) for n in FIELDS.values()]).log().mean()
    assert float(content_loss(nothing, codes)) == pytest.approx(float(expected), rel=1e-5)


def test_a_batch_without_sprites_has_a_finite_loss(codes):
    empty = codes.clone()
    empty[:, 0], empty[:, 1:-1] = 0, NONE
    nothing = {name: torch.zeros(8, n, CELLS, CELLS) for name, n in FIELDS.items()}
    assert torch.isfinite(content_loss(nothing, empty))


def test_the_readout_sees_the_unet():
    unet = build_parts(SD21, tiny_configs(), device="cpu")["unet"]
    readout = ContentReadout(unet)
    latents, context = torch.zeros(2, 4, CELLS, CELLS), torch.zeros(2, 77, unet.config.cross_attention_dim)
    with readout.reading(unet):
        unet(latents, torch.tensor([10, 500]), context)
        logits = readout()
    assert {name: v.shape for name, v in logits.items()} == {n: (2, k, CELLS, CELLS) for n, k in FIELDS.items()}


@pytest.fixture(scope="module")
def vae() -> nn.Module:
    return build_autoencoder(autoencoder_config(128, (32, 32, 32, 32))).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return CLIPTokenizerFast.from_pretrained(str(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def test_scenes_are_taken_in_as_they_are_rendered(vae, tokenizer, tmp_path):
    config = PoolConfig(count=3, chunk=2, picture_size=128)
    fill_pool(tmp_path / "pool", config.replace(count=2))
    second: Future[None] = Future()
    growing = ScenePool(tmp_path / "pool", config, {1: second})
    scenes = EncodedScenes(growing, vae, "a", tokenizer, tmp_path / "latents")
    assert scenes.take_in() and len(scenes) == len(growing) == int(scenes.ready) == 2
    assert not scenes.take_in()
    render_chunk(tmp_path / "pool", 1, config)
    assert not scenes.take_in()  # its file may be there before its job is done
    second.set_result(None)
    assert scenes.take_in() and len(scenes) == len(growing) == int(scenes.ready) == 3  # the chunk holds a fourth
    assert not scenes.take_in()
    whole = fill_pool(tmp_path / "whole", config)
    images = torch.cat([chunk["images"] for chunk in whole.chunks])
    assert torch.equal(scenes.latents, encode_means(vae, images) * vae.config.scaling_factor)
    assert torch.equal(scenes.ids[2:], token_table(whole.captions(1), tokenizer))
    assert torch.equal(scenes.content[:2], content_codes(whole.chunks[0], CELLS))


def test_what_stopped_a_rendering_stops_the_training(tmp_path):
    failed: Future[None] = Future()
    pool = ScenePool(tmp_path, PoolConfig(count=2, chunk=2), {0: failed})
    failed.set_exception(OSError("the disk is full"))
    with pytest.raises(OSError, match="disk is full"):
        pool.grow()


def test_latents_are_encoded_once(vae, tokenizer, pool, tmp_path, monkeypatch):
    def latents(digest: str) -> torch.Tensor:
        scenes = EncodedScenes(pool, vae, digest, tokenizer, tmp_path)
        scenes.take_in()
        return scenes.latents

    first = latents("a")

    def encode(*_):
        raise AssertionError("encoded anew")

    with monkeypatch.context() as patched:
        patched.setattr(vae, "encode", encode)
        assert torch.equal(latents("a"), first)
        with pytest.raises(AssertionError, match="anew"):  # another autoencoder: these latents aren't its own
            latents("b")
    (tmp_path / "latents-00000.safetensors").write_bytes(b"damaged")
    assert torch.equal(latents("a"), first)
