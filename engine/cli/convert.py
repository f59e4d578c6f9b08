"""``cohobate convert``: a checkpoint from one format to another, with an account of every tensor."""

from __future__ import annotations

from pathlib import Path

from cohobate.cli.parsing import Parser, parse

FORMATS = ("cohobate", "dbot", "mae", "videomae", "amd", "dbot-clip", "timm", "hf")


def main(arguments: list[str]) -> int:
    """Convert, and print what became of every tensor and the largest difference of the features."""
    parser = Parser(
        prog="cohobate convert",
        description="Convert a checkpoint, say what became of every tensor, and compare the features of both sides.",
    )
    parser.add_argument("source", help="file (.pth, .pt, .bin, .safetensors), folder of a model, or run folder")
    parser.add_argument("destination", type=Path, help="file or folder to write; nothing may be there without --force")
    parser.add_argument("--to", choices=FORMATS, default="cohobate", help="format to write (cohobate)")
    parser.add_argument("--from", choices=FORMATS, default=None, dest="form", help="format of the source (by its keys)")
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("H", "W"), help="resize the positions for this size"
    )
    parser.add_argument("--frames", type=int, help="frames of a clip; 1 makes an image model of a video model")
    parser.add_argument("--tubelet", type=int, help="frames of a patch, inflating an image model's kernel")
    parser.add_argument("--heads", type=int, help="attention heads, where width does not tell (64 channels a head)")
    parser.add_argument(
        "--decoder-heads", type=int, help="the same for the decoder (16 of MAE's, 64 channels of VideoMAE's)"
    )
    parser.add_argument("--teacher-heads", type=int, help="the same for AMD's generators")
    parser.add_argument(
        "--lenient", action="store_true", help="drop tensors that nothing explains, instead of refusing"
    )
    parser.add_argument("--force", action="store_true", help="replace what is at the destination")
    options = parse(parser, arguments)
    if options is None:
        return 0
    from cohobate.interop import Hints, convert

    size = options.image_size
    hints = Hints(
        heads=options.heads,
        decoder_heads=options.decoder_heads,
        teacher_heads=options.teacher_heads,
        image_size=None if size is None else (size[0], size[1]),
        frames=options.frames,
        tubelet=options.tubelet,
    )
    done = convert(
        options.source,
        options.destination,
        options.to,
        form=options.form,
        hints=hints,
        force=options.force,
        lenient=options.lenient,
    )
    print(done.text())
    print(f"written: {options.destination}")
    return 0
