"""The command that judges pictures."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from ..utils.errors import SubjectError
from ..utils.terminal import progress_bars
from ..utils.text_files import read_words
from .data import concept_entries
from .parsing import Argument, Command, Inputs, repeatable
from .shared import DEVICE, MAX_SHOWN, beside, device_name

log = logging.getLogger(__name__)


def evaluate(inputs: Inputs, _: None) -> None:
    """Print Detect-and-Compare's figures, and write them to a file beside the pictures, with a sheet of verdicts."""
    from ..data.folder_inputs import read_concept
    from ..data.folders import list_photos
    from ..data.images import load_photo
    from ..data.sam import load_sam
    from ..data.settings import ExtractConfig
    from ..evaluation.detect_and_compare import Evaluation, compare_picture, propose_masks, read_references
    from ..evaluation.image_encoders import FolderEncoder
    from ..evaluation.sheets import picture_grid, save_sheet
    from ..utils.devices import choose_device
    from ..utils.files import write_json

    folder = Path(inputs["pictures"])
    side = ExtractConfig.max_side  # cameras' photos together are too large for memory
    concepts = [read_concept(token, noun, Path(f), side) for token, noun, f in concept_entries(inputs)]
    paths = [p for p in list_photos(folder) if _shows(p, [c.name.token for c in concepts])]
    if not paths:
        raise SubjectError(f"{folder}: no picture's prompt names all concepts; generate one that does")
    device, _ = choose_device(device_name(inputs))
    encoder, sam = FolderEncoder(Path(inputs["encoder"]), device), load_sam(Path(inputs["sam"]), device)
    references = read_references(concepts, encoder)
    compared, shown = [], []
    with progress_bars() as bars:
        for i, path in enumerate(paths):
            bars("evaluating", i, len(paths))
            picture = load_photo(path).image
            features = encoder.features(picture, propose_masks(sam, picture))
            compared.append(compare_picture(features, references, counts_extra=False))
            shown += [picture][: MAX_SHOWN - len(shown)]
        bars("evaluating", len(paths), len(paths))
    whole = Evaluation(references.names, references.similarity, tuple(compared))
    scores = {
        "pictures": len(paths),
        "score": whole.score,
        "right": whole.right,
        "concepts": {
            name.token: {"present": present, "similarity": _known(float(own)), "mixing": _known(mixing)}
            for name, present, own, mixing in zip(
                whole.names, whole.presence, whole.similarity.diagonal(), whole.mixing
            )
        },
    }
    out, sheet = beside(folder, "scores.json"), beside(folder, "verdicts.jpg")
    write_json(out, scores)
    save_sheet(sheet, picture_grid(shown, [c.words(whole.names) for c in compared[: len(shown)]]))
    print(f"{whole.words}\n→ {out}; look at {sheet}")


def _shows(path: Path, tokens: list[str]) -> bool:
    """Whether a picture is meant to show all concepts: its prompt, as ``generate`` writes it beside it, names them."""
    prompt = path.with_suffix(".txt")
    words = read_words(prompt).lower() if prompt.exists() else None
    return words is None or all(token in words for token in tokens)


def _known(value: float) -> Any:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


EVALUATE = Command(
    "evaluate",
    "judge whether pictures show the concepts, each like its photos and unmixed (Detect-and-Compare); writes scores "
    "and a sheet of verdicts beside the folder",
    (
        Argument(
            "pictures",
            "folder of pictures. NAME.txt beside NAME.png, as generate writes it, is its prompt; pictures whose prompt "
            "lacks a concept are left out, those without a prompt are judged",
            required=True,
        ),
        Argument(
            "concept",
            "a concept: its placeholder token, class noun and folder of subjects; repeat for each",
            True,
            repeatable(("TOKEN", "NOUN", "FOLDER"), 3),
        ),
        Argument(
            "encoder", "image encoder in transformers' layout, such as DINOv2, CLIP or SigLIP: a folder", required=True
        ),
        Argument("sam", "Segment Anything weights, .safetensors or .pth; proposes the subjects", required=True),
        DEVICE,
    ),
    evaluate,
)
