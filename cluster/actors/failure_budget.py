"""Decide from the times and prompts of a reward's failures whether it is broken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

from rollout.records import Prompt

NO_MORE_CALLS: Final = 1.4
"""Deadlines without a success after which no further call is made, so that the run stops within two."""
LAST_CALL_ENDS: Final = 1.9
"""Deadlines after which the last call ends; the rest of two deadlines is for stopping the run."""
STREAK: Final = 8
"""Consecutive failures that are not a coincidence, however quickly they occurred."""


class FailureBudget:
    """The time without a success after which a reward counts as broken.

    A reward that never succeeded is broken after two deadlines; one that did gets ``attempts`` times as long,
    and is not broken while all failures have a prompt in common, since that prompt may be the cause.
    However long a restart took, the next call still gets at least half a deadline.
    """

    def __init__(self, deadline: float, attempts: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with an empty record; ``clock`` returns seconds."""
        self.deadline, self.attempts, self.clock = deadline, attempts, clock
        self.failures = self.successes = 0
        self._since = 0.0
        self._waiting = False
        self._suspects: set[int] | None = None

    @property
    def patience(self) -> int:
        """The allowed duration of a failure streak, in units of two deadlines."""
        return self.attempts if self.successes else 1

    @property
    def seconds(self) -> float:
        """Seconds since the first call without a success started."""
        return self.clock() - self._since

    def begin(self) -> float:
        """Count a call that starts now, and return the seconds it may take."""
        if not self._waiting:
            self._since, self._waiting = self.clock(), True
        if not self.failures:
            return self.deadline
        left = LAST_CALL_ENDS * self.patience * self.deadline - self.seconds
        return min(self.deadline, max(self.deadline / 2, left))

    def succeeded(self) -> None:
        """Forget all failures after a success."""
        self.failures, self._waiting, self._suspects = 0, False, None
        self.successes += 1

    def failed(self, prompts: Iterable[Prompt] = (), *, away: bool = False) -> bool:
        """Count a failed call of some prompts, and return whether the reward is broken.

        A server that is ``away`` fails quickly and often; such failures are not counted as a streak.
        """
        if self.successes and not away and self._share(prompts):
            self.failures, self._since = 0, self.clock()
            return False
        self.failures += 1
        long = self.failures > 1 and self.seconds >= NO_MORE_CALLS * self.patience * self.deadline
        return long or (not away and self.failures >= STREAK * self.patience)

    def _share(self, prompts: Iterable[Prompt]) -> bool:
        """Return whether all failures since the last success, these included, share a prompt."""
        asked = {prompt.index for prompt in prompts}
        self._suspects = asked if self._suspects is None else self._suspects & asked
        return bool(self._suspects)
