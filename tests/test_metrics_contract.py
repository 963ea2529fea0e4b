"""Every class in `idc.metrics.__all__` keeps one contract; how each is built is in `_metric_examples`."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from _metric_examples import EXAMPLES, rank_main, save_models
from _server import free_port, join, launch

import idc.metrics
from idc.errors import UserError
from idc.metrics.base import Clip, Reference, Score, VideoMetric, sample_frames, sampled

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # empty input is meant


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@dataclasses.dataclass
class Case:
    """A metric, its clips and what it said of them."""

    name: str
    metric: VideoMetric
    clips: list[Clip]
    scores: list[Score]

    @property
    def mean(self) -> float:
        return math.fsum(score.value for score in self.scores) / len(self.scores)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {}


@pytest.fixture(params=idc.metrics.__all__)
def case(request: pytest.FixtureRequest, folder: Path, cases: dict[str, Case]) -> Case:
    """Each metric is built and judges its clips once; a test gets it reset."""
    name = request.param
    if name not in cases:
        metric, clips = EXAMPLES[name].make(folder), EXAMPLES[name].clips()
        cases[name] = Case(name, metric, clips, [metric.score(clip) for clip in clips])
    cases[name].metric.reset()
    return cases[name]


def test_every_metric_has_an_example():
    assert sorted(EXAMPLES) == list(idc.metrics.__all__)
    assert set(idc.metrics.__all__) <= set(dir(idc.metrics))
    with pytest.raises(AttributeError, match="Aesthetic"):
        idc.metrics.Aesthetic  # noqa: B018


def test_names_tell_the_metrics_apart(folder):
    names = {example.make(folder).name for example in EXAMPLES.values()}
    assert len(names) == len(EXAMPLES)


def test_scores_are_finite_within_the_bounds_and_plain_json(case):
    lo, hi = case.metric.bounds
    assert len({score.value for score in case.scores}) > 1
    for score in case.scores:
        assert score.value is not None, score.reason
        assert lo <= score.value <= hi
        assert json.loads(json.dumps(score.details, allow_nan=False)) == score.details
    assert all(isinstance(name, str) for name in case.metric.models)


def test_a_score_depends_on_its_clip_alone_and_leaves_it_as_it_was(case):
    clip = case.clips[1]
    before = clip.frames_THWC.copy(), [reference.image_HWC.copy() for reference in clip.references]
    case.metric.score(case.clips[2])
    assert case.metric.score(clip) == case.scores[1]
    case.metric.unload()
    case.metric.load()
    case.metric.load("cpu")
    assert case.metric.score(clip) == case.scores[1]
    assert np.array_equal(clip.frames_THWC, before[0])
    assert all(map(np.array_equal, (reference.image_HWC for reference in clip.references), before[1]))


def test_a_score_needs_only_the_frames_that_the_metric_asks_for(case):
    clip, count = case.clips[0], case.metric.frames
    if count is None:
        count = len(clip.frames_THWC)
    few = dataclasses.replace(clip, frames_THWC=sampled(clip, count))
    assert case.metric.score(few).value == case.scores[0].value


def test_the_mean_is_exact_and_does_not_depend_on_order_or_batches(case):
    case.metric.update(case.scores)
    assert case.metric.compute().item() == case.mean
    assert case.metric.compute().dtype == torch.float64
    case.metric.reset()
    case.metric.update(case.scores[2])
    for score in case.scores[3], case.scores[0]:
        case.metric.add(score)
    case.metric.update(case.scores[1:2])
    assert case.metric.compute().item() == case.mean
    assert (case.metric.scored, int(case.metric.expected)) == (4, 4)


def test_updating_with_clips_counts_their_scores(case):
    case.metric.update(case.clips[0])
    assert case.metric.compute().item() == case.scores[0].value
    case.metric.update(case.clips[1:2])
    assert case.metric.compute().item() == math.fsum(score.value for score in case.scores[:2]) / 2
    assert (case.metric.scored, int(case.metric.expected)) == (2, 2)


def test_nothing_in_gives_no_mean_and_reset_goes_back_to_it(case):
    for _ in range(2):
        assert math.isnan(case.metric.compute().item())
        assert (case.metric.scored, int(case.metric.expected)) == (0, 0)
        case.metric.update([])
        assert math.isnan(case.metric.compute().item())
        case.metric.update([*case.scores, Score.failed("no reason")])
        assert (case.metric.scored, int(case.metric.expected)) == (4, 5)
        case.metric.reset()


def test_counts_read_alike(case):
    """Both are plain integers, also after a copy, and `expected` is no state that a user could overwrite."""
    case.metric.update([*case.scores, Score.failed("no reason")])
    for metric in case.metric, case.metric.clone(), pickle.loads(pickle.dumps(case.metric)):
        assert (type(metric.scored), type(metric.expected)) == (int, int)
        assert f"{metric.scored} / {metric.expected}" == "4 / 5"


def test_a_failure_is_expected_and_not_scored(case):
    case.metric.update(case.scores)
    make = EXAMPLES[case.name].failing
    if make is not None:
        failed = case.metric.score(make())
        assert failed.value is None
        assert failed.reason
        json.dumps(failed.details, allow_nan=False)
        assert case.metric.applies(make())
        case.metric.update(make())
    else:
        case.metric.add(Score.failed("the video does not decode"))
    assert (case.metric.scored, int(case.metric.expected)) == (4, 5)
    assert case.metric.compute().item() == case.mean
    assert case.metric.score(case.clips[0]) == case.scores[0]


def test_clips_that_the_metric_is_not_about_are_not_expected(case):
    class Never(type(case.metric)):
        def applies(self, clip: Clip) -> bool:
            return False

    metric = case.metric.clone()
    metric.__class__ = Never
    metric.update(case.clips)
    assert (metric.scored, int(metric.expected)) == (0, 0)


def test_one_frame_gets_a_score_or_a_reason(case):
    clip = case.clips[0]
    found = case.metric.score(dataclasses.replace(clip, frames_THWC=clip.frames_THWC[:1]))
    if found.value is None:
        assert found.reason
    else:
        lo, hi = case.metric.bounds
        assert lo <= found.value <= hi


def test_copies_carry_the_count_and_go_their_own_way(case):
    case.metric.update(case.scores[:2])
    for copy in (case.metric.clone(), pickle.loads(pickle.dumps(case.metric))):
        assert copy.compute() == case.metric.compute()
        copy.update(case.scores[2:])
        assert copy.compute().item() == case.mean
        assert int(case.metric.expected) == 2
        assert copy.score(case.clips[2]) == case.scores[2]


def test_networks_stay_out_of_the_module_tree(case):
    case.metric.load()
    assert list(case.metric.children()) == []
    assert list(case.metric.parameters()) == []
    assert case.metric.state_dict() == {}


def test_its_examples_run(case):
    module = importlib.import_module(type(case.metric).__module__)
    found = doctest.DocTestFinder().find(type(case.metric), globs=vars(module), module=module)
    examples = [test for test in found if test.examples]
    assert examples, f"{case.name}'s docstring has no example"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for test in examples:
            assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, dict[str, list[float]]]]:
    """What each of two gloo ranks computed for each metric."""
    port = free_port()
    calls = [(rank, port, str(folder), idc.metrics.__all__) for rank in range(2)]
    assert join(launch(rank_main, calls), timeout=240) == [0, 0]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_equal_one(case, ranks):
    first_ranks = math.fsum(score.value for score in case.scores[::2]) / 2
    for rank in ranks:
        found = rank[case.name]
        # Networks round by their number of threads, which ranks have fewer of.
        assert found["shared"] == [pytest.approx(case.mean, rel=1e-6), 4, 5, 2]
        assert found["lonely"] == [pytest.approx(first_ranks, rel=1e-6), 2, 2]
        assert math.isnan(found["none"][0])
        assert found["none"][1:] == [0, 2]


def test_pixels_of_another_kind_are_named():
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match=r"clip 'a' holds float32: judged pixels are uint8"):
        Clip("a", frames.astype(np.float32) / 127.5 - 1)
    with pytest.raises(UserError, match=r"clip 'a' holds torch.uint8"):
        Clip("a", torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    for shape in (frames.transpose(0, 3, 1, 2), frames[0], frames[:0], frames[:, :0]):
        with pytest.raises(UserError, match=r"clip 'a' has shape .* must be \[T, H, W, 3\]"):
            Clip("a", shape)
    with pytest.raises(UserError, match=r"reference 'dog' holds int64"):
        Reference(np.zeros((8, 8, 3), np.int64), "dog")
    with pytest.raises(UserError, match=r"mask of reference 'dog': uint8 .*; must be bool of shape \(8, 8\)"):
        Reference(frames[0], "dog", mask_HW=frames[0, :, :, 0])
    with pytest.raises(UserError, match=r"masks of clip 'a': bool .*; must be bool of shape \(2, 1, 8, 8\)"):
        Clip("a", frames, references=(Reference(frames[0]),), masks_TNHW=np.zeros((2, 2, 8, 8), bool))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_is_a_finite_number(value):
    with pytest.raises(ValueError, match="must be finite"):
        Score(value)


def test_frames_are_sampled_as_the_benchmark_samples_them():
    assert sample_frames(81, 4).tolist() == [0, 26, 53, 80]
    assert sample_frames(3, 5).tolist() == [0, 0, 1, 1, 2]
    assert sample_frames(1, 3).tolist() == [0, 0, 0]
    assert sample_frames(4, None).tolist() == [0, 1, 2, 3]
    for count in (1, 2, 8, 16, 32, 33):  # frames that were sampled before are all taken
        assert sample_frames(count, count).tolist() == list(range(count))
