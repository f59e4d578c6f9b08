"""Fine-tuning: the whole network on labelled images or videos, with the recipes of MAE, dBOT, VideoMAE and AMD."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.evaluation.augment import mix, rand_augment, random_erase, smooth_targets
from cohobate.evaluation.extractor import check_weights
from cohobate.evaluation.features import ImageSource, check_labels, mean_over_views
from cohobate.kernels import backends
from cohobate.models import Precision, VisionTransformer
from cohobate.models.layers import NORM_EPS, DropPath, Norm
from cohobate.teacher.sources import Source


@dataclass(frozen=True)
class FinetuneRecipe:
    """Settings of a fine-tuning; ``blr`` is for 256 images or videos, the rate used is blr x batch / 256.

    ``layer_decay``: factor from a block's rate to that of the block in front. ``erase``: chance of random erasing.
    ``mixup``, ``cutmix``: alpha, 0 for none. ``magnitude``: of RandAugment, 0 for none; ``operations``: how many.
    ``flip``: chance of a horizontal flip. ``smoothing``: of labels. ``clip``: largest gradient norm. ``ema``: decay of
    the averaged weights, which are then the result; None for none. ``head_std``: of the head's first weights;
    ``head_drop``: dropout in front of it.

    Of videos: ``repeats``: crops of each in an update, of which ``batch`` and the rate know nothing. For who makes the
    sources, ``sampling`` and ``stride`` of frames (None: as in pretraining) and ``views``, the clips and crops tested.
    """

    epochs: int = 100
    warmup: float = 5
    blr: float = 5e-4
    layer_decay: float = 0.65
    drop_path: float = 0.1
    batch: int = 1024
    weight_decay: float = 0.05
    min_lr: float = 1e-6
    clip: float | None = None
    mixup: float = 0.8
    cutmix: float = 1.0
    erase: float = 0.25
    magnitude: float = 9.0
    smoothing: float = 0.1
    ema: float | None = None
    head_std: float = 2e-5
    head_drop: float = 0.0
    operations: int = 2
    flip: float = 0.5
    repeats: int = 1
    sampling: str | None = None
    stride: int | None = None
    views: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        checks = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "warmup": (0 <= self.warmup < self.epochs, f"0 to less than {self.epochs} epochs"),
            "blr": (self.blr > 0, "more than 0"),
            "layer_decay": (0 < self.layer_decay <= 1, "more than 0, at most 1"),
            "drop_path": (0 <= self.drop_path < 1, "0 to less than 1"),
            "batch": (self.batch >= 1, "at least 1"),
            "magnitude": (0 <= self.magnitude <= 10, "0 to 10"),
            "head_drop": (0 <= self.head_drop < 1, "0 to less than 1"),
            "repeats": (self.repeats >= 1, "at least 1"),
            "smoothing": (0 <= self.smoothing < 1, "0 to less than 1"),
            "ema": (self.ema is None or 0 < self.ema < 1, "between 0 and 1"),
        }
        for name, (right, expected) in checks.items():
            if not right:
                raise UserError(f"{name}: expected {expected}, got {getattr(self, name)}")


def _published(epochs: int, blr: float, layer_decay: float, drop_path: float, **others: Any) -> FinetuneRecipe:
    return FinetuneRecipe(epochs=epochs, blr=blr, layer_decay=layer_decay, drop_path=drop_path, **others)


def _of_videos(
    epochs: int, blr: float, batch: int, layer_decay: float = 0.75, drop_path: float = 0.1, **others: Any
) -> FinetuneRecipe:
    """VideoMAE's and AMD's: the head starts at 0.001 times the usual 0.02."""
    usual = {"operations": 4, "magnitude": 7.0, "repeats": 2, "sampling": "contiguous", "stride": 4, "views": (5, 3)}
    return _published(epochs, blr, layer_decay, drop_path, batch=batch, **usual | others)


# Something-Something: frames of all the video, and "left" must not become "right".
_SSV2: dict[str, Any] = {"flip": 0.0, "sampling": "segments", "views": (2, 3)}
_QUICK: dict[str, Any] = {"batch": 128, "mixup": 0, "cutmix": 0, "erase": 0, "magnitude": 0, "head_std": 0.01}

# Recipes for ImageNet-1k, Kinetics-400, Something-Something-v2 and UCF101 as published; nobody published one for ViT-S
# on images, which gets ViT-B's. "quick" and "quick_video" are for the demo's sizes.
RECIPES: dict[str, FinetuneRecipe] = {
    "quick": _published(15, 8e-3, 0.75, 0.05, warmup=2, **_QUICK),
    "quick_video": _published(15, 1.6e-2, 0.75, 0.05, warmup=2, flip=0.0, **_QUICK | {"batch": 32}),
    "mae_small": _published(100, 5e-4, 0.65, 0.1),
    "mae_base": _published(100, 5e-4, 0.65, 0.1),
    "mae_large": _published(50, 1e-3, 0.75, 0.2),
    "mae_huge": _published(50, 1e-3, 0.75, 0.3),
    "dbot_small": _published(100, 3e-4, 0.65, 0.1, head_std=0.01),
    "dbot_base": _published(100, 3e-4, 0.65, 0.1, head_std=0.01),
    "dbot_large": _published(50, 3e-4, 0.75, 0.25, clip=1.0, head_std=0.01),
    "dbot_huge": _published(50, 3e-4, 0.75, 0.3, head_std=0.01),
    "dbot_huge_448": _published(10, 7e-5, 0.9, 0.4, warmup=2, head_std=0.01),
    "clip_base": _published(100, 2e-4 / 4, 0.65, 0.1, warmup=20, head_std=0.01),  # rates given for batches of 1024
    "clip_large": _published(50, 1e-4 / 4, 0.8, 0.2, head_std=0.01),
    "clip_huge": _published(50, 5e-5 / 4, 0.85, 0.3, head_std=0.01),
    "amd_small_k400": _of_videos(150, 1e-3, 512),
    "amd_base_k400": _of_videos(90, 7e-4, 512),
    "amd_small_ssv2": _of_videos(40, 1e-3, 256, **_SSV2),
    "amd_base_ssv2": _of_videos(30, 5e-4, 256, **_SSV2),
    "videomae_small_k400": _of_videos(150, 5e-4, 384),
    "videomae_small_ssv2": _of_videos(40, 1e-3, 384, 0.7, **_SSV2),
    "videomae_base_k400": _of_videos(75, 5e-4, 384),  # after 1600 epochs of pretraining
    "videomae_base_k400_800": _of_videos(100, 1e-3, 512, repeats=1),
    "videomae_base_ssv2": _of_videos(30, 5e-4, 384, **_SSV2),  # after 2400
    "videomae_base_ssv2_800": _of_videos(50, 5e-4, 512, **_SSV2),
    "videomae_large_k400": _of_videos(35, 2e-3, 128),
    "videomae_huge_k400": _of_videos(50, 1e-3, 512, drop_path=0.2, head_drop=0.5),
    "videomae_base_ucf101": _of_videos(100, 5e-4, 128, 0.7, 0.2, head_drop=0.5),
}


class Classifier(nn.Module):
    """An encoder whose patch tokens are averaged, normalised afresh and classified: timm's ``fc_norm`` and ``head``.

    The encoder's own final norm is not used, as in MAE. Positions of images are trained too, those of clips are not, as
    in VideoMAE.

    Args:
        encoder: taken over, not copied. classes: of the head. head_std: of its weights, drawn from ``seed``.
        head_drop: dropout in front of the head.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        classes: int,
        drop_path: float,
        head_std: float = 2e-5,
        seed: int = 0,
        head_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder, self.head_drop = encoder, head_drop
        encoder.drop_path = DropPath(drop_path, encoder.depth).to(encoder.device)
        if encoder.pos_embed is not None and encoder.grid.frames == 1:
            encoder.pos_embed.requires_grad_(True)
        encoder.norm.requires_grad_(False)
        self.fc_norm = Norm(encoder.width)
        self.head = nn.Linear(encoder.width, classes)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.copy_(head_std * torch.randn(self.head.weight.shape, generator=draw).clamp(-2, 2))
            self.head.bias.zero_()
        self.to(encoder.device)

    def forward(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B, T, H, W, C] uint8 -> logits [B, classes] fp32. ``generator``: where drop path and dropout draw from."""
        encoder = self.encoder
        (x,) = encoder.intermediates(pixels, (encoder.depth,), generator=generator)
        pooled = x[:, encoder.prefix :].float().mean(dim=1, keepdim=True)
        pooled = self.fc_norm(pooled)[:, 0]
        if self.training and self.head_drop:
            keep = 1 - self.head_drop
            pooled = pooled * torch.empty_like(pooled).bernoulli_(keep, generator=generator) / keep
        logits: Tensor = self.head(pooled)
        return logits

    def weights(self) -> dict[str, Tensor]:
        """timm's keys and fp32 tensors of a ``global_pool="avg"`` model: ``fc_norm`` in place of ``norm``."""
        found = {k: v for k, v in self.encoder.state_dict().items() if not k.startswith("norm.")}
        found |= {f"fc_norm.{k}": v for k, v in self.fc_norm.state_dict().items()}
        found |= {f"head.{k}": v for k, v in self.head.state_dict().items()}
        return {key: value.detach().float().cpu().contiguous() for key, value in found.items()}

    def groups(self, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups with ``scale`` = layer_decay ^ (L + 1 - id), the factor of their rate.

        id is 0 for the embedding, i + 1 for block i, L + 1 for norm and head. Biases, 1-D tensors, tokens and positions
        do not decay.
        """
        depth = self.encoder.depth
        found: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            plain = parameter.ndim <= 1 or name.endswith((".bias", "cls_token", "pos_embed"))
            key = layer_id(name, depth), plain
            if key not in found:
                decay, scale = 0.0 if plain else weight_decay, layer_decay ** (depth + 1 - key[0])
                found[key] = {"params": [], "weight_decay": decay, "scale": scale}
            found[key]["params"].append(parameter)
        return list(found.values())


def layer_id(name: str, depth: int) -> int:
    """Which layer a parameter of :class:`Classifier` counts to: 0, the embedding, to depth + 1, norm and head."""
    words = name.split(".")
    if words[:2] == ["encoder", "blocks"]:
        return int(words[2]) + 1
    embedding = words[0] == "encoder" and words[1] in ("cls_token", "pos_embed", "patch_embed", "rel_pos_bias")
    return 0 if embedding else depth + 1


def finetune(
    encoder: VisionTransformer,
    train: ImageSource,
    test: ImageSource,
    recipe: FinetuneRecipe,
    *,
    label: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Classifier, dict[str, Any]]:
    """Train encoder and head on ``train`` and count on ``test``, once, at the end.

    Args:
        encoder: changed in place. train, test: they say how frames are sampled and which views are tested.
        label: which kind of label; default the first. seed: of everything random.
        say: told the progress, a line an epoch.

    Returns:
        The classifier (with averaged weights where the recipe has ``ema``) and a row: ``features`` "finetuned",
        ``label``, ``metric`` "finetune", ``value``, ``loss`` (last epoch's), ``skipped`` updates, ``epochs``,
        ``batch``.

    Raises:
        UserError: labels, weights or settings that will not do; or a loss that is not finite for a whole epoch.
    """
    check_labels(train.manifest, "train")
    check_labels(test.manifest, "test")
    check_weights(encoder, "the encoder")
    kind = _kind(train, label)
    assert train.manifest.labels is not None and test.manifest.labels is not None
    classes = int(max(train.manifest.labels[:, kind].max(), test.manifest.labels[:, kind].max())) + 1
    device, count = encoder.device, len(train.manifest.paths)
    batch = min(recipe.batch, count)
    micro = min(max(1, train.batch_size // recipe.repeats), batch)  # files in a pass
    parts = batch // micro
    model = Classifier(encoder, classes, recipe.drop_path, recipe.head_std, seed, recipe.head_drop).train()
    updater = _Updater(model, recipe, parts * micro)
    drops, loss = torch.Generator(device), math.nan
    repeats = recipe.repeats
    with train.crops(device, batch_size=micro * repeats, seed=seed, flip=recipe.flip, repeats=repeats) as loader:
        steps = loader.steps_per_epoch // parts
        for epoch in range(recipe.epochs):
            losses = []
            for step in range(steps):
                for part in range(parts):
                    loaded, number = next(loader), seed * 1_000_003 + (epoch * steps + step) * parts + part
                    assert loaded.labels is not None
                    draw, labels = torch.Generator().manual_seed(number), loaded.labels[:, kind].to(device)
                    pixels, targets = augmented(loaded.pixels, labels, classes, recipe, encoder, draw)
                    logits = model(pixels, drops.manual_seed(number))
                    one = -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()
                    (one / parts).backward()
                    losses.append(one.detach())
                updater.step(epoch + step / steps)
            found = torch.stack(losses)
            loss = float(found.nanmean())
            if not bool(found.isfinite().any()):
                raise UserError(f"blr: expected less than {recipe.blr:g}: no loss of epoch {epoch + 1} was finite")
            say(f"epoch {epoch + 1}/{recipe.epochs}  loss {loss:.4f}  lr {updater.rate:.2e}")
    updater.finish()
    row: dict[str, Any] = {"features": "finetuned", "label": train.names[kind], "metric": "finetune"}
    row |= {"value": accuracy(model, test, kind), "loss": loss, "skipped": int(updater.skipped)}
    return model, row | {"epochs": recipe.epochs, "batch": parts * micro}


class _Updater:
    """AdamW with a rate a layer, clipping, the skip of updates that are not finite, and the average of the weights.

    ``skipped`` counts on the device. ``rate`` is the last one.
    """

    def __init__(self, model: Classifier, recipe: FinetuneRecipe, batch: int) -> None:
        self.recipe, self.peak, self.updates, self.rate = recipe, recipe.blr * batch / 256, 0, 0.0
        groups = model.groups(recipe.layer_decay, recipe.weight_decay)
        self.optimizer: Any = backends.adamw(groups, betas=(0.9, 0.999), eps=1e-8)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.average = [p.detach().clone() for p in self.parameters] if recipe.ema is not None else []
        self.skipped = torch.zeros((), device=self.parameters[0].device)

    def step(self, epoch: float) -> None:
        """Update at a fractional epoch, or skip, and drop the gradients; nothing waits for the device."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        bad = (~norm.isfinite()).float()
        self.skipped += bad
        self.optimizer.found_inf = bad
        if self.recipe.clip is not None:
            self.optimizer.grad_scale = (norm / self.recipe.clip).clamp_min(1.0)
        self.rate = rate(epoch, self.recipe, self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.recipe.ema is not None:
            # Early on the average follows faster, so that a short run's is not mostly its first weights.
            decay = min(self.recipe.ema, (1 + self.updates) / (10 + self.updates))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def finish(self) -> None:
        """The averaged weights become the model's."""
        if self.average:
            torch._foreach_copy_(self.parameters, self.average)


def rate(epoch: float, recipe: FinetuneRecipe, peak: float) -> float:
    """Linear warm-up from 0, then half a cosine to ``min_lr``, at a fractional epoch."""
    if epoch < recipe.warmup:
        return peak * epoch / recipe.warmup
    floor = min(recipe.min_lr, peak)
    done = (epoch - recipe.warmup) / (recipe.epochs - recipe.warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def augmented(
    pixels: Tensor,
    labels: Tensor,
    classes: int,
    recipe: FinetuneRecipe,
    encoder: VisionTransformer,
    draw: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Pixels [B, T, H, W, C] uint8 and soft targets [B, classes] of a training batch, augmented as the recipe says."""
    targets = smooth_targets(labels, classes, recipe.smoothing)
    if recipe.magnitude:
        pixels = rand_augment(pixels, draw, encoder.mean, magnitude=recipe.magnitude, count=recipe.operations)
    if recipe.erase:
        pixels = random_erase(pixels, draw, recipe.erase, encoder.mean, encoder.std)
    return mix(pixels, targets, draw, recipe.mixup, recipe.cutmix)


@torch.no_grad()
def accuracy(model: Classifier, source: ImageSource, kind: int) -> float:
    """Share of right answers on every readable file of ``source``; the views of a video are averaged as probabilities.

    So a view that is sure weighs no more than one vote, which of logits is not true.
    """
    model.eval()
    device = model.head.weight.device
    labels = torch.as_tensor(source.manifest.labels)[:, kind]
    right, count = torch.zeros((), dtype=torch.int64, device=device), 0
    for pixels, places in source.batches(device):
        views = torch.cat([model(part).softmax(dim=1) for part in pixels.split(source.batch_size)])
        shares = mean_over_views(views, len(places))
        right += (shares.argmax(dim=1) == labels[places].to(device)).sum()
        count += len(places)
    return int(right) / count


def trainable(source: Source, precision: Precision | None = None) -> VisionTransformer:
    """An encoder of ours with the weights of a rebuilt source; layer scales go into the products in front of them.

    Raises:
        UserError: a source that is not rebuilt, or with parts that our encoder has not.
    """
    anatomy = source.anatomy
    if anatomy is None:
        raise UserError(f"weights: expected a ViT that can be rebuilt, to train it; {'; '.join(source.reasons)}")
    prefix = anatomy.prefix.shape[0]
    odd = [
        reason
        for reason, found in {
            f"{prefix} tokens in front": prefix > 1,
            f"activation {anatomy.activation}": anatomy.activation != "gelu",
            f"eps {anatomy.eps:g}": anatomy.eps != NORM_EPS,
            "a norm behind the embedding": anatomy.embed_norm is not None,
            "relative positions": anatomy.relative is not None,
        }.items()
        if found
    ]
    if odd:
        raise UserError(f"weights: expected a plain ViT to fine-tune, {source.name} has {', '.join(odd)}")
    width, hidden = anatomy.width, anatomy.blocks[0].fc1.shape[0]
    model = VisionTransformer(
        anatomy.grid, width, anatomy.depth, anatomy.heads, hidden / width, bool(prefix),
        precision=precision, mean=anatomy.mean, std=anatomy.std,
    )  # fmt: skip
    kernel = anatomy.patch.view(width, *anatomy.grid.patch, anatomy.grid.channels).movedim(-1, 1)
    state = {"patch_embed.proj.weight": kernel.reshape(model.patch_embed.proj.weight.shape)}
    state["patch_embed.proj.bias"] = _bias(anatomy.patch_bias, anatomy.patch)
    positions = anatomy.patch.new_zeros(anatomy.grid.size, width) if anatomy.positions is None else anatomy.positions
    state["pos_embed"] = torch.cat([torch.zeros_like(anatomy.prefix), positions])[None]
    if prefix:
        state["cls_token"] = anatomy.prefix[None]
    for i, block in enumerate(anatomy.blocks):
        for name, scale in (
            ("attn.qkv", None),
            ("attn.proj", block.scale1),
            ("mlp.fc1", None),
            ("mlp.fc2", block.scale2),
        ):
            part = name.split(".")[1]
            weight, bias = getattr(block, part), _bias(getattr(block, f"{part}_bias"), getattr(block, part))
            state[f"blocks.{i}.{name}.weight"] = weight if scale is None else weight * scale[:, None]
            state[f"blocks.{i}.{name}.bias"] = bias if scale is None else bias * scale
        for name in ("norm1", "norm2"):
            state |= {f"blocks.{i}.{name}.{k}": getattr(getattr(block, name), k) for k in ("weight", "bias")}
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus and set(missing) <= {"norm.weight", "norm.bias"}, (missing, surplus)
    return model


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias


def _kind(source: ImageSource, label: str | None) -> int:
    if label is None:
        return 0
    if label not in source.names:
        raise UserError(f"label: expected one of {', '.join(source.names)}; got {label!r}")
    return source.names.index(label)
