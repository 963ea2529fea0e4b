"""Which networks rewarded a model goes with it: from its run to its videos, and to who judges them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _grpo_worker import ByPlace, runner, save_start, stage
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from idc.data.output import MANIFEST, rewards_of
from idc.models.checkpoints import REWARDS, Checkpoint
from idc.models.system import open_system


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
    module.on_fit_start()
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
