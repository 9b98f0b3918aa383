"""How the transformer is prepared: what of it is trained, by which attention it runs, whether compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from peft import LoraConfig

from rollout.families.adapter_files import AdapterError, check_keys, read_adapter
from rollout.settings import ModelSettings

VARIANTS: Final = 64
"""Compiled forms of one kind of block: torch stops at 8 by default and runs the others uncompiled. Those of
SD3.5 differ by attention, place, adapter on or off, gradients and shape of the batch.
"""


def prepare(transformer: Any, model: ModelSettings, targets: Sequence[str], seed: int, pipeline: str) -> str:
    """Freeze what is not trained; a new adapter's random half comes from the seed, the same everywhere.

    ``pipeline`` names the class of diffusers that knows the family's other layouts of adapters.

    Returns:
        What adapter ``model.lora_path`` holds, in words; empty without one.

    Raises:
        ValueError: if ``model.lora_path`` holds no adapter for this transformer, or only a part of one, or
            ``model.lora_targets`` names no module of it.
    """
    transformer.requires_grad_(not model.trains_adapter)
    dtype, story = transformer.dtype, ""  # which diffusers looks for in every module, each time it is asked
    if model.lora_path is not None:
        story = _load(transformer, model, pipeline)
    elif model.lora_rank:
        torch.manual_seed(seed)
        config = LoraConfig(
            r=model.lora_rank,
            lora_alpha=model.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=list(model.lora_targets or targets),
        )
        _check_targets(transformer, model.lora_targets)
        _add(transformer, config)
    for parameter in transformer.parameters():  # peft makes adapters in float32; sampler and learner agree
        parameter.data = parameter.data.to(dtype)
    return story


def _check_targets(transformer: Any, targets: Sequence[str]) -> None:
    """Every name must match: peft itself is content with one that does."""
    names = [name for name, _ in transformer.named_modules()]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ValueError(
                f"model.lora_targets: a {type(transformer).__name__} has no module {target!r}; "
                "expected a module's name, or its end after a dot, such as attn.to_q"
            )


def _add(transformer: Any, config: LoraConfig) -> None:
    try:
        transformer.add_adapter(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.lora_targets: {error}") from error


@torch.no_grad()
def _load(transformer: Any, model: ModelSettings, pipeline: str) -> str:
    """Add an adapter of a file, its rank and scale included; all of it, or nothing."""
    assert model.lora_path is not None
    _check_targets(transformer, model.lora_targets)
    try:
        adapter = read_adapter(model.lora_path, transformer, pipeline, model.lora_targets)
        _add(transformer, adapter.config)
        parameters = {
            name.replace(".default.", "."): p for name, p in transformer.named_parameters() if p.requires_grad
        }
        found = {name: tensor.shape for name, tensor in adapter.weights.items()}
        check_keys(model.lora_path, {name: p.shape for name, p in parameters.items()}, found)
    except AdapterError as error:
        raise ValueError(f"model.lora_path: {error}") from error
    for name, parameter in parameters.items():
        parameter.copy_(adapter.weights[name])
    return f"model.lora_path: {adapter.story}"


def switch_attention(transformer: Any, backend: str) -> None:
    """Let diffusers compute attention with one of its backends, in the sampler and the learner alike.

    Raises:
        ValueError: if there is no such backend here, or the transformer does not know the switch.
    """
    processors = [getattr(module, "processor", None) for module in transformer.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(
            f"model.attention: a {type(transformer).__name__} does not know diffusers' switch, "
            f"so {backend!r} would change nothing; leave it out"
        )
    try:
        transformer.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"model.attention: {error}") from error


def compile_blocks(transformer: Any) -> None:
    """Compile the repeated blocks in place, each kind once for all of its instances.

    Names of parameters stay as they are, so weights travel and are saved as ever.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    # Families that do not list their repeated blocks name them as what must not be split across devices.
    transformer._repeated_blocks = transformer._repeated_blocks or transformer._no_split_modules
    transformer.compile_repeated_blocks()


@contextmanager
def adapter_off(transformer: Any) -> Iterator[None]:
    """The frozen base model, for the reference of the KL term."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
