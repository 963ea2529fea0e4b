"""Toy clips as shards: the toy scale then takes the same way through the data as real videos do."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from idc.data.shards import ShardWriter
from idc.data.toy import ToySpec, ToyWorld, render_clip, render_references
from idc.errors import UserError

SOURCE, LICENCE = "toy", "CC0-1.0"
HELD_OUT_SEED = 1_000_000_000  # training worlds use seeds below, held-out ones from here on


def write_toy_shards(
    root: str | Path,
    count: int,
    seed: int = 0,
    world: ToyWorld | None = None,
    workers: int = 0,
    samples_per_shard: int = 1000,
    prefix: str = "toy",
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Write the clips with seeds `seed` to `seed + count - 1`; equal arguments give equal samples.

    Args:
        root: folder or fsspec URL of the shards; build its index afterwards with `build_index`.
        count: number of clips, at least 1.
        seed: of the first clip. Ranges that do not overlap hold different clips: `HELD_OUT_SEED` is for validation.
        world: sizes and odds; also which (shape, texture, colour) combinations may appear.
        workers: processes that render and encode beside this one; 0 does it here. The samples are the same.
        progress: called with the number of clips written so far.

    Returns:
        names of the shards.

    Raises:
        UserError: for a negative seed or a count below 1.
    """
    if count < 1 or seed < 0:
        raise UserError(f"count={count}, seed={seed}: at least one clip, and seeds of 0 or more")
    make = partial(_encode, world or ToyWorld())
    with ShardWriter(root, prefix, samples_per_shard) as writer:
        if workers:
            # spawn: the caller may hold threads (torch, a progress bar) that a fork would copy in mid-air
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                _write(writer, pool.map(make, range(seed, seed + count), chunksize=16), progress)
        else:
            _write(writer, map(make, range(seed, seed + count)), progress)
    return writer.shards


def _encode(world: ToyWorld, seed: int) -> tuple[ToySpec, bytes, list[bytes]]:
    from PIL import Image

    from idc.data.video import encode_video

    spec = world.spec(seed)
    # Full chroma: halved, it would smear subjects of twenty pixels. Lossless: x264 does not always choose the same
    # bytes for equal input, but what they decode to is then the same.
    video = encode_video(render_clip(spec), spec.fps, crf=0, pixel_format="yuv444p", preset="ultrafast")
    pictures = []
    for picture in render_references(spec):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "png")
        pictures.append(buffer.getvalue())
    return spec, video, pictures


def _write(
    writer: ShardWriter,
    clips: Iterable[tuple[ToySpec, bytes, list[bytes]]],
    progress: Callable[[int], None] | None,
) -> None:
    for number, (spec, video, pictures) in enumerate(clips, 1):
        references = [(spec.name(index), picture, "png") for index, picture in enumerate(pictures)]
        writer.write(
            f"{spec.seed:010d}",
            video,
            spec.caption,
            references,
            fps=spec.fps,
            frames=spec.frames,
            height=spec.height,
            width=spec.width,
            source=SOURCE,
            licence=LICENCE,
            meta={"toy": spec.to_json()},
        )
        if progress is not None:
            progress(number)
