"""The job file of a fleet: a list of jobs, what all share, and what is tried out in a matrix.

    out: fleet                       # a folder per job; on a cluster one that all machines share
    defaults:                        # of every job
      base: models/v2-1_768-ema-pruned.safetensors
      train: {steps: 800}
    jobs:
      - name: corgis
        concepts:
          - {token: <corgi-dog>, noun: dog, photos: photos/corgi}
        matrix: {train.lora_rank: [4, 8]}

A job goes through the steps of :data:`STEPS`, each a command with its inputs and settings in a section of its name.
This module reads and checks; it needs neither Ray nor PyTorch, so a slip is told at once. Paths are relative to the
file's folder. Nothing is checked for being there: other machines may see what this one doesn't.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..utils.config import Config, nearest_name, read_settings, setting
from ..utils.errors import ConfigError
from ..utils.files import RESERVED_NAMES
from . import data, evaluation, training, use
from .parsing import Command
from .shared import texts

MOST_JOBS = 10_000  # more is a slip
NAME = re.compile(r"\w[\w.+=-]{0,99}")


@dataclass(frozen=True)
class Step:
    """A step of a job: its command, and those of the command's inputs that a job file gives; the fleet has the others.

    ``paths``: which of them are files or folders. ``optional``: it is done only where its section stands.
    """

    command: Command
    inputs: tuple[str, ...]
    paths: tuple[str, ...] = ()
    optional: bool = False


STEPS = {
    step.command.name: step
    for step in (
        Step(data.EXTRACT, ("sam", "device"), ("sam",)),
        Step(data.FUSE, ("prior", "backgrounds"), ("backgrounds",)),
        Step(
            training.TRAIN,
            ("continue_from", "check_encoder", "check_sam"),
            ("continue_from", "check_encoder", "check_sam", "class_image_cache", "encoding_cache"),
        ),
        Step(use.EXPORT, ("name", "rank")),
        Step(use.GENERATE, ("prompt", "count", "device")),
        Step(evaluation.EVALUATE, ("encoder", "sam", "device"), ("encoder", "sam"), optional=True),
    )
}
ALWAYS = ("extract", "fuse", "train")  # can't be left out
BASE = ("base", "base_config", "prediction_type")
CONCEPT = ("token", "noun", "photos", "subjects", "box", "points", "prompts")


@dataclass(frozen=True)
class Placement(Config):
    """Where a job of a fleet runs, and when."""

    cpus: int = setting(1, "CPU cores, and threads of PyTorch", low=1, high=1024)
    gpus: float | None = setting(
        None, "GPUs, or the share of one; default: 1 where there are GPUs, else 0", low=0, high=1
    )
    priority: int = setting(0, "jobs of higher priority begin first", low=-1_000_000, high=1_000_000)
    retries: int = setting(3, "how many times a job is restarted after losing its machine or process", low=0, high=100)


@dataclass(frozen=True)
class Job:
    """A job with everything that is known of it, in JSON types.

    ``base``: inputs by name. ``concepts`` or, where it is made already, the ``dataset`` folder. ``sections``: what each
    step that is to be done is given, by the step's name.
    """

    name: str
    base: dict[str, str]
    concepts: tuple[dict[str, Any], ...]
    dataset: str | None
    sections: dict[str, dict[str, Any]]
    placement: Placement

    def settings(self, step: str) -> Any:
        """The settings of one of its steps, defaults filled in."""
        command, inputs = STEPS[step].command, STEPS[step].inputs
        values = {k: v for k, v in self.sections[step].items() if k not in inputs}
        return command.settings.from_dict(values, f"'{step}'", inputs) if command.settings else None

    def inputs(self, step: str) -> dict[str, Any]:
        """What the job file gives one of its steps besides settings."""
        return {k: v for k, v in self.sections[step].items() if k in STEPS[step].inputs}


@dataclass(frozen=True)
class Jobs:
    """A job file: the folder of its results, and its jobs in their order."""

    out: Path
    jobs: tuple[Job, ...]


def read_jobs(path: Path) -> Jobs:
    """Read a job file. Raises ConfigError naming the file, the field, and the fix."""
    path = Path(path)
    values = read_settings(path, "jobs")
    try:
        values = json.loads(json.dumps(values))  # as it is read again, from the file of a job
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{path}: holds what is no text, number, list or mapping ({e}); put dates in quotes") from e
    try:
        return _parse(values, Path(os.path.abspath(path)).parent)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e


def _parse(values: Mapping[str, Any], folder: Path) -> Jobs:
    _refuse_unknown("", values, ("out", "defaults", "jobs"))
    defaults = _mapping("defaults", values.get("defaults") or {})
    keys = (*BASE, "concepts", "dataset", *_names(Placement), "matrix", *STEPS)
    _refuse_unknown("defaults.", defaults, keys)
    listed = values.get("jobs")
    if not isinstance(listed, list) or not listed:
        raise ConfigError("jobs: expected a list of jobs; write '- name: NAME' for each, with its settings below")
    jobs: list[Job] = []
    for number, entry in enumerate(listed, 1):
        own = _mapping(f"jobs, entry {number}", entry)
        name = own.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(
                f"jobs, entry {number}: name: {name!r} is no name for a job; use letters, digits and . _ + = -"
            )
        _refuse_unknown(f"{name}.", own, ("name", *keys))
        for label, chosen in _combinations(f"{name}.matrix", _merged(defaults, own)):
            jobs.append(_job(f"{name}{label}", chosen, folder))
        if len(jobs) > MOST_JOBS:
            raise ConfigError(f"jobs: more than {MOST_JOBS} are too many; split the file")
    seen: set[str] = set()
    for job in jobs:
        key = job.name.lower()  # many file systems don't distinguish case
        if key in seen or key in RESERVED_NAMES or key == SHARED:
            raise ConfigError(f"jobs: the name '{job.name}' is taken; each job needs a folder of its own, rename one")
        seen.add(key)
    return Jobs(Path(_absolute(folder, "out", values.get("out", "fleet"))), tuple(jobs))


SHARED = "shared"  # in the results: what several jobs use


def _names(config: type[Config]) -> tuple[str, ...]:
    return tuple(f.name for f in fields(config))


def _refuse_unknown(where: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}{name}: unknown; {nearest_name(str(name), known)}")


def _mapping(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected a mapping of settings, got {value!r}")
    return value


def _merged(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A job over the defaults; within the section of a step, setting by setting."""
    merged = {**defaults, **own}
    for step in STEPS:
        if isinstance(defaults.get(step), dict) and isinstance(own.get(step), dict):
            merged[step] = {**defaults[step], **own[step]}
    if {"concepts", "dataset"} & own.keys():  # one takes the place of the other
        merged = {k: v for k, v in merged.items() if k in own or k not in ("concepts", "dataset")}
    return merged


# ---- the matrix


def _combinations(where: str, job: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination of the matrix's values, the last one running fastest: what its name adds, and the job."""
    matrix = _mapping(where, job.pop("matrix", None) or {})
    axes = []
    for key, values in matrix.items():
        step, _, name = str(key).partition(".")
        if not (key in BASE or step in STEPS and name):
            raise ConfigError(f"{where}: {key}: expected base or STEP.setting, such as train.lora_rank")
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: {key}: expected a list of values, got {values!r}")
        axes.append([(key, value) for value in values])
    if (count := math.prod(map(len, axes))) > MOST_JOBS:
        raise ConfigError(f"{where}: {count} combinations are too many; at most {MOST_JOBS}, so split it")
    for combination in itertools.product(*axes):
        chosen, label = dict(job), ""
        for key, value in combination:
            step, _, name = key.partition(".")
            if name:
                section = _mapping(f"{where}: {step}", chosen.get(step) or {})
                chosen[step] = {**section, name: value}
            else:
                chosen[key] = value
            shown = Path(value).stem if key in BASE and isinstance(value, str) else str(value)
            label += f"-{name or key}={re.sub(r'[^A-Za-z0-9_.+]+', '_', shown)[:40]}"
        yield label, chosen


# ---- one job


def _job(name: str, values: Mapping[str, Any], folder: Path) -> Job:
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name}: is too long for the name of a folder; shorten the job's name")

    def path(field: str, value: Any) -> str:
        return _absolute(folder, f"{name}.{field}", value)

    base = {key: values[key] for key in BASE if values.get(key) is not None}
    if "base" not in base:
        raise ConfigError(f"{name}.base: is needed; the base model, a .safetensors file or a folder")
    base |= {key: path(key, base[key]) for key in ("base", "base_config") if key in base}
    given = [key for key in ("concepts", "dataset") if values.get(key)]
    if len(given) != 1:
        what = "both are given" if given else "neither is given"
        raise ConfigError(f"{name}: concepts, dataset: {what}; write concepts with photos, or the folder of a dataset")
    dataset = path("dataset", values["dataset"]) if given == ["dataset"] else None
    concepts = () if dataset else _concepts(name, values["concepts"], path)
    placement = _told(name, Placement.from_dict, {k: values[k] for k in _names(Placement) if k in values})
    skipped = () if concepts else ("extract", "fuse")
    sections = {step: _section(name, step, values, path) for step in STEPS if step not in skipped}
    if dataset and "evaluate" in sections and sections["evaluate"] is not None:
        raise ConfigError(f"{name}.evaluate: needs concepts, with whose photos it compares; write evaluate: false")
    job = Job(name, base, concepts, dataset, {k: v for k, v in sections.items() if v is not None}, placement)
    for step in job.sections:
        where = f"{name}.{step}"
        arguments = {a.name: a for a in STEPS[step].command.arguments}
        for key, value in job.inputs(step).items():
            _told(where, arguments[key].check, value)
        _told(where, job.settings, step)
    if "evaluate" in job.sections and "generate" not in job.sections:
        raise ConfigError(f"{name}.generate: is needed by evaluate, which judges its pictures; switch off both")
    return job


def _told(where: str, call: Callable[[Any], Any], value: Any) -> Any:
    """The result of a call whose errors lack the place."""
    try:
        return call(value)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from e


def _concepts(job: str, entries: Any, path: Callable[[str, Any], str]) -> tuple[dict[str, Any], ...]:
    if not isinstance(entries, list):
        raise ConfigError(f"{job}.concepts: expected a list of {{token: …, noun: …, photos: …}}, got {entries!r}")
    found = []
    for number, entry in enumerate(entries, 1):
        where = f"{job}.concepts, entry {number}"
        entry = {k: v for k, v in _mapping(where, entry).items() if v not in (None, "")}  # "photos:" gives none
        _refuse_unknown(f"{where}: ", entry, CONCEPT)
        for key in ("token", "noun"):
            if not isinstance(entry.get(key), str):
                raise ConfigError(f"{where}: {key}: is needed, as in {{token: <corgi-dog>, noun: dog, photos: FOLDER}}")
        folders = [key for key in ("photos", "subjects") if key in entry]
        if len(folders) != 1:
            raise ConfigError(
                f"{where}: photos: is needed, a folder of photos; or subjects, a folder of photos with masks"
            )
        entry[folders[0]] = path("concepts", entry[folders[0]])
        if isinstance(entry.get("prompts"), str):
            entry["prompts"] = path("concepts", entry["prompts"])
        found.append(entry)
    return tuple(found)


def _section(job: str, step: str, values: Mapping[str, Any], path: Callable[[str, Any], str]) -> dict[str, Any] | None:
    """What a step is given; None if it is not to be done."""
    about, where = STEPS[step], f"{job}.{step}"
    section = values.get(step)
    if section is False and step not in ALWAYS or section is None and about.optional:
        return None
    section = {} if section in (None, True) else dict(_mapping(where, section))
    own = {a.name for a in about.command.arguments} - set(about.inputs)
    config = about.command.settings or Config
    for key in section:
        if key in own and key not in _names(config):
            raise ConfigError(f"{where}.{key}: is filled in by the fleet; leave it out")
    section = config.current_names(section)
    for key in about.paths:
        if section.get(key) is not None:
            section[key] = path(f"{step}.{key}", section[key])
    if step == "fuse" and "prior" in section:
        section["prior"] = _priors(where, section["prior"], path)
    if step == "generate" and "prompt" in section:
        section["prompt"] = texts(section["prompt"])
    for argument in about.command.arguments:
        if (
            argument.required
            and argument.name in about.inputs
            and argument.name != "prompt"
            and not section.get(argument.name)
        ):
            raise ConfigError(f"{where}.{argument.name}: is needed; {argument.help}")
    return section


def _priors(where: str, entries: Any, path: Callable[[str, Any], str]) -> list[list[str]]:
    pairs = []
    for entry in entries if isinstance(entries, list) else [entries]:
        pair = [entry.get("noun"), entry.get("folder")] if isinstance(entry, dict) else entry
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(v, str) for v in pair):
            raise ConfigError(f"{where}.prior: expected a list of {{noun: …, folder: …}}, got {entry!r}")
        pairs.append([pair[0], path("fuse.prior", pair[1])])
    return pairs


def _absolute(folder: Path, where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: expected a path, got {value!r}")
    return os.path.abspath(folder / os.path.expanduser(value))
