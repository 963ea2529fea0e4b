"""Steps that ask a judge in words: one question a candidate, those of a call at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from idc.curate.candidate import Candidate, Outcome, Step
from idc.curate.reaching import UNREACHED
from idc.data.video import VideoError
from idc.models.judges import Judge, JudgeError, JudgeUnavailableError, Question


class AskingStep(Step, ABC):
    """Makes a question of each candidate, has the judge answer them together, and makes an outcome of each answer.

    A judge in this process generates the answers of a call in one batch, so that an answer may depend on what is asked
    with it (see `Step`); one behind a server gets up to its `concurrency` requests at once.

    Drops: "unreadable video" where no question can be made, and `UNREACHED` where the judge does not answer.
    """

    heavy = True
    judge: Judge

    @property
    def networks(self) -> tuple[Any, ...]:
        return (self.judge,)

    @abstractmethod
    def question(self, candidate: Candidate) -> Question | Outcome:
        """What to ask about a candidate, or what became of it where nothing is to be asked.

        Raises:
            VideoError: for a clip that cannot be read.
        """

    @abstractmethod
    def answered(self, candidate: Candidate, answer: str | JudgeError) -> Outcome:
        """What becomes of a candidate with the answer to its question, or with why there is none."""

    def __call__(self, candidates: Sequence[Candidate]) -> list[Sequence[Outcome]]:
        prepared = [self._prepared(candidate) for candidate in candidates]
        answers = iter(self.judge.answer_each([asked for asked in prepared if isinstance(asked, Question)]))
        return [
            [self._finished(candidate, next(answers)) if isinstance(asked, Question) else asked]
            for candidate, asked in zip(candidates, prepared, strict=True)
        ]

    def _prepared(self, candidate: Candidate) -> Question | Outcome:
        try:
            return self.question(candidate)
        except VideoError as error:
            return candidate.dropped(self.name, "unreadable video", str(error))

    def _finished(self, candidate: Candidate, answer: str | JudgeError) -> Outcome:
        if isinstance(answer, JudgeUnavailableError):
            return candidate.dropped(self.name, UNREACHED, str(answer))
        return self.answered(candidate, answer)
