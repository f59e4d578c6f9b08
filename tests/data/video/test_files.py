"""Every kind of video file: the very frames that were asked for, or left out for the right reason."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation

from cohobate import data
from cohobate.data.headers import BadImage
from cohobate.data.video import pyav
from cohobate.data.video.manifest import VideoManifest, build_video_manifest, frame_names
from cohobate.errors import UserError


def names(manifest: VideoManifest) -> list[str]:
    return [manifest.paths.relative(index) for index in range(len(manifest))]


def all_shown(body: bytes) -> dict[int, np.ndarray]:
    """Every frame of a file by its time, decoded from the start by PyAV alone; frames after damage are missing."""
    shown = {}
    exact = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
    with av.open(io.BytesIO(body)) as file:
        try:
            for frame in file.decode(video=0):
                shown[frame.pts] = frame.to_ndarray(format="rgb24", interpolation=exact)
        except av.error.FFmpegError:
            pass
    return dict(sorted(shown.items()))


# -- frames ------------------------------------------------------------------------------------------------------------


def test_every_kind_of_file(
    videos: dict[str, tuple[bytes, int]], no_videos: dict[str, tuple[bytes, str]], write: Callable[..., Path]
) -> None:
    folder = write(
        {name: body for name, (body, _) in (videos | no_videos).items()} | {"notes.txt": b"-", ".hidden.mp4": b""}
    )
    manifest = build_video_manifest(folder)
    assert names(manifest) == sorted(videos)
    assert {Path(path).name: reason for path, reason in manifest.quarantine} == {
        name: reason for name, (_, reason) in no_videos.items()
    }
    assert {reason for _, reason in manifest.quarantine} <= set(data.REASONS)
    assert manifest.ignored == 1 and manifest.labels is None
    for index, name in enumerate(names(manifest)):
        length = videos[name][1]
        if length:
            assert manifest.frames[index] == length, name
        else:
            assert 5 < manifest.frames[index] < 32, name  # half of it is there
        assert manifest.sizes[index] == len(videos[name][0])
        size = (64, 48) if name == "turned.mp4" else (64, 64)
        assert (manifest.heights[index], manifest.widths[index]) == size, name
        odd = name in ("turned.mp4", "ten_bits.mp4", "full_colour.mp4") or name.startswith("uneven")
        assert manifest.plain_video[index] != odd, name
        if name not in ("one_frame.mp4",) and not name.startswith("uneven"):
            assert manifest.rates[index] == pytest.approx(30, rel=0.01), name
    assert manifest.codec(names(manifest).index("webm_called.mp4")) == "vp9"
    text = data.describe(manifest)
    assert f"videos      {len(videos)}" in text and "frames      1 to 32" in text and "stored as   h264: " in text


def test_any_frame_is_the_one_of_a_full_decode(
    videos: dict[str, tuple[bytes, int]], write: Callable[..., Path]
) -> None:
    """Seeking into open GOPs, B-frames, truncated and uneven files finds exactly the frames counted from the start."""
    folder = write({name: body for name, (body, _) in videos.items()})
    for name, (body, _) in videos.items():
        path = str(folder / name)
        length = pyav.probe(path).frames
        whole = np.stack(list(pyav.read(path, range(length), length)))
        shown = all_shown(body)
        if not name.startswith(("uneven", "turned")):
            assert len(whole) == length and abs(len(shown) - length) <= 2, name  # PyAV alone stops at the damage
            for frame, expected in zip(whole, shown.values()):
                np.testing.assert_array_equal(frame, expected, err_msg=name)
        for wanted in ([0], [5], [15, 16, 17], [11, 12, 13], [20, 30], [24], [31], [0, 31]):
            asked = [index for index in wanted if index < length]
            if asked:
                got = np.stack(list(pyav.read(path, asked, length)))
                np.testing.assert_array_equal(got, whole[asked], err_msg=f"{name} {asked}")


def test_uneven_times_give_an_even_pace(videos: dict[str, tuple[bytes, int]], write: Callable[..., Path]) -> None:
    """16 frames 1/60 s apart, then 16 at 1/15 s: evenly in time they are few of the first and all of the others."""
    body, _ = videos["uneven.mp4"]
    path = str(write({"uneven.mp4": body}) / "uneven.mp4")
    every = list(all_shown(body).values())
    times = np.array([index * 10 if index < 16 else 160 + (index - 16) * 40 for index in range(32)])
    expected = [int(np.flatnonzero(times <= time + 0.02)[-1]) for time in np.linspace(0, times[-1], 32)]
    assert expected.count(31) == 1 and len(set(expected)) < 25 and expected != list(range(32))
    for frame, index in zip(pyav.read(path, range(32), 32), expected):
        np.testing.assert_array_equal(frame, every[index])
    assert len(list(pyav.read(path, [3, 20, 21], 32))) == 3


def test_rotation_is_undone(clip: np.ndarray, make_video: Callable[..., bytes], write: Callable[..., Path]) -> None:
    stored = np.repeat(clip[:1, :48], 2, axis=0)
    files = {f"{turn}.mp4": make_video(stored, turn=turn) for turn in (0, 90, 180, -90)}
    folder = write(files)
    plain = next(pyav.read(str(folder / "0.mp4"), [0], 2))
    for turn in (90, 180, -90):
        shown = next(pyav.read(str(folder / f"{turn}.mp4"), [0], 2))
        with av.open(str(folder / f"{turn}.mp4")) as file:
            says = next(file.decode(video=0)).rotation  # counter-clockwise, as libavutil's display.h has it
        assert (says - turn) % 360 == 0
        np.testing.assert_array_equal(shown, np.rot90(plain, turn // 90))


def test_damage_and_change_are_noticed(videos: dict[str, tuple[bytes, int]], write: Callable[..., Path]) -> None:
    body = bytearray(videos["h264.mp4"][0])
    body[len(body) * 2 // 5 : len(body) * 2 // 3] = bytes(len(body) * 2 // 3 - len(body) * 2 // 5)
    folder = write({"holed.mp4": bytes(body), "good.mp4": videos["h264.mp4"][0]})
    with pytest.raises(BadImage) as raised:
        list(pyav.read(str(folder / "holed.mp4"), range(32), 32))
    assert raised.value.reason == "corrupt"
    assert len(build_video_manifest(folder)) == 2
    assert names(build_video_manifest(folder, verify=True)) == ["good.mp4"]
    with pytest.raises(BadImage) as raised:
        list(pyav.read(str(folder / "good.mp4"), [0], 40))
    assert raised.value.reason == "changed"
    assert [r for _, r in build_video_manifest(folder, max_pixels=4096).quarantine] == []
    with pytest.raises(UserError, match=r"no usable video in .* \(2 too_large"):
        build_video_manifest(folder, max_pixels=4095)


def test_grey_is_luma(videos: dict[str, tuple[bytes, int]], write: Callable[..., Path]) -> None:
    path = str(write({"a.mp4": videos["h264.mp4"][0]}) / "a.mp4")
    grey, colour = (np.stack(list(pyav.read(path, [3, 9], 32, channels))) for channels in (1, 3))
    assert grey.shape == (2, 64, 64, 1)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert abs(float((grey[..., 0] - luma).mean())) < 3 and np.corrcoef(grey.ravel(), luma.ravel())[0, 1] > 0.98


# -- data sets ---------------------------------------------------------------------------------------------------------


def test_layouts_and_labels(videos: dict[str, tuple[bytes, int]], write: Callable[..., Path], encode: Any) -> None:
    body = videos["vp9.webm"][0]
    photo = encode(np.full((16, 16, 3), 90, dtype=np.uint8))
    classes = build_video_manifest(
        write({"run/1.webm": body, "jump/a/1.jpg": photo, "jump/a/2.jpg": photo, "run/2.webm": body}, "classes")
    )
    assert names(classes) == ["jump/a", "run/1.webm", "run/2.webm"] and classes.class_names == ("jump", "run")
    assert classes.labels is not None and classes.labels.tolist() == [[0], [1], [1]]
    assert [classes.codec(index) for index in range(3)] == ["frames", "vp9", "vp9"]
    assert classes.frames.tolist() == [2, 32, 32] and not classes.stills
    folder = write({"my clip 7.webm": body, "frames/b/1.jpg": photo}, "listed")
    (folder / "list.txt").write_text("# labels: kind\nmy clip 7.webm 4\nframes/b 5\ngone.mp4 6\n")
    listed = build_video_manifest(folder / "list.txt")
    assert names(listed) == ["my clip 7.webm", "frames/b"] and listed.label_names == ("kind",)
    assert listed.labels is not None and listed.labels.tolist() == [[4], [5]]
    assert [reason for _, reason in listed.quarantine] == ["missing"]
    flat = build_video_manifest(write({"b.webm": body, "a.webm": body, "photo.jpg": photo}, "flat"))
    assert names(flat) == ["a.webm", "b.webm"] and flat.ignored == 1 and flat.labels is None


def test_frame_folders(write: Callable[..., Path], encode: Any, make_picture: Any) -> None:
    """Sorted by number, not by name; a folder of nothing, another size in the middle, a folder that shrank."""
    photo = [encode(make_picture(20, 24, index)) for index in range(12)]
    files = {f"a/img_{index}.jpg": photo[index] for index in range(12)} | {"a/notes.txt": b"-", "b/x.png": b""}
    folder = write(files)
    assert frame_names(str(folder / "a")) == [f"img_{index}.jpg" for index in range(12)]
    manifest = build_video_manifest(folder)
    assert names(manifest) == ["a"] and manifest.stills and bool(manifest.plain_jpeg[0])
    assert manifest.frames.tolist() == [12] and (manifest.heights[0], manifest.widths[0]) == (20, 24)
    assert [(Path(path).name, reason) for path, reason in manifest.quarantine] == [("b", "empty")]
    (folder / "a" / "img_5.jpg").write_bytes(encode(make_picture(24, 20)))
    assert len(build_video_manifest(folder)) == 1
    with pytest.raises(UserError, match="no usable video"):
        build_video_manifest(folder, verify=True)


def test_nothing_there(tmp_path: Path, write: Callable[..., Path], encode: Any) -> None:
    (tmp_path / "empty").mkdir()
    photo = encode(np.zeros((8, 8, 3), dtype=np.uint8))
    for source, message in (
        (tmp_path / "missing", "expected a folder of videos or a file that lists them"),
        (tmp_path / "empty", "expected videos in .*, found an empty folder"),
        (write({"a.jpg": photo}, "photos"), "found 1 files, but none named like a video"),
        (write({"a.mp4": b""}, "zero"), r"no usable video in .* \(1 empty"),
    ):
        with pytest.raises(UserError, match=message):
            build_video_manifest(source)


def test_saved_cached_and_hashed(
    small_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_set: Path
) -> None:
    cache = tmp_path / "m.npz"
    first = build_video_manifest(small_videos / "vp9", split="test", cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(pyav, "probe", lambda *_: pytest.fail("a file was opened"))
        again = build_video_manifest(small_videos / "vp9", split="test", cache=cache)
    assert again.hash == first.hash and again.codec(0) == "vp9" and again.labels is not None
    for name in VideoManifest.ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    assert first.subset([1, 0]).hash != first.hash and first.subset(range(8)).hash == first.hash
    other = build_video_manifest(small_videos / "mjpeg", split="test")
    assert other.hash != first.hash
    with pytest.raises(UserError, match="expected a saved manifest"):
        data.Manifest.load(cache)
    assert len(data.build_manifest(small_set, split="test", cache=cache)) == 40  # not this one: made again


def test_without_pyav(monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path], clip: np.ndarray) -> None:
    import sys

    folder = write({"a.mp4": b"\0" * 100})
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"expected PyAV .* not installed \(pip install 'av>=18'\)"):
        build_video_manifest(folder)
