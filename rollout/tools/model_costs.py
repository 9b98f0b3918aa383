"""A model's cost in floating-point operations and live bytes, counted on torch's meta device."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

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
    ``latent`` counts the values of a candidate's latents.
    """

    parameters: int
    trained: int
    weights: float
    autoencoder: float
    pairs: int
    latent: int
    sampling: Cost
    training: Cost
    reference: Cost
    decoding: Cost


class Counter(TorchDispatchMode):
    """Counter of floating-point operations, by torch's formulas, and of the peak of live bytes.

    Torch's own counter of operations also keeps track of modules, and with them keeps activations alive that
    gradient checkpointing frees.
    """

    def __init__(self, module: nn.Module, *, rearranges: bool = False) -> None:
        """Start at zero; with ``rearranges``, each convolution copies its input.

        So do GPUs, which convolve channels last, with tensors in the usual order (BENCHMARKS.md, "The plan").
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.rearranges = rearranges
        self.flops = self.now = self.peak = 0
        own = [*module.parameters(), *module.buffers()]
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in own)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=found)
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        if self.rearranges and func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.now + args[0].nbytes)
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

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]

    with patch("torch.nn.functional.scaled_dot_product_attention", attend):
        yield


def cost_of(module: nn.Module, work: Callable[[], Any], *, rearranges: bool = False) -> Cost:
    """Count the cost of some work on a module of the meta device."""
    with _without_scores(), Counter(module, rearranges=rearranges) as counter:
        work()
    return Cost(float(counter.flops), float(counter.peak))


def sizes_of(
    model: ModelSettings, rollout: RolloutSettings, *, prompt: int, pairs: Callable[[int], int],
    checkpointing: bool,
) -> Sizes:  # fmt: skip
    """Count the sizes and costs of a model from its configurations alone.

    ``prompt`` is a prompt's length in CLIP, and ``pairs`` returns the number of pairs per pass of the learner
    for a number of image tokens.
    """
    policy = load_policy(model, rollout, device="meta", seed=0, whole=False)
    policy.device = META
    transformer, together = policy.transformer, pairs(policy.tokens)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    with torch.no_grad():
        sampling = cost_of(transformer, _pass(policy, rollout.batch, prompt))
        reference = cost_of(transformer, _pass(policy, together, prompt))
    training = cost_of(transformer, _both_passes(policy, together, prompt))
    with META:
        vae = getattr(diffusers, policy.index["vae"][1]).from_config(policy.vae_config)
    policy.pipeline = SimpleNamespace(vae=vae)
    images = 1 if rollout.decode != "whole" else rollout.batch
    latents = torch.empty(images, *policy.latent_shape(), device=META)
    with torch.no_grad():
        decoding = cost_of(vae, lambda: policy.pixels(latents), rearranges=not model.compile)
    return Sizes(
        parameters=sum(p.numel() for p in transformer.parameters()),
        trained=sum(p.numel() for _, p in trainable(transformer)),
        weights=_bytes(transformer, least=4 if model.autocasts else 0),
        autoencoder=_bytes(vae),
        pairs=together,
        latent=math.prod(policy.latent_shape()),
        sampling=sampling,
        training=training,
        reference=reference,
        decoding=Cost(decoding.flops * rollout.batch / images, decoding.live),
    )


def _bytes(module: nn.Module, least: int = 0) -> float:
    """Count the bytes of a module; where all is trained, an element has at ``least`` the 4 of float32."""
    own = (*module.parameters(), *module.buffers())
    return float(sum(t.numel() * max(t.element_size(), least) for t in own))


def _pass(policy: Any, count: int, prompt: int) -> Callable[[], Tensor]:
    x = torch.empty(count, *policy.latent_shape(), device=META)
    timestep, text = torch.empty(count, device=META), _text(policy, count, prompt)
    return lambda: policy.velocity(policy.transformer, x, timestep, text)


def _both_passes(policy: Any, count: int, prompt: int) -> Callable[[], None]:
    forward = _pass(policy, count, prompt)

    def work() -> None:
        forward().sum().backward()
        policy.transformer.zero_grad()

    return work


def _text(policy: Any, count: int, prompt: int) -> Tensors:
    shapes = policy.text_shapes(prompt)
    dtypes = {name: torch.bool if name == "mask" else policy.dtype for name in shapes}
    found = {
        name: torch.empty(count, *shape, dtype=dtypes[name], device=META) for name, shape in shapes.items()
    }
    return found | ({f"negative_{name}": value for name, value in found.items()} if policy.guided else {})
