"""Plan a benchmark: arms × groups × seeds, and the number of pictures that each run is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from far_train.utils.errors import ConfigError

from .arms import ALL, CORE, Arm, find_arms
from .groups import Group, dev_groups, dev_singles, dev_triple, test_groups
from .settings import BenchConfig


@dataclass(frozen=True)
class Plan:
    """``pictures``: per run, by kind of prompt (see :mod:`.measures`)."""

    arms: tuple[Arm, ...]
    groups: tuple[Group, ...]
    seeds: int
    pictures: Mapping[str, int]

    def runs(self) -> list[tuple[Arm, Group, int]]:
        """All runs, ordered so that a benchmark stopped half-way compares all arms on some of the groups."""
        order = product(range(self.seeds), self.groups, self.arms)
        return [(arm, group, seed) for seed, group, arm in order]


FEW = {"joint": 32, "solo": 16, "binding": 8, "prior": 16}
MANY = {"joint": 32, "solo": 16, "binding": 16, "prior": 32}


def build_plan(config: BenchConfig) -> Plan:
    """The plan of these settings. Raises ConfigError for an unknown arm or group."""
    dev = dev_groups()  # the first pair differs in yellow or orange trim, which not even the oracle arm learns
    plan = {
        "reduced": Plan(CORE, (dev[1], dev[2]), 1, FEW),
        "dev": Plan(ALL, (*dev, dev_triple(), *dev_singles()), 1, FEW),
        "core": Plan((*CORE, *find_arms(("ceiling",))), test_groups(), 2, MANY),
        "full": Plan(ALL, test_groups(), 3, MANY),
    }[config.plan]
    known = {group.key: group for group in plan.groups}
    for key in config.groups:
        if key not in known:
            raise ConfigError(f"groups: plan '{config.plan}' has no group '{key}'; it has: {', '.join(known)}")
    return Plan(
        find_arms(config.arms) if config.arms else plan.arms,
        tuple(known[key] for key in config.groups) or plan.groups,
        config.seeds or plan.seeds,
        {kind: config.more_pictures * count for kind, count in plan.pictures.items()},
    )
