"""A small collection as curation leaves it, written by hand: every number of it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from _shards import picture

from idc.curate.sources import rle
from idc.data.index import build_index
from idc.data.shards import ShardWriter
from idc.data.video import encode_video

EVIL = '</script><img src="https://example.com/x.png" onerror="window.hacked=1"><!--'
SIDE = (48, 64)  # height, width


def moving_clip(frames: int, level: int = 40, pixel_format: str = "yuv420p") -> bytes:
    """A light square that moves by 2 pixels a frame over grey."""
    video = np.full((frames, *SIDE, 3), level, np.uint8)
    for t in range(frames):
        video[t, 12:36, 4 + 2 * t : 20 + 2 * t] = (230, 120, 40)
    return encode_video(video, 8, pixel_format=pixel_format)


def subject(name: str, kind: str, origin: str | None, place: int | None, **more: Any) -> dict[str, Any]:
    """A subject as provenance tells of it, with a box and a mask on frame 0; `origin` None: without references."""
    mask = np.zeros(SIDE, bool)
    mask[12:36, 4:20] = True
    references = [] if origin is None else [{"origin": origin, "video": "film", "seconds": 1.5, "similarity": 0.75}]
    return {
        "name": name,
        "kind": kind,
        "box": [4, 12, 20, 36],
        "mask": rle.encode(mask),
        "frame": 0,
        "score": 0.9,
        "references": references,
        "reference": place,
    } | more


def write_samples(folder: Path, samples: list[dict[str, Any]], per_shard: int = 10) -> None:
    """Write shards and their index. A sample: key, caption, subjects, and the rest of its meta; frames, source."""
    with ShardWriter(folder, "curated", per_shard) as writer:
        for number, sample in enumerate(samples):
            told = dict(sample)
            key, caption, frames = told.pop("key"), told.pop("caption"), told.pop("frames", 9)
            pixel_format = told.pop("pixel_format", "yuv420p")
            pictured = [s for s in told.get("subjects", []) if s["reference"] is not None]
            writer.write(
                key,
                moving_clip(frames, 40 + number, pixel_format),
                caption,
                [(s["name"], picture(("red", "green", "blue")[n % 3]), "png") for n, s in enumerate(pictured)],
                fps=8,
                frames=frames,
                height=SIDE[0],
                width=SIDE[1],
                source=told.get("source", ""),
                licence=told.get("licence", ""),
                meta=told,
            )
    build_index(folder).save()


def write_collection(out: Path) -> None:
    """Four samples of training, one held out, three drops, of three sources."""
    opens2v: dict[str, Any] = {"source": "OpenS2V-5M", "licence": "CC-BY-4.0", "category": "singlehuman"}
    films: dict[str, Any] = {"source": "films", "licence": "CC0-1.0"}
    train = [
        {
            "key": "a",
            "caption": "A man walks his dog, and the dog barks.",
            "subjects": [
                subject("a man", "person", "other_moment", 0),
                subject("the dog", "object", "generated:flux", 1),
            ],
            "video": "v1",
            "scores": {"aesthetic": 5.0, "motion": 0.5},
            "models": {"caption": "Qwen2.5-VL-7B"},
            "safety": {"nsfw": False},
            **opens2v,
        },
        {
            "key": "b",
            "caption": f"A woman says {EVIL}",
            "subjects": [subject(f"a woman {EVIL}", "person", "other_video", 0)],
            "video": "v2",
            "scores": {"aesthetic": 6.0},
            "pixel_format": "yuv444p",
            **opens2v,
        },
        {
            "key": "c",
            "caption": "A red coat on a beach.",
            "subjects": [
                subject("a red coat", "clothing", "augmented", 0, mask=None),
                subject("a beach", "place", None, None, mask=None),
            ],
            "video": "film 1",
            "frames": 17,
            "scores": {"aesthetic": 4.0, "motion": 0.25},
            **films,
        },
        {
            "key": "d",
            "caption": "A chef.",
            "subjects": [subject("the chef", "person", "given", 0, mask=None)],
            "video": "still 1",
            "frames": 1,
            "source": "pictures",
        },
    ]
    held_out = [
        {"key": "e", "caption": "", "subjects": [], "video": "film 2", "frames": 17, "scores": {"motion": 1.0}, **films}
    ]
    write_samples(out / "train", train, per_shard=3)
    write_samples(out / "held_out", held_out)
    drops = [
        {
            "source": "films",
            "video": "film 1",
            "key": "film-1-000",
            "step": "motion filter",
            "reason": "too still",
            "detail": "0.01 < 0.1",
        },
        {
            "source": "films",
            "video": "film 3",
            "key": "film-3-000",
            "step": "motion filter",
            "reason": "too still",
            "detail": EVIL,
        },
        {
            "source": "OpenS2V-5M",
            "video": "v9",
            "key": "",
            "step": "source",
            "reason": "unreadable video",
            "detail": "0 bytes",
        },
    ]
    (out / "drops.jsonl").write_text("".join(json.dumps(drop) + "\n" for drop in drops))
    counts = {"read": 8, "kept": 5, "train": 4, "held_out": 1}
    dropped = {"motion filter": {"too still": 2}, "source": {"unreadable video": 1}}
    (out / "counts.json").write_text(json.dumps(counts | {"dropped": dropped}))
    sources = [{"class": "idc.curate.sources.folder.VideoFolder", "name": "films"}]
    (out / "manifest.json").write_text(json.dumps({"recipe": {"sources": sources}}))
