"""Compute the figures of one run from what the oracle read in each picture.

All are shares of pictures, subjects or attributes. A distinguishing attribute is one in which the subjects differ. Its
value in a picture is the subject's own, another subject's (attribute leakage), or neither (drift).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, product
from typing import Any

import numpy as np
import torch

from far_train.mini.identity import ATTRIBUTES, Identity
from far_train.mini.oracle import Detection, Reading
from far_train.mini.verdicts import ENOUGH_ATTRIBUTES, agreed_fields, differing, judge_subjects, match_identities


@dataclass(frozen=True)
class Observation:
    """What the oracle read in one picture, in JSON types, so that figures can be recomputed.

    ``kind``: joint, solo, binding or prior; ``subject``: which of the group was asked for alone (solo, prior);
    ``found``: fields of each subject, from left to right.
    """

    kind: str
    prompt: str
    place: str | None
    subject: int | None
    seed: int
    background: str
    found: tuple[dict[str, str], ...]

    @classmethod
    def build(
        cls, kind: str, prompt: str, place: str | None, subject: int | None, seed: int, reading: Reading
    ) -> Observation:
        found = tuple(asdict(s.identity) for s in reading.subjects)
        return cls(kind, prompt, place, subject, seed, reading.background, found)

    @property
    def identities(self) -> list[Identity]:
        return [Identity(**fields) for fields in self.found]

    def as_reading(self) -> Reading:
        """The reading again, without the masks."""
        nowhere = torch.zeros(0, 0, dtype=torch.bool)
        return Reading(tuple(Detection(i, 1.0, {}, nowhere) for i in self.identities), self.background, 1.0)


def joint_figures(
    observed: Sequence[Observation], wanted: Sequence[Identity], reference_places: set[str]
) -> dict[str, float]:
    """Figures of the pictures whose prompt names all subjects.

    ``success`` (joint accuracy), the primary measure: exactly these subjects, each with its class, at least four of
    five attributes and all distinguishing ones, in the place that was prompted for.
    """
    verdicts = [judge_subjects(wanted, o.place, o.as_reading()) for o in observed]
    own, leaked, drifted = (sum(getattr(v, name) for v in verdicts) for name in ("own", "leaked", "drifted"))
    told = max(own + leaked + drifted, 1)
    matched, mixed = 0, 0
    for o in observed:
        for tally in _tallies(wanted, o.identities):
            matched += 1
            mixed += tally["own"] > 0 and tally["foreign"] > 0
    return {
        "success": _mean(v.right for v in verdicts),
        "subjects": _mean(v.subjects_right for v in verdicts),
        "background": _mean(v.background for v in verdicts),
        "missing": _mean(v.missing > 0 for v in verdicts),
        "extra": _mean(v.extra > 0 for v in verdicts),
        "leakage": leaked / told,
        "drift": drifted / told,
        "mixing": mixed / max(matched, 1),
        "duplication": _mean(_is_twice_the_same(wanted, o.identities) for o in observed),
        "reference_background": _mean(o.background in reference_places and o.background != o.place for o in observed),
    }


def solo_figures(observed: Sequence[Observation], wanted: Sequence[Identity]) -> dict[str, float]:
    """Figures of the pictures whose prompt names one subject.

    ``solo``: exactly one subject, with its class, at least four of five attributes and all distinguishing ones.
    ``solo_leak``: share of the distinguishing attributes of the subject found that have another learned subject's
    value. ``solo_other``: pictures that show another learned subject: one found has more of its class and
    distinguishing attributes than of those asked for.
    """
    right, foreign, told, others_seen = [], 0, 0, []
    distinguishing = differing(wanted)
    for o in observed:
        identity, found = wanted[o.subject], o.identities
        agreed = agreed_fields(identity, found[0]) if len(found) == 1 else set()
        right.append("noun" in agreed and len(agreed) > ENOUGH_ATTRIBUTES and distinguishing <= agreed)
        others = [w for i, w in enumerate(wanted) if i != o.subject]
        others_seen.append(any(_is_nearer_to(f, others, identity, distinguishing | {"noun"}) for f in found))
        if found and others:
            nearest = found[match_identities([identity], found)[0]]
            for attribute in distinguishing:
                value = getattr(nearest, attribute)
                foreign += value != getattr(identity, attribute) and value in {getattr(o, attribute) for o in others}
                told += 1
    return {"solo": _mean(right), "solo_leak": foreign / max(told, 1), "solo_other": _mean(others_seen)}


def _is_nearer_to(found: Identity, others: Sequence[Identity], asked: Identity, fields: set[str]) -> bool:
    """Whether ``found`` agrees in more of the ``fields`` with one of ``others`` than with the subject asked for."""
    own = len(agreed_fields(asked, found) & fields)
    return any(len(agreed_fields(other, found) & fields) > own for other in others)


def binding_figures(observed: Sequence[Observation], wanted: Sequence[Identity]) -> dict[str, float]:
    """'V1 on the left, V2 on the right': of the pictures with two subjects, those in which each stands on its side."""
    distinguishing = differing(wanted)
    pairs = [o.identities for o in observed if len(o.found) == 2]
    right = [all(distinguishing <= agreed_fields(w, f) for w, f in zip(wanted, found)) for found in pairs]
    return {"binding": _mean(right)}


def prior_figures(
    observed: Sequence[Observation], base: Sequence[Observation], wanted: Sequence[Identity]
) -> dict[str, float]:
    """'A dog': how far its attributes moved from the base's, and how often one of the learned subjects comes instead.

    ``prior_drift``: total variation between the attributes' distributions, from 0 to 1, as a mean over attributes; with
    few pictures it is above 0 for equal distributions too, so compare arms with each other and not with 0.
    """
    return {
        "prior_drift": attribute_distance(observed, base),
        "identity_without_token": _mean(_is_one(o, wanted) for o in observed),
    }


def attribute_distance(first: Sequence[Observation], second: Sequence[Observation]) -> float:
    """Mean over the attributes of the total variation ½ Σ |p − q| between two sets of pictures; 1 if one is empty."""
    found = [list(chain.from_iterable(o.identities for o in part)) for part in (first, second)]
    if not all(found):
        return 1.0
    distances = []
    for attribute in ATTRIBUTES:
        p, q = (Counter(getattr(i, attribute) for i in part) for part in found)
        sizes = [len(part) for part in found]
        distances.append(0.5 * sum(abs(p[v] / sizes[0] - q[v] / sizes[1]) for v in p | q))
    return float(np.mean(distances))


def corrected_leakage(
    observed: Sequence[Observation],
    wanted: Sequence[Identity],
    confusion: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> float:
    """Leakage of two subjects with the oracle's own mistakes taken out (Rogan & Gladen 1978).

    Of an attribute whose own value the oracle misreads as the other one's with rate e, and reads the other one's
    rightly with rate s, a share q of leaks is read where the true share is (q − e) / (s − e); the result is kept
    within 0 and 1. ``confusion``: attribute → true value → value read → count, as :func:`measure_oracle` gives it.
    """
    shares, weights = [], []
    matched = list(chain.from_iterable(_matches(wanted, o.identities) for o in observed))
    for k, subject in enumerate(wanted):
        (other,) = (w for i, w in enumerate(wanted) if i != k)
        for attribute in differing(wanted):
            own, foreign = getattr(subject, attribute), getattr(other, attribute)
            read = [getattr(identity, attribute) for j, identity in matched if j == k]
            if not read:
                continue
            q = sum(value == foreign for value in read) / len(read)
            prefix = [f"{w.noun} " if attribute == "shape" else "" for w in (subject, other)]
            e = _rate(confusion[attribute], prefix[0] + own, prefix[1] + foreign)
            s = _rate(confusion[attribute], prefix[1] + foreign, prefix[1] + foreign)
            shares.append(min(max((q - e) / max(s - e, 1e-6), 0.0), 1.0))
            weights.append(len(read))
    return float(np.average(shares, weights=weights)) if shares else 0.0


def _rate(table: Mapping[str, Mapping[str, int]], true: str, read: str) -> float:
    row = table.get(true, {})
    total = sum(row.values())
    return row.get(read, 0) / total if total else float(true == read)


def _matches(wanted: Sequence[Identity], found: Sequence[Identity]) -> list[tuple[int, Identity]]:
    return [(i, found[j]) for i, j in enumerate(match_identities(wanted, found)) if j is not None]


def _tallies(wanted: Sequence[Identity], found: Sequence[Identity]) -> list[dict[str, int]]:
    """For each subject found: how many distinguishing attributes have its own value, and how many another's."""
    tallies = []
    for i, identity in _matches(wanted, found):
        tally = {"own": 0, "foreign": 0}
        for attribute in differing(wanted):
            value = getattr(identity, attribute)
            if value == getattr(wanted[i], attribute):
                tally["own"] += 1
            elif value in {getattr(w, attribute) for w in wanted}:
                tally["foreign"] += 1
        tallies.append(tally)
    return tallies


def _is_twice_the_same(wanted: Sequence[Identity], found: Sequence[Identity]) -> bool:
    """Whether two of the subjects found are nearest to the same one of those wanted, by what tells them apart."""
    distinguishing = differing(wanted)
    nearest = []
    for identity in found:
        agreed = [len(agreed_fields(w, identity) & (distinguishing | {"noun"})) for w in wanted]
        if agreed.count(max(agreed)) == 1:
            nearest.append(agreed.index(max(agreed)))
    return len(nearest) > len(set(nearest))


def _is_one(observed: Observation, wanted: Sequence[Identity]) -> bool:
    """Whether a picture shows one of the subjects: its class and at least four attributes of five."""
    agreed = [agreed_fields(w, found) for w, found in product(wanted, observed.identities)]
    return any("noun" in a and len(a) > ENOUGH_ATTRIBUTES for a in agreed)


def _mean(values: Any) -> float:
    values = [float(v) for v in values]
    return float(np.mean(values)) if values else float("nan")
