"""The sample plan: permutations, published crop statistics, and independence of everything but its coordinates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohobate.data import SamplePlan
from cohobate.data.plan import permute, uniforms
from cohobate.errors import UserError


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_sample_once_an_epoch(count: int, key: int) -> None:
    order = permute(np.arange(count), count, key)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


def test_order_needs_no_neighbours_and_scales() -> None:
    """A place's sample is the same asked alone; a billion images need no table."""
    whole = permute(np.arange(1000), 1000, 7)
    places = np.array([999, 3, 500])
    np.testing.assert_array_equal(permute(places, 1000, 7), whole[places])
    many = permute(np.arange(5000), 10**9, 7)
    assert len(set(many.tolist())) == 5000 and many.min() >= 0 and many.max() < 10**9


def test_orders_look_random() -> None:
    """Every place takes every sample equally often, neighbours do not stay neighbours, and epochs are unrelated.

    Chi-squared over 20 x 20 cells of 4000 keys has 361 degrees of freedom: mean 361, deviation 27.
    """
    count, keys = 20, 4000
    table = np.stack([permute(np.arange(count), count, key) for key in range(keys)])
    hits = np.stack([np.bincount(table[:, place], minlength=count) for place in range(count)])
    chi = ((hits - keys / count) ** 2 / (keys / count)).sum()
    assert 361 - 5 * 27 < chi < 361 + 5 * 27
    order = permute(np.arange(10_000), 10_000, 1)
    other = permute(np.arange(10_000), 10_000, 2)
    for a, b in ((order[:-1], order[1:]), (order, np.arange(10_000)), (order, other)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05  # five deviations of 1/sqrt(10000)


def test_uniforms_are_uniform_and_independent() -> None:
    draws = uniforms(3, np.arange(20_000), 8)
    assert draws.min() >= 0 and draws.max() < 1
    histogram = np.stack([np.histogram(column, 20, (0, 1))[0] for column in draws.T])
    assert ((histogram - 1000) ** 2 / 1000).sum(1).max() < 19 + 6 * math.sqrt(38)
    correlation = np.corrcoef(np.concatenate([draws[:-1], draws[1:]], axis=1).T) - np.eye(16)
    assert np.abs(correlation).max() < 0.04  # 5.6 deviations of 1/sqrt(20000)
    np.testing.assert_array_equal(uniforms(3, np.array([77]), 8)[0], draws[77])


def plan(**changes: object) -> SamplePlan:
    settings_ = {"count": 100_000, "seed": 0, "image_size": 224} | changes
    return SamplePlan(**settings_)  # type: ignore[arg-type]


def test_boxes_follow_the_published_distribution() -> None:
    """Area evenly in ``scale``, ratio evenly in its logarithm, place evenly: as torchvision's RandomResizedCrop.

    On an image large and square enough every first try fits for areas up to 3/4, so those are not bent by rejection.
    """
    ids = np.arange(20_000)
    side = np.full(len(ids), 1000, dtype=np.int32)
    boxes, flips = plan(scale=(0.2, 0.7)).crops(3, ids, side, side)
    top, left, height, width = boxes.T.astype(float)
    area, ratio = height * width / 1e6, np.log(width / height) / math.log(4 / 3)
    for values, low, high in (
        (area, 0.2, 0.7),
        (ratio, -1, 1),
        ((top + 0.5) / (1001 - height), 0, 1),
        ((left + 0.5) / (1001 - width), 0, 1),
    ):
        even = np.sort((values - low) / (high - low))
        distance = np.abs(even - (np.arange(len(ids)) + 0.5) / len(ids)).max()
        assert distance < 1.95 / math.sqrt(len(ids))  # Kolmogorov-Smirnov at 0.001
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / math.sqrt(len(ids))


@settings(max_examples=80, deadline=None)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), train=st.booleans(), tall=st.integers(1, 3))
def test_boxes_are_inside_the_image(height: int, width: int, train: bool, tall: int) -> None:
    made = plan(count=50, image_size=(32 * tall, 32), train=train)
    h, w = np.full(50, height, dtype=np.int32), np.full(50, width, dtype=np.int32)
    boxes, _ = made.crops(0, np.arange(50), h, w)
    assert (boxes[:, 2:] >= 1).all() and (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (boxes[:, 1] + boxes[:, 3] <= width).all()


def test_an_image_no_box_fits_gets_the_central_one() -> None:
    """A strip: no area of a fifth has a ratio below 4/3, so the box is the widest allowed, in the middle."""
    boxes, _ = plan(count=4).crops(0, np.arange(4), np.full(4, 10, dtype=np.int32), np.full(4, 900, dtype=np.int32))
    np.testing.assert_array_equal(boxes, [[0, 443, 10, 13]] * 4)


def test_evaluation_takes_the_centre_in_order() -> None:
    made = plan(count=7, train=False)
    boxes, flips = made.crops(0, np.arange(2), np.array([256, 400], np.int32), np.array([256, 300], np.int32))
    np.testing.assert_array_equal(boxes, [[16, 16, 224, 224], [69, 19, 262, 262]])
    assert not flips.any()
    np.testing.assert_array_equal(made.order(0, np.arange(7)), np.arange(7))
    assert made.steps_per_epoch(3) == 3
    _, places, valid = made.places(2, 3)
    assert places.tolist() == [6, 6, 6] and valid.tolist() == [True, False, False]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(8, 300), local=st.integers(1, 2), world=st.sampled_from([1, 2, 4]), step=st.integers(0, 500))
def test_ranks_take_slices_of_one_batch(count: int, local: int, world: int, step: int) -> None:
    made = plan(count=count)
    whole_epoch, whole, _ = made.places(step, local * world)
    parts = [made.places(step, local, rank, world) for rank in range(world)]
    assert all(epoch == whole_epoch for epoch, _, _ in parts)
    np.testing.assert_array_equal(np.concatenate([places for _, places, _ in parts]), whole)


def test_each_coordinate_matters() -> None:
    ids, side = np.arange(64), np.full(64, 500, dtype=np.int32)

    def draw(made: SamplePlan, epoch: int) -> tuple[list, list]:
        return made.order(epoch, np.arange(64)).tolist(), made.crops(epoch, ids, side, side)[0].tolist()

    base = plan(count=64)
    seen = [draw(base, 0), draw(base, 1), draw(plan(count=64, seed=1), 0), draw(plan(count=64, stage=1), 0)]
    for index, (order, boxes) in enumerate(seen):
        assert all(order != other for other, _ in seen[:index]) and all(boxes != other for _, other in seen[:index])
    assert draw(plan(count=64), 1) == seen[1]


def test_golden_values() -> None:
    """Bits that must never change: a resumed run would read other images."""
    made = SamplePlan(count=1000, seed=42, image_size=32)
    ids = made.order(3, np.arange(5))
    side = np.full(5, 100, dtype=np.int32)
    boxes, flips = made.crops(3, ids, side, side)
    assert ids.tolist() == GOLDEN_IDS
    assert boxes.tolist() == GOLDEN_BOXES
    assert flips.tolist() == GOLDEN_FLIPS


GOLDEN_IDS = [787, 868, 975, 662, 593]
GOLDEN_BOXES = [[1, 0, 99, 93], [39, 27, 60, 49], [4, 19, 81, 66], [24, 16, 76, 80], [14, 28, 63, 50]]
GOLDEN_FLIPS = [True, False, True, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count: expected at least 1"),
        ({"seed": -1}, "seed: expected"),
        ({"image_size": (32, 0)}, "image_size: expected"),
        ({"image_size": (1, 2, 3)}, "image_size: expected"),
        ({"scale": (0.0, 1.0)}, "scale: expected"),
        ({"scale": (0.5, 0.2)}, "scale: expected"),
        ({"ratio": (2.0, 1.0)}, "ratio: expected"),
        ({"flip": 1.5}, "flip: expected"),
        ({"interpolation": "nearest"}, "interpolation: expected bicubic or bilinear, got 'nearest'"),
        ({"centre": 0.0}, "centre: expected"),
        ({"stage": -1}, "stage: expected"),
    ],
)
def test_arguments_out_of_range(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(**changes)


def test_flip_is_a_chance_or_a_word() -> None:
    ids, side = np.arange(400), np.full(400, 50, dtype=np.int32)
    rates = [plan(flip=flip).crops(0, ids, side, side)[1].mean() for flip in (0.0, 1.0, True, False, 0.5)]
    assert rates[0] == 0 and rates[1] == 1 and rates[3] == 0 and rates[2] == rates[4] == pytest.approx(0.5, abs=0.13)
