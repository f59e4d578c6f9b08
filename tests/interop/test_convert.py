"""Conversions: every format comes back bit for bit, what is left behind is said, and mistakes change nothing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from cohobate.cli import main
from cohobate.errors import UserError
from cohobate.interop import Hints, convert, read
from cohobate.models.exports import load_decoder, load_encoder

IMAGE = Hints(heads=4, decoder_heads=2)
CLIP = Hints(heads=4, decoder_heads=2, teacher_heads=6, image_size=(24, 24), frames=4)


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


def timm_like(upstream: Any) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = upstream.encoder()
    for i in range(2):
        weights |= {f"blocks.{i}.ls{j}.gamma": upstream.draw(64, about=1) for j in (1, 2)}
    return weights


@pytest.mark.parametrize("name", ["dbot", "mae", "videomae", "amd", "timm"])
@pytest.mark.parametrize("through", ["cohobate", "itself"])
def test_a_file_comes_back_bit_for_bit(upstream: Any, tmp_path: Path, name: str, through: str) -> None:
    """The published layout, ours, and the published one again; AMD's dead norms come back as 1 and 0."""
    weights = timm_like(upstream) if name == "timm" else getattr(upstream, name)()
    hints = CLIP if name in ("videomae", "amd") else IMAGE
    source = upstream.save(tmp_path / "source.pth", weights)
    first = convert(source, tmp_path / "first", "cohobate" if through == "cohobate" else name, hints=hints)
    assert first.before is not None and first.before.difference < 1e-5 * first.before.largest
    last = tmp_path / "last.pth"
    again = None if through == "cohobate" else hints  # an export says its sizes, the published files do not
    convert(tmp_path / "first", last, name, hints=again)
    if name == "amd":
        for k in range(2):
            weights |= {f"generators.{k}.norm.weight": torch.ones(96), f"generators.{k}.norm.bias": torch.zeros(96)}
    equal(read(last).weights, weights)


@pytest.mark.parametrize("depth", [0, 2])
def test_a_teacher_of_any_depth_comes_back(upstream: Any, tmp_path: Path, depth: int) -> None:
    weights = upstream.encoder(depth)
    convert(upstream.save(tmp_path / "teacher.pth", weights), tmp_path / "ours", "cohobate", hints=IMAGE)
    convert(tmp_path / "ours", tmp_path / "back.pth", "dbot")
    equal(read(tmp_path / "back.pth").weights, weights)


def test_a_fine_tuned_encoder_is_read_with_its_own_norm(upstream: Any, tmp_path: Path) -> None:
    weights = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: value
               for key, value in upstream.encoder().items()}  # fmt: skip
    source = upstream.save(tmp_path / "tuned.pth", weights | upstream.linear("head", 5, 64))
    done = convert(source, tmp_path / "ours", "cohobate", hints=IMAGE)
    assert ("fc_norm.weight", "student.norm.weight") in done.read.renamed
    assert {"head.weight", "head.bias"} < {key for key, _ in done.read.dropped}
    folder = tmp_path / "ours"  # and what `cohobate eval finetune` keeps: our mark, and timm's keys
    save_file(read(source).weights, folder / "model.safetensors")
    again = convert(folder, tmp_path / "again", "cohobate")
    assert ("fc_norm.weight", "student.norm.weight") in again.read.renamed


def test_the_account_of_a_dbot_checkpoint(upstream: Any, tmp_path: Path) -> None:
    done = convert(upstream.save(tmp_path / "s.pth", upstream.dbot()), tmp_path / "out", "mae", hints=IMAGE)
    assert not done.read.missing and len(done.read.loaded) + len(done.read.renamed) == len(upstream.dbot())
    assert {key for key, _ in done.read.dropped} == {"epoch", "scaler", "args"}
    assert ("decoder_predp.weight", "decoder.head.weight") in done.read.renamed
    assert [key for key, _ in done.written.dropped] == ["decoder.head.weight", "decoder.head.bias"]
    text = done.text()
    assert "dropped  decoder.head.* (2): a head of another kind" in text
    assert "renamed  decoder_blocks.* (24) -> decoder.blocks.*" in text
    assert "largest difference" in text
    assert "note" not in text  # all heads were given
    headless = convert(tmp_path / "out", tmp_path / "back", "dbot", hints=IMAGE)  # and a file without a head is read
    assert [key for key, _ in headless.read.missing] == ["decoder.head.weight", "decoder.head.bias"]


def test_a_key_bias_is_taken_out_exactly(upstream: Any, tmp_path: Path) -> None:
    """An MAE network as a VideoMAE encoder: inflated, without class token and key bias. The feature check passes."""
    weights = upstream.mae()
    assert weights["blocks.0.attn.qkv.bias"][64:128].abs().max() > 0.1
    hints = Hints(heads=4, decoder_heads=2, frames=4, tubelet=2)
    done = convert(upstream.save(tmp_path / "mae.pth", weights), tmp_path / "video.pth", "videomae", hints=hints)
    assert done.after is not None and done.after.difference < 1e-5 * done.after.largest
    found = read(tmp_path / "video.pth").weights
    assert "encoder.blocks.0.attn.q_bias" in found and not any("qkv.bias" in key for key in found)
    assert torch.equal(found["encoder.blocks.1.attn.v_bias"], weights["blocks.1.attn.qkv.bias"][128:])
    kernel = found["encoder.patch_embed.proj.weight"]
    still = torch.rand(1, 3, 1, 8, 8).expand(-1, -1, 2, -1, -1)  # a clip that stands still is its image
    expected = F.conv2d(still[:, :, 0], weights["patch_embed.proj.weight"])
    torch.testing.assert_close(F.conv3d(still, kernel)[:, :, 0], expected)
    said = "\n".join(done.changes)
    for change in ("dropped decoder", "dropped student.cls_token", "repeated over 2 frames", "pos_embed: computed"):
        assert change in said


def test_a_video_model_becomes_an_image_model(upstream: Any, tmp_path: Path) -> None:
    """Summed over time, the kernel gives an image what it gave a clip that stands still."""
    weights = upstream.finetuned()
    source = upstream.save(tmp_path / "video.pth", weights)
    convert(source, tmp_path / "clips", "cohobate", hints=Hints(heads=6, image_size=(24, 24), frames=4))
    convert(tmp_path / "clips", tmp_path / "images", "cohobate", hints=Hints(frames=1))
    encoder = load_encoder(tmp_path / "images")
    assert encoder.grid.shape == (1, 3, 3) and encoder.grid.patch == (1, 8, 8) and encoder.prefix == 0
    assert torch.equal(encoder.patch_embed.proj.weight, weights["patch_embed.proj.weight"].sum(2))
    convert(source, tmp_path / "at once", "cohobate", hints=Hints(heads=6, image_size=(24, 24), frames=1))
    assert load_encoder(tmp_path / "at once").grid == encoder.grid


def test_positions_are_resized_as_mae_does_it(upstream: Any, tmp_path: Path) -> None:
    weights = upstream.mae()
    hints = Hints(heads=4, decoder_heads=2, image_size=(48, 24))
    convert(upstream.save(tmp_path / "mae.pth", weights), tmp_path / "out", "cohobate", hints=hints)
    encoder = load_encoder(tmp_path / "out")
    assert encoder.grid.shape == (1, 6, 3)
    table = weights["pos_embed"][:, 1:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    expected = F.interpolate(table, size=(6, 3), mode="bicubic").flatten(2).transpose(1, 2)
    assert encoder.pos_embed is not None
    torch.testing.assert_close(encoder.pos_embed[:, 1:], expected)
    assert torch.equal(encoder.pos_embed[:, :1], weights["pos_embed"][:, :1])
    decoder = load_decoder(tmp_path / "out", encoder)
    assert decoder is not None and decoder.grid == encoder.grid


def test_a_student_of_clip(upstream: Any, tmp_path: Path) -> None:
    """Relative positions by BEiT's index, gammas, q and v biases; the head and the mask token of pretraining go."""
    weights = {key: value for key, value in upstream.encoder(depth=0).items() if key != "pos_embed"}
    weights |= upstream.blocks("blocks.", 2, 64, qv=True)
    weights |= {f"blocks.{i}.gamma_{j}": upstream.draw(64, about=1) for i in range(2) for j in (1, 2)}
    weights |= {"rel_pos_bias.relative_position_bias_table": upstream.draw(7 * 7 + 3, 4) * 5}
    place = [(y, x) for y in range(4) for x in range(4)]
    index = torch.full((17, 17), 51)  # class token with itself; below: of the class token, with it, and of two patches
    index[0, 1:], index[1:, 0] = 49, 50
    for q, (a, b) in enumerate(place):
        for k, (c, d) in enumerate(place):
            index[q + 1, k + 1] = (a - c + 3) * 7 + b - d + 3
    kept = weights | {"rel_pos_bias.relative_position_index": index}
    pretraining = {"mask_token": upstream.draw(1, 1, 64), "lm_head.weight": upstream.draw(5, 64)}
    done = convert(upstream.save(tmp_path / "a.pth", kept | pretraining), tmp_path / "ours", "cohobate")
    assert done.before is not None and done.before.difference < 1e-5 * done.before.largest
    assert {key for key, _ in done.read.dropped} > {"mask_token", "lm_head.weight"}
    assert load_encoder(tmp_path / "ours").relative_positions
    convert(tmp_path / "ours", tmp_path / "b.pth", "dbot-clip")
    equal(read(tmp_path / "b.pth").weights, kept)
    with pytest.raises(UserError, match="expected a model with absolute positions for mae"):
        convert(tmp_path / "ours", tmp_path / "c.pth", "mae")


def test_prefixes_and_wrappers_come_off(upstream: Any, tmp_path: Path) -> None:
    weights = upstream.encoder()
    torch.save({"module": {f"module._orig_mod.{key}": value for key, value in weights.items()}}, tmp_path / "a.pth")
    torch.save({f"backbone.{key}": value for key, value in weights.items()}, tmp_path / "b.pth")
    torch.save(weights, tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "d.safetensors")
    for name in ("a.pth", "b.pth", "c.pth", "d.safetensors"):
        equal(read(tmp_path / name).weights, weights)
    torch.save({"head.weight": torch.zeros(2), "module.head.weight": torch.ones(2)}, tmp_path / "e.pth")
    with pytest.raises(UserError, match="found two, with and without a prefix"):
        read(tmp_path / "e.pth")


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and error.startswith("cohobate: ")
    return error


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_that_runs_code_does_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: int, zipped: bool
) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    content = {"model": {"weight": torch.zeros(2)}, "args": Malicious(f"touch {trace}")}
    if zipped:
        torch.save(content, path, pickle_protocol=max(protocol, 2))
    else:
        path.write_bytes(pickle.dumps({"model": {}, "args": Malicious(f"touch {trace}")}, protocol=protocol))
    refused([str(path), str(tmp_path / "out")], capsys)
    assert not trace.exists() and not (tmp_path / "out").exists()


def test_the_refusal_names_what_was_asked_for(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(2)}, "args": Malicious("true")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"asks for (posix|nt|os)\.system: only tensors, plain containers and argparse"):
        read(tmp_path / "evil.pth")


def test_bad_files(upstream: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut short, not a number, of another network, or nothing at all: one line, exit code 2, nothing written."""
    weights = upstream.mae()
    good = upstream.save(tmp_path / "good.pth", weights).read_bytes()
    (tmp_path / "short.pth").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("these are no weights")
    save_file(weights, tmp_path / "cut.safetensors")
    cut = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(cut[: len(cut) // 2])
    bad = {key: value.clone() for key, value in weights.items()}
    bad["blocks.1.mlp.fc1.weight"][3, 5] = float("nan")
    upstream.save(tmp_path / "nan.pth", bad)
    upstream.save(tmp_path / "resnet.pth", {"conv1.weight": torch.zeros(4, 3, 7, 7), "fc.bias": torch.zeros(3)})
    gone = {key: value for key, value in weights.items() if key != "blocks.1.norm2.bias"}
    upstream.save(tmp_path / "gone.pth", gone)
    upstream.save(tmp_path / "more.pth", weights | {"blocks.0.attn.extra": torch.zeros(3)})
    upstream.save(tmp_path / "hole.pth", {k: v for k, v in weights.items() if not k.startswith("blocks.0.")})
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"model": Malicious("true")}, protocol=4))
    upstream.save(tmp_path / "whole.pth", weights | {"norm.bias": torch.zeros(64, dtype=torch.int32)})
    upstream.save(tmp_path / "shape.pth", weights | {"blocks.1.norm2.bias": torch.zeros(63)})
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    for name, said in (
        ("short.pth", "damaged, cut short"),
        ("empty.pth", "damaged, cut short or no file of weights (EOFError)"),
        ("code.pth", "no file of weights (UnpicklingError: Unsupported operand"),
        ("whole.pth", "expected floating weights, got torch.int32 in 'norm.bias'"),
        ("text.pth", "damaged, cut short"),
        ("cut.safetensors", "is no complete safetensors file"),
        ("nan.pth", "found inf or nan in 'blocks.1.mlp.fc1.weight'"),
        ("resnet.pth", "expected keys of cohobate, hf, amd, videomae, dbot-clip, dbot, mae, timm"),
        ("gone.pth", "missing: blocks.1.norm2.bias"),
        ("more.pth", "surplus: blocks.0.attn.extra"),
        ("hole.pth", "expected the blocks blocks.0 to blocks.1, found 1 of them"),
        ("shape.pth", "student.blocks.1.norm2.bias [63] instead of [64]"),
        ("list.pth", "expected weights"),
        ("nowhere.pth", "found nothing at"),
    ):
        error = refused([str(tmp_path / name), str(tmp_path / "out"), "--heads", "4", "--decoder-heads", "2"], capsys)
        assert said in error, error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.writing*"))
    lenient = ["--heads", "4", "--decoder-heads", "2", "--lenient"]
    assert main(["convert", str(tmp_path / "more.pth"), str(tmp_path / "out"), *lenient]) == 0
    assert "dropped  blocks.*: nothing here takes it (lenient)" in capsys.readouterr().out


def test_the_wrong_target_and_the_wrong_source(
    upstream: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(upstream.save(tmp_path / "mae.pth", upstream.mae()))
    video = str(upstream.save(tmp_path / "video.pth", upstream.videomae()))
    clip = ["--image-size", "24", "24", "--frames", "4", "--heads", "4", "--decoder-heads", "2"]
    still = ["--heads", "4", "--decoder-heads", "2"]
    out = str(tmp_path / "out")
    for arguments, said in (
        ([image, out, "--to", "videomae", *still], "expected a model of clips for videomae, got one of images"),
        ([video, out, "--to", "mae", *clip], "expected a model of images for mae, got one of 4 frames"),
        ([image, out, "--from", "videomae", *still], "expected patch_embed.proj.weight [D, C, t, h, w]"),
        ([video, out, "--from", "dbot", *clip], "expected a tensor 'patch_embed.proj.weight', found none"),
        ([image, out, "--to", "mae", "--image-size", "33", "32", *still], "height: expected a positive multiple"),
        ([image, out, "--to", "onnx"], "invalid choice: 'onnx'"),
        ([image, f"{out}.safetensors", *still], "destination: expected a folder for cohobate, got"),
        ([image, f"{out}.pth", "--to", "hf", *still], "destination: expected a folder for hf, got"),
        (
            [video, out, "--to", "amd", *clip],
            "expected a model with projections and generators for amd, got one without",
        ),
        ([image, out, "--frames", "0", *still], "frames: expected at least 1, got 0"),
        ([image, str(tmp_path / "no" / "out"), *still], "destination: expected a folder at"),
        ([image, out, "--heads", "4"], "decoder-heads: expected a number"),
    ):
        error = refused(arguments, capsys)
        assert said in error, error
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(upstream: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(upstream.save(tmp_path / "mae.pth", upstream.mae()))
    sizes = ["--heads", "4", "--decoder-heads", "2"]
    taken, folder = tmp_path / "taken.pth", tmp_path / "folder"
    taken.write_text("precious")
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    assert "found something; --force replaces it" in refused([source, str(taken), "--to", "dbot", *sizes], capsys)
    assert "found something" in refused([source, str(folder), *sizes], capsys)
    assert "got thesis.txt" in refused([source, str(folder), "--force", *sizes], capsys)
    assert taken.read_text() == "precious" and (folder / "thesis.txt").read_text() == "precious"
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"bad")
    refused([str(bad), str(taken), "--to", "dbot", "--force", *sizes], capsys)  # a failure leaves what is there
    assert taken.read_text() == "precious"
    assert main(["convert", source, str(taken), "--to", "dbot", "--force", *sizes]) == 0
    assert "decoder_embed.weight" in read(taken).weights
    target = tmp_path / "export"
    for force in ([], ["--force"]):
        assert main(["convert", source, str(target), *sizes, *force]) == 0
        printed = capsys.readouterr().out
        assert "features as read: largest difference" in printed and "features as written: largest" in printed
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json", "decoder.safetensors", "model.safetensors",
    ]  # fmt: skip
    assert sorted(tmp_path.glob("*.writing*")) == sorted(tmp_path.glob("*.replaced*")) == []


def test_help_and_the_list_of_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    assert "--image-size H W" in capsys.readouterr().out
    assert main([]) == 0
    assert "cohobate convert SOURCE DESTINATION" in capsys.readouterr().out
