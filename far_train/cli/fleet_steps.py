"""What a fleet does with one job, on whatever machine: its steps, and the file that says how far it is.

The job's folder holds everything: ``subjects/``, ``dataset/``, ``run/``, ``export/``, ``pictures/``, ``job.log`` and
``job.json``, which names the steps that are done with what they were given. A job therefore goes on anywhere: what is
done is skipped, a training resumes from its checkpoint, any other step begins anew.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import ConfigError, FarError, Interrupted
from ..utils.files import make_folder, parse_json, write_json
from .fleet_jobs import STEPS, Job

if TYPE_CHECKING:
    from ..training.settings import TrainConfig

STATE_FILE, LOG_FILE = "job.json", "job.log"
DONE, FAILED, STOPPED, RUNNING = "done", "failed", "stopped", "running"
SUBJECTS, DATASET, RUN, EXPORT, PICTURES = "subjects", "dataset", "run", "export", "pictures"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """A job and where it is done. ``device``: for steps that were given none. ``shared``: what jobs have in common."""

    job: Job
    folder: Path
    shared: Path
    device: str = "auto"

    def train_settings(self) -> TrainConfig:
        """The job's own, with the shared folders where it names none."""
        config = self.job.settings("train")
        shared = {"class_image_cache": self.shared / "class-images", "encoding_cache": self.shared / "encodings"}
        return config.replace(**{k: str(folder) for k, folder in shared.items() if getattr(config, k) is None})


def read_state(folder: Path) -> dict[str, Any]:
    """What a job's folder says of it; of one that never began, or can't be read, nothing."""
    try:
        state = parse_json((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def run_job(work: Work) -> dict[str, Any]:
    """Do what of a job isn't done; its state at the end, which is also in its folder.

    Only an error of the disk is raised: what goes wrong with the job is part of its state.
    """
    import torch

    torch.set_num_threads(work.job.placement.cpus)  # sums depend on it: elsewhere the job goes on to the same bits
    make_folder(work.folder)
    before = read_state(work.folder)
    steps = before.get("steps")
    state: dict[str, Any] = {
        "state": RUNNING,
        "step": "",
        "error": "",
        "machine": platform.node(),
        "attempts": int(before.get("attempts", 0)) + 1,
        "steps": steps if isinstance(steps, dict) else {},
    }
    with _logging_to(work.folder / LOG_FILE):
        try:
            for name, given, run in _steps(work):
                _do(state, work, name, given, run)
            state["state"] = DONE
        except (KeyboardInterrupt, Interrupted):
            state["state"] = STOPPED
        except FarError as e:
            state |= {"state": FAILED, "error": str(e)}
            print(f"error: {e}", file=sys.stderr)
        except Exception as e:  # whatever it is, it is this job's alone
            state |= {"state": FAILED, "error": f"{type(e).__name__}: {e} ({LOG_FILE} has the details)"}
            traceback.print_exc()
        write_json(work.folder / STATE_FILE, state)
    return state


def is_done(work: Work) -> bool:
    """Whether nothing is left to do or to say: every step is done, with what it is given now."""
    state = read_state(work.folder)
    done = state.get("steps", {})
    ours = ((name, given) for name, given, _ in _steps(work))
    return state.get("state") == DONE and all(
        done.get(name, {}).get("done") and done[name].get("given") == given for name, given in ours
    )


def _do(state: dict[str, Any], work: Work, name: str, given: Mapping[str, Any], run: Callable[[], None]) -> None:
    about = state["steps"].setdefault(name, {"done": False, "seconds": 0.0})
    if about["done"]:
        if about.get("given") != given:
            old = about.get("given") or {}
            keys = [k for k in sorted({*old, *given}) if old.get(k) != given.get(k)]
            changed = "; ".join(f"{k}: {old.get(k)!r} then, {given.get(k)!r} now" for k in keys)
            raise ConfigError(
                f"{name}: was done with other settings ({changed}); undo that, rename the job, or delete {work.folder}"
            )
        return
    state["step"], about["given"] = name, given
    write_json(work.folder / STATE_FILE, state)
    began = time.monotonic()
    print(f"---- {name}", file=sys.stderr)
    try:
        run()
        about["done"] = True
    finally:
        about["seconds"] = round(about["seconds"] + time.monotonic() - began, 1)
    write_json(work.folder / STATE_FILE, state)


def _steps(work: Work) -> Iterator[tuple[str, dict[str, Any], Callable[[], None]]]:
    """The name of each step, what the job file gives it, and a function that does it."""
    job, folder = work.job, work.folder
    dataset = Path(job.dataset or folder / DATASET)
    subjects = [_subjects(concept, number, folder) for number, concept in enumerate(job.concepts, 1)]
    for number, (concept, (token, _, out)) in enumerate(zip(job.concepts, subjects), 1):
        if "photos" in concept:
            own = {k: concept[k] for k in ("photos", "box", "points", "prompts") if concept.get(k)}
            given = {**job.sections["extract"], **own, "token": token}
            yield f"extract {number}", given, partial(_call_anew, work, "extract", Path(out), **own)
    run = folder / RUN
    learned, dataset_given = str(run / "weights.safetensors"), {"dataset": job.dataset} if job.dataset else {}
    does: dict[str, tuple[dict[str, Any], Callable[[], None]]] = {
        "fuse": (
            {"concepts": [[c["token"], c["noun"], c.get("subjects")] for c in job.concepts]},
            partial(_call_anew, work, "fuse", dataset, concept=subjects),
        ),
        "train": ({**job.base, **dataset_given}, partial(_train, work, dataset, run)),
        "export": (
            {},
            partial(_call, work, "export", name=job.name, weights=learned, out=str(folder / EXPORT)),
        ),
        "generate": ({}, partial(_generate, work, dataset, learned)),
        "evaluate": ({}, partial(_call, work, "evaluate", pictures=str(folder / PICTURES), concept=subjects)),
    }
    for name, (given, do) in does.items():
        if name in job.sections:
            yield name, {**job.sections[name], **given}, do


def _subjects(concept: Mapping[str, Any], number: int, folder: Path) -> list[str]:
    """Token, noun and folder of a concept's subjects, extracted already or by this job."""
    out = concept.get("subjects") or str(folder / SUBJECTS / str(number))
    return [concept["token"], concept["noun"], out]


def _call(work: Work, step: str, **filled: Any) -> None:
    """Run a step's command. What the job file gives comes before what the fleet fills in."""
    command = STEPS[step].command
    inputs = {**filled, **work.job.inputs(step)}
    if any(a.name == "device" for a in command.arguments):
        inputs.setdefault("device", work.device)
    command.run(inputs, work.job.settings(step))


def _call_anew(work: Work, step: str, out: Path, **filled: Any) -> None:
    """Run a step's command that fills a folder, without what the step left there when it was stopped or killed."""
    shutil.rmtree(out, ignore_errors=True)
    _call(work, step, **filled, out=str(out))


def _train(work: Work, dataset: Path, run: Path) -> None:
    job, settings = work.job, work.train_settings()
    if "device" not in job.sections["train"]:
        settings = settings.replace(device=work.device)
    inputs = {**job.base, **job.inputs("train"), "dataset": str(dataset), "out": str(run), "resume": True}
    STEPS["train"].command.run(inputs, settings)


def _generate(work: Work, dataset: Path, weights: str) -> None:
    from ..data.captions import default_prompts
    from ..data.dataset import DatasetFolder

    prompts = list(default_prompts(DatasetFolder(dataset).names))
    _call_anew(work, "generate", work.folder / PICTURES, **work.job.base, weights=weights, prompt=prompts)


# ---- what several jobs share


@dataclass(frozen=True, eq=False)
class ClassPictures:
    """The regularization images of one noun that several jobs train with: drawn once, before them."""

    job: Job  # one of those jobs: all agree in what decides the pictures
    noun: str
    count: int


def shared_pictures(jobs: list[Job]) -> dict[str, list[ClassPictures]]:
    """What is to be drawn before each job, by the job's name: one object for all jobs that need the same.

    What a single job needs it draws itself; so do jobs with a dataset, whose nouns aren't known here, and with a base
    in 8 bits.
    """
    wanted: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        if not job.concepts or job.sections["fuse"].get("prior"):
            continue
        config = job.settings("train")
        if config.prior_batch_size and not config.class_image_cache and not config.fp8_base:
            sampling = (config.class_image_steps, config.train_seed, config.precision, config.device)
            base = (*sorted(job.base.items()), job.settings("fuse").size, *sampling, job.placement.gpus == 0)
            for noun in {concept["noun"] for concept in job.concepts}:
                wanted.setdefault((*base, noun), []).append(job)
    found: dict[str, list[ClassPictures]] = {job.name: [] for job in jobs}
    for key, users in wanted.items():
        if len(users) == 1:
            continue
        count = max(job.settings("train").num_class_images for job in users)
        pictures = ClassPictures(users[0], key[-1], count)
        for job in users:
            found[job.name].append(pictures)
    return found


def draw_shared(pictures: ClassPictures, work: Work) -> None:
    """Draw what is missing of them into the shared folder, where the trainings look for them.

    An error is left to the jobs, each of which meets it and reports it.
    """
    from ..models.loading import load_base
    from ..training.class_images import cache_folder, draw_class_images, prior_sampling
    from ..utils.devices import choose_device

    config = work.train_settings()
    device, dtype = choose_device(work.device if config.device == "auto" else config.device, config.precision)
    size = work.job.settings("fuse").size
    try:
        base = load_base(
            work.job.base["base"],
            prediction_type=work.job.base.get("prediction_type"),
            config=work.job.base.get("base_config"),
        ).to(device, dtype)
        folder = cache_folder(base, config, size)
        draw_class_images(base, [pictures.noun], pictures.count, folder, prior_sampling(config), size=size)
    except Exception as e:
        log.warning("regularization images of '%s': %s", pictures.noun, e)


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Within, what commands say, their progress included, goes to a file."""
    with open(path, "a", encoding="utf-8") as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root, level = logging.getLogger(), logging.getLogger().level
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            root.removeHandler(handler)
            root.setLevel(level)
