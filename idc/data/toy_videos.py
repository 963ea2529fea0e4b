"""The toy world's own clips as a folder of videos with its items: what a perfect system would make."""

from __future__ import annotations

import io
from pathlib import Path

from idc.data.benchmark import Item, read_items, write_items
from idc.data.storage import open_atomic
from idc.data.toy import ToySpec, ToyWorld, render_clip, render_references
from idc.data.toy_shards import HELD_OUT_SEED
from idc.data.video import encode_video
from idc.errors import UserError

REFERENCES = "references"


def toy_items(folder: str | Path, count: int, seed: int = HELD_OUT_SEED, world: ToyWorld | None = None) -> list[Item]:
    """Write `items.jsonl` and the reference pictures of `count` toy clips into `folder`; equal arguments, equal files.

    Raises:
        UserError: for a count below 1 or a negative seed.
    """
    if count < 1 or seed < 0:
        raise UserError(f"count={count}, seed={seed}: at least one clip, and seeds of 0 or more")
    folder, world = Path(folder), world or ToyWorld()
    (folder / REFERENCES).mkdir(parents=True, exist_ok=True)
    specs = [world.spec(seed + number) for number in range(count)]
    items = [_item(folder, f"toy_{number:04d}", spec) for number, spec in enumerate(specs)]
    write_items(folder, items)
    return items


def _item(folder: Path, id: str, spec: ToySpec) -> Item:
    from PIL import Image

    paths = []
    for number, picture_HWC in enumerate(render_references(spec)):
        path = folder / REFERENCES / f"{id}_{number}.png"
        buffer = io.BytesIO()
        Image.fromarray(picture_HWC).save(buffer, "PNG")
        _write(path, buffer.getvalue())
        paths.append(path)
    count = len(paths)
    return Item(
        id=id,
        prompt=spec.caption,
        references=tuple(paths),
        labels=tuple(subject.name for subject in spec.subjects),
        kinds=("object",) * count,
        category={1: "single", 2: "two", 3: "three"}[count],
        meta={"toy": spec.to_json()},
    )


class ToyTruth:
    """Fills a folder with the toy world's clips themselves: a ceiling for the scores of any system.

    Args:
        count: number of clips.
        seed: of the first one; the held-out ones by default.
        world: sizes and odds.
    """

    system = "toy_world"

    def __init__(self, count: int = 16, seed: int = HELD_OUT_SEED, world: ToyWorld | None = None) -> None:
        self.count, self.seed, self.world = count, seed, world or ToyWorld()

    def items(self, folder: str | Path) -> list[Item]:
        """What is asked for; its files are written into `folder`."""
        return toy_items(folder, self.count, self.seed, self.world)

    def make(self, folder: str | Path, ids: list[str]) -> None:
        """Write the videos of `ids` that are not there yet."""
        for item in read_items(Path(folder) / "items.jsonl"):
            path = Path(folder) / f"{item.id}.mp4"
            if item.id in set(ids) and not path.exists():
                spec = ToySpec.from_json(item.meta["toy"])
                # Clips of a few pixels lose their colours to halved chroma.
                _write(path, encode_video(render_clip(spec), spec.fps, crf=12, pixel_format="yuv444p"))


def _write(path: Path, content: bytes) -> None:
    with open_atomic(str(path)) as stream:
        stream.write(content)
