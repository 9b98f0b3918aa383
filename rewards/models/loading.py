"""What every scorer with a model shares: where it runs, and an error that says which option to mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from textwrap import shorten
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def placed(device: str) -> tuple[torch.device, torch.dtype]:
    """The device, a GPU where there is one for "auto", and its dtype: bfloat16 on a GPU, float32 on a CPU."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    return chosen, torch.bfloat16 if chosen.type == "cuda" else torch.float32


def pretrained(architecture: Any, name: str) -> Any:
    """A float32 model of a class of transformers, from the hub or a local folder, ready for inference.

    Raises ``ValueError`` when a parameter is not in the checkpoint, which transformers would make up.
    """
    model, loading = architecture.from_pretrained(name, dtype="float32", output_loading_info=True)
    absent = sorted({parameter for parameter, _ in model.named_parameters()} & set(loading["missing_keys"]))
    if absent:
        raise ValueError(f"{len(absent)} parameters are not in the checkpoint, such as {absent[0]}")
    return model.eval()


@contextmanager
def explained(option: str, value: object, expected: str) -> Iterator[None]:
    """Load weights within: what goes wrong becomes an ``OSError`` of one line.

    It names the option, its value and what would do. The libraries' own messages run over many lines.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, UserWarning, UnpicklingError, SafetensorError) as error:
        reason = shorten(str(error), width=400)
        raise OSError(f"option {option}: expected {expected}, got {value!r} ({reason})") from error
