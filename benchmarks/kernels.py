"""``cohobate bench kernels``: every op, ours against the literal eager form, its compilation and our reference."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import torch

from cohobate.benchmarks import cases, command
from cohobate.benchmarks.harness import Row, measure
from cohobate.errors import UserError

CLIP_OPS = ("gather_patches", "embed_patches", "assemble_visible_first", "pixel_loss_video", "align_layers_mse")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 (slower than stored rows) or 2 (a mistake in the call)."""
    return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="cohobate bench kernels", description=__doc__)
    command.add_options(parser)
    known = (*cases.CASES, *cases.MORE, *cases.SOMEWHERE)
    parser.add_argument(
        "--ops", default="all", help=f"all, or some of {', '.join(known)} (default: what dBOT uses everywhere)"
    )
    parser.add_argument("--size", choices=tuple(cases.WIDTHS), default="vit-b", help="model size (default: vit-b)")
    parser.add_argument("--batch", type=int, default=64, help="images a call (default: 64; 8 stay in the caches)")
    parser.add_argument(
        "--clips",
        action="store_true",
        help="VideoMAE's shapes: 16 frames, tubelets of 2, a tenth visible; --batch clips",
    )
    parser.add_argument("--dtypes", default="fp32,bf16", help="fp32 first, the baseline's (default: fp32,bf16)")
    args = parser.parse_args(argv)
    names = list(CLIP_OPS if args.clips else cases.CASES) if args.ops == "all" else args.ops.split(",")
    dtypes = tuple(args.dtypes.split(","))
    if args.batch < 1:
        raise UserError(f"--batch: expected at least 1, got {args.batch}")
    if not set(dtypes) <= {"fp32", "bf16", "fp16"} or "fp32" not in dtypes:
        raise UserError(f"--dtypes: expected fp32 and any of bf16, fp16; got {args.dtypes!r}")
    for name in names:
        if name not in known:
            raise UserError(f"--ops: expected all, or some of {', '.join(known)}; got {name!r}")
    console = command.wide_console()
    sizes = cases.Sizes(batch=args.batch, width=cases.WIDTHS[args.size])
    if args.clips:
        sizes = dataclasses.replace(sizes, decoder=sizes.width // 2, keep=0.1, frames=16, tubelet=2)
    if args.quick:
        sizes = cases.Sizes(batch=2, width=192, image=64, decoder=128)
    setting = command.prepare(args)
    rows: list[Row] = []
    with console.status("") as status:
        for name in names:
            status.update(f"{name} ({len(rows)} rows so far)")
            rows += measure_op(name, sizes, setting, args.seed, dtypes)
            command.save(args, setting, rows)
    return command.finish(args, setting, rows, console)


def measure_op(
    name: str, sizes: cases.Sizes, setting: command.Setting, seed: int, dtypes: tuple[str, ...] = ("fp32", "bf16")
) -> list[Row]:
    """All rows of one op, mode by mode."""
    kernel = cases.build(name, sizes, setting.device, seed)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size if setting.device == "cuda" else 0
    rows: list[Row] = []
    for mode in kernel.modes:
        rows += measure(
            kernel.case(mode),
            cases.providers(kernel, mode, dtypes=dtypes, l2_bytes=l2),
            ceilings=setting.ceilings,
            environment=setting.environment,
            effort=setting.effort,
        )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
