"""The rollout worker: groups, versions, weights, and how the policy is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout.families.registry import load_policy
from rollout.families.transformer import adapter_off
from rollout.noise import candidate_noises
from rollout.records import (
    Chunk,
    Conditioning,
    Noise,
    Prompt,
    SampleRequest,
    Trajectory,
    WeightsId,
    WeightsMismatch,
)
from rollout.settings import ModelSettings, RolloutSettings
from rollout.tensors import unpack
from rollout.weights import buckets, checksum, flatten, trainable
from rollout.worker import RolloutWorker, StaleWeights

PROMPT = Prompt(index=4, text="a photo of a red circle")


def settings(**changes: Any) -> RolloutSettings:
    values = {"width": 32, "height": 32, "steps": 4, "guidance": 1.0, "text_tokens": 0, "gpus": 0}
    return RolloutSettings(**{**values, "eval_steps": 3, **changes})


def start(folder: Path, *, model: dict[str, Any] | None = None, seed: int = 0, **rollout: Any) -> Any:
    return RolloutWorker(ModelSettings(path=str(folder), **(model or {})), settings(**rollout), seed)


def parts(chunks: list[Chunk]) -> tuple[Any, ...]:
    """The only chunk, its images, its conditioning and its trajectories."""
    (chunk,) = chunks
    return chunk, chunk.images, chunk.conditioning, *chunk.trajectories


def request(noises: tuple[Noise, ...], *, group_id: int = 7, version: int = 0) -> SampleRequest:
    return SampleRequest(group_id=group_id, prompt=PROMPT, noises=noises, version=version)


def published(worker: RolloutWorker, scale: float) -> tuple[str, Any]:
    flat = np.float32(scale) * flatten([parameter for _, parameter in worker.parameters])
    return checksum(flat, worker.parameters), flat


def close(a: np.ndarray, b: np.ndarray, tolerance: int = 2) -> bool:
    return bool(np.abs(a.astype(int) - b.astype(int)).max() <= tolerance)


@pytest.fixture(scope="module")
def worker(pipeline_folder: Path) -> RolloutWorker:
    return start(pipeline_folder, batch=3)


NOISES = candidate_noises(0, PROMPT.index, 7, 5)


def test_a_group_returns_one_value_per_candidate(worker: RolloutWorker) -> None:
    made, images, conditioning, *trajectories = parts(worker.sample([request(NOISES)]))
    assert made.seconds > 0
    assert made.finite == (True,) * 5
    assert images.shape == (5, 32, 32, 3)
    assert images.dtype == np.uint8
    assert isinstance(conditioning, Conditioning)
    for name, value in worker.policy.encode(PROMPT.text).items():
        assert torch.equal(unpack(conditioning.arrays[name]), value)
    assert len(trajectories) == 5
    for trajectory in trajectories:
        assert isinstance(trajectory, Trajectory)
        assert trajectory.states.dtype == np.float16
        assert trajectory.states.shape == (4, 8, 8, 8)
        assert trajectory.log_probs.shape == (3,)
        assert trajectory.steps.tolist() == [0, 1, 2]


def test_the_same_candidate_is_the_same_image_in_any_batch(worker: RolloutWorker) -> None:
    _, images, _, *trajectories = parts(worker.sample([request(NOISES)]))
    order = [4, 0, 2]
    _, moved, _, *others = parts(worker.sample([request(tuple(NOISES[i] for i in order))]))
    assert close(moved, images[order])
    for i, other in zip(order, others, strict=True):
        assert np.allclose(other.states, trajectories[i].states, atol=2e-2)
    assert not close(images[0], images[1], tolerance=10)


def test_both_streams_of_noise_decide(worker: RolloutWorker) -> None:
    noises = (Noise(initial=1, path=1), Noise(initial=1, path=2), Noise(initial=2, path=1))
    images = worker.sample([request(noises)])[0].images
    assert not close(images[0], images[1], tolerance=10)
    assert not close(images[0], images[2], tolerance=10)


OTHER = Prompt(index=5, text="a photo of two blue squares")


@pytest.mark.parametrize("window", [{}, {"window_start": 1}, {"window_size": 2}])
def test_groups_that_share_batches_are_sampled_as_if_alone(
    pipeline_folder: Path, window: dict[str, int]
) -> None:
    """Also when their noise is the same, though not their prompt."""
    together = start(pipeline_folder, steps=5, batch=4, **window)
    noises = candidate_noises(0, 4, 7, 6)
    asked = [
        SampleRequest(group_id=group, prompt=prompt, noises=noises, version=0)
        for group, prompt in ((7, PROMPT), (8, OTHER))
    ]
    rows: list[int] = []
    hook = together.policy.transformer.register_forward_hook(lambda *given: rows.append(len(given[2][0])))
    made = together.sample(asked)
    hook.remove()
    own = "window_size" in window  # drawn windows may differ, so such groups share nothing
    assert max(rows[4::5]) == 4
    assert len(rows) == 5 * (4 if own else 3)
    images, conditionings = [one.images for one in made], [one.conditioning for one in made]
    for place, one in enumerate(asked):
        _, alone, conditioning, *expected = parts(together.sample([one]))
        assert close(images[place], alone)
        assert conditionings[place].arrays.keys() == conditioning.arrays.keys()
        assert all(
            np.array_equal(conditionings[place].arrays[k], conditioning.arrays[k])
            for k in conditioning.arrays
        )
        for found, other in zip(made[place].trajectories, expected, strict=True):
            assert np.array_equal(found.steps, other.steps)
            assert np.allclose(found.log_probs, other.log_probs, atol=1e-4)
    assert not close(images[0], images[1])
    repeated = [one.images for one in together.sample(asked)]
    assert all(np.array_equal(a, b) for a, b in zip(images, repeated, strict=True))


@pytest.mark.parametrize(("drafted", "window"), [(2, (0, 4)), (1, (2, 4)), (3, (0, 2))])
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_a_begun_candidate_is_finished_as_if_never_interrupted(
    pipeline_folder: Path, drafted: int, window: tuple[int, int], storage: str
) -> None:
    """Also in another order and with fewer others; its draft is the clean image that it pointed at."""
    start_, stop = window
    chosen = {"steps": 5, "batch": 3, "draft_steps": drafted, "storage": storage}
    worker = start(pipeline_folder, window_start=start_, window_stop=stop, **chosen)
    told, drafts, _, *begun = parts(worker.begin([request(NOISES)]))
    assert told.seconds > 0
    assert told.finite == (True,) * 5
    assert drafts.shape == (5, 32, 32, 3)
    order = [3, 1]
    asked = [request(tuple(NOISES[i] for i in order))]
    _, images, _, *finished = parts(worker.finish(asked, *(begun[i] for i in order)))
    _, whole, _, *expected = parts(worker.sample([request(NOISES)]))
    for image, found, place in zip(images, finished, order, strict=True):
        assert close(image, whole[place])
        assert np.array_equal(found.steps, expected[place].steps)
        assert np.allclose(found.log_probs, expected[place].log_probs, atol=1e-4)
        kept, made = unpack(found.states).float(), unpack(expected[place].states).float()
        assert torch.allclose(kept, made, atol=5e-2)
    assert not close(drafts[0], whole[0])


def test_a_draft_after_the_last_but_one_step_is_nearly_the_image(pipeline_folder: Path) -> None:
    worker = start(pipeline_folder, steps=4, draft_steps=3)
    _, drafts, *_ = parts(worker.begin([request(NOISES)]))
    _, images, *_ = parts(worker.sample([request(NOISES)]))
    early = start(pipeline_folder, steps=4, draft_steps=1).begin([request(NOISES)])[0].images
    far, near = (np.abs(one.astype(float) - images).mean() for one in (early, drafts))
    assert near < far
    with pytest.raises(StaleWeights, match="wants policy v3, not v0"):
        worker.begin([request(NOISES, version=3)])


def test_a_drawn_window_is_stored_with_its_steps(pipeline_folder: Path) -> None:
    worker = start(pipeline_folder, steps=6, window_size=2)
    seen = set()
    for group_id in range(8):
        _, _, _, trajectory = parts(worker.sample([request(NOISES[:1], group_id=group_id)]))
        assert trajectory.states.shape[0] == 3
        first, second = trajectory.steps.tolist()
        assert second == first + 1 <= 4
        seen.add(first)
    assert len(seen) > 1


def test_a_stale_version_is_refused(worker: RolloutWorker) -> None:
    with pytest.raises(StaleWeights, match="group 7 wants policy v3, not v0"):
        worker.sample([request(NOISES, version=3)])


def test_a_fresh_worker_holds_version_0(pipeline_folder: Path) -> None:
    fresh = start(pipeline_folder)
    assert fresh.ping() == WeightsId(0)
    with pytest.raises(StaleWeights):
        fresh.sample([request(NOISES[:1], version=1)])


def test_loading_acknowledges_the_version_and_changes_the_images(pipeline_folder: Path) -> None:
    worker = start(pipeline_folder)
    before = worker.sample([request(NOISES[:1])])[0].images
    digest, flat = published(worker, scale=1.1)
    assert worker.load(WeightsId(5), 0, 1, digest, flat) == WeightsId(5)
    assert worker.ping() == WeightsId(5)
    after = worker.sample([request(NOISES[:1], version=5)])[0].images
    assert not close(before, after, tolerance=4)
    with pytest.raises(StaleWeights):
        worker.sample([request(NOISES[:1], version=0)])


def test_after_damaged_weights_nothing_is_sampled_until_they_come_whole(pipeline_folder: Path) -> None:
    worker = start(pipeline_folder)
    digest, flat = published(worker, scale=1.1)
    damaged = flat.copy()
    damaged.view(np.uint8)[4_711] ^= 1
    with pytest.raises(WeightsMismatch, match="checksum"):
        worker.load(WeightsId(5), 0, 1, digest, damaged)
    for version in (0, 5):
        with pytest.raises(StaleWeights):
            worker.sample([request(NOISES[:1], version=version)])
    assert worker.load(WeightsId(5), 0, 1, digest, flat) == WeightsId(5)


def test_half_of_the_weights_is_no_version(pipeline_folder: Path) -> None:
    worker = start(pipeline_folder)
    parts = buckets(worker.parameters, limit=1e6)
    flats = [2 * flatten(p for _, p in part) for part in parts]
    checksums = [checksum(flat, part) for flat, part in zip(flats, parts, strict=True)]
    count = len(parts)
    held = [
        worker.load(WeightsId(9), number, count, checksums[number], flat) for number, flat in enumerate(flats)
    ]
    assert held == [None] * (len(parts) - 1) + [WeightsId(9)]
    assert len(parts) > 2
    worker.load(WeightsId(10), 0, count, checksums[0], flats[0])
    with pytest.raises(WeightsMismatch):
        worker.load(WeightsId(10), 2, count, checksums[2], flats[2])
    with pytest.raises(StaleWeights):
        worker.sample([request(NOISES[:1], version=9)])


def test_weights_that_end_early_are_refused(pipeline_folder: Path) -> None:
    worker = start(pipeline_folder)
    part, *_ = buckets(worker.parameters, limit=1e6)
    flat = flatten(p for _, p in part)
    with pytest.raises(WeightsMismatch, match="ended before"):
        worker.load(WeightsId(3), 0, 1, checksum(flat, part), flat)
    with pytest.raises(WeightsMismatch, match="no run of this model's parameters"):
        worker.load(WeightsId(3), 0, 1, "", flat[:-1])


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_model_in_half_precision_samples_nearly_the_same(
    worker: RolloutWorker, pipeline_folder: Path, name: str, lora_rank: int
) -> None:
    rough = start(pipeline_folder, model={"dtype": name, "lora_rank": lora_rank}, storage=name)
    dtype = getattr(torch, name)
    assert {p.dtype for _, p in rough.parameters} == {torch.float32}
    frozen = {p.dtype for n, p in rough.policy.transformer.named_parameters() if "lora" not in n}
    assert frozen == {dtype if lora_rank else torch.float32}
    assert {p.dtype for p in rough.policy.pipeline.vae.parameters()} == {torch.float32}
    _, images, conditioning, *trajectories = parts(rough.sample([request(NOISES)]))
    exact = worker.sample([request(NOISES)])[0].images
    assert 0 < np.abs(images.astype(int) - exact.astype(int)).mean() < 5
    assert unpack(conditioning.arrays["hidden"]).dtype == dtype
    assert unpack(trajectories[0].states).dtype == dtype
    assert all(np.isfinite(trajectory.log_probs).all() for trajectory in trajectories)


def adapter(folder: Path, seed: int, *, whole: bool = True, **model: Any) -> Any:
    chosen = ModelSettings(path=str(folder), lora_rank=4, **model)
    return load_policy(chosen, settings(), device="cpu", seed=seed, whole=whole).transformer


def weights_of(transformer: Any) -> np.ndarray:
    return flatten([parameter for _, parameter in trainable(transformer)])


def test_an_adapter_comes_from_its_seed(pipeline_folder: Path) -> None:
    first = weights_of(adapter(pipeline_folder, seed=1))
    torch.rand(3)  # whatever was drawn in between
    assert np.array_equal(first, weights_of(adapter(pipeline_folder, seed=1, whole=False)))
    assert not np.array_equal(first, weights_of(adapter(pipeline_folder, seed=2)))


def test_only_the_adapter_is_trained(pipeline_folder: Path) -> None:
    named = trainable(adapter(pipeline_folder, seed=1))
    assert named
    assert all("lora_" in name and ".attn." in name for name, _ in named)
    chosen = trainable(adapter(pipeline_folder, seed=1, lora_targets=("attn.to_q",)))
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name, _ in chosen} == {"to_q"}


def test_a_new_adapter_changes_nothing_and_a_trained_one_can_be_switched_off(
    pipeline_folder: Path, worker: RolloutWorker
) -> None:
    adapted = start(pipeline_folder, model={"lora_rank": 4}, batch=3)
    base = worker.sample([request(NOISES)])[0].images
    assert close(adapted.sample([request(NOISES)])[0].images, base)
    with torch.no_grad():
        for _, parameter in adapted.parameters:
            parameter.add_(0.1)
    assert not close(adapted.sample([request(NOISES)])[0].images, base, tolerance=4)
    with adapter_off(adapted.policy.transformer):
        assert close(adapted.sample([request(NOISES)])[0].images, base)
    assert not close(adapted.sample([request(NOISES)])[0].images, base, tolerance=4)


def test_an_adapter_is_switched_on_again_after_an_error(pipeline_folder: Path) -> None:
    transformer = adapter(pipeline_folder, seed=1)
    with pytest.raises(RuntimeError, match="inside"), adapter_off(transformer):
        raise RuntimeError("inside")
    assert not any(getattr(module, "disable_adapters", False) is True for module in transformer.modules())
