"""What commands are made of, and how their inputs and settings are read from flags and files.

Every input and setting can stand in a file (``--config FILE``, JSON or YAML) and be overridden by a flag. A file may
have a section for each command, under its name; what stands beside the sections is shared by the commands that know
it. Flags of settings are made from the settings' own fields.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ..utils.config import Config, Kind, log_former_name, read_settings
from ..utils.errors import ConfigError

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
        return flag_of(self.name)

    @property
    def meaning(self) -> str:
        """What --help says of it."""
        return f"{self.help} ({self.flag} may be left out)" if self.bare else self.help

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


SWITCH = (("action", "store_true"),)
NUMBER = (("type", int),)


def repeatable(metavar: str | tuple[str, ...], nargs: int | None = None) -> tuple[tuple[str, Any], ...]:
    """Options of an argument that may be given several times."""
    return (("action", "append"), ("metavar", metavar), *((("nargs", nargs),) if nargs else ()))


@dataclass(frozen=True)
class Command:
    """A command: what it is given, and the function that does it.

    ``run(inputs, settings)`` takes the arguments by name and an instance of ``settings``, or None without any.
    """

    name: str
    help: str
    arguments: tuple[Argument, ...]
    run: Callable[[Inputs, Any], None]
    settings: type[Config] | None = None

    @property
    def description(self) -> str:
        return self.help[0].upper() + self.help[1:] + "."

    @property
    def known(self) -> list[str]:
        """Names of all its inputs and settings."""
        return [a.name for a in self.arguments] + [f.name for f in fields(self.settings or Config)]

    @property
    def accepted(self) -> set[str]:
        """All names that a settings file may use, former ones included."""
        return {*self.known, *(old for f in fields(self.settings or Config) for old in f.metadata["was"])}

    @property
    def flags_of_settings(self) -> list[Field[Any]]:
        """The settings that have a flag of their own: those that no argument stands for."""
        names = {a.name for a in self.arguments}
        return [f for f in fields(self.settings or Config) if f.name not in names]


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, as every other error, and not below a screen of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def parser_options(command: Command) -> dict[str, Any]:
    """Nothing has a default, so that a settings file can speak first."""
    return {"description": command.description, "argument_default": argparse.SUPPRESS, "allow_abbrev": False}


def add_flags(parser: argparse.ArgumentParser, command: Command) -> None:
    """Add the flags of a command's inputs and settings."""
    parser.add_argument("--config", metavar="FILE", help="JSON or YAML file of settings; flags override it")
    for argument in command.arguments:
        options = {"metavar": argument.name.upper(), **dict(argument.options)}
        if argument.options == SWITCH:
            options.pop("metavar")
        text = argument.meaning + (" [required]" if argument.required else "")
        parser.add_argument(argument.flag, help=_escape(text), **options)
        if argument.bare:
            parser.add_argument(argument.name, nargs="?", help=argparse.SUPPRESS)
    if command.settings:
        group, kinds = parser.add_argument_group("settings"), command.settings.kinds()
        for f in command.flags_of_settings:
            options = _flag_options(f, kinds[f.name])
            text = f.metadata["help"]
            if "default:" not in text:
                text += f" (default: {show_value(f.default)})"
            group.add_argument(flag_of(f.name), help=_escape(text), **options)
            for former in f.metadata["was"]:
                group.add_argument(flag_of(former), help=argparse.SUPPRESS, **options)


def _escape(text: str) -> str:
    return text.replace("%", "%%")


def show_value(value: Any) -> str:
    """A default as people read it."""
    return "none" if value is None or value == () else str(value)


def _flag_options(f: Field[Any], kind: Kind) -> dict[str, Any]:
    if kind.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind.type is tuple:
        if kind.item is int:
            return {"nargs": "+", "metavar": "INT", "type": _reader(f.name, Kind(int))}
        return {"nargs": "+", "metavar": "TEXT"}
    if kind.type is dict:
        return {"nargs": "+", "metavar": "KEY=VALUE"}
    metavar = "|".join(f.metadata["choices"]) if f.metadata["choices"] else kind.type.__name__.upper()
    return {"type": _reader(f.name, kind), "metavar": metavar}


def _reader(name: str, kind: Kind) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if kind.optional and text.lower() == "none":
            return None
        try:
            return kind.type(text)
        except ValueError:
            raise ConfigError(f"{name}: expected {kind.type.__name__}, got {text!r}") from None

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


def refuse_unknown(unknown: Sequence[str], command: Command, call: str) -> None:
    """Raise ConfigError for flags that argparse didn't know, with the nearest one that it does."""
    if unknown:
        near = difflib.get_close_matches(
            unknown[0].split("=")[0], [flag_of(n) for n in ("config", *command.known)], n=1
        )
        hint = f"did you mean {near[0]}?" if near else f"see '{call} --help'"
        raise ConfigError(f"{unknown[0]}: unknown argument of '{command.name}'; {hint}")


def collect(
    command: Command, flags: dict[str, Any], commands: Sequence[Command] = ()
) -> tuple[dict[str, Any], Config | None]:
    """Merge settings file and flags; returns the command's inputs by name, and its settings.

    ``commands`` are all that may have a section in the file. Raises ConfigError.
    """
    kind = command.settings or Config
    values = _read_file(command, Path(flags["config"]), commands) if "config" in flags else {}
    given = {k: v for k, v in flags.items() if k != "config"}
    given = kind.current_names(given, lambda old, new: log_former_name(flag_of(old), flag_of(new)))
    kinds, names = kind.kinds(), [a.name for a in command.arguments]
    for name, value in given.items():
        is_mapping = name in kinds and kinds[name].type is dict
        values[name] = _pairs(name, value) if is_mapping and isinstance(value, list) else value
    inputs = {k: v for k, v in values.items() if k in names and v is not None}
    for argument in command.arguments:
        if argument.name in inputs and argument.name not in kinds:
            argument.check(inputs[argument.name])
    # A name that is unknown comes before one that is missing: it may be the same, misspelt.
    chosen = {k: v for k, v in values.items() if k not in names or k in kinds}
    settings = kind.from_dict(chosen, f"'{command.name}'", names)
    for argument in command.arguments:
        if argument.required and not inputs.get(argument.name):
            raise ConfigError(f"{argument.flag}: is needed; {argument.help}")
    return inputs, settings if command.settings else None


def _read_file(command: Command, path: Path, commands: Sequence[Command]) -> dict[str, Any]:
    """What a settings file holds for this command: its section over what all commands share."""
    values = read_settings(path)
    renamed = partial((command.settings or Config).current_names, on_former=log_former_name)
    sections = {c.name for c in commands} & values.keys()
    if not sections:
        return renamed(values)
    own = values.get(command.name) or {}
    if not isinstance(own, dict):
        raise ConfigError(f"config: '{command.name}' in {path} must hold a mapping of settings, got {own!r}")
    elsewhere = {name for c in commands for name in c.accepted} - command.accepted
    return renamed({k: v for k, v in values.items() if k not in sections and k not in elsewhere}) | renamed(own)
