"""Steps that ask a detector for boxes and a segmenter for masks, for several candidates at once.

What such a step does with a candidate is a plan: a generator that asks where it needs to know. The plans of a batch go
on together from question to question, and what they ask at a time goes through the networks together: first all boxes,
then all masks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from idc.curate.candidate import Candidate, Mask, Outcome, Step
from idc.data.video import VideoError
from idc.errors import UserError
from idc.models.grounding import Detection, Detector, GroundingDino, Prompt, Query, Sam

Questions = Sequence[Query] | Sequence[Prompt]
Plan = Generator[Questions, list[Any], Outcome]


def boxes_for(queries: Sequence[Query]) -> Generator[Questions, list[Any], list[list[Detection]]]:
    """In a plan: `Detector.detect_each`."""
    return (yield queries)


def masks_for(prompts: Sequence[Prompt]) -> Generator[Questions, list[Any], list[Mask]]:
    """In a plan: `Sam.masks_each`, bool `[N, H, W]` for each prompt."""
    return (yield prompts)


class FindingStep(Step):
    """A step that follows a plan for each candidate.

    Networks round a little differently in other company: in the last bits, what becomes of a candidate depends on the
    others of its batch, and so on the chunk, and on nothing else as long as the memory suffices for `batch` of the
    networks. A picture that cannot be read drops its candidate alone.
    """

    heavy = True

    def __init__(self, detector: Detector | None, segmenter: Sam | None, batch: int) -> None:
        """
        Args:
            detector: looks for words; its threshold is the least confidence. GroundingDINO at 0.25 where None.
            segmenter: cuts out what a box is around; SAM where None.
            batch: candidates at a time. How many pictures go through a network at once is the network's own setting.

        Raises:
            UserError: for less than one candidate.
        """
        if batch < 1:
            raise UserError(f"batch={batch}: must be at least 1")
        self.detector: Detector = GroundingDino() if detector is None else detector
        self.segmenter = Sam() if segmenter is None else segmenter
        self.batch = batch

    @property
    def networks(self) -> tuple[Any, ...]:
        return self.detector, self.segmenter

    @abstractmethod
    def plan(self, candidate: Candidate) -> Plan:
        """What becomes of a candidate, with `yield from boxes_for(...)` and `yield from masks_for(...)` in between."""

    def __call__(self, candidates: Sequence[Candidate]) -> list[Sequence[Outcome]]:
        plans = [self.plan(candidate) for candidate in candidates]
        outcomes: dict[int, Outcome] = {}
        answers: Mapping[int, Any] = dict.fromkeys(range(len(plans)))  # None is what a generator begins with
        while answers:
            asked: dict[int, Questions] = {}
            for n, answer in answers.items():
                try:
                    asked[n] = plans[n].send(answer)
                except StopIteration as end:
                    outcomes[n] = end.value
                except VideoError as error:
                    outcomes[n] = candidates[n].dropped(self.name, "unreadable video", str(error))
            answers = self._answers(asked)
        return [[outcomes[n]] for n in range(len(plans))]

    def _answers(self, asked: Mapping[int, Questions]) -> dict[int, list[Any]]:
        queries = [question for few in asked.values() for question in few if isinstance(question, Query)]
        prompts = [question for few in asked.values() for question in few if isinstance(question, Prompt)]
        boxes = iter(self.detector.detect_each(queries) if queries else ())
        masks = iter(self.segmenter.masks_each(prompts) if prompts else ())
        return {
            n: [next(boxes) if isinstance(question, Query) else next(masks) for question in few]
            for n, few in asked.items()
        }
