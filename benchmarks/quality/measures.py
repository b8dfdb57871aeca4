"""From what the oracle read on each picture to the figures of one run.

All are shares of pictures, subjects or attributes. "Own", "foreign" and "third" are the values of the attributes in
which the subjects differ: a foreign one is another subject's (a leak), a third one nobody's (drift).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from far_train.mini.identity import ATTRIBUTES, Identity
from far_train.mini.oracle import Detection, Reading
from far_train.mini.verdicts import ENOUGH_ATTRIBUTES, agreed_fields, differing, judge_subjects, match_identities


@dataclass(frozen=True)
class Seen:
    """One picture and what the oracle read on it: JSON types, so that figures can be computed again.

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
    def build(cls, kind: str, prompt: str, place: str | None, subject: int | None, seed: int, reading: Reading) -> Seen:
        found = tuple(asdict(s.identity) for s in reading.subjects)
        return cls(kind, prompt, place, subject, seed, reading.background, found)

    @property
    def identities(self) -> list[Identity]:
        return [Identity(**fields) for fields in self.found]

    def as_reading(self) -> Reading:
        """The reading again, without the masks."""
        nowhere = torch.zeros(0, 0, dtype=torch.bool)
        return Reading(tuple(Detection(i, 1.0, {}, nowhere) for i in self.identities), self.background, 1.0)


def joint_figures(seen: Sequence[Seen], wanted: Sequence[Identity], reference_places: set[str]) -> dict[str, float]:
    """All subjects asked for together.

    ``success``, the primary measure: exactly these subjects, each by class, at least four of five attributes and all
    that tell them apart, in the place that was asked for.
    """
    verdicts = [judge_subjects(wanted, s.place, s.as_reading()) for s in seen]
    own, leaked, drifted = (sum(getattr(v, name) for v in verdicts) for name in ("own", "leaked", "drifted"))
    told = max(own + leaked + drifted, 1)
    matched, mixed = 0, 0
    for s in seen:
        for tally in _tallies(wanted, s.identities):
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
        "duplication": _mean(_is_twice_the_same(wanted, s.identities) for s in seen),
        "reference_background": _mean(s.background in reference_places and s.background != s.place for s in seen),
    }


def solo_figures(seen: Sequence[Seen], wanted: Sequence[Identity]) -> dict[str, float]:
    """Each subject asked for alone. ``solo``: exactly one, by class, four of five attributes and all that tell."""
    right, foreign, told = [], 0, 0
    telling = differing(wanted)
    for s in seen:
        identity, found = wanted[s.subject], s.identities
        agreed = agreed_fields(identity, found[0]) if len(found) == 1 else set()
        right.append("noun" in agreed and len(agreed) > ENOUGH_ATTRIBUTES and telling <= agreed)
        others = [w for i, w in enumerate(wanted) if i != s.subject]
        if found and others:
            nearest = found[match_identities([identity], found)[0]]
            for attribute in telling:
                value = getattr(nearest, attribute)
                foreign += value != getattr(identity, attribute) and value in {getattr(o, attribute) for o in others}
                told += 1
    return {"solo": _mean(right), "solo_leak": foreign / max(told, 1)}


def binding_figures(seen: Sequence[Seen], wanted: Sequence[Identity]) -> dict[str, float]:
    """'V1 on the left, V2 on the right': of the pictures with two subjects, those in which each stands on its side."""
    telling = differing(wanted)
    pairs = [s.identities for s in seen if len(s.found) == 2]
    return {"binding": _mean(all(telling <= agreed_fields(w, f) for w, f in zip(wanted, found)) for found in pairs)}


def prior_figures(seen: Sequence[Seen], base: Sequence[Seen], wanted: Sequence[Identity]) -> dict[str, float]:
    """'A dog': how far its attributes moved from the base's, and how often one of the learned subjects comes instead.

    ``prior_drift``: total variation between the attributes' distributions, from 0 to 1, as a mean over attributes; with
    few pictures it is above 0 for equal distributions too, so compare arms with each other and not with 0.
    """
    return {
        "prior_drift": attribute_distance(seen, base),
        "identity_without_token": _mean(_is_one(s, wanted) for s in seen),
    }


def attribute_distance(first: Sequence[Seen], second: Sequence[Seen]) -> float:
    """Mean over the attributes of the total variation ½ Σ |p − q| between two sets of pictures; 1 if one is empty."""
    found = [[identity for s in part for identity in s.identities] for part in (first, second)]
    if not all(found):
        return 1.0
    distances = []
    for attribute in ATTRIBUTES:
        p, q = (Counter(getattr(i, attribute) for i in part) for part in found)
        sizes = [len(part) for part in found]
        distances.append(0.5 * sum(abs(p[v] / sizes[0] - q[v] / sizes[1]) for v in p | q))
    return float(np.mean(distances))


def corrected_leakage(
    seen: Sequence[Seen], wanted: Sequence[Identity], confusion: Mapping[str, Mapping[str, Mapping[str, int]]]
) -> float:
    """Leakage of two subjects with the oracle's own mistakes taken out (Rogan & Gladen 1978).

    Of an attribute whose own value the oracle misreads as the other one's with rate e, and reads the other one's
    rightly with rate s, a share q of leaks is read where the true share is (q − e) / (s − e); the result is kept
    within 0 and 1. ``confusion``: attribute → true value → value read → count, as :func:`measure_oracle` gives it.
    """
    shares, weights = [], []
    matched = [match for s in seen for match in _matches(wanted, s.identities)]
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
    """For each subject that was found: how many telling attributes have its own value, and how many another's."""
    tallies = []
    for i, seen in _matches(wanted, found):
        tally = {"own": 0, "foreign": 0}
        for attribute in differing(wanted):
            value = getattr(seen, attribute)
            if value == getattr(wanted[i], attribute):
                tally["own"] += 1
            elif value in {getattr(w, attribute) for w in wanted}:
                tally["foreign"] += 1
        tallies.append(tally)
    return tallies


def _is_twice_the_same(wanted: Sequence[Identity], found: Sequence[Identity]) -> bool:
    """Whether two of the subjects found are nearest to the same one of those wanted, by what tells them apart."""
    telling = differing(wanted)
    nearest = []
    for seen in found:
        agreed = [len(agreed_fields(w, seen) & (telling | {"noun"})) for w in wanted]
        if agreed.count(max(agreed)) == 1:
            nearest.append(agreed.index(max(agreed)))
    return len(nearest) > len(set(nearest))


def _is_one(seen: Seen, wanted: Sequence[Identity]) -> bool:
    """Whether a picture shows one of the subjects: its class and at least four attributes of five."""
    agreed = [agreed_fields(w, i) for w in wanted for i in seen.identities]
    return any("noun" in a and len(a) > ENOUGH_ATTRIBUTES for a in agreed)


def _mean(values: Any) -> float:
    values = [float(v) for v in values]
    return float(np.mean(values)) if values else float("nan")
