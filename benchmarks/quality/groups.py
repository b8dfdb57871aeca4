"""The groups of subjects that are learned together: dev and test pairs, triples, five subjects, single ones.

All come from identities that the small base has never seen, by a fixed seed. Dev and test share no identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from far_train.data.captions import Name
from far_train.mini.identity import NOUNS, Identity
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
    """Pairs for the one measurement: 12 of near twins, 6 far apart, 6 of two classes. The last four, two and two came
    later, when the first sixteen had been run."""
    return _all_groups()[1]


def core_groups() -> tuple[Group, ...]:
    """The eight test pairs of the registered core: half of each kind."""
    pairs = test_groups()
    return (*_of(pairs, "near")[:4], *_of(pairs, "far")[:2], *_of(pairs, "classes")[:2])


def larger_groups() -> tuple[Group, ...]:
    """Four triples of one class and five look-alikes, all from the identities of the test pairs."""
    near, far, classes = (_of(test_groups(), kind) for kind in ("near", "far", "classes"))
    triples = [
        Group(f"triple-{i + 1}", "triple", (*near[i].identities, far[i].identities[0]), 300 + i) for i in range(4)
    ]
    five = (*near[0].identities, *far[0].identities, classes[0].identities[0])
    return (*triples, Group("five", "five", five, 400))


def single_groups() -> tuple[Group, ...]:
    """Four subjects of the test pairs, each learned by itself."""
    return tuple(
        Group(f"single-{i + 1}", "single", g.identities[:1], 450 + i)
        for i, g in enumerate(_of(test_groups(), "near")[:4])
    )


test_groups.__test__ = False  # its name is the bench's, not a test's


def _of(groups: Sequence[Group], kind: str) -> list[Group]:
    return [g for g in groups if g.kind == kind]


@cache
def _all_groups() -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    rng = np.random.default_rng(SEED)
    everyone = sorted(held_out_identities() - LOOKED_AT, key=repr)
    free = [everyone[i] for i in rng.permutation(len(everyone))]

    def take(fits: Callable[[Identity], bool]) -> Identity:
        chosen = next(i for i in free if fits(i))
        free.remove(chosen)
        return chosen

    def pair(key: str, kind: str, noun: str, seed: int, other: str, differ: Sequence[int]) -> Group:
        def matches(a: Identity, b: Identity) -> bool:
            return a.noun == noun and b.noun == other and (noun != other or len(a.differs(b)) in differ)

        first = take(lambda i: any(matches(i, j) for j in free))
        return Group(key, kind, (first, take(lambda i: matches(first, i))), seed)

    def kin(
        prefix: str, kind: str, nouns: Sequence[str], seed: int, counts: tuple[int, int], first: int = 0
    ) -> list[Group]:
        # Both numbers of differing attributes in turn.
        return [
            pair(f"{prefix}{kind}-{i + 1}", kind, noun, seed + i, noun, (counts[i % 2],))
            for i, noun in enumerate(nouns, first)
        ]

    def classes(prefix: str, nouns: Sequence[tuple[str, str]], seed: int, first: int = 0) -> list[Group]:
        return [
            pair(f"{prefix}classes-{i + 1}", "classes", a, seed + i, b, ()) for i, (a, b) in enumerate(nouns, first)
        ]

    tests = kin("", "near", NOUNS, 0, NEAR) + kin("", "far", NOUNS[:4], 100, FAR)
    tests += classes("", list(zip(NOUNS[:4], NOUNS[4:])), 200)
    devs = kin("dev-", "near", ("dog", "robot"), 500, NEAR) + kin("dev-", "far", ("cat",), 600, FAR)
    devs += classes("dev-", [("bird", "cup")], 700)
    # Drawn last, so that the pairs above stay who they were.
    devs += [
        pair("dev-near-3", "near", "car", 502, "car", (1,)),
        pair("dev-far-2", "far", "bird", 601, "bird", (5,)),
        pair("dev-classes-2", "classes", "fish", 701, "tree", ()),
        pair("dev-classes-3", "classes", "dog", 702, "robot", ()),
        pair("dev-classes-4", "classes", "cat", 703, "car", ()),
    ]
    tests += kin("", "near", NOUNS[1::2], 0, NEAR, first=8) + kin("", "far", NOUNS[4:6], 100, FAR, first=4)
    tests += classes("", [("bird", "robot"), ("dog", "tree")], 200, first=4)
    return tuple(devs), tuple(tests)
