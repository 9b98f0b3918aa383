"""The outage of a watching reward, which neither ends nor delays training."""

from __future__ import annotations

from cluster.record.events import note, warn


class Outage:
    """The state of a watching reward: while ``paused`` it is not called, and its scores are missing.

    It is paused when it fails, until the next evaluation, which calls it once.
    """

    def __init__(self, reward: str) -> None:
        """Name the reward, which works so far."""
        self.reward, self.paused = reward, False
        self._reason = self._unreported = ""

    @property
    def ongoing(self) -> bool:
        """True if no call has succeeded since the outage began."""
        return bool(self._reason)

    def begin(self, reason: str) -> None:
        """Pause the reward after a failure, the first of the outage or a later one."""
        self.paused = True
        if not self.ongoing:
            self._reason = self._unreported = reason
            warn("watching reward missing", reward=self.reward, reason=reason)

    def retry(self) -> None:
        """Allow the next call."""
        self.paused = False

    def end(self) -> None:
        """End the outage after a successful call."""
        self.paused = False
        if self.ongoing:
            self._reason = self._unreported = ""
            note("watching reward back", reward=self.reward)

    def new_reason(self) -> str:
        """Return the reason of the outage, once; empty without a new one."""
        reason, self._unreported = self._unreported, ""
        return reason
