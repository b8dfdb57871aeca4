"""The judge of learned subjects, on readings written down by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from far_train.mini.identity import Identity
from far_train.mini.oracle import Detection, Reading
from far_train.mini.verdicts import differing, judge_subjects

REX = Identity("dog", "white", "green", "banded", "scarf", "floppy")
MAX = replace(REX, second="purple", accessory="none")
BOTH = (REX, MAX)


def read(*identities: Identity, place: str = "beach") -> Reading:
    mask = torch.ones(4, 4, dtype=torch.bool)
    return Reading(tuple(Detection(i, 1.0, {}, mask) for i in identities), place, 1.0)


def test_distinguishing_attributes_are_those_that_differ():
    assert differing(BOTH) == {"second", "accessory"}
    assert differing((REX,)) == {"body", "second", "pattern", "accessory", "shape"}


@pytest.mark.parametrize("order", [(REX, MAX), (MAX, REX)])
def test_both_right_in_either_order(order):
    verdict = judge_subjects(BOTH, "beach", read(*order))
    assert verdict.right and verdict.own == 4 and not verdict.leaked + verdict.drifted
    assert verdict.words == "right"


def test_another_place_is_wrong_but_the_subjects_are_right():
    verdict = judge_subjects(BOTH, "beach", read(REX, MAX, place="moon"))
    assert not verdict.right and verdict.subjects_right and verdict.words == "other place"
    assert judge_subjects(BOTH, None, read(REX, MAX, place="moon")).right


def test_one_attribute_that_tells_nothing_may_be_off():
    assert judge_subjects(BOTH, "beach", read(replace(REX, shape="pointed"), MAX)).right
    assert not judge_subjects(BOTH, "beach", read(replace(REX, shape="pointed", body="red"), MAX)).right


def test_a_distinguishing_attribute_must_be_right_and_is_counted_as_leak_or_drift():
    leaked = judge_subjects(BOTH, "beach", read(replace(REX, accessory="none"), MAX))
    assert not leaked.right and (leaked.own, leaked.leaked, leaked.drifted) == (3, 1, 0)
    assert leaked.words == "mixed (1)"
    drifted = judge_subjects(BOTH, "beach", read(replace(REX, second="red"), MAX))
    assert not drifted.right and (drifted.own, drifted.leaked, drifted.drifted) == (3, 0, 1)
    assert drifted.words == "off (1)"


def test_the_same_subject_twice_is_mixed():
    verdict = judge_subjects(BOTH, "beach", read(REX, REX))
    assert not verdict.right and verdict.leaked == 2


def test_missing_and_extra_subjects_are_wrong():
    alone = judge_subjects(BOTH, "beach", read(REX))
    assert not alone.right and alone.missing == 1 and alone.own == 2 and alone.words == "1 missing"
    three = judge_subjects(BOTH, "beach", read(REX, MAX, REX))
    assert not three.right and three.extra == 1 and three.words == "1 too many"
    assert judge_subjects(BOTH, "beach", read()).missing == 2


def test_another_class_is_wrong():
    cat = Identity("cat", "white", "green", "banded", "scarf", "curly")
    assert not judge_subjects((REX,), "beach", read(cat)).right
