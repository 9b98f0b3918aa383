"""The worker of the selection stage: scores of a batch in, the kept candidates with their advantages out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rewards.combine import Scores
from selection.advantages import advantages, rms
from selection.records import GroupStatistics, Kept, Selection
from selection.settings import SelectionSettings
from selection.strategies import Batch, Floats, Indices, each_margin, load_strategy, promising


class Selector:
    """The selector of kept candidates; ``seed`` (not negative) breaks ties and draws random ones.

    It has no state: the same scores of the same groups give the same selection, whichever worker scored
    them, in whichever order the groups arrive.
    """

    def __init__(self, settings: SelectionSettings, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.strategy = load_strategy(settings.strategy)

    def ping(self) -> str:
        """Return the strategy's name, which confirms that the worker responds."""
        return self.settings.strategy

    def select(self, step: int, group_ids: Sequence[int], scores: Sequence[Scores]) -> Selection:
        """Select from one batch: ``scores[i]`` are those of group ``group_ids[i]``.

        Groups may differ in size. A candidate without a finite total counts as invalid.

        Raises:
            ValueError: naming the step, if the batch is empty, its two sequences differ in length, or a
                group appears twice.
        """
        _check(step, group_ids, scores)
        batch = self._batch(group_ids, scores)
        kept = self._without_ties(batch, self._choose(batch, scores))
        values = advantages(
            batch.rewards,
            batch.valid,
            kept,
            normalisation=self.settings.advantages,
            rms_match=self.settings.rms_match,
            tolerance=self._tolerance,
        )
        groups = tuple(
            _statistics(group_id, score, row[valid], len(chosen))
            for group_id, score, row, valid, chosen in zip(
                group_ids, scores, batch.rewards, batch.valid, kept, strict=True
            )
        )
        return Selection(
            kept=tuple(
                Kept(group_id=group_id, candidate=int(candidate), advantage=float(value))
                for group_id, chosen, row in zip(group_ids, kept, values, strict=True)
                for candidate, value in zip(chosen, row, strict=True)
            ),
            groups=groups,
            metrics=self._metrics(groups, batch, scores, rms(values)),
        )

    def _choose(self, batch: Batch, scores: Sequence[Scores]) -> tuple[Indices, ...]:
        if self.settings.margin == "total":
            return self.strategy(batch)
        parts = np.full((len(scores[0].weighted), *batch.rewards.shape), np.nan)
        for group, score in enumerate(scores):
            for number, part in enumerate(score.weighted.values()):
                parts[number, group, : len(part)] = part
        return each_margin(batch, parts)

    @property
    def _tolerance(self) -> float:
        """The margin at or below which a group is left out as a tie."""
        return self.settings.tolerance if self.settings.ties == "drop" else -1.0

    def _without_ties(self, batch: Batch, kept: Sequence[Indices]) -> tuple[Indices, ...]:
        """Empty the groups whose advantages would all be zero, since the rewards they stem from tie."""
        whole = self.settings.advantages in ("candidates", "ranks")
        pools = batch.valid if whole else kept
        return tuple(
            chosen if len(chosen) and np.ptp(row[pool]) > self._tolerance else chosen[:0]
            for chosen, row, pool in zip(kept, batch.rewards, pools, strict=True)
        )

    def _batch(self, group_ids: Sequence[int], scores: Sequence[Scores]) -> Batch:
        """Pad the groups to one length with invalid candidates and draw the keys."""
        width = max(len(score.total) for score in scores)
        rewards = np.full((len(scores), width), np.nan)
        valid = np.zeros((len(scores), width), dtype=np.bool_)
        for row, score in enumerate(scores):
            size = len(score.total)
            rewards[row, :size] = score.total
            valid[row, :size] = score.valid & np.isfinite(score.total)
        return Batch(
            rewards=rewards,
            valid=valid,
            keys=np.stack([tie_keys(self.seed, group_id, width) for group_id in group_ids]),
            keep=self.settings.keep,
            tolerance=self.settings.tolerance,
        )

    def _metrics(
        self, groups: Sequence[GroupStatistics], batch: Batch, scores: Sequence[Scores], advantage_rms: float
    ) -> dict[str, float]:
        compared = [group for group in groups if not group.dropped]
        # The raw sum, since the mean of standardised rewards is always zero.
        raw = [score.raw[row[: len(score.raw)]] for score, row in zip(scores, batch.valid, strict=True)]
        rewards = np.concatenate(raw)
        ties = [
            float(row.mean())
            for group, row in zip(groups, raw, strict=True)
            if not group.dropped and group.margin <= batch.tolerance
        ]
        return {
            "reward_mean": float(rewards.mean()) if len(rewards) else float("nan"),
            "reward_std": _mean([group.reward_std for group in compared]),
            "margin_mean": _mean([group.margin for group in compared]),
            "zero_margin_groups": float(len(ties)),
            **({"tied_low": min(ties), "tied_high": max(ties)} if ties else {}),
            "dropped_groups": float(len(groups) - len(compared)),
            "short_groups": float(sum(group.valid < batch.keep for group in compared)),
            "candidates": float(sum(group.candidates for group in groups)),
            "valid": float(sum(group.valid for group in groups)),
            "selected": float(sum(group.selected for group in groups)),
            "advantage_rms": advantage_rms,
        }


def screen(scores: Scores, settings: SelectionSettings, seed: int, group_id: int) -> Indices:
    """Choose a group's drafted candidates to finish, in rising order; ``scores`` are the drafts'."""
    valid = scores.valid & np.isfinite(scores.total)
    keys = tie_keys(seed, group_id, len(valid))
    return promising(scores.total, valid, keys, settings.candidates)


def tie_keys(seed: int, group_id: int, count: int) -> NDArray[np.uint64]:
    """Draw the keys (count,) of a group's candidates, each from seed, group and position alone."""
    # A bit generator's raw stream, unlike a Generator's methods, is the same in every version of numpy.
    return np.asarray(np.random.Philox(np.random.SeedSequence((seed, group_id))).random_raw(count))


def _check(step: int, group_ids: Sequence[int], scores: Sequence[Scores]) -> None:
    if not group_ids or len(group_ids) != len(scores):
        raise ValueError(
            f"step {step}: {len(group_ids)} groups with {len(scores)} scores cannot be selected from"
        )
    if len(set(group_ids)) != len(group_ids):
        raise ValueError(f"step {step}: a group appears twice in {list(group_ids)}")


def _statistics(group_id: int, scores: Scores, rewards: Floats, selected: int) -> GroupStatistics:
    some = len(rewards) > 0
    return GroupStatistics(
        group_id=group_id,
        candidates=len(scores.total),
        valid=len(rewards),
        selected=selected,
        reward_std=float(rewards.std()) if some else 0.0,
        margin=float(np.ptp(rewards)) if some else 0.0,
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
