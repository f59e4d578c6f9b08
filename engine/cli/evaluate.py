"""``cohobate eval``: quality of a run, of exported weights or of any ViT on labelled images or videos."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cohobate.cli.parsing import Parser, parse
from cohobate.errors import UserError

if TYPE_CHECKING:
    from cohobate.evaluation import Classifier, Extractor, FinetuneRecipe, ImageSource
    from cohobate.models import VisionTransformer
    from cohobate.tokens import TokenGrid

METRICS = ("knn", "linear", "attentive", "finetune")
# Options that say something for some metrics alone; a script that asks for kNN and linear need not tell them apart.
ONLY = {
    "k": ("knn", "linear"),
    "temperature": ("knn", "linear"),
    "augment": ("linear", "attentive"),
    "recipe": ("linear", "finetune"),
    "rates": ("linear", "attentive"),
    "epochs": ("linear", "attentive", "finetune"),
    "batch": ("linear", "attentive", "finetune"),
    "blr": ("finetune",),
    "ema": ("finetune",),
    "label": ("finetune",),
    "out": ("finetune",),
    "seed": ("linear", "attentive", "finetune"),
}


def main(arguments: list[str]) -> int:
    """Print the accuracies, and add them to a file of JSON lines where one is named."""
    options = parse(_parser(), arguments)
    if options is None:
        return 0
    for name, metrics in ONLY.items():
        if getattr(options, name) is not None and options.metric not in metrics:
            raise UserError(f"--{name}: expected with {' or '.join(metrics)}, got with {options.metric}")
    rows = _finetune(options) if options.metric == "finetune" else _frozen(options)
    from cohobate.evaluation import summary

    print("\n".join(summary(rows)))
    if options.json is not None:
        with options.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"weights": options.weights} | row) + "\n" for row in rows)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="cohobate eval", description="Quality of features on labelled images or videos.")
    parser.add_argument("metric", choices=METRICS)
    parser.add_argument(
        "weights", help="a run (its last stage), an export, or any ViT: timm:NAME, hf:FOLDER_OR_ID, random:vit_small"
    )
    parser.add_argument("data", help="data set with a train and a test part")
    parser.add_argument(
        "--batch-size", type=int, default=None, help="images a pass (default: 256; of clips 256 / frames)"
    )
    parser.add_argument("--train-limit", type=int, default=None, help="most training images or videos")
    parser.add_argument("--test-limit", type=int, default=None, help="most test images or videos")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the network (default: bf16)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="append the results as JSON lines")
    clips = parser.add_argument_group("encoders of clips")
    clips.add_argument(
        "--clips", type=int, default=None, help="of a video, averaged (default: 1; finetune: the recipe's)"
    )
    clips.add_argument(
        "--crops", type=int, default=None, help="of a clip, averaged (default: 1; finetune: the recipe's)"
    )
    clips.add_argument("--stride", type=int, default=None, help="between two frames (default: the run's, or 4)")
    clips.add_argument("--sampling", default=None, help="contiguous, linspace or segments (default: the run's)")
    knn = parser.add_argument_group("knn")
    knn.add_argument("--k", type=int, default=None, help="neighbours that vote (default: 20)")
    knn.add_argument("--temperature", type=float, default=None, help="of the vote (default: 0.07)")
    trained = parser.add_argument_group("linear, attentive and finetune")
    trained.add_argument(
        "--recipe",
        default=None,
        metavar="NAME",
        help="linear: exact (L-BFGS, the default), lars (MAE's 90 epochs) or lars_quick; "
        "finetune: quick or quick_video (the defaults), or a published one, such as mae_base or amd_base_k400",
    )
    trained.add_argument("--epochs", type=int, default=None, help="other than the recipe's; its warm-up scales with it")
    trained.add_argument(
        "--batch", type=int, default=None, metavar="N", help="images or videos an update, other than the recipe's"
    )
    trained.add_argument("--seed", type=int, default=None, help="default: 0")
    trained.add_argument(
        "--augment", action="store_true", default=None, help="probes: random crops, so new features in every epoch"
    )
    trained.add_argument("--rates", type=float, nargs="+", default=None, help="probes: learning rates for 256 images")
    trained.add_argument("--blr", type=float, default=None, help="finetune: learning rate for 256 images or videos")
    trained.add_argument("--ema", type=float, default=None, help="finetune: decay of averaged weights, such as 0.9999")
    trained.add_argument("--label", default=None, help="finetune: which kind of label (default: the first)")
    trained.add_argument("--out", type=Path, default=None, metavar="FOLDER", help="finetune: where the result is kept")
    return parser


# -- frozen features ---------------------------------------------------------------------------------------------------


def _frozen(options: argparse.Namespace) -> list[dict[str, Any]]:
    from cohobate.evaluation import attentive_probe, evaluate, linear_probe

    recipe = _probe_recipe(options)
    extractor, interpolation = _extractor(options)
    train, test = _sources(options, extractor.grid, interpolation)
    if recipe is None:
        metrics = (options.metric,)
        found = {name: getattr(options, name) for name in ("k", "temperature") if getattr(options, name) is not None}
        return _viewed(test, evaluate(extractor, train, test, metrics=metrics, **found))
    probe = linear_probe if options.metric == "linear" else attentive_probe
    augment, seed = bool(options.augment), options.seed or 0
    return _viewed(test, probe(extractor, train, test, recipe=recipe, augment=augment, seed=seed, say=print))


def _viewed(test: ImageSource, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, of videos with how many clips and crops were averaged."""
    if test.manifest.UNIT == "image":
        return rows
    clips, crops = test.plan().clips, test.plan().crops_per_clip
    return [row | {"clips": clips, "crops": crops} for row in rows]


def _probe_recipe(options: argparse.Namespace) -> Any:
    """The recipe of a probe that is trained by gradient; None for what is not."""
    from cohobate.evaluation import probe

    if options.metric == "knn":
        return None
    named: dict[str, Any] = {"exact": None, "lars": probe.LINEAR, "lars_quick": probe.LINEAR_QUICK}
    recipe = probe.ATTENTIVE
    if options.metric == "linear":
        name = options.recipe or "exact"
        if name not in named:
            raise UserError(f"--recipe: expected one of {', '.join(named)} with linear, got {name!r}")
        recipe = named[name]
    if recipe is None:
        for option in ("augment", "rates", "epochs", "batch", "seed"):
            if getattr(options, option) is not None:
                raise UserError(f"--{option}: expected with --recipe lars or lars_quick, got with exact")
        return None
    changes = _schedule(options, recipe) | ({"rates": tuple(options.rates)} if options.rates else {})
    return dataclasses.replace(recipe, **changes)


def _schedule(options: argparse.Namespace, recipe: Any) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if options.epochs is not None:
        changes |= {"epochs": options.epochs, "warmup": recipe.warmup * options.epochs / recipe.epochs}
    return changes if options.batch is None else changes | {"batch": options.batch}


def _extractor(options: argparse.Namespace) -> tuple[Extractor, str]:
    """The frozen network, and how its images are resized."""
    from cohobate.evaluation import Extractor
    from cohobate.evaluation.extractor import BF16, FP32
    from cohobate.teacher import load_source
    from cohobate.training import load_encoder, read_config
    from cohobate.training.distributed import start

    device, precision = start(options.device).device, FP32 if options.precision == "fp32" else BF16
    if _foreign(options.weights):
        return Extractor(load_source(options.weights), precision, device=device, name=options.weights), "bicubic"
    encoder = load_encoder(options.weights, precision).to(device)
    interpolation = read_config(options.weights)["pretrained_cfg"]["interpolation"]
    return Extractor(encoder, precision, name=options.weights), interpolation


def _foreign(spec: str) -> bool:
    """Whether ``spec`` is timm:NAME and the like, not a folder."""
    return ":" in spec.split("/")[0] and not Path(spec).exists()


def _sources(
    options: argparse.Namespace, grid: TokenGrid, interpolation: str, recipe: FinetuneRecipe | None = None
) -> tuple[ImageSource, ImageSource]:
    from cohobate import data
    from cohobate.evaluation import ClipSource, ImageSource, check_labels, check_same_classes, has_split, held_out_split

    for name in ("batch_size", "train_limit", "test_limit", "clips", "crops", "stride"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    parts = {"train": "train" if has_split(options.data, "train") else None, "test": held_out_split(options.data)}
    of_clips = grid.frames > 1
    build = data.build_video_manifest if of_clips else data.build_manifest
    kind: type[ImageSource] = ClipSource if of_clips else ImageSource
    if of_clips:
        more = _sampled(options, grid, recipe)
    else:
        more = {"centre": 0.875 if grid.height <= 224 else 1.0}
        for name in ("clips", "crops", "stride", "sampling"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name}: expected with an encoder of clips, got with {options.weights}, of images")
    found = []
    for part, split in parts.items():
        if split is None:
            raise UserError(f"data: expected a train and a test part in {options.data!r}, found no {part}")
        source = kind(
            build(options.data, split=split),
            (grid.height, grid.width),
            interpolation=interpolation,
            channels=grid.channels,
            batch_size=options.batch_size or max(1, 256 // grid.frames),
            workers=options.workers,
            limit=options.train_limit if part == "train" else options.test_limit,
            **more,
        )
        check_labels(source.manifest, part)
        if isinstance(source, ClipSource) and source.short:
            print(
                f"{part}: {source.short} of {len(source.manifest)} videos are shorter than a clip; frames are repeated"
            )
        found.append(source)
    check_same_classes(found[0].manifest, found[1].manifest)
    return found[0], found[1]


def _sampled(options: argparse.Namespace, grid: TokenGrid, recipe: FinetuneRecipe | None) -> dict[str, Any]:
    """How clips are taken: as asked for, else as the recipe says, else as in pretraining."""
    usual: dict[str, Any] = {"stride": 4, "sampling": "contiguous"} | _pretrained(options.weights)
    clips, crops = (1, 1) if recipe is None else recipe.views
    for name in usual:
        wishes = (getattr(options, name), getattr(recipe, name, None), usual[name])
        usual[name] = next(wish for wish in wishes if wish is not None)
    return usual | {"frames": grid.frames, "test_views": (options.clips or clips, options.crops or crops)}


def _pretrained(weights: str) -> dict[str, Any]:
    """Stride and sampling of the run that an export is of; nothing where it is of none."""
    from cohobate import config
    from cohobate.models.exports import find_export

    folder = None if _foreign(weights) else find_export(weights).resolve().parent
    if folder is None or folder.name != "exports" or not (folder.parent / "config.yaml").is_file():
        return {}
    settings = config.load(str(folder.parent / "config.yaml")).data
    return {"stride": settings.stride, "sampling": settings.sampling}


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def _finetune(options: argparse.Namespace) -> list[dict[str, Any]]:
    from cohobate.evaluation import RECIPES, finetune
    from cohobate.evaluation.extractor import check_weights

    if options.recipe is not None and options.recipe not in RECIPES:
        raise UserError(f"--recipe: expected one of {', '.join(RECIPES)} with finetune, got {options.recipe!r}")
    if options.out is not None and options.out.exists():
        raise UserError(f"--out: expected a new folder, got {str(options.out)!r}, which is there")
    encoder, interpolation = _trainable(options)
    name = options.recipe or ("quick_video" if encoder.grid.frames > 1 else "quick")
    changes = {key: getattr(options, key) for key in ("blr", "ema") if getattr(options, key) is not None}
    recipe = dataclasses.replace(RECIPES[name], **changes, **_schedule(options, RECIPES[name]))
    check_weights(encoder, options.weights)
    train, test = _sources(options, encoder.grid, interpolation, recipe)
    model, row = finetune(encoder, train, test, recipe, label=options.label, seed=options.seed or 0, say=print)
    (row,) = _viewed(test, [row | {"recipe": name}])
    if options.out is not None:
        _save(options.out, model, interpolation, row | {"weights": options.weights}, train.manifest.class_names)
        print(f"kept in {options.out}")
    return [row]


def _trainable(options: argparse.Namespace) -> tuple[VisionTransformer, str]:
    from cohobate.evaluation.extractor import BF16, FP32
    from cohobate.evaluation.finetune import trainable
    from cohobate.teacher import load_source
    from cohobate.training import load_encoder, read_config
    from cohobate.training.distributed import start

    device, precision = start(options.device).device, FP32 if options.precision == "fp32" else BF16
    if _foreign(options.weights):
        return trainable(load_source(options.weights), precision).to(device), "bicubic"
    interpolation = read_config(options.weights)["pretrained_cfg"]["interpolation"]
    return load_encoder(options.weights, precision).to(device), interpolation


def _save(
    folder: Path, model: Classifier, interpolation: str, about: dict[str, Any], class_names: tuple[str, ...]
) -> None:
    """``model.safetensors`` with timm's keys and ``config.json``, in a folder that is written aside and renamed."""
    from safetensors.torch import save_file

    from cohobate.models.exports import describe

    classes = model.head.out_features
    config = describe(model.encoder, interpolation)
    config |= {"num_classes": classes, "global_pool": "avg", "cohobate": about}
    config["model_args"] |= {"global_pool": "avg", "fc_norm": True, "num_classes": classes}
    config["pretrained_cfg"] |= {"num_classes": classes}
    if class_names:
        config["label_names"] = list(class_names)
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(model.weights(), str(aside / "model.safetensors"), metadata={"format": "pt"})
    (aside / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    aside.rename(folder)
