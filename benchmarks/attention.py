"""``cohobate bench attention``: every attention backend that can run here, for the table that chooses between them.

What comes first in ``kernels/tuning/attention.json`` should be what is fastest in these rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cohobate.benchmarks import command
from cohobate.benchmarks.harness import TOLERANCE, Case, Provider, Row, measure
from cohobate.benchmarks.machine import DTYPES
from cohobate.errors import UserError
from cohobate.kernels import Cost
from cohobate.kernels.backends.attention import BACKENDS, attend, why_not
from cohobate.kernels.transformer.attention import attention_cost, short_attention_reference

KEYS = (50, 64, 128, 197, 256, 392, 1568)
WIDTH = 768  # of all heads together
MODES = {"fwd": False, "fwd+bwd": True}


def measure_length(keys: int, dim: int, batch: int, dtype: str, setting: command.Setting, seed: int) -> list[Row]:
    """All rows of one sequence length, head dim and dtype, with and without gradient."""
    generator = torch.Generator().manual_seed(seed)
    heads, kind = WIDTH // dim, DTYPES[dtype]
    qkv = torch.randn(batch, keys, 3 * WIDTH, generator=generator).to(kind).to(setting.device)
    grad = torch.randn(batch, keys, WIDTH, generator=generator).to(kind).to(setting.device)
    leaf = qkv.double().requires_grad_()
    out = short_attention_reference(leaf, heads)
    answer = {"out": out.detach(), "grad qkv": torch.autograd.grad(out, leaf, grad.double())[0]}
    rows: list[Row] = []
    for mode, backward in MODES.items():
        cost = attention_cost(batch, keys, keys, heads, dim, kind.itemsize)
        if backward:
            other = attention_cost(batch, keys, keys, heads, dim, kind.itemsize, backward=True)
            cost = Cost(cost.bytes + other.bytes, cost.flops + other.flops)
        expected = answer if backward else {"out": answer["out"]}
        case = Case("attention", f"{batch} x {keys} keys, {heads} heads of {dim}", setting.device, expected)
        providers = [
            Provider(
                name,
                mode,
                _runner(name, qkv, grad if backward else None, heads),
                role={"explicit": "eager", "short": "ours"}.get(name, "other"),
                dtype=dtype,
                results=_results,
                tolerance=2 * TOLERANCE[dtype] if dtype != "fp32" else None,  # scores are rounded, too
                cost=cost,
            )
            for name in BACKENDS
            if not why_not(name, setting.device, kind, keys, dim, backward)
        ]
        rows += measure(
            case,
            providers,
            ceilings=setting.ceilings,
            environment=setting.environment,
            effort=setting.effort,
            baselines=("eager",),
        )
    return rows


def _runner(name: str, qkv: Tensor, grad: Tensor | None, heads: int) -> Callable[[], tuple[Tensor, ...]]:
    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (attend(qkv, heads, backend=name),)

    def both() -> tuple[Tensor, ...]:
        leaf = qkv.detach().requires_grad_()
        out = attend(leaf, heads, backend=name)
        return out.detach(), *torch.autograd.grad(out, leaf, grad)

    return forward if grad is None else both


def _results(found: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
    return dict(zip(("out", "grad qkv"), found, strict=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit code 0, 1 (slower than stored rows) or 2 (a mistake in the call)."""
    return command.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="cohobate bench attention", description=__doc__)
    command.add_options(parser)
    parser.add_argument("--keys", default=",".join(map(str, KEYS)), help="sequence lengths, comma-separated")
    parser.add_argument("--dims", default="64,32", help="head dims, comma-separated, divisors of 768 (default: 64,32)")
    parser.add_argument("--batch", type=int, default=8, help="samples a call (default: 8)")
    parser.add_argument("--dtypes", default="bf16,fp32", help="any of bf16, fp16, fp32 (default: bf16,fp32)")
    args = parser.parse_args(argv)
    keys, dims, dtypes = _numbers("--keys", args.keys), _numbers("--dims", args.dims), args.dtypes.split(",")
    if not set(dtypes) <= {"fp32", "bf16", "fp16"}:
        raise UserError(f"--dtypes: expected any of bf16, fp16, fp32; got {args.dtypes!r}")
    if any(WIDTH % dim for dim in dims):
        raise UserError(f"--dims: expected divisors of {WIDTH}, got {args.dims!r}")
    if args.batch < 1:
        raise UserError(f"--batch: expected at least 1, got {args.batch}")
    setting = command.prepare(args)
    console, rows = command.wide_console(), []
    with console.status("") as status:
        for dtype in dtypes:
            for dim in dims:
                for length in keys:
                    status.update(f"{dtype}, {length} keys, head dim {dim}")
                    rows += measure_length(length, dim, args.batch, dtype, setting, args.seed)
                    command.save(args, setting, rows)
    return command.finish(args, setting, rows, console)


def _numbers(option: str, text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if not numbers or len(numbers) != len(text.split(",")) or min(numbers) < 1:
        raise UserError(f"{option}: expected positive numbers with commas between, got {text!r}")
    return numbers


if __name__ == "__main__":
    raise SystemExit(main())
