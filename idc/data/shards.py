"""Writing samples as WebDataset tars and reading one back by its place in the index.

One sample is the members {key}.mp4, {key}.txt (caption), {key}.json (what is known of it), {key}.ref0.png ... (its
references in order). A preference pair has {key}.loser.mp4 too, the worse clip of the two. Any webdataset reader reads
them.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from idc.data import storage
from idc.data.index import Entry, Member
from idc.data.scan import IMAGE_EXTS, VIDEO_EXTS, reference_number
from idc.errors import UserError, nearest
from idc.types import Sample, Subject

LOSER = "loser."  # before the extension of a preference pair's worse clip

Reference = tuple[str, bytes, str]  # (name, encoded image, extension)


class SampleError(Exception):
    """A sample that cannot be used; `reason` is one short line for the quarantine file."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def check_prefix(prefix: str) -> None:
    """Raise `UserError` for what shards' names cannot begin with."""
    if not re.fullmatch(r"[\w-]+", prefix, re.ASCII):
        near = re.sub(r"[^\w-]+", "-", prefix.removesuffix(".tar"), flags=re.ASCII).strip("-") or "shard"
        raise UserError(f"prefix={prefix!r}: letters, digits, - and _ only; did you mean {near!r}?")


class ShardWriter:
    """Write samples into `{prefix}-{number:06d}.tar` files of `samples_per_shard` each.

    A shard has a temporary name until it is complete, so that an interrupted run leaves no half shard behind. Bytes
    depend on the samples alone. Use as a context manager: leaving it by an exception discards the open shard.
    """

    def __init__(
        self, root: str | Path, prefix: str = "shard", samples_per_shard: int = 1000, first_shard: int = 0
    ) -> None:
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard={samples_per_shard}: must be at least 1")
        check_prefix(prefix)
        if not storage.is_url(root):
            Path(root).mkdir(parents=True, exist_ok=True)
        self.root, self.prefix, self.samples_per_shard = root, prefix, samples_per_shard
        self.shards: list[str] = []  # names of the complete ones
        self._number = first_shard
        self._stack: ExitStack | None = None
        self._tar: Any = None
        self._keys: set[str] = set()

    def write(
        self,
        key: str,
        video: bytes,
        caption: str,
        references: Sequence[Reference] = (),
        *,
        fps: float,
        frames: int,
        height: int,
        width: int,
        source: str = "",
        licence: str = "",
        meta: Mapping[str, Any] | None = None,
        loser: bytes | None = None,
    ) -> None:
        """Add one sample.

        Args:
            key: unique within the shard; letters, digits, - and _.
            video: an MP4 with exactly `frames` frames of `height` x `width` pixels.
            caption: what the clip shows.
            references: (name, encoded image, extension such as "png") of each subject, in order.
            fps: frames per second.
            source: where the clip comes from.
            licence: under which licence.
            meta: plain JSON; comes back as `Sample.meta`.
            loser: of a preference pair, the worse clip: an MP4 of the same frames and size.

        Raises:
            UserError: for a key, an extension or a number that cannot be written.
        """
        from idc.data.video import decoder_version

        if not re.fullmatch(r"[\w-]{1,80}", key, re.ASCII):
            raise UserError(f"key={key!r}: 1 to 80 letters, digits, - and _ only (a dot would end the key)")
        if key in self._keys:
            raise UserError(f"key={key!r} comes twice in a shard")
        if min(frames, height, width) < 1 or fps <= 0:
            raise UserError(f"{key}: frames={frames}, height={height}, width={width}, fps={fps}: must be above 0")
        record = {
            "frames": frames,
            "height": height,
            "width": width,
            "fps": fps,
            "references": [{"name": name} for name, _, _ in references],
            "source": source,
            "licence": licence,
            "decoder": decoder_version(),
            "meta": dict(meta or {}),
        }
        self._open().write(_members(key, video, caption, references, record, loser))
        self._keys.add(key)
        if len(self._keys) == self.samples_per_shard:
            self.close()

    def close(self) -> None:
        """Complete the open shard, if any."""
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.close()
            self.shards.append(self._name())
            self._number += 1
            self._keys.clear()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._stack is not None:
            self._stack.__exit__(kind, error, trace)
            self._stack = None

    def _name(self) -> str:
        return f"{self.prefix}-{self._number:06d}.tar"

    def _open(self) -> Any:
        from webdataset.writer import TarWriter

        if self._stack is None:
            self._stack = ExitStack()
            stream = self._stack.enter_context(storage.open_atomic(storage.join(self.root, self._name())))
            # Fixed owner and time make equal samples equal bytes; encoder=False keeps webdataset from pickling.
            tar = TarWriter(stream, user="idc", group="idc", mtime=0, encoder=False)
            self._tar = self._stack.enter_context(tar)
        return self._tar


def _members(
    key: str,
    video: bytes,
    caption: str,
    references: Sequence[Reference],
    record: Mapping[str, Any],
    loser: bytes | None,
) -> dict[str, Any]:
    """A sample's files by extension, in their order in the tar."""
    members: dict[str, Any] = {"__key__": key, "mp4": video}
    if loser is not None:  # before the .json, which a cut tar has then only with it
        members[f"{LOSER}mp4"] = loser
    members["txt"] = caption.encode()
    members["json"] = json.dumps(record, ensure_ascii=False, sort_keys=True).encode()
    for number, (_, image, ext) in enumerate(references):
        if ext not in IMAGE_EXTS:
            raise UserError(f"{key}: a reference of kind {ext!r} cannot be written{nearest(ext, IMAGE_EXTS)}")
        members[f"ref{number}.{ext}"] = image
    return members


def read_sample(root: str | Path, entry: Entry, decode_video: bool = True, verify: bool = True) -> Sample:
    """Read one sample at its place in the shard: one byte range, no pass over the tar.

    Args:
        root: folder or fsspec URL that the index belongs to.
        entry: the sample's entry in the index.
        decode_video: False leaves `video_CTHW` None (where cached features take its place).
        verify: compare the bytes with the index's sha256.

    Returns:
        the sample, with video `[3, T, H, W]` and references `[3, H, W]` as float32 in [-1, 1].

    Raises:
        SampleError: for anything wrong with it: truncated, broken, missing or of the wrong size.
    """
    return parse_sample(read_members(root, entry, verify), entry, decode_video)


def parse_sample(files: Mapping[str, bytes], entry: Entry, decode_video: bool = True) -> Sample:
    """The sample of `read_sample` from its members' bytes (the loader decodes only its window of the clip itself)."""
    record = _json(files.get("json", b"{}"))
    if "txt" not in files:
        raise SampleError("missing member: txt")
    names = [str(item.get("name", "")) for item in record.get("references", ()) if isinstance(item, dict)]
    pictures = sorted((reference_number(ext), ext) for ext in files if reference_number(ext) >= 0)
    if len(pictures) != entry.bucket.subjects:
        raise SampleError(f"missing member: {len(pictures)} references, the index says {entry.bucket.subjects}")
    names += [""] * (len(pictures) - len(names))
    subjects = tuple(
        Subject(decode_image(files[ext], ext), name) for (_, ext), name in zip(pictures, names, strict=False)
    )
    meta = {"source": record.get("source", ""), "licence": record.get("licence", ""), **record.get("meta", {})}
    return Sample(
        id=entry.id,
        caption=files["txt"].decode("utf-8", "replace").strip(),
        video_CTHW=_video(files, entry) if decode_video else None,
        loser_CTHW=_video(files, entry, LOSER) if decode_video and clip_ext(files, LOSER) else None,
        subjects=subjects,
        fps=entry.fps,
        meta=meta,
        features=_features(files),
    )


def read_members(root: str | Path, entry: Entry, verify: bool = True) -> dict[str, bytes]:
    """The bytes of a sample's members by extension, checked against the tar's headers and the index.

    Raises:
        SampleError: if the shard cannot be read there or holds something else.
    """
    members = entry.members
    start = min(member.offset for member in members) - tarfile.BLOCKSIZE
    end = max(member.offset + member.size for member in members)
    try:
        block = storage.read_range(storage.join(root, entry.shard), start, end - start)
    except FileNotFoundError as error:
        raise SampleError(f"missing shard: {entry.shard}") from error
    except OSError as error:
        raise SampleError(f"unreadable shard {entry.shard}: {error.strerror or error}") from error
    if len(block) < end - start:
        raise SampleError(f"truncated: {entry.shard} ends {end - start - len(block)} bytes too early")
    files, digest = {}, hashlib.sha256()
    for member in members:
        offset = member.offset - start
        _check_header(block[offset - tarfile.BLOCKSIZE : offset], entry, member)
        files[member.ext] = block[offset : offset + member.size]
        digest.update(files[member.ext])
    if verify and digest.hexdigest() != entry.sha256:
        raise SampleError("broken: the bytes do not match the index's sha256")
    return files


def decode_image(data: bytes, name: str = "image") -> Tensor:
    """An encoded picture as float32 `[3, H, W]` in [-1, 1]; what is transparent becomes white.

    Raises:
        SampleError: if it cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                picture = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
            else:
                picture = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError(f"broken {name}: {error}") from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(127.5).sub_(1)


def _check_header(header: bytes, entry: Entry, member: Member) -> None:
    """Raise unless the tar header before a member's bytes is that member's."""
    expected = f"{entry.key}.{member.ext}"
    if header.startswith(expected.encode() + b"\0") and header[124:136] == b"%011o\0" % member.size:
        return  # nearly always; parsing the whole header is 15% of reading a sample whose features are cached
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise SampleError(f"missing member: no tar header for {expected}") from error
    # Names over 100 characters may be cut here: the whole one is then in an extension block before.
    same = info.name == expected or (len(expected) > 100 and expected.startswith(info.name[:90]))
    if not same:
        raise SampleError(f"missing member: {info.name} where the index has {expected}")
    if info.size != member.size:
        raise SampleError(f"wrong size: {expected} has {info.size} bytes, the index says {member.size}")


def clip_ext(files: Container[str], prefix: str = "") -> str | None:
    """The extension of a clip among a sample's members, of its worse one with `LOSER`; None where there is none."""
    return next((prefix + ext for ext in VIDEO_EXTS if prefix + ext in files), None)


def _video(files: Mapping[str, bytes], entry: Entry, prefix: str = "") -> Tensor:
    from idc.data.video import VideoError
    from idc.data.video import decode_video as decode

    ext = clip_ext(files, prefix)
    if ext is None:
        raise SampleError("missing member: no clip (.mp4 or .webm)")
    try:
        video_THWC = decode(files[ext])
    except VideoError as error:
        raise SampleError(f"broken {ext}: {error}") from error
    frames, height, width, _ = entry.bucket
    if video_THWC.shape[:3] != (frames, height, width):
        got = f"{video_THWC.shape[0]} frames of {video_THWC.shape[1]}x{video_THWC.shape[2]}"
        raise SampleError(f"wrong size: the clip has {got}, the index says {frames} of {height}x{width}")
    video_CTHW = torch.from_numpy(video_THWC).permute(3, 0, 1, 2)
    return video_CTHW.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def _features(files: Mapping[str, bytes]) -> dict[str, Tensor] | None:
    """Arrays stored with the sample: {name}.npy under its name, all of {name}.safetensors under their own."""
    import safetensors.torch

    features: dict[str, Tensor] = {}
    for ext, data in files.items():
        try:
            if ext == "npy" or ext.endswith(".npy"):
                features[ext.removesuffix(".npy")] = torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
            elif ext.endswith("safetensors"):
                features |= safetensors.torch.load(data)
        except Exception as error:  # a broken array fails in many ways, and none may stop a run
            raise SampleError(f"broken {ext}: {error}") from error
    return features or None


def _json(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise SampleError(f"broken json: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("meta", {}), dict):
        raise SampleError("broken json: not a record")
    return record
