"""The command line: ``cohobate VERB ...``, or ``python -m cohobate VERB ...`` (which torchrun needs).

Every verb imports what it needs when it runs, so ``--help`` is quick. A mistake of the user's is one line on standard
error and exit code 2; a mistake of ours keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cohobate.errors import UserError

USAGE = """cohobate: masked distillation pretraining of vision transformers

  cohobate train RECIPE [key=value ...]     a run; `cohobate train RECIPE --help` lists every key
  cohobate eval knn|linear WEIGHTS DATA     quality of a run or of exported weights on labelled images
  cohobate data make|inspect FOLDER         generate a labelled data set; look at a folder of images
  cohobate report RUN                       write the report page of a run
  cohobate bench NAME [options]             measured tables: kernels, teacher, attention, step, data, quality
  cohobate info                             what works here, and why the rest does not

`cohobate VERB --help` says more. With several processes: torchrun --nproc-per-node N -m cohobate train RECIPE ...
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 for a mistake of the user's, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("cohobate: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `cohobate info | head`: nobody reads on, and the interpreter must not flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError) as error:
        if not _is_users(error):
            raise
        print(f"cohobate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _is_users(error: Exception) -> bool:
    """UserError; a file that cannot be opened; or a ValueError or TypeError that this package raised itself."""
    if isinstance(error, OSError):
        return error.filename is not None
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and Path(__file__).resolve().parents[1] in Path(frames[-1].filename).resolve().parents
    kernels = importlib.util.find_spec("cohobate.kernels")
    if not ours and frames and kernels is not None and kernels.origin is not None:
        ours = Path(kernels.origin).resolve().parent in Path(frames[-1].filename).resolve().parents
    return isinstance(error, UserError) or ours


def _dispatch(arguments: list[str]) -> int:
    verbs: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _evaluate,
        "data": _data,
        "report": _report,
        "bench": _bench,
        "info": _info,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        from cohobate import __version__

        print(f"cohobate {__version__}")
        return 0
    if arguments[0] not in verbs:
        raise UserError(f"verb: expected one of {', '.join(verbs)}; got {arguments[0]!r}{_near(arguments[0], verbs)}")
    return verbs[arguments[0]](arguments[1:])


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('cohobate ')}: {message}")


def _parse(parser: Parser, arguments: list[str]) -> argparse.Namespace | None:
    """Parsed arguments, or None when --help was printed."""
    try:
        return parser.parse_args(arguments)
    except SystemExit:
        return None


def _near(word: str, known: Any) -> str:
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


# -- train -------------------------------------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    from cohobate import config as configuration

    wants_help = any(word in ("-h", "--help") for word in arguments)
    words = [word for word in arguments if word not in ("-h", "--help")]
    recipe = words[0] if words and not words[0].startswith("-") and "=" not in words[0] else None
    if recipe is None and wants_help:
        print("usage: cohobate train RECIPE [key=value ...] [--key value ...]\n")
        print(f"recipes: {', '.join(configuration.recipes())}, or a YAML file")
        print("`cohobate train RECIPE --help` lists every key with that recipe's value.")
        return 0
    if recipe is None:
        raise UserError(f"recipe: expected one of {', '.join(configuration.recipes())}, or a YAML file; got none")
    config = configuration.load(recipe, _overrides(words[1:]))
    if wants_help:
        return _describe(recipe, config)
    from cohobate.training import train

    finished, code = train(config)
    if finished is not None:
        _write_report(finished)
    return code


def _overrides(words: list[str]) -> list[str]:
    """``key=value``, ``--key=value`` and ``--key value`` as ``key=value``."""
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            found.append(word)
            continue
        key = word[2:]
        if "=" not in key:
            value = next(rest, None)
            if value is None:
                raise UserError(f"{key}: expected a value after {word}, got none")
            key = f"{key}={value}"
        name, _, value = key.partition("=")
        found.append(f"{name.replace('-', '_')}={value}")
    return found


def _describe(recipe: str, config: Any) -> int:
    """Every key with its type, value and meaning, by tyro from the dataclasses."""
    import tyro

    with contextlib.suppress(SystemExit):
        tyro.cli(type(config), default=config, args=["--help"], prog=f"cohobate train {recipe}")
    return 0


# -- report ------------------------------------------------------------------------------------------------------------


def _report(arguments: list[str]) -> int:
    parser = Parser(prog="cohobate report", description="Write report.html and its figures into a run folder.")
    parser.add_argument("run", type=Path, help="folder of a run")
    options = _parse(parser, arguments)
    if options is None:
        return 0
    _write_report(options.run)
    return 0


def _write_report(run: Path) -> None:
    from cohobate.report import write_report

    print(f"report: {write_report(run)}")


# -- eval --------------------------------------------------------------------------------------------------------------


def _evaluate(arguments: list[str]) -> int:
    parser = Parser(prog="cohobate eval", description="Quality of frozen features on labelled images.")
    parser.add_argument("metric", choices=("knn", "linear"))
    parser.add_argument("weights", help="folder of a run (its last stage) or of an export")
    parser.add_argument("data", help="data set with a train and a test part")
    parser.add_argument("--k", type=int, default=20, help="neighbours that vote (knn)")
    parser.add_argument("--temperature", type=float, default=0.07, help="of the vote (knn)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--train-limit", type=int, default=None, help="most training images")
    parser.add_argument("--test-limit", type=int, default=None, help="most test images")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="append the results as JSON lines")
    options = _parse(parser, arguments)
    if options is None:
        return 0
    rows = _quality(options)
    from cohobate.evaluation import summary

    print("\n".join(summary(rows)))
    if options.json is not None:
        with options.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return 0


def _quality(options: argparse.Namespace) -> list[dict[str, Any]]:
    from cohobate import data
    from cohobate.evaluation import ImageSource, check_same_classes, evaluate, has_split, held_out_split
    from cohobate.training import load_encoder, read_config
    from cohobate.training.distributed import start

    encoder = load_encoder(options.weights).to(start(options.device).device)
    parts = {"train": "train" if has_split(options.data, "train") else None, "test": held_out_split(options.data)}
    limits = {"train": options.train_limit, "test": options.test_limit}
    sources = {}
    for part, split in parts.items():
        if split is None:
            raise UserError(f"data: expected a train and a test part in {options.data!r}, found no {part}")
        sources[part] = ImageSource(
            data.build_manifest(options.data, split=split),
            (encoder.grid.height, encoder.grid.width),
            interpolation=read_config(options.weights)["pretrained_cfg"]["interpolation"],
            channels=encoder.grid.channels,
            batch_size=options.batch_size,
            workers=options.workers,
            limit=limits[part],
        )
    check_same_classes(sources["train"].manifest, sources["test"].manifest)
    if sources["train"].manifest.labels is None:
        raise UserError(f"data: expected labelled images in {options.data!r}, found none with a label")
    return evaluate(
        encoder,
        sources["train"],
        sources["test"],
        metrics=(options.metric,),
        k=options.k,
        temperature=options.temperature,
    )


# -- data --------------------------------------------------------------------------------------------------------------


def _data(arguments: list[str]) -> int:
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
    options = _parse(parser, arguments)
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


# -- bench and info ----------------------------------------------------------------------------------------------------


def _bench(arguments: list[str]) -> int:
    found = importlib.util.find_spec("cohobate.benchmarks")
    folders = list(found.submodule_search_locations or []) if found is not None else []
    names = sorted(info.name for info in pkgutil.iter_modules(folders) if _has_main(Path(folders[0]), info.name))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: cohobate bench NAME [options]\n\nbenchmarks: {', '.join(names) or 'none installed'}")
        return 0
    if arguments[0] not in names:
        raise UserError(f"bench: expected one of {', '.join(names)}; got {arguments[0]!r}{_near(arguments[0], names)}")
    module = importlib.import_module(f"cohobate.benchmarks.{arguments[0]}")
    return int(module.main(arguments[1:]) or 0)


def _has_main(folder: Path, name: str) -> bool:
    """Whether a benchmark module has an entry point; its text is read, for importing them all takes seconds."""
    path = folder / f"{name}.py"
    path = path if path.is_file() else folder / name / "__init__.py"
    return path.is_file() and "def main(" in path.read_text(encoding="utf-8")


def _info(arguments: list[str]) -> int:
    parser = Parser(prog="cohobate info", description="What works here, and why the rest does not.")
    if _parse(parser, arguments) is None:
        return 0
    from cohobate.cli.info import show

    show()
    return 0
