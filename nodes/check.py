"""The check after a training: what FaR Train does with an image encoder and a SAM that are on this computer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

from ..far_train.data.concepts import TrainingSet
from ..far_train.data.sam import load_sam
from ..far_train.evaluation.trained import check_trained, check_words, save_check, subject_finder
from ..far_train.utils.errors import ConfigError, FarError
from ..far_train.utils.out_of_memory import skip_without_memory
from . import host_folders, host_memory, host_ui
from .evaluate import AUTOMATIC, MINI_ORACLE, choose_encoder, placed

OFF = "off"


def check_choices() -> list[str]:
    """The choices of ``check_with``."""
    return [AUTOMATIC, OFF, *(p.name for p in host_folders.model_subfolders("clip_vision")), MINI_ORACLE]


def is_checked(check_with: str) -> bool:
    """Whether a training is checked afterwards. Raises ConfigError for an encoder that lacks a SAM."""
    if check_with in (OFF, MINI_ORACLE):
        return check_with != OFF
    has_sam = bool(host_folders.model_files("sams"))
    if check_with == AUTOMATIC:
        return has_sam and bool(host_folders.model_subfolders("clip_vision"))
    if not has_sam:
        raise ConfigError(
            f"check_with: {check_with} needs a SAM to find the subjects; put sam_vit_b_01ec64.pth in models/sams, or "
            f"choose '{OFF}'"
        )
    return True


def check_run(
    folder: Path,
    dataset: TrainingSet,
    check_with: str,
    prompts: Sequence[str],
    pictures: Sequence[Tensor],
    node_id: str | None,
) -> None:
    """Judge what a finished run has drawn, show the result on the node, and write it into the run's folder.

    The run is finished: what keeps it from being judged is only said.
    """
    host_ui.show_text(f"checking {len(pictures)} pictures", node_id)
    try:
        with skip_without_memory("the check's results"):
            encoder = choose_encoder(check_with)
            sam = None if hasattr(encoder, "detect") else load_sam(_sam_file())
            find = subject_finder(encoder, sam)

            def find_or_stop(picture: Tensor) -> list[Tensor]:
                host_ui.stop_if_interrupted()
                return find(picture)

            with placed(encoder), nullcontext() if sam is None else host_memory.on_compute_device(sam):
                checks = check_trained(dataset, prompts, pictures, encoder, find_or_stop)
            save_check(folder, checks, prompts, pictures)
            host_ui.log_and_show(f"{folder.name} is trained\n{check_words(checks)}", node_id)
    except FarError as e:
        host_ui.log_and_show(f"{folder.name} is trained, but not checked: {e}", node_id)
    finally:
        host_memory.empty_cache()


def _sam_file() -> Path:
    """A SAM of models/sams: an original one by its name, the smallest of several, else the first."""
    names = sorted(host_folders.model_files("sams"))
    return host_folders.model_path("sams", next((n for n in names if "sam_vit" in n), names[0]))
