"""The tables of keys at their published sizes, and the account of what became of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cohobate.cli.convert import FORMATS
from cohobate.errors import UserError
from cohobate.interop import amd, dbot, formats, mae, timm, videomae
from cohobate.interop.coverage import Coverage
from cohobate.interop.parts import (
    HEADS,
    MAE_DECODER_HEADS,
    VIDEO_DECODER_HEADS,
    AlignmentSizes,
    DecoderSizes,
    Hints,
    Sizes,
    depth_of,
    heads_of,
    image_grid,
    ratio,
)
from cohobate.interop.reading import File
from cohobate.interop.table import Entry
from cohobate.models.positions import sincos_1d
from cohobate.tokens import TokenGrid

BASE: dict[str, Any] = {"width": 768, "depth": 12, "heads": 12, "hidden": 3072}
CLIP = TokenGrid(16, 224, 224, (2, 16, 16))


def keys(table: list[Entry]) -> list[str]:
    return [key for entry in table for key in entry.theirs]


def test_as_many_tensors_as_published() -> None:
    """The numbers are those of the published models of size B (the fine-tuned one is size L), printed from them."""
    image = TokenGrid.image(224, 16)
    decoder = DecoderSizes(512, 8, 16, 2048, 768, video=False, predicts="pixels")
    whole = Sizes(image, **BASE, cls=True, decoder=decoder, kind="whole")
    assert len(keys(mae.table(whole))) == len(keys(dbot.table(whole))) == 254
    assert len(keys(dbot.table(Sizes(image, 1024, 0, 16, 4096, cls=True, kind="encoder")))) == 6
    assert len(keys(timm.table(Sizes(image, **BASE, cls=True, kind="norm whole")))) == 152 - 2  # without the classifier
    small = DecoderSizes(384, 4, 6, 1536, 1536, video=True, predicts="pixels")
    video = Sizes(CLIP, **BASE, cls=False, decoder=small, kind="pretrained encoder.norm")
    assert len(keys(videomae.table(video))) == 218
    aligned = Sizes(CLIP, **BASE, cls=False, decoder=small, alignment=AlignmentSizes(2, 1024, 2, 16, 4096),
                    kind="pretrained encoder.norm")  # fmt: skip
    assert len(keys(amd.table(aligned))) + len(amd.extra(aligned)) == 276
    tuned = Sizes(CLIP, 1024, 24, 16, 4096, cls=False, kind="finetuned fc_norm")
    assert len(keys(videomae.table(tuned))) == 318 - 2  # without the classifier


def test_no_key_stands_twice_and_names_are_theirs() -> None:
    decoder = DecoderSizes(512, 8, 16, 2048, 768, video=False, predicts="features")
    table = dbot.table(Sizes(TokenGrid.image(224, 16), **BASE, cls=True, decoder=decoder, kind="whole"))
    assert len(set(keys(table))) == len(keys(table))
    assert {"decoder_predp.weight", "decoder_blocks.7.attn.qkv.bias", "decoder_pos_embed", "mask_token"} < set(
        keys(table)
    )
    assert list(formats()) == ["cohobate", "hf", "amd", "videomae", "dbot-clip", "dbot", "mae", "timm"]
    assert set(FORMATS) == set(formats())  # the command line names them without importing them


def test_join_and_split_are_transposes() -> None:
    """<join(a), b> = <a, split(b)> for every way that a tensor is made: gradients may go back through split."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for entry, parts in (
        (Entry("a", ("b",)), [draw(3, 4)]),
        (Entry("a", ("q", "k", "v"), "rows"), [draw(4, 4) for _ in range(3)]),
        (Entry("a", ("q", "v"), "qv"), [draw(5), draw(5)]),
        (Entry("a", ("b",), "patches"), [draw(1, 6, 4)]),
    ):
        whole = entry.join(parts)
        other = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
        back = entry.split(other)
        assert [part.shape for part in back] == [part.shape for part in parts]
        left = (whole * other).sum()
        right = sum((a * b).sum() for a, b in zip(parts, back, strict=True))
        torch.testing.assert_close(left, right)


def test_published_heads() -> None:
    for width, heads in ((192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)):
        assert heads_of(width, None, HEADS) == heads
    assert heads_of(512, None, MAE_DECODER_HEADS) == 16
    for width, heads in ((192, 3), (384, 6), (512, 8), (640, 8)):
        assert heads_of(width, None, VIDEO_DECODER_HEADS) == heads
    with pytest.raises(
        UserError, match="decoder-heads: expected a number, which no published model of width 100 tells"
    ):
        heads_of(100, None, {}, "decoder-heads")


def test_sizes_from_shapes() -> None:
    assert image_grid(196, (16, 16), 3, None) == TokenGrid.image(224, 16)
    assert image_grid(196, (16, 16), 3, (112, 448)) == TokenGrid.image((112, 448), 16)  # as many tokens: it is meant
    assert image_grid(196, (16, 16), 3, (224, 448)) == TokenGrid.image(224, 16)  # more: a size to be resized to
    with pytest.raises(UserError, match=r"image-size: expected the .height, width. that the 24 positions"):
        image_grid(24, (16, 16), 3, None)
    assert depth_of(["blocks.0.a", "blocks.1.a", "decoder.blocks.2.a"], "blocks.") == 2
    with pytest.raises(UserError, match=r"expected the blocks blocks\.0 to blocks\.2, found 2 of them"):
        depth_of(["blocks.0.a", "blocks.2.a"], "blocks.")
    for hidden, width in ((341, 96), (3072, 768), (1707, 640), (128, 48)):
        assert int(width * ratio(hidden, width)) == hidden


def test_short_clips_keep_the_one_dimensional_table(upstream: Any) -> None:
    """Two frames in a tubelet of two are one layer of tokens, and still not an image."""
    from cohobate import interop

    method = interop.load_videomae(
        upstream.videomae(), hints=interop.Hints(heads=4, decoder_heads=2, image_size=(24, 24), frames=2)
    )
    assert method.student.pos_embed is not None
    torch.testing.assert_close(method.student.pos_embed[0], sincos_1d(9, 64).float())
    torch.testing.assert_close(method.decoder.pos_embed[0], sincos_1d(9, 32).float())


def test_a_name_is_kept_only_if_it_is_the_same() -> None:
    """``student.`` stands in no file; ``mask_token`` for ``decoder.mask_token`` is another name."""
    assert (
        Entry("student.norm.weight", ("norm.weight",)).kept
        and Entry("decoder.mask_token", ("decoder.mask_token",)).kept
    )
    assert not Entry("decoder.mask_token", ("mask_token",)).kept
    assert not Entry("student.pos_embed", ("pos_embed",), "patches").kept


def test_numbers_below_one_are_refused() -> None:
    for hints, said in (({"frames": 0}, "frames"), ({"decoder_heads": -1}, "decoder-heads")):
        with pytest.raises(UserError, match=f"{said}: expected at least 1, got"):
            Hints(**hints)
    with pytest.raises(UserError, match=r"image-size: expected at least 1, got \(0, 32\)"):
        Hints(image_size=(0, 32))


def test_the_account_groups_blocks() -> None:
    account = Coverage("a file", [f"blocks.{i}.norm1.weight" for i in range(12)])
    account.renamed += [(f"decoder_blocks.{i}.mlp.fc1.{part}", f"decoder.blocks.{i}.mlp.fc1.{part}")
                        for i in range(2) for part in ("weight", "bias")]  # fmt: skip
    account.renamed += [("head.weight", "fc.weight"), ("head.bias", "fc.bias"), ("cls", "token")]
    account.renamed += [(f"b.{i}.q_bias + b.{i}.v_bias", f"b.{i}.qkv.bias") for i in range(2)]
    account.dropped += [("head.weight", "no classifier here"), ("head.bias", "no classifier here")]
    assert account.text().splitlines() == [
        "a file: 12 loaded, 9 renamed, 2 dropped, 0 missing",
        "  loaded   blocks.* (12)",
        "  renamed  decoder_blocks.* (4) -> decoder.blocks.*",
        "  renamed  head.* (2) -> fc.*",
        "  renamed  cls -> token",
        "  renamed  b.*.q_bias + b.*.v_bias (2) -> b.*.qkv.bias",
        "  dropped  head.* (2): no classifier here",
    ]


def test_guessed_heads_are_said(upstream: Any) -> None:
    """A wrong guess would give other features without a word: both sides of the comparison have it."""
    file = File("x", upstream.encoder(0))
    assert mae.FORMAT.load(file)[1].notes == ["attention heads are in no such file: 1, by the width"]
    assert mae.FORMAT.load(file, Hints(heads=4))[1].notes == []
