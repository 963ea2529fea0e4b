"""The DPO stage: its objective through the model, its curve, killed and on two ranks, and the pairs that it mines."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _dpo_worker import RECIPE, DPOFit, overlay
from _grpo_worker import QUIET, save_start
from _grpo_worker import stage as online_stage
from _rewards import Fixed
from _sft_worker import ROOT, WORLD, fit_here, one_thread, scalars
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from idc.callbacks.hacking import HackingMonitor
from idc.data.corruptions import TurnedColours
from idc.data.item_sources import Shards
from idc.data.module import VideoDataModule
from idc.data.pairs import PAIR, RECORD, Pair
from idc.data.shards import read_sample
from idc.data.sources import ShardSource, ToyShards
from idc.errors import UserError
from idc.flow.path import interpolate, velocity_target
from idc.flow.times import LogitNormal, noise_like
from idc.metrics.base import Clip, Score
from idc.models.sampling import SamplingChanges
from idc.models.spec import Lora
from idc.rewards.base import Reward
from idc.rewards.composite import Composite, Term
from idc.rewards.measures import Brightness
from idc.rewards.runner import RewardRunner
from idc.rewards.watch import Motion
from idc.stages.base import Stage
from idc.stages.dpo import DPO
from idc.stages.generate import Encoding, Generate
from idc.stages.pairs import CorruptedPairs, MinedPairs
from idc.types import Batch

LOSSLESS = Encoding(0, "yuv444p", "ultrafast")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_start(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="module")
def pairs(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of real clips against clips of other colours: 12 to train on and 6 held out, each of which has two."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, clips, count in (("train", "train", 12), ("held_out", "held_out", 6), ("again", "held_out", 6)):
        source, seed = ShardSource(str(toy_data / clips)), int(name == "again")
        CorruptedPairs(str(folder / name), source, TurnedColours(), count, seed=seed, encoding=LOSSLESS).prepare()
    return folder


def stage_of(start: Path, **settings: Any) -> DPO:
    stage = DPO(checkpoint=str(start), **settings)
    stage.configure_model()
    return stage


def batch_of(pairs: Path) -> Batch:
    """Pairs of one size, as the loader gives them."""
    data = VideoDataModule([ShardSource(str(pairs / "train"))], [[5, 32, 32]], 4, random_window=False)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def swapped(batch: Batch) -> Batch:
    turned = (replace(s, video_CTHW=s.loser_CTHW, loser_CTHW=s.video_CTHW) for s in batch.samples)
    return replace(batch, samples=tuple(turned))


def loss_and_gradient(stage: DPO, batch: Batch) -> tuple[float, Tensor]:
    """Through `training_step` as Lightning calls it."""
    stage._trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    stage.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    stage.zero_grad()
    loss = stage.training_step(batch, 0)
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in stage.parameters() if p.grad is not None])


# The objective ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"trainable": "lora", "lora": Lora(rank=2, alpha=4)}, {"beta": 3.0}])
def test_at_the_reference_the_loss_is_ln_2_swapping_flips_the_gradient_and_equal_clips_have_none(
    settings: dict[str, Any], start: Path, pairs: Path
) -> None:
    stage, batch = stage_of(start, **settings), batch_of(pairs)
    loss, gradient = loss_and_gradient(stage, batch)
    assert loss == pytest.approx(math.log(2), abs=1e-4)
    assert gradient.norm() > 1e-3
    back, turned = loss_and_gradient(stage, swapped(batch))
    assert back == pytest.approx(math.log(2), abs=1e-4)
    torch.testing.assert_close(turned, -gradient, rtol=1e-3, atol=float(gradient.abs().max()) * 1e-3)
    same = replace(batch, samples=tuple(replace(s, loser_CTHW=s.video_CTHW) for s in batch.samples))
    alike, none = loss_and_gradient(stage, same)
    assert alike == pytest.approx(math.log(2), abs=1e-6)
    assert none.norm() < 1e-4 * gradient.norm()


def test_the_losses_are_those_of_the_formula_on_two_models(start: Path, pairs: Path) -> None:
    """The policy and a second model that is the start, clip by clip, from the seeds' own noise and times."""
    stage, frozen, batch = stage_of(start, beta=20.0), stage_of(start), batch_of(pairs)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    t_B = LogitNormal()(batch.seeds_B)
    found = stage.losses(stage.encoders.features(batch.samples), batch.seeds_B, t_B)
    for i, sample in enumerate(batch.samples):
        deltas = []
        for clip in (sample.video_CTHW, sample.loser_CTHW):
            features = stage.encoders.features([replace(sample, video_CTHW=clip, loser_CTHW=None)])
            x0 = features[0]["latents"][None]
            noise = noise_like(batch.seeds_B[i : i + 1], tuple(x0.shape[1:]))
            condition = stage.encoders.condition(features).to("cpu", torch.float32)
            z, target = interpolate(x0, noise, t_B[i : i + 1]), velocity_target(x0, noise)
            with torch.no_grad():
                errors = [
                    (model.predict_velocity(z, t_B[i : i + 1], condition) - target).square().mean()
                    for model in (stage, frozen)
                ]
            deltas.append(float(errors[0] - errors[1]))
        margin = -10.0 * (deltas[0] - deltas[1])
        assert float(found.margin_B[i]) == pytest.approx(margin, rel=1e-3, abs=1e-5)
        assert float(found.dpo_B[i]) == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-4)
        assert float(found.accuracy_B[i]) == (margin > 0)
        assert float(found.delta_winner_B[i]) == pytest.approx(deltas[0], rel=1e-3, abs=1e-6)
        assert float(found.delta_loser_B[i]) == pytest.approx(deltas[1], rel=1e-3, abs=1e-6)


def test_the_reference_is_put_back_and_stays_the_start(start: Path, pairs: Path) -> None:
    stage, batch = stage_of(start), batch_of(pairs)
    before = [p.detach().clone() for p in stage.parameters()]
    with torch.no_grad():
        next(stage.parameters()).add_(1.0)
    moved = [p.detach().clone() for p in stage.parameters()]
    loss_and_gradient(stage, batch)
    assert all(map(torch.equal, [p.detach() for p in stage.parameters()], moved))
    assert stage.reference is not None
    with stage.reference.applied():
        assert all(map(torch.equal, [p.detach() for p in stage.parameters()], before))


def test_the_winners_own_error_comes_beside_it(start: Path, pairs: Path) -> None:
    batch = batch_of(pairs)
    plain, _ = loss_and_gradient(stage_of(start), batch)
    both = stage_of(start, sft_weight=0.5)
    found, _ = loss_and_gradient(both, batch)
    with torch.no_grad():
        t_B = both.times(batch.seeds_B)
        error = both.losses(both.encoders.features(batch.samples), batch.seeds_B, t_B).error_winner_B.mean()
    assert found - plain == pytest.approx(0.5 * float(error), rel=1e-4)


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(start: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> DPOFit:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = DPOFit(folder, overlay(pairs, start, folder / "runs"))
    assert run.finish() == [0], run.errors()
    return run


def test_a_run_prefers_the_winners_more_and_logs_what_a_person_looks_at(uninterrupted: DPOFit) -> None:
    logged = scalars(uninterrupted.run)
    train = {name.removeprefix("train/"): [v for _, v in values] for name, values in logged.items()}
    assert train["loss"][0] == pytest.approx(math.log(2), abs=1e-3)
    assert train["loss"] == pytest.approx(uninterrupted.losses(), rel=1e-6)
    assert train["loss"][-1] < 0.9 * train["loss"][0]
    assert train["margin"][-1] > 0 == pytest.approx(train["margin"][0], abs=1e-3)
    for margin, winner, loser in zip(train["margin"], train["delta_winner"], train["delta_loser"], strict=True):
        assert margin == pytest.approx(50 * (loser - winner), rel=1e-3, abs=1e-3)
    for name in ("loss", "accuracy", "margin", "delta_winner", "delta_loser"):
        assert len(logged[f"val/{name}"]) == 2
    assert logged["val/accuracy"][-1][1] > 0.5  # what it is at the reference
    assert logged["val/loss"][-1][1] < math.log(2)
    assert "train/grad_norm" in logged
    for name in ("reward", "reward/face", "reward/motion", "reward/sharpness", "reward/saturation", "without_reward"):
        curve = logged[f"val/{name}"]
        assert [step for step, _ in curve] == [0, *(step for step, _ in logged["val/accuracy"])], name
        assert curve[-1][1] == pytest.approx(uninterrupted.validation()[4][f"val/{name}"], rel=1e-6)  # ranks compare it
    assert {value for _, value in logged["watch/alarm"]} == {0.0}
    assert len(list(uninterrupted.run.glob("samples/step-000004/*.mp4"))) == 1


def test_a_killed_run_goes_on_bit_for_bit(uninterrupted: DPOFit, start: Path, pairs: Path, tmp_path: Path) -> None:
    run = DPOFit(tmp_path, overlay(pairs, start, tmp_path / "runs"), args=("--ckpt_path", "auto"))
    killed = replace(run, kill_place="step", kill_step=3, kill_after=0.02)
    assert killed.finish() == [-14], killed.errors()
    assert run.finish() == [0], run.errors()
    assert run.steps() == uninterrupted.steps()
    assert run.validation() == uninterrupted.validation()


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_two_ranks_are_one(strategy: str, uninterrupted: DPOFit, start: Path, pairs: Path, tmp_path: Path) -> None:
    run = DPOFit(tmp_path, overlay(pairs, start, tmp_path / "runs"), ranks=2)
    if strategy == "fsdp2":
        run = replace(run, overlays=(ROOT / "recipes" / "hardware" / "cpu2.yaml",))
    else:
        run = replace(run, args=("--trainer.devices", "2", "--trainer.strategy", "ddp"))
    assert run.finish() == [0, 0], run.errors()
    assert run.losses() == pytest.approx(uninterrupted.losses(), rel=1e-4)
    for step, values in uninterrupted.validation().items():
        assert run.validation()[step] == pytest.approx(values, rel=1e-3, abs=1e-5)


def test_rank_0_mines_the_pairs_of_all_ranks_while_they_wait(start: Path, pairs: Path, tmp_path: Path) -> None:
    content = overlay(pairs, start, tmp_path / "runs", steps=1)
    toy = {"path": str(tmp_path / "items"), "count": 4, "seed": 7, **WORLD}
    items = {"shards": {"class_path": "idc.data.sources.ToyShards", "init_args": toy}}
    mining = {
        "path": str(tmp_path / "pairs"),
        "items": {"class_path": "idc.data.item_sources.Shards", "init_args": items},
        "reward": {"class_path": "idc.rewards.measures.Brightness"},
        "checkpoint": str(start),
        "frames": 5,
        "height": 32,
        "width": 32,
        "candidates": 2,
        "margin": 0.0,
        "sampling": {"steps": 1},
    }
    sources = [{"class_path": "idc.stages.pairs.MinedPairs", "init_args": mining}]
    content["data"]["init_args"] |= {"sources": sources, "features": str(tmp_path / "features")}
    run = DPOFit(tmp_path, content, ranks=2, args=("--trainer.devices", "2", "--trainer.strategy", "ddp"))
    assert run.finish() == [0, 0], run.errors()
    assert len(run.losses()) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"beta": 0.0}, "beta=0.0: must be positive; 100 is usual"),
        ({"sft_weight": -1.0}, "sft_weight=-1.0"),
        ({"validation_times": [0.0]}, r"validation_times=\[0.0\]"),
        ({"validation_times": []}, r"validation_times=\[\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        DPO(checkpoint="toy", **settings)


def test_what_chose_the_pairs_of_shards_is_a_reward_of_the_run(start: Path, tmp_path: Path) -> None:
    stage = stage_of(start)
    for name, models in (("a", ["sface", "clip"]), ("b", ["clip"]), ("c", None)):
        (tmp_path / name).mkdir()
        if models:
            (tmp_path / name / RECORD).write_text(json.dumps({"by": "composite", "models": models}))
    data = VideoDataModule([ShardSource(str(tmp_path / name)) for name in "cba"], [[5, 32, 32]], 1)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule, stage.trainer = data, trainer
    assert stage.own_rewards == ("clip", "sface")


def test_ordinary_shards_are_refused_before_anything_is_encoded(
    start: Path, pairs: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = overlay(pairs, start, tmp_path / "runs")
    content["data"]["init_args"]["val_sources"][0]["init_args"]["path"] = str(toy_data / "held_out")
    content["data"]["init_args"]["features"] = str(tmp_path / "features")
    run = DPOFit(tmp_path, content)
    assert fit_here(run) == 2
    assert "data.init_args.val_sources: 8 samples without a second clip, such as held_out/" in capsys.readouterr().err
    assert not (tmp_path / "features").exists()


# Rewards of the held-out pairs' conditions ----------------------------------------------------------------------------


def held_out_data(pairs: Path, *names: str) -> VideoDataModule:
    sources = [ShardSource(str(pairs / name)) for name in names]
    return VideoDataModule([ShardSource(str(pairs / "train"))], [[5, 32, 32]], 4, val_sources=sources, val_batch_size=4)


def judged_stage(start: Path, reward: Reward | None, **settings: Any) -> DPO:
    runner = RewardRunner(Composite([Term(reward)]), where="process", **settings) if reward is not None else None
    return DPO(checkpoint=str(start), sampling=SamplingChanges(steps=2), reward=runner)


def validated(stage: Stage, data: VideoDataModule) -> dict[str, float]:
    with one_thread():
        trainer = Trainer(**{**QUIET, "limit_val_batches": 1.0, "devices": 1})
        (found,) = trainer.validate(stage, datamodule=data, verbose=False)
    return dict(found)


class Counted(Brightness):
    """Counts what it judges."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []

    def score(self, clip: Clip) -> Score:
        self.ids.append(clip.id)
        return super().score(clip)


def test_held_out_rewards_are_those_of_grpo_and_a_condition_of_several_pairs_counts_once(
    start: Path, pairs: Path
) -> None:
    """The same checkpoint, conditions and seeds through both stages, to the bit; and a second pair of each condition
    changes nothing of it."""
    rewards = [Counted() for _ in range(3)]
    mine = validated(judged_stage(start, rewards[0]), held_out_data(pairs, "held_out"))
    online = online_stage(
        start,
        reward=RewardRunner(Composite([Term(rewards[1])]), where="process"),
        sampling=SamplingChanges(steps=2),
    )
    theirs = validated(online, held_out_data(pairs, "held_out"))
    assert set(theirs) == {"val/reward", "val/reward/brightness", "val/without_reward"}
    assert {name: mine[name] for name in theirs} == theirs
    assert 0 < mine["val/reward"] < 1
    assert len(set(rewards[0].ids)) == len(rewards[0].ids) == 6
    both = validated(judged_stage(start, rewards[2]), held_out_data(pairs, "held_out", "again"))
    assert rewards[2].ids == rewards[0].ids
    assert {name: both[name] for name in theirs} == pytest.approx(theirs, rel=1e-6)


def test_without_a_reward_nothing_is_sampled_and_with_one_the_losses_are_the_same(
    start: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = held_out_data(pairs, "held_out")
    judged = validated(judged_stage(start, Brightness()), data)
    monkeypatch.setattr(Stage, "sample_videos", None)
    plain = validated(judged_stage(start, None), data)
    assert set(judged) - set(plain) == {"val/reward", "val/reward/brightness", "val/without_reward"}
    assert plain == {name: judged[name] for name in plain}


def test_videos_without_a_reward_are_counted_and_too_many_end_the_run(start: Path, pairs: Path) -> None:
    data = held_out_data(pairs, "held_out")
    seen = Counted()
    validated(judged_stage(start, seen), data)
    partly = Fixed({"*": 0.25, seen.ids[0]: "cannot be judged"})
    found = validated(judged_stage(start, partly), data)
    assert (found["val/reward"], found["val/without_reward"]) == (0.25, pytest.approx(1 / 6))
    with pytest.raises(UserError, match=r"1 of 6 samples has no reward.*max_failure_rate=0.1.*cannot be judged"):
        validated(judged_stage(start, partly, max_failure_rate=0.1), data)


def test_the_monitor_watches_dpo_with_a_reward_and_refuses_it_without(start: Path) -> None:
    monitor = HackingMonitor(falls={"motion": 0.1})
    watched = Composite([Term(Brightness()), Term(Motion(), 0, monitor=True)])
    stage = DPO(checkpoint=str(start), reward=RewardRunner(watched, where="process"))
    monitor.setup(Trainer(accelerator="cpu", logger=False), stage, "fit")
    assert monitor.watched == ("motion",)
    with pytest.raises(UserError, match=r"DPO has no rewards to watch; give DPO model\.init_args\.reward"):
        monitor.setup(Trainer(accelerator="cpu", logger=False), judged_stage(start, None), "fit")


class CutsFirst(Callback):
    """Ends the first validation after one batch, as a signal does, and keeps what each has logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        trainer.callback_metrics.clear()

    def on_validation_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int, *_: Any) -> None:
        if not self.logged and index == 1:
            raise StopIteration

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        values = trainer.callback_metrics.items()
        self.logged.append({name: float(value) for name, value in values if name.startswith("val/")})


def test_a_validation_that_is_cut_short_logs_nothing_and_the_next_one_judges_all(start: Path, pairs: Path) -> None:
    reward, cuts, data = Counted(), CutsFirst(), held_out_data(pairs, "held_out", "again")
    stage = judged_stage(start, reward)
    stage.optimizer_factory = functools.partial(torch.optim.SGD, lr=0.0)  # type: ignore[assignment]
    settings = {**QUIET, "limit_val_batches": 1.0, "devices": 1, "max_steps": 2, "val_check_interval": 1}
    with one_thread():
        Trainer(callbacks=[cuts], **settings).fit(stage, datamodule=data)
    assert cuts.logged[0] == {}
    assert len(reward.ids) == 1 + 6  # the first batch is two pairs of one condition
    assert reward.ids[0] == reward.ids[1]
    whole = validated(judged_stage(start, Brightness()), data)
    assert cuts.logged[1]["val/reward"] == pytest.approx(whole["val/reward"], rel=1e-6)


# Pairs that the recipe mines ----------------------------------------------------------------------------------------


def mined(start: Path, **settings: Any) -> MinedPairs:
    """Of three conditions, in the working folder."""
    items = Shards(ToyShards("items", 3, 7, **WORLD))
    settings = {"candidates": 3, "margin": 0.0, "sampling": SamplingChanges(steps=1), **settings}
    return MinedPairs("pairs", items, Brightness(), str(start), frames=5, height=32, width=32, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted((folder / "pairs").glob("*"))
    return {path.name: path.read_bytes() for path in files if path.is_file() and path.name != "index.jsonl"}


def test_mined_pairs_are_best_and_worst_of_the_seeds_and_an_interrupted_call_goes_on(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    source = mined(start)
    source.prepare()
    for entry in source.index().entries:
        sample = read_sample("pairs", entry)
        pair = Pair.from_json(sample.meta[PAIR])
        assert float(sample.video_CTHW.mean()) > float(sample.loser_CTHW.mean())
        assert pair.winner.clip.startswith("pairs/candidates/seed-")
        assert pair.margin > 0
    assert len(source.index()) == 3

    monkeypatch.chdir(tmp_path / "broken")
    predict, calls = Generate.predict_step, []

    def dies(self: Generate, request: Any, index: int) -> None:
        calls.append(request.item.id)
        if len(calls) == 5:
            raise KeyboardInterrupt
        predict(self, request, index)

    monkeypatch.setattr(Generate, "predict_step", dies)
    with pytest.raises(KeyboardInterrupt):
        mined(start).prepare()
    mined(start).prepare()
    assert len(calls) == 4 + 1 + 5  # four were there
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    mined(start).prepare()
    assert len(calls) == 10
    with pytest.raises(UserError, match="made with another margin, seed; give another path"):
        mined(start, margin=0.1, seed=1).prepare()


def test_the_recipe_mines_from_the_model_that_it_trains_and_rewards_held_out_conditions_alike() -> None:
    import yaml

    recipe = yaml.safe_load(RECIPE.read_text())
    train, held_out = (recipe["data"]["init_args"][name][0]["init_args"] for name in ("sources", "val_sources"))
    differing = {name for name in train if train[name] != held_out[name]}
    assert differing == {"path", "items"}
    reward = recipe["model"]["init_args"]["reward"]["init_args"]["composite"]
    watched = [entry["class_path"].rpartition(".")[2] for entry in reward["init_args"].pop("watched")]
    assert (reward, watched) == (train["reward"], ["Motion", "Sharpness", "Saturation"])
    assert train["checkpoint"] == "${model.init_args.checkpoint}"
    seeds = [part["items"]["init_args"]["shards"]["init_args"] for part in (train, held_out)]
    ranges = [set(range(each["seed"], each["seed"] + each["count"])) for each in seeds]
    assert not ranges[0] & ranges[1]
