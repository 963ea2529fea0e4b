"""Recipes: all of them parse, in every combination that a user may write, and each changes what it says and no more.

What the overlays change is in golden/recipes.json; after a change that is meant, write it anew by

    IDC_WRITE_GOLDEN=1 python -m pytest tests/test_recipes.py -k exactly
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from _grpo_worker import save_start
from _sft_worker import (
    BUCKET,
    ROOT,
    Fit,
    callbacks,
    fit_here,
    merge,
    one_thread,
    scalars,
    shards,
    tiny_overlay,
    toy,
    written,
)
from _tiny_real import save_qwen, save_wan
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from idc.cli import main
from idc.data.module import VideoDataModule
from idc.lightning_cli import CLI, Parser
from idc.models.spec import IDBlocks, TransformerSpec
from idc.recipes import ORDER
from idc.rewards.runner import RewardRunner
from idc.stages.base import Stage

RECIPES = ROOT / "recipes"
SFT = RECIPES / "sft.yaml"
GOLDEN = Path(__file__).parent / "golden" / "recipes.json"


OF_CURATION = ("ray",)  # overlays of recipes/curate.yaml have a parser of their own


def files(layer: str) -> list[Path]:
    found = sorted(path for path in (RECIPES / layer).glob("*.yaml") if path.stem not in OF_CURATION)
    assert found, layer
    return found


GRPO = RECIPES / "grpo.yaml"
# Protocols lie over evaluation: test_evaluate_recipes.py.
OVER = {layer: SFT for layer in ORDER[1:] if layer != "protocols"} | {"alignment": GRPO, "rewards": GRPO}
OVERLAYS = [path for layer in OVER for path in files(layer)]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


class ParserOnly(CLI):
    """The command line up to the parser: nothing is instantiated and nothing runs."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        self.used = parser

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(scope="module")
def command_line() -> ParserOnly:
    """That of `idc`, made once: making it takes longer than parsing."""
    before = Path.cwd()
    os.chdir(ROOT)
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    cli = ParserOnly(
        Stage,
        VideoDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        parser_class=Parser,
        parser_kwargs={"parser_mode": "omegaconf+"},
        args=["fit", "--config", str(SFT)],
    )
    os.chdir(before)
    return cli


@pytest.fixture(scope="module")
def parser(command_line: ParserOnly) -> LightningArgumentParser:
    """Of `idc fit`. The whole command line hands its files to it, and then checks again what it gives."""
    return command_line._parser("fit")


def parse(parser: LightningArgumentParser, *paths: Path, args: tuple[str, ...] = ()) -> dict[str, Any]:
    """The merged configuration of `idc fit` as plain values."""
    files = [argument for path in paths for argument in ("--config", str(path))]
    return plain_values(parser.parse_args([*files, *args]))


def plain_values(parsed: Any) -> dict[str, Any]:
    config = parsed.as_dict()
    config.pop("config", None)  # the files' names
    return json.loads(json.dumps(config, default=str))


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; a list of plain values is a leaf."""
    if isinstance(config, list) and config and isinstance(config[0], dict):
        config = dict(enumerate(config))
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, config


def changes(base: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """key -> new value of all that differs; "absent" for what is gone."""
    before, after = dict(flatten(base)), dict(flatten(changed))
    keys = sorted(before.keys() | after.keys())
    return {key: after.get(key, "absent") for key in keys if before.get(key, "absent") != after.get(key, "absent")}


@pytest.fixture(scope="module")
def bases(parser: LightningArgumentParser) -> dict[Path, dict[str, Any]]:
    """What each layer lies over."""
    return {path: parse(parser, path) for path in set(OVER.values())}


# What the files say -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", sorted(set(OVER.values())), ids=lambda path: path.stem)
def test_the_whole_command_line_gives_what_its_fit_gives(
    command_line: ParserOnly, bases: dict[Path, dict[str, Any]], stage: Path
) -> None:
    whole = command_line.used.parse_args(["fit", "--config", str(stage)])
    assert plain_values(whole["fit"]) == bases[stage]


def test_each_overlay_changes_exactly_what_it_claims(
    parser: LightningArgumentParser, bases: dict[Path, dict[str, Any]]
) -> None:
    """Over its stage at the toy scale. Defaults that come and go with a class that an overlay swaps are left out."""
    found = {}
    for path in OVERLAYS:
        stage = OVER[path.parent.name]
        stated = {plain(key) for file in (stage, path) for key, _ in flatten(yaml.safe_load(file.read_text()))}
        differing = changes(bases[stage], parse(parser, stage, path))
        found[str(path.relative_to(RECIPES))] = {key: value for key, value in differing.items() if plain(key) in stated}
    if os.environ.get("IDC_WRITE_GOLDEN"):
        GOLDEN.write_text(readable(found))
    golden = json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for name, expected in golden.items():
        assert found[name] == expected, name


def plain(key: str) -> str:
    """A key as it is written where the parser knows the class, and need not be told."""
    return key.replace(".init_args", "")


def readable(found: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each change."""
    parts = []
    for name, differing in found.items():
        rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in differing.items())
        parts.append(f" {json.dumps(name)}: {{\n{rows}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


BLOCKS = "model.init_args.transformer.id_blocks"
ABLATIONS = {
    "no_hierarchical_attention": {f"{BLOCKS}.intra_subject": False, f"{BLOCKS}.inter_subject": False},
    "no_vlm_encoder": {f"{BLOCKS}.use_vlm": False},
    "no_intra_subject": {f"{BLOCKS}.intra_subject": False},
    "no_inter_subject": {f"{BLOCKS}.inter_subject": False},
    "no_cross_modal": {f"{BLOCKS}.cross_modal": False, f"{BLOCKS}.joint_references": True},
    "vanilla": {f"{BLOCKS}.intra_subject": False, f"{BLOCKS}.inter_subject": False},
}


def test_the_ablations_are_the_rows_of_tables_2_and_s5() -> None:
    """Each but `no_curated_data` switches the blocks alone, as listed above; that one swaps the training clips."""
    assert {path.stem for path in files("ablations")} == {*ABLATIONS, "no_curated_data"}
    golden = json.loads(GOLDEN.read_text())
    for name, expected in ABLATIONS.items():
        found = golden[f"ablations/{name}.yaml"]
        assert found == expected, name
    source = "data.init_args.sources.0.init_args"
    found = golden["ablations/no_curated_data.yaml"]
    assert found.keys() == {f"{source}.path", f"{source}.curated"}
    assert found[f"{source}.curated"] is False


@pytest.mark.parametrize("scale", files("scale"), ids=lambda path: path.stem)
def test_scale_hardware_and_ablation_parse_together(scale: Path, parser: LightningArgumentParser) -> None:
    """Every ablation and all hardware over each scale; what each of them changes arrives."""
    golden = json.loads(GOLDEN.read_text())
    for number, ablation in enumerate(files("ablations")):
        hardware = files("hardware")[number % len(files("hardware"))]
        config = dict(flatten(parse(parser, SFT, scale, hardware, ablation)))
        for path in (hardware, ablation):
            for key, after in golden[str(path.relative_to(RECIPES))].items():
                if after != "absent":
                    assert config.get(key, "absent") == after, f"{path.stem}: {key}"
        assert config["model.init_args.transformer.num_layers"] == {"wan1.3b": 30, "wan14b": 40}[scale.stem]


def test_hardware_and_ablations_touch_different_settings() -> None:
    """So each pair of them is as good as those above."""
    for hardware in files("hardware"):
        for ablation in files("ablations"):
            keys = [dict(flatten(yaml.safe_load(path.read_text()))).keys() for path in (hardware, ablation)]
            assert not keys[0] & keys[1]


@pytest.mark.parametrize("data", files("data"), ids=lambda path: path.stem)
def test_data_goes_over_a_scale(data: Path, parser: LightningArgumentParser) -> None:
    for scale in files("scale"):
        config = parse(parser, SFT, scale, data)
        assert config["data"]["init_args"]["buckets"] == [[9, 64, 64]]
        assert config["model"]["init_args"]["codec"]["class_path"] == "idc.models.codecs.WanVAECodec"


# Manual optimisation accumulates nothing, and batches are rollouts: overlays for that of SFT do not lie over GRPO.
ONLINE_HARDWARE = [path for path in files("hardware") if "accumulate_grad_batches" not in path.read_text()]
WAYS = [path for path in files("alignment") if path.stem != "wan1.3b"]


@pytest.mark.parametrize("way", WAYS, ids=lambda path: path.stem)
def test_alignment_rewards_and_hardware_parse_together(way: Path, parser: LightningArgumentParser) -> None:
    """Every way with some rewards and some hardware, one of them on the real model; what each changes arrives."""
    golden = json.loads(GOLDEN.read_text())
    number = WAYS.index(way)
    reward = files("rewards")[(3 * number + 1) % len(files("rewards"))]
    hardware = ONLINE_HARDWARE[number % len(ONLINE_HARDWARE)]
    scale = [RECIPES / "alignment" / "wan1.3b.yaml"] if way.stem == "one_step" else []
    config = dict(flatten(parse(parser, GRPO, *scale, way, reward, hardware)))
    for path in (way, reward):
        for key, after in golden[str(path.relative_to(RECIPES))].items():
            if after != "absent" and not key.startswith("trainer.logger"):  # the last name stays
                assert config.get(key, "absent") == after, f"{reward.stem}: {key}"


def test_the_paper_s_rewards_can_be_made_from_the_recipe() -> None:
    """Every class and argument of alignment/wan1.3b.yaml, without any weights."""
    overlay = yaml.safe_load((RECIPES / "alignment" / "wan1.3b.yaml").read_text())
    settings = overlay["model"]["init_args"]["reward"]["init_args"]
    reader = ArgumentParser(exit_on_error=False)
    reader.add_class_arguments(RewardRunner, "reward")
    runner = reader.instantiate_classes(reader.parse_object({"reward": settings})).reward
    composite = runner.composite
    assert {term.key: term.weight for term in composite.terms if term.weight} == pytest.approx(
        {"face": 0.3, "subject": 0.3, "aesthetics": 0.24, "natural": 0.16}
    )
    assert composite.watched == ("motion", "sharpness", "saturation", "copy_paste", "gmescore")


# Overlays -----------------------------------------------------------------------------------------------------------


def test_an_overlay_refers_to_the_base_and_the_command_line_wins(
    parser: LightningArgumentParser, tmp_path: Path
) -> None:
    one = written(
        tmp_path / "one.yaml", {"model": {"init_args": {"schedule": {"warmup_steps": "${trainer.max_steps}"}}}}
    )
    two = written(tmp_path / "two.yaml", {"trainer": {"val_check_interval": "${trainer.max_steps}", "max_steps": 7}})
    config = parse(parser, SFT, one, two)
    assert config["model"]["init_args"]["schedule"]["warmup_steps"] == 7
    assert config["trainer"]["val_check_interval"] == 7
    config = parse(parser, SFT, one, two, args=("--trainer.max_steps", "9", "--data.init_args.batch_size=4"))
    assert config["trainer"]["max_steps"] == config["model"]["init_args"]["schedule"]["warmup_steps"] == 9
    assert config["data"]["init_args"]["batch_size"] == 4


def test_the_printed_configuration_parses_to_itself(
    parser: LightningArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlays = [RECIPES / name for name in ("scale/wan1.3b.yaml", "hardware/fsdp.yaml", "ablations/vanilla.yaml")]
    arguments = [argument for path in (SFT, *overlays) for argument in ("--config", str(path))]
    with pytest.raises(SystemExit) as end:
        main(["fit", *arguments, "--print_config"])
    assert end.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert parse(parser, printed) == parse(parser, SFT, *overlays)


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", files("ablations"), ids=lambda path: path.stem)
def test_each_ablation_trains_and_previews(ablation: Path, toy_data: Path, tmp_path: Path) -> None:
    steps = {"trainer": {"max_steps": 2, "val_check_interval": 2}}
    overlay = merge(tiny_overlay(toy_data, tmp_path / "runs", features=False), callbacks(count=1), steps)
    if ablation.stem == "no_curated_data":
        source = toy(f"{tmp_path}/not_curated", 16, 0, curated=False)
        overlay = merge(overlay, {"data": {"init_args": {"sources": [source]}}})
    run = Fit(tmp_path, overlay, overlays=(ablation,))
    assert fit_here(run) == 0
    assert sorted(run.steps()) == [1, 2]
    assert len(list(run.run.glob("samples/step-000002/*.mp4"))) == 1
    used = yaml.safe_load((run.run / "config.yaml").read_text())
    for key, value in ABLATIONS.get(ablation.stem, {}).items():
        assert dict(flatten(used))[key] == value


@pytest.mark.parametrize("way", WAYS, ids=lambda path: path.stem)
def test_each_way_of_alignment_takes_a_step(way: Path, alignment_start: Path, toy_data: Path, tmp_path: Path) -> None:
    overlay = {
        "trainer": {"accelerator": "cpu", "max_steps": 1, "limit_val_batches": 0}
        | {"logger": {"init_args": {"save_dir": str(tmp_path), "name": "run"}}},
        "model": {
            "init_args": {
                "checkpoint": str(alignment_start),
                "rollouts": {"steps": 4, "batch": 2},
                "rollouts_a_step": 4,
            }
        },
        "data": {
            "init_args": {
                "sources": [toy(f"{toy_data}/train", 48, 0)],
                "val_sources": [toy(f"{toy_data}/held_out", 8, 1_000_000)],
                "buckets": [BUCKET],
                "batch_size": 4,
                "group_size": 2,
            }
        },
    }
    files = (GRPO, way, written(tmp_path / "overlay.yaml", overlay))
    with one_thread():
        assert main(["fit", *[argument for path in files for argument in ("--config", str(path))]]) == 0
    logged = scalars(tmp_path / "run" / "version_0")
    assert {"train/reward", "train/reward/motion", "watch/diversity", "watch/alarm"} <= logged.keys()
    assert ("policy/first_ratio_error" in logged) == (way.stem != "nft")
    assert ("contrast/loss" in logged) == (way.stem in ("nft", "contrast"))
    stochastic = {"one_step": 1, "nft": 0}.get(way.stem, 2)
    assert len([tag for tag in logged if tag.startswith("signal/")]) == stochastic


@pytest.fixture(scope="module")
def alignment_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model to align."""
    return save_start(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random weights of the real classes: `wan` and `qwen`, as the hub has them."""
    root = tmp_path_factory.mktemp("weights")
    save_wan(root / "wan")
    save_qwen(root / "qwen")
    return root


def test_the_1_3b_recipe_trains_the_real_classes_from_local_folders(
    weights: Path, toy_data: Path, tmp_path: Path
) -> None:
    """With gradient checkpointing and bfloat16 as the recipe has them; from live and cached features alike."""
    wan, qwen = {"path": str(weights / "wan")}, {"path": str(weights / "qwen"), "max_pixels": 16 * 28 * 28}
    real = {
        "transformer": {"pretrained": str(weights / "wan"), "id_blocks": {"layers": 2}},
        "codec": {"init_args": wan},
        "text": {"init_args": {**wan, "max_length": 16}},
        "vlm": {"init_args": qwen},
        "sampling": {"steps": 2, "scale": 2.5, "shift": 3.0},
    }
    found = []
    for features in (False, True):
        folder = tmp_path / f"features_{features}"
        overlay = merge(tiny_overlay(toy_data, folder / "runs"), callbacks(count=1))
        overlay["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "accumulate_grad_batches": 1}
        overlay["model"] = {"init_args": real}
        overlay["data"]["init_args"] |= {
            "sources": [shards(str(toy_data / "train"))],
            "val_sources": [shards(str(toy_data / "held_out"))],
            "features": str(folder / "features") if features else None,
            "num_workers": 0,
        }
        run = Fit(folder, overlay, overlays=(RECIPES / "scale" / "wan1.3b.yaml",))
        assert fit_here(run) == 0
        assert "train/grad_norm" in scalars(run.run)
        assert len(list(run.run.glob("samples/step-000002/*.mp4"))) == 1
        used = yaml.safe_load((run.run / "config.yaml").read_text())["model"]["init_args"]
        assert used["compute_dtype"] == "bfloat16"
        assert used["speed"]["checkpointing"] == "attention"
        found.append(run)
    live, cached = found
    assert [step["ids"] for step in live.steps().values()] == [step["ids"] for step in cached.steps().values()]
    assert cached.losses() == pytest.approx(live.losses(), rel=1e-5)
    assert cached.validation()[2] == pytest.approx(live.validation()[2], rel=1e-5)


@pytest.mark.parametrize(("scale", "backbone"), [("wan1.3b", 1_418_996_800), ("wan14b", 14_288_491_584)])
def test_the_scale_recipes_build_the_published_sizes(scale: str, backbone: int) -> None:
    """On the meta device, from the sizes that stand in the recipe: Wan's parameters, and the block's beside them."""
    settings = yaml.safe_load((RECIPES / "scale" / f"{scale}.yaml").read_text())["model"]["init_args"]["transformer"]
    settings |= {"pretrained": None, "id_blocks": IDBlocks(**settings["id_blocks"])}
    model = TransformerSpec(**settings).build(4096, 3584, "meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    wan = [p.numel() for name, p in model.named_parameters() if not name.startswith("id_")]
    assert sum(wan) == backbone
    assert len(model.id_blocks) == 20
    assert sum(p.numel() for p in model.parameters()) > backbone + sum(p.numel() for p in model.id_blocks.parameters())


# Imports ------------------------------------------------------------------------------------------------------------

WALK = """
import gc, importlib, pkgutil, sys
gc.disable()  # or it walks again and again through what modules leave, to find nothing
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name.split(".")[0] in {refused!r} else find(name, *args)
import idc
names = [m.name for m in pkgutil.walk_packages(idc.__path__, "idc.") if m.name != "idc.__main__"]
for name in names:
    importlib.import_module(name)
loaded = {refused!r} & {{name.split(".")[0] for name in sys.modules}}
assert not loaded, loaded
print(len(names))
"""


def test_every_module_imports_on_the_core_dependencies() -> None:
    refused = {"torchvision", "deepspeed", "flash_attn", "pytest", "hypothesis", "skvideo", "ruff", "mypy"}
    command = [sys.executable, "-c", WALK.format(refused=refused)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len([path for path in (ROOT / "idc").rglob("*.py") if path.name != "__main__.py"]) - 1


def test_no_module_names_torchvision() -> None:
    """It is no dependency, and with a mismatched one transformers' and diffusers' imports break."""
    for path in (ROOT / "idc").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.strip().startswith(("import torchvision", "from torchvision")), path


def test_the_layers_hold() -> None:
    from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS
