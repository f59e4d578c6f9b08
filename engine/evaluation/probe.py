"""Probes trained by gradient on frozen features: linear (LARS) and attentive (AdamW), every learning rate in one pass.

The linear probe is MAE's (He et al., CVPR 2022, appendix A.1): BatchNorm without affine, one linear layer, LARS. The
attentive probe pools the patch and class tokens with one learned query a head (as in V-JEPA, Bardes et al., 2024, and
CAPI, Darcet et al., 2025), then classifies. The backbone runs once a batch, whatever the number of rates, and once in
all without augmentation. The rate is chosen on training images that are held out; the test part is looked at once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cohobate.errors import UserError
from cohobate.evaluation.extractor import Extractor
from cohobate.evaluation.features import ClipSource, ImageSource, check_labels, mean_features, mean_over_views
from cohobate.evaluation.lars import Lars
from cohobate.evaluation.quality import effective_rank

HELD_OUT = 0.1  # of the training images, to choose the rate by
TOKEN_BYTES = 4 << 30  # tokens of all images are kept up to this size

Inputs = dict[str, Tensor]  # what a probe reads, by name
Read = Callable[[Extractor, Tensor, int, int], Inputs]  # of pixels [n V, ...] of n files, so many a pass at most
Epoch = Callable[[int], Iterator[tuple[Inputs, Tensor]]]  # epoch -> batches of inputs and labels [B, K]


@dataclass(frozen=True)
class ProbeRecipe:
    """How a probe is trained; a rate is meant for 256 images and scaled to the batch (rate x batch / 256)."""

    epochs: int
    warmup: float  # epochs
    batch: int
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        checks = {
            "epochs": (self.epochs >= 1, "at least 1", self.epochs),
            "warmup": (0 <= self.warmup < self.epochs, f"0 to less than {self.epochs} epochs", self.warmup),
            "batch": (self.batch >= 1, "at least 1", self.batch),
            "rates": (bool(self.rates) and min(self.rates) > 0, "numbers above 0", list(self.rates)),
        }
        for name, (right, expected, got) in checks.items():
            if not right:
                raise UserError(f"{name}: expected {expected}, got {got}")

    def schedule(self, epoch: float) -> float:
        """Share of the peak rate: linear warm-up from 0, then half a cosine to 0."""
        if epoch < self.warmup:
            return epoch / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup) / (self.epochs - self.warmup)))


# MAE's 90 epochs at batch 16384 and rate 0.1. A data set of less than 16 such batches gets 16 smaller ones, that is
# fewer and smaller updates, so that the grid goes far up.
LINEAR = ProbeRecipe(90, 10, 16384, (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0))
LINEAR_QUICK = ProbeRecipe(10, 1, 1024, LINEAR.rates)
ATTENTIVE = ProbeRecipe(20, 2, 1024, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1))


class LinearProbe(nn.Module):
    """BatchNorm without affine and R linear layers a kind of label.

    Args:
        width: of the features. classes: of each kind. replicas: R. seed: of the weights, N(0, 0.01), the same in all.
    """

    def __init__(self, width: int, classes: list[int], replicas: int, seed: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        draw = torch.Generator().manual_seed(seed)
        first = [0.01 * torch.randn(1, count, width, generator=draw) for count in classes]
        self.weights = nn.ParameterList(nn.Parameter(weight.repeat(replicas, 1, 1)) for weight in first)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(replicas, count)) for count in classes)

    def forward(self, features: Tensor) -> list[Tensor]:
        """[B, D] -> logits [B, R, C] a kind."""
        x = self.norm(features)
        return [
            F.linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)
            for weight, bias in zip(self.weights, self.biases)
        ]


class AttentiveProbe(nn.Module):
    """One learned query a head pools the tokens; then values and a linear layer; R of them a kind of label.

    With one query the key projection is not needed: q^T W_k is itself the learned vector [D] of a head.

        pooled_h = sum_n softmax_n(q_h . x_n / sqrt(D)) x_n;   logits = W BatchNorm(concat_h(V_h pooled_h)) + b

    BatchNorm has no affine part: what all images have in common would otherwise outweigh what tells them apart.
    """

    def __init__(self, width: int, classes: list[int], replicas: int, heads: int, seed: int = 0) -> None:
        super().__init__()
        self.classes = classes
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> nn.Parameter:
            std = shape[-1] ** -0.5
            return nn.Parameter((std * torch.randn(1, *shape, generator=draw)).repeat(replicas, *(1 for _ in shape)))

        self.queries = nn.ParameterList(normal(heads, width) for _ in classes)
        self.values = nn.ParameterList(normal(heads, width // heads, width) for _ in classes)
        pooled = heads * (width // heads)
        self.norms = nn.ModuleList(nn.BatchNorm1d(replicas * pooled, eps=1e-6, affine=False) for _ in classes)
        self.weights = nn.ParameterList(normal(count, pooled) for count in classes)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(replicas, count)) for count in classes)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """[B, N, D] -> logits [B, R, C] a kind."""
        tokens = tokens.float()
        found = []
        parts = zip(self.queries, self.values, self.norms, self.weights, self.biases)
        for query, value, norm, weight, bias in parts:
            scores = F.linear(tokens, query.flatten(0, 1)) * tokens.shape[-1] ** -0.5  # [B, N, R h]
            pooled = scores.softmax(dim=1).transpose(1, 2) @ tokens  # [B, R h, D]
            pooled = torch.einsum("brhd,rhed->brhe", pooled.unflatten(1, query.shape[:2]), value)
            pooled = norm(pooled.flatten(1)).unflatten(1, (len(query), -1))
            found.append(torch.einsum("bre,rce->brc", pooled, weight) + bias)
        return found


class _Adam:
    """AdamW for parameters [R, ...] with a rate a replica."""

    def __init__(self, parameters: list[nn.Parameter], decay: float = 0.01) -> None:
        self.parameters, self.decay, self.steps = parameters, decay, 0
        self._first = [torch.zeros_like(p) for p in parameters]
        self._second = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        self.steps += 1
        for p, first, second in zip(self.parameters, self._first, self._second):
            assert p.grad is not None
            rate = rates.view([-1] + [1] * (p.dim() - 1))
            first.lerp_(p.grad, 0.1)
            second.lerp_(p.grad.square(), 0.001)
            unbiased = (second / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
            if p.dim() > 2:
                p.mul_(1 - rate * self.decay)
            p.sub_(rate * (first / (1 - 0.9**self.steps)) / unbiased)
            p.grad = None


def linear_probe(extractor: Extractor, train: ImageSource, test: ImageSource, **options: Any) -> list[dict[str, Any]]:
    """Accuracy of linear probes on the class token and on the mean patch token; see :func:`run_probe`."""
    return run_probe(extractor, train, test, kind="linear", **options)


def attentive_probe(
    extractor: Extractor, train: ImageSource, test: ImageSource, **options: Any
) -> list[dict[str, Any]]:
    """Accuracy of an attentive probe on all tokens; see :func:`run_probe`."""
    return run_probe(extractor, train, test, kind="attentive", **options)


def run_probe(
    extractor: Extractor,
    train: ImageSource,
    test: ImageSource,
    *,
    kind: str = "linear",
    recipe: ProbeRecipe | None = None,
    augment: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Train probes with every rate of the recipe at once, choose one a kind of label, and count it on the test part.

    Args:
        extractor: the frozen features. kind: "linear" or "attentive".
        augment: random crops, of images with flips, so that features are computed anew in every epoch; without it
            once, of the central crops.
        say: told the loss a few times.

    Several views of a video are averaged: their features for a linear probe; an attentive probe is trained on the view
    in the middle, and its probabilities are averaged.

    Returns:
        Rows ``features``, ``label``, ``metric``, ``value`` (of the test part), ``rate`` (the chosen one, a 256 images),
        ``held_out`` (what it was chosen by), ``epochs``, ``batch``, ``augment``; of a linear probe ``effective_rank``,
        of the training part's central crops, as :func:`cohobate.evaluation.evaluate` gives it.

    Raises:
        UserError: labels or settings that will not do, features that are not finite, or tokens too large to keep.
    """
    recipe = recipe or (LINEAR if kind == "linear" else ATTENTIVE)
    check_labels(train.manifest, "train")
    check_labels(test.manifest, "test")
    assert train.manifest.labels is not None and test.manifest.labels is not None
    classes = [int(max(a.max(), b.max())) + 1 for a, b in zip(train.manifest.labels.T, test.manifest.labels.T)]
    learn, held = train.split(HELD_OUT, seed)
    if isinstance(learn, ClipSource) and kind == "attentive":
        learn = replace(learn, test_views=(1, 1))
    read = _features if kind == "linear" else _tokens
    count = len(learn.manifest.paths)
    batch = min(recipe.batch, max(min(16, count), count // 16))
    probes = _probes(kind, extractor, classes, len(recipe.rates), seed)
    kept = None if augment else _read_all(extractor, learn, read)
    with contextlib.ExitStack() as stack:
        if kept is None:
            epoch_of = _augmented(extractor, learn, read, batch, seed, stack)
        else:
            epoch_of = _shuffled(*kept, batch, seed)
        _train(probes, recipe, epoch_of, batch, max(1, count // batch), say)
    aside = [_read_all(extractor, held, read)] if kind == "linear" else _batches(extractor, held, read)
    chosen = _accuracies(aside, probes)
    final = _accuracies(_batches(extractor, test, read), probes)
    ranks: dict[str, float] = {}
    if isinstance(aside, list):
        central = _read_all(extractor, learn, read) if kept is None else kept
        ranks = {name: effective_rank(torch.cat([central[0][name], aside[0][0][name]])) for name in probes}
    facts = {"epochs": recipe.epochs, "batch": batch, "augment": augment}
    rows = []
    for name in probes:
        for number, label in enumerate(train.names):
            best = int(chosen[name][number].argmax())
            row = {"features": name, "label": label, "metric": kind, "value": float(final[name][number][best])}
            row |= {"effective_rank": ranks[name]} if name in ranks else {}
            rows.append(row | {"rate": recipe.rates[best], "held_out": float(chosen[name][number][best])} | facts)
    return rows


def _train(
    probes: dict[str, nn.Module],
    recipe: ProbeRecipe,
    epoch_of: Epoch,
    batch: int,
    steps: int,
    say: Callable[[str], None],
) -> None:
    """Every probe and every rate on the same batches."""
    device = next(next(iter(probes.values())).parameters()).device
    rates = torch.tensor(recipe.rates, device=device) * batch / 256
    optimizers = {name: _optimizer(probe) for name, probe in probes.items()}
    for epoch in range(recipe.epochs):
        losses: list[Tensor] = []
        for step, (inputs, labels) in enumerate(epoch_of(epoch)):
            share = recipe.schedule(epoch + step / steps)
            for name, probe in probes.items():
                loss = torch.stack([_loss(part, labels[:, k]) for k, part in enumerate(probe(inputs[name]))]).sum()
                loss.backward()
                optimizers[name].step(rates * share)
                losses.append(loss.detach())
        if epoch + 1 in (1, recipe.epochs // 2, recipe.epochs):
            mean = float(torch.stack(losses).mean()) / len(rates)
            say(f"epoch {epoch + 1}/{recipe.epochs}  loss {mean:.4f}, mean over all rates")


def _probes(kind: str, extractor: Extractor, classes: list[int], replicas: int, seed: int) -> dict[str, nn.Module]:
    width, names = extractor.width, (["cls"] if extractor.prefix else []) + ["mean"]
    found: dict[str, nn.Module]
    if kind == "linear":
        found = {name: LinearProbe(width, classes, replicas, seed) for name in names}
    else:
        heads = max(h for h in range(1, max(1, width // 64) + 1) if width % h == 0)
        found = {"tokens": AttentiveProbe(width, classes, replicas, heads, seed)}
    return {name: probe.to(extractor.device) for name, probe in found.items()}


def _optimizer(probe: nn.Module) -> Lars | _Adam:
    return (Lars if isinstance(probe, LinearProbe) else _Adam)(list(probe.parameters()))


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over replicas of the mean cross-entropy: each replica gets its own gradient."""
    replicas = logits.shape[1]
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(replicas)) * replicas


_features: Read = mean_features


def _tokens(extractor: Extractor, pixels: Tensor, files: int, most: int) -> Inputs:
    return {"tokens": torch.cat([extractor.tokens(part).bfloat16() for part in pixels.split(most)])}


def _read_all(extractor: Extractor, source: ImageSource, read: Read) -> tuple[Inputs, Tensor]:
    """What a probe reads of the central crops, and labels: computed once and kept."""
    if read is _tokens:
        size = len(source.manifest.paths) * (extractor.grid.size + extractor.prefix) * extractor.width * 2
        if size > TOKEN_BYTES:
            raise UserError(
                f"data: expected tokens of at most {TOKEN_BYTES >> 30} GiB to keep, got {size / 2**30:.1f} GiB of "
                f"{len(source.manifest.paths)} {source.manifest.UNIT}s; expected --augment, which keeps none, or a "
                "--train-limit"
            )
    parts = list(_batches(extractor, source, read))
    inputs = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
    return inputs, torch.cat([part for _, part in parts])


def _shuffled(inputs: Inputs, labels: Tensor, batch: int, seed: int) -> Epoch:
    """The same features in every epoch, in another order."""

    def epoch_of(epoch: int) -> Iterator[tuple[Inputs, Tensor]]:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(labels), generator=draw).to(labels.device)
        for places in order[: max(1, len(order) // batch) * batch].split(batch):
            yield {name: values[places] for name, values in inputs.items()}, labels[places]

    return epoch_of


def _augmented(
    extractor: Extractor, source: ImageSource, read: Read, batch: int, seed: int, stack: contextlib.ExitStack
) -> Epoch:
    """Features of random crops, anew in every epoch: batches of the loader's size, joined to ``batch``."""
    micro = min(source.batch_size, batch)
    loader = stack.enter_context(source.crops(extractor.device, batch_size=micro, seed=seed))

    def epoch_of(epoch: int) -> Iterator[tuple[Inputs, Tensor]]:
        waiting: list[tuple[Inputs, Tensor]] = []
        for _, loaded in zip(range(loader.steps_per_epoch), loader):
            assert loaded.labels is not None
            labels = loaded.labels.to(extractor.device)
            waiting.append((_finite(read(extractor, loaded.pixels, len(labels), micro), extractor), labels))
            if len(waiting) == max(1, batch // micro):
                inputs = {name: torch.cat([part[name] for part, _ in waiting]) for name in waiting[0][0]}
                yield inputs, torch.cat([part for _, part in waiting])
                waiting = []

    return epoch_of


def _batches(extractor: Extractor, source: ImageSource, read: Read) -> Iterator[tuple[Inputs, Tensor]]:
    labels = torch.as_tensor(source.manifest.labels)
    for pixels, places in source.batches(extractor.device):
        inputs = read(extractor, pixels, len(places), source.batch_size)
        yield _finite(inputs, extractor), labels[places].to(extractor.device)


def _finite(inputs: Inputs, extractor: Extractor) -> Inputs:
    if not all(bool(values.isfinite().all()) for values in inputs.values()):
        raise UserError(f"weights: expected finite features, got NaN or inf out of {extractor.name}")
    return inputs


@torch.no_grad()
def _accuracies(batches: Iterable[tuple[Inputs, Tensor]], probes: dict[str, nn.Module]) -> dict[str, list[Tensor]]:
    """By probe and kind of label, the share of right answers of each replica, [R] on the CPU."""
    right: dict[str, list[Tensor]] = {}
    count = 0
    for probe in probes.values():
        probe.eval()
    for inputs, labels in batches:
        count += len(labels)
        for name, probe in probes.items():
            shares = [mean_over_views(part.softmax(dim=2), len(labels)) for part in probe(inputs[name])]
            hits = [(part.argmax(dim=2) == labels[:, k, None]).sum(0) for k, part in enumerate(shares)]
            right[name] = [a + b for a, b in zip(right[name], hits)] if name in right else hits
    for probe in probes.values():
        probe.train()
    return {name: [(part.double() / count).cpu() for part in parts] for name, parts in right.items()}
