"""``cohobate data``: generated data sets, and a look at a folder of images."""

from __future__ import annotations

from pathlib import Path

from cohobate.cli.parsing import Parser, parse


def main(arguments: list[str]) -> int:
    """Make a data set or describe one."""
    parser = Parser(prog="cohobate data", description="Generate a labelled data set, or look at a folder of images.")
    kinds = parser.add_subparsers(dest="action", required=True, parser_class=Parser)
    make = kinds.add_parser("make", help="write a generated, labelled set of JPEGs (the same for the same seed)")
    make.add_argument("folder", type=Path)
    make.add_argument("--variant", choices=("small", "large"), default="small")
    make.add_argument("--train", type=int, default=None, metavar="N", help="training images")
    make.add_argument("--test", type=int, default=None, metavar="N", help="test images")
    make.add_argument("--seed", type=int, default=0)
    inspect = kinds.add_parser("inspect", help="count, sizes, labels, and files that cannot be read")
    inspect.add_argument("source", help="folder, or a text file that lists images")
    inspect.add_argument("--split", default=None, help="train or test, where the folder has them")
    options = parse(parser, arguments)
    if options is None:
        return 0
    from cohobate import data

    if options.action == "make":
        counts = {name: getattr(options, name) for name in ("train", "test") if getattr(options, name) is not None}
        data.make_images(options.folder, variant=options.variant, seed=options.seed, **counts)
        print(f"images: {options.folder}")
        return 0
    print(data.describe(data.build_manifest(options.source, split=options.split)))
    return 0
