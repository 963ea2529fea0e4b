"""A run becomes one folder that samples as the run does; the shipped model is what its record says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from idc.cli import main
from idc.data.toy import ToyWorld
from idc.data.toy_scoring import score_video
from idc.errors import UserError
from idc.export import export
from idc.models.pipeline import IDCrafterPipeline
from idc.models.shipped import WEIGHTS, resolve_shipped, shipped_names
from idc.models.system import open_system


@pytest.fixture(scope="module")
def run(trained: Callable[..., Path]) -> Path:
    return trained()


def test_an_exported_run_has_the_runs_averages_and_says_how_it_was_trained(run: Path, tmp_path: Path) -> None:
    record = export(run, tmp_path / "out")
    loaded, own = IDCrafterPipeline.from_pretrained(tmp_path / "out"), IDCrafterPipeline.from_run(run)
    assert all(map(torch.equal, loaded.transformer.parameters(), own.transformer.parameters()))
    assert loaded.sampling == own.sampling
    assert record == json.loads((tmp_path / "out" / "training.json").read_text())
    assert (record["step"], record["samples_seen"], record["seed"]) == (
        6,
        6 * record["recipe"]["data"]["init_args"]["batch_size"],
        0,
    )
    raw = export(run, tmp_path / "raw", weights="raw")
    assert raw["weights"] == "raw"
    other = IDCrafterPipeline.from_pretrained(tmp_path / "raw").transformer
    assert not all(map(torch.equal, other.parameters(), own.transformer.parameters()))


def test_bfloat16_rounds_the_matrices_once_and_keeps_wans_float32_islands(run: Path, tmp_path: Path) -> None:
    whole, half = export(run, tmp_path / "whole"), export(run, tmp_path / "half", dtype="bfloat16")
    assert half["bytes"] < 0.7 * whole["bytes"]
    own = dict(IDCrafterPipeline.from_pretrained(tmp_path / "whole").transformer.named_parameters())
    for name, value in IDCrafterPipeline.from_pretrained(tmp_path / "half").transformer.named_parameters():
        assert value.dtype is torch.float32
        island = "blocks." not in name and "condition_embedder." not in name  # a norm there is no matrix either
        island |= "norm" in name or "scale_shift_table" in name or "time_embedder" in name
        assert torch.equal(value, own[name] if island else own[name].bfloat16().float())


def test_export_writes_over_nothing_but_an_earlier_export(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for flags in ([], ["--replace"]):
        assert main(["export", str(run), "--out", str(out), *flags]) == 2
    assert (out / "thesis.txt").read_text() == "mine"
    assert "idc export wrote" in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(tmp_path / "new")]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "new"), "--replace", "--dtype", "bfloat16"]) == 0
    assert main(["export", str(run), "--out", str(out / "thesis.txt"), "--replace"]) == 2
    assert "thesis.txt is a file; give the name of a folder" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), "--out", str(tmp_path / "newer")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "newer").exists()


@pytest.mark.parametrize("mark", ["model_index.json", "version_0/checkpoints", "checkpoints", "step-00000006", None])
def test_a_model_of_ones_own_wins_over_a_shipped_name_and_an_unrelated_folder_does_not(
    mark: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "toy" in shipped_names()
    assert resolve_shipped("toy") == WEIGHTS / "toy"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy" / "notes").mkdir(parents=True)
    if mark is not None:
        (tmp_path / "toy" / mark).mkdir(parents=True)
    assert resolve_shipped("toy") == (WEIGHTS / "toy" if mark is None else Path("toy"))
    assert resolve_shipped("./toy") == Path("toy")


def test_a_shipped_name_is_known_everywhere_and_one_that_is_mistyped_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    assert IDCrafterPipeline.from_pretrained("toy").transformer.config["num_layers"] > 0
    for load in (open_system, IDCrafterPipeline.from_pretrained, IDCrafterPipeline.from_run):
        with pytest.raises(UserError, match=r"did you mean 'toy'"):
            load("toi")
    # The hub's own words, without a network: its first line and no traceback of another library.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="owner/name: no such folder, and the hub does not give it"):
        IDCrafterPipeline.from_pretrained("owner/name", cache_dir=tmp_path / "cache")


def test_a_pipeline_is_not_exported_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    IDCrafterPipeline.from_run(run).save_pretrained(tmp_path / "pipe")
    for name in ("toy", str(tmp_path / "pipe")):
        assert main(["export", name, "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "a pipeline's folder" in line
        assert "exported already" in line
        assert "did you mean" not in line
    assert not (tmp_path / "out").exists()


def test_the_shipped_toy_model_is_small_and_holds_its_record() -> None:
    record = json.loads((WEIGHTS / "toy" / "training.json").read_text())
    assert sum(path.stat().st_size for path in (WEIGHTS / "toy").rglob("*")) < 10e6
    assert record["recipe"]["model"]["class_path"] == "idc.stages.sft.SFT"
    assert record["samples_seen"] == record["step"] * record["recipe"]["data"]["init_args"]["batch_size"]
    losses = [value for _, value in sorted(record["held_out_loss"].items(), key=lambda item: int(item[0]))]
    assert losses[-1] < losses[0]


def test_the_shipped_toy_model_shows_its_references_and_one_without_them_does_not() -> None:
    """Captions that do not name: what the subjects look like is in the references alone."""
    world, pipeline = ToyWorld(named=0.0), IDCrafterPipeline.from_pretrained("toy")
    looks: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    for number in range(16):
        spec = world.spec(2_000_000_000 + number)
        references = [subject.image_CHW for subject in world.sample(spec.seed).subjects]
        for shown, rows in looks.items():
            given = references if shown else []
            video = pipeline(spec.caption, given, 9, 64, 64, seed=number, steps=8, output_type="uint8").frames
            found = score_video(video, spec).subjects
            rows += [(subject.colour, subject.shape, subject.texture) for subject in found]
    seen, blind = (np.mean(looks[shown], axis=0) for shown in (True, False))
    assert seen[0] > 0.75  # a subject that is missing counts as wrong
    assert blind[0] < 0.5  # of six colours, matched to the subjects as well as can be
    assert seen.mean() > blind.mean() + 0.15
