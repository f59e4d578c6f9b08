"""Shards: what goes in comes out, from any number of processes; cut off, flipped and foreign files are noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohobate import data
from cohobate.data.decode import decode
from cohobate.data.headers import BadImage
from cohobate.data.video.decode import read_frames
from cohobate.data.video.manifest import VideoManifest, build_video_manifest
from cohobate.data.video.shards import ShardWriter, open_shard
from cohobate.errors import UserError


@pytest.fixture
def manifest(small_videos: Path) -> VideoManifest:
    return build_video_manifest(small_videos / "vp9", split="train")


def test_the_layout_is_as_documented(tmp_path: Path) -> None:
    """Read with nothing but the description at the top of the module."""
    import io
    import zlib

    writer = ShardWriter(tmp_path / "a.frames", ("kind",))
    writer.add("first", [b"one", b"two!"], size=(4, 6), rate=25.0, labels=[7])
    writer.add("second", [b"three"], size=(8, 8), rate=0.0, labels=[8])
    assert writer.close() == 2
    body = (tmp_path / "a.frames").read_bytes()
    begin, length, checksum = np.frombuffer(body[8:32], dtype="<u8").tolist()
    assert body[:8] == b"COHOFRM1" and not any(body[32:64]) and body[64:76] == b"onetwo!three"
    assert begin == 76 and begin + length == len(body) and zlib.crc32(body[begin:]) == checksum
    index = np.load(io.BytesIO(body[begin:]))
    assert index["first"].tolist() == [0, 2, 3] and index["begins"].tolist() == [64, 67, 71, 76]
    assert index["sums"].tolist() == [zlib.crc32(part) for part in (b"one", b"two!", b"three")]
    assert index["sizes"].tolist() == [[4, 6], [8, 8]] and index["labels"].tolist() == [[7], [8]]
    assert json.loads(index["meta"].tobytes())["names"] == ["first", "second"]
    shard = open_shard(str(tmp_path / "a.frames"))
    assert len(shard) == 2 and shard.length(0) == 2 and shard.jpeg(0, 1) == b"two!" and shard.jpeg(1, 0) == b"three"


def test_shards_hold_the_videos(manifest: VideoManifest, tmp_path: Path) -> None:
    counts = data.make_shards(manifest, tmp_path / "s", videos_per_shard=10, quality=95, processes=1)
    assert counts == {"videos": 24}
    assert sorted(path.name for path in (tmp_path / "s").glob("*.frames")) == [f"0000{i}.frames" for i in range(3)]
    sharded = build_video_manifest(tmp_path / "s")
    assert sharded.stills and sharded.codec(3) == "shard" and sharded.paths.relative(12) == "00001.frames#2"
    assert sharded.label_names == manifest.label_names
    for name in ("frames", "heights", "widths", "rates", "labels"):
        np.testing.assert_array_equal(getattr(sharded, name), getattr(manifest, name))
    for video in (0, 12, 23):
        for a, b in zip(read_frames(manifest, video, [0, 9, 31]), read_frames(sharded, video, [0, 9, 31])):
            # Quality 95 of saturated colours, their chroma subsampled a second time: luma is what stays.
            luma = (a.astype(float) - b) @ np.array([0.299, 0.587, 0.114])
            assert np.abs(luma).mean() < 2.5
    one = build_video_manifest(tmp_path / "s" / "00001.frames")
    assert len(one) == 10 and one.labels is not None and one.labels.tolist() == sharded.labels[10:20].tolist()  # type: ignore[index]
    assert len(build_video_manifest(tmp_path / "s", verify=True)) == 24


def test_processes_change_nothing_and_an_interrupted_call_goes_on(manifest: VideoManifest, tmp_path: Path) -> None:
    options: dict[str, Any] = {"videos_per_shard": 6, "short_side": 48}
    data.make_shards(manifest, tmp_path / "one", processes=1, **options)
    data.make_shards(manifest, tmp_path / "two", processes=2, **options)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == [*(f"0000{i}.frames" for i in range(4)), "fingerprint.json"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    assert build_video_manifest(tmp_path / "one").heights.tolist() == [48] * 24
    (tmp_path / "two" / "00002.frames").unlink()
    kept = (tmp_path / "two" / "00001.frames").stat().st_mtime_ns
    assert data.make_shards(manifest, tmp_path / "two", processes=1, **options) == {"videos": 24}
    assert (tmp_path / "two" / "00001.frames").stat().st_mtime_ns == kept
    assert (tmp_path / "one" / "00002.frames").read_bytes() == (tmp_path / "two" / "00002.frames").read_bytes()
    with pytest.raises(UserError, match="holds another"):
        data.make_shards(manifest, tmp_path / "two", processes=1, **(options | {"short_side": 40}))
    for bad, message in (({"quality": 0}, "quality: expected 1 to 100"), ({"short_side": 2}, "short_side: expected")):
        with pytest.raises(UserError, match=message):
            data.make_shards(manifest, tmp_path / "three", **bad)


def test_uneven_videos_are_stored_at_an_even_pace(
    videos: dict[str, tuple[bytes, int]], write: Any, tmp_path: Path
) -> None:
    manifest = build_video_manifest(write({"a.mp4": videos["uneven.mp4"][0]}))
    data.make_shards(manifest, tmp_path / "s", quality=100, processes=1)
    sharded = build_video_manifest(tmp_path / "s")
    for a, b in zip(read_frames(manifest, 0, range(32)), read_frames(sharded, 0, range(32))):
        assert np.abs((a.astype(float) - b) @ np.array([0.299, 0.587, 0.114])).mean() < 1.5


def test_bad_videos_are_left_out_and_listed(clip: np.ndarray, write: Any, tmp_path: Path) -> None:
    from cohobate.data.video.encode import encode_clip

    good = encode_clip(clip)
    folder = write({f"{index}.mp4": good for index in range(4)})
    manifest = build_video_manifest(folder)
    (folder / "1.mp4").write_bytes(good[:100])
    (folder / "3.mp4").unlink()
    assert data.make_shards(manifest, tmp_path / "s", processes=1) == {"videos": 2, "truncated": 1, "missing": 1}
    sharded = build_video_manifest(tmp_path / "s")
    assert len(sharded) == 2 and sharded.quarantine == (("1.mp4", "truncated"), ("3.mp4", "missing"))
    np.testing.assert_array_equal(
        np.stack([decode(open_shard(str(tmp_path / "s" / "00000.frames")).jpeg(1, frame)) for frame in (0, 31)]),
        np.stack(list(read_frames(sharded, 1, [0, 31]))),
    )
    for index in (0, 2):
        (folder / f"{index}.mp4").unlink()
    with pytest.raises(UserError, match=r"not one of 4 videos could be decoded \(3 missing, 1 truncated\)"):
        data.make_shards(manifest, tmp_path / "none", processes=1)


def test_damaged_shards(manifest: VideoManifest, tmp_path: Path) -> None:
    data.make_shards(manifest.subset(range(4)), tmp_path / "s", videos_per_shard=2, processes=1)
    body = (tmp_path / "s" / "00001.frames").read_bytes()
    middle = bytearray(body)
    middle[200] ^= 1
    index = bytearray(body)
    index[-100] ^= 1
    cases = {
        "zero": (b"", "empty"),
        "short": (body[:30], "truncated"),
        "cut": (body[:-1], "truncated"),
        "index": (bytes(index), "corrupt"),
        "foreign": (b"x" * 100, "unknown"),
    }
    for name, (content, reason) in cases.items():
        path = tmp_path / f"{name}.frames"
        path.write_bytes(content)
        with pytest.raises(BadImage) as raised:
            open_shard(str(path))
        assert raised.value.reason == reason, name
        (tmp_path / "s" / f"{name}.frames").write_bytes(content)
    (tmp_path / "s" / "middle.frames").write_bytes(bytes(middle))
    found = build_video_manifest(tmp_path / "s")
    assert len(found) == 6 and {Path(path).stem: reason for path, reason in found.quarantine} == {
        name: reason for name, (_, reason) in cases.items()
    }
    with pytest.raises(BadImage, match="decoded"):
        next(read_frames(found, 4, [0]))
    verified = build_video_manifest(tmp_path / "s", verify=True)
    assert len(verified) == 5
    assert (str(tmp_path / "s" / "middle.frames#0"), "corrupt") in verified.quarantine
    with pytest.raises(UserError, match="no usable shard"):
        build_video_manifest(tmp_path / "cut.frames")
