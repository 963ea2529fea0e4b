"""Which networks rewarded a model goes with it: from its run to its videos, and to who judges them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _grpo_worker import ByPlace, data, fit, runner, save_start, stage
from _rewards import Fixed, client, composite, served
from _server import launch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from idc.data.output import MANIFEST, rewards_of
from idc.models.checkpoints import REWARDS, Checkpoint
from idc.models.system import open_system
from idc.rewards.composite import Breakdown
from idc.rewards.runner import RewardRunner
from idc.stages import grpo
from idc.stages.rewarded import DROPS, Drops


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return save_start(tmp_path_factory.mktemp("start") / "model")


def told(folder: Path) -> list[str] | None:
    path = folder / REWARDS
    return json.loads(path.read_text())["rewards"] if path.is_file() else None


def begin(module, folder: Path) -> Path:
    """The first hook of a run with a logger; its folder."""
    trainer = Trainer(accelerator="cpu", logger=TensorBoardLogger(str(folder), "run"), enable_checkpointing=False)
    trainer.strategy.connect(module)
    module.trainer = trainer
    Path(trainer.log_dir).mkdir(parents=True)
    module.on_train_start()
    return Path(trainer.log_dir)


def test_a_run_says_what_it_was_rewarded_by_and_so_does_what_goes_on_from_it(start, tmp_path):
    run = begin(stage(start, reward=runner(ByPlace())), tmp_path / "first")
    assert told(run) == ["a network"]
    state = run / "checkpoints" / "step-00000001" / "state.ckpt"
    assert Checkpoint(state, "", None).rewards == ("a network",)
    # An exported pipeline of it, and a second run from there with the same network: named once.
    record = start / "training.json"
    record.write_text(json.dumps({"rewards": ["another", "a network"]}))
    try:
        assert open_system(start).rewards == ("another", "a network")
        second = begin(stage(start, reward=runner(ByPlace())), tmp_path / "second")
    finally:
        record.unlink()
    assert told(second) == ["another", "a network"]
    assert open_system(start).rewards == ()


@pytest.mark.parametrize("where", ["threads", "pool"])
def test_a_reward_on_another_machine_is_named_by_the_networks_that_it_has_there(
    where, start, toy_data, tmp_path, monkeypatch
):
    launch(print, [])  # the pool's processes come from the tests' own server
    said: list[str] = []
    monkeypatch.setattr(grpo, "rank_zero_info", said.append)
    logger = TensorBoardLogger(str(tmp_path), "run", "1")
    with served(Fixed({"*": 1}, "face", ("sface",))) as server:
        reward = RewardRunner(composite(client(server, name="face")), where, 1)
        fit(stage(start, reward=reward), data(toy_data), 1, logger=logger)
    assert told(tmp_path / "run" / "1") == ["sface"]
    assert "the reward stands on sface: a report flags the metrics that do, too" in said


def test_why_samples_have_no_reward_is_warned_of_once_and_kept_for_each(start, toy_data, tmp_path):
    reward = runner(ByPlace(failing=(1, 6), raising=(2,)), retries=1)
    logger = TensorBoardLogger(str(tmp_path), "run", "1")
    with pytest.warns(UserWarning, match="without a reward so far") as warnings:
        kept = fit(stage(start, reward=reward), data(toy_data), 2, logger=logger)
    said = [str(w.message) for w in warnings if "without a reward" in str(w.message)]
    path = tmp_path / "run" / "1" / DROPS
    assert said == [
        f"2 samples without a reward so far: by_place: cannot be judged (each is in {path})",
        f"1 sample without a reward so far: by_place: RuntimeError: lost (in 2 calls) (each is in {path})",
    ]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["place"]) for line in lines] == [(s, p) for s in (0, 1) for p in (1, 2, 6)]
    assert lines[1]["reason"] == "by_place: RuntimeError: lost (in 2 calls)"
    assert all(line["sample"].startswith("train/") for line in lines)
    assert lines[0]["sample"] == lines[1]["sample"] != lines[2]["sample"]  # two groups of four
    assert [metrics["train/reward_retried"] for metrics in kept.metrics] == [1, 1]


def test_a_thousand_different_reasons_are_not_a_thousand_warnings(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    drops = Drops()
    lost = {place: Breakdown.failed(f"clip {place} is odd") for place in range(90)}
    with pytest.warns(UserWarning, match="is odd") as warnings:
        drops.tell(trainer, lost, dict.fromkeys(lost, "a"))
    assert len([w for w in warnings if "without a reward" in str(w.message)]) == 20
    assert drops.reasons.total() == 90


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{"settings": {"model": {"rewards": ["a", "b"]}}}', ("a", "b")),
        ('{"settings": {"model": {}}}', ()),
        ('{"settings": {"model": "another system"}}', ()),
        ('{"settings": {"model": {"rewards": "a"}}}', ()),
        ("[]", ()),
        ("cut sh", ()),
        (None, ()),
    ],
)
def test_videos_say_what_their_model_was_rewarded_by(text, names, tmp_path):
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    assert rewards_of(tmp_path) == names
