"""From the recipe to videos: a run of GRPO through the command line, and generation from what it left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _generate import direct, toy_items, videos
from _grpo_worker import BATCH, GROUP, STEPS, rollouts, save_start, stage
from _sft_worker import BUCKET, ROOT, merge, one_thread, scalars, toy, written

from idc.cli import main
from idc.data.video import decode_video, encode_video
from idc.errors import UserError
from idc.models.checkpoints import find_checkpoint
from idc.models.sampling import to_uint8
from idc.models.spec import Lora
from idc.models.system import open_system

LORA = {"trainable": "lora", "lora": {"rank": 2, "alpha": 4}}


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def overlay(folder: Path, data: Path, start: Path) -> dict[str, Any]:
    """The recipe's own reward, objective and callbacks on a tiny model and two groups."""
    tiny = {
        "checkpoint": str(start),
        "optimizer": {"init_args": {"lr": 1e-2}},
        "rollouts": {"steps": STEPS, "shift": 1.0, "batch": GROUP},
        "rollouts_a_step": BATCH,
        "sampling": {"steps": 2, "scale": None, "shift": None},
    }
    batches = {
        "sources": [toy(f"{data}/train", 48, 0)],
        "val_sources": [toy(f"{data}/held_out", 8, 1_000_000)],
        "buckets": [BUCKET],
        "batch_size": BATCH,
        "group_size": GROUP,
        "val_batch_size": 8,
    }
    logger = {"init_args": {"save_dir": str(folder)}}
    trainer = {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 2, "logger": logger}
    return {"trainer": trainer, "model": {"init_args": tiny}, "data": {"init_args": batches}}


def aligned(folder: Path, data: Path, start: Path, **changes: Any) -> Path:
    """A finished run of two iterations."""
    content = merge(overlay(folder / "runs", data, start), {"model": {"init_args": changes}})
    own = written(folder / "own.yaml", content)
    with one_thread():
        assert main(["fit", "--config", str(ROOT / "recipes" / "grpo.yaml"), "--config", str(own)]) == 0
    (run,) = (folder / "runs").glob("**/version_0")
    return run


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_the_recipe_trains_and_its_run_generates_as_the_trained_model(
    changes: dict[str, Any], toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the run does not say (transformer, encoders, guidance) comes from the model that it started from."""
    start = save_start(tmp_path / "start")
    run = aligned(tmp_path, toy_data, start, **changes)
    assert "in eval mode" not in capsys.readouterr().err
    logged = scalars(run)
    expected = {"train/reward", "train/reward/face", "train/reward/quality", "train/advantage", "train/grad_norm"}
    expected |= {"val/reward", "val/reward/natural", "policy/kl", "perf/rollout_seconds", "lr-AdamW"}
    assert expected <= set(logged)
    assert [value for _, value in logged["policy/first_ratio_error"]] == [0, 0]
    assert logged["val/reward"][0][0] == 0  # the start, which the rise is measured from
    assert len(logged["val/reward"]) == len(logged["val/without_reward"]) == 2

    settings = {"trainable": "lora", "lora": Lora(rank=2, alpha=4)} if changes else {}
    module = stage(start, rollouts=rollouts(), **settings)
    module.configure_model()
    state = torch.load(find_checkpoint(run).state, map_location="cpu", weights_only=True)["state_dict"]
    weights = {name: value for name, value in state.items() if name.startswith("transformer.")}
    averages = {name: state.get("ema." + name.replace(".", "/"), value) for name, value in weights.items()}
    moved = [value for name, value in module.state_dict().items() if not torch.equal(value, averages[name])]
    assert moved, "two iterations have changed something"
    module.load_state_dict(averages)
    module.eval()

    made = direct(tmp_path / "videos", run, toy_items(toy_data))
    assert (made.sampling.steps, made.sampling.scale, made.sampling.shift) == (2, 1.0, 1.0)
    assert len(videos(tmp_path / "videos")) == 8
    for request in made.trainer.predict_dataloaders:
        seeds_B = torch.tensor([request.seed])
        with one_thread():
            (video,) = module.sample_videos([request.sample], request.bucket, seeds_B, made.sampling)
        data = encode_video(to_uint8(video), request.fps, crf=0, pixel_format="yuv444p")
        (path,) = (tmp_path / "videos").glob(f"*{request.item.id.rpartition('/')[2]}*.mp4")
        if changes:  # merged adapters round otherwise
            gap = decode_video(path.read_bytes()).astype(int) - decode_video(data).astype(int)
            assert np.abs(gap).max() <= 2
        else:
            assert path.read_bytes() == data

    shutil.move(start, tmp_path / "gone")
    with pytest.raises(UserError, match=r"no such file or folder.*bring it back, or set model.init_args.transformer"):
        open_system(run)
