"""``cohobate viz``: pictures of what a model makes of some images."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cohobate.cli.parsing import Parser, near, parse
from cohobate.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from cohobate.config import Config
    from cohobate.data import Manifest
    from cohobate.evaluation import ImageSource
    from cohobate.masking import MaskPlan
    from cohobate.models import VisionTransformer
    from cohobate.teacher.sources import Source

SPECS = ("timm:", "hf:", "random:")
MASKS = ("random", "block", "inverse_block", "tube")
SEARCHED = 1000  # images among which the nearest ones are found
DPI = 150


def main(arguments: list[str]) -> int:
    """Write the pictures and print their paths; what cannot be drawn is named with the reason."""
    parser = Parser(
        prog="cohobate viz", description="Pictures of what a model sees, predicts, attends to and finds alike."
    )
    parser.add_argument(
        "weights", help="a run (its last stage), an export, or a teacher: timm:NAME, hf:FOLDER_OR_ID, random:vit_small"
    )
    parser.add_argument(
        "images",
        nargs="*",
        help="image files, a folder of images, or a text file that lists them; frames in order for a model of clips",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the PNG files go")
    parser.add_argument(
        "--kind", default=None, metavar="KIND,...", help=f"{', '.join(KINDS)}; by default all that can be drawn"
    )
    parser.add_argument(
        "--mask-ratio", type=float, default=None, help="share hidden; default the run's, else 0.75 (clips 0.9)"
    )
    parser.add_argument("--mask-kind", choices=MASKS, default=None, help="default the run's, else random (clips tube)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks, and of the choice of images")
    parser.add_argument("--count", type=int, default=8, help="images drawn; of more, so many are chosen")
    parser.add_argument("--plain-pixels", action="store_true", help="the decoder predicts pixels as they are, not"
                        " standardised patches; default: what the run says, else standardised")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parse(parser, arguments)
    if options is None:
        return 0
    for line in draw(options):
        print(line)
    return 0


def draw(options: argparse.Namespace) -> Iterator[str]:
    """A line a picture: its path, or why there is none. One that was asked for by name is an error."""
    asked = [] if options.kind is None else [word.strip() for word in options.kind.split(",")]
    for word in asked:
        if word not in KINDS:
            raise UserError(f"kind: expected some of {', '.join(KINDS)}; got {word!r}{near(word, KINDS)}")
    if options.count < 1:
        raise UserError(f"count: expected at least 1 image, got {options.count}")
    if not asked and not options.images:
        raise UserError(
            f"images: expected image files, a folder or a list, got none ({' and '.join(OF_A_RUN)} need none)"
        )
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"out: expected a folder, got the file {str(options.out)!r}")
    view = View(options)
    for kind in asked or KINDS:
        try:
            figure = KINDS[kind](view)
        except Impossible as reason:
            if asked:
                raise UserError(f"kind: expected pictures that can be drawn, got {kind!r}: {reason}") from None
            yield f"{kind}: not drawn: {reason}"
            continue
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{kind}.png"
        figure.savefig(path, dpi=DPI)
        yield str(path)


class Impossible(Exception):
    """This model, or these images, cannot have that picture; the message is the reason."""


class View:
    """The model and the images of one command, each read when a picture first asks for it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    @cached_property
    def device(self) -> Any:
        """Where to compute."""
        from cohobate.training.distributed import start

        return start(self.options.device).device

    @cached_property
    def export(self) -> Path | None:
        """The folder of the weights, if they are an export."""
        if self.options.weights.startswith(SPECS):
            return None
        from cohobate.models.exports import find_export

        return find_export(self.options.weights)

    @cached_property
    def run(self) -> tuple[Path, Config, int] | None:
        """The run that the export lies in: its folder, the stage's configuration, and the stage's index."""
        from cohobate import config as configuration

        if self.export is None or self.export.parent.name != "exports":
            return None
        folder, number = self.export.parents[1], self.export.name.split("-")[0]
        if not (folder / "config.yaml").is_file() or not number.isdigit():
            return None
        whole = configuration.load(str(folder / "config.yaml"))
        return folder, configuration.for_stage(whole, int(number) - 1), int(number) - 1

    @cached_property
    def source(self) -> Source:
        """The model, as a teacher is read."""
        from cohobate.teacher.sources import load_source

        return load_source(self.options.weights if self.export is None else self.export)

    @cached_property
    def manifest(self) -> Manifest:
        """The images that were named."""
        from cohobate import data

        images = self.options.images
        if not images:
            raise UserError("images: expected image files, a folder or a list, got none")
        single = Path(images[0])
        if len(images) == 1 and (single.is_dir() or single.suffix == ".txt" or not single.exists()):
            return data.build_manifest(single)
        with tempfile.TemporaryDirectory() as folder:
            listed = Path(folder) / "images.txt"
            listed.write_text("".join(f"{Path(image).absolute()}\t\n" for image in images), encoding="utf-8")
            try:
                found = data.build_manifest(listed)
            except UserError as error:  # it would name this list
                raise UserError(f"images: expected images that can be read, got {', '.join(images)}") from error
        for path, reason in found.quarantine:
            raise UserError(f"images: expected images that can be read, got {path} ({reason})")
        return found

    def reader(self, count: int) -> ImageSource:
        """``count`` of the images in the model's size: chosen by the seed, or the first ones, if they are frames."""
        import numpy as np

        from cohobate.evaluation import ImageSource
        from cohobate.models.exports import read_config

        grid, there = self.source.grid, len(self.manifest)
        resized = None if self.export is None else read_config(self.export)["pretrained_cfg"].get("interpolation")
        order = np.random.default_rng(self.options.seed).permutation(there) if grid.frames == 1 else np.arange(there)
        return ImageSource(
            self.manifest.subset(np.sort(order[:count])),
            (grid.height, grid.width),
            interpolation=resized if resized in ("bilinear", "bicubic") else "bicubic",
            channels=grid.channels,
            batch_size=32,
            loader="torch",
            workers=0,
        )

    @cached_property
    def drawn(self) -> tuple[Tensor, list[str] | None]:
        """What is drawn, [n,T,H,W,C] uint8 on the device, and the names of images."""
        import torch

        frames = self.source.grid.frames
        count = min(self.options.count, len(self.manifest) // frames)
        if not count:
            expected = f"at least {frames} images, the frames of a clip in order"
            raise UserError(f"images: expected {expected}, got {len(self.manifest)}")
        reader = self.reader(count * frames)
        pixels, places = zip(*reader.batches(self.device), strict=True)
        whole = torch.cat(pixels).unflatten(0, (count, frames)).flatten(1, 2)
        names = [Path(reader.manifest.paths[place]).name for place in torch.cat(places).tolist()]
        return whole, names if frames == 1 else None

    @cached_property
    def clips(self) -> Any:
        """The images for a picture, [n,1,H,W,3]."""
        from cohobate.training.views import rgb

        return rgb(self.drawn[0]).cpu().numpy()

    @cached_property
    def plan(self) -> MaskPlan:
        """What the student is shown of the images; it depends on nothing but seed, mask and an image's place."""
        import torch

        from cohobate.masking import mask_plan

        options, mask = self.options, None if self.run is None else self.run[1].mask
        clip = self.source.grid.frames > 1
        usual = (0.9, "tube", "mask") if clip else (0.75, "random", "keep")
        if mask is not None:
            usual = (mask.ratio, mask.kind, mask.rounding)
        return mask_plan(
            self.source.grid,
            torch.arange(len(self.drawn[0]), device=self.device),
            kind=options.mask_kind or usual[1],
            seed=options.seed,
            stage=0,
            epoch=0,
            ratio=usual[0] if options.mask_ratio is None else options.mask_ratio,
            teacher_ratio=None if options.mask_ratio is not None else self.teacher_ratio,
            count=mask.count if mask is not None and options.mask_ratio is None else None,
            rounding=usual[2],
        )

    @property
    def teacher_ratio(self) -> float | None:
        """Share of the patches that a run hid from its teacher; None where that sees everything or there is none."""
        if self.run is None or self.run[1].stages[self.run[2]].method != "amd":
            return None
        return self.run[1].mask.teacher_ratio

    def tokens(self, values: Tensor) -> Any:
        """[n,N,...] on the token grid, [n,t,h,w,...], as an array."""
        return values.reshape(len(values), *self.source.grid.shape, *values.shape[2:]).cpu().numpy()

    @property
    def visible(self) -> Any:
        """bool [n,t,h,w]."""
        return self.tokens(~self.plan.to_boolean()[0])


def _masks(view: View) -> Figure:
    from cohobate.report import pictures

    taught = view.tokens(~view.plan.to_boolean()[1]) if view.plan.teacher < view.plan.tokens else None
    return pictures.masks(view.clips, view.visible, taught, titles=view.drawn[1])


def _pca(view: View) -> Figure:
    from cohobate.evaluation.extractor import Extractor
    from cohobate.report import pictures
    from cohobate.training.views import Colours

    extractor = Extractor(view.source, device=view.device)
    features = extractor.tokens(view.drawn[0])[:, extractor.prefix :]
    colours = view.tokens(Colours(features)(features))
    return pictures.components(view.clips, colours, titles=view.drawn[1])


def _attention(view: View) -> Figure:
    from cohobate.report import pictures
    from cohobate.training.views import looked_at

    anatomy = view.source.anatomy
    if anatomy is None:
        raise Impossible(f"{view.source.name} runs as it is: {'; '.join(view.source.reasons)}")
    found = looked_at(anatomy.to(device=view.device), view.drawn[0])
    weights = found["attention"].unsqueeze(2) if found["attention"].dim() == 4 else found["attention"]
    heads = found["attention_heads"].tolist()
    return pictures.attention(view.clips, weights.cpu().numpy(), heads, titles=view.drawn[1])


def _reconstruction(view: View) -> Figure:
    from cohobate.report import pictures
    from cohobate.training.views import predicted_pixels, reconstruct, rgb

    encoder, decoder = _autoencoder(view)
    grid, run = encoder.grid, view.run
    normalised = not view.options.plain_pixels and (run is None or run[1].mae.normalise)
    predicted = predicted_pixels(encoder, decoder, view.drawn[0], view.plan)
    per_colour = grid.frames > 1 or _method(view) == "videomae"
    convention = "videomae" if per_colour else "mae"
    whole = reconstruct(predicted, view.drawn[0], view.plan, encoder, convention=convention, normalised=normalised)
    return pictures.reconstruction(view.clips, view.visible, rgb(whole).cpu().numpy(), titles=view.drawn[1])


def _autoencoder(view: View) -> tuple[VisionTransformer, Any]:
    """Encoder and decoder of an export whose decoder predicts pixels."""
    import torch

    from cohobate.models import Precision
    from cohobate.models.exports import load_decoder, load_encoder

    if view.export is None:
        raise Impossible(f"{view.options.weights} has no decoder")
    if _method(view) == "dbot":
        raise Impossible(f"the decoder in {view.export} predicts features, not pixels")
    encoder = load_encoder(view.export, Precision(torch.float32, torch.float32))
    try:
        decoder = load_decoder(view.export, encoder)
    except UserError as error:  # an export from before the decoder's sizes were written
        raise Impossible(f"the decoder in {view.export} cannot be read ({error})") from None
    if decoder is None:
        raise Impossible(f"there is no decoder beside the weights in {view.export}")
    if decoder.out != encoder.grid.row_length:
        raise Impossible(f"the decoder in {view.export} predicts features, not pixels")
    return encoder.to(view.device).eval(), decoder.to(view.device).eval()


def _method(view: View) -> str | None:
    """What the export was trained with, as it says itself."""
    from cohobate.models.exports import read_config

    found = None if view.export is None else read_config(view.export).get("cohobate", {}).get("method")
    return None if found is None else str(found)


def _retrieval(view: View) -> Figure:
    from cohobate.evaluation.extractor import Extractor
    from cohobate.report import Retrieval, pictures
    from cohobate.training.views import neighbours

    if len(view.manifest) < 2:
        raise Impossible("it takes at least two images")
    if view.source.grid.frames > 1:
        raise Impossible("it is made of images, not of clips")
    extractor = Extractor(view.source, device=view.device)
    found = neighbours(extractor, view.reader(SEARCHED), view.reader(view.options.count), device=view.device)
    found["queries"], found["neighbours"] = found["queries"][:, None], found["neighbours"][:, :, None]
    return pictures.retrieval(Retrieval("", **found))


def _loss(view: View) -> Figure:
    return _of_the_run(view, "loss")


def _knn(view: View) -> Figure:
    return _of_the_run(view, "quality")


def _of_the_run(view: View, plot: str) -> Figure:
    from cohobate.report import plots, read_run

    if view.run is None:
        raise Impossible(f"{view.options.weights} is no run folder")
    figure: Figure | None = getattr(plots, plot)(read_run(view.run[0]))
    if figure is None:
        raise Impossible(f"nothing of it was logged in {view.run[0]}")
    return figure


OF_A_RUN: dict[str, Callable[[View], Figure]] = {"loss": _loss, "knn": _knn}
KINDS: dict[str, Callable[[View], Figure]] = {
    "masks": _masks,
    "pca": _pca,
    "attention": _attention,
    "reconstruction": _reconstruction,
    "retrieval": _retrieval,
    **OF_A_RUN,
}
