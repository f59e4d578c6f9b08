"""Which files a data set has: found once, their headers read, the unusable ones set aside with a reason."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from cohobate.data.decode import decode
from cohobate.data.headers import MAX_PIXELS, TAIL, BadImage, NeedMore, read_header
from cohobate.errors import UserError

EXTENSIONS = frozenset(
    (
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "webp",
        "bmp",
        "tif",
        "tiff",
        "gif",
        "avif",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
        "jp2",
    )
)
SPLIT_FOLDERS = frozenset(("train", "val", "valid", "validation", "test"))
_FORMAT = 2  # of the saved file
_HEAD = 1 << 16
_CHUNK = 256


class Paths(Sequence[str]):
    """Many paths in two arrays: worker processes share the memory, which they would not with a list of strings."""

    def __init__(self, root: str, relative: Iterable[str] = ()) -> None:
        parts = [os.fsencode(path) for path in relative]
        self.root = root
        self.text: NDArray[np.uint8] = np.frombuffer(b"".join(parts), dtype=np.uint8)
        self.ends: NDArray[np.int64] = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def relative(self, index: int) -> str:
        """The path below ``root``."""
        begin = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.text[begin : int(self.ends[index])].tobytes())

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"path {index} of {len(self)}")
        return os.path.join(self.root, self.relative(place))


@dataclass(frozen=True)
class Manifest:
    """The usable images of a data set, in a fixed order.

    Attributes:
        paths: one a sample, absolute.
        heights, widths: int32 [N], pixels, after the EXIF orientation is applied.
        orientations: uint8 [N], EXIF orientation, 1 is upright.
        plain_jpeg: bool [N], 8-bit baseline or progressive JPEGs that every decoder reads alike.
        labels: int64 [N, K], K kinds of label, or None. label_names: name of each kind.
        class_names: for labels that come from folders, the folders' names; else empty.
        quarantine: (path, reason) of what was left out; the reasons are in ``cohobate.data.REASONS``.
        ignored: files whose names do not look like images.
        hash: of the relative paths, sizes, orientations and labels: equal for a copy of the data set elsewhere.
    """

    UNIT: ClassVar[str] = "image"  # what a file is called in messages
    ARRAYS: ClassVar[dict[str, Any]] = {
        "heights": np.int32,
        "widths": np.int32,
        "orientations": np.uint8,
        "plain_jpeg": np.bool_,
    }
    HASHED: ClassVar[tuple[str, ...]] = ("heights", "widths", "orientations")
    TEXTS: ClassVar[tuple[str, ...]] = ("label_names", "class_names")

    paths: Paths
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    orientations: NDArray[np.uint8]
    plain_jpeg: NDArray[np.bool_]
    labels: NDArray[np.int64] | None = None
    label_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    quarantine: tuple[tuple[str, str], ...] = ()
    ignored: int = 0
    hash: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in (*self.ARRAYS, "labels"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.paths):
                raise ValueError(f"{name}: expected one of each of {len(self.paths)} paths, got {len(value)}")
        object.__setattr__(self, "hash", self._digest())

    def __len__(self) -> int:
        return len(self.paths)

    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        arrays: list[NDArray[Any]] = [self.paths.text, self.paths.ends, *(getattr(self, name) for name in self.HASHED)]
        for array in arrays if self.labels is None else [*arrays, self.labels]:
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def subset(self: Kind, places: Sequence[int] | NDArray[np.int64]) -> Kind:
        """The samples at ``places``, in that order; what was left out is not repeated."""
        chosen = np.asarray(places, dtype=np.int64)
        paths = Paths(self.paths.root, [self.paths.relative(int(place)) for place in chosen])
        arrays: dict[str, Any] = {name: getattr(self, name)[chosen] for name in self.ARRAYS}
        labels = None if self.labels is None else self.labels[chosen]
        return type(self)(paths, **arrays, labels=labels, **{name: getattr(self, name) for name in self.TEXTS})

    @classmethod
    def columns(cls, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Arrays of what was found in each file."""
        return {name: np.array([row[name] for row in rows], dtype=kind) for name, kind in cls.ARRAYS.items()}

    def details(self) -> list[str]:
        """Lines of :func:`describe`."""
        return [f"JPEG        {int(self.plain_jpeg.sum())} of {len(self)} can be decoded by DALI"]

    def save(self, path: str | os.PathLike[str], key: str = "") -> None:
        """Write to one ``.npz`` file, aside and renamed. ``key``: kept beside it, see :func:`build_manifest`."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        meta = {
            "format": _FORMAT,
            "unit": self.UNIT,
            "key": key,
            "root": self.paths.root,
            "quarantine": self.quarantine,
            "ignored": self.ignored,
            **{name: getattr(self, name) for name in self.TEXTS},
        }
        arrays: dict[str, Any] = {name: getattr(self, name) for name in self.ARRAYS}
        if self.labels is not None:
            arrays["labels"] = self.labels
        aside = target.parent / f".{target.name}.{os.getpid()}.{threading.get_ident()}"
        with open(aside, "wb") as file:
            meta_bytes = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
            np.savez(file, meta=meta_bytes, text=self.paths.text, ends=self.paths.ends, **arrays)
        os.replace(aside, target)

    @classmethod
    def load(cls: type[Kind], path: str | os.PathLike[str]) -> Kind:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: no such file, or not a manifest.
        """
        return _load(cls, path)[0]


Kind = TypeVar("Kind", bound=Manifest)
Inspected = Mapping[str, Any] | str  # a file's value for each of a manifest's arrays, or the reason why it has none


def _load(kind: type[Kind], path: str | os.PathLike[str]) -> tuple[Kind, str]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            meta = json.loads(stored["meta"].tobytes())
            if (meta["format"], meta["unit"]) != (_FORMAT, kind.UNIT):
                raise ValueError(f"format {meta['format']} of {meta.get('unit')}s")
            paths = Paths(meta["root"])
            paths.text, paths.ends = stored["text"], stored["ends"]
            rest: dict[str, Any] = {name: tuple(meta[name]) for name in kind.TEXTS}
            manifest = kind(
                paths,
                **{name: stored[name] for name in kind.ARRAYS},
                labels=stored.get("labels"),
                quarantine=tuple((path, reason) for path, reason in meta["quarantine"]),
                ignored=meta["ignored"],
                **rest,
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"manifest: expected a saved manifest, got {path} ({error})") from None
    return manifest, meta["key"]


def build_manifest(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    verify: bool = False,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
) -> Manifest:
    """Find the images of a data set and read their headers.

    ``source`` is a folder, flat or nested, or a text file with a line ``path [label ...]`` an image: paths relative to
    the file, integer labels, the same number on every line; ``# labels: NAME ...`` names them; a tab may separate
    path and labels. In a folder whose images all lie in ``CLASS/FILE``, the class is the label.

    Unusable files are left out and listed in ``quarantine``. A header and an end marker do not prove the middle:
    ``verify=True`` decodes every file.

    Args:
        split: "train", "test", ...: use ``source/split.txt``, or else the folder ``source/split``.
        cache: a file to keep the manifest in; read instead of the headers while no file's name, size or time changes.
        max_pixels: larger images are left out.
        threads: how many read; 16 if not given.

    Raises:
        UserError: nothing there, or no usable image in it.
    """
    found = find(source, split, _walk, "image")
    return inspect_all(
        found,
        Manifest,
        lambda name: inspect_image(found.root, name, verify, max_pixels),
        cache=cache,
        asked=f"{verify} {max_pixels}",
        threads=threads or 16,
    )


@dataclass(frozen=True)
class Found:
    """Files that may be samples: ``names`` below ``root``, and what a list says about them."""

    place: Path
    root: Path
    names: list[str]
    labels: NDArray[np.int64] | None
    label_names: tuple[str, ...]
    ignored: int


def find(
    source: str | os.PathLike[str], split: str | None, walk: Callable[[Path], tuple[list[str], int]], unit: str
) -> Found:
    """The candidates in a folder, or in a list. ``walk(folder)`` gives names, and how many other files there are."""
    place = _place(Path(source), split, unit)
    if not place.is_dir() and place.suffix != ".frames":
        names, labels, label_names = _read_list(place, unit)
        return Found(place, Path(os.path.abspath(place.parent)), names, labels, label_names, 0)
    if not place.is_dir():  # one shard
        return Found(place, Path(os.path.abspath(place.parent)), [place.name], None, (), 0)
    names, ignored = walk(place)
    if not names:
        article = "an" if unit == "image" else "a"
        seen = f"{ignored} files, but none named like {article} {unit}" if ignored else "an empty folder"
        raise UserError(f"source: expected {unit}s in {place}, found {seen}")
    return Found(place, Path(os.path.abspath(place)), names, None, (), ignored)


def inspect_all(
    found: Found,
    kind: type[Kind],
    inspect: Callable[[str], Inspected],
    *,
    cache: str | os.PathLike[str] | None,
    asked: str,
    threads: int,
) -> Kind:
    """The manifest of what was found. ``inspect(name)`` looks into a file; ``asked``: what the cache depends on."""
    root, names, labels = found.root, found.names, found.labels
    with ThreadPoolExecutor(threads, thread_name_prefix="manifest") as workers:
        key = ""
        if cache is not None:
            key = _key(workers, found, asked)
            if Path(cache).is_file():
                stored = _cached(kind, cache, key, root)
                if stored is not None:
                    return stored
        inspected = list(_in_chunks(workers, inspect, names))
    good = [index for index, entry in enumerate(inspected) if not isinstance(entry, str)]
    quarantine = tuple(
        (os.path.join(root, name), entry) for name, entry in zip(names, inspected) if isinstance(entry, str)
    )
    if not good:
        counts = ", ".join(f"{count} {reason}" for reason, count in Counter(r for _, r in quarantine).most_common())
        raise UserError(f"source: no usable {kind.UNIT} in {found.place} ({counts}; first: {quarantine[0][0]})")
    class_names: tuple[str, ...] = ()
    label_names = found.label_names
    kept = [names[index] for index in good]
    if labels is not None:
        labels = labels[good]
    elif found.place.is_dir():
        labels, class_names = _folder_labels(kept)
        label_names = ("class",) if labels is not None else ()
    manifest = kind(
        Paths(str(root), kept),
        **kind.columns([inspected[index] for index in good]),
        labels=labels,
        label_names=label_names,
        class_names=class_names,
        quarantine=quarantine,
        ignored=found.ignored,
    )
    if cache is not None:
        manifest.save(cache, key)
    return manifest


def _place(source: Path, split: str | None, unit: str) -> Path:
    if split is not None:
        if not source.is_dir():
            raise UserError(f"source: expected a folder with {split}.txt or {split}/, got {source}")
        for candidate in (source / f"{split}.txt", source / split):
            if candidate.exists():
                return candidate
        raise UserError(f"split: expected {split}.txt or {split}/ in {source}, found neither")
    if not source.exists():
        raise UserError(f"source: expected a folder of {unit}s or a file that lists them, got {source} (nothing there)")
    return source


def files_below(root: Path) -> Iterator[tuple[str, str]]:
    """(folder relative to ``root``, "" for itself; file name) of everything not hidden, each real folder once."""
    seen = set()  # real folders, for links that lead back
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith("."):
                yield "" if inside == "." else inside, name


def _walk(root: Path) -> tuple[list[str], int]:
    """Relative paths of files named like images (or with no extension), sorted; and how many others there are."""
    names: list[str] = []
    ignored = 0
    for inside, name in files_below(root):
        extension = os.path.splitext(name)[1][1:].lower()
        if extension and extension not in EXTENSIONS:
            ignored += 1
        else:
            names.append(os.path.join(inside, name))
    return sorted(names), ignored


def _read_list(path: Path, unit: str) -> tuple[list[str], NDArray[np.int64] | None, tuple[str, ...]]:
    names: list[str] = []
    labels: list[list[int]] = []
    label_names: tuple[str, ...] = ()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"source: expected a folder or a text file that lists {unit}s, got {path}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            if line[1:].lstrip().startswith("labels:"):
                label_names = tuple(line.split(":", 1)[1].split())
            continue
        if not line.strip():
            continue
        name, own = _entry(line)
        if labels and len(own) != len(labels[0]):
            raise UserError(f"source: {path} line {number}: expected {len(labels[0])} labels, got {len(own)}")
        names.append(name)
        labels.append(own)
    if not names:
        raise UserError(f"source: expected lines `path [label ...]` in {path}, found none")
    kinds = len(labels[0])
    if not kinds:
        return names, None, ()
    if len(label_names) != kinds:
        if label_names:
            raise UserError(f"source: {path} names {len(label_names)} kinds of label, but its lines have {kinds}")
        label_names = ("label",) if kinds == 1 else tuple(f"label{kind}" for kind in range(kinds))
    return names, np.array(labels, dtype=np.int64), label_names


def _entry(line: str) -> tuple[str, list[int]]:
    """Path and labels of a line; labels are the integers at its end."""
    if "\t" in line:
        name, _, rest = line.partition("\t")
        words = rest.split()
    else:
        words = line.split()
        count = 0
        while count < len(words) - 1 and words[-1 - count].lstrip("-").isdigit():
            count += 1
        name = line.strip() if not count else line.strip().rsplit(None, count)[0]
        words = words[len(words) - count :]
    try:
        return name, [int(word) for word in words]
    except ValueError:
        raise UserError(f"source: expected integer labels, got {line!r}") from None


def _folder_labels(names: Sequence[str]) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Label = the folder, if every file is in ``CLASS/FILE`` and the classes are more than one and no splits."""
    parts = [name.split(os.sep) for name in names]
    if any(len(part) != 2 for part in parts):
        return None, ()
    classes = tuple(sorted({part[0] for part in parts}))
    if len(classes) < 2 or SPLIT_FOLDERS.issuperset(classes):
        return None, ()
    number = {name: index for index, name in enumerate(classes)}
    return np.array([[number[part[0]]] for part in parts], dtype=np.int64), classes


def inspect_image(root: str | os.PathLike[str], name: str, verify: bool, max_pixels: int) -> Inspected:
    """A manifest's numbers for a usable file, or the reason why it is not."""
    try:
        with open(os.path.join(root, name), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(_HEAD) or b""
            tail = data[-TAIL:]
            if size > len(data):
                file.seek(-TAIL, os.SEEK_END)
                tail = file.read() or b""
            try:
                header = read_header(data, tail, size)
            except NeedMore:
                file.seek(0)
                data = file.readall()
                header = read_header(data, tail, len(data))
            if header.height * header.width > max_pixels:
                return "too_large"
            if verify or not header.complete or header.height == 0:
                if len(data) < size:
                    file.seek(0)
                    data = file.readall()
                upright = decode(data, 3, header.orientation).shape[:2]
            else:
                upright = header.upright
            height, width = upright
            return {
                "heights": height,
                "widths": width,
                "orientations": header.orientation,
                "plain_jpeg": header.plain_jpeg,
            }
    except BadImage as error:
        return error.reason
    except FileNotFoundError:
        return "missing"
    except OSError:
        return "unreadable"


def _in_chunks(pool: ThreadPoolExecutor, function: Any, items: Sequence[str]) -> Iterator[Any]:
    chunks = [items[begin : begin + _CHUNK] for begin in range(0, len(items), _CHUNK)]
    for results in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
        yield from results


def _key(pool: ThreadPoolExecutor, found: Found, asked: str) -> str:
    """Changes when a file's name, size or time does, or what is asked of the files."""

    def state(name: str) -> str:
        try:
            about = os.stat(os.path.join(found.root, name))
        except OSError:
            return f"{name}\0-\n"
        return f"{name}\0{about.st_size}\0{about.st_mtime_ns}\n"

    digest = hashlib.blake2b(f"{_FORMAT} {asked} {found.label_names}".encode(), digest_size=16)
    for line in _in_chunks(pool, state, found.names):
        digest.update(line.encode(errors="surrogateescape"))
    if found.labels is not None:
        digest.update(found.labels.data)
    return digest.hexdigest()


def _cached(kind: type[Kind], path: str | os.PathLike[str], key: str, root: Path) -> Kind | None:
    try:
        manifest, stored = _load(kind, path)
    except UserError:
        return None  # damaged or of another version: it is made again
    return manifest if stored == key and manifest.paths.root == str(root) else None


def describe(manifest: Manifest) -> str:
    """A few lines for people: how many files, of which sizes, which labels, what was left out."""
    heights, widths = manifest.heights, manifest.widths
    lines = [
        f"{manifest.UNIT + 's':<12}{len(manifest)}",
        f"hash        {manifest.hash}",
        f"sizes       {_span(widths)} wide, {_span(heights)} high",
        *manifest.details(),
    ]
    if manifest.labels is not None:
        for kind, name in enumerate(manifest.label_names):
            lines.append(f"label       {name}: {len(np.unique(manifest.labels[:, kind]))} classes")
    if manifest.ignored:
        lines.append(f"ignored     {manifest.ignored} files not named like {manifest.UNIT}s")
    lines.append(f"unusable    {len(manifest.quarantine)}")
    for reason, count in Counter(reason for _, reason in manifest.quarantine).most_common():
        example = next(path for path, why in manifest.quarantine if why == reason)
        lines.append(f"            {reason}: {count} (such as {example})")
    return "\n".join(lines)


def _span(values: NDArray[np.int32]) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low}" if low == high else f"{low} to {high} (median {int(np.median(values))})"
