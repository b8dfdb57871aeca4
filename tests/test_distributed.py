"""Several processes on one training, as ``torchrun`` starts them: the same weights as from one, written once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from far_train.data.dataset import DatasetFolder, write_dataset
from far_train.models.families import SDXL
from far_train.models.layers import kv_weights
from far_train.models.loading import load_base
from far_train.models.weights import FarWeights
from far_train.training.distributed import World, distributed_context
from far_train.training.recipe import TrainingRun, train
from far_train.training.run_folder import read_metrics
from far_train.training.settings import TrainConfig
from far_train.utils.errors import ConfigError

ROOT = Path(__file__).parents[1]
STEPS = 5
TORCHRUN = ("-m", "torch.distributed.run")
ONE_MACHINE = [(*TORCHRUN, "--standalone", "--nproc-per-node", "2")]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_machines() -> list[tuple[str, ...]]:
    """A launcher for each of two machines, which meet on this one."""
    meeting = ("--rdzv-backend", "c10d", "--rdzv-id", "dogs", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    # Without a name for itself each would look up its own, which need not lead anywhere.
    machine = (*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1", *meeting)
    return [machine, machine]


@pytest.fixture(scope="module")
def dataset(fusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(fusion, tmp_path_factory.mktemp("data") / "dataset").folder


def learn_alone(base: Path, dataset: Path, run: Path, trainable: str) -> None:
    config = TrainConfig(steps=STEPS, batch_size=3, prior_batch_size=2, sample_every=0, device="cpu")
    train(load_base(base), DatasetFolder(dataset), config.replace(trainable=trainable), run)


def learn_together(base: Path, dataset: Path, run: Path, trainable: str, launchers: Sequence[tuple[str, ...]]) -> None:
    """Train with the command line, started by each launcher at once."""
    settings = f"--steps {STEPS} --batch-size 3 --prior-batch-size 2 --sample-every 0 --device cpu".split()
    settings += ["--trainable", trainable]
    inputs = ["--base", str(base), "--dataset", str(dataset), "--out", str(run)]
    started = [
        subprocess.Popen(
            [sys.executable, *launcher, "-m", "far_train", "train", *inputs, *settings],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for launcher in launchers
    ]
    said = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), said
    assert "".join(said).count(f"{STEPS} steps →") == 1  # one process speaks


def last_checkpoint(run: Path) -> dict[str, torch.Tensor]:
    """The fp32 values."""
    return load_file(run / "checkpoints" / f"checkpoint-{STEPS:08d}.safetensors")


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch comes without torch.distributed")
def test_two_machines_learn_what_one_learns_of_kv(tiny_folder: Path, dataset: Path, tmp_path: Path):
    check_two_processes(tiny_folder, dataset, tmp_path, "kv", "value/kv", two_machines())


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch comes without torch.distributed")
@pytest.mark.parametrize("family", [SDXL], ids=lambda f: f.key, indirect=True)  # two text encoders; above, one
def test_two_processes_learn_what_one_learns(family_folder: Path, dataset: Path, tmp_path: Path):
    check_two_processes(family_folder, dataset, tmp_path, "lora", "value/low_rank", ONE_MACHINE)


def check_two_processes(
    tiny_folder: Path, dataset: Path, tmp_path: Path, trainable: str, name: str, launchers: Sequence[tuple[str, ...]]
) -> None:
    """Five samples a step, so that the shares differ in size."""
    learn_alone(tiny_folder, dataset, tmp_path / "alone", trainable)
    learn_together(tiny_folder, dataset, tmp_path / "together", trainable, launchers)
    alone, together = (last_checkpoint(tmp_path / run) for run in ("alone", "together"))
    # Norms, not elements: one that happens to be near 0 differs by more of itself, and AdamW takes a gradient that is
    # nothing but rounding for as large as any other.
    assert alone.keys() == together.keys()
    for key in (k for k in alone if k.startswith("value/rows")):  # of each text encoder
        assert together[key].any() and (alone[key] - together[key]).norm() < 1e-5 * alone[key].norm()
    changes = alone[name] - together[name]
    assert together[name].any()
    frozen = torch.cat(list(kv_weights(load_base(tiny_folder).unet).values()))
    whole = frozen + alone[name] if trainable == "kv" else alone[name]  # low-rank halves begin at random, not at 0
    assert changes.norm() < 1e-5 * whole.norm()
    ours, theirs = (FarWeights.load(tmp_path / run / "weights.safetensors") for run in ("alone", "together"))
    own, other = (torch.cat([w.delta(k).float().flatten() for k in ours.shapes()]) for w in (ours, theirs))
    assert (own - other).norm() < 1e-3 * own.norm()  # of the change alone
    losses = [[m["loss"] for m in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("alone", "together")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == STEPS


def test_alone_nothing_is_joined(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed_context("cpu") as world:
        assert world == World(0, 1) and world.is_main_process
        assert world.any_process(True) and not world.any_process(False)


def test_processes_of_this_machine_are_told_from_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (World(0, 1).size_here, World(0, 8).size_here) == (1, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (World(0, 1).size_here, World(0, 8).size_here) == (1, 2)


def test_a_batch_smaller_than_the_number_of_processes(base, fusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(World, "current", classmethod(lambda cls: World(0, 4)))
    with pytest.raises(ConfigError, match="batch_size: 2 composites are too few for 4 processes"):
        TrainingRun(base, fusion, TrainConfig(device="cpu"), tmp_path)
    assert not any(tmp_path.iterdir())


FAILING = """
import sys
from pathlib import Path
from far_train.models.loading import load_base
from far_train.training.callbacks import Callbacks
from far_train.training.settings import TrainConfig
from far_train.data.dataset import DatasetFolder
from far_train.utils.errors import FarError
from far_train.training.distributed import distributed_context
from far_train.training.recipe import train

base, dataset, out = map(Path, sys.argv[1:])
with distributed_context("cpu") as world:
    def fail(step, metrics):
        if step == 2 and world.rank == 1:
            raise FarError("the disk is full")
    config = TrainConfig(steps=50, batch_size=2, sample_every=0, save_every=50, device="cpu")
    try:
        train(load_base(base), DatasetFolder(dataset), config, out, callbacks=Callbacks(on_step=fail))
    except FarError as e:
        print(type(e).__name__, e)
"""


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch comes without torch.distributed")
def test_a_process_that_fails_ends_the_others(tiny_folder: Path, dataset: Path, tmp_path: Path):
    """Nobody kills the others here, as torchrun would: they must end by themselves, and soon."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING, tiny_folder, dataset, tmp_path / "run"],
            cwd=ROOT,
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    first, second = (process.communicate(timeout=300)[0].strip() for process in processes)
    assert second == "FarError the disk is full"
    assert first == "ProcessFailed another process of this training failed; its own message says why"
    assert 2 <= len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 50
