"""torchcodec: the frames PyAV finds, whatever torchcodec makes of a file; and when it is taken, and why not.

Everything runs on a stand-in with torchcodec's interface, and again on torchcodec itself where it works.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation

from cohobate import data
from cohobate.data import ClipPlan
from cohobate.data.headers import BadImage
from cohobate.data.video import decode, pyav, torchcodec
from cohobate.data.video.encode import encode_clip
from cohobate.data.video.manifest import build_video_manifest
from cohobate.data.video.reading import ClipReader
from cohobate.errors import UserError

WORKS = torchcodec.why_not()
torchcodec.why_not.cache_clear()


class StandIn:
    """``torchcodec.decoders.VideoDecoder`` over PyAV: RGB by FFmpeg's quick conversion, upright, or RuntimeError."""

    late = 0.0  # s by which it misses the frames asked for
    broken = False

    def __init__(self, source: Any, *, custom_frame_mappings: str | None = None, **options: Any) -> None:
        assert (options["dimension_order"], options["num_ffmpeg_threads"], options["device"]) == ("NHWC", 1, "cpu")
        self.frames: dict[int, Any] = {}
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            stream = file.streams[options.get("stream_index", 0)]
            self.tick = float(stream.time_base)
            try:
                for frame in file.decode(stream):
                    pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                    self.frames[frame.pts] = np.ascontiguousarray(pixels)
            except av.error.FFmpegError as error:
                raise RuntimeError("Could not push packet to decoder") from error
        times = sorted(self.frames)
        self.times = times if custom_frame_mappings is None else self._mapped(json.loads(custom_frame_mappings))

    def _mapped(self, mapping: dict[str, Any]) -> list[int]:
        assert all(row["duration"] > 0 and row["key_frame"] in (0, 1) for row in mapping["frames"])
        assert any(row["key_frame"] for row in mapping["frames"])
        return [row["pts"] for row in mapping["frames"]]

    def get_frames_at(self, indices: list[int]) -> Any:
        if self.broken or any(self.times[index] not in self.frames for index in indices):
            raise RuntimeError("Requested next frame while there are no more frames left to decode")
        times = [self.times[index] for index in indices]
        pixels = torch.from_numpy(np.stack([self.frames[time] for time in times]))
        seconds = torch.tensor([time * self.tick + self.late for time in times], dtype=torch.float64)
        return SimpleNamespace(data=pixels, pts_seconds=seconds)


def module_of(decoder: type, version: str = "0.13.0+cpu") -> dict[str, ModuleType]:
    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    package.__version__, decoders.VideoDecoder = version, decoder  # type: ignore[attr-defined]
    return {"torchcodec": package, "torchcodec.decoders": decoders}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is remembered of another test's torchcodec, and the choice is the usual one."""
    monkeypatch.delenv("COHOBATE_VIDEO_DECODER", raising=False)
    torchcodec.why_not.cache_clear()
    yield
    torchcodec.why_not.cache_clear()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    for name, module in module_of(StandIn).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(StandIn, "late", 0.0)
    monkeypatch.setattr(StandIn, "broken", False)
    return StandIn


@pytest.fixture(params=["stand-in", "torchcodec"])
def decoder(request: pytest.FixtureRequest) -> str:
    if request.param == "torchcodec" and WORKS:
        pytest.skip(WORKS)
    if request.param == "stand-in":
        request.getfixturevalue("stand_in")
    return str(request.param)


def quick(path: str, wanted: list[int], length: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """PyAV's frames in FFmpeg's quick conversion."""
    with monkeypatch.context() as patch:
        patch.setattr(pyav, "_conversion", lambda: int(Interpolation.BILINEAR))
        return np.stack(list(pyav.read(path, wanted, length)))


# -- frames ------------------------------------------------------------------------------------------------------------


def test_every_frame_is_pyavs(
    decoder: str, videos: dict[str, tuple[bytes, int]], write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its quick conversion, from open GOPs, B-frames, rotated, uneven and truncated files; alone or together."""
    folder = write({name: body for name, (body, _) in videos.items()})
    assert decode.video_decoder() == "torchcodec"
    by_pyav = []
    for name in videos:
        path = str(folder / name)
        length = pyav.probe(path).frames
        assert decode.why_not_decoder("torchcodec") == ""
        for wanted in (list(range(length)), [0], [5], [11, 12, 13], [20, 30], [0, 31]):
            asked = [index for index in wanted if index < length]
            if not asked:
                continue
            got = np.stack(list(torchcodec.read(path, asked, length)))
            assert got.dtype == np.uint8
            if torchcodec._decoded(path, asked, length) is None:
                by_pyav.append(name)
                np.testing.assert_array_equal(got, np.stack(list(pyav.read(path, asked, length))), err_msg=name)
                continue
            expected = quick(path, asked, length, monkeypatch)
            assert got.shape == expected.shape, name
            difference = np.abs(got.astype(int) - expected).mean()
            # Releases of FFmpeg differ in how they take 10 bits to 8; another frame would be 15 and more.
            assert difference < (5 if name == "ten_bits.mp4" else 0.5), (name, asked, difference)
    # torchcodec misses the first frames of transport streams, and stops at damage.
    assert set(by_pyav) <= {"stream.ts", "truncated_faststart.mp4", "truncated.avi", "truncated.webm"}
    assert decoder == "stand-in" or "stream.ts" in by_pyav


def test_what_is_not_subsampled_has_equal_pixels(
    decoder: str, videos: dict[str, tuple[bytes, int]], write: Callable[..., Path]
) -> None:
    """Of 4:4:4 both conversions are one; of 4:2:0 the quick one is darker, and this is what it costs."""
    folder = write({name: videos[name][0] for name in ("full_colour.mp4", "h264.mp4")})
    one, other = (
        [np.stack(list(read(str(folder / name), range(32), 32))).astype(int) for read in (torchcodec.read, pyav.read)]
        for name in ("full_colour.mp4", "h264.mp4")
    )
    np.testing.assert_array_equal(*one)
    difference = other[0] - other[1]
    assert -2 < difference.mean() < -0.5 and 1 < np.abs(difference).mean() < 10


def test_a_frame_of_another_time_is_not_taken(
    stand_in: type[StandIn], videos: dict[str, tuple[bytes, int]], write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = str(write({"a.mp4": videos["h264.mp4"][0]}) / "a.mp4")
    exact = np.stack(list(pyav.read(path, [3, 9], 32)))
    assert not np.array_equal(np.stack(list(torchcodec.read(path, [3, 9], 32))), exact)
    for attribute, value in (("late", 1 / 30), ("late", -1 / 30), ("broken", True)):
        with monkeypatch.context() as patch:
            patch.setattr(stand_in, attribute, value)
            np.testing.assert_array_equal(np.stack(list(torchcodec.read(path, [3, 9], 32))), exact)


def test_reasons_are_pyavs(
    decoder: str, no_videos: dict[str, tuple[bytes, str]], videos: dict[str, tuple[bytes, int]],
    write: Callable[..., Path],
) -> None:  # fmt: skip
    holed = bytearray(videos["h264.mp4"][0])
    holed[len(holed) * 2 // 5 : len(holed) * 2 // 3] = bytes(len(holed) * 2 // 3 - len(holed) * 2 // 5)
    bodies = {name: body for name, (body, _) in no_videos.items()} | {"holed.mp4": bytes(holed)}
    folder = write(bodies | {"good.mp4": videos["h264.mp4"][0]})
    expected = {name: reason for name, (_, reason) in no_videos.items()}
    for name, reason in (expected | {"holed.mp4": "corrupt", "gone.mp4": "missing"}).items():
        with pytest.raises(BadImage) as raised:
            list(torchcodec.read(str(folder / name), range(32), 32))
        assert raised.value.reason == reason, name
    with pytest.raises(BadImage) as raised:
        list(torchcodec.read(str(folder / "good.mp4"), [0], 40))
    assert raised.value.reason == "changed"


def test_grey_is_pyavs(decoder: str, videos: dict[str, tuple[bytes, int]], write: Callable[..., Path]) -> None:
    path = str(write({"a.mp4": videos["h264.mp4"][0]}) / "a.mp4")
    for got, expected in zip(torchcodec.read(path, [3, 9], 32, 1), pyav.read(path, [3, 9], 32, 1), strict=True):
        np.testing.assert_array_equal(got, expected)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_the_torch_loader_decodes_with_it_and_nothing_else_does(
    decoder: str, clip: np.ndarray, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same videos, frames and boxes; shards and what stands beside DALI's rows keep the exact colours."""
    folder = write({f"{index}.mp4": encode_clip(np.roll(clip, 3 * index, 1)) for index in range(8)})
    manifest = build_video_manifest(folder)
    plan = ClipPlan(8, 0, 48, frames=8, stride=2, repeats=2)

    def batches(workers: int = 0, start: int = 0) -> list[data.Batch]:
        options: dict[str, Any] = {"batch_size": 4, "loader": "torch", "workers": workers, "start": start}
        with data.open_loader(manifest, plan, **options) as loader:
            return [next(loader) for _ in range(4 - start)]

    taken = batches()
    reader = ClipReader(dataclasses.replace(manifest, plain_video=np.zeros(8, dtype=bool)), plan, 4, 0, 1, 3)
    beside = reader.encoded(reader.task(0), 0)  # what DALI is not asked for
    assert isinstance(beside, torch.Tensor)
    monkeypatch.setenv("COHOBATE_VIDEO_DECODER", "pyav")
    exact = batches()
    assert torch.equal(beside, exact[0].pixels[:2])
    for one, other in zip(taken, exact):
        assert torch.equal(one.sample_ids, other.sample_ids) and torch.equal(one.valid, other.valid)
        assert 0.5 < (one.pixels.int() - other.pixels.int()).abs().float().mean() < 10
    data.make_shards(manifest, tmp_path / "exact", processes=1)
    monkeypatch.setenv("COHOBATE_VIDEO_DECODER", "torchcodec")
    data.make_shards(manifest, tmp_path / "other", processes=1)
    names = [path.name for path in (tmp_path / "exact").glob("*.frames")]
    assert all((tmp_path / "exact" / n).read_bytes() == (tmp_path / "other" / n).read_bytes() for n in names) and names
    for again in (batches(workers=2), [*taken[:2], *batches(start=2)]):
        assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(taken, again, strict=True))


def test_one_that_cannot_be_used_is_refused_when_the_loader_opens(
    clip: np.ndarray, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = build_video_manifest(write({"a.mp4": encode_clip(clip)}))
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    for wanted, said in (
        ("torchcodec", "COHOBATE_VIDEO_DECODER: 'torchcodec' cannot be used: torchcodec is not installed"),
        ("ffmpeg", "COHOBATE_VIDEO_DECODER: expected one of auto, torchcodec, pyav; got 'ffmpeg'"),
    ):
        monkeypatch.setenv("COHOBATE_VIDEO_DECODER", wanted)
        with pytest.raises(UserError, match=said):
            data.open_loader(manifest, ClipPlan(1, 0, 32), batch_size=1, loader="torch")


# -- the choice --------------------------------------------------------------------------------------------------------

NO_FFMPEG = "Could not load libtorchcodec. Likely causes: ...\n" + "\n".join(
    f"OSError: libavutil.so.{number}: cannot open shared object file: No such file or directory\n"
    "The above exception was the direct cause of the following exception:\n"
    f"OSError: Could not load this library: /site/torchcodec/libtorchcodec_core{number - 52}.so"
    for number in (60, 59, 58)
)
OTHER_TORCH = NO_FFMPEG + "\nOSError: /site/torchcodec/libtorchcodec_core5.so: undefined symbol: _ZN3c105"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (f"raise RuntimeError({NO_FFMPEG!r})",
         "torchcodec finds no FFmpeg library (libavutil.so.60, libavutil.so.59, libavutil.so.58)"),
        (f"raise RuntimeError({OTHER_TORCH!r})",
         "torchcodec was built for another torch or FFmpeg (.../site/torchcodec/libtorchcodec_core5.so: undefined "
         "symbol: _ZN3c105)"),
        ("raise OSError('libcudart.so.13: cannot')", "torchcodec does not work (OSError: libcudart.so.13: cannot)"),
        ("import torchcodec_internals", "torchcodec_internals is not installed"),
        ("__version__ = '0.9.1'", "torchcodec 0.9.1 is older than 0.13"),
        ("__version__ = '0.14.0'", "torchcodec.decoders is not installed"),
    ],
)  # fmt: skip
def test_an_install_that_does_not_work_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    """It imports, or would, and then there is no FFmpeg, or one of another build."""
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").write_text(source)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert torchcodec.why_not() == reason
        assert decode.video_decoder() == "pyav"
        assert decode.describe_decoder() == f"pyav {av.__version__}"
    finally:
        sys.modules.pop("torchcodec", None)


def test_one_that_decodes_wrongly_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dark(StandIn):
        def get_frames_at(self, indices: list[int]) -> Any:
            found = super().get_frames_at(indices)
            return SimpleNamespace(data=found.data // 2, pts_seconds=found.pts_seconds)

    for name, module in module_of(Dark).items():
        monkeypatch.setitem(sys.modules, name, module)
    assert torchcodec.why_not() == "torchcodec decodes wrongly: expected levels [16, 156], got [8, 78]"
    assert decode.video_decoder() == "pyav"


def test_the_choice(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchcodec.why_not() == "" and decode.describe_decoder().startswith("torchcodec 0.")
    monkeypatch.setenv("COHOBATE_VIDEO_DECODER", "pyav")
    assert decode.video_decoder() == "pyav"
    monkeypatch.delenv("COHOBATE_VIDEO_DECODER")
    monkeypatch.setitem(sys.modules, "av", None)
    assert "expected PyAV" in decode.why_not_decoder("torchcodec")  # it says when frames are shown
    assert decode.describe_decoder().startswith("none: expected PyAV for video files")
