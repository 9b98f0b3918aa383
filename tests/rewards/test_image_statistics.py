"""Tests of image statistics: each responds to the property in its name, and to little else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from rewards.image_statistics import ImageObserver, group_statistics

Images = NDArray[np.uint8]
RNG = np.random.default_rng(0)


def flat(*colors: tuple[int, int, int], size: int = 24) -> Images:
    return np.stack([np.full((size, size, 3), color, dtype=np.uint8) for color in colors])


def squares(*colors: tuple[int, int, int]) -> Images:
    """A coloured square on a grey ground, as the bundled world has them."""
    images = flat(*[(40, 40, 40)] * len(colors))
    images[:, 6:18, 6:18] = np.array(colors, dtype=np.uint8)[:, None, None]
    return images


RED, GREEN, BLUE, PURPLE = (230, 20, 20), (20, 230, 20), (20, 20, 230), (160, 32, 240)


def test_nothing_is_what_a_flat_grey_group_shows() -> None:
    found = group_statistics(flat((128, 128, 128), (128, 128, 128)))
    assert {name: value for name, value in found.items() if name != "jpeg_size"} == {
        "edge_density": 0.0, "color_entropy": 0.0, "dark_fraction": 0.0, "saturated_fraction": 0.0,
        "pairwise_distance": 0.0,
    }  # fmt: skip


def test_colours_that_collapse_lower_entropy_and_distance() -> None:
    free = group_statistics(squares(RED, GREEN, BLUE, PURPLE))
    same = group_statistics(squares(PURPLE, PURPLE, PURPLE, PURPLE))
    assert free["color_entropy"] == pytest.approx(2.0, abs=0.01)
    assert same["color_entropy"] == same["pairwise_distance"] == 0.0
    assert free["pairwise_distance"] > 0.1
    assert free["edge_density"] == pytest.approx(same["edge_density"], rel=0.5)


def test_edges_are_counted_between_neighbours() -> None:
    stripes = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    stripes[:, :, ::2] = 255
    assert group_statistics(stripes)["edge_density"] == pytest.approx(0.5)


def test_dark_and_saturated_pixels_are_shares() -> None:
    images = flat((0, 0, 0), (255, 0, 0))
    found = group_statistics(images)
    assert (found["dark_fraction"], found["saturated_fraction"]) == (0.5, 0.5)
    assert group_statistics(flat((60, 0, 0), (255, 200, 200)))["saturated_fraction"] == 0.0


def test_the_distance_is_that_of_all_pairs() -> None:
    images = RNG.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    scaled = images.astype(np.float64) / 255
    pairs = [np.mean((scaled[i] - scaled[j]) ** 2) for i in range(5) for j in range(i)]
    assert group_statistics(images)["pairwise_distance"] == pytest.approx(np.sqrt(np.mean(pairs)), rel=1e-5)


def test_noise_makes_a_large_jpeg() -> None:
    noise = RNG.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    assert group_statistics(noise)["jpeg_size"] > 5 * group_statistics(flat(RED, BLUE, size=64))["jpeg_size"]


@pytest.mark.parametrize(
    "change",
    [lambda images: images[::-1], lambda images: images[:, ::-1], lambda images: images[:, :, ::-1]],
    ids=["order", "upside down", "mirrored"],
)
def test_order_and_orientation_do_not_matter(change: Callable[[Images], Images]) -> None:
    images = np.repeat(np.repeat(RNG.integers(0, 256, (4, 4, 4, 3), dtype=np.uint8), 8, axis=1), 8, axis=2)
    before, after = group_statistics(images), group_statistics(np.ascontiguousarray(change(images)))
    assert after == pytest.approx(before, rel=1e-2)


def test_large_images_are_reduced_and_look_the_same() -> None:
    small = squares(RED, BLUE)
    large = np.repeat(np.repeat(small, 16, axis=1), 16, axis=2)
    expected, found = group_statistics(small), group_statistics(large)
    for name in ("color_entropy", "dark_fraction", "saturated_fraction", "pairwise_distance"):
        assert found[name] == pytest.approx(expected[name], abs=0.05)


def test_a_group_may_come_in_chunks() -> None:
    images = RNG.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    assert ImageObserver().measure([True] * 5, images[:3], images[3:]) == group_statistics(images)


def test_what_is_not_finite_is_not_measured() -> None:
    images = RNG.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    images[[0, 3]] = 0
    found = ImageObserver().measure([False, True, True, False, True], images[:3], images[3:])
    assert found == group_statistics(images[[1, 2, 4]])
    assert ImageObserver().measure([False] * 4 + [True], images) == {}
