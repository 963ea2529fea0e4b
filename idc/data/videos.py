"""A folder of `<id>.mp4` with the items that were asked for, and a bounded cache of its frames on disk.

A video is decoded once, frame by frame, into raw uint8 in a file, of which only the wanted frames are kept; whoever
looks at them later maps the file. So neither a long video nor many of them have to fit into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from idc.data.benchmark import Item
from idc.data.output import FAILURES
from idc.data.video import VideoError, VideoInfo, iterate_video
from idc.errors import UserError, counted, nearest

SUFFIX = ".mp4"
OTHER_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".webm")

Ranks = Callable[[int], NDArray[np.int64]]  # from a video's number of frames to the ranks that are wanted


# A folder of videos -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoFolder:
    """Which items have a video, and what else lies there.

    Attributes:
        videos: id -> file; an item without one is missing from it.
        extra: name -> reason, for videos that belong to no item.
        reasons: id -> why generation made no video of it, where it says so.
    """

    videos: Mapping[str, Path]
    extra: Mapping[str, str]
    reasons: Mapping[str, str]


def find_videos(folder: str | Path, ids: Sequence[str]) -> VideoFolder:
    """Look for `<id>.mp4` in a flat folder.

    Raises:
        UserError: if there is no such folder, or none of its videos is asked for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"videos={folder}: no such folder")
    wanted, videos, extra = set(ids), {}, {}
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith(".") or suffix not in (SUFFIX, *OTHER_SUFFIXES) or not path.is_file():
            continue
        if path.stem not in wanted:
            extra[path.name] = f"no item has the id {path.stem!r}{nearest(path.stem, ids) if len(ids) < 1000 else ''}"
        elif path.suffix != SUFFIX:
            extra[path.name] = f"a video is named <id>{SUFFIX}; rename or convert it"
        else:
            videos[path.stem] = path
    if ids and not videos:
        found = f"{counted(len(extra), 'other video')}, such as {next(iter(extra))}" if extra else "no video at all"
        nobody = f"none of the {len(ids)} items" if len(ids) > 1 else "not even the only item"
        raise UserError(f"videos={folder}: {nobody} has its <id>{SUFFIX} here, but {found}")
    return VideoFolder(videos, extra, missing_reasons(folder))


def missing_reasons(folder: str | Path) -> dict[str, str]:
    """Why items have no video, by id, as the generation that made the folder says; {} where it says nothing."""
    reasons = {}
    try:
        for line in (Path(folder) / FAILURES).read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            reasons[str(values["id"])] = str(values["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return reasons
    return reasons


def fingerprint(item: Item, video: Path | None) -> str:
    """Changes with the bytes of the video, of a reference, or with anything that the item says."""
    digest = hashlib.sha256()
    said = [item.id, item.prompt, item.labels, item.kinds, item.category, item.meta]
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    for path in [video, *item.references]:
        try:
            if path is not None:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            else:
                digest.update(b"no video")
        except OSError:
            digest.update(b"missing")
    return digest.hexdigest()[:24]


# Frames -------------------------------------------------------------------------------------------------------------


@dataclass
class DecodedVideo:
    """Some frames of a video, as raw bytes in a file of the cache.

    Attributes:
        info: of the whole video.
        ranks: of the frames that are kept, rising.
    """

    info: VideoInfo
    ranks: NDArray[np.int64]
    file: Path
    shape: tuple[int, int, int]

    @property
    def bytes(self) -> int:
        return len(self.ranks) * int(np.prod(self.shape))

    def frames(self, wanted: Ranks) -> NDArray[np.uint8]:
        """The wanted frames `[n, H, W, 3]`; all that are kept come as a map of the file, whose changes are not kept."""
        # Mode c: a metric that writes into its frames does not change those of the next one.
        kept = np.memmap(self.file, np.uint8, "c", shape=(len(self.ranks), *self.shape))
        ranks = wanted(self.info.frames)
        places = np.searchsorted(self.ranks, ranks)
        if not np.array_equal(self.ranks[np.minimum(places, len(self.ranks) - 1)], ranks):
            raise ValueError("a frame that was not kept is asked for")
        return kept if np.array_equal(places, np.arange(len(self.ranks))) else kept[places]


class FrameCache:
    """Decoded frames in files under a folder that belongs to this process alone; `close` removes it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bytes = 0
        self._count = 0

    @staticmethod
    def size(info: VideoInfo, wanted: Sequence[Ranks]) -> int:
        """Bytes that the frames of such a video would take."""
        return len(_union(info, wanted)) * info.height * info.width * 3

    def decode(self, video: Path, info: VideoInfo, wanted: Sequence[Ranks]) -> DecodedVideo:
        """Decode a video to its end and keep the frames that any of `wanted` asks for; `info` is from `probe`.

        Raises:
            VideoError: if the file is broken, or fewer frames can be decoded than it says to hold.
            UserError: if the disk is full.
        """
        ranks = _union(info, wanted)
        decoded = DecodedVideo(info, ranks, self._new_file(), (info.height, info.width, 3))
        keep, count = set(ranks.tolist()), 0
        try:
            with decoded.file.open("wb") as file:
                for rank, picture in enumerate(iterate_video(video)):
                    if picture.shape != decoded.shape:
                        raise VideoError("the frame size changes within the clip")
                    if rank in keep:
                        file.write(np.ascontiguousarray(picture).data)
                    count = rank + 1
            if count < info.frames:
                raise VideoError(f"broken: {count} of its {info.frames} frames can be decoded")
        except OSError as error:
            decoded.file.unlink(missing_ok=True)
            raise UserError(
                f"frames of {video.name} ({decoded.bytes / 1e9:.2f} GB) do not fit under {self.folder}: "
                f"{error.strerror}; set a smaller cache_gb, or an out on another disk"
            ) from error
        except VideoError:
            decoded.file.unlink(missing_ok=True)
            raise
        self.bytes += decoded.bytes
        return decoded

    def shrink(self, video: DecodedVideo, wanted: Sequence[Ranks]) -> DecodedVideo:
        """Keep no more than what `wanted` asks for; the frames that go are removed from the disk."""
        ranks = _union(video.info, wanted)
        if len(ranks) == len(video.ranks):
            return video
        smaller = DecodedVideo(video.info, ranks, self._new_file(), video.shape)
        with smaller.file.open("wb") as file:
            kept = np.memmap(video.file, np.uint8, "r", shape=(len(video.ranks), *video.shape))
            for place in np.searchsorted(video.ranks, ranks):
                file.write(kept[place].data)
        self.bytes += smaller.bytes
        self.drop(video)
        return smaller

    def drop(self, video: DecodedVideo) -> None:
        """Remove a video's frames."""
        video.file.unlink(missing_ok=True)
        self.bytes -= video.bytes

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _new_file(self) -> Path:
        self._count += 1
        return self.folder / f"{os.getpid()}-{self._count}.rgb"


def _union(info: VideoInfo, wanted: Sequence[Ranks]) -> NDArray[np.int64]:
    return np.unique(np.concatenate([ask(info.frames) for ask in wanted]))
