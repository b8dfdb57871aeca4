"""Trainings one after another in one process, however each of them ends: nothing stays behind, nothing is lost."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from far_train.data.concepts import ClassPicture, Concept
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.mini.tiny import random_states, tiny_configs, write_folder
from far_train.models.base import BaseModel
from far_train.models.loading import load_base
from far_train.training import recipe, step
from far_train.training.memory_plan import MemoryPlan
from far_train.training.oom_fallback import OomFallback
from far_train.training.recipe import Callbacks, train
from far_train.training.run_folder import read_metrics
from far_train.training.settings import TrainConfig
from far_train.utils import files
from far_train.utils.errors import Interrupted, OutOfMemory, OutputError, TrainingDiverged

from .conftest import disc
from .test_recipe import same_weights, state_of, stop_at

CONFIG = TrainConfig(
    steps=20, batch_size=2, prior_batch_size=1, save_every=5, sample_every=0, attention_cells=8, device="cpu"
)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base at 64 px, where a step takes milliseconds."""
    configs = tiny_configs(size=64)
    return write_folder(tmp_path_factory.mktemp("small"), configs, random_states(configs))


@pytest.fixture
def small(small_folder: Path) -> BaseModel:
    return load_base(small_folder)


@pytest.fixture(scope="module")
def balls() -> ConceptFusion:
    concepts = [
        Concept("<red-ball>", "ball", *((part,) for part in disc(96, (0.9, 0.1, 0.1), (0.5, 0.5), 0.3))),
        Concept("<blue-ball>", "ball", *((part,) for part in disc(96, (0.1, 0.1, 0.9), (0.5, 0.5), 0.3))),
    ]
    priors = [ClassPicture("ball", *disc(96, (0.1, 0.8, 0.1), (0.5, 0.5), 0.3))]
    return ConceptFusion(concepts, priors, (), FusionConfig(size=64, count=4))


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) not in (torch.Tensor, torch.nn.Parameter):
            continue  # the fake tensors that compiling leaves behind hold no memory
        if not thing.is_meta and not torch._is_functional_tensor(thing):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


class Failing:
    """Calls a function, but raises ``error`` in the calls with these numbers, counted from 1."""

    def __init__(self, function, error: BaseException, *numbers: int):
        self.function, self.error, self.numbers, self.calls = function, error, numbers, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls in self.numbers:
            raise type(self.error)(*self.error.args)  # anew, since an exception keeps the frames that it passed
        return self.function(*args, **kwargs)


# ---- stop and resume


def test_resumed_at_every_step_it_ends_in_the_same_bits(small: BaseModel, balls, tmp_path: Path):
    config = CONFIG.replace(steps=8, save_every=3)
    whole = train(small, balls, config, tmp_path / "whole")
    for stop in range(1, config.steps):
        run = tmp_path / f"stopped-{stop}"
        with pytest.raises(Interrupted, match=f"stopped at step {stop} of 8, which is saved"):
            train(small, balls, config, run, callbacks=stop_at(stop))
        assert (run / "checkpoints" / f"checkpoint-{stop:08d}.safetensors").exists()
        assert same_weights(whole, train(small, balls, config, run, resume=True)), stop


def test_a_cancel_while_samples_are_drawn_is_heard_at_the_next_sampling_step(small, balls, tmp_path: Path, monkeypatch):
    config = CONFIG.replace(sample_every=3, sample_steps=7)
    asked, drawing = [], []
    draw = recipe.draw_pictures

    def drawn(*args, on_progress, **kwargs):
        def count(done: int, total: int) -> None:
            drawing.append(done)
            on_progress(done, total)

        return draw(*args, on_progress=count, **kwargs)

    monkeypatch.setattr(recipe, "draw_pictures", drawn)
    callbacks = Callbacks(should_stop=lambda: bool(drawing) and (asked.append(1) or True))
    with pytest.raises(Interrupted, match="stopped at step 3 of 20, which is saved"):
        train(small, balls, config, tmp_path / "run", callbacks=callbacks)
    assert drawing == [1]
    monkeypatch.undo()
    whole = train(small, balls, CONFIG, tmp_path / "whole")
    assert same_weights(whole, train(small, balls, config, tmp_path / "run", resume=True))


# ---- many runs in one process


def test_ten_runs_in_one_process_leave_nothing_behind(small: BaseModel, balls, tmp_path: Path, monkeypatch):
    """Finished, cancelled, out of memory, diverged and failed runs in turn."""
    config = CONFIG.replace(steps=4, save_every=2)

    def run(number: int, callbacks: Callbacks = Callbacks()):
        return train(small, balls, config, tmp_path / str(number), callbacks=callbacks)

    draw = step.sample_batch

    def poisoned(*args, **kwargs):
        batch = draw(*args, **kwargs)
        return dataclasses.replace(batch, latents=batch.latents * float("nan"))

    first = run(0)
    state = state_of(small)
    before = live_bytes()
    resident = []
    for number in range(1, 11):
        kind = number % 5
        if kind == 1:
            with pytest.raises(Interrupted):
                run(number, stop_at(2))
        elif kind == 2:
            with monkeypatch.context() as patch:
                patch.setattr(step, "forward_backward", Failing(None, MemoryError(), *range(1, 100)))
                with pytest.raises(OutOfMemory):
                    run(number)
        elif kind == 3:
            with monkeypatch.context() as patch:
                patch.setattr(step, "sample_batch", poisoned)
                with pytest.raises(TrainingDiverged):
                    run(number)
        elif kind == 4:
            with pytest.raises(ZeroDivisionError):
                run(number, Callbacks(on_step=lambda *_: 1 / 0))
        else:
            assert same_weights(first, run(number))
        now = live_bytes()
        assert now <= before, number  # less, where what an earlier test left behind has gone meanwhile
        before = now
        resident.append(resident_bytes() if Path("/proc/self/status").exists() else 0)
    after = state_of(small)
    assert all(torch.equal(state[k], after[k]) for k in state)
    # Allocators keep some memory for later; what they keep must not go on growing.
    assert max(resident[5:]) - min(resident[4:]) < 32 * 2**20, resident


# ---- out of memory


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
                                   torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")])  # fmt: skip
def test_out_of_memory_is_tried_again_with_less_at_once(small, balls, tmp_path: Path, monkeypatch, caplog, error):
    """The third backward fails twice: halves, then checkpointing. The gradient is the whole step's all the same."""
    whole = train(small, balls, CONFIG.replace(steps=3), tmp_path / "whole")
    sizes = []

    class Spy(Failing):
        def __call__(self, state, batch, *rest):
            sizes.append(len(batch))
            return super().__call__(state, batch, *rest)

    monkeypatch.setattr(step, "forward_backward", Spy(step.forward_backward, error, 3, 4))
    weights = train(small, balls, CONFIG.replace(steps=3), tmp_path / "run")
    assert sizes == [3, 3, 3, 1, 1, 1, 1]
    assert "continuing with gradient checkpointing" in caplog.text and "continuing with micro_batch 1" in caplog.text
    assert not small.unet.training and not small.unet.is_gradient_checkpointing
    assert weights.provenance.config == whole.provenance.config
    for name in whole.shapes():
        assert torch.allclose(weights.delta(name).float(), whole.delta(name).float(), atol=2e-5), name
    losses = [[m["loss"] for m in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("whole", "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_sample_pictures_that_do_not_fit_are_left_out(small, balls, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(recipe, "draw_pictures", Failing(None, RuntimeError("CUDA out of memory"), 1, 2))
    config = CONFIG.replace(steps=4, sample_every=2)
    assert train(small, balls, config, tmp_path / "run").provenance.steps == 4
    assert "the sample pictures are left out" in caplog.text


@pytest.mark.parametrize("what", ["sample", "check"])
def test_pictures_of_which_not_even_one_fits_are_left_out(small, balls, tmp_path: Path, monkeypatch, caplog, what):
    """The pictures' own smaller batches are of no use: the UNet fails whenever it draws."""
    forward = small.unet.forward

    def full(*given, **named):
        if not torch.is_grad_enabled():
            raise RuntimeError("CUDA out of memory")
        return forward(*given, **named)

    monkeypatch.setattr(small.unet, "forward", full)
    config = CONFIG.replace(steps=4, output_preservation=False, sample_every=2 if what == "sample" else 0)
    callbacks = Callbacks(on_check=lambda *_: pytest.fail("nothing was drawn")) if what == "check" else Callbacks()
    assert train(small, balls, config, tmp_path / "run", callbacks=callbacks).provenance.steps == 4
    assert "are left out" in caplog.text and "even one at a time" in caplog.text


def test_other_errors_are_not_taken_for_memory(small: BaseModel):
    with pytest.raises(RuntimeError, match="shapes"):
        OomFallback(small.unet, MemoryPlan(4, False)).run(Failing(None, RuntimeError("shapes differ"), 1), 4)
    assert not small.unet.is_gradient_checkpointing


# ---- the disk


def test_free_space_is_looked_at_before_the_first_step(small, balls, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=files.SPARE_BYTES + 1000))
    steps = []
    with pytest.raises(OutputError, match=r"run.*MB are needed, and 17 MB of the disk are free"):
        train(small, balls, CONFIG, tmp_path / "run", callbacks=Callbacks(on_step=lambda *a: steps.append(a)))
    assert not steps
    monkeypatch.undo()
    assert train(small, balls, CONFIG, tmp_path / "run", resume=True).provenance.steps == 20


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(small, balls, tmp_path: Path, monkeypatch):
    whole = train(small, balls, CONFIG, tmp_path / "whole")
    usage = shutil.disk_usage

    def filling(path):
        full = (tmp_path / "run" / "checkpoints" / "checkpoint-00000010.safetensors").exists()
        return SimpleNamespace(free=0) if full else usage(path)

    monkeypatch.setattr(files.shutil, "disk_usage", filling)
    with pytest.raises(OutputError, match="free space or choose another place"):
        train(small, balls, CONFIG, tmp_path / "run")
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["checkpoint-00000005.safetensors", "checkpoint-00000010.safetensors"]
    monkeypatch.undo()
    assert same_weights(whole, train(small, balls, CONFIG, tmp_path / "run", resume=True))


def test_what_a_killed_process_left_is_swept_up(small, balls, tmp_path: Path):
    with pytest.raises(Interrupted):
        train(small, balls, CONFIG, tmp_path, callbacks=stop_at(2))
    names = (".checkpoint-00000005.abc.part.safetensors", f".{'0' * 32}.tmp", ".tmp25Zs2Y")
    rubbish = [tmp_path / "checkpoints" / name for name in names]
    own = tmp_path / ".notes"
    for path in (*rubbish, own):
        path.write_bytes(b"half")
    train(small, balls, CONFIG.replace(), tmp_path, resume=True)
    assert own.exists() and not any(p.exists() for p in rubbish)
