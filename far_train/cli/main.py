"""The command line: ``python -m far_train COMMAND``.

Commands stand in modules by what they are for; what they need is imported when they run, so that ``--help`` is instant.
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import __version__
from . import comfy, data, demo, evaluation, fleet, training, use
from .program import Program

PROGRAM = Program(
    "far_train",
    (
        data.EXTRACT,
        data.FUSE,
        data.DOCTOR,
        training.TRAIN,
        use.GENERATE,
        data.SCENES,
        evaluation.EVALUATE,
        use.EXPORT,
        use.INSPECT,
        fleet.FLEET,
        comfy.QUEUE,
        demo.DEMO,
    ),
    "Fuse-and-Refine: teach Stable Diffusion several subjects at once.",
    __version__,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (see :meth:`Program.run`)."""
    return PROGRAM.run(argv)
