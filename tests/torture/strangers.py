"""Loads mutated files and watches what that does; run in a process of its own, since it may die of them.

    PYTHONPATH=. python tests/torture/strangers.py FOLDER SEED FIRST COUNT   → FOLDER/result.json

Every case is made from (SEED, its number) alone, so that one that fails can be run again by itself.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mutations import mutate_bytes, mutate_json, mutate_safetensors, no_model_at_all
from safetensors.torch import save_file

from far_train.data.concepts import ClassPicture, Concept
from far_train.data.dataset import DatasetFolder, write_dataset
from far_train.data.fusion import ConceptFusion
from far_train.data.sam import load_sam
from far_train.data.settings import FusionConfig
from far_train.mini.shipped import SAM
from far_train.mini.tiny import random_states, single_file_state, tiny_configs, write_folder
from far_train.models.layers import kv_weights
from far_train.models.loading import load_base
from far_train.models.weights import FarWeights, Provenance, describe
from far_train.training.checkpoints import load_checkpoint, save_checkpoint
from far_train.training.run_folder import SCHEMA, find_run
from far_train.utils.errors import FarError

SECONDS = 5.0
SPARE = 64 * 2**20  # bytes of memory beyond eight times the size of the files
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree")
FORBIDDEN = ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "pickle.find_class", *WRITES)


class Watch:
    """Notes what Python code does to the world while ``on``: files written, connections, processes, pickles."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {args[:1]}")
        elif event == "open" and isinstance(args[2], int) and args[2] & 3:  # write-only or read-write
            self.seen.append(f"open for writing {args[0]}")


def memory(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process in bytes; 0 where the system doesn't tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def trained() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """Parameters and an optimizer as a checkpoint has them."""
    parameters = {"rows": torch.nn.Parameter(torch.ones(2, 8)), "a.to_k": torch.nn.Parameter(torch.ones(8, 8))}
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return parameters, optimizer


class Targets:
    """Genuine files of every kind that the library reads, and how each is read. ``cases``: name → (weight, maker)."""

    def __init__(self, folder: Path):
        self.genuine = folder / "genuine"
        self.place = folder / "mutated"
        configs = tiny_configs(size=64)
        states = random_states(configs)
        write_folder(self.genuine / "base", configs, states)
        self.configs, self.base = configs, load_base(self.genuine / "base")
        save_file(
            {k: v.contiguous() for k, v in single_file_state(configs, states).items()}, self.genuine / "sd.safetensors"
        )
        tokens = {t: {"clip_h": torch.ones(2, 32)} for t in ("<red-ball>", "<blue-ball>")}
        deltas = {k: torch.zeros(w.shape, dtype=torch.float16) for k, w in kv_weights(self.base.unet).items()}
        about = Provenance(
            "sd21", self.base.digest, "v_prediction", dict.fromkeys(tokens, "ball"), 10, 64, {"steps": 10}
        )
        FarWeights(tokens, deltas, about).save(self.genuine / "far.safetensors")
        save_checkpoint(self.genuine, 7, *trained(), keep=1)
        torch.save({k: v for k, v in load_sam(SAM).state_dict().items()}, self.genuine / "sam.pth")
        disc = torch.zeros(64, 64)
        disc[16:48, 16:48] = 1
        concept = Concept("<red-ball>", "ball", (torch.rand(64, 64, 3),), (disc,))
        priors = [ClassPicture("ball", torch.rand(64, 64, 3), disc)]
        write_dataset(ConceptFusion([concept], priors, (), FusionConfig(size=64, count=2)), self.genuine / "dataset")
        self.cases: dict[str, tuple[int, Callable[[random.Random], Callable[[], Any]]]] = {
            "FaR weights": (45, self.weights),
            "checkpoint": (12, self.checkpoint),
            "base, one file": (6, self.base_file),
            "base, weights of a folder": (5, self.base_weights),
            "base, configs of a folder": (8, self.base_config),
            "SAM .safetensors": (6, self.sam),
            "SAM .pth": (4, self.sam_pth),
            "dataset": (12, self.dataset),
            "run.json": (2, self.run_file),
        }

    def _put(self, name: str, data: bytes) -> Path:
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def _copy(self, folder: str) -> Path:
        shutil.copytree(self.genuine / folder, self.place / folder, copy_function=lambda a, b: Path(b).hardlink_to(a))
        return self.place / folder

    def _replace(self, path: Path, data: bytes) -> None:
        path.unlink()  # a hard link: the genuine file must stay
        path.write_bytes(data)

    def weights(self, rng: random.Random) -> Callable[[], Any]:
        data = mutate_safetensors((self.genuine / "far.safetensors").read_bytes(), rng, "far")
        path = self._put("far.safetensors", data)

        def load() -> None:
            weights = FarWeights.load(path)
            json.dumps(describe(weights))
            try:
                weights.check_fits(self.base)
            except FarError:
                pass  # names the base, not the file

        return load

    def checkpoint(self, rng: random.Random) -> Callable[[], Any]:
        name = "checkpoint-00000007.safetensors"
        self._put(name, mutate_safetensors((self.genuine / name).read_bytes(), rng, "far_checkpoint"))
        parameters, optimizer = trained()

        def load() -> None:
            if load_checkpoint(self.place, parameters, optimizer) != 7:
                raise AssertionError("another step")
            optimizer.step()

        return load

    def base_file(self, rng: random.Random) -> Callable[[], Any]:
        path = self._put("sd.safetensors", mutate_safetensors((self.genuine / "sd.safetensors").read_bytes(), rng))
        return lambda: load_base(path, config=self.configs)

    def base_weights(self, rng: random.Random) -> Callable[[], Any]:
        folder = self._copy("base")
        path = rng.choice(sorted(folder.glob("*/*.safetensors")))
        self._replace(path, mutate_safetensors(path.read_bytes(), rng))
        return lambda: load_base(folder)

    def base_config(self, rng: random.Random) -> Callable[[], Any]:
        folder = self._copy("base")
        path = rng.choice([p for p in sorted(folder.glob("*/*.json")) if p.name != "vocab.json"])
        if rng.random() < 0.15:
            self._replace(path, mutate_bytes(path.read_bytes(), rng))
        else:
            self._replace(path, mutate_json(json.loads(path.read_text()), rng).encode("utf-8", "surrogatepass"))
        return lambda: load_base(folder)

    def sam(self, rng: random.Random) -> Callable[[], Any]:
        path = self._put("sam.safetensors", mutate_safetensors(SAM.read_bytes(), rng, "far_sam"))
        return lambda: load_sam(path)

    def sam_pth(self, rng: random.Random) -> Callable[[], Any]:
        data = (self.genuine / "sam.pth").read_bytes()
        path = self._put("sam.pth", no_model_at_all(rng) if rng.random() < 0.3 else mutate_bytes(data, rng))
        return lambda: load_sam(path)

    def dataset(self, rng: random.Random) -> Callable[[], Any]:
        folder = self._copy("dataset")
        index = folder / "dataset.json"
        if rng.random() < 0.6:
            self._replace(index, mutate_json(json.loads(index.read_text()), rng).encode("utf-8", "surrogatepass"))
        else:
            path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
            self._replace(path, mutate_bytes(path.read_bytes(), rng))

        def load() -> None:
            dataset = DatasetFolder(folder)
            dataset.digest()
            for i in range(dataset.composite_count()):
                dataset.composite(i)
            for i in range(dataset.prior_count()):
                dataset.prior(i)

        return load

    def run_file(self, rng: random.Random) -> Callable[[], Any]:
        identity = {"schema": SCHEMA, "config": {"steps": 3}, "concepts": [{"token": "<a>", "noun": "b"}]}
        self._put("run/run.json", mutate_json(identity, rng).encode("utf-8", "surrogatepass"))
        return lambda: find_run(self.place, "run", identity)


def judge(load: Callable[[], Any], watch: Watch, place: Path) -> tuple[str, str | None]:
    """What came of one case, and what was wrong with that."""
    files = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in place.rglob("*")}
    size = sum(bytes_ for bytes_, _ in files.values())
    watch.seen.clear()
    forget_peak()
    before, started, wrong = memory("VmRSS"), time.monotonic(), None
    watch.on = True
    try:
        load()
        outcome = "loaded"
    except FarError as e:
        outcome = type(e).__name__
        named = any(p.name in str(e) for p in (place, *files))
        wrong = None if named else f"{outcome} doesn't name the file: {e}"
    except BaseException as e:
        outcome = "crashed"
        wrong = f"{type(e).__name__}: {str(e)[:300]}"
    watch.on = False
    seconds, grown = time.monotonic() - started, memory("VmHWM") - before
    if watch.seen:
        wrong = f"it did: {watch.seen[:3]}"
    if seconds > SECONDS:
        wrong = f"it took {seconds:.1f} s"
    if grown > SPARE + 8 * size:
        wrong = f"it took {grown / 1e6:.0f} MB of memory for {size / 1e6:.1f} MB of files"
    if {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in place.rglob("*")} != files:
        wrong = "files were written"
    return outcome, wrong


def main(folder: Path, seed: int, first: int, count: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    targets, watch = Targets(folder), Watch()
    names = list(targets.cases)
    for name in names:  # what Python and the libraries do only once is done before anything is measured
        for i in range(3):
            shutil.rmtree(targets.place, ignore_errors=True)
            load = targets.cases[name][1](random.Random(i))
            judge(load, watch, targets.place)
    outcomes: dict[str, Counter] = {name: Counter() for name in names}
    wrong, slowest = [], 0.0
    for number in range(first, first + count):
        rng = random.Random(f"{seed} {number}")
        name = rng.choices(names, [weight for weight, _ in targets.cases.values()])[0]
        shutil.rmtree(targets.place, ignore_errors=True)
        load = targets.cases[name][1](rng)
        (folder / "current").write_text(f"case {number}: {name}")
        started = time.monotonic()
        outcome, fault = judge(load, watch, targets.place)
        slowest = max(slowest, time.monotonic() - started)
        outcomes[name][outcome] += 1
        if fault:
            wrong.append(f"seed {seed}, case {number}, {name}: {fault}")
    result = {"outcomes": outcomes, "wrong": wrong, "slowest": round(slowest, 2)}
    (folder / "result.json").write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
