#!/usr/bin/env python3
"""Write docs/reference/settings.md and cli.md from the settings' and commands' own fields.

python scripts/reference.py            # write both pages
python scripts/reference.py --check    # write nothing; fail if a page is out of date
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
sys.path.insert(0, str(ROOT))

from far_train.cli.main import PROGRAM  # noqa: E402
from far_train.cli.parsing import SWITCH, Argument, Command, flag_of, show_value  # noqa: E402
from far_train.data.settings import ExtractConfig, FusionConfig  # noqa: E402
from far_train.models.settings import DrawConfig, SampleConfig  # noqa: E402
from far_train.training.settings import TrainConfig  # noqa: E402
from far_train.utils.config import Config, Kind  # noqa: E402

NOTE = "<!-- Written by scripts/reference.py from the code; edit the help texts there. -->\n"
CONFIGS: tuple[type[Config], ...] = (ExtractConfig, FusionConfig, TrainConfig, DrawConfig, SampleConfig)


def pages() -> dict[Path, str]:
    """The text of each generated page."""
    return {FOLDER / "settings.md": settings_page(), FOLDER / "cli.md": cli_page()}


# ---- settings


def settings_page() -> str:
    """One table per group of settings."""
    parts = [
        "# Settings\n",
        NOTE,
        "Every setting is a flag of its [command](cli.md): `lora_rank` is `--lora-rank`, and `per_mention` is switched "
        "off by `--no-per-mention`. It may also stand in a settings file (`--config FILE`, JSON or YAML); flags "
        "override the file. Where none is allowed, write `none` in a flag and `null` in a file.\n",
        "Settings marked * may change when a training is resumed. A change of any other makes it another run.\n",
    ]
    for config in CONFIGS:
        parts += [f"## {config.__name__}\n", f"{used_by(config)} {summary(config)}\n", table(config)]
    parts += [
        "## Former names\n",
        "They are still read, from flags, settings files, datasets and weights. Giving both names is an error.\n",
        former_names(),
    ]
    return "\n".join(parts)


def used_by(config: type[Config]) -> str:
    """The commands with these settings, and where the others are that they inherit."""
    users = [c for c in PROGRAM.commands if c.settings and issubclass(c.settings, config)]
    text = f"Settings of {' and '.join(f'[`{c.name}`](cli.md#{c.name})' for c in users)}"
    parent = config.__base__
    if parent is not Config:
        text += f", besides those of [{parent.__name__}](#{parent.__name__.lower()})"
    return f"{text}."


def summary(config: type[Config]) -> str:
    return (config.__doc__ or "").split("\n\n")[0].replace("\n    ", " ")


def table(config: type[Config]) -> str:
    rows = ["| setting | default | values | meaning |", "| --- | --- | --- | --- |"]
    kinds = config.kinds()
    for f in own_fields(config):
        star = "" if f.metadata["shapes_result"] or config is not TrainConfig else " *"
        default, values = show_default(f.default), allowed(f, kinds[f.name])
        rows.append(f"| `{f.name}`{star} | {default} | {values} | {cell(f.metadata['help'])} |")
    return "\n".join(rows) + "\n"


def own_fields(config: type[Config]) -> list[dataclasses.Field[Any]]:
    """Its settings without those that it inherits, which have a section of their own."""
    inherited = {f.name for f in dataclasses.fields(config.__base__)}
    return [f for f in dataclasses.fields(config) if f.name not in inherited]


def show_default(value: Any) -> str:
    if value == "":
        return "empty"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else show_value(value)


def allowed(f: dataclasses.Field[Any], kind: Kind) -> str:
    """The values that a setting takes, in words."""
    low, high = f.metadata["low"], f.metadata["high"]
    if f.metadata["choices"]:
        text = ", ".join(f.metadata["choices"])
    elif kind.type is bool:
        text = "on, off"
    elif low is not None or high is not None:
        ends = [show_bound(end) for end in (low, high)]
        text = f"{ends[0]} to {ends[1]}" if all(ends) else f"{ends[0]} or more" if ends[0] else f"up to {ends[1]}"
    else:
        names = {str: "text", int: "whole number", float: "number", tuple: "list", dict: "name=number …"}
        text = names[kind.type]
    return f"{text}, none" if kind.optional else text


def show_bound(value: float | None) -> str:
    if value is None:
        return ""
    if value == 2**63 - 1:
        return "2⁶³−1"
    return str(value) if isinstance(value, int) else f"{value:g}"


def former_names() -> str:
    rows = ["| former | today |", "| --- | --- |"]
    for config in CONFIGS:
        for f in own_fields(config):
            rows += [f"| `{old}` | `{f.name}` |" for old in f.metadata["was"]]
            rows += [f"| `{f.name}`: {old} | `{f.name}`: {new} |" for old, new in f.metadata["was_values"].items()]
    return "\n".join(rows) + "\n"


# ---- commands


def cli_page() -> str:
    """One section per command."""
    parts = [
        "# Command line\n",
        NOTE,
        f"{PROGRAM.description} Run `python -m far_train COMMAND --help` for the same in a terminal.\n",
        "| command | what it does |\n| --- | --- |\n"
        + "".join(f"| [`{c.name}`](#{c.name}) | {cell(c.help)} |\n" for c in PROGRAM.commands),
        "Every input and setting may stand in a file: `--config FILE`, JSON or YAML. A file may have a section per "
        "command, named after it; what stands outside the sections applies to all commands that know it. Flags "
        "override the file.\n",
        "The exit status is 0 when done; 2 when an input has to be changed; 1 when it failed elsewhere, a workflow on "
        "its ComfyUI, another process of a training or jobs of a fleet, or when nobody reads the output; and 130 when "
        "interrupted. [Errors](errors.md) has it for each.\n",
    ]
    for command in PROGRAM.commands:
        parts += section(command)
    return "\n".join(parts)


def section(command: Command) -> Iterator[str]:
    yield f"## {command.name}\n"
    yield f"{command.description}\n"
    required = "".join(f" {a.name.upper() if a.bare else usage(a)}" for a in command.arguments if a.required)
    yield f"```text\npython -m far_train {command.name}{required} …\n```\n"
    rows = ["| flag | meaning |", "| --- | --- |"]
    for a in command.arguments:
        rows.append(f"| `{usage(a)}`{' (required)' if a.required else ''} | {cell(a.meaning)} |")
    yield "\n".join(rows) + "\n"
    if command.settings:
        name = command.settings.__name__
        flags = ", ".join(f"`{flag_of(f.name)}`" for f in command.flags_of_settings)
        yield f"Settings ([{name}](settings.md#{name.lower()})): {flags}.\n"


def usage(argument: Argument) -> str:
    """A flag with what follows it."""
    if argument.options == SWITCH:
        return argument.flag
    metavar = dict(argument.options).get("metavar", argument.name.upper())
    return f"{argument.flag} {metavar if isinstance(metavar, str) else ' '.join(metavar)}"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    check, stale = parser.parse_args().check, 0
    for path, text in pages().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        print(f"{'out of date' if check else 'wrote'}: {path.relative_to(ROOT)}")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
