"""Evaluation from the command line: the recipe as it stands, the protocols over it, faces with real weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import insightface
import numpy as np
import pytest
from _sft_worker import ROOT, scalars, written
from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningModule
from PIL import Image

from idc.cli import main
from idc.data.benchmark import Item, write_items
from idc.data.video import encode_video
from idc.errors import UserError
from idc.lightning_cli import CLI, Parser
from idc.metrics.base import VideoMetric
from idc.metrics.facesim import FaceSim
from idc.metrics.results import read_run
from idc.metrics.total import required
from idc.stages.evaluate import Evaluate
from idc.stages.generated import Generated

RECIPE = ROOT / "recipes" / "evaluate.yaml"
PROTOCOLS = sorted((ROOT / "recipes" / "protocols").glob("*.yaml"))


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave their folders here."""
    monkeypatch.chdir(tmp_path)


def made(*paths: Path, args: tuple[str, ...] = ()) -> Evaluate:
    """The stage of these recipes, made and not run."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    files = [argument for path in (RECIPE, *paths) for argument in ("--config", str(path))]
    return CLI(
        LightningModule,
        None,
        run=False,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_class=Parser,
        parser_kwargs={"parser_mode": "omegaconf+"},
        args=[*files, "--trainer.accelerator", "cpu", *args],
    ).model


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_a_protocol_has_what_its_total_is_made_of(path: Path) -> None:
    """And nothing but names and paths is needed to make its metrics."""
    stage = made(path, args=("--model.init_args.videos", "x"))
    assert stage.protocol == path.stem
    names = {metric.name for metric in stage.metrics}
    assert set(required(path.stem, "open")) <= names
    assert len(names) == len(stage.metrics)
    faces = {metric.name: metric.faces.name for metric in stage.metrics if isinstance(metric, FaceSim)}
    assert faces == {"facesim": "cur"} | ({"facesim_arc": "arc"} if path.stem.startswith("opens2v") else {})
    assert all(isinstance(metric, VideoMetric) and metric.models for metric in stage.metrics)
    assert json.loads(json.dumps(stage.scorer.settings)) == stage.scorer.settings
    assert made(path, args=("--model.init_args.videos", "y")).scorer.configs == stage.scorer.configs


@pytest.mark.usefixtures("_here")
def test_the_recipe_runs_as_it_stands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The toy world's own clips have nearly full marks; what the videos say is in run.json; two ways to call it."""
    files = ["--config", str(RECIPE), "--trainer.accelerator", "cpu"]
    assert main(["evaluate", *files, "--model.init_args.source.init_args.count", "3"]) == 0
    printed = capsys.readouterr().out
    assert "3 / 3" in printed
    run = read_run(tmp_path / "runs" / "evaluate" / "toy_world")
    assert run.mean("toy").value > 0.97
    assert run.mean("toy_identity").value > 0.97
    assert run.mean("facesim").expected == 0  # no faces in the toy world
    assert run.info.config["model"]["init_args"]["source"]["init_args"]["count"] == 3
    logged = scalars(tmp_path / "runs" / "evaluate" / "version_0" / "test")
    assert logged["mean/toy"] == [(0, pytest.approx(run.mean("toy").value))]
    assert logged["scored/toy"] == logged["expected/toy"] == [(0, 3.0)]
    videos = str(tmp_path / "runs" / "evaluate" / "toy_world" / "videos")
    (Path(videos) / "toy_0001.mp4").unlink()
    assert main(["test", *files, "--model.init_args.videos", videos, "--model.init_args.system", "other"]) == 3
    assert "no video toy_0001.mp4" in capsys.readouterr().out
    assert read_run(tmp_path / "runs" / "evaluate" / "other").mean("toy").scored == 2


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model.init_args.videos", "nowhere"], "videos=nowhere: no such folder"),
        (["--model.init_args.protocol", "opens2v"], "'opens2v' is not one of 'paper', 'opens2v-1.0'"),
        (["--model.init_args.metrics", "[{class_path: idc.metrics.toy.ToyScore}]"], "ToyScore"),
        (["--model.init_args.source", "null"], "name a folder of <id>.mp4"),
    ],
)
def test_what_cannot_be_evaluated_is_named(args: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--config", str(RECIPE), "--trainer.accelerator", "cpu", *args]) == 2
    assert expected in capsys.readouterr().err


def test_a_protocol_does_not_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--config", str(PROTOCOLS[0])]) == 2
    assert "does not run alone" in capsys.readouterr().err


@pytest.mark.usefixtures("_here")
def test_faces_are_scored_with_real_weights(tmp_path: Path) -> None:
    """One of six people in a photograph, in a clip of that crop, of another's, and with no face in the reference."""
    photo = np.array(Image.open(Path(insightface.__file__).parent / "data" / "images" / "t1.jpg").convert("RGB"))
    crops = [photo[60:280, 240:480], photo[80:300, 700:940]]
    folder, items = tmp_path / "videos", []
    folder.mkdir()
    pictures = {"one": crops[0], "blank": np.full((64, 64, 3), 200, np.uint8)}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    for id, picture, crop, category in (
        ("same", "one", 0, "singleface"),
        ("other", "one", 1, "singleface"),
        ("faceless", "blank", 0, "singleface"),
        ("several", "one", 0, "multiface"),
    ):
        (folder / f"{id}.mp4").write_bytes(encode_video(np.stack([crops[crop]] * 3), 8))
        items.append(Item(id, "a woman", (folder / f"{picture}.png",), ("woman",), ("face",), category))
    write_items(folder, items)
    assert main(["evaluate", "--config", str(RECIPE), "--model.init_args.videos", str(folder)]) == 3
    run = read_run(tmp_path / "runs" / "evaluate" / "videos")
    same, other = run.results["same", "facesim"].value, run.results["other", "facesim"].value
    assert same is not None
    assert other is not None
    assert same > 0.9 > 0.36 > other
    assert "no face is found in the reference" in run.results["faceless", "facesim"].reason
    assert not run.results["several", "facesim"].applies
    assert str(run.mean("facesim")).endswith("(2 / 3)")
    assert run.mean("toy").expected == 0


@pytest.mark.usefixtures("_here")
def test_a_model_generates_in_a_process_of_its_own_before_it_is_judged(
    trained: Callable[..., Path], tmp_path: Path
) -> None:
    """Of an item that it cannot make, the results say what generation said."""
    picture = tmp_path / "reference.png"
    Image.new("RGB", (16, 16), "red").save(picture)
    asked = Item("made", "a red square", (picture,)), Item("broken", "a red square", (tmp_path / "missing.png",))
    (tmp_path / "asked").mkdir()
    items = {
        "class_path": "idc.data.item_sources.ItemFile",
        "init_args": {"path": str(write_items(tmp_path / "asked", asked))},
    }
    size = {"items": items, "frames": 5, "height": 32, "width": 32}
    sampling = {"checkpoint": str(trained()), "sampling": {"steps": 2}}
    overlay = written(tmp_path / "g.yaml", {"data": {"init_args": size}, "model": {"init_args": sampling}})
    config = [str(ROOT / "recipes" / "generate.yaml"), str(overlay)]
    source = {"class_path": "idc.stages.generated.Generated", "init_args": {"config": config, "system": "ours"}}
    metrics = [{"class_path": "idc.metrics.motion.MotionAmplitude"}]
    judged = written(tmp_path / "o.yaml", {"model": {"init_args": {"source": source, "metrics": metrics}}})
    command = ["evaluate", "--config", str(RECIPE), "--config", str(judged), "--trainer.accelerator", "cpu"]
    assert main(command) == 3
    found = read_run(tmp_path / "runs" / "evaluate" / "ours")
    assert found.results["made", "motion_amplitude"].value is not None
    assert "no video broken.mp4: " in found.results["broken", "motion_amplitude"].reason
    assert "missing.png" in found.results["broken", "motion_amplitude"].reason


def test_generation_that_cannot_start_ends_the_evaluation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"idc generate --config nowhere.yaml .* ended with status 2"):
        Generated(["nowhere.yaml"]).items(tmp_path / "videos")
