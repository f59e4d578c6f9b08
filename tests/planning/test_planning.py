"""The planner: FLOPs against tables of the literal formula, hours by hand, memory and time against stored rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cohobate import cli, planning
from cohobate import config as configuration
from cohobate.errors import UserError
from cohobate.models import SIZES
from cohobate.models.layers import set_checkpointing
from cohobate.planning import calibration, estimate, hardware
from cohobate.planning.parts import Part, parameters
from cohobate.planning.shapes import _from_name

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
IMAGENET = 1_281_167


def plan(
    recipe: str, *overrides: str, card: str = "h200", devices: int = 1, images: int | None = None
) -> planning.Plan:
    config = configuration.load(recipe, overrides)
    return planning.make_plan(config, planning.load(card), recipe=recipe, devices=devices, images=images)


def step_rows() -> list[tuple[str, dict[str, Any], bool]]:
    """(machine, row, whether hardware.yaml names its file) of every stored step of the engine in bf16."""
    cards = planning.facts()["cards"]
    found = []
    for file in sorted(RESULTS.glob("*/step*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            if row.get("provider") == "engine bf16" and row.get("p50_ms"):
                names = [name for name, card in cards.items() if card["label"] == row["env"]["kind"]]
                source = file.relative_to(RESULTS.parents[1]).as_posix()
                found += [(name, row, cards[name]["provenance"].endswith(source)) for name in names]
    return found


def stage_of(card: str, row: dict[str, Any]) -> planning.StagePlan:
    """The plan of a stored step, from the row's words: ``ViT-base from ViT-large, 16 x 224 px, batch 2, tubes 0.9``."""
    size, pixels, batch, _ = row["shape"].split(", ")
    size, _, teacher = size.replace("ViT-", "").partition(" from ")
    method, count = row["name"].removesuffix("_step"), int(batch.split()[1])
    frames, side = (["1", *pixels.split()] if pixels.count(" ") == 1 else pixels.replace(" x", "").split())[:2]
    named = SIZES[size]
    overrides = [f"model.size={size}", f"data.image_size={side}", f"data.batch_size={count}", "optimizer.min_lr=0"]
    if method in ("videomae", "amd"):
        width = named.width // 2
        overrides += [f"data.frames={frames}", f"decoder.width={width}", f"decoder.heads={max(width // 64, 1)}"]
        overrides += ["data.repeats=1"]
    if method == "amd":
        pairs = [[named.depth // 2, SIZES[teacher].depth // 2], [named.depth, SIZES[teacher].depth]]
        overrides += [f"stages.0.teacher.spec=vit_{teacher}", f"amd.direct={pairs}", f"amd.generation={pairs}"]
    recipe = {
        "dbot": "dbot_vit_base",
        "mae": "mae_vit_base",
        "videomae": "videomae_vit_base",
        "amd": "amd_vit_base_k400",
    }
    return plan(recipe[method], *overrides, card=card, images=IMAGENET).stages[-1]


# -- FLOPs -------------------------------------------------------------------------------------------------------------


# GFLOP of a step by a literal count: 24 D^2 n + 4 n^2 D a block, everything computed. Then what this engine does not
# compute, because no loss reads it: the student's patch embedding on hidden patches, rows of the last blocks of teacher
# and decoder, and the head on visible tokens. The sizes are S/16, B/16, L/16, H/14 at 224 px, 75 % hidden.
@pytest.mark.parametrize(
    ("size", "literal", "saved"),
    [("small", 47.9, 1.22), ("base", 93.6, 1.91), ("large", 247.5, 2.51), ("huge", 626.1, 4.12)],
)
def test_dbot_flops(size: str, literal: float, saved: float) -> None:
    last = plan(f"dbot_vit_{size}").stages[-1]
    assert last.flops / 1e9 == pytest.approx(literal - saved, abs=0.06)  # the tables' rounding


def test_depth_0_teacher() -> None:
    first, second = plan("dbot_vit_large").stages
    teacher = {part.name: part.flops for part in first.parts}["teacher"]
    assert teacher == 2 * 196 * 768 * 1024  # patch embedding alone
    assert second.flops - first.flops > 0.98 * 121.7e9


@pytest.mark.parametrize(("size", "literal", "saved"), [("small", 451.6, 30.4), ("base", 594.7, 36.1)])
def test_amd_flops(size: str, literal: float, saved: float) -> None:
    (stage,) = plan(f"amd_vit_{size}_k400", devices=32).stages
    assert stage.flops / 1e9 == pytest.approx(literal - saved, abs=0.15)


@pytest.mark.parametrize("recipe", configuration.recipes())
def test_parts_add_up(recipe: str) -> None:
    """To what the method itself says, for every shipped recipe."""
    spec = {"dbot_vit_base_from_huge": "vit_huge", "dbot_vit_large_from_huge": "vit_huge"}.get(recipe, "vit_large")
    named = [f"stages.0.teacher.spec={spec}"] if recipe.endswith(("ssv2", "from_huge", "from_large")) else []
    config = configuration.load(recipe, named)
    shapes = planning.Shapes(
        config, planning.usual_data(config)[0], 32 if config.data.frames > 1 and config.data.generate is None else 1
    )
    for index in range(len(config.stages)):
        stage = shapes.stage(index)
        parts = planning.step_parts(stage, shapes.teachers.get(index))
        assert sum(part.flops for part in parts) == stage.flops
        assert all(tensor.is_meta for tensor in stage.method.parameters())


def test_masks_share_the_teacher() -> None:
    one, four = (plan("dbot_vit_base", f"mask.masks={masks}").stages[0] for masks in (1, 4))
    single, shared = ({part.name: part.flops for part in stage.parts} for stage in (one, four))
    assert shared["student encoder"] == 4 * single["student encoder"]
    # all 197 rows of the last block: 49 more, of 20 D^2 + 4 n D each
    assert shared["teacher"] - single["teacher"] == 49 * (20 * 768**2 + 4 * 197 * 768)


# -- memory ------------------------------------------------------------------------------------------------------------

SMALL = ("model.size=small", "data.image_size=64", "data.batch_size=4", "optimizer.min_lr=0", "model.drop_path=0")


KEPT = pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("dbot_vit_small", []),
        ("mae_vit_base", []),
        ("videomae_vit_small", ["data.frames=4"]),
        ("amd_vit_small_k400", ["data.frames=4", "stages.0.teacher.spec=vit_small", "amd.direct=[[12,12]]",
                                "amd.generation=[[6,6]]"]),
        ("dbot_clip_vit_base", ["mask.count=8", "mask.block_min=2", "stages.0.teacher.spec=vit_small"]),
    ],
)  # fmt: skip


def small_step(recipe: str, more: list[str]) -> tuple[Callable[[], torch.Tensor], list[Part], int, nn.Module]:
    """A step's loss, its parts, its batch and its method, on the CPU."""
    config = configuration.load(recipe, [*SMALL, *more])
    shapes = planning.Shapes(config, 10_000, 1)
    stage = shapes.stage(0, "cpu")
    method, batch = stage.method.train(), config.data.batch_size
    set_checkpointing(method, config.execution.checkpointing)

    class Batch:
        pixels = torch.randint(0, 256, (batch, *method.student.grid.pixel_shape), dtype=torch.uint8)

    def loss() -> torch.Tensor:
        total = method.loss(Batch(), stage.plan(torch.arange(batch), 0)).total
        assert total.requires_grad
        return total

    return loss, planning.step_parts(stage, shapes.teachers.get(0)), batch, method


@KEPT
def test_kept_activations_are_those_that_autograd_saves(recipe: str, more: list[str]) -> None:
    loss, parts, batch, method = small_step(recipe, more)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*method.parameters(), *method.buffers()]}
    shapes = {p.shape for p in method.parameters()}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        cast = tensor.dim() == 2 and tensor.shape in shapes  # of a weight, by autocast
        if storage.data_ptr() not in own and not cast and tensor.dtype != torch.uint8:  # nor the pixels
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    kept = batch * sum(part.kept for part in parts if part.name != "teacher")  # its targets are not autograd's
    # Which tensors attention keeps is its backend's affair: a bias runs as plain products.
    assert kept == pytest.approx(sum(size for size, _ in saved.values()), rel=0.03)


class Alive(TorchDispatchMode):
    """Storages of all that is made inside, with their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.made[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("kind", ["operations", "blocks"])
@KEPT
def test_kept_activations_with_checkpointing(recipe: str, more: list[str], kind: str) -> None:
    """Those of all parts together: what the forward pass makes and what is still there behind it."""
    loss, parts, batch, method = small_step(recipe, [*more, f"execution.checkpointing={kind}"])
    own = {StorageWeakRef(p.untyped_storage()) for p in [*method.parameters(), *method.buffers()]}
    loss()  # a teacher packs its weights
    with Alive() as alive:
        total = loss()
    found = sum(size for made, size in alive.made.items() if made not in own and not made.expired())
    del total
    kept = batch * sum(part.kept for part in parts if part.name != "teacher")
    assert kept == pytest.approx(found, rel=0.06)


def test_memory_by_hand() -> None:
    stage = plan("dbot_vit_base").stages[0]
    assert stage.trained == 111_655_680  # ViT-B without head, and the 8 blocks of 512 channels
    assert stage.memory.gradients == 4 * stage.trained
    assert stage.memory.moments == 8 * stage.trained
    assert stage.memory.pixels == 2 * 128 * 224 * 224 * 3  # one batch in use, one on its way
    assert stage.memory.total == sum(vars(stage.memory).values())
    cpu = plan("dbot_vit_base", card="cpu").stages[0]
    assert cpu.memory.teacher == 2 * stage.memory.teacher  # once more, as its kernels want it
    matrices = 12 * 12 * 768**2 + 8 * 12 * 512**2 + 2 * 768 * 512  # blocks, the decoder's embedding and its head
    assert stage.memory.weights - cpu.memory.weights == 2 * matrices  # in bf16, as the card's products want them


def test_checkpointing_by_hand() -> None:
    """ViT-B of 50 tokens, and the decoder of 512 channels and 197 of which 148 are read; bf16 over an fp32 stream."""
    none, operations, blocks = (
        plan("dbot_vit_base", f"execution.checkpointing={kind}").stages[0] for kind in ("none", "operations", "blocks")
    )
    parts = {part.name: part for part in blocks.parts}
    norms = (6 * 768 + 8) * 50, (6 * 512 + 8) * 148
    assert parts["student encoder"].kept == 12 * 6 * 768 * 50 + norms[0]
    assert parts["decoder"].kept == 8 * 6 * 512 * 197 + norms[1]
    encoder = 12 * (24 * 768**2 * 50 + 4 * 768 * 50**2)
    decoder = 8 * 4 * 512**2 * 197 + 7 * (20 * 512**2 * 197 + 4 * 512 * 197**2) + 148 * (20 * 512**2 + 4 * 512 * 197)
    assert parts["student encoder"].again == encoder and parts["decoder"].again == decoder
    assert blocks.flops == operations.flops == none.flops  # what is useful
    assert sum(part.again for part in operations.parts) == 0
    assert none.seconds[1] <= operations.seconds[1] < blocks.seconds[1]
    assert blocks.mfu < none.mfu
    assert none.memory.total > 1.2 * operations.memory.total > 1.2**2 * blocks.memory.total
    assert none.largest is not None and operations.largest is not None and blocks.largest is not None
    assert none.largest < operations.largest < blocks.largest
    again = 128 * (30 * 512 + 16) * 197  # of a decoder's block in its backward pass; the last one has fewer rows
    assert blocks.memory.working - none.memory.working == pytest.approx(again, rel=0.05)
    found = plan("dbot_vit_base", "execution.checkpointing=blocks")
    assert any(note.startswith("execution.checkpointing=blocks: by formula") for note in found.assumed)


def test_an_fp8_teacher_is_counted_as_bf16() -> None:
    found, usual = plan("dbot_vit_base", "precision.teacher=fp8"), plan("dbot_vit_base")
    assert found.stages == usual.stages
    assert any("precision.teacher=fp8" in note for note in found.assumed)


def test_memory_of_stored_rows() -> None:
    """A row's peak is what a step needs beside weights, gradients and moments."""
    error = planning.facts()["working"]["error"]
    fitted = [(card, row) for card, row, named in step_rows() if named and row["name"] == "dbot_step"]
    assert len(fitted) == 2
    for card, row in fitted:
        memory = stage_of(card, row).memory
        assert (memory.activations + memory.working) / 2**20 == pytest.approx(row["peak_mb"], rel=error)


def test_a_batch_that_does_not_fit_is_said() -> None:
    found = plan("dbot_vit_huge", "data.batch_size=1024", "optimizer.accumulate=1", card="a100")
    largest = found.stages[0].largest
    assert largest is not None and largest < 1024
    assert any(f"data.batch_size={largest} would fit" in note for note in found.assumed)
    sizes = [
        plan("dbot_vit_huge", f"data.batch_size={batch}", card="a100").stages[0].memory.total
        for batch in (largest, largest + 2)
    ]
    assert sizes[0] <= 0.95 * 80e9 < sizes[1]


# -- time --------------------------------------------------------------------------------------------------------------


def test_shares_are_those_of_the_stored_rows() -> None:
    """hardware.yaml ships what the rows say: the rates of their ceilings, and the share that makes up their time."""
    fitted = [(card, row) for card, row, named in step_rows() if named and row["name"] == "dbot_step"]
    assert {card for card, _ in fitted} == {name for name in planning.names() if name.startswith("cpu")}
    for card, row in fitted:
        known, stage = planning.load(card), stage_of(card, row)
        file = RESULTS.parents[1] / known.provenance.removeprefix("measured: ")
        ceilings = [json.loads(line) for line in file.read_text().splitlines() if '"ceiling.' in line]
        rates = {line["dtype"]: line["tflop_s"] for line in ceilings if line["name"] == "ceiling.matmul"}
        assert known.matmul == rates
        assert known.copy == max((line["bytes"], line["gb_s"]) for line in ceilings if "gb_s" in line)[1]
        share = planning.fit_share(stage.parts, known, "bf16", row["p50_ms"] / 1e3, stage.batch)
        assert known.share["dbot 768"] == pytest.approx((0.9 * share, share, 1.1 * share), rel=0.01)
        other = (0.7 * share, share, min(1.0, 1.3 * share))
        assert known.share["other"] == pytest.approx(other, rel=0.01)
        assert stage.seconds[1] * 1e3 == pytest.approx(row["p50_ms"], rel=0.01)


def test_stored_rows_lie_in_the_range() -> None:
    """Of every method and size that was measured, on a machine that is known; their FLOPs are the plan's."""
    for card, row, _ in step_rows():
        known, stage = planning.load(card), stage_of(card, row)
        assert stage.flops * stage.batch == row["flops"], row["shape"]
        low, _, high = known.share["other"]
        slow, fast = (sum(estimate.part_seconds(stage.parts, known, "bf16", x, stage.batch, 1)) for x in (low, high))
        assert fast < row["p50_ms"] / 1e3 < slow, f"{row['name']} on {card}: give hardware.yaml a share for it"


@pytest.mark.parametrize(
    ("name", "shape", "gflop"),
    [
        ("mae_step", "ViT-base, 224 px, batch 8, mask 0.75", 57.14),
        ("videomae_step", "ViT-small, 16 x 224 px, batch 1, tubes 0.9", 63.11),
        ("amd_step", "ViT-base from ViT-large, 16 x 224 px, batch 2, tubes 0.9", 558.59),
    ],
)
def test_rows_of_other_methods_are_understood(name: str, shape: str, gflop: float) -> None:
    assert stage_of("cpu", {"name": name, "shape": shape}).flops / 1e9 == pytest.approx(gflop, abs=0.01)


def test_a_measured_teacher_lies_in_the_range() -> None:
    """A row that the shares were not fitted to."""
    file = RESULTS / "cpu-epyc-family25-2026-11-21" / "teacher.jsonl"
    row = next(r for r in map(json.loads, file.read_text().splitlines()) if r.get("provider") == "engine bf16, pruned")
    known, stage = (
        planning.load("cpu-family25"),
        plan("dbot_vit_base", "data.batch_size=8", card="cpu-family25").stages[0],
    )
    teacher = [part for part in stage.parts if part.name == "teacher"]
    low, _, high = known.share["other"]
    slow, fast = (sum(estimate.part_seconds(teacher, known, "bf16", share, 8, 1)) * 1e3 for share in (low, high))
    assert fast < row["p20_ms"] < row["p80_ms"] < slow


def test_hours_by_hand() -> None:
    found = plan("dbot_vit_base", devices=8, images=IMAGENET)
    stage = found.stages[0]
    # 1,281,167 images in batches of 1,024 of which the last one is dropped, 800 times
    assert stage.steps == 1251 * 800
    share, peak, copy = 0.30, 989e12, 4.3e12
    products = 128 * stage.flops / (share * peak)
    optimizer = 32 * stage.trained / copy
    assert stage.seconds[1] == pytest.approx(products + optimizer, rel=0.01)  # the loss is what is left
    assert stage.hours[1] == pytest.approx(1251 * 800 * stage.seconds[1] / 3600)
    assert found.hours[1] == pytest.approx(2 * stage.hours[1])
    assert stage.rate[1] == pytest.approx(1024 / stage.seconds[1])
    assert found.decode == stage.rate
    assert stage.hours[0] < stage.hours[1] < stage.hours[2]
    assert stage.floor < stage.seconds[0]


def test_accumulation_and_crops_of_a_clip() -> None:
    single, double = (plan("dbot_vit_base", f"optimizer.accumulate={count}").stages[0] for count in (1, 2))
    assert double.samples == 2 * single.samples
    assert double.seconds[1] == pytest.approx(2 * single.seconds[1], rel=0.03)  # one optimizer step less
    assert double.memory.activations == single.memory.activations
    clips = plan("amd_vit_base_k400", devices=32)
    assert clips.stages[0].steps == 240_000 * 4 // (32 * 64) * 200
    assert clips.decode[1] == pytest.approx(clips.stages[0].rate[1] / 4)


def test_a_part_takes_the_longer_of_products_and_bytes() -> None:
    card = planning.load("h200")
    parts = [Part("products", flops=10**12, bytes=1), Part("bytes", flops=1, bytes=10**9, fixed=10**9, update=10**9)]
    products, moved = estimate.part_seconds(parts, card, "bf16", 0.5, batch=4, accumulate=2)
    assert products == pytest.approx(8e12 / (0.5 * 989e12))
    assert moved == pytest.approx((8 + 2 + 1) * 1e9 / 4.3e12)


def test_small_models_wait_for_the_host() -> None:
    found = plan("demo", card="h100")
    assert found.stages[0].seconds[1] == found.stages[0].host == pytest.approx(42 * 4 * 8e-6)  # 3 blocks and 1
    assert any("bound by the host" in note for note in found.assumed)
    assert plan("demo", card="cpu").stages[0].host == 0


def test_other_sizes_get_a_wider_range() -> None:
    # Far from 1, where a share's range is cut off.
    known = replace(planning.load("cpu"), share={"dbot 768": (0.45, 0.5, 0.55), "other": (0.35, 0.5, 0.65)})
    configs = [configuration.load(f"dbot_vit_{size}", ()) for size in ("base", "large")]
    base, large = (planning.make_plan(config, known).stages[-1] for config in configs)
    assert base.own_share and not large.own_share
    assert base.seconds[2] / base.seconds[0] < 1.25 < 1.7 < large.seconds[2] / large.seconds[0]


# -- machines and teachers ---------------------------------------------------------------------------------------------


def test_every_machine_says_where_its_figures_come_from() -> None:
    for name in planning.names():
        card = planning.load(name)
        measured = card.provenance.startswith("measured: ")
        assert measured or "not measured" in card.provenance
        assert (card.device == "cuda") != measured  # no row was measured on a card
        for share in card.share.values():
            assert 0 < share[0] < share[1] < share[2] <= 1


@pytest.mark.parametrize(
    ("name", "size", "patch"),
    [
        ("hf:facebook/dino-vitb16", "base", 16),
        ("hf:facebook/deit-base-patch16-224", "base", 16),
        ("hf:openai/clip-vit-large-patch14", "large", 14),
        ("hf:facebook/dinov2-base", "base", 14),
        ("hf:MCG-NJU/videomae-large", "large", 16),
        ("timm:vit_huge_patch14_224", "huge", 14),
        ("runs/dbot_vit_huge", "huge", 14),
    ],
)
def test_a_teacher_by_its_name(name: str, size: str, patch: int) -> None:
    assert _from_name(name) == ({"size": size}, patch, None)


def test_a_teacher_by_its_config(tmp_path: Path) -> None:
    settings = {
        "hidden_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "patch_size": 16,
        "image_size": 224,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings | {"intermediate_size": 192}))
    found = plan("dbot_vit_base_from_mae", f"stages.0.teacher.spec=hf:{tmp_path}").stages[0]
    n, d = 197, 96
    full = 4 * (8 * d * d * n + 4 * n * n * d + 8 * d * d * n)  # mlp of 2 D
    last = 4 * d * d * (n + 148) + 4 * 148 * n * d + 8 * d * d * 148
    assert {part.name: part.flops for part in found.parts}["teacher"] == 2 * 196 * 768 * d + full + last


def test_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real updates of every method of a recipe; the plan from them gives back the time of these very updates."""
    monkeypatch.setattr(calibration, "CEILING_S", 0.01)
    config = configuration.load("demo", ["data.batch_size=8"])
    card, measured = planning.calibrate(config, 4096, seconds=0.1)
    assert {item.stage for item in measured} == {"mae", "dbot"}
    assert card.label == hardware.label_here() and card.copy > 0 and card.matmul["bf16"] > 0
    found = planning.make_plan(config, card)
    for stage, item in zip(found.stages, measured, strict=True):
        assert item.batch == 8 and item.updates >= 1
        assert 0 < stage.seconds[0] < stage.seconds[1] < stage.seconds[2]
        low, _, high = card.share[stage.method]
        if low > 1e-3 and high < 1:  # else the share was cut off
            assert stage.seconds[1] == pytest.approx(item.seconds[1], rel=0.02)


# -- the command line --------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plans" / "plan.json"
    arguments = ["plan", "dbot_vit_base", "--gpus", "8", "mask.masks=2", "--hardware", "a100", "--json", str(file)]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    for word in (
        "GFLOP/image",
        "GPU-hours",
        "images/s",
        "cores",
        "not measured",
        "2 masks an image",
        "1,281,167 files",
    ):
        assert word in text
    tree = json.loads(file.read_text())
    assert tree["devices"] == 8
    assert tree["stages"][0]["flops"] == plan("dbot_vit_base", "mask.masks=2").stages[0].flops
    assert tree["device_hours"][1] == pytest.approx(8 * tree["hours"][1])


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (RESULTS.parents[1] / "docs" / "planning.md").read_text(encoding="utf-8")
    assert cli.main(["plan", "dbot_vit_base", "--gpus", "8"]) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines())
    assert "`cohobate plan dbot_vit_base --gpus 8`" in page
    assert f"```text\n{printed}\n```" in page, "put the command's output into docs/planning.md again"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dbot_vit_bas"], "did you mean 'dbot_vit_base'?"),
        (["dbot_vit_base", "dbot.beat=2"], "did you mean 'dbot.beta'?"),
        (["dbot_vit_base", "--hardware", "b200"], "--hardware: expected one of cpu,"),
        (["dbot_vit_base", "--gpus", "0"], "--gpus: expected at least 1, got 0"),
        (["dbot_vit_base", "--gpus", "many"], "invalid int value: 'many'"),
        (["dbot_vit_base", "--samples", "10"], "expected an update of at most 10, an epoch's, got 128"),
        (["dbot_vit_base", "--calibrate"], "--calibrate: expected --hardware here"),
        (["dbot_vit_base_from_huge", "stages.0.teacher.spec=runs/mine"], "a name that says its size"),
        (["dbot_vit_base", "surplus"], "unrecognized arguments: surplus"),
        ([], "the following arguments are required: RECIPE"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told and len(told.splitlines()) == 1


def test_unknown_machine_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "label_here", lambda: "a machine of the future")
    with pytest.raises(UserError, match="expected --calibrate"):
        planning.load("here")


def test_parameters_counts_what_is_trained() -> None:
    student = planning.Shapes(configuration.load("dbot_vit_base"), IMAGENET, 1).stage(0).method.student
    blocks = 12 * (12 * 768**2 + 13 * 768)
    assert parameters(student) == blocks + 768 * 768 + 768 + 3 * 768  # patch kernel and bias; cls token and last norm
