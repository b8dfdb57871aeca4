"""Ctrl-C and kill in the middle of ``far_train train``, as a user's terminal sends them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from far_train.data.dataset import DatasetFolder, write_dataset
from far_train.models.loading import load_base
from far_train.training.recipe import train
from far_train.training.settings import TrainConfig

ROOT = Path(__file__).parents[1]
STEPS = 16


@pytest.fixture(scope="module")
def dataset(fusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(fusion, tmp_path_factory.mktemp("data") / "dataset").folder


def command(tiny_folder: Path, dataset: Path, run: Path, *more: str) -> list[str]:
    settings = f"--steps {STEPS} --save-every 4 --sample-every 0 --device cpu".split()
    inputs = ["--base", str(tiny_folder), "--dataset", str(dataset), "--out", str(run)]
    return [sys.executable, "-m", "far_train", "train", *inputs, *settings, *more]


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    """Until the run has come that far; it must not end before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the run did not come that far"
        time.sleep(0.005)


def finish(tiny_folder: Path, dataset: Path, run: Path) -> dict:
    """Resume to the end; the learned tensors."""
    subprocess.run(command(tiny_folder, dataset, run, "--resume"), cwd=ROOT, check=True, capture_output=True)
    return load_file(run / "weights.safetensors")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(load_base(tiny_folder), DatasetFolder(dataset), TrainConfig(steps=STEPS, sample_every=0, device="cpu"), run)
    return load_file(run / "weights.safetensors")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle_and_resumed(tiny_folder, dataset, uninterrupted, tmp_path: Path, stop: signal.Signals):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(tiny_folder, dataset, run), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: list(run.glob("checkpoints/checkpoint-*.safetensors")), process)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert not (run / "weights.safetensors").exists()
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert "which is saved; resume to go on" in errors and "Traceback" not in errors
    assert equal(finish(tiny_folder, dataset, run), uninterrupted)
