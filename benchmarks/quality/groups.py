"""The groups of subjects that are learned together: dev and test pairs, triples, five subjects, single ones.

All come from identities that the small base has never seen, by a fixed seed. Dev and test share no identity.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from far_train.data.captions import Name
from far_train.mini.identity import NOUNS, Identity
from far_train.mini.shipped import SUBJECTS
from far_train.mini.verdicts import differing

from ..small_models.held_out import held_out_identities

SEED = 20251
# Held-out subjects that were looked at while the method was built: the demo's first pairs.
LOOKED_AT = frozenset(
    {
        Identity("dog", "white", "green", "banded", "scarf", "floppy"),
        Identity("dog", "white", "purple", "banded", "none", "floppy"),
        Identity("robot", "yellow", "red", "spotted", "scarf", "round"),
        Identity("robot", "yellow", "purple", "spotted", "none", "round"),
    }
)
NEAR, FAR = (1, 2), (4, 5)  # differing attributes of near twins, and of two that are far apart


@dataclass(frozen=True)
class Group:
    """Subjects that one training learns together.

    ``kind``: near (one class, one or two attributes differ), far (one class, four or five differ), classes (two
    classes), triple, five, single. ``seed``: of their reference photos.
    """

    key: str
    kind: str
    identities: tuple[Identity, ...]
    seed: int

    @property
    def names(self) -> tuple[Name, ...]:
        return tuple(Name(identity.noun, f"<v{i + 1}>") for i, identity in enumerate(self.identities))

    @property
    def distinguishing(self) -> set[str]:
        """Attributes in which the subjects differ."""
        return differing(self.identities)


def dev_groups() -> tuple[Group, ...]:
    """Nine pairs on which settings are tuned: three of near twins, two far apart, four of two classes."""
    return _all_groups()[0]


def dev_triple() -> Group:
    """Three at once for tuning: the two robots that are near twins, and a cat."""
    _, robots, cats, *_ = dev_groups()
    return Group("dev-triple-1", "triple", (*robots.identities, cats.identities[0]), 800)


def dev_singles() -> tuple[Group, ...]:
    """Three subjects, each learned by itself, for tuning: the first of a dev pair of dogs, of cars and of birds."""
    pairs = {group.key: group for group in dev_groups()}
    firsts = [pairs[key].identities[:1] for key in ("dev-near-1", "dev-near-3", "dev-far-2")]
    return tuple(Group(f"dev-single-{i + 1}", "single", first, 850 + i) for i, first in enumerate(firsts))


def test_groups() -> tuple[Group, ...]:
    """For the one measurement: eight pairs of near twins, four far apart, four of two classes, four triples, four
    subjects alone and five at once. All identities of them are their own."""
    return _all_groups()[1]


test_groups.__test__ = False  # its name is the bench's, not a test's


class _Draw:
    """Takes groups from the held-out identities, none of them twice."""

    def __init__(self) -> None:
        everyone = sorted(held_out_identities() - LOOKED_AT, key=repr)
        self._free = [everyone[i] for i in np.random.default_rng(SEED).permutation(len(everyone))]

    def take(self, fits: Callable[[Identity], bool]) -> Identity:
        """The first free identity that fits."""
        chosen = next(i for i in self._free if fits(i))
        self._free.remove(chosen)
        return chosen

    def leave_out(self, spent: Collection[Identity]) -> None:
        self._free = [i for i in self._free if i not in spent]

    def identities(self, noun: str, other: str, differ: Sequence[int]) -> tuple[Identity, Identity]:
        """Two of these nouns; of one class, they differ in so many attributes as ``differ`` names."""

        def matches(a: Identity, b: Identity) -> bool:
            return a.noun == noun and b.noun == other and (noun != other or len(a.differs(b)) in differ)

        first = self.take(lambda i: any(matches(i, j) for j in self._free))
        return first, self.take(lambda i: matches(first, i))

    def kin(self, key: str, nouns: Sequence[str], seed: int, counts: tuple[int, int], first: int = 0) -> list[Group]:
        """Pairs of one class, with both numbers of differing attributes in turn. ``key``: prefix and kind."""
        kind = key.rpartition("-")[2]
        return [
            Group(f"{key}-{i + 1}", kind, self.identities(noun, noun, (counts[i % 2],)), seed + i)
            for i, noun in enumerate(nouns, first)
        ]

    def classes(self, key: str, nouns: Sequence[tuple[str, str]], seed: int, first: int = 0) -> list[Group]:
        """Pairs of two classes."""
        return [
            Group(f"{key}-{i + 1}", "classes", self.identities(a, b, ()), seed + i)
            for i, (a, b) in enumerate(nouns, first)
        ]

    def triple(self, key: str, noun: str, seed: int) -> Group:
        """Near twins and a third of their class that differs from both in at least three attributes."""
        twins = self.identities(noun, noun, NEAR)
        third = self.take(lambda i: i.noun == noun and all(len(i.differs(t)) >= 3 for t in twins))
        return Group(key, "triple", (*twins, third), seed)


@cache
def _all_groups() -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """Dev groups and test groups."""
    draw = _Draw()
    # The test pairs of the first measurements (benchmarks/reports/2026-11-26). Settings were read off their results,
    # so they are spent; they are drawn all the same, so that the dev pairs stay who they were.
    draw.kin("near", NOUNS, 0, NEAR)
    draw.kin("far", NOUNS[:4], 100, FAR)
    draw.classes("classes", list(zip(NOUNS[:4], NOUNS[4:])), 200)
    devs = draw.kin("dev-near", ("dog", "robot"), 500, NEAR) + draw.kin("dev-far", ("cat",), 600, FAR)
    devs += draw.classes("dev-classes", [("bird", "cup")], 700)
    devs += [
        Group("dev-near-3", "near", draw.identities("car", "car", (1,)), 502),
        Group("dev-far-2", "far", draw.identities("bird", "bird", (5,)), 601),
    ]
    devs += draw.classes("dev-classes", [("fish", "tree"), ("dog", "robot"), ("cat", "car")], 700, first=1)
    draw.kin("near", NOUNS[1::2], 0, NEAR, first=8)
    draw.kin("far", NOUNS[4:6], 100, FAR, first=4)
    draw.classes("classes", [("bird", "robot"), ("dog", "tree")], 200, first=4)
    # The present ones, drawn on 27 November 2026, without the demo's.
    draw.leave_out([identity for _, identity in SUBJECTS.values()])
    tests = draw.kin("near", NOUNS, 0, NEAR, first=12)
    tests += draw.kin("far", NOUNS[::2], 100, FAR, first=6)
    tests += draw.classes("classes", list(zip(NOUNS[:4], NOUNS[:3:-1])), 200, first=6)
    tests += [draw.triple(f"triple-{i + 1}", noun, 300 + i) for i, noun in enumerate(NOUNS[1::2], 4)]
    tests += [
        Group(f"single-{i + 1}", "single", (draw.take(lambda x, noun=noun: x.noun == noun),), 450 + i)
        for i, noun in enumerate(NOUNS[::2], 4)
    ]
    twins, apart = draw.identities("dog", "dog", NEAR), draw.identities("dog", "dog", FAR)
    five = (*twins, *apart, draw.take(lambda i: i.noun == "cat"))
    return tuple(devs), (*tests, Group("five-2", "five", five, 401))
