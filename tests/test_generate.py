"""Generation through the command line: what a folder of videos depends on, and what it survives."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from _generate import EDIT, SIZE, apart, command, contents, direct, held_out, here, toy_items, videos
from _sft_worker import ROOT, TRANSFORMER
from _shards import restamp
from PIL import Image
from safetensors.torch import load_file, save_file

from idc.cli import main
from idc.data.benchmark import read_items
from idc.data.images import to_float
from idc.data.index import ShardIndex
from idc.data.item_sources import ItemFile, Shards
from idc.data.output import MANIFEST, OutputFolder
from idc.data.sources import ShardSource
from idc.data.video import decode_video, encode_video, probe
from idc.errors import UserError
from idc.models import weight_hashes
from idc.models.baselines import VACE
from idc.models.pipeline import IDCrafterPipeline
from idc.models.rounding import islands, round_matrices, units_of
from idc.models.sampling import to_uint8
from idc.models.spec import IDBlocks, TransformerSpec
from idc.models.toy_codec import CosineCodec
from idc.stages.generate import Encoding, Generate, SamplingChanges


@pytest.fixture(autouse=True)
def _lightnings_log(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning's log handler holds the stream of whichever test imported it, and that one is closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture(scope="module")
def run(trained: Callable[..., Path]) -> Path:
    return trained()


@pytest.fixture(scope="module")
def made(run: Path, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The videos of the eight held-out items, made at a stretch by one process."""
    out = tmp_path_factory.mktemp("made") / "videos"
    assert here(out, run, *held_out(toy_data)) == 0
    return out


def failures(out: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    return {row["id"]: row["reason"] for row in rows}


# What is made -------------------------------------------------------------------------------------------------------


def test_each_item_has_its_video_of_the_right_size_and_the_folder_says_what_was_asked_for(made: Path) -> None:
    items = read_items(made / "items.jsonl")
    assert len(items) == 8
    assert {f"{item.id}.mp4" for item in items} == set(videos(made))
    for item in items:
        info = probe(made / f"{item.id}.mp4")
        assert (info.frames, info.height, info.width, info.fps) == (5, 32, 32, 8)
        assert item.prompt
        spec = item.meta["toy"]
        assert len(item.references) == len(item.labels) == len(item.kinds) == len(spec["subjects"])
        for path in item.references:
            assert path.parent == made / "references"
            assert Image.open(path).size == (16, 16)
    assert not (made / "failures.jsonl").exists()
    assert not list(made.rglob("*.tmp"))


def test_videos_differ_and_the_seed_and_every_setting_change_them(
    made: Path, run: Path, toy_data: Path, tmp_path: Path
) -> None:
    assert len(set(videos(made).values())) == 8
    changes: dict[str, dict[str, Any]] = {
        "nothing": {},
        "seed": {"seed": 1},
        "steps": {"sampling": SamplingChanges(steps=3)},
        "scale": {"sampling": SamplingChanges(scale=6.0)},
        "image scale": {"sampling": SamplingChanges(image_scale=1.2)},
        "raw weights": {"weights": "raw"},
        "bfloat16": {"compute_dtype": "bfloat16"},
    }
    first, found = next(iter(videos(made))), {}
    for name, settings in changes.items():
        direct(tmp_path / name, run, toy_items(toy_data, limit=1), **{"fps": 8, **settings})
        assert videos(tmp_path / name).keys() == {first}
        found[name] = videos(tmp_path / name)[first]
    assert found["nothing"] == videos(made)[first]
    assert len(set(found.values())) == len(changes)


@pytest.mark.parametrize("from_run", [False, True], ids=["pipeline", "checkpoint"])
def test_generation_rounds_its_weights_where_it_computes_in_bfloat16_alone(
    from_run: bool, run: Path, tmp_path: Path
) -> None:
    """And so far as autocast would round them in every pass (test_speed_stages has videos of both)."""
    source = str(run) if from_run else "toy"
    stages = [Generate(str(tmp_path), source, compute_dtype=dtype) for dtype in ("float32", "bfloat16")]
    for stage in stages:
        with torch.device("meta"):  # Lightning's default device, which must not be where weights are made
            stage.configure_model()
    whole, half = (stage.transformer for stage in stages)
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    assert {p.dtype for unit in units_of(half) for p in islands(unit)} == {torch.float32}
    assert half.blocks[0].ffn.net[2].weight.dtype is torch.bfloat16
    assert half.id_blocks[0].cross_attn.to_q.weight.dtype is torch.bfloat16
    round_matrices(whole)
    assert all(map(torch.equal, whole.state_dict().values(), half.state_dict().values()))


def test_a_video_depends_neither_on_the_other_items_nor_on_the_ranks(
    made: Path, run: Path, toy_data: Path, tmp_path: Path
) -> None:
    """Two processes share the items; the folder is that of one process, byte for byte."""
    two = tmp_path / "two"
    arguments = command(two, run, *held_out(toy_data), "--trainer.devices=2", "--trainer.strategy=ddp")
    assert apart(arguments, tmp_path / "log", ranks=2) == [0, 0], (tmp_path / "log-0").read_text()[-2000:]
    assert contents(two) == contents(made)


# Interrupted --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_in_the_middle_of_a_video_and_resumed_gives_the_same_folder(
    made: Path, run: Path, toy_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    arguments = command(out, run, *held_out(toy_data))
    assert apart(arguments, tmp_path / "first", kill_after=4) == [-9]
    assert len(videos(out)) == 3
    assert list(out.rglob("*.tmp"))  # half a video
    kept = {name: (out / name).stat().st_mtime_ns for name in videos(out)}
    assert apart(arguments, tmp_path / "second", kill_after=3) == [-9]
    assert len(videos(out)) == 5
    assert apart(arguments, tmp_path / "third") == [0]
    assert contents(out) == contents(made)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept  # not made again
    log = (tmp_path / "third-0").read_text()
    assert "8 items, 5 of them done" in log
    assert "8 of 8 videos" in log


def test_a_finished_folder_is_left_alone_and_a_damaged_or_missing_video_comes_back(
    made: Path, run: Path, toy_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "videos"
    shutil.copytree(made, out)
    first, second, *_ = sorted(videos(out))
    (out / first).write_bytes((out / first).read_bytes()[:100])
    (out / second).unlink()
    for _ in range(2):
        direct(out, run, toy_items(toy_data), fps=8)
        assert contents(out) == contents(made)


def test_a_run_that_was_cut_short_says_what_is_there_and_the_next_one_makes_the_rest(
    made: Path, run: Path, toy_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "videos"
    caplog.set_level("INFO")
    assert here(out, run, *held_out(toy_data), "--trainer.limit_predict_batches=3") == 0
    assert f"3 of 8 videos are in {out}" in caplog.text
    assert here(out, run, *held_out(toy_data)) == 0
    assert f"8 of 8 videos are in {out}" in caplog.text
    assert contents(out) == contents(made)


def test_videos_that_were_made_otherwise_are_noticed_and_replaced_only_on_request(
    made: Path, run: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "videos"
    shutil.copytree(made, out)
    steps = "--model.init_args.sampling.steps=3"
    assert here(out, run, *held_out(toy_data), steps) == 2
    assert "8 of 8 videos" in (message := capsys.readouterr().err)
    assert "sampling.steps was 2, is 3" in message
    assert "existing=replace" in message
    assert contents(out) == contents(made)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["settings"]["a"] = {"long": "x" * 5000}
    (out / MANIFEST).write_text(json.dumps(manifest))
    assert here(out, run, *held_out(toy_data), steps) == 2
    assert "a was {'long': 'xxx" in (message := capsys.readouterr().err)
    assert len(message) < 2000
    foreign = sorted(videos(out))[0]
    (out / "records" / f"{foreign.removesuffix('.mp4')}.json").unlink()  # as if copied from elsewhere
    assert here(out, run, *held_out(toy_data)) == 2
    assert f"1 of 8 videos there, such as {foreign}" in capsys.readouterr().err
    assert here(out, run, *held_out(toy_data), "--model.init_args.existing=replace") == 0
    assert contents(out) == contents(made)


def test_weights_that_were_swapped_in_place_are_noticed_and_a_folder_that_moved_is_the_same(
    run: Path, toy_data: Path, tmp_path: Path
) -> None:
    """The files keep their names, sizes and times; the manifest tells the sizes of the model that is there."""
    pipe, out = tmp_path / "pipe", tmp_path / "videos"
    IDCrafterPipeline.from_run(run).save_pretrained(pipe)
    stage = direct(out, pipe, toy_items(toy_data, limit=1))
    recorded = json.loads((out / "manifest.json").read_text())["settings"]["model"]["transformer"]
    assert stage.transformer.config["num_layers"] == 2
    expected = {name: stage.transformer.config[name] for name in ("num_layers", "num_attention_heads", "ffn_dim")}
    assert {name: recorded[name] for name in expected} == expected
    shutil.copytree(pipe, tmp_path / "moved")
    direct(out, tmp_path / "moved", toy_items(toy_data, limit=2))
    before = videos(out)
    assert len(before) == 2
    file = pipe / "transformer" / "diffusion_pytorch_model.safetensors"
    stat = file.stat()
    save_file({name: value / 2 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    with pytest.raises(UserError, match=r"2 of 3 videos .* made otherwise.*model\.weights\.files"):
        direct(out, pipe, toy_items(toy_data, limit=3))
    assert videos(out) == before


def test_a_large_files_hash_is_kept_on_disk_and_follows_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of another process: what this one knows is forgotten. The file's times are two hours old, but for the inode's
    change time, which nobody can set; so the clock goes forward."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_hashes, "_PERSISTED_BYTES", 1000)
    now, reads = time.time(), []
    monkeypatch.setattr(weight_hashes.time, "time", lambda: now + 60)
    plain = weight_hashes._read
    monkeypatch.setattr(weight_hashes, "_read", lambda path: reads.append(path) or plain(path))
    file = tmp_path / "large.safetensors"

    def found() -> str:
        weight_hashes._known.clear()
        return weight_hashes.content_hash(file)

    file.write_bytes(bytes(2000))
    first = found()
    assert [found(), weight_hashes.content_hash(file), len(reads)] == [first, first, 1]
    (record,) = tmp_path.glob("cache/idc/hashes/*.json")
    record.write_text(record.read_text()[:20])  # cut short
    assert [found(), found(), len(reads)] == [first, first, 2]
    stat = file.stat()
    file.write_bytes(b"\1" * 2000)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert found() != first
    monkeypatch.setattr(weight_hashes.time, "time", lambda: file.stat().st_ctime)  # too fresh to be trusted
    record.unlink()
    reads.clear()
    assert [found(), weight_hashes.content_hash(file)] == [weight_hashes.content_hash(file)] * 2
    assert len(reads) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(file / "no folder"))
    assert len(found()) == 64


def test_a_second_run_into_the_same_folder_is_refused(made: Path, run: Path, toy_data: Path, tmp_path: Path) -> None:

    holder = OutputFolder(tmp_path / "videos")
    holder.open()
    try:
        status = apart(command(tmp_path / "videos", run, *held_out(toy_data)), tmp_path / "log")
    finally:
        holder.close()
    assert status == [2]
    assert "another run is writing there" in (tmp_path / "log-0").read_text()


# Failing items ------------------------------------------------------------------------------------------------------


def test_an_item_that_fails_is_recorded_with_its_reason_and_the_others_are_made(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (24, 20), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no picture")
    records = {
        "singleobj_1": ["red.png"],
        "singleobj_2": ["missing.png"],
        "singleobj_3": ["broken.png"],
        "multiobject_1": ["red.png"] * 5,
        "multiobject_2": ["red.png"] * 4,
        "singleobj_4": [],
        "singleobj_5": [],
    }
    benchmark = {
        name: {"img_paths": paths, "prompt": "a red ball", "class_label": ["ball"] * len(paths), "synthesis_flag": "0"}
        for name, paths in records.items()
    }
    benchmark["singleobj_5"]["prompt"] = " "
    (tmp_path / "eval.json").write_text(json.dumps(benchmark))
    items = ["--data.init_args.items", f"{{class_path: Benchmark, init_args: {{path: {tmp_path}/eval.json}}}}"]
    out = tmp_path / "videos"
    assert here(out, run, *items) == 3
    found = failures(out)
    assert list(found) == ["singleobj_2", "singleobj_3", "multiobject_1", "singleobj_5"]
    assert "neither a prompt nor a reference" in found["singleobj_5"]
    assert "missing.png: no such file" in found["singleobj_2"]
    assert "broken.png: cannot be read as a picture" in found["singleobj_3"]
    assert "5 subjects" in found["multiobject_1"]
    assert set(videos(out)) == {"singleobj_1.mp4", "multiobject_2.mp4", "singleobj_4.mp4"}
    assert "singleobj_2: no video: " in capsys.readouterr().out
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "missing.png")
    kept = videos(out)
    assert here(out, run, *items) == 3
    assert list(failures(out)) == ["singleobj_3", "multiobject_1", "singleobj_5"]
    assert {**videos(out), **kept} == videos(out)
    assert {item.category for item in read_items(out / "items.jsonl")} == {"singleobj", "multiobject"}


def test_a_shard_sample_that_cannot_be_read_is_a_failed_item(run: Path, toy_data: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_data / "held_out", tmp_path / "held_out")
    index = ShardIndex.load(tmp_path / "held_out", source="toy")
    entry = index.entries[2]
    shard = tmp_path / "held_out" / entry.shard
    data = bytearray(shard.read_bytes())
    data[entry.members[0].offset + 20] ^= 0xFF
    shard.write_bytes(data)
    restamp(tmp_path / "held_out")
    out, items = tmp_path / "videos", Shards(ShardSource(f"{tmp_path}/held_out"))
    assert direct(out, run, items, sampling=SamplingChanges(steps=1)).exit_status == 3
    assert failures(out).keys() == {entry.key}
    assert "sha256" in failures(out)[entry.key]
    assert len(videos(out)) == 7


def test_a_wrong_setting_on_the_command_line_is_answered_by_one_line(
    run: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        (["--model.init_args.weights=emma"], ["emma", "'ema'"]),
        (
            ["--data.init_args.items", "{class_path: Benchmark, init_args: {path: no.json}}"],
            ["no.json", "no such file"],
        ),
    ]
    for arguments, expected in cases:
        assert here(tmp_path / "videos", run, *held_out(toy_data), *arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("idc: error: ")
        for part in expected:
            assert part in error


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"checkpoint": "nowhere"}, "checkpoint='nowhere'.*no such file"),
        ({"checkpoint": None}, r"checkpoint=null.*transformer\.pretrained"),
        ({"frames": 6}, "frames=6.*5 and 9"),
        ({"width": 33}, "width=33.*32 and 48"),
        ({"height": None}, "height=None, width=32: set both"),
        ({"seed": -1}, "seed=-1"),
        ({"fps": 0.0}, "fps=0"),
        ({"baseline": VACE("x/y")}, "checkpoint=.* and a baseline"),
    ],
)
def test_a_wrong_setting_names_its_rule(
    settings: dict[str, Any], expected: str, run: Path, toy_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        direct(tmp_path / "videos", settings.pop("checkpoint", run), toy_items(toy_data), **settings)
    assert not list(tmp_path.rglob("*.mp4"))


def test_wrong_encodings_strengths_and_another_models_sizes_are_refused(
    run: Path, toy_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"crf=99.*0 \(lossless\)"):
        Encoding(crf=99)
    with pytest.raises(UserError, match="yuv422p"):
        Encoding(pixel_format="yuv422p")
    # What costs nothing to check comes before a model that takes long to open, or, as here, is not there.
    for settings, expected in (
        ({"strength": 2}, "strength=2"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"baseline": VACE("x/y")}, "editing runs on our own model"),
        ({"sampling": SamplingChanges(steps=0)}, "steps=0"),
    ):
        with pytest.raises(UserError, match=expected):
            direct(tmp_path / "videos", tmp_path / "nowhere", toy_items(toy_data), edit=True, **settings)
    spec = TransformerSpec(**{**TRANSFORMER, "num_layers": 3}, id_blocks=IDBlocks(layers=1))
    with pytest.raises(UserError, match=r"does not fit.*blocks.2.*num_layers\D+2"):
        direct(tmp_path / "videos", run, toy_items(toy_data), transformer=spec)


def test_a_checkpoint_that_is_damaged_or_no_checkpoint_is_named(run: Path, toy_data: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "version_0", symlinks=True)
    (state,) = tmp_path.glob("version_0/checkpoints/step-*/state.ckpt")
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    expected = {
        "version_0": "does not match its hash",
        str(state.parent.relative_to(tmp_path)): "does not match its hash",
        "empty": "no complete checkpoint",
        "text.ckpt": "no config.yaml",
    }
    for name, part in expected.items():
        with pytest.raises(UserError, match=part):
            direct(tmp_path / "out", tmp_path / name, toy_items(toy_data, limit=1))


# Edits --------------------------------------------------------------------------------------------------------------


def test_edits_resume_and_an_edit_of_strength_0_is_the_source_up_to_the_codec(
    run: Path, toy_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "edits"
    arguments = held_out(toy_data, edit=True, limit=2)
    assert here(out, run, *arguments, "--model.init_args.strength=0", recipe=EDIT) == 0
    for item in read_items(out / "items.jsonl"):
        assert item.source is not None
        clip = to_float(torch.from_numpy(decode_video(item.source)).permute(3, 0, 1, 2))
        codec = CosineCodec()
        expected = to_uint8(codec.decode(codec.encode(clip[None]))[0])
        found = decode_video(out / f"{item.id}.mp4")
        assert abs(found.astype(int) - expected.astype(int)).max() <= 3  # RGB and back through lossless YUV
    with pytest.raises(UserError, match=r"edit.strength was 0, is 0.8"):
        direct(out, run, toy_items(toy_data, edit=True, limit=2), edit=True, fps=None)


def test_an_edit_of_a_file_with_a_mask_and_what_is_wrong_with_others(run: Path, toy_data: Path, tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    clip = np.repeat(np.repeat(g.integers(0, 255, (7, 5, 6, 3), dtype=np.uint8), 8, 1), 8, 2)  # 7 frames of 40x48
    (tmp_path / "clip.mp4").write_bytes(encode_video(clip, 12, crf=0, pixel_format="yuv444p"))
    (tmp_path / "no.mp4").write_bytes(b"no video")
    mask = np.zeros((40, 48), np.uint8)
    mask[8:24, 8:30] = 255
    masks = {"good": mask, "small": mask[:32], "black": mask * 0, "white": mask * 0 + 255}
    for name, picture in masks.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    for name, frames in (("moving", 7), ("short", 5)):
        video = np.repeat(np.repeat(mask[None, :, :, None], frames, 0), 3, 3)
        (tmp_path / f"{name}.mp4").write_bytes(encode_video(video, 12, crf=0, pixel_format="yuv444p"))
    rows = [
        {"id": name, "prompt": "a red ball", "source": source, "mask": where}
        for name, source, where in [
            ("whole", "clip.mp4", None), ("good", "clip.mp4", "good.png"), ("moving", "clip.mp4", "moving.mp4"),
            ("small", "clip.mp4", "small.png"), ("black", "clip.mp4", "black.png"), ("white", "clip.mp4", "white.png"),
            ("short", "clip.mp4", "short.mp4"), ("broken", "no.mp4", None), ("absent", "absent.mp4", None),
        ]
    ]  # fmt: skip
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own: dict[str, Any] = {"frames": None, "height": None, "width": None, "edit": True}
    out, items = tmp_path / "videos", ItemFile(f"{tmp_path}/edits.jsonl")
    assert direct(out, run, items, **own).exit_status == 3
    reasons = failures(out)
    assert "48x32" in reasons["small"]
    assert "48x40" in reasons["small"]
    assert "all of it is black" in reasons["black"]
    assert "all of it is white" in reasons["white"]
    assert "5 frames, the source has 7" in reasons["short"]
    assert "no.mp4: cannot be opened" in reasons["broken"]
    assert "absent.mp4: no such file" in reasons["absent"]
    assert set(videos(out)) == {"whole.mp4", "good.mp4", "moving.mp4"}
    info = probe(out / "good.mp4")  # cut to 4n + 1 frames and to multiples of 16 about the centre
    assert (info.frames, info.height, info.width, info.fps) == (5, 32, 48, 12)
    assert videos(out)["good.mp4"] != videos(out)["whole.mp4"]
    edited, kept = decode_video(out / "good.mp4").astype(int), mask[4:36] == 0
    zero = tmp_path / "zero"
    direct(zero, run, items, strength=0.0, **own)
    away = abs(edited - decode_video(zero / "good.mp4").astype(int)).max((0, 3))
    assert away[kept].max() == 0
    assert away[~kept].mean() > 3


# Recipes ------------------------------------------------------------------------------------------------------------


def test_the_baselines_and_both_recipes_name_classes_that_take_their_settings() -> None:
    """Printing the configuration parses it against the classes."""
    stages = {"generate": "idc.stages.generate.Generate", "edit": "idc.stages.generate.Edit"}
    for name, stage in stages.items():
        for overlay in [None, *sorted((ROOT / "recipes" / "baselines").glob("*.yaml"))]:
            if name == "edit" and overlay is not None:
                continue
            files = [str(ROOT / "recipes" / f"{name}.yaml"), *([] if overlay is None else [str(overlay)])]
            arguments = [argument for file in files for argument in ("--config", file)]
            assert yaml.safe_load(Path(files[0]).read_text())["model"]["class_path"] == stage
            with pytest.raises(SystemExit) as end:
                main([name, *arguments, "--print_config"])
            assert end.value.code == 0


def test_vace_without_weights_ends_the_run_with_one_line(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the hub that cannot be reached, and from a folder that lacks its parts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    overlay = ["--config", str(ROOT / "recipes" / "baselines" / "vace.yaml"), *SIZE]
    assert here(tmp_path / "videos", "null", *overlay, *held_out(toy_data), "--model.init_args.checkpoint=null") == 2
    (tmp_path / "vace").mkdir()
    (tmp_path / "vace" / "model_index.json").write_text('{"_class_name": "WanVACEPipeline"}')
    baseline = VACE(str(tmp_path / "vace"))
    found = [capsys.readouterr().err]
    with pytest.raises(UserError) as error:
        direct(tmp_path / "other", None, toy_items(toy_data), baseline=baseline)
    for message in (*found, str(error.value)):
        line = message.strip().splitlines()[-1]
        assert "cannot load Wan2.1-VACE" in line
        assert "give a folder in diffusers' layout" in line
        assert "Traceback" not in message
    assert found[0].strip().splitlines()[-1].startswith("idc: error: ")
    assert not list(tmp_path.rglob("failures.jsonl"))
