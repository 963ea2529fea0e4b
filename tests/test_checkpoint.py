from __future__ import annotations

import fcntl
import hashlib
import json
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from _server import context, free_port, join, launch
from _survival_worker import (
    PLACES,
    SAVE_EVERY,
    STEPS,
    Run,
    Stage,
    Stream,
    choose,
    end,
    finish,
    make_trainer,
    mean_losses,
    mean_validation,
    records,
)
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from idc.callbacks.checkpoint import Checkpoint
from idc.callbacks.plain import plain
from idc.callbacks.resume import find_resume, prepare_resume, resolve_ckpt_path
from idc.errors import UserError
from idc.models import manifest as manifest_module
from idc.models.manifest import MANIFEST, STATE, Manifest, hash_files, list_files

ON_ONE_DEVICE = SingleDeviceStrategy("cpu")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(str(folder / "run"), str(folder / "log"))
    assert finish(run) == [0]
    assert sorted(records(run)) == list(range(1, STEPS + 1))
    return run


@pytest.fixture
def run_folder(undisturbed: Run, tmp_path: Path) -> Path:
    """A copy of the undisturbed run's folder: checkpoints of steps 16 and 20."""
    return Path(shutil.copytree(undisturbed.folder, tmp_path / "run", symlinks=True))


def same_state(first: dict[str, Any], second: dict[str, Any], tolerance: float) -> None:
    for part in ("weights", "ema"):
        assert first[part].keys() == second[part].keys()
        for name, value in first[part].items():
            torch.testing.assert_close(torch.tensor(value), torch.tensor(second[part][name]), rtol=0, atol=tolerance)


def killed_at(run: Run, place: str, step: int) -> list[int | None]:
    return finish(Run(run.folder, run.log, ranks=run.ranks, sharded=run.sharded, kill_place=place, kill_step=step))


# kill -9


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_places_and_resumed_is_the_undisturbed_run_bit_for_bit(
    seed: int, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"))
    draw = random.Random(seed)
    places = draw.sample(PLACES, len(PLACES))
    saves = sorted(draw.choices(range(SAVE_EVERY, STEPS, SAVE_EVERY), k=len(places)))
    for place, step in zip(places, saves, strict=True):
        assert killed_at(run, place, step) == [-9], (place, step)
    assert finish(run) == [0]
    # `records` itself checks that steps which were taken twice had the same samples and losses.
    assert records(run) == records(undisturbed)
    same_state(end(run), end(undisturbed), tolerance=0)
    left = sorted(path.name for path in Path(run.folder, "checkpoints").iterdir())
    assert left == [".lock", "last", "step-00000016", "step-00000020"]


@pytest.mark.parametrize("place", ["state", "manifest"])
def test_kill_in_a_save_of_two_ranks_leaves_the_older_checkpoint_whole(place: str, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"), ranks=2, sharded=True)
    codes = killed_at(run, place, 2 * SAVE_EVERY)
    assert -9 in codes
    assert None not in codes, "the other rank hung"
    found = find_resume(Path(run.folder, "checkpoints"))
    assert found is not None
    assert Manifest.read(found).step == SAVE_EVERY


# Ranks


def test_two_sharded_ranks_give_the_curve_of_one_and_checkpoints_move_both_ways(
    undisturbed: Run, tmp_path: Path
) -> None:
    expected, half = mean_losses(undisturbed), STEPS // 2

    def check(run: Run, steps: range) -> None:
        losses = mean_losses(run)
        assert sorted(losses) == list(steps)
        assert all(abs(losses[step] - expected[step]) < 1e-5 for step in steps)

    two = Run(str(tmp_path / "a"), str(tmp_path / "two"), ranks=2, sharded=True, steps=half)
    one = Run(two.folder, str(tmp_path / "one"))
    assert finish(two) == [0, 0]
    assert finish(one) == [0]
    check(two, range(1, half + 1))
    check(one, range(half + 1, STEPS + 1))

    single = Run(str(tmp_path / "b"), str(tmp_path / "single"), steps=half - 1)
    sharded = Run(single.folder, str(tmp_path / "sharded"), ranks=2, sharded=True)
    assert finish(single) == [0]
    assert finish(sharded) == [0, 0]
    check(sharded, range(half, STEPS + 1))

    for run in (one, sharded):
        same_state(end(run), end(undisturbed), tolerance=1e-5)
        # Validations at 12 and 18, on the averaged weights, the head of the root's shard group included.
        assert mean_validation(run)[-6:] == pytest.approx(mean_validation(undisturbed)[-6:], abs=1e-5)


def test_ddp_continues_a_sharded_run(undisturbed: Run, tmp_path: Path) -> None:
    sharded = Run(str(tmp_path / "a"), str(tmp_path / "two"), ranks=2, sharded=True, steps=4)
    ddp = Run(sharded.folder, str(tmp_path / "ddp"), ranks=2, steps=8)
    assert finish(sharded) == [0, 0]
    assert finish(ddp) == [0, 0]
    expected, losses = mean_losses(undisturbed), mean_losses(ddp)
    assert sorted(losses) == [5, 6, 7, 8]
    assert all(abs(losses[step] - expected[step]) < 1e-5 for step in losses)


# Failing saves


@pytest.mark.parametrize("ranks", [1, 2])
def test_full_disk_is_one_clear_error_and_the_older_checkpoint_stays(ranks: int, tmp_path: Path) -> None:
    run = Run(
        str(tmp_path / "run"), str(tmp_path / "log"), ranks=ranks, sharded=ranks > 1, kill_place="full", kill_step=8
    )
    assert finish(run) == [1] * ranks
    assert sorted(path.name for path in Path(run.folder, "checkpoints").glob("step-*")) == ["step-00000004"]
    for rank in range(ranks):
        error = Path(f"{run.log}-{rank}.error").read_text()
        assert "CheckpointError: Saving step 8" in error
        assert "rank 0: OSError: [Errno 28] No space left on device" in error
        assert f"The newest checkpoint is still {run.folder}/checkpoints/step-00000004" in error


# Finding what to resume from


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "does not match its hash": lambda step: flip_last_byte(step / STATE),
    "bytes, the manifest says": lambda step: (step / STATE).write_bytes((step / STATE).read_bytes()[:-1]),
    "is missing": lambda step: (step / STATE).unlink(),
    "no manifest.json": lambda step: (step / MANIFEST).unlink(),
    "not readable": lambda step: (step / MANIFEST).write_text('{"files": ['),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_damaged_checkpoint_is_reported_and_the_one_before_is_found(reason: str, run_folder: Path) -> None:
    checkpoints = run_folder / "checkpoints"
    newest = checkpoints / "step-00000020"
    assert find_resume(checkpoints) == newest
    DAMAGE[reason](newest)
    with pytest.warns(UserWarning, match=reason):
        assert find_resume(checkpoints) == checkpoints / "step-00000016"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=rf"(?s){reason}.*newest valid one is .*step-00000016"):
            resolve_ckpt_path(newest, run_folder, ON_ONE_DEVICE)


def test_every_way_to_name_a_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    checkpoints = run_folder / "checkpoints"
    newest, older = (str(checkpoints / f"step-000000{step}" / STATE) for step in (20, 16))
    for value in ("last", run_folder, checkpoints, checkpoints / "last", Path(newest).parent, newest):
        assert resolve_ckpt_path(value, run_folder, ON_ONE_DEVICE) == newest
    assert resolve_ckpt_path(Path(older).parent, run_folder, ON_ONE_DEVICE) == older
    assert resolve_ckpt_path(newest, run_folder, ModelParallelStrategy(2, 1)) == newest
    assert resolve_ckpt_path(None, run_folder, ON_ONE_DEVICE) is None
    assert resolve_ckpt_path("last", tmp_path / "new", ON_ONE_DEVICE) is None
    other = tmp_path / "exported.ckpt"
    other.write_bytes(b"")
    assert resolve_ckpt_path(other, run_folder, ON_ONE_DEVICE) == str(other)


def test_wrong_names_and_strategies_are_user_errors(run_folder: Path, tmp_path: Path) -> None:
    step = run_folder / "checkpoints" / "step-00000020"
    with pytest.raises(UserError, match=r"step-00000021.*did you mean.*step-00000020"):
        resolve_ckpt_path(step.with_name("step-00000021"), run_folder, ON_ONE_DEVICE)
    with pytest.raises(UserError, match="no valid checkpoint"):
        resolve_ckpt_path(tmp_path, run_folder, ON_ONE_DEVICE)
    fields = json.loads((step / MANIFEST).read_text())
    (step / MANIFEST).write_text(json.dumps({**fields, "kind": "deepspeed"}))
    with pytest.raises(UserError, match="deepspeed checkpoint cannot be loaded by DDPStrategy"):
        resolve_ckpt_path(step, run_folder, DDPStrategy())


def test_newest_is_the_last_one_saved_also_after_a_rewind(run_folder: Path, tmp_path: Path) -> None:
    checkpoints = run_folder / "checkpoints"
    rewound = Run(str(run_folder), str(tmp_path / "log"), steps=18, ckpt_path=str(checkpoints / "step-00000016"))
    assert finish(rewound) == [0]
    assert find_resume(checkpoints) == checkpoints / "step-00000018"
    assert (checkpoints / "last").resolve() == checkpoints / "step-00000018"
    assert {path.name for path in checkpoints.glob("step-*")} == {"step-00000018", "step-00000020"}


FILES = (f"{STATE}/__0.distcp", f"{STATE}/__1.distcp")  # which of two ranks hashes which


@pytest.mark.parametrize(
    ("case", "damaged", "value", "expected"),
    [
        ("what both see", {}, "last", "step-00000002/state.ckpt"),
        ("a listing that lags on rank 0", {}, "last", "step-00000001/state.ckpt"),
        ("a listing that lags on rank 1", {}, "last", "step-00000001/state.ckpt"),
        ("damage in the share of the other", {2: FILES[1]}, "last", "step-00000001/state.ckpt"),
        ("no whole one", {2: FILES[1], 1: FILES[0]}, "last", "None"),
        ("a damaged one, by name", {2: FILES[0]}, "step-00000002", "refused: .*its hash; the newest valid .*00000001"),
        ("one by name that is missing on rank 1", {}, "step-00000002", "refused: .*no manifest; the newest .*00000001"),
    ],
)
def test_ranks_take_one_checkpoint_whatever_each_of_them_sees(
    case: str, damaged: dict[int, str], value: str, expected: str, tmp_path: Path
) -> None:
    for step in (1, 2):
        folder = tmp_path / f"checkpoints/step-0000000{step}"
        (folder / STATE).mkdir(parents=True)
        for name in FILES:
            (folder / name).write_text(f"{name} of {step}")
        Manifest("sharded", step, step, 0, 2, "FSDP2", {}, hash_files(folder, FILES)).write(folder)
        if step in damaged:
            flip_last_byte(folder / damaged[step])
    value = value if value == "last" else str(tmp_path / "checkpoints" / value)
    port = free_port()
    assert join(launch(choose, [(case, str(tmp_path), value, rank, port) for rank in range(2)])) == [0, 0]
    chosen = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert chosen[0] == chosen[1]
    assert re.search(f"{expected}$", chosen[0])


def test_before_the_ranks_have_met_a_checkpoint_is_not_read(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = run_folder / "checkpoints/step-00000020"
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(manifest_module, "hash_files", lambda *_: pytest.fail("a file was read"))
    for value in ("last", step, run_folder):
        assert prepare_resume(value, run_folder, trainer) == str(step)
    assert prepare_resume(None, run_folder, trainer) is None
    assert prepare_resume("last", run_folder / "new", trainer) is None
    with pytest.raises(UserError, match="no such checkpoint"):
        prepare_resume(run_folder / "nowhere", run_folder, trainer)
    (step / STATE).write_bytes(b"")
    assert prepare_resume("last", run_folder, trainer) == str(step.with_name("step-00000016"))


def test_saving_a_step_again_replaces_it(undisturbed: Run, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"), str(tmp_path / "log"), steps=8)
    assert finish(run) == [0]
    again = Run(run.folder, str(tmp_path / "again"), steps=8, ckpt_path=f"{run.folder}/checkpoints/step-00000004")
    assert finish(again) == [0]
    found = find_resume(Path(run.folder, "checkpoints"))
    assert found is not None
    assert (found.name, Manifest.read(found).serial) == ("step-00000008", 3)


def test_hash_covers_every_byte_over_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "CHUNK_BYTES", 10)
    (tmp_path / "inner").mkdir()
    content = bytes(range(35))
    (tmp_path / "inner" / ".hidden").write_bytes(content)
    (tmp_path / "empty").write_bytes(b"")
    assert list_files(tmp_path) == ["empty", "inner/.hidden"]
    found = hash_files(tmp_path, list_files(tmp_path))
    chunks = [hashlib.sha256(content[i : i + 10]).digest() for i in (0, 10, 20, 30)]
    assert found["inner/.hidden"] == (35, hashlib.sha256(b"".join(chunks)).hexdigest())
    for position in range(35):
        (tmp_path / "inner" / ".hidden").write_bytes(content[:position] + b"\xff" + content[position + 1 :])
        assert hash_files(tmp_path, ["inner/.hidden"]) != {"inner/.hidden": found["inner/.hidden"]}


# What goes in


def test_state_is_loadable_with_weights_only_and_its_optimizer_speaks_names(undisturbed: Run) -> None:
    state = torch.load(Path(undisturbed.folder, "checkpoints/last", STATE), weights_only=True)
    assert state["hyper_parameters"] == {"root": "relative/path", "rate": 1e-2}
    trainable = {name for name, parameter in _built().named_parameters() if parameter.requires_grad}
    assert set(state["optimizer_states"][0]["state"]) == trainable


def _built() -> Stage:
    stage, trainer = Stage(), make_trainer(Run("unused", "unused"), [])
    trainer.strategy.connect(stage)
    stage.trainer = trainer
    stage.configure_model()
    return stage


def test_hyperparameters_that_could_not_be_loaded_are_refused_before_training(tmp_path: Path) -> None:
    stage = Stage()
    stage.hparams["codec"] = [object()]
    trainer = make_trainer(Run(str(tmp_path), str(tmp_path / "log"), steps=1), [])
    with pytest.raises(UserError, match=r"hyperparameters of Stage\['codec'\]\[0\] is a builtins.object"):
        trainer.fit(stage, Stream(0, 1))
    assert trainer.global_step == 0


def test_plain_keeps_values_and_drops_classes() -> None:
    class Count(int):
        pass

    value = plain({"a": (Count(3), Path("x/y"), None, 1.5), "b": {"c": [True, torch.float16]}}, "here")
    assert value == {"a": (3, "x/y", None, 1.5), "b": {"c": [True, "torch.float16"]}}
    assert type(value["a"][0]) is int
    assert type(value["b"]["c"][0]) is bool


def _hold(path: str, held: Any, done: Any) -> None:
    with open(path, "a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        held.set()
        done.wait()


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    held, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path / "checkpoints" / ".lock"), held, done))
    other.start()
    try:
        assert held.wait(30)
        trainer = make_trainer(Run(str(tmp_path), str(tmp_path / "log"), steps=1), [])
        with pytest.raises(UserError, match="another run is writing its checkpoints there"):
            trainer.fit(Stage(), Stream(0, 1))
    finally:
        done.set()
        other.join(30)


def test_saves_by_the_clock(tmp_path: Path) -> None:
    trainer = make_trainer(Run(str(tmp_path), str(tmp_path / "log"), steps=3), [])
    checkpoint = trainer.checkpoint_callback
    assert isinstance(checkpoint, Checkpoint)
    checkpoint.every_n_steps, checkpoint.every_n_minutes, checkpoint.save_on_end = None, 1e-12, False
    checkpoint.keep_last = 5
    trainer.fit(Stage(), Stream(0, 1))
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == [
        f"step-0000000{step}" for step in (1, 2, 3)
    ]


def test_leftovers_of_any_kind_go_at_the_next_start(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000001.tmp-0123abcd" / STATE).mkdir(parents=True)
    (checkpoints / "last.tmp-0123abcd").symlink_to("step-00000001")
    trainer = make_trainer(Run(str(tmp_path), str(tmp_path / "log"), steps=1), [])
    with pytest.warns(UserWarning, match="Removing the unfinished"):
        trainer.fit(Stage(), Stream(0, 1))
    assert sorted(path.name for path in checkpoints.iterdir()) == [".lock", "last", "step-00000001"]


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"every_n_minutes": -1.0}, {"keep_last": 0}])
def test_wrong_arguments_are_user_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Checkpoint(**wrong)
