"""A model's cost in floating-point operations and live bytes, counted on torch's meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rollout.families.registry import Tensors, load_policy
from rollout.settings import ModelSettings, RolloutSettings
from rollout.weights import trainable

META: Final = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating-point operations, and the peak of live bytes beyond the model's own."""

    flops: float
    live: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """The parameters and bytes of a model under given settings, and the costs of its passes.

    ``sampling`` is a denoising step of ``rollout.batch`` candidates, ``training`` the forward and backward
    pass of ``pairs`` pairs, ``reference`` their pass for the KL, ``decoding`` the autoencoder's of a batch.
    """

    parameters: int
    trained: int
    weights: float
    autoencoder: float
    pairs: int
    sampling: Cost
    training: Cost
    reference: Cost
    decoding: Cost


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of all live storages, and of their peak."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        own = [*module.parameters(), *module.buffers()]
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in own)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


@contextmanager
def _without_scores() -> Iterator[None]:
    """Compute attention within as GPUs do; the meta device would allocate the matrix of scores."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    with patch("torch.nn.functional.scaled_dot_product_attention", attend):
        yield


def cost_of(module: nn.Module, work: Callable[[], Any]) -> Cost:
    """Count the cost of some work on a module of the meta device."""
    with _without_scores():
        with FlopCounterMode(display=False) as counter:
            work()
        with LiveBytes(module) as live:
            work()
    return Cost(float(counter.get_total_flops()), float(live.peak))


def sizes_of(
    model: ModelSettings, rollout: RolloutSettings, *, prompt: int, pairs: Callable[[int], int],
    checkpointing: bool,
) -> Sizes:  # fmt: skip
    """Count the sizes and costs of Stable Diffusion 3 or 3.5 from its configuration alone.

    ``prompt`` is a prompt's length in CLIP, and ``pairs`` returns the number of pairs per pass of the learner
    for a number of image tokens.

    Raises:
        ValueError: if the model is of another family.
    """
    policy = load_policy(model, rollout, device="meta", seed=0, whole=False)
    if policy.index["_class_name"] != "StableDiffusion3Pipeline":
        raise ValueError(f"only SD3 and SD3.5 can be counted, not a {policy.index['_class_name']}")
    policy.device = META
    transformer, together = policy.transformer, pairs(policy.tokens)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    tokens = prompt + policy.text_tokens
    with torch.no_grad():
        sampling = cost_of(transformer, _pass(policy, rollout.batch, tokens))
        reference = cost_of(transformer, _pass(policy, together, tokens))
    training = cost_of(transformer, _both_passes(policy, together, tokens))
    with META:
        vae = AutoencoderKL.from_config(policy.vae_config)
    images = 1 if rollout.decode != "whole" else rollout.batch
    latents = torch.empty(images, *policy.latent_shape(), device=META)
    with torch.no_grad():
        decoding = cost_of(vae, lambda: vae.decode(latents).sample)
    return Sizes(
        parameters=sum(p.numel() for p in transformer.parameters()),
        trained=sum(p.numel() for _, p in trainable(transformer)),
        weights=_bytes(transformer, least=4 if model.autocasts else 0),
        autoencoder=_bytes(vae),
        pairs=together,
        sampling=sampling,
        training=training,
        reference=reference,
        decoding=Cost(decoding.flops * rollout.batch / images, decoding.live),
    )


def _bytes(module: nn.Module, least: int = 0) -> float:
    """Count the bytes of a module; where all is trained, an element has at ``least`` the 4 of float32."""
    own = (*module.parameters(), *module.buffers())
    return float(sum(t.numel() * max(t.element_size(), least) for t in own))


def _pass(policy: Any, count: int, tokens: int) -> Callable[[], Tensor]:
    x = torch.empty(count, *policy.latent_shape(), device=META)
    timestep, text = torch.empty(count, device=META), _text(policy, count, tokens)
    return lambda: policy.velocity(policy.transformer, x, timestep, text)


def _both_passes(policy: Any, count: int, tokens: int) -> Callable[[], None]:
    forward = _pass(policy, count, tokens)

    def work() -> None:
        forward().sum().backward()
        policy.transformer.zero_grad()

    return work


def _text(policy: Any, count: int, tokens: int) -> Tensors:
    config = policy.transformer.config
    shapes = {
        "hidden": (count, tokens, config.joint_attention_dim),
        "pooled": (count, config.pooled_projection_dim),
    }
    names = [*shapes, *(f"negative_{name}" for name in shapes if policy.guided)]
    return {
        name: torch.empty(shapes[name.removeprefix("negative_")], dtype=policy.dtype, device=META)
        for name in names
    }
