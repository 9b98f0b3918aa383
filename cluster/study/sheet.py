"""A titled table of the study, and the format of its cells."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.table import Table

from cluster.report.numbers import MISSING, change, show
from selection.analysis.gradients import Estimate
from selection.analysis.speedup import Advantage, Interval, Speedup
from selection.analysis.variance import Component


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A titled table of text; the first column is text, the others are numbers."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def table(self) -> Table:
        """Render the table for a terminal."""
        table = Table(title=self.title, caption=self.note, title_justify="left", caption_justify="left")
        for place, name in enumerate(self.header):
            table.add_column(name, justify="right" if self.numeric(place) else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Render the table for RESULTS.md."""
        rule = ["---:" if self.numeric(place) else "---" for place in range(len(self.header))]
        lines = [self.header, rule, *self.rows]
        cells = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{self.title}.** {self.note}\n\n{cells}\n"

    def numeric(self, place: int) -> bool:
        """Return whether a column contains numbers."""
        return place > 0 and not self.header[place].startswith("what")


def ratio(speedup: Speedup | None) -> str:
    """Format a speed-up with its interval, marked if some seeds never reached the score."""
    if speedup is None:
        return MISSING
    mark = "" if speedup.reached == speedup.seeds else "≤ "
    return mark + interval(speedup.ratio)


def gained(found: Advantage) -> str:
    """Format a ratio of costs with its interval, marked as a bound if some seeds never reached the score."""
    return f"{found.bound} {interval(found.ratio)}".strip()


def difference(gain: Interval) -> str:
    """Format a paired difference with its sign and, from two seeds on, its interval."""
    middle = change(0.0, gain.value)
    return (
        f"{middle} [{change(0.0, gain.low)}, {change(0.0, gain.high)}]"
        if not math.isnan(gain.low)
        else middle
    )


def bounded(value: float, low: float, high: float) -> str:
    """Format a value and, if it is finite, its interval."""
    return f"{show(value)} [{show(low)}, {show(high)}]" if math.isfinite(low) else show(value)


def interval(bounds: Interval) -> str:
    """Format a value and, from two seeds on, its interval."""
    return bounded(bounds.value, bounds.low, bounds.high)


def share_of(component: Component) -> str:
    """Format a component's share of the variance with its interval."""
    low, high = percent(component.share_low), percent(component.share_high)
    return f"{percent(component.share)} [{low}, {high}]"


def with_error(estimate: Estimate) -> str:
    """Format an estimate with twice its standard error."""
    return f"{show(estimate.value)} ± {show(2 * estimate.error)}"


def percent(share: float) -> str:
    """Format a share in whole percent."""
    return f"{100 * share:.0f}%".replace("-0%", "0%").replace("-", "\u2212")
