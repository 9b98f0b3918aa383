"""The numbers of a step: candidates, passes, updates and memory, as ``--dry-run`` prints them."""

from __future__ import annotations

from rich.table import Table

from cluster.config.preflight import Inputs, memory_gb, processes
from cluster.config.settings import RunSettings
from learner.objectives.registry import load_objective


def sampling_passes(settings: RunSettings) -> int:
    """Count the transformer's passes for sampling in a step, drafts included, without those of guidance."""
    rollout = settings.rollout
    sampled = settings.groups_per_step * settings.selection.candidates
    drafts = settings.groups_per_step * settings.selection.drafts
    if rollout.draft_kind == "path":
        drafts = max(0, drafts - sampled)  # the others continue
    return sampled * rollout.steps + drafts * rollout.drafted_steps


def plan(settings: RunSettings, inputs: Inputs) -> Table:
    """Tabulate the work and the cost of a step."""
    selection, rollout, learner = settings.selection, settings.rollout, settings.learner
    sampled = settings.groups_per_step * selection.candidates
    kept = settings.groups_per_step * selection.keep
    halves = 2 if rollout.guidance > 1 else 1
    drafts = settings.groups_per_step * selection.drafts
    passes = sampling_passes(settings)
    together = sampled if rollout.same_window else selection.candidates
    batches = sampled // together * -(-together // rollout.batch)
    table = Table("", "per step", title="plan", title_justify="left")
    table.add_row("prompts", f"{settings.groups_per_step} of {len(inputs.train)}")
    if drafts:
        table.add_row("candidates drafted", f"{drafts} ({selection.drafts} per prompt)")
    table.add_row("candidates sampled", f"{sampled} ({selection.candidates} per prompt)")
    table.add_row("batches of them", f"{batches} of at most {rollout.batch}, for {rollout.workers} samplers")
    table.add_row("candidates trained, at most", f"{kept} ({selection.keep} per prompt)")
    table.add_row("transformer passes, sampling", f"{passes * halves}")
    objective = load_objective(learner.objective)
    trained = kept * objective.rows(rollout) * halves
    table.add_row("transformer passes, training", f"{trained}")
    if objective.needs_reference:
        table.add_row("transformer passes, start policy", f"{trained}")
    if again := round(trained * objective.prepared_passes(learner.updates)):
        table.add_row("transformer passes, behaviour policy", f"{again}")
    table.add_row("optimizer steps", f"{learner.updates}")
    table.add_row("images scored", f"{sampled + drafts} by {', '.join(r.name for r in settings.rewards)}")
    table.add_row("held-out images", f"{len(inputs.held_out) * settings.eval_samples}")
    table.add_row("processes", ", ".join(f"{n} {kind}" for kind, n in processes(settings).items() if n))
    table.add_row("memory, estimated", f"{memory_gb(settings):.1f} GB")
    return table
