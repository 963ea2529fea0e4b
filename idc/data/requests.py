"""How an item is read when its turn comes: reference pictures, a clip to edit, its mask; and the DataModule of items.

What is wrong with one item ends that item: it travels on as a `Request` that says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from idc.data.benchmark import Item
from idc.data.images import cover_crop, fit_reference, to_float
from idc.data.item_sources import ItemSource
from idc.data.plan import seed_for
from idc.errors import UserError
from idc.pictures import REFERENCE_AREA, read_picture
from idc.progress import track
from idc.types import SPATIAL_MULTIPLE, TEMPORAL_FACTOR, Bucket, Sample, Subject, check_frames, check_side


@dataclass(frozen=True)
class Request:
    """An item with all that it needs, or the reason why it cannot be made.

    Attributes:
        sample: caption, references and, for an edit, the source clip at the size that is edited; None with a `problem`.
        bucket: size of the video. fps: its rate.
        seed: of the noise: a hash of the data's seed and the item's id.
        mask_THW: bool, True where an edit may change the source; None is everywhere.
        padding: repeats another item, so that all ranks run the same number; it is not written.
    """

    item: Item
    sample: Sample | None
    bucket: Bucket
    seed: int
    fps: float
    mask_THW: Tensor | None = None
    problem: str = ""
    padding: bool = False

    def to(self, device: torch.device | str, **kwargs: Any) -> Self:
        """Nothing: encoders and codec fetch what they read (Lightning calls this)."""
        return self


class ItemError(Exception):
    """Why one item cannot be made; the others go on."""


@dataclass(frozen=True)
class Size:
    """Of the videos. None is the source clip's own, for edits: cut to 4n + 1 frames and multiples of 16 pixels."""

    frames: int | None
    height: int | None
    width: int | None

    def __post_init__(self) -> None:
        if self.frames is not None:
            check_frames(self.frames)
        for name in ("height", "width"):
            if (side := getattr(self, name)) is not None:
                check_side(name, side)
        if (self.height is None) != (self.width is None):
            raise UserError(f"height={self.height}, width={self.width}: set both, or neither for the source's own")


def read_request(item: Item, size: Size, seed: int, fps: float | None, reference_area: int) -> Request:
    """Open an item's files. Never raises for what is wrong with them: the request then has a `problem`."""
    own = seed_for(seed, 0, item.id)
    try:
        subjects = _subjects(item, reference_area)
        video_CTHW, mask_THW, rate = (None, None, fps) if item.source is None else _source(item, size, fps)
        if video_CTHW is None and None in (size.frames, size.height, size.width):
            raise ItemError("it has no source clip, whose size could be taken: set frames, height and width")
        if item.source is None and not subjects and not item.prompt.strip():
            raise ItemError("it has neither a prompt nor a reference, so nothing says what to show")
    except (ItemError, UserError) as error:
        return Request(item, None, Bucket(1, 16, 16, 0), own, fps or 0.0, problem=str(error))
    shape = (size.frames, size.height, size.width) if video_CTHW is None else video_CTHW.shape[1:]
    frames, height, width = (int(side or 0) for side in shape)
    bucket = Bucket(frames, height, width, len(subjects))
    sample = Sample(item.id, item.prompt, video_CTHW, subjects, rate or 16.0, item.meta)
    return Request(item, sample, bucket, own, rate or 16.0, mask_THW)


def _subjects(item: Item, reference_area: int) -> tuple[Subject, ...]:
    labels = item.labels or ("",) * len(item.references)
    return tuple(
        Subject(fit_reference(read_picture(path), reference_area), label)
        for path, label in zip(item.references, labels, strict=True)
    )


def _source(item: Item, size: Size, fps: float | None) -> tuple[Tensor, Tensor | None, float]:
    """Clip `[3, T, H, W]` in [-1, 1], mask `[T, H, W]` and rate: the first frames, scaled to cover and cropped."""
    assert item.source is not None
    clip_TCHW, rate = _decode(item.source)
    have = len(clip_TCHW)
    frames = size.frames or (have - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1
    if have < frames:
        raise ItemError(f"{item.source}: {have} frames, fewer than the {frames} wanted; set data.init_args.frames")
    mask_TCHW = None if item.mask is None else _mask(item.mask, clip_TCHW)
    height, width = clip_TCHW.shape[-2:]
    if size.height is not None and size.width is not None:
        height, width = size.height, size.width
        clip_TCHW = cover_crop(clip_TCHW[:frames], height, width)
        mask_TCHW = None if mask_TCHW is None else cover_crop(mask_TCHW[:frames], height, width)
    else:
        clip_TCHW = _trim(clip_TCHW[:frames], item.source)
        mask_TCHW = None if mask_TCHW is None else _trim(mask_TCHW[:frames], item.source)
    video_CTHW = to_float(clip_TCHW.permute(1, 0, 2, 3)).contiguous()
    return video_CTHW, None if mask_TCHW is None else _decided(mask_TCHW, item), fps or rate


def _trim(clip_TCHW: Tensor, path: Path) -> Tensor:
    """The centre with sides in multiples of 16."""
    sides = clip_TCHW.shape[-2:]
    height, width = (side // SPATIAL_MULTIPLE * SPATIAL_MULTIPLE for side in sides)
    if not height or not width:
        raise ItemError(f"{path}: {sides[0]}x{sides[1]} pixels; a clip has at least 16 on each side")
    top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
    return clip_TCHW[..., top : top + height, left : left + width]


def _decided(mask_TCHW: Tensor, item: Item) -> Tensor:
    mask_THW = mask_TCHW[:, 0] >= 128
    if not mask_THW.any():
        raise ItemError(f"{item.mask}: all of it is black, so nothing may change; white marks what is edited")
    if mask_THW.all():
        raise ItemError(f"{item.mask}: all of it is white, so nothing is kept; leave the mask out for that")
    return mask_THW


def _mask(path: Path, clip_TCHW: Tensor) -> Tensor:
    """A picture, for all frames, or a clip: uint8 `[T, 1, H, W]` of the source's size, not yet thresholded."""
    if path.suffix.lower() in (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif"):
        mask_TCHW, _ = _decode(path)
        if len(mask_TCHW) != len(clip_TCHW):
            raise ItemError(f"{path}: {len(mask_TCHW)} frames, the source has {len(clip_TCHW)}; they must be equal")
    else:
        mask_TCHW = ((read_picture(path) + 1) * 127.5).round().byte()[None].expand(len(clip_TCHW), -1, -1, -1)
    if mask_TCHW.shape[-2:] != clip_TCHW.shape[-2:]:
        found, wanted = (f"{t.shape[-1]}x{t.shape[-2]}" for t in (mask_TCHW, clip_TCHW))
        raise ItemError(f"{path}: {found} pixels (width x height), the source has {wanted}; they must be equal")
    return mask_TCHW[:, :1]


def _decode(path: Path) -> tuple[Tensor, float]:
    """uint8 `[T, 3, H, W]`, and frames per second."""
    from idc.data.video import VideoError, decode_video, probe

    if not path.is_file():
        raise ItemError(f"{path}: no such file")
    try:
        return torch.from_numpy(decode_video(path)).permute(0, 3, 1, 2), probe(path).fps
    except VideoError as error:
        raise ItemError(f"{path}: {error}") from None


# The DataModule -----------------------------------------------------------------------------------------------------


class GenerationData(LightningDataModule):
    """The items of a run, sharded over ranks, one at a time: so no video depends on which others are made with it.

    Args:
        items: where they come from.
        frames, height, width: of the videos; null for edits takes the source's own.
        fps: of the videos; null takes the source's, or 16.
        seed: a video's noise depends on it and on the item's id alone.
        reference_area: cap of a reference's area in pixels, as in training.
    """

    def __init__(
        self,
        items: ItemSource,
        frames: int | None = 81,
        height: int | None = 480,
        width: int | None = 832,
        fps: float | None = None,
        seed: int = 0,
        reference_area: int = REFERENCE_AREA,
    ) -> None:
        super().__init__()
        if seed < 0:
            raise UserError(f"seed={seed}: must be 0 or more")
        if fps is not None and not 0 < fps <= 1000:
            raise UserError(f"fps={fps}: frames per second, above 0; null takes the source's, or 16")
        if reference_area < SPATIAL_MULTIPLE**2:
            raise UserError(f"reference_area={reference_area}: must be {SPATIAL_MULTIPLE**2} or more")
        self.source, self.size, self.fps, self.seed = items, Size(frames, height, width), fps, seed
        self.reference_area = reference_area
        self._mine: list[tuple[Item, bool]] = []

    @property
    def settings(self) -> dict[str, Any]:
        """What a video depends on besides its item, the model and the sampler, as plain JSON."""
        return {**vars(self.size), "fps": self.fps, "seed": self.seed, "reference_area": self.reference_area}

    def prepare_data(self) -> None:
        self.source.prepare()

    def choose(self, items: Sequence[Item], rank: int, world: int, equal: bool = False, writes: bool = True) -> None:
        """Take this rank's share of `items`.

        Args:
            equal: repeat the last ones, as padding, until all ranks have as many.
            writes: False makes all of them padding: another process makes the same videos with this one.
        """
        chosen = [(item, False) for item in items]
        if equal and chosen and len(chosen) % world:
            chosen += [(items[-1], True)] * (world - len(chosen) % world)
        self._mine = [(item, padding or not writes) for item, padding in chosen[rank::world]]

    def predict_dataloader(self) -> Requests:
        """This rank's items."""
        rank = getattr(self.trainer, "global_rank", 0)
        return Requests(self, self._mine, shown=rank == 0)

    def read(self, item: Item) -> Request:
        """One item, opened."""
        return read_request(item, self.size, self.seed, self.fps, self.reference_area)


class Requests:
    """Iterable over the requests of one rank, each read when its turn comes, with a progress bar."""

    def __init__(self, data: GenerationData, items: Sequence[tuple[Item, bool]], shown: bool) -> None:
        self._data, self._items, self._shown = data, items, shown

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Request]:
        for item, padding in track(self._items, "videos", len(self._items), shown=self._shown):
            yield replace(self._data.read(item), padding=padding)
