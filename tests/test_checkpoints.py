"""Checkpoints: the newest whole one is found, whatever happened to the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from far_train.training.checkpoints import load_checkpoint, save_checkpoint
from far_train.training.loss_scaler import FP16_INITIAL_SCALE, LossScaler
from far_train.utils import files
from far_train.utils.errors import CheckpointError, OutputError


def training(seed: int = 0, width: int = 3):
    """Two parameters after three AdamW steps."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        "rows": nn.Parameter(torch.randn(2, width, generator=generator)),
        "layer.to_k": nn.Parameter(torch.randn(4, width, generator=generator)),
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters, optimizer


def equal(a, b) -> bool:
    moments = all(
        torch.equal(torch.as_tensor(a[1].state[p][k]), torch.as_tensor(b[1].state[q][k]))
        for p, q in zip(a[0].values(), b[0].values())
        for k in ("step", "exp_avg", "exp_avg_sq")
    )
    return moments and all(torch.equal(p, q) for p, q in zip(a[0].values(), b[0].values()))


def test_round_trip_with_optimizer(tmp_path: Path):
    one, two = training(0), training(1)
    save_checkpoint(tmp_path, 7, *one, keep=2)
    assert not equal(one, two)
    assert load_checkpoint(tmp_path, *two) == 7
    assert equal(one, two)
    for parameters, optimizer in (one, two):  # and the next step is the same, too
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert equal(one, two)


def test_nothing_to_resume(tmp_path: Path):
    assert load_checkpoint(tmp_path / "absent", *training()) == 0


def test_old_checkpoints_go_when_the_new_one_is_there(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, *training(), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{i:08d}.safetensors" for i in (3, 4)]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_checkpoints_are_passed_over(tmp_path: Path, caplog, damage: str):
    save_checkpoint(tmp_path, 1, *training(0), keep=2)
    path = save_checkpoint(tmp_path, 2, *training(1), keep=2)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes({"cut": content[:-9], "flip": content, "empty": b""}[damage])
    fresh = training(5)
    assert load_checkpoint(tmp_path, *fresh) == 1
    assert equal(fresh, training(0))
    assert "is damaged" in caplog.text
    (tmp_path / "checkpoint-00000001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        load_checkpoint(tmp_path, *fresh)


def test_checkpoints_of_repeated_steps_go_first(tmp_path: Path):
    """The newest is damaged, so the run goes on from the one before, and stops before it gets as far."""
    save_checkpoint(tmp_path, 1, *training(), keep=2)
    save_checkpoint(tmp_path, 3, *training(), keep=2).write_bytes(b"")
    save_checkpoint(tmp_path, 2, *training(2), keep=1)
    fresh = training(5)
    assert load_checkpoint(tmp_path, *fresh) == 2 and equal(fresh, training(2))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("before", "now"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_another_precision_is_told_and_the_loss_scale_begins_anew(tmp_path: Path, caplog, before, now):
    def parts(dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        parameters, optimizer = training()
        return parameters | LossScaler(torch.device("cpu"), dtype).saved(), optimizer

    save_checkpoint(tmp_path, 4, *parts(before), keep=1, precision=before)
    parameters, optimizer = parts(now)
    assert load_checkpoint(tmp_path, parameters, optimizer, now) == 4
    names = [str(dtype).removeprefix("torch.") for dtype in (now, before)]
    assert "goes on in {}; until step 4 it was trained in {}".format(*names) in caplog.text
    if now == torch.float16:
        assert parameters["scaler"].tolist() == [FP16_INITIAL_SCALE, 0]
    caplog.clear()
    load_checkpoint(tmp_path, *parts(before), before)
    assert not caplog.text


def test_checkpoints_of_another_run(tmp_path: Path):
    save_checkpoint(tmp_path, 1, *training(width=3), keep=2)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        load_checkpoint(tmp_path, *training(width=4))


def test_a_failed_write_leaves_the_last_checkpoint_and_no_fragments(tmp_path: Path, monkeypatch):
    save_checkpoint(tmp_path, 1, *training(), keep=1)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        save_checkpoint(tmp_path, 2, *training(1), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001.safetensors"]
    assert load_checkpoint(tmp_path, *training()) == 1


def test_a_file_has_the_rights_of_all_new_ones_and_the_process_keeps_its_umask(tmp_path: Path, monkeypatch):
    (tmp_path / "plain").touch()
    monkeypatch.setattr(files.os, "umask", lambda _: pytest.fail("another thread would see this umask"))
    files.write_text(tmp_path / "written", "x")
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="can't make this folder"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, *training(), keep=1)
