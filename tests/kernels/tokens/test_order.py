"""random_order: known answers, the same bits from every implementation, and permutations that look random."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cohobate.kernels import native
from cohobate.kernels.tokens import random_order
from cohobate.kernels.tokens.order import philox_reference

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native.why_not()), reason="native library not built"))
FAST = [NATIVE, pytest.param("triton", marks=pytest.mark.interpreter)]
ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    """The known-answer vectors that Random123 publishes for philox4x32-10."""
    words = philox_reference(tuple(torch.tensor([word]) for word in counter), key)  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == answer


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_orders_do_not_change_between_versions(backend: str) -> None:
    """Masks of a resumed run must be those of the run: these values are part of the interface."""
    ids = torch.tensor([0, 1, -1])
    expected = [[7, 5, 0, 3, 6, 2, 1, 4], [3, 7, 0, 4, 2, 5, 1, 6], [6, 2, 5, 4, 0, 1, 7, 3]]
    assert random_order(ids, 8, seed=0, backend=backend).tolist() == expected
    order = random_order(torch.tensor([7]), 8, seed=2**40 + 3, stream=5, backend=backend)
    assert order.tolist() == [[4, 7, 6, 1, 0, 5, 2, 3]]


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    length=st.integers(0, 210),
    seed=st.integers(-(2**63), 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
)
def test_same_bits_as_the_reference(backend: str, ids: list[int], length: int, seed: int, stream: int) -> None:
    sample_ids = torch.tensor(ids)
    found = random_order(sample_ids, length, seed=seed, stream=stream, backend=backend)
    assert found.dtype == torch.int32 and found.is_contiguous()
    assert torch.equal(found, random_order(sample_ids, length, seed=seed, stream=stream, backend="reference"))
    assert torch.equal(found.sort(dim=1).values, torch.arange(length, dtype=torch.int32).expand(len(ids), -1))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_equal_keys_keep_the_order_of_their_index(backend: str) -> None:
    sample, length = 1333, 2048  # the first sample of seed 0 with two equal keys
    zero = torch.zeros(length // 4, dtype=torch.int64)
    words = philox_reference((torch.arange(length // 4), zero + sample, zero, zero), (0, 0))
    keys = torch.stack(words, dim=-1).flatten()
    ascending = keys.sort().values
    (place,) = (ascending[1:] == ascending[:-1]).nonzero().flatten().tolist()
    order = random_order(torch.tensor([sample]), length, seed=0, backend=backend)[0]
    assert keys[order.long()].equal(ascending)
    assert order[place] < order[place + 1]


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_depends_on_the_sample_alone(backend: str) -> None:
    ids = torch.tensor([5, 9, 5, -3])
    order = random_order(ids, 40, seed=1, backend=backend)
    assert torch.equal(order[0], order[2])
    assert torch.equal(order.flip(0), random_order(ids.flip(0), 40, seed=1, backend=backend))
    assert torch.equal(order[1:2], random_order(ids[1:2], 40, seed=1, backend=backend))
    assert torch.equal(order[::2], random_order(ids[::2], 40, seed=1, backend=backend))  # strided ids
    assert not torch.equal(order, random_order(ids, 40, seed=2, backend=backend))
    assert not torch.equal(order, random_order(ids, 40, seed=1, stream=1, backend=backend))
    assert not torch.equal(order, random_order(ids, 40, seed=1 + 2**32, backend=backend))
    assert not torch.equal(order, random_order(ids + 2**32, 40, seed=1, backend=backend))
    assert torch.equal(random_order(ids, 40, seed=-1), random_order(ids, 40, seed=2**64 - 1))


def test_positions_are_uniform() -> None:
    """Where an index lands is uniform: chi-squared over samples, and over the streams of one sample."""
    samples, length = 2048, 12
    by_sample = random_order(torch.arange(samples), length, seed=11)
    by_stream = torch.cat([random_order(torch.tensor([3]), length, seed=11, stream=s) for s in range(samples)])
    for order in (by_sample, by_stream):
        counts = torch.stack([(order == index).sum(dim=0) for index in range(length)]).double()
        expected = samples / length
        statistic = float(((counts - expected) ** 2 / expected).sum())
        freedom = (length - 1) ** 2  # rows and columns of the table both have fixed sums
        assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def test_neighbours_are_independent() -> None:
    """Visible quarters of neighbouring samples, streams and seeds overlap as two independent choices would."""
    length, kept, samples = 64, 16, 4000
    ids = torch.arange(samples)

    def visible(ids: Tensor, seed: int, stream: int) -> Tensor:
        return torch.zeros(samples, length).scatter(
            1, random_order(ids, length, seed=seed, stream=stream)[:, :kept].long(), 1
        )

    first = visible(ids, 0, 0)
    mean = kept * kept / length
    deviation = (mean * (1 - kept / length) * (length - kept) / (length - 1)) ** 0.5  # hypergeometric
    for other in (visible(ids + 1, 0, 0), visible(ids, 0, 1), visible(ids, 1, 0)):
        overlap = float((first * other).sum(dim=1).mean())
        assert abs(overlap - mean) < 4 * deviation / samples**0.5


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_empty(backend: str) -> None:
    assert random_order(torch.zeros(0, dtype=torch.int64), 5, seed=0, backend=backend).shape == (0, 5)
    assert random_order(torch.tensor([4, 5]), 0, seed=0, backend=backend).shape == (2, 0)
    assert random_order(torch.tensor([4]), 1, seed=0, backend=backend).tolist() == [[0]]


@pytest.mark.skipif(bool(native.why_not()), reason="native library not built")
def test_opcheck_and_compile() -> None:
    ids = torch.tensor([3, 1, 2])
    torch.library.opcheck(torch.ops.cohobate.random_order.default, (ids, 9, -5, 2, "native"))
    torch._dynamo.reset()
    compiled = torch.compile(random_order, fullgraph=True, backend="aot_eager")
    for seed, length in ((0, 9), (77, 9), (2**62, 12), (-(2**62), 13)):  # numbers that change become symbolic
        assert torch.equal(compiled(ids, length, seed=seed), random_order(ids, length, seed=seed))


def test_other_seeds_do_not_compile_other_kernels() -> None:
    triton = pytest.importorskip("triton")
    from cohobate.kernels.tokens.order import _random_order_kernel

    assert isinstance(_random_order_kernel, triton.JITFunction)
    fixed = {parameter.name for parameter in _random_order_kernel.params if parameter.do_not_specialize}
    assert {"seed_low", "seed_high", "stream"} <= fixed


IDS = torch.tensor([1, 2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random_order(IDS.int(), 4, seed=0), TypeError, "sample_ids: expected dtype int64, got int32"),
        (lambda: random_order(IDS[None], 4, seed=0), ValueError, r"sample_ids: expected shape \[any\], got \[1, 2\]"),
        (lambda: random_order(IDS, -1, seed=0), ValueError, "length: expected a number from 0 to 2147483647, got -1"),
        (lambda: random_order(IDS, 4.0, seed=0), TypeError, "length: expected an int, got float"),
        (lambda: random_order(IDS, 4, seed=2**64), ValueError, "seed: expected a number from -.* to .*, got 184.*"),
        (lambda: random_order(IDS, 4, seed=IDS), TypeError, "seed: expected an int, got Tensor"),
        (lambda: random_order(IDS, 4, seed=0, stream=-1), ValueError, "stream: expected a number from 0 to .*, got -1"),
    ],
)
def test_bad_input_is_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        call()  # type: ignore[operator]


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 49, 196, 1568, 2048, 5000])
def test_gpu(length: int) -> None:
    ids = torch.tensor([0, 1, -1, 1333, 2**62 + 7])
    for seed, stream in ((0, 0), (2**63 + 11, 2**32 - 1)):
        expected = random_order(ids, length, seed=seed, stream=stream, backend="reference")
        assert torch.equal(random_order(ids.cuda(), length, seed=seed, stream=stream, backend="triton").cpu(), expected)
