"""Preparation of the transformer: its trained parameters and their precision, attention and compilation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from diffusers.models.autoencoders.vae import Decoder
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from rollout.families.adapter_files import AdapterError, check_keys, read_adapter
from rollout.settings import ModelSettings

VARIANTS: Final = 64
"""Limit on compiled variants of one kind of block: torch's default is 8, beyond which it runs uncompiled.

Those of SD3.5 differ by attention, position, adapter on or off, gradients and shape of the batch.
"""


class RoundingLinear(nn.Linear):
    """A layer with float32 weights that computes in the precision of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the rounded weights."""
        return linear(x, self.weight.to(x.dtype), self.bias if self.bias is None else self.bias.to(x.dtype))


class Float32Linear(nn.Linear):
    """A layer that computes in float32 under autocast as well."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.float(), self.weight, self.bias)


def prepare(transformer: Any, model: ModelSettings, targets: Sequence[str], seed: int, pipeline: str) -> str:
    """Freeze the untrained parameters and add an adapter, if any; a new one is drawn from the seed.

    Trained parameters are float32, whatever the precision of the computation: in half precision most updates
    would be rounded away. ``pipeline`` names the diffusers class that converts the family's other layouts of
    adapters.

    Returns:
        A summary of the adapter ``model.lora_path``; empty without one.

    Raises:
        ValueError: if ``model.lora_path`` is not a complete adapter for this transformer, or
            ``model.lora_targets`` names a module that it lacks.
    """
    transformer.requires_grad_(not model.trains_adapter)
    summary = ""
    if model.lora_path is not None:
        summary = _load(transformer, model, pipeline)
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
    for parameter in transformer.parameters():
        if parameter.requires_grad and not parameter.is_meta:
            parameter.data = parameter.data.float()
    if model.dtype != "float32":
        _round(transformer) if model.trains_adapter else _keep_in_float32(transformer)
    return summary


def _round(transformer: nn.Module) -> None:
    """Let adapters compute in the precision of the frozen layers; peft would run them in float32."""
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            factors = [*layer.lora_A.values(), *layer.lora_B.values()]
            if all(type(factor) is nn.Linear for factor in factors):
                for factor in factors:
                    factor.__class__ = RoundingLinear
                layer.cast_input_dtype_enabled = False


def _keep_in_float32(transformer: Any) -> None:
    """Exempt from autocast the layers that diffusers keeps in float32."""
    for name, module in transformer.named_modules():
        if type(module) is nn.Linear and stays_float32(transformer, name):
            module.__class__ = Float32Linear


def stays_float32(transformer: Any, name: str) -> bool:
    """Return True if diffusers keeps the module or parameter of that name in float32."""
    return any(part in name for part in transformer._keep_in_fp32_modules or ())


def _check_targets(transformer: Any, targets: Sequence[str]) -> None:
    """Require that every name matches a module; peft itself accepts a list of which one does."""
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
    """Add the adapter of a file, with its rank and scale, completely or not at all; return a summary."""
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
    return f"model.lora_path: {adapter.summary}"


def switch_attention(transformer: Any, backend: str) -> None:
    """Select one of diffusers' attention backends, in the sampler and the learner alike.

    Raises:
        ValueError: if this machine lacks the backend, or the transformer does not support the switch.
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

    The names of parameters do not change, so weights are published and saved as without compilation. Every
    size of a batch has kernels of its own: those for any size would from then on serve the others as well,
    and a run that has evaluated would round differently from one that was resumed.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    # Families that do not list their repeated blocks list them as not to be split across devices.
    transformer._repeated_blocks = transformer._repeated_blocks or transformer._no_split_modules
    transformer.compile_repeated_blocks(dynamic=False)


def compile_decoder(vae: Any) -> None:
    """Compile an autoencoder's decoder in place, if it is diffusers' usual one, of images.

    It runs in channels-last order, as convolutions do on GPUs: otherwise half of its time goes to rearranging
    memory. Video decoders keep states between frames, which compilation would break up.
    """
    if type(vae.decoder) is Decoder:
        vae.decoder.to(memory_format=torch.channels_last)
        vae.decoder.compile(dynamic=False)


@contextmanager
def adapter_off(transformer: Any) -> Iterator[None]:
    """Disable the adapter within, which leaves the frozen base model: the reference of the KL term."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
