"""Programs: a name, its commands, and how a call of one begins and ends."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..utils.config import Config
from ..utils.errors import FarError, Interrupted, OutOfMemory
from ..utils.terminal import replace_unknown_characters
from .parsing import Command, Parser, add_flags, collect, parser_options, refuse_unknown

NOISY = ("httpx", "diffusers", "transformers", "PIL", "matplotlib")  # their information is not for our users


class Call(NamedTuple):
    """A command with what it was given."""

    command: Command
    inputs: dict[str, Any]
    settings: Config | None


@dataclass(frozen=True)
class Program:
    """A program of several commands, which its first word chooses, or of a single one."""

    name: str
    commands: tuple[Command, ...]
    description: str = ""
    version: str = ""

    def parser(self) -> argparse.ArgumentParser:
        """The parser of all flags."""
        if len(self.commands) == 1:
            parser = Parser(prog=self.name, **parser_options(self.commands[0]))
            add_flags(parser, self.commands[0])
            return parser
        parser = Parser(prog=self.name, description=self.description)
        parser.add_argument("--version", action="version", version=self.version)
        subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        for command in self.commands:
            add_flags(subparsers.add_parser(command.name, help=command.help, **parser_options(command)), command)
        return parser

    def parse(self, argv: Sequence[str] | None = None) -> Call:
        """Read flags and settings file, by default of this process. Raises ConfigError."""
        parsed, unknown = self.parser().parse_known_args(argv)
        flags, call = vars(parsed), self.name
        command = self.commands[0]
        if len(self.commands) > 1:
            chosen = flags.pop("command")
            command, call = next(c for c in self.commands if c.name == chosen), f"{self.name} {chosen}"
        refuse_unknown(unknown, command, call)
        return Call(command, *collect(command, flags, self.commands))

    def run(self, argv: Sequence[str] | None = None) -> int:
        """Run a command, with logging set up and every error reported in one line; returns the exit status.

        0: done. 1: it failed elsewhere, a workflow on its host or another process of a training, or nobody reads the
        output. 2: an input has to be changed. 130: interrupted. Errors know theirs (``utils.errors``).
        """
        replace_unknown_characters()
        logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
        for noisy in NOISY:
            logging.getLogger(noisy).setLevel(logging.ERROR)
        try:
            call = self.parse(argv)
            call.command.run(call.inputs, call.settings)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Interrupted as e:
            print(f"{self.name}: {e}", file=sys.stderr)
            return e.exit_status
        except FarError as e:
            print(f"{self.name}: error: {e}", file=sys.stderr)
            return e.exit_status
        except KeyboardInterrupt:
            print(f"{self.name}: interrupted", file=sys.stderr)
            return 130
        except (MemoryError, RuntimeError) as e:
            from ..utils.out_of_memory import out_of_memory, reason_of

            if not out_of_memory(e):
                raise
            print(
                f"{self.name}: error: memory ran out ({reason_of(e)}). Close other programs, give --device cpu where "
                "the command has it, or choose a smaller model",
                file=sys.stderr,
            )
            return OutOfMemory.exit_status
        return 0
