"""DeepSpeed on two CPU processes against DDP, through the SFT recipe, and what is refused with it.

Where DeepSpeed (extra `deepspeed`) is not installed, what needs it is skipped.
"""

from __future__ import annotations

import importlib.util
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from _dpo_worker import DPOFit
from _dpo_worker import overlay as dpo_overlay
from _grpo_worker import save_start
from _sft_worker import ROOT, Fit, callbacks, merge, scalars, shards, tiny_overlay
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator

from idc.callbacks.ema import EMA
from idc.callbacks.resume import resolve_ckpt_path
from idc.cli import main
from idc.data.corruptions import TurnedColours
from idc.data.sources import ShardSource
from idc.errors import UserError
from idc.models.checkpoints import WHOLE_WEIGHTS, find_checkpoint, read_weights
from idc.models.manifest import STATE, Manifest, hash_files, list_files
from idc.stages.generate import Encoding
from idc.stages.pairs import CorruptedPairs
from idc.stages.zero import OLDEST, DeepSpeedZeRO

INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="DeepSpeed (extra deepspeed) is not installed")
SCATTERED: dict[str, Any] = {"class_path": "_zero_worker.Scattered"}
SAME_LAYERS: dict[str, Any] = {"class_path": "_zero_worker.SameLayers"}
DROPOUT = {"text": 0.0, "references": 0.6, "both": 0.0}
STEPS = 6
# Of 6 micro-batches an epoch, 4 make a step and then 2; in about a third of them no sample of a rank has references.
OVERLAY: dict[str, Any] = {
    "trainer": {"max_steps": STEPS, "accumulate_grad_batches": 4, "val_check_interval": 6, "devices": 2},
    "model": {
        "init_args": {
            "dropout": DROPOUT,
            "schedule": {"warmup_steps": 2, "decay": "constant"},
        }
    },
}


def fit_of(folder: Path, data: Path, strategy: dict[str, Any], ema: bool = True, checkpointing: str = "none") -> Fit:
    overlay = merge(tiny_overlay(data, folder / "runs"), callbacks(save_every=3), OVERLAY)
    overlay["trainer"]["strategy"] = strategy
    overlay["model"]["init_args"]["speed"] = {"checkpointing": checkpointing}
    if not ema:
        kept = [entry for entry in overlay["trainer"]["callbacks"] if "EMA" not in entry["class_path"]]
        overlay["trainer"]["callbacks"] = kept
    return Fit(folder, overlay, ranks=2)


def zero(stage: int) -> dict[str, Any]:
    return {"class_path": "idc.stages.zero.DeepSpeedZeRO", "init_args": {"stage": stage}}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    folder = tmp_path_factory.mktemp("ddp")
    run = fit_of(folder, folder, SAME_LAYERS)
    assert run.finish() == [0, 0], run.errors()
    return run


@pytest.fixture(scope="module")
def zero2(ddp: Fit, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """A run that ended after 3 steps and went on; its backward passes compute all layers again."""
    run = fit_of(tmp_path_factory.mktemp("zero2"), ddp.folder, zero(2), checkpointing="full")
    short = replace(run, args=("--trainer.max_steps=3",))
    assert short.finish() == [0, 0], short.errors()
    resumed = replace(run, args=("--ckpt_path", "last"))
    assert resumed.finish() == [0, 0], resumed.errors()
    return run


@pytest.fixture(scope="module")
def zero3(ddp: Fit, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """A run whose backward passes gather all weights again, and compute all but attention again."""
    run = fit_of(tmp_path_factory.mktemp("zero3"), ddp.folder, SCATTERED, ema=False, checkpointing="attention")
    assert run.finish() == [0, 0], run.errors()
    return run


@pytest.fixture(scope="module")
def whole(zero3: Fit) -> Path:
    """ZeRO-3's weights made whole by DeepSpeed's own script, where the message says."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert

    folder = zero3.run / "whole"
    convert(str(last(zero3) / STATE), str(folder), max_shard_size="1TB")
    return folder / "pytorch_model.bin"


def micro_losses(run: Fit) -> list[float]:
    """Of every pass, the mean over ranks, in the order in which they were made."""
    ranks = [[line["loss"] for line in run.lines(rank) if "loss" in line] for rank in (0, 1)]
    return [sum(pair) / 2 for pair in zip(*ranks, strict=True)]


def last(run: Fit) -> Path:
    return run.run / "checkpoints" / f"step-{STEPS:08d}"


@needs_deepspeed
def test_zero2_that_was_resumed_is_ddp(ddp: Fit, zero2: Fit) -> None:
    """Losses, norms before clipping, steps where an epoch ends in the middle of one, held-out losses of averages."""
    assert len(micro_losses(ddp)) == (4 + 2) * STEPS // 2
    assert micro_losses(zero2) == pytest.approx(micro_losses(ddp), abs=1e-5)
    for step, values in ddp.validation().items():
        assert zero2.validation()[step] == pytest.approx(values, abs=1e-5)
    curves, expected = scalars(zero2.run), scalars(ddp.run)
    assert dict(curves["train/grad_norm"]) == pytest.approx(dict(expected["train/grad_norm"]), rel=1e-4)
    assert max(value for _, value in curves["train/grad_norm"]) > 0.4


@needs_deepspeed
def test_zero3_that_gathers_every_weight_is_ddp(ddp: Fit, zero3: Fit) -> None:
    """Also where a rank's references are all dropped, and through previews."""
    assert micro_losses(zero3) == pytest.approx(micro_losses(ddp), abs=1e-5)
    curves, expected = scalars(zero3.run), scalars(ddp.run)
    assert dict(curves["train/grad_norm"]) == pytest.approx(dict(expected["train/grad_norm"]), rel=1e-4)


@needs_deepspeed
def test_zero3_with_compiled_layers_is_ddp_and_compiles_nothing_again(ddp: Fit, tmp_path: Path) -> None:
    """Hooks gather and drop a block's weights around its graphs: no guard meets weights that are not there, and what a
    graph keeps for its backward pass is gathered again.

    Wan's block is one graph. The one after it is another for each kind of what it reads, and the data has five: those
    of one, two and three subjects, texts of another length, and none at all.
    """
    run = fit_of(tmp_path, ddp.folder, SCATTERED, ema=False, checkpointing="attention")
    run.overlay["model"]["init_args"]["speed"]["compile"] = True
    run.overlay["trainer"] |= {"limit_val_batches": 0, "callbacks": [{"class_path": "_zero_worker.Traced"}]}
    assert run.finish(timeout=180) == [0, 0], run.errors()
    assert micro_losses(run) == pytest.approx(micro_losses(ddp), abs=1e-5)
    graphs = [count for _, count in scalars(run.run)["graphs"]]
    assert len(graphs) == STEPS
    assert graphs[2:] == [1 + 5] * (STEPS - 2)


@needs_deepspeed
def test_weights_of_either_stage_are_read_as_ddps(ddp: Fit, zero2: Fit, whole: Path) -> None:
    for which in ("ema", "raw"):
        expected = read_weights(find_checkpoint(ddp.run), which)
        torch.testing.assert_close(read_weights(find_checkpoint(zero2.run), which), expected, atol=2e-5, rtol=1e-4)
    found = find_checkpoint(whole)
    assert found.config is not None
    torch.testing.assert_close(read_weights(found), read_weights(find_checkpoint(ddp.run), "raw"), atol=2e-5, rtol=1e-4)


@needs_deepspeed
def test_dpo_with_zero2_is_ddp(ddp: Fit, tmp_path: Path) -> None:
    """Two passes of a step before its one backward pass, the first with the reference's weights in place of its own."""
    start = save_start(tmp_path / "model")
    for name, count in (("train", 12), ("held_out", 4)):
        source = ShardSource(str(ddp.folder / name))
        encoding = Encoding(0, "yuv444p", "ultrafast")
        CorruptedPairs(str(tmp_path / name), source, TurnedColours(), count, encoding=encoding).prepare()
    losses = []
    for name, strategy in (("ddp", SAME_LAYERS), ("zero2", zero(2))):
        overlay = dpo_overlay(tmp_path, start, tmp_path / name / "runs", steps=3, dropout=DROPOUT)
        overlay["trainer"] |= {"callbacks": [], "limit_val_batches": 0, "devices": 2, "strategy": strategy}
        overlay["data"]["init_args"]["val_sources"] = [shards(str(tmp_path / "held_out"))]
        run = DPOFit(tmp_path / name, overlay, ranks=2)
        assert run.finish() == [0, 0], run.errors()
        losses.append(run.losses())
    expected, found = losses
    assert len(expected) == 3
    assert expected[-1] != pytest.approx(expected[0], rel=0.01)
    assert found == pytest.approx(expected, rel=1e-4)


@needs_deepspeed
@pytest.mark.parametrize(
    ("strategy", "trainable"),
    [(zero(2), "full"), (SCATTERED, "id_blocks+lora")],  # no gradient reaches what enters the first block
    ids=["zero2", "zero3"],
)
def test_one_gradient_that_is_not_finite_ends_the_run_in_its_step_with_its_samples(
    strategy: dict[str, Any], trainable: str, ddp: Fit, tmp_path: Path
) -> None:
    run = fit_of(tmp_path, ddp.folder, strategy, ema=False)
    run.overlay["trainer"]["callbacks"].append({"class_path": "_zero_worker.OneNaN"})
    run.overlay["model"]["init_args"]["trainable"] = trainable
    assert run.finish() == [2, 2]
    error = next(line for line in run.errors().splitlines() if line.startswith("idc: error"))
    assert "step 2: the gradient's norm is" in error
    assert "no weight was changed" in error
    second = [id for rank in (0, 1) for line in run.lines(rank) if line["step"] >= 1 for id in line["ids"]]
    assert any(id in error for id in second)


@needs_deepspeed
def test_what_deepspeed_cannot_do_is_refused(tmp_path: Path) -> None:
    class Manual(LightningModule):
        automatic_optimization = False

    with pytest.raises(UserError, match=r"Manual makes several passes.*fsdp_grpo.yaml"):
        DeepSpeedZeRO().connect(Manual())
    with pytest.raises(UserError, match=r"stage=3: is for SFT; LightningModule"):
        DeepSpeedZeRO(stage=3).connect(LightningModule())
    on_gpu = DeepSpeedZeRO()
    on_gpu.accelerator = CUDAAccelerator()
    with pytest.raises(UserError, match=r"DeepSpeed runs on cpu here.*DS_ACCELERATOR=cpu"):
        on_gpu._configure_launcher()
    with pytest.raises(UserError, match=r"precision='bf16-mixed'.*compute_dtype=bfloat16"):
        Trainer(accelerator="cpu", strategy=DeepSpeedZeRO(), precision="bf16-mixed", logger=False)


def test_parameters_are_offloaded_where_they_are_sharded() -> None:
    with pytest.raises(UserError, match=r"offload_parameters: stage=2 shards no weights; set stage 3"):
        DeepSpeedZeRO(offload_parameters=True)


@pytest.mark.skipif(INSTALLED, reason="DeepSpeed is installed")
@pytest.mark.parametrize("recipe", ["deepspeed", "deepspeed_zero3"])
def test_a_recipe_without_deepspeed_says_what_to_install(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "recipes/sft.yaml", "--config", f"recipes/hardware/{recipe}.yaml"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("idc: error")]
    assert "DeepSpeed is not installed: pip install 'idc[deepspeed]'" in line


@pytest.mark.parametrize("found", ["0.17.0", "0.19.7", "0.19.8.dev1"])
def test_a_deepspeed_that_steps_on_nan_is_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idc.stages.zero.version", lambda name: found)
    with pytest.raises(UserError, match=rf"DeepSpeed {found} takes steps.*0.19.8 or later: pip.*\[deepspeed\]"):
        DeepSpeedZeRO()


def test_the_extra_installs_one_that_is_not_refused() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["deepspeed"] == [f"deepspeed>={OLDEST}"]


class Asked(DeepSpeedZeRO):
    """What resuming asks the strategy, where DeepSpeed itself is not installed."""

    world_size, zero_stage_3 = 1, False

    def __init__(self, ranks: int, stage: int) -> None:
        self.world_size, self.zero_stage_3 = ranks, stage == 3


@pytest.mark.parametrize("stage", [2, 3])
def test_other_ranks_or_another_stage_cannot_resume(stage: int, tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step-00000003"
    names = (
        [WHOLE_WEIGHTS] if stage == 2 else [f"checkpoint/zero_pp_rank_{i}_mp_rank_00_model_states.pt" for i in (0, 1)]
    )
    for name in names:
        (step / STATE / name).parent.mkdir(parents=True, exist_ok=True)
        (step / STATE / name).write_bytes(b"weights")
    files = hash_files(step, list_files(step))
    Manifest("deepspeed", 1, 3, 0, 2, "DeepSpeedZeRO", {}, files).write(step)

    def resume(ranks: int, stage: int) -> str | None:
        return resolve_ckpt_path(tmp_path, tmp_path, Asked(ranks, stage))

    assert resume(2, stage) == str(step / STATE)
    with pytest.raises(UserError, match=r"of 2 ranks is loaded by as many; this run has 4"):
        resume(4, stage)
    with pytest.raises(UserError, match=rf"set trainer.strategy.init_args.stage={stage}"):
        resume(2, 5 - stage)
    if stage == 3:
        with pytest.raises(UserError, match=r"ZeRO-3; make them whole.*zero_to_fp32.py --max_shard_size 1TB"):
            find_checkpoint(tmp_path)


def test_averages_of_scattered_weights_are_refused() -> None:
    trainer = cast(Trainer, SimpleNamespace(strategy=SimpleNamespace(zero_stage_3=True)))
    with pytest.raises(UserError, match=r"EMA keeps no averages of what ZeRO-3 has cut in pieces"):
        EMA().setup(trainer, LightningModule(), "fit")
