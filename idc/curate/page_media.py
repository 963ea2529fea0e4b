"""The files of a page of shards: clips that every browser plays, the frame that was annotated, references.

They are named by a hash of the sample, so that a page that is written again finds what it has.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from idc.curate.looking import Seen, SeenSubject
from idc.curate.sources import rle
from idc.data.shards import LOSER, SampleError, clip_ext, read_members
from idc.data.video import VideoError, decode_video
from idc.webpage import playable, save_jpeg

FOLDER = "media"
FRAME_SIDE, REFERENCE_SIDE, MASK_SIDE = 640, 320, 256  # pixels, the longer one
_OURS = re.compile(r"[0-9a-f]{16}-(clip\.mp4|worse\.mp4|frame\.jpg|ref\d+\.jpg)")


class Media:
    """Puts a page's files under `<out>/media` and says how the page names them."""

    def __init__(self, out: Path) -> None:
        self.folder = out / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._used: set[str] = set()

    def add(self, seen: Seen) -> dict[str, Any]:
        """{"clip", "worse", "frame", "references": {member: file}}, each where there is one, and "missing": why not."""
        name = seen.entry.sha256[:16] or "0" * 16
        found: dict[str, Any] = {"references": {}}
        try:
            files = read_members(seen.root, seen.entry)
        except SampleError as error:
            return found | {"missing": error.reason}
        clip = files[clip_ext(files) or ""] if clip_ext(files) else b""
        try:
            if not seen.still:
                found["clip"] = self._write(f"{name}-clip.mp4", clip, seen.entry.fps)
            found["frame"] = self._frame(f"{name}-frame.jpg", clip, annotated_frame(seen))
            if (worse := clip_ext(files, LOSER)) is not None:
                found["worse"] = self._write(f"{name}-worse.mp4", files[worse], seen.entry.fps)
        except VideoError as error:
            found["missing"] = f"broken clip: {error}"
        for member in sorted(ext for ext in files if ext.startswith("ref")):
            if file := self._reference(f"{name}-{member.partition('.')[0]}.jpg", files[member]):
                found["references"][member] = file
        return found

    def clean(self) -> None:
        """Remove the files of samples that an earlier page showed and this one does not."""
        for path in self.folder.iterdir():
            if path.name not in self._used and _OURS.fullmatch(path.name.removesuffix(".part")):
                path.unlink()

    def _take(self, name: str) -> Path | None:
        """Where to write a file; None where it is there."""
        self._used.add(name)
        path = self.folder / name
        return None if path.is_file() else path

    def _write(self, name: str, clip: bytes, fps: float) -> str:
        if target := self._take(name):
            part = target.with_name(f"{name}.part")
            part.write_bytes(playable(clip, fps))
            os.replace(part, target)
        return f"{FOLDER}/{name}"

    def _frame(self, name: str, clip: bytes, number: int) -> str:
        from PIL import Image

        if target := self._take(name):
            save_jpeg(Image.fromarray(decode_video(clip, number, 1)[0]), target, FRAME_SIDE)
        return f"{FOLDER}/{name}"

    def _reference(self, name: str, data: bytes) -> str:
        from PIL import Image

        if target := self._take(name):
            try:
                with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
                    save_jpeg(picture, target, REFERENCE_SIDE)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                return ""
        return f"{FOLDER}/{name}"


def annotated_frame(seen: Seen) -> int:
    """The frame that the page shows of a clip at rest: that of the first subject with a box or mask, else the first."""
    frames = seen.entry.bucket.frames
    wanted = (subject.frame for subject in seen.subjects if subject.box or subject.mask)
    return next((frame for frame in wanted if 0 <= frame < frames), 0)


def mask_runs(subject: SeenSubject) -> dict[str, Any] | None:
    """A subject's mask for the page, of at most 256 pixels a side: {"width", "height", "runs"}, or None without one.

    Runs go along the rows and begin with one of background.
    """
    if subject.mask is None:
        return None
    try:
        mask = rle.decode(subject.mask)
    except rle.RLEError:
        return None
    step = -(-max(mask.shape) // MASK_SIDE)
    small = mask[step // 2 :: step, step // 2 :: step] if min(mask.shape) > step else mask[::step, ::step]
    flat = small.ravel()
    bounds = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    runs = np.diff(bounds).tolist()
    return {"width": small.shape[1], "height": small.shape[0], "runs": [0, *runs] if flat[0] else runs}
