"""The model card of an export: recipe, metrics, the base model's licence, and a complete code example."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow.parquet as pq
import tomli_w
import yaml
from huggingface_hub import ModelCard, ModelCardData

from cluster.config.settings import RunSettings
from cluster.record.run_data import evaluated
from cluster.record.run_folder import RunFolder

CARD: Final = "README.md"
"""The file name that the hub expects of a model card."""

TEMPLATE: Final = Path(__file__).parent / "model_card.md.j2"

RECIPE: Final[Mapping[str, set[str]]] = {
    "model": {"path"},
    "rollout": {"workers", "gpus", "threads"},
    "selection": set(),
    "learner": {"ranks", "gpus", "threads"},
}
"""The sections that a card shows, and the keys omitted from each: paths, and settings of the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """An export: the checkpoint's file, the folder, and the repository on the hub if it is pushed."""

    run: RunFolder
    settings: RunSettings
    step: int
    what: Literal["lora", "pipeline"]
    averaged: bool
    weights: Path
    folder: Path
    push: str | None


def model_card(export: Export, absent: Sequence[str], arguments: Mapping[str, Any]) -> str:
    """Render a card.

    ``absent`` are the components that the base pipeline lacks, ``arguments`` those of its calls.
    """
    settings, base = export.settings, export.settings.model.path
    licence = _licence(base)
    first, last, metrics = _held_out(export.run.history(), export.step)
    prompt, noise_seed = _first_image(export.run)
    card = ModelCard.from_template(
        _front_matter(export, licence),
        template_path=str(TEMPLATE),
        title=f"{Path(base).name}, preset {settings.preset}",
        export=export,
        settings=settings,
        rollout=settings.rollout,
        selection=settings.selection,
        recipe=_recipe(settings),
        licence=licence,
        absent=absent,
        arguments={name: repr(value) for name, value in arguments.items()},
        base=_quoted(base if export.push else _anywhere(base)),
        place=_quoted(export.push or export.folder.absolute()),
        prompt=_quoted(prompt),
        noise_seed=noise_seed,
        first=first,
        last=last,
        metrics=metrics,
    )
    return f"{card}\n"


def _quoted(text: str | Path) -> str:
    return json.dumps(str(text), ensure_ascii=False)


def _anywhere(base: str) -> str:
    return str(Path(base).absolute()) if Path(base).is_dir() else base


def _front_matter(export: Export, licence: Mapping[str, str]) -> ModelCardData:
    base, lora = export.settings.model.path, export.what == "lora"
    fields: dict[str, Any] = dict(licence) or {"license": "unknown"}
    if not Path(base).is_dir():  # the hub takes only its own names here
        fields |= {"base_model": base, "base_model_relation": "adapter" if lora else "finetune"}
    kind = ["lora"] if lora else []
    task = "text-to-video" if export.settings.rollout.frames > 1 else "text-to-image"
    return ModelCardData(
        **fields,
        library_name="diffusers",
        pipeline_tag=task,
        tags=[task, "diffusers", *kind, "reinforcement-learning", "flow-grpo", "noisemargin"],
    )


def _licence(base: str) -> dict[str, str]:
    """Read the licence fields of the base model's card; empty without a card or a licence in it."""
    local = Path(base).is_dir()
    try:
        found = ModelCard.load(Path(base) / CARD if local else base, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):  # no file, no network, or no front matter
        return {}
    names = ("license", "license_name", "license_link")
    fields = {name: str(value) for name in names if (value := found.get(name))}
    link = fields.get("license_link", "")
    if link and "://" not in link:  # relative to the base model's repository
        fields["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
        if local:
            del fields["license_link"]
    return fields if "license" in fields else {}


def _held_out(history: Sequence[Mapping[str, Any]], step: int) -> tuple[int, int, list[tuple[str, str, str]]]:
    """Return the steps of the first and the last evaluation up to a step, and the metrics of both."""
    rows = [row for row in history if "eval_reward" in row and row["step"] <= step]
    if not rows:
        return 0, 0, []
    before, after = rows[0], rows[-1]
    shown = [(name, _number(before[name]), _number(after.get(name))) for name in evaluated([before])]
    return before["step"], after["step"], shown


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _first_image(run: RunFolder) -> tuple[str, int | None]:
    """Return the prompt and the noise of the first held-out image, the same in every evaluation."""
    for path in sorted(run.eval.glob("step-*.parquet"))[:1]:
        row = pq.read_table(path, columns=["prompt", "noise_seed"]).slice(0, 1).to_pylist()[0]
        return str(row["prompt"]), int(row["noise_seed"])
    return "a photo of a bench", None


def _recipe(settings: RunSettings) -> str:
    values = settings.model_dump(mode="json", exclude_none=True)
    sections: dict[str, Any] = {
        section: {key: value for key, value in values[section].items() if key not in left_out}
        for section, left_out in RECIPE.items()
    }
    sections["rewards"] = [{key: r[key] for key in ("name", "weight", "options")} for r in values["rewards"]]
    return tomli_w.dumps(sections).strip()
