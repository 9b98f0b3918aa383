"""A titled table of the study, and the numbers in its cells."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.table import Table

from cluster.report.numbers import MISSING, change, show
from selection.analysis.gradients import Estimate
from selection.analysis.speedup import Interval, Speedup
from selection.analysis.variance import Component


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A titled table of text; the first column is text, the others are numbers."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        for place, name in enumerate(self.header):
            table.add_column(name, justify="right" if self.numeric(place) else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For RESULTS.md."""
        rule = ["---:" if self.numeric(place) else "---" for place in range(len(self.header))]
        lines = [self.header, rule, *self.rows]
        cells = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{self.title}.** {self.note}\n\n{cells}\n"

    def numeric(self, place: int) -> bool:
        """Whether a column holds numbers."""
        return place > 0 and not self.header[place].startswith("what")


def ratio(found: Speedup | None) -> str:
    """A speed-up with its interval, marked where seeds that never got there count as the whole run."""
    if found is None:
        return MISSING
    mark = "" if found.reached == found.seeds else "≤ "
    return mark + bounded(found.ratio.value, found.ratio.low, found.ratio.high)


def difference(found: Interval) -> str:
    """A paired difference with its sign and, from two seeds on, its interval."""
    middle = change(0.0, found.value)
    return (
        f"{middle} [{change(0.0, found.low)}, {change(0.0, found.high)}]"
        if found.low == found.low
        else middle
    )


def bounded(value: float, low: float, high: float) -> str:
    """Write a value and, if it is finite, its interval."""
    return f"{show(value)} [{show(low)}, {show(high)}]" if math.isfinite(low) else show(value)


def interval(found: Interval) -> str:
    """A value and, from two seeds on, its interval."""
    return bounded(found.value, found.low, found.high)


def share_of(one: Component) -> str:
    """Write a component's share of the variance with its interval."""
    return f"{percent(one.share)} [{percent(one.share_low)}, {percent(one.share_high)}]"


def erring(found: Estimate) -> str:
    """Write an estimate with twice its standard error."""
    return f"{show(found.value)} ± {show(2 * found.error)}"


def percent(share: float) -> str:
    """Write a share in whole percent."""
    return f"{100 * share:.0f}%".replace("-0%", "0%").replace("-", "\u2212")
