"""The nouns of curation: candidates on their way to being samples, what was dropped and why, sources and steps.

A source yields units (a video file, a record of a dataset, an image); a worker opens a unit into candidates; ordered
steps turn each candidate into itself with more known about it, into several, or into a `Dropped`. Nothing leaves
without one of these, so that read = kept + dropped. What a step makes of a candidate depends on it, at most also on
those that come with it in a call (the next `Step.batch` of its chunk, so on the chunk), and never on what came in
earlier calls nor on anything drawn that is not seeded by the candidate's key: then shards are equal to the byte
wherever and however often they are made.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from idc.curate.describing import model_version, plain_settings, words_of
from idc.curate.segments import Segment
from idc.data.video import VideoError
from idc.errors import UserError, nearest

Pixels = NDArray[np.uint8]  # RGB [H, W, 3], or [T, H, W, 3] for a clip
Mask = NDArray[np.bool_]  # [H, W]
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
KINDS = ("person", "face", "clothing", "object", "place")  # of subjects
PEOPLE = ("person", "face")  # those that faces tell apart


class Box(NamedTuple):
    """Corners in pixels of the picture that it belongs to; the right and bottom edges are outside."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)

    def overlap(self, other: Box) -> float:
        """Intersection over union, in [0, 1]."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        shared = max(0.0, width) * max(0.0, height)
        return shared / (self.area + other.area - shared) if shared else 0.0


@dataclass(frozen=True)
class Reference:
    """A picture of a subject, as it goes into a shard.

    Attributes:
        image: encoded, of the kind `ext` ("png", "jpg", "webp").
        origin: how it was come by: "same_frame", "other_moment", "other_video", "given", "augmented", or
            "generated:<backend>".
        video, seconds: where and when it was taken, where that is known.
        similarity: to the subject in the clip, cosine in [-1, 1], by `model`; None where nobody compared.
        meta: plain JSON: what else is known (prompt and seed of a generated one, mask area, ...).
    """

    image: bytes
    ext: str = "png"
    origin: str = "other_moment"
    video: str = ""
    seconds: float | None = None
    similarity: float | None = None
    model: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def pixels(self) -> Pixels:
        """RGB uint8 `[H, W, 3]`."""
        return decode_image(self.image)


@dataclass(frozen=True)
class CuratedSubject:
    """Somebody or something that the clip shows.

    Attributes:
        name: words of the caption that name it; unique within the candidate.
        kind: of `KINDS`; animals are objects, too.
        box: in pixels of the clip's frame number `frame`.
        mask: of the same frame, `[H, W]`, or None.
        frame: of the clip, from 0; before its frames are chosen, of the span, and without one of the whole source.
        score: of the detector, in [0, 1].
        embedding: float32 `[D]` of length 1, by which subjects of other clips are compared; `embedder` names the model
            and its version, and only equal ones are compared.
        references: its pictures, the first one first choice. The sample gets the first.
        track: (rank of the source's frame, box in pixels of the source's picture), rising: where else it is seen.
    """

    name: str
    kind: str = "object"
    box: Box | None = None
    mask: Mask | None = None
    frame: int = 0
    score: float = 0.0
    embedding: NDArray[np.float32] | None = None
    embedder: str = ""
    references: tuple[Reference, ...] = ()
    track: tuple[tuple[int, Box], ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


class EncodedClip(NamedTuple):
    """A clip as it goes into a shard: an H.264 MP4 of `frames` frames of `height` x `width` pixels. Where only what is
    known of a clip is wanted, `mp4` is empty."""

    mp4: bytes
    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Candidate:
    """What may become a sample, and all that is known of it.

    It is a value: a step returns a changed copy (`changed`, `scored`). Pixels are not part of it until the `Cut` step:
    up to there steps look at the source through `idc.curate.reading`.

    Attributes:
        key: unique over the whole collection; letters, digits, - and _, at most 80. `key_of` makes one.
        source: name of the source that it comes from.
        video: id of the source video (unique within the source): what splits and pairs go by, never the clip.
        path: file or fsspec URL of the video or image.
        span: [first, end) ranks of the source's frames; None for all of it.
        crop: what of the source's upright picture is used, in its pixels; None for all of it.
        ranks: rank of the source's frame for each frame of the clip, once its length and rate are decided.
        fps: of the clip, in frames per second; 0 until it is decided.
        clip: the clip's pixels, uint8 `[T, H, W, 3]`, once cut; a still image is a clip of one frame.
        encoded: the clip as a file. The engine makes it of `clip` behind the last step, and lets the pixels go; a
            source whose clips are files already, of the right frames and size, may give it itself.
        caption: what it shows; "" until it is known.
        subjects: who and what it shows.
        scores: by name; units as the step that gave them says.
        models: step -> model and version, for the provenance.
        licence: of the source material.
        safety: verdicts of safety filters by name, carried along.
        meta: plain JSON: everything else, under the name of the step or source that knows it.
        segment: which part of a long video it is, as long as it has no span; None for all of it.
    """

    key: str
    source: str
    video: str
    path: str
    span: tuple[int, int] | None = None
    crop: Box | None = None
    ranks: tuple[int, ...] = ()
    fps: float = 0.0
    clip: Pixels | None = None
    encoded: EncodedClip | None = None
    caption: str = ""
    subjects: tuple[CuratedSubject, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""
    safety: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    segment: Segment | None = None

    def changed(self, **changes: Any) -> Candidate:
        """A copy with other attributes; `meta` is added to what is there."""
        if "meta" in changes:
            changes["meta"] = {**self.meta, **changes["meta"]}
        return replace(self, **changes)

    def scored(self, **scores: float) -> Candidate:
        """A copy with more scores."""
        return replace(self, scores={**self.scores, **scores})

    def dropped(self, step: str, reason: str, detail: str = "") -> Dropped:
        """This candidate, dropped; of a segment, which one."""
        if self.segment is not None:
            detail = f"{detail} (segment {self.segment})".lstrip()
        return Dropped(self.source, self.video, self.key, step, reason, detail)


@dataclass(frozen=True)
class Dropped:
    """A unit or candidate that gave no sample, and why.

    Attributes:
        source, video: where it comes from.
        key: of the candidate; "" where a whole unit is dropped.
        step: name of the step that dropped it, or "source".
        reason: one of a few phrases without numbers, to be counted.
        detail: the numbers: the value and the rule.
    """

    source: str
    video: str
    key: str
    step: str
    reason: str
    detail: str = ""


Outcome = Candidate | Dropped


class Unit(NamedTuple):
    """What a source hands to a worker: small and plain, since there may be millions.

    Attributes:
        source: number of the source in the recipe's list.
        id: unique within the source, and the same each time the source is read.
        payload: plain JSON; all that `Source.open` needs besides its own settings.
    """

    source: int
    id: str
    payload: Mapping[str, Any]


class Source(ABC):
    """Where raw material comes from. It is pickled to workers: it holds settings and no open files.

    Attributes:
        name: as provenance, statistics and drops show it.
        licence: of its material, where the material does not say.
    """

    name: str
    licence: str = ""

    @property
    def identity(self) -> int:
        """Number of the way in which its units are told apart. A folder that was begun by another is not continued,
        since nobody could say which of its units are the same."""
        return 1

    @abstractmethod
    def units(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(id, payload) of each unit, always in the same order, streamed: a source may not fit into memory.

        Raises:
            UserError: where there is no such folder or file, or nothing in it.
        """

    @abstractmethod
    def open(self, id: str, payload: Mapping[str, Any]) -> Iterator[Outcome]:
        """The candidates of a unit, in a worker. A bad unit is a `Dropped` of step "source", never an exception."""

    def describe(self) -> Mapping[str, Any]:
        """Settings that decide what comes out, plain JSON: a collection that was begun with others is not continued."""
        return plain_settings(self)


class Step:
    """One ordered part of the way from raw material to samples.

    Attributes:
        name: in tables and drops; the class's name in words by default.
        heavy: whether it runs a network, and so on a GPU worker where there is one.
        batch: how many candidates it takes in a call (heavy steps); others take one after another. They are the next
            ones of a chunk. What comes out for one is the same in any company, but for models that write or find:
            padded to one length, what is asked together rounds differently, and a near tie may tip. They may depend on
            the batch, and so on the chunk; on one GPU also on whether its memory sufficed for the batch at once.
    """

    name: str = ""
    heavy: ClassVar[bool] = False
    batch: int = 1

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = words_of(cls)

    @property
    def models(self) -> tuple[str, ...]:
        """Networks and tools with their versions; they go into each sample's provenance under the step's name, in the
        place of what an earlier run used. A step that did nothing to a sample of earlier shards gives it back as it
        was, or with a copy of its `models`: then those stay."""
        return tuple(map(model_version, self.networks))

    @property
    def networks(self) -> tuple[Any, ...]:
        """What is loaded and freed with the step, where it says no more than that of itself."""
        return ()

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load the networks; idempotent. Once a worker."""
        for network in self.networks:
            network.load(device)

    def unload(self) -> None:
        """Free them."""
        for network in self.networks:
            network.unload()

    def __call__(self, candidates: Sequence[Candidate]) -> list[Sequence[Outcome]]:
        """For each candidate what became of it: itself, changed; several; or a drop. Never nothing.

        A picture or clip that cannot be read drops its candidate.
        """
        found: list[Sequence[Outcome]] = []
        for candidate in candidates:
            try:
                outcome = self.apply(candidate)
            except VideoError as error:
                outcome = candidate.dropped(self.name, "unreadable video", str(error))
            found.append([outcome] if isinstance(outcome, Candidate | Dropped) else list(outcome))
        return found

    def apply(self, candidate: Candidate) -> Outcome | Sequence[Outcome]:
        """What becomes of one candidate. Steps that gain from batches override `__call__` in its place."""
        raise NotImplementedError(f"{type(self).__name__}: neither apply nor __call__ is there")

    def describe(self) -> Mapping[str, Any]:
        """Settings that decide what comes out, plain JSON."""
        return plain_settings(self)

    def remark(self) -> str:
        """A line for the report of a run, over all its workers: what was spent, for example; "" for none. It is asked
        of a step that never worked: what it tells lies where all workers leave it."""
        return ""


def key_of(stem: str, identity: str, start: int | None = None) -> str:
    """A readable key, unique by a hash of `identity` (source and video id); `start` tells clips of a video apart.

    >>> key_of("My film (1)", "films/My film (1).mp4", 81)
    'My-film-1-2b6d9e25-000081'
    """
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:48] or "video"
    key = f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    return key if start is None else f"{key}-{start:06d}"


def check_kinds(setting: str, kinds: Iterable[str]) -> None:
    """Raise `UserError` for a kind that subjects cannot have."""
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"{setting}: {kind!r} is no kind of subjects{nearest(kind, KINDS)}")


def encode_png(pixels_HWC: Pixels) -> bytes:
    """RGB uint8 `[H, W, 3]` as PNG; equal pixels give equal bytes."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def decode_image(data: bytes) -> Pixels:
    """An encoded picture as RGB uint8 `[H, W, 3]`, upright; grey becomes RGB, and what is transparent white.

    Raises:
        VideoError: for bytes that are no picture.
    """
    return decode_cutout(data)[0]


def decode_cutout(data: bytes) -> tuple[Pixels, Mask | None]:
    """As `decode_image`, with the mask `[H, W]` of what is opaque, at least by half; None without transparency.

    Raises:
        VideoError: for bytes that are no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened)
            mask = None
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would not scale
                image = Image.fromarray((np.asarray(image, np.int64).clip(0, 65535) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                opaque = np.asarray(image.getchannel("A")) >= 128
                mask = None if opaque.all() else opaque
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return np.asarray(image.convert("RGB")), mask
    except UnidentifiedImageError:  # whose message is another in every run
        raise VideoError("no picture: of no known format") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"no picture: {error}") from None
