"""Small collections of survivors for the tests of what follows the steps, and writings of them that are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _shards import picture

from idc.curate.candidate import Box, Candidate, CuratedSubject, EncodedClip, Reference, key_of
from idc.curate.decisions import Decisions, decide
from idc.curate.writing import ShardWriting, Written, write_collection
from idc.data import storage
from idc.data.video import encode_video

FRAMES, SIDE = 5, 32


@dataclass
class Held:
    """Survivors that are held in memory: shown without pixels, loaded with them."""

    whole: Sequence[Candidate]

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[Candidate]:
        for candidate in self.whole:
            subjects = tuple(
                replace(s, mask=None, references=tuple(replace(r, image=b"") for r in s.references))
                for s in candidate.subjects
            )
            encoded = candidate.encoded and candidate.encoded._replace(mp4=b"")
            yield candidate.changed(subjects=subjects, encoded=encoded)

    def load(self, number: int, clip: bool = True) -> Candidate:
        return self.whole[number]


def unit(vector: Any) -> np.ndarray:
    vector = np.asarray(vector, np.float32)
    return vector / np.linalg.norm(vector)


def mp4(number: int) -> bytes:
    """A clip of its own: a light bar that moves."""
    video = np.full((FRAMES, SIDE, SIDE, 3), 10 + 3 * (number % 70), np.uint8)
    for t in range(FRAMES):
        video[t, :, (number + 4 * t) % SIDE] = 230
    return encode_video(video, 8, pixel_format="yuv444p", preset="ultrafast")


def subject(name: str = "man", colour: str | None = "red", **more: Any) -> CuratedSubject:
    """A person with one reference of a colour; None for one without."""
    references = () if colour is None else (Reference(picture(colour), video="film", seconds=1.5),)
    return CuratedSubject(name, **{"kind": "person", "references": references, **more})


def survivor(number: int, video: str | None = None, clip: bytes = b"", **more: Any) -> Candidate:
    video = f"films/{number // 3}.mp4" if video is None else video
    return Candidate(
        **{
            "key": key_of("film", video, number),
            "source": "films",
            "video": video,
            "path": f"/home/somebody/{video}",
            "span": (9 * number, 9 * number + 9),
            "ranks": tuple(range(0, 9, 2)),
            "fps": 8.0,
            "encoded": EncodedClip(clip or mp4(number), FRAMES, SIDE, SIDE),
            "caption": f"number {number}, café",
            "licence": "CC0-1.0",
            "subjects": (subject(),),
            **more,
        }
    )


def many(count: int = 12) -> Held:
    """Three clips a video; with masks, boxes, scores and models."""
    draw = np.random.default_rng(0)
    return Held(
        [
            survivor(
                number,
                crop=Box(0, 2, 60, 40),
                scores={"aesthetic": number / 3},
                models={"caption": "Qwen2.5-VL", **({"faces": "sface"} if number % 2 else {})},
                safety={"nsfw": False},
                meta={"windows": {"seconds": [number, number + 1]}},
                subjects=(
                    subject("woman", "green", box=Box(1, 2, 9, 12), mask=draw.random((SIDE, SIDE)) > 0.5, frame=2),
                    subject("red hat", "red", kind="clothing", score=0.5, meta={"phrase": 3}),
                )[: 1 + number % 2],
            )
            for number in range(count)
        ]
    )


def write(
    out: Path, collected: Any, decisions: Decisions | None = None, recipe: Any = None, **settings: Any
) -> Written:
    wanted = ShardWriting(**{"samples_per_shard": 2, "held_out": 0.25, **settings})
    decisions = decide(collected, [], wanted.held_out) if decisions is None else decisions
    return write_collection(collected, decisions, str(out), str(out / "work"), wanted, recipe or {"steps": []})


def tree(folder: Path) -> dict[str, bytes]:
    """All files but the work files, by their paths."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = ((path.relative_to(folder).as_posix(), path) for path in files)
    return {name: path.read_bytes() for name, path in names if not name.startswith("work/")}


def write_and_die(out: str, events: int, half: bool) -> None:
    """Write `many()` and kill this process at the given event: before a file takes its name, or behind it, is flushed
    or removed; with `half` in the middle of what is written."""
    left, remove = events, storage.remove

    def deadly(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= function is not remove or os.path.exists(args[0])
            if left == 0:
                if half and function is os.fsync:
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.replace, os.fsync, storage.remove = deadly(os.replace), deadly(os.fsync), deadly(storage.remove)
    write(Path(out), many())
