"""Loading of a scorer's model: its device, its weights, and errors that name the option to correct."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from textwrap import shorten
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def placed(device: str) -> tuple[torch.device, torch.dtype]:
    """Return the device ("auto" prefers a GPU) and its dtype: bfloat16 on a GPU, float32 on a CPU."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    return chosen, torch.bfloat16 if chosen.type == "cuda" else torch.float32


def pretrained(architecture: Any, name: str) -> Any:
    """Load a float32 model of a class of transformers from the hub or a local folder, for inference.

    Raises:
        ValueError: if a parameter is not in the checkpoint; transformers would initialise it at random.
    """
    model, loading = architecture.from_pretrained(name, dtype="float32", output_loading_info=True)
    absent = sorted({parameter for parameter, _ in model.named_parameters()} & set(loading["missing_keys"]))
    if absent:
        raise ValueError(f"{len(absent)} parameters are not in the checkpoint, such as {absent[0]}")
    return model.eval()


@contextmanager
def explained(option: str, value: object, expected: str) -> Iterator[None]:
    """Turn the errors of loading weights within into an ``OSError`` of one line.

    It names the option, its value and what was expected; the libraries' own messages have many lines.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, UserWarning, UnpicklingError, SafetensorError) as error:
        reason = shorten(str(error), width=400)
        raise OSError(f"option {option}: expected {expected}, got {value!r} ({reason})") from error
