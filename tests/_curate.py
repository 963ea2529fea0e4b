"""Small sources and steps for the engine's tests, and runs of them in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from idc.curate.candidate import (
    Candidate,
    CuratedSubject,
    EncodedClip,
    Outcome,
    Reference,
    Source,
    Step,
    encode_png,
    key_of,
)


@dataclass
class Numbers(Source):
    """Units 0, 1, 2, ...; each is one candidate."""

    count: int = 10
    first: int = 0
    name: str = "numbers"

    def units(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number in range(self.first, self.first + self.count):
            yield f"n{number:05d}", {"number": number}

    def open(self, id: str, payload: Mapping[str, Any]) -> Iterator[Outcome]:
        key = key_of(id, f"{self.name}/{id}")
        yield Candidate(key, self.name, id, f"/nowhere/{id}.mp4", meta={"number": payload["number"]}, licence="CC0")

    def describe(self) -> Mapping[str, Any]:
        return {"class": "Numbers", "name": self.name}  # which of them there are is no setting


@dataclass
class Cut(Step):
    """Gives each a picture of its own, a mask, a reference and an embedding; as a file at once where `encoded`."""

    encoded: bool = True
    size: int = 16

    def apply(self, candidate: Candidate) -> Outcome:
        draw = np.random.default_rng(candidate.meta["number"])
        clip = draw.integers(0, 256, (1, self.size, self.size, 3), dtype=np.uint8)
        subject = CuratedSubject(
            "a number",
            mask=clip[0, :, :, 0] > 127,
            embedding=clip[0, 0, :, 0].astype(np.float32),
            references=(Reference(encode_png(clip[0])),),
        )
        changed = candidate.changed(
            fps=8.0, ranks=(np.int64(0),), subjects=(subject,), caption=f"number {candidate.key}"
        )
        if self.encoded:
            return changed.changed(encoded=EncodedClip(clip.tobytes(), 1, self.size, self.size))
        return changed.changed(clip=clip)
