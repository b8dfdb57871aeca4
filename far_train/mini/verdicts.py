"""Judge whether a picture of the small world shows the subjects that were prompted for, by their identities.

The rule is that of Detect-and-Compare (MuDI, Jang et al. 2024, arXiv 2404.04243) with exact attributes instead of
similarities: the subjects found are matched one to one to those wanted and compared with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.optimize import linear_sum_assignment

from .identity import ATTRIBUTES, FIELDS, Identity
from .oracle import Reading

ENOUGH_ATTRIBUTES = 4  # of five: a subject described in full counts as right from here on


@dataclass(frozen=True)
class Verdict:
    """What a picture shows of the subjects that were asked for.

    ``right``: exactly these subjects, each by class, at least four attributes of five, and all attributes by which the
    subjects differ, on the right background. ``subjects_right``: the same whatever the background. ``missing`` and
    ``extra`` count subjects. ``own``, ``leaked``, ``drifted``: of the attributes by which the subjects differ, in those
    found, how many have their own value, another subject's, or some third one.
    """

    right: bool
    subjects_right: bool
    background: bool
    missing: int
    extra: int
    own: int
    leaked: int
    drifted: int

    @property
    def words(self) -> str:
        """The verdict in a few words, for below a picture."""
        if self.right:
            return "right"
        said = []
        if self.missing or self.extra:
            said += [f"{n} {what}" for n, what in ((self.missing, "missing"), (self.extra, "too many")) if n]
        if self.leaked:
            said.append(f"mixed ({self.leaked})")
        if self.drifted:
            said.append(f"off ({self.drifted})")
        if self.subjects_right:
            said.append("other place")
        return ", ".join(said) or "other looks"


def agreed_fields(wanted: Identity, found: Identity) -> set[str]:
    """The fields in which two identities agree. A shape agrees only within its class."""
    return {
        f for f in FIELDS if getattr(wanted, f) == getattr(found, f) and (f != "shape" or wanted.noun == found.noun)
    }


def match_identities(wanted: Sequence[Identity], found: Sequence[Identity]) -> list[int | None]:
    """For each wanted subject the index of its counterpart, chosen for the most agreement in all, classes first."""
    out: list[int | None] = [None] * len(wanted)
    if found:
        agreed = [[agreed_fields(w, f) for f in found] for w in wanted]
        score = np.array([[len(s) + 10 * ("noun" in s) for s in row] for row in agreed])
        for i, j in zip(*linear_sum_assignment(-score)):
            out[i] = int(j)
    return out


def matching_fields(wanted: Sequence[Identity], found: Sequence[Identity]) -> list[set[str]]:
    """For each wanted subject the fields in which its counterpart agrees; empty for a subject without one."""
    matches = match_identities(wanted, found)
    return [set() if j is None else agreed_fields(w, found[j]) for w, j in zip(wanted, matches)]


def differing(wanted: Sequence[Identity]) -> set[str]:
    """Attributes in which any two of the subjects differ; all, for one subject alone."""
    pairs = list(combinations(wanted, 2))
    return {f for a, b in pairs for f in a.differs(b) if f != "noun"} if pairs else set(ATTRIBUTES)


def judge_subjects(wanted: Sequence[Identity], place: str | None, reading: Reading) -> Verdict:
    """Compare what the oracle read with the subjects ``wanted``; ``place`` None: any background is right."""
    found = [s.identity for s in reading.subjects]
    distinguishing = differing(wanted)
    own = leaked = drifted = missing = 0
    each_right = []
    for subject, match in zip(wanted, match_identities(wanted, found)):
        if match is None:
            missing += 1
            each_right.append(False)
            continue
        seen = found[match]
        agreed = agreed_fields(subject, seen)
        each_right.append("noun" in agreed and len(agreed) > ENOUGH_ATTRIBUTES and distinguishing <= agreed)
        for attribute in distinguishing:
            others = {getattr(o, attribute) for o in wanted} - {getattr(subject, attribute)}
            value = getattr(seen, attribute)
            own += value == getattr(subject, attribute)
            leaked += value in others
            drifted += value != getattr(subject, attribute) and value not in others
    extra = max(len(found) - len(wanted), 0)
    subjects_right = all(each_right) and not extra
    background = place is None or reading.background == place
    return Verdict(subjects_right and background, subjects_right, background, missing, extra, own, leaked, drifted)
