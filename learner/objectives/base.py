"""The interface of an objective: the loss of an update, and its needs of the stages before it.

The driver uses objectives without loading torch, so a module with an objective imports torch only inside the
functions that compute tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from pydantic import Field

from learner.records import Unit
from rollout.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from learner.minibatch import Minibatch
    from learner.predictor import Predictor
    from learner.rank_shares import Assignment
    from rollout.families.registry import Schedule
    from rollout.records import Conditioning, Keep, Trajectory
    from rollout.settings import RolloutSettings
    from selection.records import Kept


CHOICES: Final = "the objective: flow_grpo, nft, awm, dpo, or module:Class of your own"


class ObjectiveSettings(Settings):
    """The section ``learner.objective``: the name of an objective, and the keys of that objective."""

    name: str = Field(description=CHOICES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric of an update, by its name in metrics.jsonl.

    ``mean`` metrics are reported as the weighted mean over rows, for all steps together and for each, ``rms``
    ones as the root of the mean square, ``max`` ones as the largest value. ``fresh`` restricts a metric to
    rows before the first optimizer step of a batch, when the policy is still the behaviour policy. With a
    ``title`` the report draws a chart, which ``note`` explains.
    """

    name: str
    title: str = ""
    note: str = ""
    reduce: Literal["mean", "rms", "max"] = "mean"
    fresh: bool = False

    @property
    def exponent(self) -> int:
        """The power of a row's value that is averaged, and whose root is reported."""
        return 2 if self.reduce == "rms" else 1


COMMON: Final = (
    Metric(name="grad_norm", title="Gradient norm", note="Before clipping."),
    Metric(name="loss", title="Loss", note="The policy objective; its level says little."),
    Metric(
        name="advantage_rms",
        title="Advantage RMS",
        note="The size of the learning signal after selection.",
    ),
    Metric(
        name="pull",
        title="Mean gradient norm",
        note="Norm of the loss's gradient in the predicted means, not in the parameters.",
    ),
    *(
        Metric(name=name)
        for name in ("learning_rate", "skipped_updates", "skipped_in_a_row", "seconds_learn")
    ),
)
"""Metrics of every update, whatever the objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The value of an objective on a mini-batch of N rows.

    The weighted sum of ``losses`` (N,) is minimised. ``prediction`` (N, ...) is the model's output, or
    computed from it: the norm of the loss's gradient in it is the metric ``pull``. ``metrics`` has a value
    per row (N,) for each `Metric` that the objective declares.
    """

    losses: Tensor
    prediction: Tensor
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models that a loss may call: the ``policy`` in training, and the frozen start policy if needed."""

    policy: Predictor
    reference: Predictor | None = None


class Objective(ABC):
    """An objective of an update: its needs of the sampler, its loss and its metrics."""

    Settings: ClassVar[type[ObjectiveSettings]] = ObjectiveSettings
    """The keys of ``learner.objective`` under this objective's name."""
    sampling: ClassVar[frozenset[str]] = frozenset({"sde", "cps"})
    """The supported ``rollout.dynamics`` of candidates."""
    metrics: ClassVar[tuple[Metric, ...]] = ()
    """Metrics that it reports beside `COMMON`."""

    def __init__(self, settings: Any) -> None:
        """Set the settings, an instance of the class's own ``Settings``."""
        self.settings = settings

    @property
    def keeps(self) -> frozenset[Keep]:
        """Fields of a `rollout.records.Trajectory` that the samplers must keep."""
        return frozenset({"states", "log_probs"})

    @property
    def needs_reference(self) -> bool:
        """True if the loss calls the frozen start policy."""
        return False

    def rows(self, rollout: RolloutSettings) -> int:
        """Count the rows of a candidate in `minibatches`."""
        return rollout.trained_steps

    def whole(self, size: int) -> int:
        """Round the rows of a mini-batch to what stays together in one, at least once that."""
        return size

    def prepared_passes(self, updates: int) -> float:
        """Count the passes per row in `prepared`, for a batch of ``updates`` optimizer steps."""
        return 0.0

    def prepared_velocities(self, updates: int) -> float:
        """Count the velocities per row that `prepared` keeps on the device until the batch is trained."""
        return 0.0

    def behaviour_decay(self, updates: int) -> float:
        """Return how much of the behaviour policy is kept after a batch, by optimizer steps so far.

        The rest of it is replaced by the policy. At 0 for any number, the policy itself samples.
        """
        return 0.0

    @property
    def lags(self) -> bool:
        """True if the behaviour policy, which samples the candidates, is not the policy at all times."""
        return False

    def check(self, rollout: RolloutSettings) -> None:
        """Refuse the settings of candidates that the objective cannot learn from.

        Raises:
            ValueError: naming the key, the value and what was expected.
        """
        if rollout.dynamics not in self.sampling:
            raise ValueError(
                f"rollout.dynamics: got {rollout.dynamics!r}, but {self.settings.name} learns from "
                f"{', '.join(sorted(self.sampling))}"
            )

    def units(self, kept: Sequence[Kept]) -> Sequence[Unit]:
        """Group the places in ``kept`` by what is trained in one optimizer step; others are left out."""
        return [Unit([(place,)]) for place in range(len(kept))]

    def minibatches(
        self,
        share: Sequence[Assignment],
        trajectories: Mapping[int, Trajectory],
        conditionings: Mapping[int, Conditioning],
        *,
        schedule: Schedule,
        size: int,
    ) -> Iterable[Minibatch]:
        """Build the mini-batches of a rank's share, of at most ``size`` rows, for `loss`.

        By default rows are transitions between the states around every trained step. Shares of all ranks
        have equally many candidates and must yield equally many mini-batches. Mini-batches should be made as
        they are iterated over, so that the device has one at a time.
        """
        from learner.minibatch import transitions

        return transitions(share, trajectories, conditionings, schedule, size=size)

    def prepared(self, models: Models, shares: Sequence[Any]) -> Sequence[Any]:
        """Complete the mini-batches of all shares before the first optimizer step of a batch.

        Meanwhile ``models.policy`` is the behaviour policy.
        """
        return shares

    @abstractmethod
    def loss(self, models: Models, part: Any) -> Terms:
        """Compute the terms of a mini-batch of `minibatches`.

        Call frozen models first: ZeRO-3 expects the policy's backward pass right after its forward pass.
        """

    def healthy(self, metrics: Mapping[str, float], *, on_policy: bool, dtype: str) -> str:
        """Describe in one line a defect that the metrics of an update prove; return "" if they look right.

        ``on_policy`` is True if the candidates were sampled with the same weights that the update started
        from, in the precision ``dtype``. A run stops at a defect.
        """
        return ""

    def doubts(self, metrics: Mapping[str, float], *, on_policy: bool) -> str:
        """Describe in one line what the user should know of an update's metrics; return "" if nothing.

        The run continues, and the description becomes an event in its log.
        """
        return ""
