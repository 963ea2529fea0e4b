"""A judge that says what it is told to, clips for it to look at, and a caption that is one."""

from __future__ import annotations

from typing import Any

import numpy as np

from idc.curate.candidate import Candidate
from idc.models.judges import Judge

GOOD = "A man in a red coat walks a brown dog through a park while a woman with grey hair watches them from a bench."


def candidate(number: int = 0, caption: str = "", frames: int = 5, **more: Any) -> Candidate:
    clip = np.full((frames, 32, 48, 3), number, np.uint8)
    return Candidate(f"clip-{number}", "films", "film", "", clip=clip, fps=16.0, caption=caption, **more)


class Scripted(Judge):
    """A judge that says what it is told to."""

    name = "scripted"
    max_tokens = 1000

    def __init__(self, *texts: str | Exception) -> None:
        self.texts, self.asked = list(texts), []  # type: ignore[var-annotated]

    def load(self, device: Any = "cpu") -> None:
        pass

    def unload(self) -> None:
        pass

    def answers(self, images: Any, prompt: str, seeds: Any) -> list[str]:
        self.asked.append((len(images), prompt))
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        if isinstance(text, Exception):
            raise text
        return [text]


def one(outcomes: list[Any]) -> Any:
    ((outcome,),) = outcomes
    return outcome
