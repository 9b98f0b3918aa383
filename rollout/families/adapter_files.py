"""Reading of LoRA adapters in the common layouts; every key of a file is used or refused."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

import diffusers
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from rollout.families.registry import Tensors

FILES: Final = (LORA_WEIGHT_NAME_SAFE, "adapter_model.safetensors")
"""The file's name in an adapter's folder, in diffusers and in peft."""
FLAT: Final = re.compile(r"lora_(unet|transformer)_")
"""Prefix of kohya's names, in which every dot within a module's name is an underscore."""
PREFIXES: Final = re.compile(r"(base_model\.model\.)?(transformer\.|diffusion_model\.)?")
HALVES: Final = {
    ".lora_down.weight": ".lora_A.weight", ".lora.down.weight": ".lora_A.weight",
    ".lora_up.weight": ".lora_B.weight", ".lora.up.weight": ".lora_B.weight",
    ".lora_A.default.weight": ".lora_A.weight", ".lora_B.default.weight": ".lora_B.weight",
}  # fmt: skip
"""Suffixes of an adapter's two matrices in other layouts, and their names in peft."""


class AdapterError(ValueError):
    """A file does not contain a complete adapter of this transformer; the message names the keys."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """Weights by peft's names within the transformer, their configuration, and a summary for the user."""

    weights: Tensors
    config: LoraConfig
    summary: str


def read_adapter(path: str, transformer: Any, pipeline: str, targets: Sequence[str]) -> Adapter:
    """Read an adapter in the layout of diffusers, peft or kohya, or one that the pipeline's class converts.

    ``targets`` names the modules that the file adapts, as peft matches them. If empty, they are those of the
    file's metadata, or else every module whose name differs from an adapted one's only in numbers, such as
    the block's.

    Raises:
        AdapterError: if the file cannot be read, or its layout is unknown.
    """
    file = _find(path)
    tensors, metadata = _read(file)
    weights, alphas, source = _named(file, tensors, transformer, pipeline)
    ranks = {
        name.removesuffix(half): value.shape[axis]
        for axis, half in enumerate((".lora_A.weight", ".lora_B.weight"))
        for name, value in weights.items()
        if name.endswith(half) and value.ndim > axis
    }
    if metadata:
        config, source = _described(file, metadata), "the file's metadata"
    else:
        config = _config(ranks, alphas, transformer)
        source = source or "assumed, since the file names none: alpha = rank, a scale of 1"
    if targets:
        config.target_modules = set(targets)
    return Adapter(weights, config, f"{file}: {len(ranks)} modules, {_rank_and_alpha(config)} ({source})")


def check_keys(path: str, expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> None:
    """Compare the shapes of a transformer's adapter with those of a file, by name.

    Raises:
        AdapterError: with counts and examples, if any is missing, unexpected or of another shape.
    """
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    problems = [f"{_some(names)} {what}" for what, names in (
        ("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
    differ = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    if differ:
        name = differ[0]
        shapes = f"{tuple(found[name])}, expected {tuple(expected[name])}"
        problems.append(f"{len(differ)} of another shape (such as {name}: {shapes})")
    if not problems:
        return
    raise AdapterError(
        f"{path} does not fit the model: {', '.join(problems)}; expected {len(expected)} keys"
        + (", or model.lora_targets to name what it adapts" if missing else "")
    )


def _find(path: str) -> Path:
    place = Path(path)
    if place.is_file():
        return place
    if place.is_dir():
        known = [place / name for name in FILES if (place / name).is_file()]
        files = known or sorted(place.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        raise AdapterError(
            f"{path} holds {len(files)} .safetensors files, expected one, or {' or '.join(FILES)}"
        )
    return _download(path)


def _download(path: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(path, LORA_WEIGHT_NAME_SAFE))
    except (OSError, HFValidationError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise AdapterError(f"{path} is neither a file or folder nor a reachable adapter: {reason}") from error


def _read(file: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read every tensor of a file, and peft's configuration if the file or its folder contains it."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            written = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        beside = file.with_name("adapter_config.json")
        if not written and beside.is_file():
            return tensors, json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{file}: not a readable safetensors file: {error}") from error
    prefix = "transformer."
    return tensors, {k.removeprefix(prefix): v for k, v in written.items() if k.startswith(prefix)}


def _named(
    file: Path, tensors: Tensors, transformer: Any, pipeline: str
) -> tuple[Tensors, dict[str, float], str]:
    """Rename the weights to peft's names; return them with the alphas by module, and the alphas' source."""
    weights, alphas = _native(tensors, transformer)
    if _modules(weights) & _adaptable(transformer):
        return weights, alphas, "the file's alpha keys" if alphas else ""
    reason = ""
    try:
        with _warnings_raised("diffusers.loaders"):
            converted = getattr(diffusers, pipeline).lora_state_dict(dict(tensors))
        weights, alphas = _native(converted, transformer)
    except Exception as error:  # converters assume their layout: any error means that it is another one
        reason = shorten(f" ({type(error).__name__}: {error})", width=200)
    if _modules(weights) & _adaptable(transformer):
        folded = any(name.endswith("alpha") for name in tensors) and not alphas
        return weights, alphas, "the file's alpha keys, folded into the weights" if folded else ""
    raise AdapterError(
        f"{file} holds no adapter of a {type(transformer).__name__} in a known layout: {_some(tensors)}; "
        f"expected the names of diffusers, peft or kohya{reason}"
    )


class _Raise(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise AdapterError(record.getMessage())


@contextmanager
def _warnings_raised(name: str) -> Iterator[None]:
    """Raise an error where a library only warns, as converters do about keys that they ignore."""
    logger, handler = logging.getLogger(name), _Raise(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _native(tensors: Tensors, transformer: Any) -> tuple[Tensors, dict[str, float]]:
    """Rename the tensors to peft's names, and separate the alphas, by module."""
    flat = {name.replace(".", "_"): name for name, _ in transformer.named_modules()}
    renamed, alphas = {}, {}
    for key, value in tensors.items():
        name = _unflattened(key, flat) if FLAT.match(key) else PREFIXES.sub("", key, count=1)
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = float(value)
            continue
        ending = next((end for end in HALVES if name.endswith(end)), "")
        renamed[name.removesuffix(ending) + HALVES.get(ending, "")] = value
    return renamed, alphas


def _unflattened(key: str, flat: Mapping[str, str]) -> str:
    module, _, rest = FLAT.sub("", key, count=1).partition(".")
    return f"{flat.get(module, module)}.{rest}"


def _modules(weights: Iterable[str]) -> set[str]:
    return {re.sub(r"\.lora_[AB]\.weight$", "", name) for name in weights}


def _adaptable(transformer: Any) -> set[str]:
    return {name for name, module in transformer.named_modules() if hasattr(module, "weight")}


def _described(file: Path, metadata: dict[str, Any]) -> LoraConfig:
    """Build the configuration from peft's metadata, to train the adapter further."""
    try:
        config = LoraConfig(**metadata)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{file}: its metadata is not peft's of a LoRA adapter: {error}") from error
    config.inference_mode = False
    config.init_lora_weights = True  # all are replaced later; other values would change the model's weights
    return config


def _config(ranks: Mapping[str, int], alphas: Mapping[str, float], transformer: Any) -> LoraConfig:
    """Infer the configuration of a file without metadata: its modules, and the same ones in other blocks."""
    kinds = {re.sub(r"\d+", "N", name) for name in ranks}
    modules = {name for name in _adaptable(transformer) if re.sub(r"\d+", "N", name) in kinds}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    scales = {name: alphas.get(name, float(own)) for name, own in ranks.items()}
    alpha = Counter(scales.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=_whole(alpha),
        target_modules=modules or set(ranks),
        rank_pattern={re.escape(name): own for name, own in ranks.items() if own != rank},
        alpha_pattern={re.escape(name): _whole(own) for name, own in scales.items() if own != alpha},
    )


def _whole(alpha: float) -> Any:
    return int(alpha) if alpha.is_integer() else alpha


def _rank_and_alpha(config: LoraConfig) -> str:
    ranks = sorted({config.r, *config.rank_pattern.values()})
    alphas = sorted({config.lora_alpha, *config.alpha_pattern.values()})
    return f"rank {', '.join(map(str, ranks))}, alpha {', '.join(map(str, alphas))}"


def _some(names: Iterable[str]) -> str:
    """Summarise names by their number and the first two."""
    listed = sorted(names)
    return f"{len(listed)} keys ({', '.join(listed[:2])}{', ...' if len(listed) > 2 else ''})"
