"""The command line: ``python -m far_train COMMAND``. Flags are made from the settings' own fields.

Every input and setting can stand in a file (``--config FILE``, JSON or YAML) and be overridden by a flag. A file may
have a section for each command, under its name; what stands beside the sections is shared by the commands that know
it. What a command does stands in :mod:`far_train.cli.commands`.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..data.settings import ExtractConfig, FusionConfig
from ..models.settings import SampleConfig
from ..training.settings import TrainConfig
from ..utils.config import Config, read_settings
from ..utils.errors import ConfigError, FarError, Interrupted
from ..utils.terminal import replace_unknown_characters

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Argument:
    """An input of a command that is no setting: a path, a prompt, a switch.

    ``options`` go to argparse; a settings file may hold a list or mapping where the input is ``structured``; a ``bare``
    one may stand without its flag.
    """

    name: str
    help: str
    required: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    structured: bool = False
    bare: bool = False

    @property
    def flag(self) -> str:
        return _flag(self.name)

    def check(self, value: Any) -> None:
        """Refuse a value of the wrong type, as a settings file may hold it. Raises ConfigError."""
        options = dict(self.options)
        if options.get("action") == "store_true":
            kind, good = "true or false", isinstance(value, bool)
        elif options.get("action") == "append":
            kind, good = "a list", isinstance(value, (list, str))
        elif options.get("type") is int:
            kind, good = "a whole number", isinstance(value, int) and not isinstance(value, bool)
        else:
            kind, good = "a text", isinstance(value, (str, list, dict) if self.structured else str)
        if not good:
            raise ConfigError(f"{self.name}: expected {kind}, got {value!r}")


@dataclass(frozen=True)
class Command:
    name: str
    help: str
    arguments: tuple[Argument, ...]
    settings: type[Config] | None = None

    @property
    def function(self) -> str:
        """Its name in :mod:`far_train.cli.commands`."""
        return self.name.replace("-", "_")

    @property
    def known(self) -> list[str]:
        """Names of all its inputs and settings."""
        return [a.name for a in self.arguments] + [f.name for f in fields(self.settings or Config)]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error does, and not below a screen of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _many(metavar: Any, nargs: Any = None) -> tuple[tuple[str, Any], ...]:
    return (("action", "append"), ("metavar", metavar), *((("nargs", nargs),) if nargs else ()))


SWITCH = (("action", "store_true"),)
BASE = (
    Argument("base", "base model: a .safetensors file of SD 2.1, or a folder in diffusers' layout", required=True),
    Argument("base_config", "folder with the component configs, for single files of another size than SD 2.1"),
    Argument("prediction_type", "v_prediction or epsilon; default: what the weights show"),
)
DEVICE = Argument("device", "auto, cpu, cuda, cuda:1, mps, xpu … (default: auto)")

COMMANDS = (
    Command(
        "extract",
        "cut the subjects out of a folder of photos",
        (
            Argument(
                "photos", "folder of photos; NAME.mask.png or an alpha channel is taken as the mask", required=True
            ),
            Argument("out", "folder for NAME.png and NAME.mask.png", required=True),
            Argument("sam", "segment-anything weights, .safetensors or .pth; needed for photos without a mask"),
            Argument("box", "the subject's box in pixels of each photo: X0,Y0,X1,Y1", structured=True),
            Argument("points", "points in pixels, 1 on the subject, 0 off it: 'X,Y,1 X,Y,0'", structured=True),
            Argument(
                "prompts", "JSON or YAML file: photo name → {box: [x0,y0,x1,y1], points: [[x,y,1]]}", structured=True
            ),
            Argument(
                "keep_others", "let pictures of other photos stay in the folder, to be learned as well", options=SWITCH
            ),
            DEVICE,
        ),
        ExtractConfig,
    ),
    Command(
        "fuse",
        "Concept Fusion: make a dataset folder of composites",
        (
            Argument(
                "concept",
                "a concept: its token, class noun and folder of subjects; repeat for each",
                True,
                _many(("TOKEN", "NOUN", "FOLDER"), 3),
            ),
            Argument(
                "prior",
                "class pictures (better with masks): noun and folder; repeat for each",
                False,
                _many(("NOUN", "FOLDER"), 2),
            ),
            Argument("backgrounds", "folder of empty scenes; NAME.txt may hold the words for one ('in a garden')"),
            Argument("out", "the dataset folder to make", required=True),
        ),
        FusionConfig,
    ),
    Command(
        "train",
        "learn the concepts of a dataset folder",
        (
            *BASE,
            Argument("dataset", "dataset folder made by fuse", required=True),
            Argument("out", "run folder: metrics, checkpoints, samples, weights.safetensors", required=True),
            Argument("resume", "go on with the run that is in the run folder", options=SWITCH),
            Argument("continue_from", "FaR weights of the same base to learn on from, in a new run folder"),
            Argument("dry_run", "only say what it will cost: steps, time, memory, disk", options=SWITCH),
        ),
        TrainConfig,
    ),
    Command(
        "generate",
        "draw pictures with a base, with or without FaR weights",
        (
            *BASE,
            Argument("weights", "FaR weights file"),
            Argument("prompt", "a prompt, with <tokens> of the weights; repeat for several", True, _many("TEXT")),
            Argument("count", "pictures per prompt (default 1)", options=(("type", int),)),
            Argument("out", "folder for the pictures", required=True),
            DEVICE,
        ),
        SampleConfig,
    ),
    Command(
        "scenes",
        "draw empty scenes, the backgrounds that fuse takes",
        (
            *BASE,
            Argument(
                "scene",
                "what to draw, and behind a bar what captions say of it: 'an empty beach | on the beach'; repeat "
                "(default: a dozen everyday places)",
                False,
                _many("TEXT"),
            ),
            Argument("count", "pictures of each scene (default 2)", options=(("type", int),)),
            Argument("out", "folder for the pictures and their words; those that are there stay", required=True),
            DEVICE,
        ),
        SampleConfig,
    ),
    Command(
        "export",
        "write stock LoRA and embedding files from FaR weights",
        (
            Argument("weights", "FaR weights file", required=True),
            Argument("out", "folder for loras/ and embeddings/", required=True),
            Argument("name", "name of the LoRA file (default: of the weights file or its run)"),
            Argument("rank", "approximate the model's changes by this rank (default: exact)", options=(("type", int),)),
        ),
    ),
    Command(
        "inspect",
        "show what a FaR weights file holds",
        (
            Argument("weights", "FaR weights file", required=True),
            Argument("json", "print JSON", options=SWITCH),
        ),
    ),
    Command(
        "queue",
        "run a workflow on a running ComfyUI and wait for its end",
        (
            Argument(
                "workflow",
                "API-format JSON, such as those in workflows/api; --workflow may be left out",
                True,
                bare=True,
            ),
            Argument(
                "host",
                "the ComfyUI's address (default: http://127.0.0.1:8188); repeat to share a grid among several",
                False,
                _many("URL"),
            ),
            Argument("set", "replace an input of the node with this title; repeat", False, _many("TITLE.INPUT=VALUE")),
            Argument(
                "grid",
                "one run for each of these values (a JSON list, A..B, or values with commas between); repeat for all "
                "combinations",
                False,
                _many("TITLE.INPUT=VALUES"),
            ),
            Argument(
                "out",
                "folder for the pictures that it saves and shows (without it they stay on the host); a grid goes on "
                "where it stopped in the same folder",
            ),
            Argument("dry_run", "check the inputs and list the runs, but queue nothing", options=SWITCH),
        ),
    ),
    Command(
        "demo",
        "the whole line on sample subjects that the project draws itself",
        (Argument("out", "folder for the results (default: outputs/demo)"), DEVICE),
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. Nothing has a default here, so that a settings file can speak first."""
    parser = _Parser(
        prog="far_train", description="Fuse-and-Refine: teach Stable Diffusion 2.1 several subjects at once."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = subparsers.add_parser(command.name, help=command.help, **_parser_options(command))
        _add_arguments(sub, command)
    return parser


def _parser_options(command: Command) -> dict[str, Any]:
    description = command.help[0].upper() + command.help[1:] + "."
    return {"description": description, "argument_default": argparse.SUPPRESS, "allow_abbrev": False}


def _add_arguments(sub: argparse.ArgumentParser, command: Command) -> None:
    sub.add_argument("--config", metavar="FILE", help="JSON or YAML file of settings; flags override it")
    for argument in command.arguments:
        options = {"metavar": argument.name.upper(), **dict(argument.options)}
        if options.get("action") == "store_true":
            options.pop("metavar")
        text = argument.help + (" [required]" if argument.required else "")
        sub.add_argument(argument.flag, help=_escape(text), **options)
        if argument.bare:
            sub.add_argument(argument.name, nargs="?", help=argparse.SUPPRESS)
    if command.settings:
        group = sub.add_argument_group("settings")
        hints = typing.get_type_hints(command.settings)
        for field in fields(command.settings):
            if any(a.name == field.name for a in command.arguments):
                continue
            text = _escape(f"{field.metadata['help']} (default: {_show(field.default)})")
            group.add_argument(_flag(field.name), help=text, **_flag_options(field, hints[field.name]))


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def _show(value: Any) -> str:
    return "none" if value is None or value == () else str(value)


def _flag_options(field: Any, hint: Any) -> dict[str, Any]:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(o for o in options if o is not type(None))
    name = field.name
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is tuple:
        if typing.get_args(kind)[0] is int:
            return {"nargs": "+", "metavar": "INT", "type": _reader(name, int, False)}
        return {"nargs": "+", "metavar": "TEXT"}
    if typing.get_origin(kind) is dict:
        return {"nargs": "+", "metavar": "KEY=VALUE"}
    metavar = "|".join(field.metadata["choices"]) if field.metadata["choices"] else kind.__name__.upper()
    return {"type": _reader(name, kind, type(None) in options), "metavar": metavar}


def _reader(name: str, kind: type, optional: bool) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        try:
            return kind(text)
        except ValueError:
            raise ConfigError(f"{name}: expected {kind.__name__}, got {text!r}") from None

    return read


def _pairs(name: str, items: Sequence[str]) -> dict[str, float]:
    """``KEY=VALUE`` words of a flag as a mapping."""
    pairs = {}
    for item in items:
        key, _, value = item.rpartition("=")
        try:
            pairs[key] = float(value)
        except ValueError:
            key = ""
        if not key:
            raise ConfigError(f"{name}: expected KEY=NUMBER, got {item!r}")
    return pairs


def collect(command: Command, flags: dict[str, Any]) -> tuple[dict[str, Any], Config | None]:
    """Merge settings file and flags; returns the command's inputs by name, and its settings. Raises ConfigError."""
    values = _read_file(command, Path(flags.pop("config"))) if "config" in flags else {}
    names = [a.name for a in command.arguments]
    hints = typing.get_type_hints(command.settings) if command.settings else {}
    for name, value in flags.items():
        is_mapping = "dict" in str(hints.get(name, ""))
        values[name] = _pairs(name, value) if is_mapping and isinstance(value, list) else value
    inputs = {k: v for k, v in values.items() if k in names and v is not None}
    for argument in command.arguments:
        if argument.name in inputs and argument.name not in hints:
            argument.check(inputs[argument.name])
    # A name that is unknown comes before one that is missing: it may be the same, misspelt.
    chosen = {k: v for k, v in values.items() if k not in names or k in hints}
    settings = (command.settings or Config).from_dict(chosen, f"'{command.name}'", names)
    for argument in command.arguments:
        if argument.required and not inputs.get(argument.name):
            raise ConfigError(f"{argument.flag}: is needed; {argument.help}")
    return inputs, settings if command.settings else None


def _read_file(command: Command, path: Path) -> dict[str, Any]:
    """What a settings file holds for this command: its section over what all commands share."""
    values = read_settings(path)
    sections = {c.name for c in COMMANDS} & values.keys()
    if not sections:
        return values
    own = values.get(command.name) or {}
    if not isinstance(own, dict):
        raise ConfigError(f"config: '{command.name}' in {path} must hold a mapping of settings, got {own!r}")
    elsewhere = {name for c in COMMANDS for name in c.known} - set(command.known)
    shared = {k: v for k, v in values.items() if k not in sections and k not in elsewhere}
    return shared | own


def _parse(argv: Sequence[str] | None) -> tuple[Command, dict[str, Any]]:
    flags, unknown = build_parser().parse_known_args(argv)
    command = next(c for c in COMMANDS if c.name == flags.command)
    _refuse_unknown(unknown, command, f"far_train {command.name}")
    return command, {k: v for k, v in vars(flags).items() if k != "command"}


def _refuse_unknown(unknown: Sequence[str], command: Command, call: str) -> None:
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], [_flag(n) for n in ("config", *command.known)], n=1)
        hint = f"did you mean {near[0]}?" if near else f"see '{call} --help'"
        raise ConfigError(f"{unknown[0]}: unknown argument of '{command.name}'; {hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0: done. 1: it failed on the host that it was queued on, or nobody reads its output. 2: an input has to be changed.
    130: interrupted.
    """

    def run() -> None:
        command, flags = _parse(argv)
        inputs, settings = collect(command, flags)
        from . import commands

        getattr(commands, command.function)(inputs, settings)

    return run_as_program(run, "far_train")


def run_single(
    command: Command, function: Callable[[Inputs, Any], None], program: str, argv: Sequence[str] | None = None
) -> int:
    """Run the one command of a program such as ``python -m benchmarks.quality``; returns the exit status."""

    def run() -> None:
        function(*parse_single(command, program, argv))

    return run_as_program(run, program)


def parse_single(
    command: Command, program: str, argv: Sequence[str] | None = None
) -> tuple[dict[str, Any], Config | None]:
    """Inputs and settings of a program's one command. Raises ConfigError."""
    parser = _Parser(prog=program, **_parser_options(command))
    _add_arguments(parser, command)
    flags, unknown = parser.parse_known_args(argv)
    _refuse_unknown(unknown, command, program)
    return collect(command, vars(flags))


def run_as_program(run: Callable[[], None], program: str) -> int:
    """Call ``run`` with logging set up and every error said in one line; returns the exit status."""
    replace_unknown_characters()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "diffusers", "transformers", "PIL", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        run()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Interrupted as e:
        print(f"{program}: {e}", file=sys.stderr)
        return e.exit_status
    except FarError as e:
        print(f"{program}: error: {e}", file=sys.stderr)
        return e.exit_status
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0
