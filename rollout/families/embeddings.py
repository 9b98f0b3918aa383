"""Cache of encoded prompts, and text encoders that are loaded, or on the GPU, only while they are needed."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rollout.families.registry import Tensors
from rollout.files import atomic
from rollout.settings import RolloutSettings
from rollout.weights import checksum, flatten

Embed = Callable[..., Tensors]
EDGE: Final = 2**20
"""Bytes at both ends of a file by which it is recognised."""


def known_identity(folder: Path | None, source: str) -> list[Any] | None:
    """Return the identity of encoders from files ``source``, if they have filled the folder before."""
    if folder is None:
        return None
    try:
        found: list[Any] = json.loads(_record(folder, source).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found


def _record(folder: Path, source: str) -> Path:
    return folder / f"encoders-{source}.json"


def source_of(path: str, *parts: Any) -> str:
    """Recognise the files of a pipeline's text encoders and vocabularies, without reading all of them.

    Those of a local folder by their names, sizes and ends; a model of the hub by its commit. ``parts`` are
    whatever else determines embeddings.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16)
    folder = Path(path)
    if not folder.is_dir():
        digest.update(Path(hf_hub_download(path, "model_index.json")).parent.name.encode())
        return digest.hexdigest()
    files = [file for kind in ("text_encoder*", "tokenizer*") for file in folder.glob(f"{kind}/**/*")]
    for file in sorted(files):
        if file.is_file():
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size}".encode())
            with file.open("rb") as content:
                digest.update(content.read(EDGE))
                content.seek(max(0, file.stat().st_size - EDGE))
                digest.update(content.read())
    return digest.hexdigest()


class Embedder:
    """A family's ``embed`` behind a cache.

    With ``rollout.embeddings`` its results are stored in that folder, by a hash of the prompt and of all that
    determines them: the encoders' weights, the vocabularies, the precision and the length. If the pipeline's
    encoders have filled the folder before, they are loaded only for a prompt that is not there. With
    ``rollout.offload_text`` the encoders are in the CPU's memory, and on the device only for a new prompt.
    """

    def __init__(
        self, pipeline: Any, embed: Embed, rollout: RolloutSettings, device: torch.device, *,
        source: str, load: Callable[[], None],
    ) -> None:  # fmt: skip
        """Move the encoders to their device and identify them; ``load`` adds missing ones to the pipeline."""
        self.pipeline, self.embed, self.folder, self.device = pipeline, embed, rollout.embeddings, device
        self.offload, self.load, self.text_tokens = rollout.offload_text, load, rollout.text_tokens
        known = known_identity(self.folder, source)
        self.encoders: dict[str, nn.Module] = {}
        if known is None:
            self._prepare()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.identity = known or self._identity()
            if known is None:
                with atomic(_record(self.folder, source)) as draft:
                    draft.write_text(json.dumps(self.identity), encoding="utf-8")

    def _prepare(self) -> None:
        """Load the encoders if they are missing, and move them to their device."""
        self.load()
        self.encoders = {
            name: part
            for name, part in sorted(self.pipeline.components.items())
            if name.startswith("text_encoder") and isinstance(part, nn.Module)
        }
        self._place("cpu" if self.offload else self.device)

    def _identity(self) -> list[Any]:
        parts = self.pipeline.components
        return [type(self.pipeline).__name__, self.text_tokens, *self._contents(parts)]

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
        if not self.encoders:
            self._prepare()
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
