"""The check after a training: what is counted of pictures made by hand, and the command that runs it."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from far_train.cli.main import main
from far_train.data.concepts import Composite
from far_train.data.dataset import write_dataset
from far_train.evaluation.trained import (
    CHECK_FILE,
    CHECK_SHEET,
    REFERENCES,
    PromptCheck,
    check_trained,
    check_words,
    dataset_concepts,
    load_check,
    save_check,
    subject_finder,
)
from far_train.mini.shipped import SAM, small_sam
from far_train.training import recipe

from .tiny_encoders import write_encoder

RED, BLUE, PURPLE, GREEN = (0.9, 0.1, 0.1), (0.1, 0.1, 0.9), (0.5, 0.1, 0.5), (0.0, 1.0, 0.0)
BOTH, ALONE = "a photo of a <red-ball> ball and a <blue-ball> ball", "a photo of a <red-ball> ball"


class ColourEncoder:
    """A subject's feature is its mean colour."""

    def features(self, image: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([image[mask > 0.5].mean(0) for mask in masks]) if masks else torch.zeros(0, 3)


def picture(*colours: tuple[float, float, float]) -> torch.Tensor:
    """Squares [8, 8] of these colours side by side, [8, 32, 3]; the rest is white."""
    image = torch.ones(8, 32, 3)
    for i, colour in enumerate(colours):
        image[:, 8 * i : 8 * i + 8] = torch.tensor(colour)
    return image


def squares(image: torch.Tensor) -> list[torch.Tensor]:
    """The masks of a picture's squares."""
    masks = [torch.zeros(8, 32) for _ in range(4)]
    for i, mask in enumerate(masks):
        mask[:, 8 * i : 8 * i + 8] = 1
    return [mask for mask in masks if float(image[mask > 0.5].min()) < 1]


def test_each_prompt_is_judged_by_the_concepts_that_it_names(fusion):
    """Purple lies between red and blue; a blue ball is no red one; green is neither."""
    drawn = {
        BOTH: [picture(RED, BLUE), picture(BLUE, GREEN, RED), picture(PURPLE, BLUE), picture()],
        ALONE: [picture(RED), picture(BLUE), picture(GREEN, RED)],
    }
    prompts = [prompt for prompt, pictures in drawn.items() for _ in pictures]
    checks = check_trained(fusion, prompts, sum(drawn.values(), []), ColourEncoder(), squares)
    assert checks == [
        PromptCheck(BOTH, 4, 2, {"<red-ball>": 1, "<blue-ball>": 1}, {"<red-ball>": 1, "<blue-ball>": 0}),
        PromptCheck(ALONE, 3, 2, {"<red-ball>": 1}, {"<red-ball>": 0}),
    ]
    assert check_words(checks).splitlines() == [
        "together: right in 2 of 4 (<red-ball> missing in 1, <red-ball> mixed in 1, <blue-ball> missing in 1)",
        "<red-ball> alone: right in 2 of 3 (<red-ball> missing in 1)",
    ]


def test_a_result_is_kept_in_the_run_folder(tmp_path: Path):
    checks = [PromptCheck(ALONE, 1, 1, {"<red-ball>": 0}, {"<red-ball>": 0})]
    save_check(tmp_path, checks, [ALONE], [picture(RED)])
    assert load_check(tmp_path) == checks and (tmp_path / CHECK_SHEET).stat().st_size > 1000
    (tmp_path / CHECK_FILE).write_text('[{"prompt": 1}]')
    assert load_check(tmp_path) == [] == load_check(tmp_path / "none")


def test_composites_with_one_subject_stand_for_the_photos(fusion):
    alone = [c for c in map(fusion.composite, range(fusion.composite_count())) if len(c.mentions) == 1]
    for concept, colour in zip(dataset_concepts(fusion), (0, 2)):
        assert 0 < len(concept.images) <= REFERENCES
        own = [c for c in alone if c.mentions[0].name == concept.name]
        assert own and all(torch.equal(a.image, b) for a, b in zip(own, concept.images))
        for image, mask in zip(concept.images, concept.masks):
            assert int(image[mask > 0.5].mean(0).argmax()) == colour


def test_no_more_composites_are_kept_than_are_compared(fusion):
    """Nobody is alone in any of them, so that all are looked at."""
    together = next(c for c in map(fusion.composite, range(12)) if len(c.mentions) == 2)
    images: list[weakref.ref] = []
    most = 0

    def composite(_: int) -> Composite:
        nonlocal most
        most = max(most, sum(image() is not None for image in images))
        made = replace(together, image=together.image.clone())
        images.append(weakref.ref(made.image))
        return made

    pairs = SimpleNamespace(names=fusion.names, composite_count=lambda: 30, composite=composite)
    assert [len(concept.images) for concept in dataset_concepts(pairs)] == [REFERENCES] * 2
    assert len(images) == 30 and REFERENCES <= most <= REFERENCES + 1


def test_who_finds_the_subjects():
    class Detecting(ColourEncoder):
        detect = staticmethod(squares)

    assert len(subject_finder(Detecting(), None)(picture(RED, BLUE))) == 2
    assert subject_finder(ColourEncoder(), small_sam())(torch.ones(64, 64, 3)) == []


def test_the_command_checks_what_it_has_trained(tiny_folder: Path, fusion, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "CHECK_PICTURES", 1)
    dataset = write_dataset(fusion, tmp_path / "dataset").folder
    command = ["train", "--base", str(tiny_folder), "--dataset", str(dataset), "--out", str(tmp_path / "run")]
    command += ["--steps", "1", "--batch-size", "1", "--sample-every", "0", "--sample-steps", "1", "--device", "cpu"]
    encoder = write_encoder(tmp_path / "encoder", "dinov2")
    assert main([*command, "--check-encoder", str(encoder)]) == 2
    assert "check_sam: a check needs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*command, "--check-encoder", str(encoder), "--check-sam", str(SAM)]) == 0
    checks = json.loads((tmp_path / "run" / CHECK_FILE).read_text())
    assert [(len(c["missing"]), c["pictures"]) for c in checks] == [(2, 1), (1, 1), (1, 1)]
    said = capsys.readouterr().out
    assert "together: right in " in said and "<blue-ball> alone: right in " in said
