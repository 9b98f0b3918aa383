"""Tests of settings that save memory or choose a kernel: their effects, and that images do not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from rollout.families.pipeline_parts import read_pipeline
from rollout.families.registry import load_policy
from rollout.families.transformer import compile_blocks
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tools.tiny_families import TINY

TEXT = "a photo of a red circle"


def policy_of(folder: Path, *, model: dict[str, Any] | None = None, **rollout: Any) -> Any:
    values = {"width": 32, "height": 32, "steps": 4, "guidance": 3.0, "text_tokens": 0, "gpus": 0}
    chosen = RolloutSettings(**{**values, **rollout})
    return load_policy(ModelSettings(path=str(folder), **(model or {})), chosen, device="cpu", seed=0)


def sizes_seen(module: nn.Module) -> list[tuple[int, ...]]:
    """The batch and area of every input of a module from now on."""
    seen: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), *inputs[0].shape[-2:])))
    return seen


@pytest.mark.parametrize(
    ("decode", "expected"), [("whole", [(3, 8, 8)]), ("sliced", [(1, 8, 8)] * 3), ("tiled", [(1, 4, 4)])]
)
def test_decoding_in_parts(pipeline_folder: Path, decode: str, expected: list[tuple[int, ...]]) -> None:
    policy = policy_of(pipeline_folder, decode=decode)
    vae = policy.pipeline.vae
    vae.tile_latent_min_size, vae.tile_sample_min_size = 4, 16  # as large images are to a real one
    seen = sizes_seen(vae.decoder)
    latents = torch.randn(3, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    images, finite = policy.decode(latents)
    assert finite.tolist() == [True] * 3
    assert seen[: len(expected)] == expected
    assert images.shape == (3, 32, 32, 3)
    if decode != "tiled":  # which blends, and a random decoder knows no neighbourhood
        whole, _ = policy_of(pipeline_folder).decode(latents)
        assert (images.int() - whole.int()).abs().max() <= 1


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the devices of the text encoders, in order, without moving them: there is only one here."""
    found: list[str] = []
    original = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if "Text" in type(self).__name__ and args:
            found.append(str(args[0]))
            return self
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", to)
    return found


def test_offloaded_encoders_visit_the_device_for_a_prompt(pipeline_folder: Path, moves: list[str]) -> None:
    policy = policy_of(pipeline_folder, guidance=1.0, offload_text=True)
    policy.embedder.device = torch.device("meta")  # a place that is not where they are
    policy.embedder.embed = lambda text, negative: moves.append(text) or {}
    moves.clear()
    policy.encode(TEXT)
    assert moves == ["meta", "meta", TEXT, "cpu", "cpu"]


def test_encoders_that_are_not_offloaded_stay(pipeline_folder: Path, moves: list[str]) -> None:
    policy = policy_of(pipeline_folder)
    moves.clear()
    policy.encode(TEXT)
    assert not moves


def test_a_prompt_is_encoded_once_and_the_same(pipeline_folder: Path, tmp_path: Path) -> None:
    first = policy_of(pipeline_folder, embeddings=tmp_path)
    found = first.encode(TEXT)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # the prompt and the empty one
    second = policy_of(pipeline_folder, embeddings=tmp_path)
    second.embedder.embed = None  # would fail
    again, plain = second.encode(TEXT), policy_of(pipeline_folder).encode(TEXT)
    assert set(found) == set(again) == set(plain)
    assert all(
        torch.equal(found[name], again[name]) and torch.equal(found[name], plain[name]) for name in found
    )


@pytest.mark.parametrize("left", [0, 5, 0.5])
def test_a_cut_off_embedding_is_made_again(pipeline_folder: Path, tmp_path: Path, left: float) -> None:
    expected = policy_of(pipeline_folder, embeddings=tmp_path, guidance=1.0).encode(TEXT)["hidden"]
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if left < 1 else int(left)])
    again = policy_of(pipeline_folder, embeddings=tmp_path, guidance=1.0)
    with pytest.warns(UserWarning, match=rf"rollout\.embeddings: {path} cannot be read .* made again"):
        assert torch.equal(again.encode(TEXT)["hidden"], expected)
    assert path.read_bytes() == whole
    assert list(tmp_path.glob("*.safetensors")) == [path]


def test_other_encoders_do_not_share_the_folder(pipeline_folder: Path, tmp_path: Path) -> None:
    policy_of(pipeline_folder, embeddings=tmp_path, guidance=1.0).encode(TEXT)
    moved = policy_of(pipeline_folder, guidance=1.0)
    with torch.no_grad():
        next(moved.pipeline.text_encoder.parameters()).add_(0.5)
    moved.pipeline.save_pretrained(tmp_path / "moved")
    other = policy_of(tmp_path / "moved", embeddings=tmp_path, guidance=1.0)
    expected = moved.encode(TEXT)["hidden"]
    assert torch.equal(other.encode(TEXT)["hidden"], expected)
    kept = [load_file(path)["hidden"] for path in tmp_path.glob("*.safetensors")]
    assert len(kept) == 2
    assert not torch.equal(*kept)


def test_attention_goes_through_the_chosen_backend(tmp_path: Path) -> None:
    tiny = TINY["wan"]
    folder = tiny.save(tmp_path)
    rollout = tiny.settings()

    def velocity(attention: str | None) -> tuple[torch.Tensor, set[Any]]:
        model = ModelSettings(path=str(folder), attention=attention)
        policy = load_policy(model, rollout, device="cpu", seed=0)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(1, *policy.latent_shape(), generator=generator)
        text = {name: value[None] for name, value in policy.encode(TEXT).items()}
        with torch.no_grad():
            v = policy.velocity(policy.transformer, x, torch.tensor([500.0]), text)
        processors = policy.transformer.attn_processors.values()
        return v, {processor._attention_backend for processor in processors}

    plain, usual = velocity(None)
    chosen, backends = velocity("_native_math")
    assert {backend.value for backend in backends} == {"_native_math"}
    assert not usual & backends
    assert torch.allclose(plain, chosen, atol=1e-4)
    with pytest.raises(ValueError, match=r"model\.attention: .*must be one of"):
        velocity("quick")


def test_a_switch_without_effect_is_refused(pipeline_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.attention: a SD3Transformer2DModel does not know"):
        policy_of(pipeline_folder, model={"attention": "_native_math"})


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_has_blocks_that_can_be_compiled(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    model = ModelSettings(path=str(tiny.save(tmp_path)), lora_rank=2, compile=True)
    transformer = load_policy(model, tiny.settings(), device="cpu", seed=0, whole=False).transformer
    kinds = transformer._repeated_blocks
    compiled = [m for m in transformer.modules() if m._compiled_call_impl is not None]
    assert {type(module).__name__ for module in compiled} == {
        type(module).__name__ for module in transformer.modules() if type(module).__name__ in kinds
    }
    assert compiled
    assert not [key for key in transformer.state_dict() if "_orig_mod" in key]


class _Block(nn.Module):
    """One variant of a kind of block, distinguished by a name that it computes with."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * len(self.form)


class _Transformer(nn.Module):
    """Twice as many forms of a block as torch compiles unless told otherwise."""

    _repeated_blocks = ("_Block",)

    def __init__(self, backend: Any = "eager") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block("x" * (i + 1)) for i in range(16))
        self.backend = backend

    def compile_repeated_blocks(self, **options: Any) -> None:
        for block in self.blocks:
            block.compile(backend=self.backend, **options)


def test_no_form_of_a_block_stays_uncompiled() -> None:
    transformer = _Transformer()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        compile_blocks(transformer)
        assert [float(block(torch.ones(1))) for block in transformer.blocks] == [*range(1, 17)]


def test_every_size_of_a_batch_has_kernels_of_its_own() -> None:
    """Kernels for any size would serve sizes that were compiled before as well, and round differently."""
    counter = CompileCounter()
    transformer = _Transformer(counter)
    compile_blocks(transformer)
    for size in (2, 3, 4, 3, 2):
        assert len(transformer.blocks[0](torch.ones(size))) == size
    assert counter.frame_count == 3


@pytest.mark.parametrize("name", TINY)
def test_what_is_left_out_of_a_pipeline_is_not_read(name: str, tmp_path: Path) -> None:
    folder = str(TINY[name].save(tmp_path))
    index = DiffusionPipeline.load_config(folder)
    found = read_pipeline(folder, index, {"default": torch.float32}, ("transformer", "vae"))
    assert found.transformer is found.vae is None
    assert found.text_encoder is not None
