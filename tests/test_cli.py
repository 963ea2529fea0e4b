"""The command line: what a user gets wrong is answered by one message, before anything heavy is done."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from idc import recipes
from idc.cli import cli, main
from idc.errors import UserError
from idc.explain import SYNONYMS, explain, finish
from idc.stage_help import stage_settings

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
        (["fit", "--data.init_args.features", "--config", SFT], ["--data.init_args.features: needs a value"]),
        (["fit"], ["idc fit --config recipes/sft.yaml"]),
        (["generate"], ["idc generate --config recipes/generate.yaml"]),
        (["predict", "--trainer.devices", "1"], ["idc predict --config recipes/generate.yaml"]),
        (["edit", "--data.init_args.seed=3"], ["idc edit --config recipes/edit.yaml"]),
        (["evaluate"], ["idc evaluate --config recipes/evaluate.yaml"]),
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
        (
            ["--model.init_args.optimizer.init_args.lr", "abc"],
            ["optimizer.init_args.lr: 'abc' is not a number"],
        ),
        (["--model.init_args.optimizer", "AdanW"], ["'AdanW'", "did you mean 'torch.optim.AdamW'"]),
        (["--trainer.callbacks+", "{class_path: EMAa}"], ["'EMAa'", "did you mean 'idc.callbacks.ema.EMA'"]),
        (["--lr", "1"], ["'lr'; did you mean 'model.init_args.optimizer.init_args.lr'?"]),
        (["--model.init_args.lr", "1"], ["did you mean 'model.init_args.optimizer.init_args.lr'?"]),
        (["--batch-size", "1"], ["'batch-size'; did you mean 'data.init_args.batch_size'?"]),
        (["--epochs", "1"], ["did you mean 'trainer.max_steps'?"]),
        (["--seed", "1"], ["did you mean 'seed_everything' or 'data.init_args.seed'?"]),
        (["--frozen.lrr", "1"], ["there is no setting 'frozen.lrr'; did you mean"]),
        (["--data.init_args.buckets", "[[10, 64, 64]]"], ["frames=10", "4n + 1", "9 and 13"]),
        (["--data.init_args.buckets", "[[9, 64, 72]]"], ["width=72", "multiple of 16", "64 and 80"]),
        (["--model.init_args.transformer.id_blocks.layers", "20"], ["layers=20", "nearest valid choice"]),
        (["--model.init_args.transformer.id_blocks.cross_modal", "false"], ["cross_modal", "joint_references=true"]),
        (["--model.init_args.sampling.steps", "0"], ["steps=0", "at least 1"]),
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


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model.init_args.sampling.scale", "abc"], "model.init_args.sampling.scale: 'abc' is not a number or null"),
        (
            ["--model.init_args.sampling.solver", "eulr"],
            "model.init_args.sampling.solver: 'eulr' is not one of 'euler', 'heun' or null; did you mean 'euler'?",
        ),
        (
            ["--data.init_args.items", "{class_path: Promt, init_args: {prompt: a}}"],
            "data.init_args.items: there is no class 'Promt'; did you mean 'idc.data.item_sources.Prompt'?",
        ),
        (
            ["--data.init_args.items", "{class_path: Prompt, init_args: {promt: a}}"],
            "'data.init_args.items.init_args.promt'; did you mean 'data.init_args.items.init_args.prompt'?",
        ),
        (
            ["--data.init_args.items.init_args.shards.init_args.count", "x"],
            "shards.init_args.count: 'x' is not",
        ),
        (["--data.frames", "x"], "data.frames: 'x' is not a whole number or null"),  # typed without init_args
        (["--model.class_path", "Generat"], "model: there is no class 'Generat'; did you mean 'idc.stages.generate.Ge"),
        (
            ["--model.init_args.guidance", "3"],
            "no setting 'model.init_args.guidance'; did you mean 'model.init_args.sampling.scale'?",
        ),
        (["--model.init_args.sclae", "3"], "did you mean 'model.init_args.sampling.scale'?"),
        (["--model.init_args.sampling.scal", "3"], "did you mean 'model.init_args.sampling.scale'?"),
        (["--frames", "3"], "did you mean 'data.init_args.frames'?"),
        (["--seed", "3"], "did you mean 'data.init_args.seed' or 'seed_everything'?"),
        (["--model.init_args.out.x", "3"], "model.init_args.out: there is no setting 'x' inside; this is one value"),
    ],
)
def test_names_in_messages_can_be_typed_back(
    args: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in complaint(capsys, "generate", "--config", "recipes/generate.yaml", *args)


def test_a_wrong_value_in_an_overlay_is_named_as_it_can_be_typed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    overlay = tmp_path / "own.yaml"
    overlay.write_text("model: {init_args: {sampling: {scale: abc}}}\n")
    message = complaint(capsys, "generate", "--config", "recipes/generate.yaml", "--config", str(overlay))
    assert "model.init_args.sampling.scale: 'abc' is not a number or null" in message


@pytest.mark.parametrize(
    "wrong", ["idc.metrics.motoin.MotionAmplitude", "idc.metrics.motion.MotionAmplitud", "MotionAmplitud"]
)
def test_a_wrong_metric_is_answered_by_the_nearest(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = ["--model.init_args.metrics", f"[{{class_path: {wrong}}}]"]
    message = complaint(capsys, "evaluate", "--config", "recipes/evaluate.yaml", *metrics)
    assert f"{wrong!r}; did you mean 'idc.metrics.motion.MotionAmplitude'?" in message


GENERATE, EDIT, EVALUATE = (f"recipes/{name}.yaml" for name in ("generate", "edit", "evaluate"))


@pytest.mark.parametrize(
    ("command", "files", "expected"),
    [
        ("edit", [GENERATE], f"{GENERATE} is a recipe of idc generate, not of idc edit; write idc generate --config"),
        ("generate", [EDIT], f"write idc edit --config {EDIT}, or idc generate --config {GENERATE}"),
        ("generate", [EVALUATE], f"{EVALUATE} is a recipe of idc evaluate, not of idc generate; write idc evaluate"),
        ("predict", [EVALUATE], f"write idc evaluate --config {EVALUATE}"),
        ("evaluate", [SFT], f"{SFT} is a recipe of idc fit"),
        ("generate", [SFT], f"{SFT} is a recipe of idc fit"),
        ("fit", [GENERATE], f"{GENERATE} is a recipe of idc generate"),
        ("validate", [EVALUATE], f"{EVALUATE} is a recipe of idc evaluate"),
        ("fit", ["recipes/grpo.yaml", EDIT], f"{EDIT} is a recipe of idc edit"),
        ("generate", [GENERATE, "recipes/scale/wan1.3b.yaml"], "overlays in scale/ change stages of idc fit, not of"),
        ("evaluate", [EVALUATE, "recipes/ablations/vanilla.yaml"], "ablations/ change stages of idc fit, not of"),
        ("fit", [SFT, "recipes/protocols/paper.yaml"], "protocols/ change stages of idc evaluate, not of idc fit"),
    ],
)
def test_a_recipe_of_another_command_is_answered_by_its_own(
    command: str, files: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in complaint(capsys, command, *(word for file in files for word in ("--config", file)))


@pytest.mark.parametrize(
    ("command", "stage"),
    [("edit", "Generate"), ("edit", "idc.stages.sft.SFT"), ("fit", "idc.stages.evaluate.Evaluate")],
)
def test_a_stage_of_another_command_on_the_command_line_is_answered(
    command: str, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = complaint(capsys, command, "--config", recipes.RECIPES[command], "--model.class_path", stage)
    assert f"model.class_path={stage} is a stage of idc " in message


def test_every_command_runs_the_recipe_that_it_names_and_strangers_classes_are_let_through() -> None:
    for command, recipe in recipes.RECIPES.items():
        recipes.check_stage(["--config", recipe], command)
    for command in ("fit", "validate", "test", "predict"):
        for recipe in ("recipes/sft.yaml", "recipes/grpo.yaml", "recipes/dpo.yaml"):
            recipes.check_stage(["--config", recipe], command)
    recipes.check_stage(["--model.class_path", "mine.Generate", "--data.x", "2026-99-99"], "edit")
    for hardware in Path("recipes/hardware").glob("*.yaml"):
        recipes.check_stage(["--config", EDIT, "--config", str(hardware)], "edit")


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
    assert finish(explain("Expected a <class 'int'>. Got value: many")) == "'many' is not a whole number"


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
    assert "did you mean 'trainer.max_steps'?" in done.stderr


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


def test_a_reader_who_leaves_early_gets_no_traceback() -> None:
    # argparse, which prints the help of reports, may let the text go by itself, and then all is well.
    for command, allowed in ((["--help"], {141}), (["generate", "--help"], {141}), (["report", "--help"], {0, 141})):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([sys.executable, "-m", "idc", *command], stdout=write, stderr=subprocess.PIPE, text=True)
        os.close(write)
        assert done.returncode in allowed
        assert done.stderr == ""


def test_a_pipe_that_breaks_elsewhere_is_no_reader_who_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr("idc.cli.main", broken)
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        cli()


def test_a_model_without_data_is_answered_by_the_commands_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert "idc fit --config recipes/sft.yaml" in complaint(capsys, "fit", "--model.class_path", "idc.stages.sft.SFT")


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("fit", ["--model.init_args.optimizer", "--data.init_args.batch_size  int", "dropout.text  float = 0.1"]),
        ("generate", ["--model.init_args.out  str (required)", "sampling.scale  float | null", "--data.init_args.fps"]),
        ("edit", ["--model.init_args.strength  float = 0.8", "--data.init_args.items"]),
        ("evaluate", ["--model.init_args.videos", "--model.init_args.protocol"]),
    ],
)
def test_help_starts_with_the_command_and_shows_the_stages_own_settings(
    command: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    recipe = recipes.RECIPES[command]
    assert text.startswith(f"usage: idc {command} ")
    assert text.count(f"\n  idc {command} --config {recipe}") == 2  # the examples
    for part in settings:
        assert part in text
    assert "\n  --trainer." not in text
    assert f"idc {command} --help.trainer" in text


def test_help_is_about_the_recipe_that_is_given_and_about_the_trainer_on_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["predict", "--config", "recipes/edit.yaml", "-h"]) == 0
    assert "--model.init_args.strength" in capsys.readouterr().out
    assert main(["edit", "--help.trainer"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: idc edit ")
    assert "--trainer.max_steps" in text


def test_every_suggested_name_of_other_trainers_words_exists() -> None:
    for command, words in SYNONYMS.items():
        tree = recipes.merged(["--config", recipes.RECIPES[command]])
        known = {setting.name for setting in stage_settings(tree)} | set(recipes.flatten(tree))
        assert {name for names in words.values() for name in names} <= known, command


def test_names_are_completed_only_where_the_given_settings_have_a_class() -> None:
    tree = recipes.merged(["--config", SFT, "--model.init_args.optimizer", "SGD", "--data.seed=3", "--x.y", "{a: 1"])
    assert tree["model"]["init_args"]["optimizer"]["class_path"] == "SGD"
    assert recipes.as_typed("model.optimizer.lr", tree) == "model.init_args.optimizer.init_args.lr"
    assert recipes.as_typed("model.sampling.scale", tree) == "model.init_args.sampling.scale"
    assert recipes.as_typed("model", tree, inside=True) == "model.init_args"
    assert recipes.as_typed("data.seed", tree) == "data.seed"
    assert recipes.as_typed("trainer.max_steps", tree) == "trainer.max_steps"
    assert recipes.as_typed("nowhere.at.all", {}) == "nowhere.at.all"


def test_numbers_in_names_and_values_are_no_items_of_lists() -> None:
    recipes.check_command_line(["--model.x2.y", "3", "--data.path=a.0.b", "runs/v.1", "--trainer.callbacks+=x.2"])
