"""The one door: what it takes, what it refuses and how it says so; and modules that speak the protocol."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.teacher.sources import TeacherModule, fit, load_source
from cohobate.tokens import TokenGrid

Make = Callable[..., Any]


class Opaque(nn.Module):
    """A teacher of somebody's own: a convolution, one token in front, two layers of no transformer at all."""

    def __init__(self, grid: TokenGrid, **says: Any) -> None:
        super().__init__()
        _, ph, pw = grid.patch
        self.grid, self.width, self.depth, self.prefix = grid, 6, 2, 1
        self.mean, self.std = (0.5,) * grid.channels, (0.25,) * grid.channels
        self.conv = nn.Conv2d(grid.channels, 6, (ph, pw), (ph, pw))
        self.drop = nn.Dropout(0.5)
        for name, value in says.items():
            setattr(self, name, value)

    def hidden_states(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        x = self.drop(self.conv(images).flatten(2).transpose(1, 2))
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        return [x * (1 + layer) for layer in layers]


def test_a_module_that_speaks_the_protocol(pixels_of: Make) -> None:
    grid = TokenGrid.image((16, 24), 8)
    module = Opaque(grid).train()
    assert isinstance(module, TeacherModule)
    source = load_source(module)
    assert source.anatomy is None and "hidden_states" in source.reasons[0] and source.original is not None
    assert (source.width, source.depth, source.prefix, source.grid) == (6, 2, 1, grid)
    pixels = pixels_of(grid)
    found = source.original.hidden_states(pixels, [0, 2])
    images = (pixels[:, 0].permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        wanted = module.conv(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found[1][:, 1:], 3 * wanted)  # nothing dropped: it ran in eval mode
    assert not found[0].requires_grad and module.training and module.drop.training


def test_clips_come_with_time_behind_the_channels(pixels_of: Make) -> None:
    class Clips(Opaque):
        def hidden_states(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
            assert images.shape[1:] == (3, 4, 16, 24)
            return [images.mean(1).flatten(2)[:, :, :1].expand(-1, -1, 6).repeat(1, 4, 1)[:, :13] for _ in layers]

    assert load_source(Clips(TokenGrid(4, 16, 24, (2, 8, 8)))).grid.shape == (2, 2, 3)


@pytest.mark.parametrize("says", [{"width": 7}, {"prefix": 0}], ids=str)
def test_a_module_that_misleads(says: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"says {next(iter(says))}"):
        load_source(Opaque(TokenGrid.image(16, 8), **says))


def test_a_module_that_fails_or_has_too_few_tokens() -> None:
    class Failing(Opaque):
        def hidden_states(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
            raise RuntimeError("no such thing")

    class Short(Opaque):
        def hidden_states(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
            return [x[:, :3] for x in super().hidden_states(images, layers)]

    with pytest.raises(UserError, match="no such thing"):
        load_source(Failing(TokenGrid.image(16, 8)))
    with pytest.raises(UserError, match=r"expected features \[B, P \+ 4, D\], got \[1, 3, 6\]"):
        load_source(Short(TokenGrid.image(16, 8)))


def test_the_adapter_checks_its_input(pixels_of: Make) -> None:
    original = load_source(Opaque(TokenGrid.image(16, 8))).original
    assert original is not None
    pixels = pixels_of(original.grid)
    with pytest.raises(UserError, match=r"pixels: expected uint8 or floating \[B, 1, 16, 16, 3\]"):
        original.hidden_states(pixels.int(), [1])
    for layers in ([], [2, 1], [3], [-1]):
        with pytest.raises(UserError, match=r"layers: expected ascending numbers in \[0, 2\]"):
            original.hidden_states(pixels, layers)


def test_a_module_of_one_size_cannot_be_resized() -> None:
    source = load_source(Opaque(TokenGrid.image(16, 8)))
    with pytest.raises(UserError, match="runs as it is"):
        fit(source, TokenGrid.image(24, 8), "positions")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchhub:dino", "expected one of random:, timm:, hf: or a path"),
        ("hf:", "expected a name behind 'hf:'"),
        ("nowhere/at/all", "got 'nowhere/at/all'"),
        (3, "expected a string, a path or an nn.Module, got int"),
    ],
)
def test_what_is_no_source(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_source(spec)


def test_a_module_of_nobodys() -> None:
    with pytest.raises(UserError, match=r"Linear is no encoder .* lacks grid, width, depth, prefix, mean, std"):
        load_source(nn.Linear(3, 3))


@pytest.mark.parametrize(("name", "spec", "extra"), [("timm", "timm:x", "timm"), ("transformers", "hf:x", "hf")])
def test_a_package_that_is_missing(name: str, spec: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
            if fullname == name:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    hide(name, monkeypatch)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(UserError, match=rf"{name} is not installed \(pip install 'cohobate\[{extra}\]'\)"):
        load_source(spec)


@pytest.mark.parametrize(
    ("error", "told"),
    [("ModuleNotFoundError(\"No module named 'torchvision'\", name='torchvision')", "No module named 'torchvision'"),
     ("RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator torchvision::nms")],
)  # fmt: skip
def test_a_package_that_is_broken(error: str, told: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm.py").write_text(f"raise {error}\n")
    hide("timm", monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="timm is installed but cannot be imported") as caught:
        load_source("timm:vit_tiny_patch16_224")
    assert told in str(caught.value)


def hide(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [key for key in sys.modules if key.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)


def test_options_that_mean_nothing() -> None:
    with pytest.raises(UserError, match="takes no options, got seed"):
        load_source(Opaque(TokenGrid.image(16, 8)), seed=3)
