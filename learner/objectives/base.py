"""The interface of an objective: what an update minimises, and what it needs of the stages before it.

The driver asks objectives too, and it loads no torch: a module with an objective imports torch only where
tensors are computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from pydantic import Field

from rollout.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from learner.minibatch import Minibatch
    from learner.predictor import Predictor
    from learner.rank_shares import Item
    from rollout.families.registry import Schedule
    from rollout.records import Conditioning, Keep, Trajectory
    from selection.records import Kept


class ObjectiveSettings(Settings):
    """The section ``learner.objective``: the name of an objective, and its own keys."""

    name: str = Field(description="the objective: flow_grpo, or module:Class of your own")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure of an update, by its name in metrics.jsonl.

    Of ``mean`` metrics the weighted mean over rows is reported, of all steps and of each; of ``max`` ones the
    largest value. ``fresh`` counts only rows before the first optimizer step of a batch, when the policy is
    still the one that sampled. With a ``title`` the report draws a chart, which ``note`` explains.
    """

    name: str
    title: str = ""
    note: str = ""
    reduce: Literal["mean", "max"] = "mean"
    fresh: bool = False


COMMON: Final = (
    Metric(name="grad_norm", title="Gradient norm", note="Before clipping."),
    Metric(name="loss", title="Loss", note="The policy objective; its level says little."),
    Metric(
        name="advantage_rms",
        title="Advantage RMS",
        note="The size of the learning signal after selection.",
    ),
    *(
        Metric(name=name)
        for name in ("pull", "learning_rate", "skipped_updates", "skipped_in_a_row", "seconds_learn")
    ),
)
"""Metrics of every update, whatever the objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """An objective's value on a mini-batch of N rows.

    ``losses`` (N,) is minimised in its weighted sum. ``prediction`` (N, ...) is the model's output, or made
    of it: the norm of the loss's gradient there is the metric ``pull``. ``metrics`` has a value per row (N,)
    for each `Metric` that the objective declares.
    """

    losses: Tensor
    prediction: Tensor
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models that a loss may call: the ``policy`` that learns, and the frozen start policy if needed."""

    policy: Predictor
    reference: Predictor | None = None


class Objective(ABC):
    """The objective of an update: what it needs of the sampler, its loss, and what it reports."""

    Settings: ClassVar[type[ObjectiveSettings]] = ObjectiveSettings
    """The keys of ``learner.objective`` under this objective's name."""
    sampling: ClassVar[frozenset[str]] = frozenset({"sde", "cps"})
    """The ``rollout.dynamics`` whose candidates it can learn from."""
    metrics: ClassVar[tuple[Metric, ...]] = ()
    """Figures that it reports beside `COMMON`."""

    def __init__(self, settings: Any) -> None:
        """Keep the settings, an instance of the class's own ``Settings``."""
        self.settings = settings

    @property
    def keeps(self) -> frozenset[Keep]:
        """Fields of a `rollout.records.Trajectory` that the samplers keep."""
        return frozenset({"states", "log_probs"})

    @property
    def needs_reference(self) -> bool:
        """True if the loss calls the frozen start policy."""
        return False

    def units(self, kept: Sequence[Kept]) -> Sequence[Sequence[int]]:
        """Group places in ``kept`` that stay together in an update and on a rank, equally many each."""
        return [(place,) for place in range(len(kept))]

    def minibatches(
        self,
        share: Sequence[Item],
        trajectories: Mapping[int, Trajectory],
        conditionings: Mapping[int, Conditioning],
        *,
        schedule: Schedule,
        size: int,
    ) -> Iterator[Minibatch]:
        """Lay out a share of the candidates as mini-batches of at most ``size`` rows for `loss`.

        By default rows are transitions between the states around every trained step. Shares of all ranks
        have equally many candidates and must give equally many mini-batches.
        """
        from learner.minibatch import transitions

        return transitions(share, trajectories, conditionings, schedule).split(size)

    @abstractmethod
    def loss(self, models: Models, part: Any) -> Terms:
        """Compute the terms of a mini-batch that `minibatches` made.

        Call frozen models first: ZeRO-3 expects the policy's own backward right after its forward.
        """

    def healthy(self, metrics: Mapping[str, float], *, on_policy: bool, dtype: str) -> str:
        """Say in one line which defect the metrics of an update prove; empty if they look right.

        ``on_policy`` says that the candidates were sampled with the very weights that the update began with,
        ``dtype`` in which precision.
        """
        return ""
