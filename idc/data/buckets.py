"""Which bucket each entry goes to, and a table of what was kept and what was dropped and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import log
from typing import TYPE_CHECKING

import numpy as np

from idc.errors import UserError
from idc.types import Bucket

if TYPE_CHECKING:
    from rich.table import Table

ASPECT_TOLERANCE = 0.05  # buckets whose |log aspect ratio| error is within this of the best count as equally near


@dataclass(frozen=True)
class BucketRule:
    """How entries choose.

    Among the buckets that an entry fills (as many frames, no enlargement beyond `max_upscale`, no crop of more than
    `max_crop` of the picture) it takes those of the nearest aspect ratio (within 5%), and of these the one with most
    pixels. References beyond `max_subjects` are left out: the first ones stay.

    Args:
        shapes: (frames, height, width) of each bucket: 4n + 1 frames, sides in multiples of 16 pixels.

    Raises:
        UserError: a shape that breaks the rule, or a limit out of range.
    """

    shapes: Sequence[Sequence[int]]
    max_subjects: int = 4
    max_upscale: float = 1.1
    max_crop: float = 0.5
    parsed: tuple[Bucket, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.shapes:
            raise UserError("buckets=[]: name at least one [frames, height, width], such as [17, 64, 64]")
        parsed = []
        for shape in self.shapes:
            if len(shape) != 3:
                raise UserError(f"bucket {list(shape)}: must be [frames, height, width], such as [81, 480, 832]")
            parsed.append(Bucket(int(shape[0]), int(shape[1]), int(shape[2]), 0).check())
        if self.max_subjects < 0:
            raise UserError(f"max_subjects={self.max_subjects}: must be 0 or more")
        if self.max_upscale < 1:
            raise UserError(f"max_upscale={self.max_upscale}: must be 1 or more; 1 never enlarges")
        if not 0 <= self.max_crop < 1:
            raise UserError(f"max_crop={self.max_crop}: must be in [0, 1); 0.5 allows to lose half of the picture")
        object.__setattr__(self, "parsed", tuple(dict.fromkeys(parsed)))

    def choose(self, entry: Bucket) -> Bucket | str:
        """The bucket of an entry of this size, or the reason why there is none."""
        long_enough = [shape for shape in self.parsed if shape.frames <= entry.frames]
        if not long_enough:
            return f"{entry.frames} frames, fewer than the shortest bucket's {min(s.frames for s in self.parsed)}"
        large_enough = [
            shape
            for shape in long_enough
            if max(shape.height / entry.height, shape.width / entry.width) <= self.max_upscale
        ]
        if not large_enough:
            return f"{entry.height}x{entry.width} pixels would be enlarged beyond max_upscale={self.max_upscale}"
        errors = {shape: abs(log(shape.height / shape.width * entry.width / entry.height)) for shape in large_enough}
        best = min(errors.values())
        if best > -log(1 - self.max_crop) + 1e-9:
            return f"{entry.height}x{entry.width} pixels would be cropped beyond max_crop={self.max_crop}"
        near = [shape for shape in large_enough if errors[shape] <= best + ASPECT_TOLERANCE]
        chosen = max(near, key=lambda shape: (shape.frames * shape.height * shape.width, shape))
        return chosen._replace(subjects=min(entry.subjects, self.max_subjects))


@dataclass
class Assignment:
    """The result: buckets in use, for every source the bucket index of each entry (-1 = dropped), and the counts."""

    buckets: tuple[Bucket, ...]
    indices: tuple[np.ndarray, ...]
    kept: dict[str, Counter[Bucket]]
    dropped: dict[str, Counter[str]]

    def table(self, global_batch: int = 1) -> Table:
        """A rich table, one row a source and bucket or reason."""
        from rich.table import Table

        table = Table(title="Buckets (frames x height x width, subjects)")
        for name in ("source", "bucket", "samples", "note"):
            table.add_column(name, justify="right" if name == "samples" else "left")
        for row in self._rows(global_batch):
            table.add_row(*row, style="yellow" if row[1] == "dropped" else None)
        return table

    def text(self, global_batch: int = 1) -> str:
        """The same as plain lines."""
        return "\n".join("  ".join(cell for cell in row if cell) for row in self._rows(global_batch))

    def _rows(self, global_batch: int) -> list[tuple[str, str, str, str]]:
        sizes = sum(self.kept.values(), Counter())
        rows = []
        for source in self.kept:
            for bucket, count in sorted(self.kept[source].items()):
                shape = f"{bucket.frames}x{bucket.height}x{bucket.width}, {bucket.subjects}"
                few = sizes[bucket] < global_batch
                rows.append((source, shape, f"{count}", "fewer than one batch: its batches repeat them" if few else ""))
            rows.extend((source, "dropped", f"{n}", why) for why, n in self.dropped[source].most_common())
        return rows


def assign(sources: Sequence[tuple[str, Iterable[Bucket]]], rule: BucketRule) -> Assignment:
    """Assign the entries of each (name, sizes) source; sizes are real frames, pixels and subject counts."""
    chosen: dict[Bucket, Bucket | str] = {}
    kept: dict[str, Counter[Bucket]] = {}
    dropped: dict[str, Counter[str]] = {}
    choices = []
    for name, sizes in sources:
        mine = []
        for size in sizes:
            if size not in chosen:
                chosen[size] = rule.choose(size)
            mine.append(size)
        counts = Counter(mine)
        kept[name], dropped[name] = Counter(), Counter()
        for size, count in counts.items():
            choice = chosen[size]
            if isinstance(choice, str):
                dropped[name][choice] += count
            else:
                kept[name][choice] += count
        choices.append(mine)
    buckets = tuple(sorted({choice for choice in chosen.values() if not isinstance(choice, str)}))
    number = {bucket: i for i, bucket in enumerate(buckets)}
    index = {size: -1 if isinstance(choice, str) else number[choice] for size, choice in chosen.items()}
    indices = tuple(np.fromiter((index[size] for size in mine), np.int32, len(mine)) for mine in choices)
    return Assignment(buckets, indices, kept, dropped)
