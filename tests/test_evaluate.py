"""Detect-and-Compare with values computed by hand, its encoders, and what the oracle makes of drawn subjects."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from far_train.data.captions import Name
from far_train.data.concepts import Concept
from far_train.data.images import save_pair, save_picture
from far_train.evaluation.detect_and_compare import (
    Comparison,
    Evaluation,
    References,
    compare_picture,
    propose_masks,
    read_references,
)
from far_train.evaluation.image_encoders import FolderEncoder, crop_subject
from far_train.evaluation.sheets import evaluation_plot
from far_train.mini.likeness import OracleEncoder
from far_train.mini.shipped import SUBJECTS, small_oracle, small_sam
from far_train.mini.world import reference_photos
from far_train.utils.errors import EncoderError, SubjectError

from .command_line import refused
from .tiny_encoders import write_encoder

A, B = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])  # a cosine of 0.6 between them
BETWEEN = (A + B) / (A + B).norm()  # 0.8944 to each
NAMES = (Name("dog", "<rex-dog>"), Name("dog", "<max-dog>"))
REFERENCES = References(NAMES, (torch.stack([A, A]), torch.stack([B, B])))


def mixing(comparison: Comparison) -> tuple[float, ...]:
    return tuple(match.mixing for match in comparison.matches)


def test_references_are_compared_with_each_other_and_never_with_themselves():
    one = References(NAMES, (torch.stack([A, torch.tensor([0.8, 0.6])]), torch.stack([B, B])))
    # <rex-dog>: one pair of photos, 0.8. Against B: 0.6, and 0.8·0.6 + 0.6·0.8 = 0.96, on the mean 0.78.
    assert one.similarity == pytest.approx(torch.tensor([[0.8, 0.78], [0.78, 1.0]]))


def test_the_right_subjects_in_any_order():
    seen = compare_picture(torch.stack([2 * B, 3 * A]), REFERENCES)
    assert [m.index for m in seen.matches] == [1, 0] and seen.present == (True, True) and seen.extra == 0
    assert seen.similarity == pytest.approx(torch.tensor([[1, 0.6], [0.6, 1]]))
    assert mixing(seen) == pytest.approx((0, 0), abs=1e-6) and seen.score == pytest.approx(1)
    assert seen.right and seen.words(NAMES) == "right"


def test_subjects_between_two_concepts_are_mixed():
    seen = compare_picture(torch.stack([BETWEEN, BETWEEN]), REFERENCES)
    near = 2 / math.sqrt(5)
    assert seen.similarity == pytest.approx(torch.full((2, 2), near))
    assert mixing(seen) == pytest.approx((1, 1), abs=1e-5)
    assert seen.score == pytest.approx(1 - 2 * (1 - near) ** 2 - 2 * (near - 0.6) ** 2)
    assert not seen.right and seen.words(NAMES) == "<rex-dog> mixed, <max-dog> mixed"


def test_half_the_way_is_half_mixed():
    """<max-dog>'s subject is 0.95 like its photos and 0.75 like the other's: half of the 0.4 that set them apart."""
    third = torch.tensor([0.75, 0.95 - 0.75 * 0.6])
    half = torch.tensor([0.75, third[1] / 0.8])
    half = torch.cat([half, (1 - half.square().sum()).clamp(min=0).sqrt()[None]])
    wide = References(NAMES, tuple(torch.cat([f, torch.zeros(2, 1)], 1) for f in REFERENCES.features))
    seen = compare_picture(torch.stack([torch.tensor([1.0, 0, 0]), half]), wide)
    assert seen.similarity[1] == pytest.approx(torch.tensor([0.75, 0.95]), abs=1e-5)
    assert mixing(seen) == pytest.approx((0, 0.5), abs=1e-5)


def test_the_same_subject_twice_is_no_presence_of_the_other():
    seen = compare_picture(torch.stack([A, A]), REFERENCES)
    assert seen.present == (True, False) and mixing(seen) == pytest.approx((0, 1), abs=1e-6)
    assert seen.score == pytest.approx(1 - 0.4**2 - 0.4**2)


def test_missing_and_extra_subjects():
    alone = compare_picture(A[None], REFERENCES)
    assert alone.matches[0].index == 0 and alone.matches[1] is None and alone.present == (True, False)
    assert alone.score == pytest.approx(1 - 0.6**2 - 1)
    assert alone.words(NAMES) == "<max-dog> missing"
    three = torch.stack([A, B, BETWEEN])
    assert compare_picture(three, REFERENCES).extra == 1 and not compare_picture(three, REFERENCES).right
    assert compare_picture(three, REFERENCES, counts_extra=False).right
    assert compare_picture(torch.zeros(0, 2), REFERENCES).present == (False, False)


def test_what_is_unlike_everything_is_not_present():
    seen = compare_picture(torch.stack([A, torch.tensor([-0.6, 0.8])]), REFERENCES)  # 0.28 like B
    assert seen.present == (True, False)
    assert compare_picture(torch.stack([A, torch.tensor([-0.6, 0.8])]), REFERENCES, presence=0.2).present[1]


def test_concepts_that_the_encoder_cannot_tell_apart_are_named_and_never_mixed():
    alike = References(NAMES, (torch.stack([A, A]), torch.stack([A, A])))
    whole = Evaluation(NAMES, alike.similarity, (compare_picture(torch.stack([A, A]), alike),))
    assert all(map(math.isnan, whole.mixing)) and whole.indistinct() == [NAMES]
    assert "can't tell the photos of <rex-dog> from those of <max-dog>" in whole.table()


def test_one_photo_says_nothing_of_how_alike_photos_are():
    """<rex-dog> has one photo, so what its photos are to each other is unknown; <max-dog> is judged as ever."""
    one = References(NAMES, (A[None], torch.stack([B, B])))
    assert one.similarity[0, 0].isnan() and one.similarity[1] == pytest.approx(torch.tensor([0.6, 1.0]))
    found = F.normalize(torch.tensor([[1.0, 0.2], [0.6, 0.8]]), dim=-1)
    seen = compare_picture(found, one)
    assert [m.mixing for m in seen.matches] == [None, pytest.approx(0, abs=1e-6)] and seen.right
    assert seen.score == pytest.approx(1 - (float(found[0] @ B) - 0.6) ** 2, abs=1e-6)
    assert compare_picture(torch.stack([B, B]), one).present == (False, True)
    whole = Evaluation(NAMES, one.similarity, (seen,))
    assert "one photo of <rex-dog>: its mixing is unknown" in whole.words and "<max-dog>:" not in whole._whole()[1]
    assert np.asarray(evaluation_plot(whole)).shape == (380, 900, 3)


def test_several_pictures_in_one_table():
    good, alone = (compare_picture(f, REFERENCES) for f in (torch.stack([A, B]), A[None]))
    whole = Evaluation(NAMES, REFERENCES.similarity, (good, alone))
    assert whole.presence == [1.0, 0.5] and whole.right == 0.5
    assert whole.score == pytest.approx((1 - 0.36) / 2)
    assert whole.similarity == pytest.approx(torch.tensor([[1, 0.6], [0.6, 1]]))
    lines = whole.table().splitlines()
    assert lines[2] == "| <rex-dog> dog | 1.00 | 1.00 | 100% | 0.00 | 1.00 | 0.60 |"
    assert "2 pictures: right 50%, Detect-and-Compare 0.320" in lines
    assert whole.words.splitlines()[2] == "<max-dog> dog: in 50%, similarity 1.00, mixing 0.00"
    drawn = np.asarray(evaluation_plot(whole))
    assert drawn.shape == (380, 900, 3) and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 50


def test_one_photo_of_one_concept_can_not_be_compared():
    concept = Concept("<rex-dog>", "dog", (torch.rand(8, 8, 3),), (torch.ones(8, 8),))
    with pytest.raises(SubjectError, match="one photo of <rex-dog> alone .*or a second concept"):
        read_references([concept], encoder=None)


# ---- encoders


def test_a_subject_is_cut_out_on_white_and_square():
    image = torch.zeros(10, 12, 3)
    mask = torch.zeros(10, 12)
    mask[2:8, 5:7] = 1  # 6 high, 2 wide
    crop = crop_subject(image, mask)
    assert crop.shape == (6, 6, 3)
    assert bool((crop[:, 2:4] == 0).all()) and bool((crop[:, :2] == 1).all()) and bool((crop[:, 4:] == 1).all())
    with pytest.raises(EncoderError, match="empty"):
        crop_subject(image, torch.zeros(10, 12))


@pytest.mark.parametrize(("kind", "width"), [("dinov2", 16), ("clip", 8)])
def test_encoders_of_transformers_load_from_a_folder(tmp_path, kind, width):
    encoder = FolderEncoder(write_encoder(tmp_path, kind))
    image = torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(1))
    masks = [torch.zeros(40, 60) for _ in range(2)]
    masks[0][:, :30] = masks[1][:, 30:] = 1
    features = encoder.features(image, masks)
    assert features.shape == (2, width) and not torch.allclose(*features)
    assert torch.allclose(encoder.features(image, masks[1:])[0], features[1], atol=1e-5)
    image[:, 30:] = 0.3  # another subject's pixels don't reach the first one's features
    assert torch.allclose(encoder.features(image, masks[:1])[0], features[0], atol=1e-5)


def test_folders_without_an_encoder_are_named(tmp_path):
    with pytest.raises(EncoderError, match="holds no image encoder .*put DINOv2 or CLIP"):
        FolderEncoder(tmp_path / "absent")
    folder = write_encoder(tmp_path / "cut", "dinov2")
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layer.1" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match="lacks .* tensors, such as .*layer.1"):
        FolderEncoder(folder)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match="can't be loaded"):  # pickled weights are not read
        FolderEncoder(folder)


# ---- the small world


@pytest.fixture(scope="module")
def oracle() -> OracleEncoder:
    return OracleEncoder(small_oracle())


def drawn_concept(who: str, seed: int, count: int = 3) -> Concept:
    name, identity = SUBJECTS[who]
    photos = reference_photos(identity, seed=seed, count=count, size=128)
    return Concept(name.token, name.noun, tuple(i for i, _ in photos), tuple(m for _, m in photos))


def test_the_oracle_finds_and_compares_drawn_subjects(oracle):
    concepts = [drawn_concept("rex", 0), drawn_concept("bolt", 1)]
    references = read_references(concepts, oracle)
    assert float(references.similarity[0, 0]) > 0.9 > float(references.similarity[0, 1])
    for who, expected in (("rex", (True, False)), ("bolt", (False, True))):
        image, mask = (part[0] for part in (drawn_concept(who, 5).images, drawn_concept(who, 5).masks))
        (found,) = oracle.detect(image)
        assert float(((found > 0.5) != (mask > 0.5)).float().mean()) < 0.05
        assert compare_picture(oracle.features(image, [found]), references).present == expected
    assert oracle.detect(torch.full((96, 160, 3), 0.5)) == []


def test_without_concepts_there_is_nothing_to_compare_with(oracle):
    with pytest.raises(SubjectError, match="there is none to compare with"):
        read_references([], oracle)


def test_segment_anything_proposes_the_subject_among_others():
    concept = drawn_concept("rex", 0, count=1)
    masks = propose_masks(small_sam(), concept.images[0])
    truth = concept.masks[0] > 0.5
    overlaps = [float((m & truth).sum() / (m | truth).sum()) for m in masks]
    assert masks and max(overlaps) > 0.7


def test_prompts_beside_pictures_are_read_as_the_tokenizer_reads_them(tmp_path, capsys):
    save_pair(tmp_path / "photos" / "0.png", torch.rand(40, 40, 3), torch.ones(40, 40).tril())
    save_picture(tmp_path / "drawn" / "0.png", torch.rand(40, 40, 3))
    prompt = tmp_path / "drawn" / "0.txt"
    argv = ["evaluate", "--pictures", tmp_path / "drawn", "--concept", "<rex-dog>", "dog", tmp_path / "photos"]
    argv += ["--encoder", tmp_path / "absent", "--sam", tmp_path / "absent", "--device", "cpu"]
    for text, words in (("a <max-dog>", "no picture's prompt names all concepts"), ("A <Rex-Dog>", "absent")):
        prompt.write_text(text)
        refused(capsys, argv, words)
    prompt.write_bytes("a café".encode("latin-1"))
    refused(capsys, argv, "0.txt: can't be read as UTF-8 (byte 6); save it as UTF-8 text")
