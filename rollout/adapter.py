"""How the transformer is prepared: what of it is trained, by which attention it runs, whether compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig

from rollout.settings import ModelSettings


def prepare(transformer: Any, model: ModelSettings, targets: Sequence[str], seed: int) -> Any:
    """Freeze what is not trained; a new adapter's random half comes from the seed, the same everywhere.

    Raises:
        ValueError: if ``model.lora_path`` holds no adapter for this transformer.
    """
    transformer.requires_grad_(not model.trains_adapter)
    if model.lora_path is not None:
        _load(transformer, model.lora_path)
    elif model.lora_rank:
        torch.manual_seed(seed)
        config = LoraConfig(
            r=model.lora_rank,
            lora_alpha=model.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=list(model.lora_targets or targets),
        )
        transformer.add_adapter(config)
    for (
        parameter
    ) in transformer.parameters():  # peft makes adapters in float32; sampler and learner must agree
        parameter.data = parameter.data.to(transformer.dtype)
    return transformer


def _load(transformer: Any, path: str) -> None:
    """Add an adapter that diffusers saved, its rank and scale included, and train it."""
    try:
        transformer.load_lora_adapter(path, adapter_name="default", use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.lora_path: cannot load an adapter from {path}: {error}") from error
    trained = [p for name, p in transformer.named_parameters() if "lora_" in name]
    if not trained:
        raise ValueError(f"model.lora_path: {path} holds no adapter of this transformer")
    for parameter in trained:
        parameter.requires_grad_(True)


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
