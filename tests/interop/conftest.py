"""Checkpoints as the published codes lay them out, small and random, and their losses as literal formulas.

The formulas are written from the papers and from the tables of keys; they read the published names and share no code
with the package.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Upstream:
    """Random weights under published names, and the published losses of them.

    Images are 32 x 32 in patches of 8, clips 4 frames of 24 x 24 in tubelets of 2 x 8 x 8; heads have 16 channels.
    """

    image, clip = (32, 32), (24, 24)
    student, decoder, wide = 64, 32, 96  # widths: of the encoder, its decoder, and AMD's teacher

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    # -- weights ---------------------------------------------------------------------------------------------------

    def draw(self, *shape: int, about: float = 0.0) -> Tensor:
        """Matrices keep the scale of what goes through them; nothing is left neutral."""
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.3
        return about + scale * torch.randn(*shape, generator=self.generator)

    def blocks(self, prefix: str, depth: int, width: int, *, qv: bool = False) -> dict[str, Tensor]:
        w: dict[str, Tensor] = {}
        for i in range(depth):
            b = f"{prefix}{i}."
            for norm in ("norm1", "norm2"):
                w |= {f"{b}{norm}.weight": self.draw(width, about=1), f"{b}{norm}.bias": self.draw(width)}
            w[f"{b}attn.qkv.weight"] = self.draw(3 * width, width)
            if qv:
                w |= {f"{b}attn.q_bias": self.draw(width), f"{b}attn.v_bias": self.draw(width)}
            else:
                w[f"{b}attn.qkv.bias"] = self.draw(3 * width)
            w |= {f"{b}attn.proj.weight": self.draw(width, width), f"{b}attn.proj.bias": self.draw(width)}
            w |= {f"{b}mlp.fc1.weight": self.draw(4 * width, width), f"{b}mlp.fc1.bias": self.draw(4 * width)}
            w |= {f"{b}mlp.fc2.weight": self.draw(width, 4 * width), f"{b}mlp.fc2.bias": self.draw(width)}
        return w

    def affine(self, name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self.draw(width, about=1), f"{name}.bias": self.draw(width)}

    def linear(self, name: str, out: int, inside: int) -> dict[str, Tensor]:
        return {f"{name}.weight": self.draw(out, inside), f"{name}.bias": self.draw(out)}

    def encoder(self, depth: int = 2, width: int | None = None, tokens: int = 16) -> dict[str, Tensor]:
        """MAE's encoder, dBOT's teacher, and timm's ViT."""
        width = width or self.student
        w = {"cls_token": self.draw(1, 1, width), "pos_embed": self.draw(1, tokens + 1, width)}
        w["pos_embed"][:, 0] = 0
        w |= {"patch_embed.proj.weight": self.draw(width, 3, 8, 8) / 5, "patch_embed.proj.bias": self.draw(width)}
        return w | self.blocks("blocks.", depth, width) | self.affine("norm", width)

    def whole(self, head: str, out: int, tokens: int = 16) -> dict[str, Tensor]:
        """Encoder and decoder of MAE ("decoder_pred") or dBOT ("decoder_predp")."""
        d = self.decoder
        w = self.encoder(tokens=tokens) | self.linear("decoder_embed", d, self.student)
        w |= {"mask_token": self.draw(1, 1, d), "decoder_pos_embed": self.draw(1, tokens + 1, d)}
        w |= self.blocks("decoder_blocks.", 2, d) | self.affine("decoder_norm", d)
        return w | self.linear(head, out, d)

    def dbot(self) -> dict[str, Tensor]:
        return self.whole("decoder_predp", self.student)

    def mae(self) -> dict[str, Tensor]:
        return self.whole("decoder_pred", 192)

    def videomae(self) -> dict[str, Tensor]:
        d, width = self.decoder, self.student
        w = {"encoder.patch_embed.proj.weight": self.draw(width, 3, 2, 8, 8) / 5}
        w["encoder.patch_embed.proj.bias"] = self.draw(width)
        w |= self.blocks("encoder.blocks.", 4, width, qv=True) | self.affine("encoder.norm", width)
        w |= {"encoder_to_decoder.weight": self.draw(d, width), "mask_token": self.draw(1, 1, d)}
        w |= self.blocks("decoder.blocks.", 2, d, qv=True) | self.affine("decoder.norm", d)
        return w | self.linear("decoder.head", 384, d)

    def amd(self) -> dict[str, Tensor]:
        w = self.videomae()
        for k in range(2):
            w[f"encoder.projection_heads.{k}.weight"] = self.draw(self.wide, self.student)
            w |= self.blocks(f"generators.{k}.blocks.", 2, self.wide, qv=True)
            w |= self.affine(f"generators.{k}.norm", self.wide)
        return w

    def finetuned(self) -> dict[str, Tensor]:
        """A fine-tuned VideoMAE, such as AMD's teacher."""
        width = self.wide
        w = {"patch_embed.proj.weight": self.draw(width, 3, 2, 8, 8) / 5, "patch_embed.proj.bias": self.draw(width)}
        w |= self.blocks("blocks.", 4, width, qv=True) | self.affine("fc_norm", width)
        return w | self.linear("head", 7, width)

    def save(self, path: Path, weights: Weights) -> Path:
        """As the published codes save: the arguments of the run beside the weights."""
        arguments = argparse.Namespace(model="mae_vit_base_patch16", blr=1.5e-4, stage_epochs=[0, 800])
        torch.save({"model": dict(weights), "epoch": 3, "scaler": {"scale": 2.0}, "args": arguments}, path)
        return path

    # -- pixels ----------------------------------------------------------------------------------------------------

    def pixels(self, *shape: int) -> Tensor:
        """Bytes [B, T, H, W, C]."""
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator)

    @staticmethod
    def normalised(pixels: Tensor) -> Tensor:
        """[B, T, H, W, C] as the published codes' loaders give them."""
        return (pixels.float() / 255 - MEAN) / STD

    def masked(self, batch: int, tokens: int, visible: int) -> Tensor:
        """Random masks [B, N], True where hidden."""
        order = torch.rand(batch, tokens, generator=self.generator).argsort(1)
        return order >= visible

    # -- losses ----------------------------------------------------------------------------------------------------

    @staticmethod
    def block(x: Tensor, w: Weights, b: str, heads: int) -> Tensor:
        def norm(x: Tensor, name: str) -> Tensor:
            centred = x - x.mean(-1, keepdim=True)
            var = centred.square().mean(-1, keepdim=True)
            return centred / (var + 1e-6).sqrt() * w[f"{b}{name}.weight"] + w[f"{b}{name}.bias"]

        bias = w.get(f"{b}attn.qkv.bias")
        if bias is None:
            bias = torch.cat([w[f"{b}attn.q_bias"], torch.zeros(x.shape[-1]), w[f"{b}attn.v_bias"]])
        qkv = norm(x, "norm1") @ w[f"{b}attn.qkv.weight"].T + bias
        size = x.shape[-1] // heads
        parts = []
        for h in range(heads):
            q, k, v = (part[..., h * size : (h + 1) * size] for part in qkv.split(x.shape[-1], dim=-1))
            parts.append(torch.softmax(q @ k.mT / math.sqrt(size), dim=-1) @ v)
        x = x + torch.cat(parts, dim=-1) @ w[f"{b}attn.proj.weight"].T + w[f"{b}attn.proj.bias"]
        hidden = norm(x, "norm2") @ w[f"{b}mlp.fc1.weight"].T + w[f"{b}mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return x + hidden @ w[f"{b}mlp.fc2.weight"].T + w[f"{b}mlp.fc2.bias"]

    def run(self, x: Tensor, w: Weights, prefix: str, depth: int) -> Tensor:
        for i in range(depth):
            x = self.block(x, w, f"{prefix}{i}.", x.shape[-1] // 16)
        return x

    @staticmethod
    def norm(x: Tensor, w: Weights, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def prediction(self, w: Weights, images: Tensor, mask: Tensor, head: str) -> Tensor:
        """MAE's and dBOT's forward pass: images [B, C, H, W], predictions of all N + 1 tokens."""
        x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
        x = x.flatten(2).transpose(1, 2) + w["pos_embed"][:, 1:]
        x = torch.stack([row[~hidden] for row, hidden in zip(x, mask, strict=True)])
        x = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), -1, -1), x], dim=1)
        x = self.norm(self.run(x, w, "blocks.", 2), w, "norm")
        x = x @ w["decoder_embed.weight"].T + w["decoder_embed.bias"]
        rows = []
        for tokens, hidden in zip(x, mask, strict=True):
            row = w["mask_token"][0].expand(len(hidden), -1).clone()
            row[~hidden] = tokens[1:]
            rows.append(torch.cat([tokens[:1], row]))
        x = self.run(torch.stack(rows) + w["decoder_pos_embed"], w, "decoder_blocks.", 2)
        return self.norm(x, w, "decoder_norm") @ w[f"{head}.weight"].T + w[f"{head}.bias"]

    def dbot_loss(self, w: Weights, teacher: Weights, images: Tensor, mask: Tensor, depth: int) -> Tensor:
        t = F.conv2d(images, teacher["patch_embed.proj.weight"], teacher["patch_embed.proj.bias"], stride=8)
        t = t.flatten(2).transpose(1, 2) + teacher["pos_embed"][:, 1:]
        t = torch.cat([(teacher["cls_token"] + teacher["pos_embed"][:, :1]).expand(len(t), -1, -1), t], dim=1)
        t = self.run(t, teacher, "blocks.", depth)
        t = (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (self.prediction(w, images, mask, "decoder_predp") - t).abs()
        loss = torch.where(error < 2, error**2 / 4, error - 1).mean(-1)
        counted = torch.cat([torch.ones(len(mask), 1), mask.float()], dim=1)
        return (loss * counted).sum() / counted.sum()

    def mae_loss(self, w: Weights, images: Tensor, mask: Tensor) -> Tensor:
        q = images.unflatten(2, (4, 8)).unflatten(4, (4, 8)).permute(0, 2, 4, 3, 5, 1).reshape(len(images), 16, 192)
        q = (q - q.mean(-1, keepdim=True)) / (q.var(-1, keepdim=True) + 1e-6).sqrt()
        loss = (self.prediction(w, images, mask, "decoder_pred")[:, 1:] - q).square().mean(-1)
        return (loss * mask).sum() / mask.sum()

    @staticmethod
    def sinusoid(length: int, width: int) -> Tensor:
        table = torch.zeros(length, width, dtype=torch.float64)
        for n in range(length):
            for j in range(width):
                angle = n / 10000 ** (2 * (j // 2) / width)
                table[n, j] = math.sin(angle) if j % 2 == 0 else math.cos(angle)
        return table.float()

    def tubelets(self, clips: Tensor, w: Weights, prefix: str) -> Tensor:
        kernel, bias = w[f"{prefix}patch_embed.proj.weight"], w[f"{prefix}patch_embed.proj.bias"]
        x = F.conv3d(clips, kernel, bias, stride=(2, 8, 8)).flatten(2).transpose(1, 2)
        return x + self.sinusoid(x.shape[1], x.shape[2])

    @staticmethod
    def pick(x: Tensor, chosen: Tensor) -> Tensor:
        return x[chosen].reshape(len(x), -1, x.shape[-1])

    def video_terms(self, w: Weights, clips: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """VideoMAE's loss, and the student's residual streams behind its four blocks; clips [B, C, T, H, W]."""
        x, streams = self.pick(self.tubelets(clips, w, "encoder."), ~mask), []
        for i in range(4):
            x = self.block(x, w, f"encoder.blocks.{i}.", 4)
            streams.append(x)
        x = self.norm(x, w, "encoder.norm") @ w["encoder_to_decoder.weight"].T
        places = self.sinusoid(mask.shape[1], self.decoder).expand(len(x), -1, -1)
        hidden = w["mask_token"] + self.pick(places, mask)
        x = self.run(torch.cat([x + self.pick(places, ~mask), hidden], dim=1), w, "decoder.blocks.", 2)
        x = self.norm(x[:, -hidden.shape[1] :], w, "decoder.norm") @ w["decoder.head.weight"].T + w["decoder.head.bias"]
        z = clips * STD.view(1, 3, 1, 1, 1) + MEAN.view(1, 3, 1, 1, 1)
        z = z.unflatten(2, (2, 2)).unflatten(4, (3, 8)).unflatten(6, (3, 8))  # b c t dt y dy x dx
        z = z.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(len(clips), 18, 128, 3)
        z = (z - z.mean(2, keepdim=True)) / (z.var(2, keepdim=True).sqrt() + 1e-6)
        return (x - self.pick(z.flatten(2), mask)).square().mean(), streams

    def amd_terms(
        self, w: Weights, teacher: Weights, tokens: list[Tensor], clips: Tensor, mask: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels, direct, generation; student blocks 2 and 4 with teacher blocks 2 and 4; ``seen`` True = hidden."""
        pixels, streams = self.video_terms(w, clips, mask)
        between = mask & ~seen
        x = self.tubelets(clips, teacher, "")
        t = torch.cat([self.pick(x, ~mask), self.pick(x, between)], dim=1)
        count, targets = int((~mask[0]).sum()), []
        for i in range(4):
            t = self.block(t, teacher, f"blocks.{i}.", 6)
            targets.append(t)
        places = self.sinusoid(mask.shape[1], self.wide).expand(len(x), -1, -1)
        direct = generation = torch.zeros(())
        for k, layer in enumerate((1, 3)):
            p = streams[layer] @ w[f"encoder.projection_heads.{k}.weight"].T
            direct = direct + (p - targets[layer][:, :count]).square().mean() / 2
            g = torch.cat([p + self.pick(places, ~mask), tokens[k] + self.pick(places, between)], dim=1)
            for j in range(2):
                g = self.block(g, w, f"generators.{k}.blocks.{j}.", 6)
            generation = generation + (g[:, count:] - targets[layer][:, count:]).square().mean() / 2
        return pixels, direct, generation

    @staticmethod
    def leaves(weights: Weights) -> dict[str, Tensor]:
        return {key: value.clone().requires_grad_() for key, value in weights.items()}

    @staticmethod
    def batch(pixels: Tensor) -> Any:
        return SimpleNamespace(pixels=pixels)


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest.fixture(scope="session")
def timm() -> Any:
    """timm; where torchvision is missing, with empty names in its place."""
    path = Path(__file__).parents[1] / "teacher" / "sources" / "test_from_timm.py"
    spec = importlib.util.spec_from_file_location("tests_teacher_sources_test_timm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.timm
