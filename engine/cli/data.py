"""``cohobate data``: generated data sets, a look at a folder of images or videos, shards of JPEG frames."""

from __future__ import annotations

import argparse
from pathlib import Path

from cohobate.cli.parsing import Parser, parse


def main(arguments: list[str]) -> int:
    """Make a data set, describe one, or turn videos into shards."""
    parser = Parser(prog="cohobate data", description="Generate labelled data, look at a data set, make shards of it.")
    kinds = parser.add_subparsers(dest="action", required=True, parser_class=Parser)
    make = kinds.add_parser("make", help="write a generated, labelled set of files (the same for the same seed)")
    make.add_argument("folder", type=Path)
    make.add_argument("--kind", choices=("image", "video"), default="image")
    make.add_argument("--variant", choices=("small", "large"), default=None, help="of images: 40 or 96 pixels")
    make.add_argument("--codec", choices=("h264", "vp9", "mjpeg"), default=None, help="of videos (default: h264)")
    make.add_argument("--train", type=int, default=None, metavar="N", help="training files")
    make.add_argument("--test", type=int, default=None, metavar="N", help="test files")
    make.add_argument("--seed", type=int, default=0)
    inspect = kinds.add_parser("inspect", help="count, sizes, labels, and files that cannot be read")
    shard = kinds.add_parser(
        "shard", help="decode videos once into shards of JPEG frames, which load several times faster"
    )
    for reader in (inspect, shard):
        reader.add_argument("source", help="folder, or a text file that lists files")
    inspect.add_argument("--kind", choices=("image", "video"), default="image")
    shard.add_argument("folder", type=Path, help="where the shards go")
    shard.add_argument("--short-side", type=int, default=None, metavar="PIXELS", help="shrink larger frames to this")
    shard.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1 to 100 (default: 90)")
    shard.add_argument("--per-shard", type=int, default=200, metavar="N", help="videos a file (default: 200)")
    for reader in (inspect, shard):
        reader.add_argument("--split", default=None, help="train or test, where the folder has them")
        reader.add_argument("--verify", action="store_true", help="decode everything, to find damage inside of files")
    options = parse(parser, arguments)
    if options is None:
        return 0
    return {"make": _make, "inspect": _inspect, "shard": _shard}[options.action](options)


def _make(options: argparse.Namespace) -> int:
    from cohobate import data
    from cohobate.errors import UserError

    given = {name: getattr(options, name) for name in ("train", "test", "variant", "codec")}
    chosen = {name: value for name, value in given.items() if value is not None}
    wrong = {"image": "codec", "video": "variant"}[options.kind]
    if wrong in chosen:
        raise UserError(f"{wrong}: expected none for --kind {options.kind}, got {chosen[wrong]!r}")
    make = data.make_videos if options.kind == "video" else data.make_images
    make(options.folder, seed=options.seed, **chosen)
    print(f"{options.kind}s: {options.folder}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from cohobate import data

    build = data.build_video_manifest if options.kind == "video" else data.build_manifest
    print(data.describe(build(options.source, split=options.split, verify=options.verify)))
    return 0


def _shard(options: argparse.Namespace) -> int:
    from cohobate import data

    manifest = data.build_video_manifest(options.source, split=options.split, verify=options.verify)
    counts = data.make_shards(
        manifest,
        options.folder if options.split is None else options.folder / options.split,
        short_side=options.short_side,
        quality=options.quality,
        videos_per_shard=options.per_shard,
    )
    left_out = len(manifest.quarantine) + sum(counts.values()) - counts["videos"]
    print(f"videos: {counts['videos']} in {options.folder}, {left_out} could not be read")
    return 0
