"""random_order: a random permutation a sample, a pure function of (seed, stream, sample id).

    key[b, i]   word i % 4 of Philox4x32-10 at counter (i // 4, id_low, id_high, stream), key (seed_low, seed_high)
    out[b]      the indices 0..length-1 in the order of their keys; equal keys in the order of their index

| tensor     | shape       | dtype | strides    |
|------------|-------------|-------|------------|
| sample_ids | [B]         | int64 | any        |
| out        | [B, length] | int32 | contiguous |

Philox is counter based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so no state is kept and
batch, worker, rank, device and implementation do not matter: all of them give the same bits. Bytes: 8 B read and
4 B * length written a sample; about 20 integer operations a key, and the sort.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cohobate.kernels import tuning
from cohobate.kernels.registry import Cost, Op, check_tensor, choose, define, register
from cohobate.kernels.triton_support import architecture, jit, tl, triton

if TYPE_CHECKING:
    from cohobate.kernels.aot import AotCase

_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox_reference(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        h0, l0 = _multiply(c0, _M0)
        h1, l1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a 32x32-bit product, without overflowing int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return (middle >> 16) & _MASK, ((middle << 16) | (low & 0xFFFF)) & _MASK


def random_order_reference(sample_ids: Tensor, length: int, *, seed: int, stream: int = 0) -> Tensor:
    """Reference of :func:`random_order`."""
    ids = sample_ids.view(-1, 1)
    block = torch.arange((length + 3) // 4, device=ids.device).view(1, -1)
    zero = torch.zeros_like(ids + block)
    counter = (block + zero, (ids & _MASK) + zero, ((ids >> 32) & _MASK) + zero, (stream & _MASK) + zero)
    words = philox_reference(counter, (seed & _MASK, (seed >> 32) & _MASK))
    keys = torch.stack(words, dim=-1).flatten(1)[:, :length]
    return keys.argsort(dim=1, stable=True).to(torch.int32)


def random_order_cost(batch: int, length: int) -> Cost:
    """Floor: ids read once, indices written once; ten rounds of two products a counter of four keys."""
    return Cost(bytes=batch * (8 + 4 * length), flops=batch * length * 5)


# ---------------------------------------------------------------------------------------------------------- Triton


@jit
def _keys(first, id_low, id_high, stream, seed_low, seed_high, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint64 [BLOCK]: key << 32 | index of the indices from ``first``, a multiple of 4, on."""
    c0 = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    c1, c2, c3 = c0 * 0 + id_low, c0 * 0 + id_high, c0 * 0 + stream
    k0, k1 = seed_low, seed_high
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    key = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
    return key.to(tl.uint64) << 32 | (first + tl.arange(0, BLOCK)).to(tl.uint64)


@jit(do_not_specialize=["seed_low", "seed_high", "stream"])
def _random_order_kernel(  # type: ignore[no-untyped-def]
    ids_ptr,
    out_ptr,
    length,
    stride_ids,
    seed_low,
    seed_high,
    stream,
    BLOCK: tl.constexpr,
):
    """One program places BLOCK indices of one sample: an index goes where as many keys are smaller than its own.

    Counting takes length**2 comparisons, but needs no pass over shared memory and knows no largest length.
    """
    sample = tl.program_id(0).to(tl.int64)
    sample_id = tl.load(ids_ptr + sample * stride_ids)
    id_low, id_high = sample_id.to(tl.uint32), (sample_id >> 32).to(tl.uint32)
    s0, s1, s2 = seed_low.to(tl.uint32), seed_high.to(tl.uint32), stream.to(tl.uint32)
    first = tl.program_id(1) * BLOCK
    mine = _keys(first, id_low, id_high, s2, s0, s1, BLOCK)
    rank = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        theirs = _keys(start, id_low, id_high, s2, s0, s1, BLOCK)
        smaller = (theirs[None, :] < mine[:, None]) & (start + tl.arange(0, BLOCK) < length)[None, :]
        rank += tl.sum(smaller.to(tl.int32), axis=1)
    index = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + sample * length + rank, index, mask=index < length)


def _random_order_triton(sample_ids: Tensor, length: int, seed: int, stream: int) -> Tensor:
    out = sample_ids.new_empty(sample_ids.shape[0], length, dtype=torch.int32)
    if out.numel():
        config = tuning.lookup("random_order", "torch.int32", 1, length, architecture(sample_ids.device))
        grid = (sample_ids.shape[0], triton.cdiv(length, config["BLOCK"]))
        words = [((word & _MASK) ^ 1 << 31) - (1 << 31) for word in (seed, seed >> 32, stream)]  # as int32
        with torch.cuda.device_of(sample_ids):
            _random_order_kernel[grid](sample_ids, out, length, sample_ids.stride(0), *words, **config)
    return out


def aot_cases(architecture: str) -> list[AotCase]:
    """The kernel as the launcher above calls it, for :mod:`cohobate.kernels.aot`."""
    from cohobate.kernels.aot import AotCase, shipped

    words = {"seed_low": "i32", "seed_high": "i32", "stream": "i32"}
    return [
        AotCase(
            kernel=_random_order_kernel,
            signature={"ids_ptr": "*i64", "out_ptr": "*i32", "length": "i32", **words},
            constexprs={"stride_ids": 1},
            config=config,
            expects=frozenset(),
            name=f"block {config['BLOCK']}",
        )
        for _, _, config in shipped("random_order", architecture, dtypes=(torch.int32,), widths=(1,))
    ]


# ---------------------------------------------------------------------------------------------------------- native


def _random_order_native(sample_ids: Tensor, length: int, seed: int, stream: int) -> Tensor:
    out = sample_ids.new_empty(sample_ids.shape[0], length, dtype=torch.int32)
    torch.ops.cohobate_native.random_order(sample_ids, seed, stream, out)
    return out


# ---------------------------------------------------------------------------------------------------- registration

register(Op("random_order", ("reference", "native", "triton"), random_order_cost))

_random_order_op = define(
    "random_order(Tensor sample_ids, SymInt length, SymInt seed, SymInt stream, str impl) -> Tensor",
    fake=lambda sample_ids, length, seed, stream: sample_ids.new_empty(sample_ids.shape[0], length, dtype=torch.int32),
    native=_random_order_native,
    triton=_random_order_triton,
)


# ---------------------------------------------------------------------------------------------------------- public


def random_order(sample_ids: Tensor, length: int, *, seed: int, stream: int = 0, backend: str | None = None) -> Tensor:
    """A random permutation of 0..length-1 for each sample, the same bits whatever computes it.

    Args:
        sample_ids: [B] int64; a sample's permutation depends on its id, not on its place in the batch.
        length: N, at least 0.
        seed: 64 bits; a negative number stands for its two's complement.
        stream: 32 bits; other streams of a seed are independent (one for each stage and epoch, say).
        backend: auto (None), reference, native or triton.

    Returns:
        [B, length] int32 on the device of ``sample_ids``.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    check_tensor("sample_ids", sample_ids, dtypes=(torch.int64,), shape=(None,))
    for name, value, low, high in (
        ("length", length, 0, 1 << 31),
        ("seed", seed, -1 << 63, 1 << 64),
        ("stream", stream, 0, 1 << 32),
    ):
        if not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if not low <= value < high:
            raise ValueError(f"{name}: expected a number from {low} to {high - 1}, got {value}")
    impl = choose("random_order", sample_ids, backend)
    if impl == "reference":
        return random_order_reference(sample_ids, length, seed=seed, stream=stream)
    seed = seed - (1 << 64) if seed >= 1 << 63 else seed  # the bits as int64, which is what an op takes
    out: Tensor = _random_order_op(sample_ids, length, seed, stream, impl)
    return out
