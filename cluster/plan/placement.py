"""The placement of a run's processes on GPUs, as Ray does it: whole GPUs, and shares filled up one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cluster.plan.estimate import Need

TINY: Final = 1e-6
"""Rounding error of a share."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The roles on every GPU, each with the number of its processes there."""

    gpus: tuple[Counter[str], ...]

    def hosts(self, role: str) -> int:
        """Count the GPUs with a process of a role."""
        return sum(role in gpu for gpu in self.gpus)

    def shared(self, *roles: str) -> bool:
        """Return whether some GPU has processes of more than one of the roles."""
        return any(sum(role in gpu for role in roles) > 1 for gpu in self.gpus)


def place(needs: Sequence[Need]) -> Placement:
    """Place processes in order on as many GPUs as they take.

    A share goes to the GPU with the least room that suffices, as in Ray.
    """
    gpus: list[Counter[str]] = []
    free: list[float] = []
    for need in needs:
        for _ in range(need.count if need.gpus else 0):
            wanted = min(need.gpus, 1.0)
            room = [(left, number) for number, left in enumerate(free) if left >= wanted - TINY]
            if need.gpus >= 1 or not room:
                for _ in range(max(1, round(need.gpus))):
                    gpus.append(Counter({need.role: 1}))
                    free.append(1 - wanted)
                continue
            number = min(room)[1]
            gpus[number][need.role] += 1
            free[number] -= wanted
    return Placement(tuple(gpus))


def crowded(needs: Sequence[Need], memory: float) -> list[str]:
    """Describe the GPUs whose processes together need more than ``memory`` bytes, one of each kind."""
    by_role = {need.role: need for need in needs}
    found = {}
    for gpu in place(needs).gpus:
        total = sum(count * by_role[role].total for role, count in gpu.items())
        if total > memory:
            what = " + ".join(f"{count} {role}" for role, count in gpu.items())
            found[what] = (
                f"{what} on one GPU need {total / 1e9:.1f} GB together, and it has {memory / 1e9:.1f} GB"
            )
    return list(found.values())
