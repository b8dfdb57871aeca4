"""The check after a training: is each subject there when it is drawn alone, and all of them when drawn together?

The training draws the pictures while its base is loaded (``Callbacks.on_check``). Here they are judged as by FaR
Evaluate (:mod:`detect_and_compare`), with subjects cut out of the dataset's composites in the place of photos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ..data.captions import Name
from ..data.concepts import Concept, TrainingSet
from ..utils.errors import SubjectError
from ..utils.files import parse_json, write_json
from .detect_and_compare import Comparison, compare_picture, propose_masks, read_references
from .image_encoders import Encoder
from .sheets import picture_grid, save_sheet

CHECK_FILE = "check.json"  # in a run folder
CHECK_SHEET = "check.jpg"
REFERENCES = 5  # composites that stand for a concept's photos


@dataclass(frozen=True)
class PromptCheck:
    """What the pictures of one prompt show of the concepts that it names, as numbers of pictures.

    ``right``: all of the concepts are there, unmixed. ``missing`` and ``mixed``: by token, as in
    :meth:`Comparison.words`.
    """

    prompt: str
    pictures: int
    right: int
    missing: dict[str, int]
    mixed: dict[str, int]

    @property
    def words(self) -> str:
        who = "together" if len(self.missing) > 1 else f"{next(iter(self.missing))} alone"
        faults = [
            f"{token} {kind} in {counts[token]}"
            for token in self.missing
            for kind, counts in (("missing", self.missing), ("mixed", self.mixed))
            if counts[token]
        ]
        return f"{who}: right in {self.right} of {self.pictures}" + (f" ({', '.join(faults)})" if faults else "")


def check_trained(
    training_set: TrainingSet,
    prompts: Sequence[str],
    pictures: Sequence[Tensor],
    encoder: Encoder,
    find: Callable[[Tensor], list[Tensor]],
) -> list[PromptCheck]:
    """Judge what a training drew for its check: picture i [H, W, 3] for ``prompts[i]``, equal prompts together.

    ``find`` gives the masks [H, W] of a picture's subjects, and of other things. Raises SubjectError, EncoderError.
    """
    references = read_references(dataset_concepts(training_set), encoder)
    compared = [
        compare_picture(encoder.features(picture, find(picture)), references, counts_extra=False)
        for picture in pictures
    ]
    checks = []
    for prompt in dict.fromkeys(prompts):
        own = [comparison for comparison, of in zip(compared, prompts) if of == prompt]
        checks.append(_count(prompt, own, references.names))
    return checks


def _count(prompt: str, compared: Sequence[Comparison], names: Sequence[Name]) -> PromptCheck:
    right, missing, mixed = len(compared), {}, {}
    named = [(i, name.token) for i, name in enumerate(names) if name.token in prompt]
    for i, token in named:
        matches = [c.matches[i] for c in compared]
        mixed[token] = sum(m is not None and m.is_mixed for m in matches)
        missing[token] = sum(m is None or not (m.present or m.is_mixed) for m in matches)
    for comparison in compared:
        matches = [comparison.matches[i] for i, _ in named]
        right -= any(m is None or m.is_mixed or not m.present for m in matches)
    return PromptCheck(prompt, len(compared), right, missing, mixed)


def dataset_concepts(training_set: TrainingSet) -> list[Concept]:
    """The concepts with up to ``REFERENCES`` composites as their photos, those that show no other subject first.

    Raises SubjectError for a concept that no composite shows.
    """
    shown: dict[str, list[list[tuple[Tensor, Tensor]]]] = {n.token: [[], []] for n in training_set.names}
    for index in range(training_set.composite_count()):
        composite = training_set.composite(index)
        for mention in composite.mentions:
            if mention.name.token not in shown or not bool((mention.mask > 0.5).any()):
                continue
            photos = shown[mention.name.token][len(composite.mentions) > 1]
            if len(photos) < REFERENCES:  # datasets are larger than memory
                photos.append((composite.image, mention.mask))
        if all(len(alone) >= REFERENCES for alone, _ in shown.values()):
            break
    concepts = []
    for name in training_set.names:
        alone, among_others = shown[name.token]
        photos = [*alone, *among_others][:REFERENCES]
        if not photos:
            raise SubjectError(f"dataset: no composite shows {name.token} with a mask")
        concepts.append(Concept(name.token, name.noun, *zip(*photos)))
    return concepts


def subject_finder(encoder: Encoder, sam: object | None) -> Callable[[Tensor], list[Tensor]]:
    """What finds a picture's subjects: the encoder itself where it can, as the oracle, which needs no ``sam``."""
    return getattr(encoder, "detect", None) or (lambda picture: propose_masks(sam, picture))


def save_check(folder: Path, checks: Sequence[PromptCheck], prompts: Sequence[str], pictures: Sequence[Tensor]) -> None:
    """Write ``CHECK_FILE`` and a sheet of the pictures into a run folder. Raises OutputError."""
    save_sheet(folder / CHECK_SHEET, picture_grid(pictures, prompts))
    write_json(folder / CHECK_FILE, [asdict(check) for check in checks])


def load_check(folder: Path) -> list[PromptCheck]:
    """What :func:`save_check` wrote into a run folder; nothing if it has no such file that can be read."""
    try:
        return [PromptCheck(**check) for check in parse_json((folder / CHECK_FILE).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def check_words(checks: Sequence[PromptCheck]) -> str:
    """A line for each prompt."""
    return "\n".join(check.words for check in checks)
