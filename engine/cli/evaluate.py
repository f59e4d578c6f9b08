"""``cohobate eval``: quality of a run or of exported weights on labelled images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cohobate.cli.parsing import Parser, parse
from cohobate.errors import UserError


def main(arguments: list[str]) -> int:
    """Print the accuracies, and add them to a file of JSON lines where one is named."""
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
    options = parse(parser, arguments)
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
