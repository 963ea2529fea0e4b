"""What asks judges: Q-Align's five levels and NaturalScore, against hand computations and scripted answers."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from _judge_server import Server, chat, chat_server
from _tiny_judges import ANSWER, LEVELS, QUESTION, noise, save_qwen_judge

from idc.errors import UserError
from idc.metrics.base import Clip
from idc.metrics.natural import QUESTIONS, NaturalScore, long_side, parse_score
from idc.metrics.qalign import CLIP_MEAN, QAlign, QAlignRater, expectation, pad_square, softmax
from idc.models.judges import ImageTextJudge, Judge


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> ImageTextJudge:
    return ImageTextJudge(save_qwen_judge(tmp_path_factory.mktemp("qwen")), dtype="float32", max_tokens=4)


@pytest.fixture
def server() -> Iterator[Server]:
    with chat_server() as server:
        yield server


# The five-level rule


def test_five_levels_against_hand_computed_logits() -> None:
    assert expectation(softmax([0, 0, 0, 0, 0])) == 0.5
    assert expectation(softmax([math.log(2), 0, -1e4, -1e4, -1e4])) == pytest.approx((2 * 1 + 1 * 0.75) / 3, abs=1e-12)
    probabilities = softmax([math.log(n) + 1000 for n in (1, 2, 3, 4, 5)])  # a shift does nothing, nor overflows
    assert probabilities == pytest.approx([n / 15 for n in (1, 2, 3, 4, 5)], abs=1e-12)
    assert expectation(probabilities) == pytest.approx((1 + 2 * 0.75 + 3 * 0.5 + 4 * 0.25) / 15, abs=1e-12)
    for bad in ([0.0] * 4, [math.nan, 0, 0, 0, 0]):
        with pytest.raises(ValueError, match="5 finite logits"):
            softmax(bad)


def test_pictures_are_centred_on_a_square_of_clips_mean_colour() -> None:
    wide = np.full((2, 6, 3), 200, np.uint8)
    square = pad_square(wide, side=6)
    assert square.shape == (6, 6, 3)
    assert (square[2:4] == 200).all()
    assert (square[[0, 1, 4, 5]] == CLIP_MEAN).all()
    tall = pad_square(wide.transpose(1, 0, 2), side=6)
    assert (tall == square.transpose(1, 0, 2)).all()
    assert pad_square(noise(448, 448, 3)).shape == (448, 448, 3)


def test_a_video_is_one_input_at_a_frame_a_second_and_an_image_score_is_a_mean(qwen: ImageTextJudge) -> None:
    frames = noise(10, 8, 12, 3)
    clip = Clip("a", frames, fps=3.6)  # rounds to every 4th frame
    score = QAlign(qwen).score(clip)
    assert score.details["frames"] == [0, 4, 8]
    logits = qwen.level_logits([pad_square(frames[i]) for i in (0, 4, 8)], QUESTION, ANSWER, LEVELS)
    assert score.value == pytest.approx(float(torch.tensor(logits).softmax(0) @ torch.tensor([1, 0.75, 0.5, 0.25, 0])))

    images = QAlign(qwen, task="aesthetics", kind="image")
    assert images.name == "qalign_aesthetics"
    score = images.score(clip)
    singles = [QAlignRater(qwen, "aesthetics", "image").rate(frames[i : i + 1]) for i in (0, 4, 8)]
    assert score.value == pytest.approx(sum(singles) / 3, abs=1e-12)
    assert QAlign.name == "qalign"

    assert len(QAlign(qwen).score(Clip("slow", frames[:2], fps=0.2)).details["frames"]) == 2
    assert "fps=0" in QAlign(qwen).score(Clip("still", frames, fps=0)).reason
    assert QAlignRater(pickle.loads(pickle.dumps(qwen))).rate(frames[:3]) == QAlignRater(qwen).rate(frames[:3])
    with pytest.raises(UserError, match="did you mean 'quality'"):
        QAlign(qwen, task="qualty")  # type: ignore[arg-type]


def test_logits_that_are_not_finite_are_a_failure(qwen: ImageTextJudge) -> None:
    broken = pickle.loads(pickle.dumps(qwen))
    broken.load()._model.lm_head.weight.data.fill_(math.nan)
    clip = Clip("a", noise(2, 8, 8, 3))
    assert QAlign(broken).score(clip).reason.startswith("the model's logits are not finite in torch.float32")
    assert QAlign(qwen).score(clip).value is not None


# Parsing


@pytest.mark.parametrize(
    "answer",
    ["4", " 4\n", "4.", "Score: 4", "score=4", "**4**", "**Score:** 4", '{"score": 4}', '{"score": "4"}',
     '```json\n{"score": 4}\n```', '{"reason": "5 hands", "score": 4}', "Answer: 4"],
)  # fmt: skip
def test_what_is_a_score(answer: str) -> None:
    assert parse_score(answer) == 4


@pytest.mark.parametrize(
    "answer",
    ["4/10", "4 / 5", "3.7", "4.0", "6", "0", "-4", "14", "4 or 5", "4-5", "four", "The video deserves a 4.", "٤",
     "4,5", '{"score": 6}', '{"score": 3.5}', '{"score": true}', '{"score": null}', '{"score": 4, "score": 2}',
     '{"score": 4', '{"value": 4}', '{"score": [4]}', "[4]", "4\n5", "I'm sorry, but I can't assist with that."],
)  # fmt: skip
def test_what_is_not_a_score_is_refused_and_quoted(answer: str) -> None:
    with pytest.raises(ValueError, match="not an integer from 1 to 5: '") as raised:
        parse_score(answer)
    assert " ".join(answer.split()) in str(raised.value)


def test_an_empty_answer_and_an_endless_one_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        parse_score(" \n")
    with pytest.raises(ValueError, match="not an integer") as raised:
        parse_score("blah " * 10_000)
    assert len(str(raised.value)) < 200
    with pytest.raises(ValueError, match="not an integer"):
        parse_score("{" * 100_000)


@pytest.mark.parametrize(("size", "expected"), [((720, 1280), (288, 512)), ((64, 48), (512, 384)), ((512, 5), (512, 5)),
                                                ((3000, 1), (512, 1))])  # fmt: skip
def test_the_long_side_is_512_both_ways(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert long_side(np.zeros((*size, 3), np.uint8)).shape == (*expected, 3)


# NaturalScore


class Scripted(Judge):
    """Answers from a list by seed, and keeps what it was shown."""

    name = "scripted"

    def __init__(self, answers: Sequence[str]) -> None:
        self.script, self.shown = answers, []  # type: ignore[var-annotated]

    def load(self, device: Any = "cpu") -> None: ...

    def unload(self) -> None: ...

    def answers(self, images: Sequence[np.ndarray], prompt: str, seeds: Sequence[int]) -> list[str]:
        self.shown.append((list(images), prompt))
        return [self.script[seed % len(self.script)] for seed in seeds]


def test_natural_score_is_the_mean_of_three_runs_over_sixteen_frames() -> None:
    frames = np.arange(33, dtype=np.uint8)[:, None, None, None] * np.ones((1, 256, 512, 3), np.uint8)
    judge = Scripted(["4", "Score: 5", '{"score": 4}'])
    score = NaturalScore(judge).score(Clip("a", frames))
    assert score.value == pytest.approx(13 / 3)
    assert score.details["runs"] == [4, 5, 4]
    assert score.details["seeds"] == [0, 1, 2]
    ((pictures, question),) = judge.shown
    assert [int(picture[0, 0, 0]) for picture in pictures] == [i * 32 // 15 for i in range(16)]
    assert question == QUESTIONS["v1"]
    assert NaturalScore(judge, runs=1, seed=1).score(Clip("a", frames)).value == 5
    for settings in ({"runs": 0}, {"question": "v0"}):
        with pytest.raises(UserError):
            NaturalScore(judge, **settings)  # type: ignore[arg-type]


def test_one_answer_that_is_no_score_fails_the_clip_with_the_answer(server: Server) -> None:
    clip = Clip("a", np.zeros((3, 32, 32, 3), np.uint8))
    prose = "I would say this is rather good, about a 4."
    score = NaturalScore(Scripted(["4", prose, "4"])).score(clip)
    assert (score.value, score.details["answers"]) == (None, ["4", prose, "4"])
    assert score.reason == f"the judge's answer: not an integer from 1 to 5: '{prose}'"

    server.script = lambda i, body: chat("5") if body["seed"] != 1 else chat(None, refusal="No.")
    metric = NaturalScore(server.judge())
    metric.update([clip, clip])
    assert (metric.scored, int(metric.expected)) == (0, 2)
    assert metric.score(clip).reason == "the judge refused: 'No.'"
    server.script = lambda i, body: (500, {}, b"") if i % 2 else chat(str(3 + body["seed"] % 2))
    assert metric.score(clip).value == pytest.approx(10 / 3)  # whatever the order in which the requests arrive


def test_natural_score_with_a_model_in_this_process_is_reproducible(qwen: ImageTextJudge) -> None:
    clip = Clip("a", noise(2, 16, 16, 3))
    first, second = (NaturalScore(qwen).score(clip) for _ in range(2))
    assert first == second
    assert first.value is None  # a random model's words are no score
    assert "max_tokens" in first.reason or "not an integer" in first.reason
