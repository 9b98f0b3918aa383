"""Loading of diffusers pipelines in parts, of which the text encoders may follow later."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

Index = Mapping[str, Any]
"""The content of a pipeline's model_index.json."""


def read_pipeline(path: str, index: Index, dtypes: dict[str, torch.dtype], leave_out: Iterable[str]) -> Any:
    """Read a pipeline, each component in its precision, or the "default"."""
    # Components that were saved as missing (T5, usually) must be passed to diffusers as None.
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    absent |= dict.fromkeys(leave_out)
    # The general class would load optional components, such as Wan's transformer, although they are None.
    made = getattr(diffusers, index["_class_name"], DiffusionPipeline)
    pipeline = made.from_pretrained(path, dtype=dtypes, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def read_part(path: str, index: Index, name: str, **options: Any) -> Any:
    """Read one component of a pipeline, such as its "transformer" or "scheduler"."""
    return getattr(diffusers, index[name][1]).from_pretrained(path, subfolder=name, **options)


def shape_of(path: str, index: Index, dtype: torch.dtype) -> Any:
    """Build the transformer on the meta device: it has only shapes, to be counted, and nothing is read."""
    made = getattr(diffusers, index["transformer"][1])
    with torch.device("meta"):
        model = made.from_config(made.load_config(path, subfolder="transformer"))
    return nn.Module.to(model, dtype)  # diffusers' own warns about layers kept in float32


def read_tokenizers(path: str, index: Index) -> Any:
    """Read a pipeline with its tokenizers only."""
    made = getattr(diffusers, index["_class_name"])
    parts: dict[str, Any] = dict.fromkeys(made._get_signature_keys(made)[0])
    for name in parts:
        library, kind = index.get(name, (None, None))
        if name.startswith("tokenizer") and library is not None:
            read = getattr(importlib.import_module(library), kind).from_pretrained
            parts[name] = read(path, subfolder=name)
    return made(**parts)


def text_encoders(index: Index) -> list[str]:
    """Return the names of a pipeline's text encoders."""
    named = [name for name in index if name.startswith("text_encoder")]
    return [name for name in named if index[name][0] is not None]


def add_text_encoders(pipeline: Any, path: str, index: Index, dtype: torch.dtype) -> None:
    """Load the text encoders that were left out of a pipeline."""
    for name in text_encoders(index):
        if getattr(pipeline, name) is None:
            library, kind = index[name]
            load = getattr(importlib.import_module(library), kind).from_pretrained
            pipeline.register_modules(**{name: load(path, subfolder=name, dtype=dtype)})
