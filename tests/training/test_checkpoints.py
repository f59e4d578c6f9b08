"""Resume points are complete or absent; exports rebuild the encoder, here and in timm's key names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from cohobate.errors import UserError
from cohobate.models import VisionTransformer, build
from cohobate.models.exports import export, find_export, load_encoder
from cohobate.training import checkpoints
from cohobate.training.checkpoints import Checkpoints
from cohobate.training.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def trained(seed: int) -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    torch.manual_seed(seed)
    modules: dict[str, nn.Module] = {"student": nn.Linear(3, 4), "decoder": nn.Linear(4, 2)}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        modules["decoder"](modules["student"](torch.randn(5, 3))).square().sum().backward()
        optimizer.step()
    return modules, optimizer


def flat(modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    weights = [tensor for module in modules.values() for tensor in module.state_dict().values()]
    return weights + [value for entry in optimizer.state.values() for value in entry.values()]


def test_a_resume_point_gives_back_weights_moments_and_step_count(tmp_path: Path) -> None:
    modules, optimizer = trained(0)
    expected = [tensor.clone() for tensor in flat(modules, optimizer)]
    points = Checkpoints(tmp_path, keep=2, ranks=ALONE)
    path = points.save(7, checkpoints.training_state(modules, optimizer), {"step": 7})
    other, new_optimizer = trained(1)
    state = checkpoints.training_state(other, new_optimizer)
    checkpoints.load(path, state, ALONE)
    checkpoints.restore_optimizer(other, new_optimizer, state)
    assert all(torch.equal(a, b) for a, b in zip(expected, flat(other, new_optimizer), strict=True))
    assert checkpoints.read_progress(path) == {"step": 7}


def test_an_optimizer_that_never_stepped_can_be_restored(tmp_path: Path) -> None:
    modules, optimizer = trained(0)
    path = Checkpoints(tmp_path, 1, ALONE).save(1, checkpoints.training_state(modules, optimizer), {})
    other, used = trained(1)
    used.zero_grad()
    weights = [tensor.clone() for module in other.values() for tensor in module.parameters()]
    fresh = torch.optim.AdamW([p for module in other.values() for p in module.parameters()], lr=0.1, fused=True)
    state = checkpoints.training_state(other, fresh)
    for tensor, parameter in zip(weights, (p for module in other.values() for p in module.parameters()), strict=True):
        assert torch.equal(tensor, parameter)  # asking for the state must not move the weights
    checkpoints.load(path, state, ALONE)
    checkpoints.restore_optimizer(other, fresh, state)
    for a, b in zip(flat(modules, optimizer), flat(other, fresh), strict=True):
        assert torch.equal(a, b)


def test_only_the_last_ones_stay_and_half_written_ones_do_not_count(tmp_path: Path) -> None:
    modules, optimizer = trained(0)
    points = Checkpoints(tmp_path, keep=2, ranks=ALONE)
    assert points.last() is None
    for step in (5, 10, 15):
        points.save(step, checkpoints.training_state(modules, optimizer), {"step": step})
    assert [path.name for path in points.found()] == ["step_000000010", "step_000000015"]
    (tmp_path / "step_000000020.writing").mkdir()
    (tmp_path / "step_000000020.writing" / "progress.json").write_text("{}")
    (tmp_path / "step_000000025").mkdir()  # without its progress file: not complete
    last = points.last()
    assert last is not None and last.name == "step_000000015"
    with pytest.raises(UserError, match="resume: expected a checkpoint directory"):
        checkpoints.read_progress(tmp_path / "step_000000025")


def test_a_save_that_fails_leaves_the_older_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules, optimizer = trained(0)
    points = Checkpoints(tmp_path, keep=1, ranks=ALONE)
    points.save(1, checkpoints.training_state(modules, optimizer), {"step": 1})
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        points.save(2, checkpoints.training_state(modules, optimizer), {"step": 2})
    assert [path.name for path in points.found()] == ["step_000000001"]


def encoder() -> VisionTransformer:
    return build(image_size=(16, 24), patch=8, channels=2, width=24, depth=2, heads=2, mlp_ratio=2.0)


def test_an_export_rebuilds_the_encoder(tmp_path: Path) -> None:
    model = encoder()
    folder = export(tmp_path / "exports" / "1-first", model, nn.Linear(2, 2), {"stage": "first"})
    again = load_encoder(folder)
    assert again.grid == model.grid and again.mean == model.mean
    pixels = torch.randint(0, 256, (2, 1, 16, 24, 2), dtype=torch.uint8)
    torch.testing.assert_close(again(pixels), model(pixels), rtol=0, atol=0)
    export(tmp_path / "exports" / "10-last", encoder(), None, {})
    assert find_export(tmp_path).name == "10-last"  # by number, not by letter
    assert json.loads((folder / "config.json").read_text())["cohobate"] == {"stage": "first"}


def test_an_export_that_does_not_fit_says_which_keys(tmp_path: Path) -> None:
    folder = export(tmp_path, encoder(), None, {})
    settings = json.loads((folder / "config.json").read_text())
    settings["model_args"]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"missing: blocks\.2\..* and \d+ more"):
        load_encoder(folder)
    with pytest.raises(UserError, match="weights: expected a run folder or an export"):
        load_encoder(tmp_path / "nowhere")


def test_keys_are_those_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = build("tiny", image_size=32, patch=8)
    folder = export(tmp_path, model, None, {})
    other = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert set(other.state_dict()) == set(model.state_dict())
