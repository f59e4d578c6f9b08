"""Clip plans: the sampling rules of both data sets against values worked out by hand, boxes, views."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cohobate.data import ClipPlan
from cohobate.errors import UserError


def plan(**changes: Any) -> ClipPlan:
    return ClipPlan(**({"count": 1000, "seed": 0, "image_size": 224} | changes))


def frames(made: ClipPlan, lengths: list[int], epoch: int = 0) -> list[list[list[int]]]:
    found: list[list[list[int]]] = made.clip_frames(epoch, np.arange(len(lengths)), np.array(lengths)).tolist()
    return found


# -- frames ------------------------------------------------------------------------------------------------------------


def test_kinetics() -> None:
    """Every 4th of 64 contiguous frames from a random start; the last index repeated where the video is short."""
    made = plan()
    assert frames(made, [64]) == [[list(range(0, 64, 4))]]
    assert frames(made, [30]) == [[[0, 4, 8, 12, 16, 20, 24, 28] + [28] * 8]]
    assert frames(made, [1]) == [[[0] * 16]]
    starts = [clip[0][0] for clip in frames(made, [67] * 1000)]
    assert sorted(set(starts)) == [0, 1, 2, 3]  # 67 - 64 = 3 is the last
    assert all(starts.count(start) > 250 - 5 * 14 for start in range(4))  # five deviations of 1000 draws of 1/4
    for clip, start in zip(frames(made, [67] * 50), starts):
        assert clip == [list(range(start, start + 64, 4))]


def test_something_something() -> None:
    """16 indices by linspace over a window of 32, its end included: a stride of 32/15, cut; then the last frame."""
    made = plan(stride=2, sampling="linspace")
    straight = [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 32]
    assert frames(made, [33])[0][0] in (straight, [1 + i if i < 32 else 32 for i in straight])
    assert frames(made, [32])[0][0] == [*straight[:-1], 31]
    assert frames(made, [20])[0][0] == [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 19, 19, 19, 19, 19, 19]
    reference = np.linspace(5, 5 + 32, 16).astype(int).tolist()
    assert reference == [5 + i for i in straight]
    assert max(clip[0][-1] for clip in frames(made, [60] * 500)) == 59


def test_segments() -> None:
    """One frame of each of eight equal parts."""
    made = plan(frames=8, sampling="segments")
    for clip in frames(made, [40] * 200):
        assert [index // 5 for index in clip[0]] == list(range(8))
    offsets = np.array(frames(made, [40] * 200))[:, 0] % 5
    assert [sorted(set(column.tolist())) for column in offsets.T] == [[0, 1, 2, 3, 4]] * 8
    assert frames(made, [3])[0][0] == sorted(frames(made, [3])[0][0])


def test_views_of_evaluation() -> None:
    """Windows from one end to the other, or several places inside each segment; a single one is in the middle."""
    clips = frames(plan(train=False, test_views=(5, 3)), [264])[0]
    assert [clip[0] for clip in clips] == [0, 50, 100, 150, 200]
    assert clips[4] == list(range(200, 264, 4))
    assert frames(plan(train=False), [264])[0][0][0] == 100
    two = frames(plan(train=False, frames=4, sampling="segments", test_views=(2, 3)), [40])[0]
    assert two == [[2, 12, 22, 32], [7, 17, 27, 37]]
    one = frames(plan(train=False, frames=4, sampling="segments"), [40])[0]
    assert one == [[5, 15, 25, 35]]


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 400),
    count=st.integers(1, 20),
    stride=st.integers(1, 9),
    sampling=st.sampled_from(["contiguous", "linspace", "segments"]),
    train=st.booleans(),
)
def test_frames_ascend_inside_the_video(length: int, count: int, stride: int, sampling: str, train: bool) -> None:
    made = plan(frames=count, stride=stride, sampling=sampling, train=train, test_views=(3, 1))
    found = made.clip_frames(2, np.arange(5), np.full(5, length))
    assert found.shape == (5, 1 if train else 3, count) and found.dtype == np.int64
    assert found.min() >= 0 and found.max() < length and (np.diff(found, axis=2) >= 0).all()
    np.testing.assert_array_equal(made.clip_frames(2, np.array([3]), np.array([length]))[0], found[3])


# -- boxes -------------------------------------------------------------------------------------------------------------


def test_multi_scale_crops() -> None:
    """Sides of 256, 224, 192 and 168 of 256, one step apart at most; 13 places; all about equally often; no flip."""
    ids = np.arange(13_000)
    high, wide = np.full(len(ids), 256, dtype=np.int32), np.full(len(ids), 340, dtype=np.int32)
    boxes, flips = plan().crops(0, ids, high, wide)
    sides = [256, 224, 192, 168]
    found = {(sides.index(int(h)), sides.index(int(w))) for h, w in boxes[:, 2:]}
    assert found == {(a, b) for a in range(4) for b in range(4) if abs(a - b) <= 1}
    places: dict[tuple[int, int], int] = {}
    for top, left, height, width in boxes.tolist():
        y, x = (256 - height) // 4, (340 - width) // 4
        at = (top // y if y else 0, left // x)
        if y:
            places[at] = places.get(at, 0) + 1
        assert top == at[0] * y and left == at[1] * x
    even = {(a, b) for a in (0, 2, 4) for b in (0, 2, 4)}
    assert set(places) == even | {(1, 1), (1, 3), (3, 1), (3, 3)}
    mean = sum(places.values()) / 13
    assert all(abs(count - mean) < 5 * mean**0.5 for count in places.values())
    assert not flips.any() and plan(flip=1.0).crops(0, ids, high, wide)[1].all()


def test_random_resized_crops_are_the_images() -> None:
    from cohobate.data import SamplePlan

    ids, side = np.arange(50), np.full(50, 90, dtype=np.int32)
    video = plan(crop="random_resized", scale=(0.08, 1.0), flip=0.5).crops(4, ids, side, side)
    image = SamplePlan(1000, 0, 224, scale=(0.08, 1.0)).crops(4, ids, side, side)
    np.testing.assert_array_equal(video[0], image[0])
    np.testing.assert_array_equal(video[1], image[1])


def test_three_crops_along_the_longer_side() -> None:
    made = plan(train=False, test_views=(2, 3))
    ids = np.arange(12)  # two videos, wide and high
    heights = np.repeat(np.array([256, 400], dtype=np.int32), 6)
    widths = np.repeat(np.array([340, 300], dtype=np.int32), 6)
    boxes, flips = made.crops(0, ids, heights, widths)
    assert boxes[:6].tolist() == [[0, 0, 256, 256], [0, 42, 256, 256], [0, 84, 256, 256]] * 2
    assert boxes[6:].tolist() == [[0, 0, 300, 300], [50, 0, 300, 300], [100, 0, 300, 300]] * 2
    assert not flips.any()
    assert plan(train=False).crops(0, ids[:1], heights[:1], widths[:1])[0].tolist() == [[0, 42, 256, 256]]


# -- views -------------------------------------------------------------------------------------------------------------


def test_views_share_frames_and_not_boxes() -> None:
    """Repeated sampling: the frames are the video's, the box is the view's; one view is what no repeats would give."""
    single, made = plan(count=50), plan(count=50, repeats=4)
    assert (single.views, made.views, plan(train=False, test_views=(5, 3), repeats=4).views) == (1, 4, 15)
    assert frames(single, [300] * 9, 3) == frames(made, [300] * 9, 3)
    side = np.full(40, 300, dtype=np.int32)
    boxes, _ = made.crops(3, np.arange(40), side, side)
    assert len(np.unique(boxes[:4], axis=0)) > 1 and len(np.unique(boxes, axis=0)) > 20
    # A batch of 8 samples has two videos; an epoch still has each video once.
    assert made.steps_per_epoch(8) == 25 and made.places(30, 8)[:2][0] == 1
    order = np.concatenate([made.order(0, made.places(step, 8)[1]) for step in range(25)])
    np.testing.assert_array_equal(np.sort(order), np.arange(50))


def test_epochs_and_seeds_differ_and_hash_says_so() -> None:
    base = plan()
    assert frames(base, [300] * 5) != frames(base, [300] * 5, 1) != frames(plan(seed=1), [300] * 5)
    made = [
        plan(),
        plan(frames=8),
        plan(stride=2),
        plan(sampling="linspace"),
        plan(repeats=2),
        plan(crop="random_resized"),
    ]
    assert len({other.hash for other in made}) == len(made)


def test_golden_values() -> None:
    """Numbers that must never change: a resumed run would read other frames."""
    made = ClipPlan(count=1000, seed=42, image_size=32, frames=4, repeats=2)
    assert made.clip_frames(3, np.arange(3), np.full(3, 100))[:, 0].tolist() == GOLDEN_FRAMES
    side = np.full(3, 100, dtype=np.int32)
    assert made.crops(3, np.arange(3), side, side)[0].tolist() == GOLDEN_BOXES


GOLDEN_FRAMES = [[32, 36, 40, 44], [66, 70, 74, 78], [13, 17, 21, 25]]
GOLDEN_BOXES = [[12, 0, 75, 87], [12, 12, 87, 87], [18, 8, 75, 66]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames: expected at least 1, got 0"),
        ({"stride": 0}, "stride: expected at least 1"),
        ({"sampling": "dense"}, "sampling: expected one of contiguous, linspace, segments, got 'dense'"),
        ({"crop": "centre"}, "crop: expected one of multi_scale, random_resized"),
        ({"repeats": 0}, "repeats: expected at least 1"),
        ({"test_views": (0, 3)}, r"test_views: expected \(clips, crops\)"),
        ({"image_size": (0, 3)}, "image_size: expected"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(**changes)
