"""Questions asked together: the answers are those of each alone, in the passes of one, and faults stay with theirs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _judge_server import chat, chat_server
from _scripted import GOOD, Scripted, candidate
from _tiny_judges import WORDS, loud, save_llava_judge, save_llava_next_judge, save_qwen_judge

from idc.curate.candidate import Candidate, Dropped, Step
from idc.curate.captions import Caption
from idc.curate.chunks import STEP_FAILED, Encoding, Work
from idc.curate.parts import Count, Outcomes
from idc.curate.reaching import UNREACHED
from idc.curate.words import SubjectWords
from idc.errors import UserError
from idc.models.judges import (
    ImageTextJudge,
    JudgeError,
    JudgeUnavailableError,
    Question,
    alike,
    padded,
)

MAX_TOKENS = 12
CLASSES: dict[str, Callable[[Path], str]] = {
    "qwen": save_qwen_judge,
    "llava": save_llava_judge,
    "llava-next": save_llava_next_judge,
}


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ImageTextJudge]:
    """Judges by class."""
    return {
        name: loud(ImageTextJudge(save(tmp_path_factory.mktemp(name)), dtype="float32", max_tokens=MAX_TOKENS))
        for name, save in CLASSES.items()
    }


@pytest.fixture
def qwen(judges: dict[str, ImageTextJudge]) -> ImageTextJudge:
    return judges["qwen"]


def questions(pictures: Sequence[int], seed: int = 0) -> list[Question]:
    """One for each number of pictures, of 28 to 120 pixels, with 1 to 30 words."""
    draw = np.random.default_rng(seed)
    words = [*WORDS, "red", "blue", "ball", "cube", "and", "the", "cat", "meets", "another", "on", "green", "floor"]

    def picture() -> Any:
        return draw.integers(0, 256, (*draw.integers(28, 121, 2), 3), dtype=np.uint8)

    return [
        Question([picture() for _ in range(count)], " ".join(draw.choice(words, int(draw.integers(1, 31)))))
        for count in pictures
    ]


def told(answers: Sequence[str | JudgeError]) -> list[str]:
    return [repr(answer) for answer in answers]


def alone(judge: ImageTextJudge, asked: Sequence[Question]) -> list[str]:
    return [told(judge.answer_each([question]))[0] for question in asked]


@contextmanager
def passes(judge: Any, watch: Callable[[torch.Tensor], None] = lambda ids: None) -> Iterator[list[int]]:
    """The rows of each forward pass within; `watch` sees its tokens, and may raise."""
    rows: list[int] = []

    def hook(module: Any, args: Any, given: dict[str, Any]) -> None:
        rows.append(len(given["input_ids"]))
        watch(given["input_ids"])

    handle = judge._model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


# A model in this process


@pytest.mark.parametrize("name", CLASSES)
def test_answers_together_are_those_of_each_alone(judges: dict[str, ImageTextJudge], name: str) -> None:
    judge = judges[name]
    asked = questions([2, 0, 1, 1, 3, 0, 2, 1, 1, 0, 2], seed=3)
    together = judge.answer_each(asked)
    assert told(together) == alone(judge, asked)
    assert told(judge.answer_each(asked[::-1])) == told(together)[::-1]
    assert len(set(told(together))) >= 4  # they do depend on the question
    assert judge.answer_each([]) == []


def test_an_answer_that_does_not_end_takes_no_other_with_it(qwen: ImageTextJudge) -> None:
    together = qwen.answer_each(questions([2, 0, 1, 1, 3, 0, 2, 1], seed=1))
    cut = [answer for answer in together if isinstance(answer, JudgeError)]
    assert 0 < len(cut) < len(together)
    assert all(f"cut at max_tokens={MAX_TOKENS}: " in str(error) for error in cut)


def test_the_logits_of_a_padded_row_are_those_of_the_row_alone(qwen: ImageTextJudge) -> None:
    asked = questions([3, 1, 1, 2])
    logits: list[torch.Tensor] = []
    handle = qwen._model.register_forward_hook(lambda module, args, out: logits.append(out.logits[:, -1]))
    try:
        qwen.answer_each(asked)
        together = logits[0]
        logits.clear()
        for question in asked:
            first = len(logits)
            qwen.answer_each([question])
            logits[first + 1 :] = []
    finally:
        handle.remove()
    single = torch.cat(logits)
    assert single.std() > 1
    torch.testing.assert_close(together, single, atol=1e-3, rtol=1e-3)


def test_a_batch_takes_the_passes_of_its_longest_answer_and_not_of_all(qwen: ImageTextJudge) -> None:
    asked = questions([1, 2, 1, 3, 1, 2, 1, 1])
    each = []
    for question in asked:
        with passes(qwen) as rows:
            qwen.answer_each([question])
        each.append(len(rows))
    with passes(qwen) as rows:
        qwen.answer_each(asked)
    assert rows == [8] * max(each)
    assert 2 * len(rows) < sum(each)
    with passes(qwen) as rows:  # those without pictures are another batch
        qwen.answer_each([*asked[:3], *questions([0, 0])])
    assert set(rows) == {3, 2}


def test_a_penalty_on_repetition_does_not_see_the_padding(qwen: ImageTextJudge) -> None:
    """Qwen2.5-VL comes with a penalty, and its padding is also a token that ends answers: here one of many answers."""
    config, tokenizer = qwen._model.generation_config, qwen._processor.tokenizer
    asked = [question for seed in range(3) for question in questions([1] * 8, seed)]
    free = alone(qwen, asked)
    ends, config.repetition_penalty = config.eos_token_id, 3.0
    try:
        config.eos_token_id, tokenizer.pad_token = [*ends, tokenizer.convert_tokens_to_ids("3")], "3"
        penalised = alone(qwen, asked)
        assert told(qwen.answer_each(asked)) == penalised != free
        tokenizer.pad_token = None
        assert told(qwen.answer_each(asked)) == penalised
    finally:
        config.repetition_penalty, config.eos_token_id, tokenizer.pad_token = 1.0, ends, "<pad>"


def test_a_batch_that_does_not_fit_is_halved_and_one_that_does_not_fit_is_told(qwen: ImageTextJudge) -> None:
    asked = questions([1] * 7)
    expected = told(qwen.answer_each(asked))

    def small(ids: torch.Tensor) -> None:
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with passes(qwen, small) as rows:
        assert told(qwen.answer_each(asked)) == expected
    first = [count for place, count in enumerate(rows) if place == 0 or rows[place - 1] != count]
    assert first == [7, 3, 1, 2, 4, 2]  # 7 = 3 + 4, 3 = 1 + 2, 4 = 2 + 2

    def none(ids: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with passes(qwen, none) as rows, pytest.raises(torch.OutOfMemoryError):
        qwen.answer_each(asked)
    assert rows == [7, 3, 1]


def test_padding_is_masked_on_the_left_and_repeats_what_the_row_has() -> None:
    def row(*ids: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([ids]), **more}

    batch = padded([row(5, 6, 7, seen=torch.ones(2, 3)), row(8, 9, seen=torch.zeros(1, 3))])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["seen"].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    only = padded([row(5, 6, attention_mask=torch.tensor([[0, 1]]))])
    assert (only["input_ids"].tolist(), only["attention_mask"].tolist()) == ([[5, 6]], [[0, 1]])
    tiles = [row(1, pixels=torch.zeros(1, n, 3)) for n in (4, 2, 4)]
    assert alike([*tiles, row(1, 2), row(1)]) == [[0, 2], [1], [3, 4]]
    assert alike([]) == []


# Any judge


def test_why_there_is_no_answer_stays_with_its_question() -> None:
    asked = [Question([], str(number)) for number in range(4)]
    judge = Scripted("a", JudgeError("refused"), JudgeUnavailableError("down"), "d")
    first, second, third, fourth = judge.answer_each(asked)
    assert (first, fourth) == ("a", "d")
    assert (type(second), str(second)) == (JudgeError, "refused")
    assert (type(third), str(third)) == (JudgeUnavailableError, "down")
    assert [prompt for _, prompt in judge.asked] == ["0", "1", "2", "3"]
    with pytest.raises(UserError, match="wrong key"):
        Scripted("a", UserError("wrong key")).answer_each(asked)


def test_a_server_is_asked_several_at_once_and_faults_stay_with_their_question() -> None:
    both = threading.Barrier(2)  # passes only where two are under way

    def script(index: int, body: dict[str, Any]) -> Any:
        both.wait(10)
        text = body["messages"][0]["content"][-1]["text"]
        assert body["seed"] == 0
        return {"1": (500, {}, b""), "2": chat(None, refusal="no")}.get(text) or chat(f"to {text}")

    with chat_server() as server:
        server.script = script
        judge = server.judge(concurrency=2, tries=1)
        answers = judge.answer_each([Question([], str(number)) for number in range(4)])
        assert judge.answer_each([]) == []
    assert (answers[0], answers[3]) == ("to 0", "to 3")
    assert isinstance(answers[1], JudgeUnavailableError)
    assert isinstance(answers[2], JudgeError)
    assert not isinstance(answers[2], JudgeUnavailableError)
    assert server.most_under_way == 2


# The steps that ask


def through(step: Step, some: Sequence[Candidate]) -> tuple[dict[str, str], dict[str, str]]:
    """Captions by key as a worker has a step write them, and why the other candidates were dropped."""
    outcomes = Outcomes([], [Count("source")])
    outcomes.candidates = iter(some)
    kept = {c.key: c.caption for c in Work((), (step,), Encoding(), "").through([step], outcomes).candidates}
    return kept, {drop.key: drop.reason for drop in outcomes.drops}


@pytest.fixture
def captioner(qwen: ImageTextJudge) -> Iterator[Caption]:
    """Whatever has words is a caption of it; a third of them end it."""
    config = qwen._model.generation_config
    ends, config.eos_token_id = config.eos_token_id, list(range(0, 48, 3))
    yield Caption(qwen, 2, "how", "floor", min_words=0, max_words=MAX_TOKENS, language="any", side=512)
    config.eos_token_id = ends


def clips(count: int) -> list[Candidate]:
    draw = np.random.default_rng(5)
    some = draw.integers(0, 256, (count, 5, 32, 48, 3), dtype=np.uint8)
    return [replace(candidate(number), clip=clip) for number, clip in enumerate(some)]


def test_only_what_has_a_question_is_asked_and_each_gets_its_own_answer() -> None:
    gone = replace(candidate(1), clip=None, path="/nowhere/clip.mp4", ranks=(0, 1), span=(0, 2))
    some = [candidate(0), gone, candidate(2, caption="Mia waves."), candidate(3), candidate(4)]
    judge = Scripted(GOOD, JudgeUnavailableError("down"), "It is dark, and the lamp on the table is out by now.")
    outcomes = [outcome for (outcome,) in Caption(judge, frames=1)(some)]
    captions = [outcome.caption if isinstance(outcome, Candidate) else outcome.reason for outcome in outcomes]
    assert captions == [GOOD, "unreadable video", "Mia waves.", UNREACHED, judge.texts[0]]
    assert len(judge.asked) == 3
    assert [outcome.key for outcome in outcomes] == [c.key for c in some]
    judge = Scripted('[{"phrase": "dog", "kind": "animal"}]', JudgeUnavailableError("down"), "nothing")
    words = SubjectWords(judge)([candidate(0, GOOD), candidate(1), candidate(2, GOOD), candidate(3, GOOD)])
    first, second, third, fourth = (outcome for (outcome,) in words)
    assert [subject.name for subject in first.subjects] == ["dog"]  # type: ignore[union-attr]
    assert [drop.reason for drop in (second, third) if isinstance(drop, Dropped)] == ["no caption", UNREACHED]
    assert fourth.meta["words"]["by"] == "plain"  # type: ignore[union-attr]
    assert len(judge.asked) == 3


def test_a_real_model_captions_a_batch_in_the_passes_of_one(captioner: Caption) -> None:
    with passes(captioner.judge) as rows:
        together = through(captioner, clips(8))
    assert set(rows) == {8}
    assert len(rows) <= MAX_TOKENS
    captioner.batch = 1
    kept, dropped = through(captioner, clips(8))
    assert together == (kept, dropped)
    assert len(set(kept.values())) > 2


def test_a_picture_that_breaks_a_batch_is_dropped_alone(captioner: Caption) -> None:
    expected, dropped = through(captioner, clips(4))
    narrow = replace(candidate(9), clip=np.zeros((5, 900, 2, 3), np.uint8))  # Qwen's processor refuses 512 to 1
    found = through(captioner, [*clips(2), narrow, *clips(4)[2:]])
    assert found == (expected, {**dropped, narrow.key: STEP_FAILED})
    assert expected


def test_a_clip_that_the_memory_does_not_hold_is_dropped_alone(captioner: Caption) -> None:
    expected, dropped = through(captioner, clips(4))
    still = replace(candidate(9), clip=np.zeros((1, 32, 48, 3), np.uint8))
    marked = captioner.judge._processor.tokenizer.convert_tokens_to_ids("floor")  # of the question about stills

    def full(ids: torch.Tensor) -> None:
        if ids.shape[1] > 1 and (ids == marked).any():
            raise torch.OutOfMemoryError("CUDA out of memory")

    with passes(captioner.judge, full) as rows:
        found = through(captioner, [*clips(2), still, *clips(4)[2:]])
    assert found == (expected, {**dropped, still.key: STEP_FAILED})
    assert rows[:1] == [5]
