"""The command line: what a user gets wrong is answered by one message, before anything heavy is done."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from idc import recipes
from idc.cli import main
from idc.errors import UserError
from idc.explain import explain, finish

ROOT = Path(__file__).parent.parent
SFT = "recipes/sft.yaml"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    # Lightning's log handler holds the stream of whichever test imported it, and that one is closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)


def complaint(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that a wrong command prints; it ends with status 2 and without a traceback."""
    assert main(list(args)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.startswith("idc: error: ")
    assert len(err.strip().splitlines()) == 1, err
    return err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["fitt"], ["'fitt'", "'fit'"]),
        (["fit", "--config"], ["--config", "needs a file"]),
        (["fit", "--config", "recipes/sfft.yaml"], ["recipes/sfft.yaml", "no such file", "recipes/sft.yaml"]),
        (
            ["fit", "--config", "recipes/ablations/vanilla.yaml", "--config", SFT],
            ["order", f"--config {SFT} --config recipes/ablations/vanilla.yaml"],
        ),
        (
            ["fit", "--config", SFT, "--config", "recipes/hardware/cpu2.yaml", "--config", "recipes/data/toy.yaml"],
            ["order", "--config recipes/data/toy.yaml --config recipes/hardware/cpu2.yaml"],
        ),
        (["fit", "--config", "recipes/ablations/vanilla.yaml"], ["does not run alone", SFT]),
        (
            ["fit", "--config", SFT, "--data.init_args.sources.0.path", "x"],
            ["--data.init_args.sources.0.path:", "by its number", "--config FILE", "--data.init_args.sources+"],
        ),
        (["fit", "--config", SFT, "--model.init_args.optimizer.init_args.betas.1=0.5"], ["init_args.betas.1:"]),
        (["fit", "--config", SFT, "--trainer.callbacks.3"], ["--trainer.callbacks.3:", "--trainer.callbacks+"]),
    ],
)
def test_a_wrong_command_is_answered_before_torch_is_imported(
    args: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = complaint(capsys, *args)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model.init_args.trainabel", "full"], ["trainabel", "trainable"]),
        (["--model.init_args.transformer.id_blocks.intra_subjects", "false"], ["intra_subjects", "intra_subject"]),
        (["--trainer.max_stepps", "3"], ["max_stepps", "max_steps"]),
        (["--model.class_path", "idc.stages.sft.SFTT"], ["idc.stages.sft.SFTT"]),
        (["--trainer.max_steps", "many"], ["max_steps", "many"]),
        (["--data.init_args.buckets", "[[10, 64, 64]]"], ["frames=10", "4n + 1", "9 and 13"]),
        (["--data.init_args.buckets", "[[9, 64, 72]]"], ["width=72", "multiple of 16", "64 and 80"]),
        (["--model.init_args.transformer.id_blocks.layers", "20"], ["layers=20", "nearest valid choice"]),
        (["--model.init_args.transformer.id_blocks.cross_modal", "false"], ["cross_modal", "joint_references=true"]),
        (["--model.init_args.sampling.steps", "0"], ["steps=0", "at least 1 step"]),
        (["--model.init_args.schedule.warmup_steps", "-3"], ["warmup_steps=-3"]),
        (["--model.init_args.validation_times", "[]"], ["validation_times=[]", "[0.1, 0.3"]),
        (["--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt", "no such checkpoint"]),
        (["--model.init_args.transformer.pretrained", "./no_such_model"], ["no_such_model", "config.json"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule_and_the_nearest_choice(
    args: list[str], expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    logger = ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    message = complaint(capsys, "fit", "--config", SFT, *logger, *args)
    for part in expected:
        assert part in message, message


def test_a_broken_recipe_is_named_with_its_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("trainer:\n  max_steps: [1, 2\nmodel: x\n")
    with pytest.raises(UserError, match=r"broken.yaml, line \d+: not valid YAML"):
        recipes.check_command_line(["--config", str(broken)])
    broken.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="must be a mapping"):
        recipes.check_command_line([f"--config={broken}"])


def test_of_several_causes_the_one_that_says_something_is_shown() -> None:
    message = (
        "Does not validate against any of the Union subtypes\n"
        "Subtypes: [<class 'str'>, <class 'Strategy'>]\n"
        "Errors:\n  - Expected a <class 'str'>\n  - you must have DeepSpeed installed\n"
        "Given value: Namespace(class_path='DeepSpeedStrategy')"
    )
    assert finish(explain(message)) == "you must have DeepSpeed installed"
    assert finish(explain("Expected a <class 'int'>. Got value: many")) == "'many' is not of type int"


def test_callbacks_and_more_callbacks_in_one_file_are_refused(tmp_path: Path) -> None:
    both = tmp_path / "both.yaml"
    both.write_text("trainer: {callbacks: [], callbacks+: []}\n")
    with pytest.raises(UserError, match=r"both.yaml: trainer has both callbacks and callbacks\+"):
        recipes.check_command_line(["--config", str(both)])


def test_overlays_of_a_users_own_may_stand_anywhere_after_the_stage(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("trainer: {max_steps: 3}\n")
    recipes.check_command_line(["--config", SFT, "--config", str(own), "--config", "recipes/hardware/cpu2.yaml"])


def test_a_wrong_setting_is_answered_before_a_model_library_is_imported() -> None:
    code = (
        "import sys; from idc.cli import main;"
        f"status = main(['fit', '--config', '{SFT}', '--trainer.max_stps', '3']);"
        "heavy = [name for name in ('diffusers', 'idc.models.transformer', 'av', 'cv2') if name in sys.modules];"
        "sys.exit(status if not heavy else repr(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "did you mean 'max_steps'?" in done.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"trainer: {max_steps: 3}\ntrainer: {max_epochs: 1}\n", "line 2: .*'trainer' is written twice"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_recipe_that_a_parser_would_misread_is_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        recipes.check_command_line(["--config", str(overlay)])


def test_help_lists_the_commands_without_importing_torch() -> None:
    code = "import sys; from idc.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "fit" in out
    assert "shards" in out


def test_numbers_in_names_and_values_are_no_items_of_lists() -> None:
    recipes.check_command_line(["--model.x2.y", "3", "--data.path=a.0.b", "runs/v.1", "--trainer.callbacks+=x.2"])
