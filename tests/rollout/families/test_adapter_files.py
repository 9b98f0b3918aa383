"""Tests of every family's adapters in the common layouts: loaded completely, or refused with a message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rollout.families.registry import Tensors, load_policy
from rollout.settings import ModelSettings
from rollout.tools.export import write_lora
from rollout.tools.tiny_families import TINY
from rollout.weights import trainable

RANK, ALPHA = 4, 10
NAME = "pytorch_lora_weights.safetensors"


class Saved:
    """A family's checkpoint and an adapter of it, as exports write it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.rollout = TINY[name].settings()
        self.base = str(TINY[name].save(folder / "base"))
        self.folder = folder
        model = ModelSettings(path=self.base, lora_rank=RANK, lora_alpha=ALPHA)
        policy = load_policy(model, self.rollout, device="cpu", seed=0, whole=False)
        torch.manual_seed(1)
        self.weights = {key: torch.randn_like(p) for key, p in trainable(policy.transformer)}
        save_file(self.weights, folder / "weights.safetensors")
        write_lora(folder / "weights.safetensors", model, self.rollout, folder / "adapter")
        self.file = folder / "adapter" / NAME
        self.tensors = load_file(self.file)

    def load(self, path: Path, device: str = "cpu", **model: Any) -> Any:
        settings = ModelSettings(path=self.base, lora_path=str(path), **model)
        return load_policy(settings, self.rollout, device=device, seed=0, whole=False)

    def changed(self, change: Callable[[Tensors], Tensors], *, metadata: bool = False) -> Path:
        with safe_open(self.file, "pt") as opened:
            kept = opened.metadata() if metadata else None
        save_file(change(dict(self.tensors)), self.folder / "changed.safetensors", kept)
        return self.folder / "changed.safetensors"


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved("sd3", tmp_path_factory.mktemp("sd3"))


def kohya(tensors: Tensors) -> Tensors:
    """Every dot of a module's name an underscore, the halves called down and up, and alpha a tensor."""
    found = {}
    for key, value in tensors.items():
        module, half = re.fullmatch(r"transformer\.(.*)\.lora_([AB])\.weight", key).groups()  # type: ignore[union-attr]
        flat = f"lora_unet_{module.replace('.', '_')}"
        found[f"{flat}.lora_{'down' if half == 'A' else 'up'}.weight"] = value
        found[f"{flat}.alpha"] = torch.tensor(float(ALPHA))
    return found


def peft(tensors: Tensors) -> Tensors:
    return {key.replace("transformer.", "base_model.model.", 1): value for key, value in tensors.items()}


def bare(tensors: Tensors) -> Tensors:
    return {key.removeprefix("transformer."): value for key, value in tensors.items()}


def old(tensors: Tensors) -> Tensors:
    """As diffusers once saved adapters."""
    return {key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for key, v in tensors.items()}


def scales(policy: Any) -> set[float]:
    layers = [module for module in policy.transformer.modules() if hasattr(module, "lora_A")]
    return {layer.scaling["default"] for layer in layers}


def same(policy: Any, saved: Saved) -> bool:
    found = dict(trainable(policy.transformer))
    return found.keys() == saved.weights.keys() and all(
        torch.equal(parameter, saved.weights[key]) for key, parameter in found.items()
    )


@pytest.mark.parametrize("name", TINY)
def test_an_adapter_of_every_family_is_taken_in_every_layout(name: str, tmp_path: Path) -> None:
    saved = Saved(name, tmp_path)
    exported = saved.load(saved.file.parent)
    assert same(exported, saved)
    assert scales(exported) == {ALPHA / RANK}
    assert "rank 4, alpha 10 (the file's metadata)" in exported.adapter
    converted = saved.load(saved.changed(kohya))
    assert same(converted, saved)
    assert scales(converted) == {ALPHA / RANK}
    assert "rank 4, alpha 10 (the file's alpha keys)" in converted.adapter
    for layout in (peft, bare, old):
        assert same(saved.load(saved.changed(layout)), saved)
    with pytest.raises(ValueError, match=r"missing.*unexpected"):
        saved.load(saved.changed(half_renamed, metadata=True), device="meta")


def half_renamed(tensors: Tensors) -> Tensors:
    keys = sorted(tensors)[::2]
    return {(f"{key}.old" if key in keys else key): value for key, value in tensors.items()}


def one_block(tensors: Tensors) -> Tensors:
    return {key: value for key, value in tensors.items() if ".transformer_blocks.0." in key}


def without_one(tensors: Tensors) -> Tensors:
    return {key: value for key, value in tensors.items() if key != max(tensors)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (half_renamed, r"\d+ keys \(.*transformer_blocks.*\) missing, \d+ keys \(.*\.old, .*\) unexpected"),
        (one_block, r"\d+ keys \(transformer_blocks\.1\..*, \.\.\.\) missing; expected \d+ keys"),
        (without_one, r"1 keys \(transformer_blocks\..*lora_B\.weight\) missing"),
        (
            lambda t: {**t, "text_encoder.layers.0.lora_A.weight": torch.zeros(4, 4)},
            r"1 keys \(text_enc.*unexp",
        ),
        (
            lambda t: {k: v[:, :5].contiguous() for k, v in t.items()},
            r"of another shape \(such as .* expected \(",
        ),
    ],
)
def test_a_part_of_an_adapter_is_refused(
    sd3: Saved, change: Callable[[Tensors], Tensors], said: str, metadata: bool, device: str
) -> None:
    with pytest.raises(ValueError, match=r"^model\.lora_path: .*does not fit the model: .*" + said):
        sd3.load(sd3.changed(change, metadata=metadata), device=device)


def test_an_adapter_of_one_block_is_taken_if_that_is_meant(sd3: Saved) -> None:
    path = sd3.changed(one_block)
    kinds = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    policy = sd3.load(path, lora_targets=tuple(f"transformer_blocks.0.attn.{kind}" for kind in kinds))
    assert {key.split(".")[1] for key, _ in trainable(policy.transformer)} == {"0"}


def test_an_alpha_that_is_assumed_is_said(sd3: Saved) -> None:
    policy = sd3.load(sd3.changed(lambda tensors: tensors))
    assert scales(policy) == {1.0}
    assert (
        "rank 4, alpha 4 (assumed, since the file names none: alpha = rank, a scale of 1)" in policy.adapter
    )


def test_the_configuration_beside_a_file_of_peft_counts(sd3: Saved, tmp_path: Path) -> None:
    policy = sd3.load(sd3.file.parent)
    save_file(peft(sd3.tensors), tmp_path / "adapter_model.safetensors")
    config = {**policy.transformer.peft_config["default"].to_dict(), "inference_mode": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config, default=list))
    found = sd3.load(tmp_path)
    assert same(found, sd3)
    assert scales(found) == {ALPHA / RANK}


def test_ranks_and_alphas_may_differ_between_modules(sd3: Saved) -> None:
    def grow(tensors: Tensors) -> Tensors:
        found = kohya(tensors)
        name = "lora_unet_transformer_blocks_0_attn_to_q"
        found[f"{name}.lora_down.weight"] = torch.randn(8, found[f"{name}.lora_down.weight"].shape[1])
        found[f"{name}.lora_up.weight"] = torch.randn(found[f"{name}.lora_up.weight"].shape[0], 8)
        found[f"{name}.alpha"] = torch.tensor(2.5)
        return found

    policy = sd3.load(sd3.changed(grow))
    layer = policy.transformer.transformer_blocks[0].attn.to_q
    assert (layer.r["default"], layer.scaling["default"]) == (8, 2.5 / 8)
    assert scales(policy) == {2.5 / 8, ALPHA / RANK}


@pytest.mark.parametrize(
    "name",
    ["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "some.thing.else", "lora_te1_a.alpha"],
)
@pytest.mark.parametrize("family", ["sd3", "flux", "wan"])
def test_names_of_no_known_layout_are_refused_with_words(family: str, name: str, tmp_path: Path) -> None:
    saved = Saved(family, tmp_path)
    path = saved.changed(lambda _: {name: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"^model\.lora_path: .* in a known layout: 1 keys \(") as caught:
        saved.load(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layout_that_diffusers_converts_is_taken(tmp_path: Path) -> None:
    """Kohya's of the original FLUX.1: other names of blocks, and queries, keys and values in one matrix."""
    saved = Saved("flux", tmp_path)
    up, down = torch.randn(96, 4), torch.randn(4, 32)
    path = saved.changed(
        lambda _: {
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": up,
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": down,
            "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(2.0),
        }
    )
    policy = saved.load(path)
    assert "alpha 4 (the file's alpha keys, folded into the weights)" in policy.adapter
    query = policy.transformer.transformer_blocks[0].attn.to_q
    found = query.scaling["default"] * query.lora_B["default"].weight @ query.lora_A["default"].weight
    assert torch.allclose(found, 0.5 * up[:32] @ down, atol=1e-5)


def test_keys_that_a_converter_would_leave_out_are_refused(tmp_path: Path) -> None:
    saved = Saved("flux2_dev", tmp_path)
    block = "lora_unet_double_blocks_0_img_attn_proj"
    path = saved.changed(
        lambda _: {
            f"{block}.lora_up.weight": torch.zeros(32, 4),
            f"{block}.lora_down.weight": torch.zeros(4, 32),
            "lora_unet_nonesuch.lora_up.weight": torch.zeros(32, 4),
        }
    )
    with pytest.raises(ValueError, match=r"^model\.lora_path: .*Unsupported keys .*lora_unet_nonesuch"):
        saved.load(path)


def test_an_adapter_of_another_family_is_refused(sd3: Saved, tmp_path: Path) -> None:
    sana = Saved("sana", tmp_path)
    with pytest.raises(ValueError, match=r"^model\.lora_path: "):
        sd3.load(sana.file.parent)


def test_a_folder_without_an_adapter_is_refused(sd3: Saved, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.lora_path: .* holds 0 \.safetensors files"):
        sd3.load(tmp_path)
    (tmp_path / NAME).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=rf"^model\.lora_path: .*{NAME}: not a readable safetensors file"):
        sd3.load(tmp_path)


@pytest.mark.parametrize("targets", [("attn.to_qq",), ("attn.to_q", "nonesuch"), ("o_q",)])
def test_targets_that_are_no_modules_are_refused(sd3: Saved, targets: tuple[str, ...]) -> None:
    model = ModelSettings(path=sd3.base, lora_rank=4, lora_targets=targets)
    with pytest.raises(ValueError, match=rf"^model\.lora_targets: a SD3.* has no module '{targets[-1]}'"):
        load_policy(model, sd3.rollout, device="meta", seed=0, whole=False)
    model = ModelSettings(path=sd3.base, lora_rank=4, lora_targets=("attn",))
    with pytest.raises(ValueError, match=r"^model\.lora_targets: "):
        load_policy(model, sd3.rollout, device="meta", seed=0, whole=False)
