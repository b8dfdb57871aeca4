"""Kills a training at random moments, resumes it, and compares its end with that of a run left alone.

    PYTHONPATH=. python tests/torture/crashes.py FOLDER SEED KILLS IN_SAVES   → FOLDER/result.json

Each session is a process of its own that trains the tiny model with the library's ``train`` and is ended by SIGKILL: at
a moment drawn evenly from the time that a session takes, or (for IN_SAVES of them) while a checkpoint is written.
Sessions are forked from one process that has everything imported, which costs milliseconds instead of seconds. A
run is killed four times, then finishes.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from far_train.data.concepts import ClassPicture, Concept
from far_train.data.fusion import ConceptFusion
from far_train.data.settings import FusionConfig
from far_train.mini.tiny import random_states, tiny_configs, write_folder
from far_train.models.loading import load_base
from far_train.training import recipe
from far_train.training.checkpoints import load_checkpoint
from far_train.training.run_folder import read_metrics
from far_train.training.settings import TrainConfig

CONFIG = TrainConfig(
    steps=24, batch_size=1, prior_batch_size=1, save_every=3, sample_every=8, sample_steps=1, attention_cells=8,
    sample_prompts=("a <red-ball> ball",), device="cpu",
)  # fmt: skip
KILLS_PER_RUN = 4
IN_SAVE, STEPS = 0, 1  # where the shared memory says that a checkpoint is being written, and how many steps are done


class Lab:
    """A tiny base and dataset, and the sessions that train on them."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng = folder, random.Random(seed)
        configs = tiny_configs(size=64)
        self.base = load_base(write_folder(folder / "base", configs, random_states(configs)))
        mask = torch.zeros(64, 64)
        mask[16:48, 16:48] = 1
        picture = mask[..., None] * torch.tensor([0.9, 0.1, 0.1])
        concept = Concept("<red-ball>", "ball", (picture,), (mask,))
        priors = [ClassPicture("ball", 1 - picture, mask)]
        self.dataset = ConceptFusion([concept], priors, (), FusionConfig(size=64, count=3))
        self.shared = mmap.mmap(-1, 2)
        save = recipe.save_checkpoint

        def marked_save(*args):
            self.shared[IN_SAVE] = 1
            save(*args)
            self.shared[IN_SAVE] = 0

        recipe.save_checkpoint = marked_save

    def session(self, run: Path) -> int:
        """Fork a process that begins the run or goes on with it; its id."""
        self.shared[IN_SAVE] = self.shared[STEPS] = 0
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            count = recipe.Callbacks(on_step=lambda step, _: self.shared.__setitem__(STEPS, step))
            recipe.train(self.base, self.dataset, CONFIG, run, resume=True, callbacks=count)
            status = 0
        finally:
            os._exit(status)

    def finish(self, run: Path) -> float:
        """A session to its end; its seconds."""
        started = time.monotonic()
        _, status = os.waitpid(self.session(run), 0)
        assert status == 0, f"{run.name} could not be resumed"
        return time.monotonic() - started

    def kill(self, run: Path, seconds: float, in_save: bool) -> str:
        """Begin a session and kill it; where it was: "save", "elsewhere", or "over" if it had ended by itself."""
        child = self.session(run)
        if in_save:
            saves = self.rng.randrange(3)  # not always in the first save of a session
            while not self._gone(child) and saves >= 0:
                while not self.shared[IN_SAVE] and not self._gone(child):
                    time.sleep(0.0005)
                saves -= 1
                while saves >= 0 and self.shared[IN_SAVE] and not self._gone(child):
                    time.sleep(0.0005)
            seconds = self.rng.random() * 0.006
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # one that has ended is still there until it is waited for
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return "over"
        return "save" if self.shared[IN_SAVE] else "elsewhere"

    @staticmethod
    def _gone(child: int) -> bool:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def check(self, run: Path) -> int:
        """Read what a killed session left; how many of its steps are lost. Every file must be whole."""
        for path in run.rglob("*.safetensors"):
            if ".part" not in path.name:
                with safe_open(path, "pt") as file:
                    [file.get_tensor(k) for k in file.keys()]
        step = 0
        # The library's own verdict, with its checksums, on every checkpoint by itself.
        for path in sorted((run / "checkpoints").glob("checkpoint-*.safetensors")):
            alone = self.folder / "alone"
            alone.mkdir(exist_ok=True)
            (alone / path.name).hardlink_to(path)
            state = load_file(path)
            parameters = {
                k.removeprefix("value/"): torch.nn.Parameter(v) for k, v in state.items() if k.startswith("value/")
            }
            step = load_checkpoint(alone, parameters, torch.optim.AdamW(parameters.values()))
            (alone / path.name).unlink()
        return max(self.shared[STEPS] - step, 0)


def main(folder: Path, seed: int, kills: int, in_saves: int) -> None:
    torch.set_num_threads(1)
    lab = Lab(folder, seed)
    seconds = lab.finish(folder / "undisturbed")
    whole = load_file(folder / "undisturbed" / "weights.safetensors")
    history = [m["loss"] for m in read_metrics(folder / "undisturbed" / "metrics.jsonl")]
    done, wrong, lost, number = Counter(), [], Counter(), 0
    while done["save"] < in_saves or done["save"] + done["elsewhere"] < kills:
        run = folder / f"run-{number}"
        number += 1
        for _ in range(KILLS_PER_RUN):
            in_save = done["save"] < in_saves and lab.rng.random() < 0.5
            where = lab.kill(run, lab.rng.random() * seconds, in_save)
            done[where] += 1
            if where == "over":
                break
            try:
                steps = lab.check(run)
                lost[steps] += 1
                if steps > CONFIG.save_every:
                    wrong.append(f"{run.name}: {steps} steps were lost")
            except Exception as e:
                wrong.append(f"{run.name}: killed in {where}, unreadable: {e!r}")
        lab.finish(run)
        learned = load_file(run / "weights.safetensors")
        if learned.keys() != whole.keys() or not all(torch.equal(learned[k], whole[k]) for k in whole):
            wrong.append(f"{run.name}: learned something else than the run left alone")
        if any(p.name.startswith(".") for p in run.rglob("*")):
            wrong.append(f"{run.name}: half-written files remain")
        if [m["loss"] for m in read_metrics(run / "metrics.jsonl")] != history:
            wrong.append(f"{run.name}: its history differs")
    result = {"kills": done, "runs": number, "steps lost": dict(sorted(lost.items())), "wrong": wrong}
    (folder / "result.json").write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
