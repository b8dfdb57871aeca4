"""Errors that a user can act on: each message names the thing that is wrong and the fix."""

from __future__ import annotations


class FarError(Exception):
    """Base of every error that is the input's fault and not the program's."""

    exit_status = 2  # of the command line


class ConfigError(FarError):
    """A setting is unknown, of the wrong type, or out of range. The message starts with the field's name."""


class PhotoError(FarError):
    """A picture or mask file can't be used."""


class SubjectError(FarError):
    """No usable subject was found in a photo, or a concept is left without any."""


class EncoderError(FarError):
    """An image encoder is missing, can't be read, or is incomplete."""


class TokenError(FarError):
    """A placeholder token is malformed, splits, or collides with another token."""


class CaptionError(FarError):
    """A caption doesn't contain the mentions that its masks belong to, or is too long."""


class DatasetError(FarError):
    """A dataset folder is missing, incomplete, or inconsistent."""


class BaseModelError(FarError):
    """A base model can't be read, is of another family, or is incomplete."""


class WeightsError(FarError):
    """A FaR weights file can't be read or doesn't fit the base model."""


class CheckpointError(FarError):
    """A run can't be resumed from the checkpoints that it left."""


class UnreadableFile(FarError):
    """A file is missing, damaged, or of another kind. What reads it says so in an error of its own kind."""


class OutputError(FarError):
    """A file or folder can't be written."""


class OutOfMemory(FarError):
    """A training step doesn't fit into memory, however little of it is computed at once."""


class ProcessFailed(FarError):
    """Another process of a training on several failed."""

    exit_status = 1


class TrainingDiverged(FarError):
    """The loss or its gradient stayed non-finite for several steps in a row, or the loss far above the base's."""


class QueueError(FarError):
    """A workflow can't be queued on a running host."""


class HostLost(QueueError):
    """A running host doesn't answer, or no longer."""


class RunFailed(QueueError):
    """A workflow was queued and failed on the host."""

    exit_status = 1


class JobsFailed(FarError):
    """Some jobs of a fleet failed; the others are done."""

    exit_status = 1


class Interrupted(FarError):
    """The user stopped a run; what it had done is saved and can be resumed."""

    exit_status = 130
