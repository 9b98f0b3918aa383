"""Cache of encoded prompts, and text encoders that occupy the GPU only while they run."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rollout.families.registry import Tensors
from rollout.files import atomic
from rollout.settings import RolloutSettings
from rollout.weights import checksum, flatten

Embed = Callable[..., Tensors]


class Embedder:
    """A family's ``embed`` behind a cache.

    With ``rollout.embeddings`` its results are stored in that folder, by a hash of the prompt and of all that
    determines them: the encoders' weights, the vocabularies, the precision and the length. With
    ``rollout.offload_text`` the encoders are in the CPU's memory, and on the device only for a new prompt.
    """

    def __init__(self, pipeline: Any, embed: Embed, rollout: RolloutSettings, device: torch.device) -> None:
        """Move the encoders to their device and identify them."""
        self.embed, self.folder, self.device = embed, rollout.embeddings, device
        self.offload = rollout.offload_text
        parts = pipeline.components
        self.encoders = {
            name: part
            for name, part in sorted(parts.items())
            if name.startswith("text_encoder") and isinstance(part, nn.Module)
        }
        self._place("cpu" if self.offload else device)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.identity = [type(pipeline).__name__, rollout.text_tokens, *self._contents(parts)]

    def __call__(self, text: str, *, negative: bool = False) -> Tensors:
        """Return the named conditioning tensors of one prompt, on the device."""
        if self.folder is None:
            return self._encode(text, negative)
        path = self.folder / f"{self._key(text, negative)}.safetensors"
        try:
            return dict(load_file(path, device=str(self.device)))
        except FileNotFoundError:
            pass
        except SafetensorError as error:  # truncated, as by a full disk or a crash of the machine
            warnings.warn(
                f"rollout.embeddings: {path} cannot be read ({error}); it is made again", stacklevel=2
            )
        found = self._encode(text, negative)
        _write({name: value.contiguous().cpu() for name, value in found.items()}, path)
        return found

    def _encode(self, text: str, negative: bool) -> Tensors:
        with self._on_device():
            return self.embed(text, negative=negative)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        if not self.offload:
            yield
            return
        self._place(self.device)
        try:
            yield
        finally:
            self._place("cpu")

    def _place(self, device: torch.device | str) -> None:
        for encoder in self.encoders.values():
            encoder.to(device)

    def _contents(self, parts: dict[str, Any]) -> list[str]:
        """Digest the encoders' weights and the vocabularies."""
        found = []
        for name, encoder in self.encoders.items():
            for key, parameter in encoder.named_parameters():
                found.append(checksum(flatten([parameter]), [(f"{name}.{key}", parameter)]))
        vocabularies = [part.get_vocab() for part in parts.values() if hasattr(part, "get_vocab")]
        text = json.dumps(vocabularies, sort_keys=True)
        return [*found, hashlib.blake2b(text.encode()).hexdigest()]

    def _key(self, text: str, negative: bool) -> str:
        whole = json.dumps([*self.identity, negative, text])
        return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()


def _write(tensors: Tensors, path: Path) -> None:
    """Write tensors atomically, since several samplers may write the same file."""
    with atomic(path) as draft:
        save_file(tensors, draft)
