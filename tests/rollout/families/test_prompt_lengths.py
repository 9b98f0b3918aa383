"""Tests of prompt lengths: a prompt counts as cut exactly if the encoder does not see its end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rollout.families.prompt_lengths import cut_prompts
from rollout.families.registry import load_policy
from rollout.settings import ModelSettings
from rollout.tools.tiny_families import TINY
from tests.rollout.conftest import Folder

SEEN = {"flux": "T5", "qwen_image": "Qwen2.5-VL", "sana": "Gemma", "z_image": "Qwen3", "flux2_dev": "Mistral",
        "flux2_klein": "Qwen3", "wan": "UMT5", "wan_5b": "UMT5"}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_what_is_counted_is_what_the_encoder_sees(name: str, folder: Folder) -> None:
    """The longest prompt that fits is told from another to its last letter; one that is cut is not."""
    wide = TINY[name].settings(guidance=1.0)
    policy = load_policy(ModelSettings(path=str(folder(name))), wide, device="cpu", seed=0)
    reader = next(one for one in policy.text_readers(policy.pipeline) if one.name == SEEN[name])
    own = reader.count([""])[0]
    fits = [size for size in range(1, 400) if reader.count(["a" * size])[0] == wide.text_tokens]
    assert len(fits) == 1

    def told_apart(size: int) -> bool:
        one, two = (policy.embed("a" * (size - 1) + letter)["hidden"] for letter in "ab")
        return not torch.equal(one, two)

    assert told_apart(fits[0])
    assert not told_apart(fits[0] + own + 1)
    prompts = {"p.txt": ["a", "a" * (fits[0] + 1), "a" * (fits[0] + 20)]}
    (said,) = cut_prompts([reader], prompts)
    assert said == (
        f"p.txt: 2 of 3 prompts are cut at {wide.text_tokens} tokens ({SEEN[name]}), the longest has "
        f"{wide.text_tokens + 20}; the first: 2, 3; raise rollout.text_tokens"
    )
    assert not cut_prompts([reader], {"p.txt": ["a" * fits[0]]})
    narrow = replace(reader, room=own)
    said = f"rollout.text_tokens: got {own}, expected at least {own + 1}: {own} tokens are the same for every"
    with pytest.raises(ValueError, match=said):
        cut_prompts([narrow], {})


@pytest.mark.parametrize("name", TINY)
def test_a_prompt_longer_than_the_pipeline_takes_is_refused(name: str, folder: Folder) -> None:
    most = {"qwen_image": 1024, "sana": 300}.get(name, 512)
    model = ModelSettings(path=str(folder(name)))
    for length in (most, most + 1):
        settings = TINY[name].settings(text_tokens=length)
        policy = load_policy(model, settings, device="meta", seed=0, whole=False)
        if length == most:
            policy.check_text_tokens()
            continue
        with pytest.raises(
            ValueError, match=rf"rollout\.text_tokens: got {length}, expected at most {most} for"
        ):
            policy.check_text_tokens()
