"""Figures of the bench on readings written down by hand, and its statistics on numbers that can be counted."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from benchmarks.quality.measures import (
    Observation,
    attribute_distance,
    binding_figures,
    corrected_leakage,
    joint_figures,
    prior_figures,
    solo_figures,
)
from benchmarks.quality.statistics import bootstrap_interval, holm, sign_flip_test
from far_train.mini.identity import Identity

REX = Identity("dog", "white", "green", "banded", "scarf", "floppy")
MAX = replace(REX, second="purple", accessory="none")
BOTH = (REX, MAX)


def observed(*found: Identity, kind="joint", place="beach", background="beach", subject=None) -> Observation:
    return Observation(kind, "", place, subject, 0, background, tuple(asdict(i) for i in found))


def test_joint_figures_count_pictures_subjects_and_attributes():
    mixed = replace(REX, accessory="none")  # green as Rex, bare as Max
    pictures = [observed(REX, MAX), observed(mixed, MAX), observed(REX), observed(REX, REX, background="moon")]
    figures = joint_figures(pictures, BOTH, {"moon"})
    assert figures["success"] == 0.25 and figures["subjects"] == 0.25
    assert figures["background"] == 0.75 and figures["reference_background"] == 0.25
    assert figures["missing"] == 0.25 and figures["extra"] == 0
    # Matched: 4 own; 3 own, 1 foreign; 2 own; 2 own, 2 foreign.
    assert figures["leakage"] == pytest.approx(3 / 14) and figures["drift"] == 0
    assert figures["mixing"] == pytest.approx(1 / 7)
    assert figures["duplication"] == 0.25


def test_a_third_value_is_drift_and_a_foreign_class_is_no_success():
    figures = joint_figures([observed(replace(REX, second="red"), MAX)], BOTH, set())
    assert figures["drift"] == 0.25 and figures["leakage"] == 0 and figures["success"] == 0


def test_solo_needs_one_subject_with_all_that_tells_it_apart():
    alone = {"kind": "solo", "subject": 0}
    right, other = {"solo": 1, "solo_leak": 0, "solo_other": 0}, {"solo": 0, "solo_leak": 1, "solo_other": 1}
    assert solo_figures([observed(REX, **alone)], BOTH) == right
    assert solo_figures([observed(replace(REX, shape="pointed"), **alone)], BOTH) == right
    assert solo_figures([observed(MAX, **alone)], BOTH) == other
    assert solo_figures([observed(REX, REX, **alone)], BOTH) == right | {"solo": 0}
    assert solo_figures([observed(**alone)], BOTH) == {"solo": 0, "solo_leak": 0, "solo_other": 0}


def test_another_subject_shows_where_one_was_asked_for():
    alone = {"kind": "solo", "subject": 0}
    half = replace(REX, accessory="none")  # as near to Rex as to Max
    pictures = [observed(REX, **alone), observed(half, **alone), observed(REX, MAX, **alone), observed(MAX, **alone)]
    figures = solo_figures(pictures, BOTH)
    assert figures["solo_other"] == 0.5
    assert figures["solo_leak"] == 3 / 8  # of the one nearest to Rex: none, 1 of 2, none, 2 of 2
    assert solo_figures([observed(MAX, **alone)], [REX])["solo_other"] == 0  # learned alone: nobody else to show


def test_binding_goes_from_left_to_right():
    pictures = [observed(REX, MAX), observed(MAX, REX), observed(REX)]
    assert binding_figures(pictures, BOTH)["binding"] == 0.5


def test_prior_drift_is_half_the_distance_of_the_distributions():
    base = [observed(REX), observed(MAX)]
    assert attribute_distance(base, base) == 0
    # second: {green, purple} against {green}; accessory likewise; the other three agree.
    assert attribute_distance([observed(REX)], base) == pytest.approx(2 * 0.5 / 5)
    assert attribute_distance([observed()], base) == 1
    other = replace(REX, body="red", second="blue", pattern="plain")
    figures = prior_figures([observed(REX), observed(other)], base, BOTH)
    assert figures["identity_without_token"] == 0.5


def test_leakage_is_corrected_for_the_oracles_confusion():
    # The oracle calls one green in ten purple, and knows every purple.
    sure = {value: {value: 10} for value in ("green", "purple", "scarf", "none")}
    confusion = {
        "second": sure | {"green": {"green": 9, "purple": 1}},
        "accessory": sure,
    }
    read = [observed(REX, MAX)] * 9 + [observed(replace(REX, second="purple"), MAX)]
    assert joint_figures(read, BOTH, set())["leakage"] == pytest.approx(1 / 40)
    assert corrected_leakage(read, BOTH, confusion) == 0  # one in ten is what the oracle misreads by itself
    read = [observed(replace(REX, second="purple"), MAX)] * 10
    assert corrected_leakage(read, BOTH, confusion) == pytest.approx(1 / 4)


def test_a_seen_picture_gives_its_reading_again():
    reading = observed(REX, MAX, background="moon").as_reading()
    assert [s.identity for s in reading.subjects] == [REX, MAX] and reading.background == "moon"


def test_sign_flips_are_counted_exactly():
    assert sign_flip_test([1, 1, 1, 1]) == pytest.approx(2 / 16)
    assert sign_flip_test([1, -1]) == 1
    assert sign_flip_test([0.2] * 20) < 0.01


def test_holm_steps_down():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_bootstrap_interval_holds_the_mean_and_is_nothing_for_equal_values():
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    low, high = bootstrap_interval([0, 0, 1, 1, 1, 0, 1, 0])
    assert 0.1 < low < 0.5 < high < 0.9
