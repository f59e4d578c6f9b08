"""Every kind of file: decoded right, or left out for the right reason; and what makes a data set of them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from cohobate import data
from cohobate.data import decode as decoding
from cohobate.data.decode import decode, upright
from cohobate.data.headers import BadImage
from cohobate.data.manifest import Manifest, Paths, build_manifest
from cohobate.errors import UserError


def reasons(manifest: Manifest) -> dict[str, str]:
    return {Path(path).name: reason for path, reason in manifest.quarantine}


def names(manifest: Manifest) -> list[str]:
    return [manifest.paths.relative(index) for index in range(len(manifest))]


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False], ids=["simplejpeg", "pillow"])
@pytest.mark.parametrize("channels", [3, 1])
def test_every_good_file_is_its_picture(
    good: dict[str, bytes], make_picture: Callable, channels: int, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against Pillow's own conversion of the undamaged original; what each format loses is allowed for."""
    if fast:
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(decoding, "simplejpeg", None)
    original = Image.fromarray(make_picture(48, 64))
    mode = "RGB" if channels == 3 else "L"
    for name, body in good.items():
        if name in ("tiny.jpg", "thin.jpg") or name.startswith("turned"):
            continue
        image = decode(body, channels)
        assert image.shape == (48, 64, channels) and image.dtype == np.uint8, name
        stored = original.quantize(32) if "palette" in name else original.convert("1") if "bits" in name else original
        expected = np.asarray((stored.convert("L") if "grey" in name else stored).convert(mode), dtype=int)
        # JPEG, WebP and GIF lose something; a grey level made of scaled colours may round the other way.
        lossy = name == "no_extension" or name.lower().endswith((".jpg", ".jpeg", ".webp", ".gif"))
        assert np.abs(image - expected.reshape(48, 64, channels)).mean() < (8 if lossy else 0.01), name


def test_sixteen_bit_grey_is_scaled_not_clipped(encode: Callable) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = decode(encode(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(image, np.repeat(np.rint(values / 257)[..., None], 3, axis=2))


def test_orientations_are_undone(make_picture: Callable) -> None:
    stored = make_picture(6, 9)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        buffer = io.BytesIO()
        Image.fromarray(stored).save(buffer, "PNG", exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(buffer)))
        np.testing.assert_array_equal(upright(stored, turn), expected)
        np.testing.assert_array_equal(decode(buffer.getvalue(), 3, turn), expected)


def test_a_warning_of_the_fast_decoder_is_no_failure(encode: Callable, make_picture: Callable) -> None:
    """Some bytes between two segments: libjpeg grumbles and goes on, so the image is used."""
    body = encode(make_picture(20, 20))
    at = body.index(b"\xff\xdb")
    odd = body[:at] + b"\x00\x00" + body[at:]
    np.testing.assert_array_equal(decode(odd), decode(body))


def test_flipped_bits_are_found_by_decoding(encode: Callable, make_picture: Callable, write: Callable) -> None:
    """The header cannot tell; ``verify`` and the loader can."""
    body = bytearray(encode(make_picture(48, 64)))
    middle = len(body) // 2
    body[middle : middle + 40] = b"\xff\xd8\x12\x34" * 10
    with pytest.raises(BadImage) as raised:
        decode(bytes(body))
    assert raised.value.reason in ("corrupt", "truncated")
    folder = write({"damaged.jpg": bytes(body), "fine.jpg": encode(make_picture(48, 64))})
    assert len(build_manifest(folder)) == 2
    assert set(reasons(build_manifest(folder, verify=True))) == {"damaged.jpg"}


# -- manifests ---------------------------------------------------------------------------------------------------------


def test_matrix(good: dict[str, bytes], bad: dict[str, tuple[bytes, str]], write: Callable) -> None:
    folder = write(good | {name: body for name, (body, _) in bad.items()} | {"notes.txt": b"hello", ".hidden.jpg": b""})
    manifest = build_manifest(folder)
    assert names(manifest) == sorted(good)
    assert reasons(manifest) == {name: reason for name, (_, reason) in bad.items()}
    assert manifest.ignored == 1 and manifest.labels is None
    assert {reason for _, reason in manifest.quarantine} <= set(data.REASONS)
    for index, name in enumerate(names(manifest)):
        with Image.open(manifest.paths[index]) as image:
            size = ImageOps.exif_transpose(image).size
        assert (manifest.widths[index], manifest.heights[index]) == size, name
    text = data.describe(manifest)
    assert "truncated: 6" in text and f"images      {len(good)}" in text and "ignored     1" in text


def test_a_file_that_cannot_be_opened(write: Callable, encode: Callable, make_picture: Callable) -> None:
    """A link to nothing, and a folder with an image's name (for root, permissions stop nobody)."""
    folder = write({"a.jpg": encode(make_picture(8, 8))})
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "list.txt").write_text("a.jpg\nsub\n")
    (folder / "sub").mkdir()
    assert reasons(build_manifest(folder)) == {"gone.jpg": "missing"}
    assert reasons(build_manifest(folder / "list.txt")) == {"sub": "unreadable"}


def test_layouts_and_labels(write: Callable, encode: Callable, make_picture: Callable) -> None:
    body = encode(make_picture(8, 8))
    flat = build_manifest(write({"b.jpg": body, "a.jpg": body}, "flat"))
    assert names(flat) == ["a.jpg", "b.jpg"] and flat.labels is None

    classes = build_manifest(write({"dog/1.jpg": body, "cat/1.jpg": body, "dog/2.jpg": body}, "classes"))
    assert classes.labels is not None and classes.labels.dtype == np.int64
    assert names(classes) == ["cat/1.jpg", "dog/1.jpg", "dog/2.jpg"]
    assert classes.labels.tolist() == [[0], [1], [1]]
    assert classes.label_names == ("class",) and classes.class_names == ("cat", "dog")

    for folder, files in {
        "deep": ["a/b/1.jpg", "c/2.jpg"],  # not all in CLASS/FILE
        "mixed": ["1.jpg", "a/2.jpg", "b/2.jpg"],
        "one": ["only/1.jpg", "only/2.jpg"],
        "splits": ["train/1.jpg", "test/2.jpg"],
    }.items():
        manifest = build_manifest(write(dict.fromkeys(files, body), folder))
        assert names(manifest) == sorted(files) and manifest.labels is None, folder
    root = write({}, "splits")
    assert names(build_manifest(root, split="train")) == ["1.jpg"]


def test_links_that_lead_back_end(write: Callable, encode: Callable, make_picture: Callable) -> None:
    folder = write({"a/1.jpg": encode(make_picture(8, 8))})
    (folder / "a" / "again").symlink_to(folder)
    assert len(build_manifest(folder)) == 1


def test_lists(write: Callable, encode: Callable, make_picture: Callable) -> None:
    body = encode(make_picture(8, 8))
    folder = write({"my cat 7.jpg": body, "b.jpg": body, "sub/c.jpg": body})
    where = folder / "list.txt"
    where.write_text("# a comment\n# labels: kind age\nb.jpg 3 -1\n\nmy cat 7.jpg 4 12\nsub/c.jpg\t5 6\ngone.jpg 1 1\n")
    manifest = build_manifest(where)
    assert names(manifest) == ["b.jpg", "my cat 7.jpg", "sub/c.jpg"] and manifest.label_names == ("kind", "age")
    assert manifest.labels is not None and manifest.labels.tolist() == [[3, -1], [4, 12], [5, 6]]
    assert reasons(manifest) == {"gone.jpg": "missing"}
    where.write_text(f"{folder / 'b.jpg'}\nsub/c.jpg\n")
    assert build_manifest(where).labels is None
    for text, message in {
        "b.jpg 1\nsub/c.jpg\n": "line 2: expected 1 labels, got 0",
        "b.jpg\tcat\n": "expected integer labels",
        "# labels: a b\nb.jpg 1\n": "names 2 kinds of label, but its lines have 1",
        "\n# nothing\n": "found none",
        "gone.jpg\n": "no usable image .*1 missing",
    }.items():
        where.write_text(text)
        with pytest.raises(UserError, match=message):
            build_manifest(where)


def test_nothing_there(tmp_path: Path, write: Callable) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Path, str | None, str]] = [
        (tmp_path / "missing", None, "nothing there"),
        (tmp_path / "empty", None, "an empty folder"),
        (write({"a.txt": b"x", "b.csv": b"y"}, "others"), None, "2 files, but none named like an image"),
        (write({"a.jpg": b""}, "bad"), None, r"no usable image in .* \(1 empty"),
        (tmp_path / "empty", "train", "expected train.txt or train/"),
        (tmp_path / "missing", "train", "source: expected a folder with train.txt"),
        (write({"a.jpg": b"\xff\xd8\xff"}, "file") / "a.jpg", None, "a text file that lists images"),
    ]
    for source, split, message in cases:
        with pytest.raises(UserError, match=message):
            build_manifest(source, split=split)


def test_hash_follows_the_content_not_the_place(write: Callable, encode: Callable, make_picture: Callable) -> None:
    files = {"a/1.jpg": encode(make_picture(8, 8)), "b/2.jpg": encode(make_picture(9, 8))}
    here, there = build_manifest(write(files, "here")), build_manifest(write(files, "there"))
    assert here.hash == there.hash
    others = [
        build_manifest(write(files | {"b/3.jpg": files["a/1.jpg"]}, "more")),
        build_manifest(write(files | {"b/2.jpg": files["a/1.jpg"]}, "sizes")),
        build_manifest(write({"a/1.jpg": files["a/1.jpg"], "b/3.jpg": files["b/2.jpg"]}, "renamed")),
        here.subset([0]),
        here.subset([1, 0]),
    ]
    assert len({manifest.hash for manifest in [here, *others]}) == 1 + len(others)


def test_saved_and_loaded(small_set: Path, tmp_path: Path) -> None:
    manifest = build_manifest(small_set, split="test")
    manifest.save(tmp_path / "deep" / "m.npz")
    again = Manifest.load(tmp_path / "deep" / "m.npz")
    assert again.hash == manifest.hash and list(again.paths) == list(manifest.paths)
    assert again.label_names == manifest.label_names and again.quarantine == manifest.quarantine
    assert os.listdir(tmp_path / "deep") == ["m.npz"]
    for body in (b"", b"junk", b"PK\x03\x04"):
        (tmp_path / "junk.npz").write_bytes(body)
        with pytest.raises(UserError, match="expected a saved manifest"):
            Manifest.load(tmp_path / "junk.npz")
    with pytest.raises(UserError, match="expected a saved manifest"):
        Manifest.load(tmp_path / "missing.npz")


def test_cache_is_used_until_a_file_changes(
    write: Callable, encode: Callable, make_picture: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write({"a.jpg": encode(make_picture(8, 8)), "b.jpg": b""})
    cache = tmp_path / "run" / "manifest.npz"
    first = build_manifest(folder, cache=cache)
    assert sorted(os.listdir(folder)) == ["a.jpg", "b.jpg"]  # nothing of ours beside the user's files

    from cohobate.data import manifest as module

    def never(*_: object) -> object:
        raise AssertionError("a header was read")

    with monkeypatch.context() as patch:
        patch.setattr(module, "inspect_image", never)
        again = build_manifest(folder, cache=cache)
        assert again.hash == first.hash and again.quarantine == first.quarantine
        with pytest.raises(AssertionError, match="a header was read"):
            build_manifest(folder, cache=cache, max_pixels=10)
    (folder / "a.jpg").write_bytes(encode(make_picture(9, 9)))
    assert build_manifest(folder, cache=cache).heights.tolist() == [9]
    cache.write_bytes(b"damaged")
    assert build_manifest(folder, cache=cache).heights.tolist() == [9]


def test_paths_are_a_sequence() -> None:
    paths = Paths("/root", ["a.jpg", "ü/b.jpg", "c"])
    assert list(paths) == ["/root/a.jpg", "/root/ü/b.jpg", "/root/c"] == paths[:]
    assert paths[-1] == "/root/c" and paths[1:] == ["/root/ü/b.jpg", "/root/c"] and len(paths) == 3
    for outside in (3, -4):
        with pytest.raises(IndexError):
            paths[outside]
    with pytest.raises(ValueError, match="heights: expected one of each of 3 paths"):
        Manifest(paths, *(np.ones(2, dtype=kind) for kind in (np.int32, np.int32, np.uint8, bool)))  # type: ignore[arg-type]
