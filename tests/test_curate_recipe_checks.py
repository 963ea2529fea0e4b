"""What is wrong with a recipe is told when it is parsed: the value, the rule and what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _curate import Cut as OthersCut
from _tiny_embedders import save_clip

from idc.cli import main
from idc.curate.candidate import Candidate
from idc.curate.duplicates import Duplicates, Fingerprint
from idc.curate.embed import EmbedSubjects
from idc.curate.exclusion import Exclude
from idc.curate.faces import FaceTracks, face_scores
from idc.curate.filters import AestheticFilter, MotionFilter, TechnicalFilter, technical_scores
from idc.curate.pairs import CrossVideoPairs
from idc.curate.recipe_checks import GIVEN, check_recipe
from idc.curate.sources import ExistingShards, OpenS2V5M, PairSettings, VideoFolder
from idc.curate.windows import Cut, Windows
from idc.curate.writing import ShardWriting
from idc.data.item_sources import Benchmark
from idc.errors import UserError
from idc.models.embedders import CLIPEmbedder
from idc.models.faces import YuNetSFace

FILMS = VideoFolder("films")
SHARDS = ExistingShards("shards")


@pytest.mark.parametrize(
    ("sources", "steps"),
    [
        ([FILMS], [Cut()]),
        ([FILMS], [TechnicalFilter(), Cut(), Windows()]),
        ([FILMS, SHARDS], [Cut()]),
        ([OpenS2V5M("a.json", "films")], [FaceTracks(), Cut()]),
    ],
)
def test_a_cut_without_frames_to_cut_is_refused(sources: list[Any], steps: list[Any]) -> None:
    number = next(n for n, step in enumerate(steps, 1) if isinstance(step, Cut))
    with pytest.raises(UserError, match=rf"^steps, number {number} \(Cut\): .*idc\.curate\.windows\.Windows before it"):
        check_recipe(sources, steps, [])


def test_a_cut_of_what_may_have_frames_is_not() -> None:
    """Shards have theirs; what others' classes do is not known."""
    for sources, steps in (
        ([FILMS], [Windows(), TechnicalFilter(), Cut()]),
        ([SHARDS], [Cut()]),
        ([FILMS], [OthersCut(), Cut()]),
        ([FILMS], []),
    ):
        check_recipe(sources, steps, [])


@pytest.mark.parametrize(
    ("size", "meant"), [("16GiB", "; did you mean 16?"), ("0", ""), ("-1", ""), ("nan", ""), ("inf", ""), ("much", "")]
)
def test_a_size_of_the_cache_that_is_none_is_refused(size: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for good in ("", "0.5", "16", " 1e2 "):
        monkeypatch.setenv("IDC_SOURCE_CACHE_GB", good)
        check_recipe([FILMS], [], [])
    monkeypatch.setenv("IDC_SOURCE_CACHE_GB", size)
    with pytest.raises(UserError) as caught:
        check_recipe([FILMS], [], [])
    expected = f"IDC_SOURCE_CACHE_GB={size!r} in the environment: must be a number of GiB, more than 0{meant}"
    assert str(caught.value) == expected


def test_a_score_that_nothing_gives_is_refused_with_the_one_that_was_meant() -> None:
    steps = [TechnicalFilter(), AestheticFilter(object()), Windows(), Cut()]  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^collection, number 2 \(Duplicates\): prefer='aesthetics'.*mean 'aesthetic'"):
        check_recipe([FILMS], steps, [Duplicates(), Duplicates(prefer="aesthetics")])
    for sources, more in (([FILMS], []), ([SHARDS], []), ([FILMS, OpenS2V5M("a", "b")], []), ([FILMS], [OthersCut()])):
        check_recipe(sources, [*steps, *more], [Duplicates(), Duplicates(prefer="aesthetic")])
    check_recipe([SHARDS], steps, [Duplicates(prefer="musiq")])
    check_recipe([FILMS, OpenS2V5M("a", "b")], steps, [Duplicates(prefer="opens2v_tech")])
    known = Candidate("k", "s", "v", "p", scores={"musiq": 1.0})
    assert list(Duplicates(prefer="musiq").decide([known])) == []  # type: ignore[arg-type]
    with pytest.raises(UserError, match="prefer='musicq': no candidate has that score; did you mean 'musiq'"):
        list(Duplicates(prefer="musicq").decide([known]))  # type: ignore[arg-type]


def test_the_scores_that_are_known_are_those_that_are_given() -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    assert set(GIVEN[TechnicalFilter]) == set(technical_scores(pictures, pictures))
    assert set(GIVEN[FaceTracks]) >= set(face_scores([]))
    assert GIVEN[MotionFilter] == ("motion",)


def test_a_threshold_for_no_network_of_the_recipe_is_refused(tmp_path: Path) -> None:
    model = CLIPEmbedder(str(save_clip(tmp_path / "siglip-so400m")))
    steps = [EmbedSubjects(model), Windows(), Cut()]
    check_recipe([FILMS], steps, [CrossVideoPairs(thresholds={"sface": 0.5, "siglip-so400m": 0.8})])
    for wrong, meant in (("sfcae", "sface"), ("siglip-so40m", "siglip-so400m")):
        with pytest.raises(UserError, match=f"collection, number 1 .*{wrong!r}; did you mean {meant!r}"):
            check_recipe([FILMS], steps, [CrossVideoPairs(thresholds={wrong: 0.5})])


def test_an_exclusion_that_nothing_is_made_ready_for_is_refused(tmp_path: Path) -> None:
    model, other = (CLIPEmbedder(str(save_clip(tmp_path / name))) for name in ("clip-large", "clip-base"))
    wanted = [Benchmark(str(tmp_path / "items.json"))]
    ready = [FaceTracks(), EmbedSubjects(model), Windows(), Cut(), Fingerprint()]
    check_recipe([FILMS], ready, [Exclude(wanted, faces=YuNetSFace(threshold=0.9), embedder=model)])
    check_recipe(
        [FILMS], [], [Exclude(faces=YuNetSFace(), embedder=model), Exclude(wanted, bits=None)]
    )  # nothing to do
    check_recipe([SHARDS], [], [Exclude(wanted)])  # which may tell fingerprints, and no embeddings
    check_recipe([FILMS], [OthersCut()], [Exclude(wanted, faces=YuNetSFace())])
    for steps, exclude, words in (
        (ready[:-1], Exclude(wanted), "no step gives clips the fingerprints"),
        (ready, Exclude(wanted, embedder=other), r"by embedder='clip-base'; did you mean 'clip-large'.*EmbedSubjects"),
        (ready[1:], Exclude(wanted, faces=YuNetSFace()), r"by faces='sface'; .*EmbedFaces .* faces: null"),
    ):
        with pytest.raises(UserError, match=rf"^collection, number 1 \(Exclude\): .*{words}"):
            check_recipe([FILMS], steps, [exclude])
    with pytest.raises(UserError, match="by embedder="):
        check_recipe([SHARDS], [], [Exclude(wanted, embedder=model)])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PairSettings(min_image=0.99, max_image=0.5), "min_image=0.99, max_image=0.5: .*mean min_image=0.5"),
        (lambda: PairSettings(most=0), "most=0: must be 1 or more"),
        (lambda: PairSettings(min_text=60), r"min_text=60: a cosine, in \[-1, 1\]"),
        (lambda: OpenS2V5M("a", "b", min_motion=0.9, max_motion=0.1), "min_motion=0.9, max_motion=0.1: .*did you mean"),
        (lambda: OpenS2V5M("a", "b", min_tech=float("nan")), "min_tech=nan: must be a number"),
        (lambda: OpenS2V5M("a", "b", min_side=-3), "min_side=-3: must be 0 or more"),
        (lambda: OpenS2V5M("a", "b", min_frames=-1), "min_frames=-1: must be 0 or more"),
        (lambda: ShardWriting(prefix="a/b"), "prefix='a/b': letters, digits, - and _ only; did you mean 'a-b'"),
        (lambda: ShardWriting(prefix=""), "prefix='': letters"),
        (lambda: ShardWriting(prefix="x.tar"), "prefix='x.tar': .*did you mean 'x'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_the_command_tells_it_before_a_film_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"out: {tmp_path}/out\nsources: [{{class_path: idc.curate.sources.VideoFolder, init_args: {{path: none}}}}]\n"
        "steps: [{class_path: idc.curate.windows.Cut}]\n"
    )
    assert main(["curate", "--config", str(recipe), "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("idc: error: steps, number 1 (Cut): no step before it chooses the frames")
    assert not (tmp_path / "out").exists()
