"""A reward that only watches and stops working: it neither ends training nor holds it up."""

from __future__ import annotations

from cluster.record.events import note, warn


class Outage:
    """Whether such a reward works, or rests since it failed: what it should have judged is then missing.

    It rests until the next evaluation, which tries it once.
    """

    def __init__(self, reward: str) -> None:
        """``reward`` is its name."""
        self.reward, self.rests = reward, False
        self._story = self._news = ""

    @property
    def lasts(self) -> bool:
        """Whether no call succeeded since it began."""
        return bool(self._story)

    def begin(self, story: str) -> None:
        """Let the reward rest, since it stopped working or still does not work."""
        self.rests = True
        if not self.lasts:
            self._story = self._news = story
            warn("watching reward missing", reward=self.reward, reason=story)

    def try_again(self) -> None:
        """Let the next call through."""
        self.rests = False

    def end(self) -> None:
        """A call succeeded."""
        self.rests = False
        if self.lasts:
            self._story = self._news = ""
            note("watching reward back", reward=self.reward)

    def news(self) -> str:
        """Why the reward stopped working, if it did since this was last asked; else nothing."""
        story, self._news = self._news, ""
        return story
