"""recipes/curate.yaml as it stands: from practice videos to shards that training streams, and back to where they are
from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from _sft_worker import ROOT, one_thread, scalars

from idc.cli import main
from idc.curate.command import parse
from idc.curate.sources.practice import cuts
from idc.data.index import ShardIndex
from idc.data.shards import read_members

RECIPE = ROOT / "recipes" / "curate.yaml"


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipe leaves, in a folder of its own."""
    folder = tmp_path_factory.mktemp("curated")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.chdir(folder)
        assert main(["curate", "--config", str(RECIPE)]) == 0
    return folder / "data_shards" / "curated"


def records(folder: Path) -> list[dict[str, Any]]:
    """The JSON of every sample, training and held out."""
    found = []
    for part in ("train", "held_out"):
        for entry in ShardIndex.load(folder / part).entries:
            files = read_members(folder / part, entry)
            found.append(json.loads(files["json"]) | {"part": part, "key": entry.key})
    return found


MAN = {"carphone_first.mp4", "carphone_second.mp4", "pair.mp4", "film.mp4"}


def test_what_is_read_is_kept_or_dropped_with_its_reason(curated: Path) -> None:
    counts = json.loads((curated / "counts.json").read_text())
    dropped = sum(sum(reasons.values()) for reasons in counts["dropped"].values())
    assert counts["read"] == counts["kept"] + dropped
    assert counts["kept"] == len(records(curated)) >= 20
    drops = [json.loads(line) for line in (curated / "drops.jsonl").read_text().splitlines()]
    assert len(drops) == dropped
    (broken,) = (drop for drop in drops if drop["video"] == "broken.mp4")
    assert (broken["step"], broken["reason"]) == ("decode check", "empty file")


def test_the_films_shots_begin_where_its_clips_were_joined(curated: Path) -> None:
    found = {record["meta"]["shots"]["span"][0] for record in records(curated) if record["meta"]["video"] == "film.mp4"}
    assert found <= {0, *cuts()}
    assert {0, 120} <= found


def test_a_person_is_paired_with_himself_across_videos_and_with_nobody_else(curated: Path) -> None:
    adopted = [
        (record["meta"]["video"], reference["video"], reference["similarity"])
        for record in records(curated)
        for subject in record["meta"]["subjects"]
        for reference in subject["references"]
        if reference["origin"] == "other_video"
    ]
    assert ("carphone_second.mp4", "carphone_first.mp4") in {pair[:2] for pair in adopted}
    for video, other, similarity in adopted:
        assert {video, other} <= MAN
        assert video != other
        assert 0.5 <= similarity < 0.98


def test_no_video_is_on_both_sides_and_every_sample_says_where_it_is_from(curated: Path) -> None:
    sides: dict[str, set[str]] = {}
    for record in records(curated):
        meta = record["meta"]
        sides.setdefault(meta["video"], set()).add(record["part"])
        assert record["licence"]
        assert {"decode check", "shots", "caption", "ground"} <= meta["models"].keys()
        assert {"sharpness", "motion"} <= meta["scores"].keys()
        assert "/" not in meta["path"]  # no place on this machine
    assert all(len(parts) == 1 for parts in sides.values())
    assert {part for parts in sides.values() for part in parts} == {"train", "held_out"}


def test_the_same_command_again_changes_nothing(curated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def content() -> dict[str, bytes]:
        """Shards and parts; the lock and the plan are of a run."""
        kept = [p for p in sorted(curated.rglob("*")) if p.is_file() and p.name not in ("lock", "plan.jsonl")]
        return {str(p.relative_to(curated)): p.read_bytes() for p in kept}

    before = content()
    monkeypatch.chdir(curated.parent.parent)
    assert main(["curate", "--config", str(RECIPE)]) == 0
    assert content() == before


def test_its_shards_train(curated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(curated.parent.parent)
    settings = {
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.logger.init_args.save_dir": tmp_path,
        "data.init_args.batch_size": 4,
        "data.init_args.features": "null",
    }
    recipes = ["--config", str(ROOT / "recipes/sft.yaml"), "--config", str(ROOT / "recipes/data/curated.yaml")]
    with one_thread():
        assert main(["fit", *recipes, *(f"--{name}={value}" for name, value in settings.items())]) == 0
    (run,) = tmp_path.glob("sft/version_0")
    assert len(scalars(run)["val/loss"]) == 1


def test_the_overlay_of_real_weights_changes_every_part_that_means_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All classes and settings are made; weights would load at first use."""
    monkeypatch.chdir(tmp_path)
    curation = parse(["--config", str(RECIPE), "--config", str(ROOT / "recipes/curation/real.yaml")])
    assert curation is not None
    made = json.dumps([step.describe() for step in curation.steps])
    assert "tiny" not in made
    assert "practice" not in made
    for name in ("detector", "segmenter", "judge", "embedder"):
        assert any(hasattr(step, name) for step in curation.steps), name
    judges = {id(step.judge) for step in curation.steps if hasattr(step, "judge")}
    encoders = [step.predictor.clip for step in curation.steps if hasattr(step, "predictor")]
    encoders += [step.embedder for step in (*curation.steps, *curation.collection) if hasattr(step, "embedder")]
    encoders += [step.check.embedder for step in curation.steps if hasattr(step, "check")]
    assert len(judges) == 1  # 7B are in memory once
    assert len(encoders) == 4
    assert len({id(encoder) for encoder in encoders}) == 1
    assert not (tmp_path / "data_shards").exists()
