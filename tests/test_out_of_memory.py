"""Where memory runs out: what says so, and that encoding and drawing go on with less and give the same."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from far_train.cli.parsing import Command
from far_train.cli.program import Program
from far_train.models import sampling
from far_train.models.attention_maps import layer_stride, supervised_layers
from far_train.models.base import BaseModel
from far_train.models.conditioning import plain_vocabulary
from far_train.models.sampling import draw_pictures
from far_train.models.settings import SampleConfig
from far_train.models.tokens import Vocabulary
from far_train.training import latent_cache
from far_train.utils.errors import OutOfMemory
from far_train.utils.out_of_memory import in_batches, out_of_memory, skip_without_memory, with_less_memory

QUICK = SampleConfig(sampling_steps=2, sample_batch=4)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE"), False),
        (RuntimeError("The size of tensor a (4) must match the size of tensor b (5)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: BaseException, expected: bool):
    assert out_of_memory(error) is expected


def test_a_command_that_runs_out_of_memory_ends_in_one_line(capsys):
    def run(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    assert Program("prog", (Command("cut", "cuts", (), run),)).run([]) == OutOfMemory.exit_status == 2
    assert capsys.readouterr().err.startswith("prog: error: memory ran out (CUDA out of memory. Tried to allocate 2.00")

    def fail(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        Program("prog", (Command("cut", "cuts", (), fail),)).run([])


def test_batches_shrink_where_memory_runs_out(caplog):
    sizes = []

    def compute(batch: range) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(batch)

    with caplog.at_level(logging.WARNING):
        assert in_batches(compute, 7, 5, "pictures") == list(range(7))
    assert sizes == [5, 2, 2, 2, 1]
    assert [r.message for r in caplog.records] == [
        "Memory ran out (CUDA out of memory): continuing with pictures in batches of 2."
    ]


def test_what_fits_is_found_out_once_for_all_images(base: BaseModel, fusion, monkeypatch, caplog):
    """Of a VAE that takes two images at once, when four are tried."""
    encode, sizes = base.vae.encode, []

    def tight(pixels: torch.Tensor):
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixels)

    monkeypatch.setattr(base.vae, "encode", tight)
    monkeypatch.setattr(latent_cache, "first_encode_batch", lambda base: 4)
    layers = supervised_layers(base.unet, 16, 16)
    stride = layer_stride(layers[0], len(base.unet.config.block_out_channels))
    words = Vocabulary(base.tokenizer, fusion.names, base.tokenizer_size)
    latent_cache.cache_latents(fusion, base, words, stride, seed=0)
    total = fusion.composite_count() + fusion.prior_count()
    assert total > 5 and sizes == [4, *[2] * (total // 2), *[1] * (total % 2)]


def test_one_that_does_not_fit_is_named_and_other_errors_pass():
    def never(batch: range) -> list[int]:
        raise MemoryError

    with pytest.raises(OutOfMemory, match="pictures don't fit into memory, even one at a time"):
        in_batches(never, 2, 2, "pictures")
    with pytest.raises(ZeroDivisionError):
        in_batches(lambda batch: [1 // 0], 2, 2, "pictures")


def test_pictures_are_the_same_from_smaller_batches(base: BaseModel, monkeypatch, caplog):
    prompts, words = ["a red ball", "a blue ball", "a ball"], plain_vocabulary(base)
    expected = draw_pictures(base, words, prompts, QUICK.replace(sample_batch=1))
    forward, seen = base.unet.forward, []

    def tight(sample: torch.Tensor, *rest: object, **more: object):
        seen.append(len(sample))
        if len(sample) > 2:  # guidance makes two of each
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return forward(sample, *rest, **more)

    monkeypatch.setattr(base.unet, "forward", tight)
    progress = []
    with caplog.at_level(logging.WARNING):
        drawn = draw_pictures(base, words, prompts, QUICK, on_progress=lambda *a: progress.append(a))
    assert torch.allclose(drawn, expected, atol=1e-4) and seen == [6] + [2] * 6
    assert "continuing with pictures in batches of 1" in caplog.text
    assert all(done <= total for done, total in progress)


class Autoencoder(nn.Linear):
    """Of a VAE only what :func:`with_less_memory` asks for. It seems to be on another device until it is moved."""

    device = torch.device("meta")

    def _apply(self, *arguments: object, **more: object) -> nn.Module:
        self.device = torch.device("cpu")
        return self


def test_a_vae_goes_on_on_the_cpu(caplog):
    vae = Autoencoder(2, 2)

    def compute() -> str:
        if vae.device.type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"

    with caplog.at_level(logging.WARNING):
        assert with_less_memory(vae, compute) == "done"
    assert "the VAE continues on the CPU" in caplog.text
    with pytest.raises(MemoryError):  # there is nowhere else to go
        with_less_memory(vae, lambda: (_ for _ in ()).throw(MemoryError()))


@pytest.mark.parametrize(("module", "method"), [(latent_cache, "encode"), (sampling, "decode")])
def test_encoding_and_decoding_have_that_way_out(base: BaseModel, fusion, monkeypatch, module, method: str):
    calls = []

    def record(vae: nn.Module, compute):
        calls.append(vae)
        return compute()

    monkeypatch.setattr(module, "with_less_memory", record)
    if method == "decode":
        draw_pictures(base, plain_vocabulary(base), ["a"], QUICK)
    else:
        layers = supervised_layers(base.unet, 16, 16)
        stride = layer_stride(layers[0], len(base.unet.config.block_out_channels))
        words = Vocabulary(base.tokenizer, fusion.names, base.tokenizer_size)
        latent_cache.cache_latents(fusion, base, words, stride, seed=0)
    assert calls and all(vae is base.vae for vae in calls)


def test_what_is_left_out_is_said_with_its_reason(caplog, tmp_path: Path):
    with caplog.at_level(logging.WARNING), skip_without_memory("the sample pictures"):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
    assert caplog.messages == ["Memory ran out (CUDA out of memory.): the sample pictures are left out."]
