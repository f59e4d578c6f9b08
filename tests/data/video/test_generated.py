"""The generated videos: determined by their parameters, their motions measurable, their mean colours mute."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cohobate import data
from cohobate.data import generated as files
from cohobate.data.video import generated
from cohobate.data.video.generated import MOTIONS, TEXTURES, draw_clip
from cohobate.data.video.manifest import build_video_manifest
from cohobate.errors import UserError


def test_a_clip_depends_on_nothing_but_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", 4)  # several tasks for the processes
    few = data.make_videos(tmp_path / "few", train=3, test=1, codec="mjpeg", processes=1)
    many = data.make_videos(tmp_path / "many", train=10, test=1, codec="mjpeg", processes=2)
    for index in range(3):
        name = f"train/{index:06d}.avi"
        assert (few / name).read_bytes() == (many / name).read_bytes()
    base = draw_clip("train", 5)[0].astype(int)
    for other in (("test", 5, 0), ("train", 5, 1), ("train", 37, 0)):
        clip, labels = draw_clip(*other)
        assert labels == (1, 1) and np.abs(clip - base).mean() > 10
    assert data.make_videos(few, train=3, test=1, codec="mjpeg") == few
    with pytest.raises(UserError, match="holds another generated set"):
        data.make_videos(few, train=3, test=1, codec="vp9")


def test_files_and_labels(small_videos: Path) -> None:
    for codec, suffix in (("h264", "mp4"), ("vp9", "webm"), ("mjpeg", "avi")):
        manifest = build_video_manifest(small_videos / codec, split="train")
        index = np.arange(24)
        assert manifest.label_names == ("texture", "motion") and manifest.labels is not None
        np.testing.assert_array_equal(manifest.labels, np.stack([index % 4, index // 4 % 8], axis=1))
        assert manifest.codec(0) == codec and manifest.paths[0].endswith(f"000000.{suffix}")
        assert manifest.frames.tolist() == [32] * 24 and manifest.plain_video.all()
    assert json.loads((small_videos / "vp9" / "fingerprint.json").read_text())["codec"] == "vp9"
    for arguments, message in (
        ({"train": 0}, "train: expected at least 1 clip"),
        ({"codec": "av1"}, "codec: expected one of h264, vp9, mjpeg, got 'av1'"),
        ({"seed": -1}, "seed: expected 0"),
    ):
        with pytest.raises(UserError, match=message):
            data.make_videos(small_videos / "other", **arguments)  # type: ignore[arg-type]


def moved(first: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The picture seen at x, y (pixels), nearest; NaN outside."""
    columns, rows = np.rint(x).astype(int), np.rint(y).astype(int)
    inside = (rows >= 0) & (rows < 64) & (columns >= 0) & (columns < 64)
    seen = np.full(first.shape, np.nan)
    seen[inside] = first[rows[inside], columns[inside]]
    return seen


def test_motions_can_be_measured() -> None:
    """Of the eight motions, the true one explains a later frame by an earlier one best, for most clips of each."""
    axis = np.arange(64, dtype=float)
    x, y = np.meshgrid(axis, axis)
    u, v, steps = x - 31.5, y - 31.5, 4
    shift, scale, angle = 0.016 * 64 * steps, np.exp(0.025 * steps), 0.042 * steps
    c, s = np.cos(angle), np.sin(angle)
    guesses = {
        "right": (x - shift, y),
        "left": (x + shift, y),
        "down": (x, y - shift),
        "up": (x, y + shift),
        "zoom in": (u / scale + 31.5, v / scale + 31.5),
        "zoom out": (u * scale + 31.5, v * scale + 31.5),
        "turn left": (c * u - s * v + 31.5, s * u + c * v + 31.5),
        "turn right": (c * u + s * v + 31.5, -s * u + c * v + 31.5),
    }
    right = dict.fromkeys(MOTIONS, 0)
    for index in range(96):
        clip, (_, motion) = draw_clip("train", index)
        grey = clip.astype(float).mean(3)
        errors = [np.nanmean((moved(grey[12], *guess) - grey[12 + steps]) ** 2) for guess in guesses.values()]
        right[MOTIONS[motion]] += list(guesses)[int(np.argmin(errors))] == MOTIONS[motion]
    assert min(right.values()) >= 8, right  # of 12 clips each; chance: 1.5


def test_mean_colour_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vote of 9 neighbours in the mean colours of the first and last frames is right as often as chance.

    300 guesses at 1/4 have a deviation of 0.025, at 1/8 of 0.019: five of them are allowed. Clips of four frames only.
    """
    monkeypatch.setattr(generated, "FRAMES", 4)
    train, test = 700, 300
    drawn = [draw_clip("train", index) for index in range(train + test)]
    means = np.array([clip[[0, -1]].reshape(2, -1, 3).mean(1).ravel() for clip, _ in drawn])
    labels = np.array([pair for _, pair in drawn])
    distances = ((means[train:, None] - means[None, :train]) ** 2).sum(2)
    nearest = np.argpartition(distances, 9, axis=1)[:, :9]
    for kind, (count, allowed) in enumerate(((len(TEXTURES), 0.375), (len(MOTIONS), 0.22))):
        votes = np.apply_along_axis(np.bincount, 1, labels[:train, kind][nearest], minlength=count)
        assert (votes.argmax(1) == labels[train:, kind]).mean() < allowed, generated.LABEL_NAMES[kind]
