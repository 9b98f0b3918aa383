"""Estimate the memory of the weights of a model whose passes cannot be counted."""

from __future__ import annotations

from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from cluster.plan.estimate import Estimate, Hardware
from cluster.plan.reward_costs import reward_memory
from rollout.families.published import PUBLISHED_SIZES


def estimate(settings: RunSettings, hardware: Hardware) -> Estimate:
    """Estimate the bytes of weights per role, of a published model; seconds remain unknown.

    Raises:
        UserError: if the model is not one of those whose size is known.
    """
    model, rollout, learner = settings.model, settings.rollout, settings.learner
    size = PUBLISHED_SIZES.get(model.path)
    if size is None:
        raise UserError(
            f"model.path: the passes of {model.path} cannot be counted, only those of SD3 and SD3.5, and "
            f"it is none of the published models whose size is known: {', '.join(PUBLISHED_SIZES)}"
        )
    weights = size.weights(model)
    part = 1 / learner.ranks if learner.zero_stage == 3 else 1.0
    held = 0.0 if learner.offload == "parameters" else weights * part
    text = 0.0 if rollout.offload_text or rollout.embeddings else size.text(model)

    return Estimate(
        stages={},
        needs=(
            hardware.need("learner", learner.ranks, learner.gpus, {"weights": held}),
            hardware.need("rollout", rollout.workers, rollout.gpus, {"weights": weights, "encoders": text}),
            *(
                hardware.need(reward.name, reward.workers, reward.gpus, reward_memory(reward))
                for reward in settings.distinct_rewards.values()
                if reward.gpus
            ),
        ),
        overlaps=False,
        basis="the published number of parameters; all else is counted for SD3 and SD3.5 only",
    )
