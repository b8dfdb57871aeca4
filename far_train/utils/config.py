"""The framework of all settings: frozen dataclasses that check themselves and travel as JSON or YAML.

Each wing declares its own settings (``data/settings.py``, ``models/settings.py``, ``training/settings.py``). The
command line's flags and docs/reference/settings.md are made from these same fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .errors import ConfigError, UnreadableFile
from .text_files import read_words

log = logging.getLogger(__name__)

EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")

C = TypeVar("C", bound="Config")


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    shapes_result: bool = True,
    before: Any = ...,
    was: tuple[str, ...] = (),
    was_values: Mapping[str, str] | None = None,
) -> Any:
    """A dataclass field with its range and its help line.

    ``shapes_result=False`` marks a setting that may differ between a run and its resumption: it changes what is
    reported or saved, never what is learned.

    ``before`` is given for a setting that came later: the value that does what was done before it. At that value it is
    no part of what identifies a run, so that earlier runs can still be resumed.

    ``was`` are names that the setting had before, the first one first; ``was_values`` maps former choices to those of
    today. Both are still read, and digests are made from the first name and the former choices, so that a better name
    doesn't make another run of an old one.
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "low": low,
            "high": high,
            "choices": choices,
            "shapes_result": shapes_result,
            "before": before,
            "was": was,
            "was_values": dict(was_values or {}),
        },
    )


class Kind(NamedTuple):
    """The declared type of a setting: ``int | None`` is an optional ``int``."""

    type: type  # bool, int, float, str, tuple or dict
    optional: bool = False  # None is allowed
    item: type | None = None  # of a tuple's items or a mapping's values


def kind_of(hint: Any) -> Kind:
    """Read a resolved type hint."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    declared = next(option for option in options if option is not type(None))
    items = [arg for arg in typing.get_args(declared) if arg is not Ellipsis]
    return Kind(typing.get_origin(declared) or declared, type(None) in options, items[-1] if items else None)


@dataclass(frozen=True)
class Config:
    """Base of all settings: validated on construction, read from and written to plain mappings."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in fields(self):
            value = _coerce(f.name, getattr(self, f.name), hints[f.name])
            object.__setattr__(self, f.name, value)
            _check_range(f.name, value, f.metadata)
        self.check()

    def check(self) -> None:
        """Refuse combinations that single fields can't see. Raises ConfigError."""

    def replace(self: C, **changes: Any) -> C:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A mapping of JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def result_shaping(self) -> dict[str, Any]:
        """What identifies a run: the settings that decide what is learned, under their first names."""
        shaping = [f for f in fields(self) if f.metadata["shapes_result"]]
        names = {f.name for f in shaping if getattr(self, f.name) != f.metadata["before"]}
        return self.first_names({k: v for k, v in self.to_dict().items() if k in names})

    @classmethod
    def from_dict(
        cls: type[C], values: Mapping[str, Any], where: str = "settings", other_names: Iterable[str] = ()
    ) -> C:
        """Build from a mapping, which may hold former names.

        An unknown name is refused with the nearest one known, here or in ``other_names``. Raises ConfigError.
        """
        own, others = [f.name for f in fields(cls)], list(other_names)
        values = cls.current_names(values, log_former_name)
        for name in values:
            if name not in own:
                known = [*others, *(n for n in own if n not in others)]
                raise ConfigError(f"{name}: unknown setting in {where}; {nearest_name(str(name), known)}")
        return cls(**values)

    @classmethod
    def kinds(cls) -> dict[str, Kind]:
        """The declared type of each setting."""
        hints = typing.get_type_hints(cls)
        return {f.name: kind_of(hints[f.name]) for f in fields(cls)}

    @classmethod
    def current_names(
        cls, values: Mapping[str, Any], on_former: Callable[[str, str], None] | None = None
    ) -> dict[str, Any]:
        """``values`` with former names and choices replaced by those of today; what is unknown stays as it is.

        ``on_former`` is told each former name and the name of today. Raises ConfigError if both are given.
        """
        current = {old: f.name for f in fields(cls) for old in f.metadata["was"]}
        choices = {f.name: f.metadata["was_values"] for f in fields(cls)}
        result: dict[str, Any] = {}
        for given, value in values.items():
            name = current.get(given, given)
            if name in result:
                raise ConfigError(f"{name}: is given twice, under this name and a former one; keep {name} alone")
            if given != name and on_former:
                on_former(given, name)
            result[name] = _choice(value, choices.get(name, {}))
        return result

    @classmethod
    def first_names(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """``values`` under the names and with the choices that the settings first had: what digests are made from."""
        result = dict(values)
        for f in fields(cls):
            if f.name in result:
                former = {new: old for old, new in f.metadata["was_values"].items()}
                result[first_name(f)] = _choice(result.pop(f.name), former)
        return result


def _choice(value: Any, renamed: Mapping[str, str]) -> Any:
    return renamed.get(value, value) if isinstance(value, str) else value


def first_name(f: dataclasses.Field[Any]) -> str:
    """The name that a setting had first."""
    return f.metadata["was"][0] if f.metadata["was"] else f.name


def log_former_name(former: str, name: str) -> None:
    """Say once per use that a setting has a better name."""
    log.info("%s is now called %s; the former name still works", former, name)


def nearest_name(name: str, known: Sequence[str]) -> str:
    """The hint that ends an error about an unknown name."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known settings: {', '.join(known)}"


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Bring ``value`` to the field's declared type, or say what was expected."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        origin, args = typing.get_origin(option), typing.get_args(option)
        if option is bool and isinstance(value, bool):
            return value
        if option is int and not isinstance(value, bool):
            if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
                return int(value)
        if option is float and isinstance(value, str) and EXPONENT.fullmatch(value):
            return float(value)  # YAML takes 5e-4, without a point, for a text
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if option is str and isinstance(value, (str, Path)):
            return str(value)
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(_coerce(name, item, args[0]) for item in value)
        if origin is dict and isinstance(value, dict):
            return {_coerce(name, k, args[0]): _coerce(name, v, args[1]) for k, v in value.items()}
    expected = " or ".join("nothing" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def _check_range(name: str, value: Any, meta: Any) -> None:
    if value is None:
        return
    if meta.get("choices") and value not in meta["choices"]:
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(map(str, meta['choices']))}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}: {value} is not a finite number")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = meta.get("low"), meta.get("high")
        if low is not None and value < low or high is not None and value > high:
            bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise ConfigError(f"{name}: {value} is out of range; it must be {bounds}")


def check_shares(name: str, shares: dict[str, float] | None, known: tuple[str, ...]) -> None:
    """Refuse unknown names, negative shares, and shares that sum to nothing."""
    if shares is None:
        return
    for key, value in shares.items():
        if key not in known:
            raise ConfigError(f"{name}: unknown kind '{key}'; known: {', '.join(known)}")
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"{name}: the share of '{key}' is {value}; it must be a number of 0 or more")
    if sum(shares.values()) <= 0:
        raise ConfigError(f"{name}: all shares are 0; give at least one kind a positive share")


def read_settings(path: Path, field: str = "config") -> dict[str, Any]:
    """Read a JSON or YAML settings file, which ``field`` names, into a mapping. Raises ConfigError."""
    try:
        text = read_words(Path(path))
    except UnreadableFile as e:
        raise ConfigError(f"{field}: {e}; give a JSON or YAML file") from e
    import yaml

    kind, read = ("JSON", json.loads) if Path(path).suffix.lower() == ".json" else ("YAML", yaml.safe_load)
    try:
        values = read(text)
    except (ValueError, RecursionError, yaml.YAMLError) as e:
        reason = " ".join(str(e).split())
        raise ConfigError(f"{field}: {path} is not valid {kind} ({reason}); correct it") from e
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{field}: {path} must hold a mapping of settings, not a {type(values).__name__}")
    return values
