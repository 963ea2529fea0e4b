"""Keeping the evaluation set out of training: whatever shows or says the same as one of its items is dropped."""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from idc.curate.candidate import PEOPLE, Candidate, CuratedSubject, Dropped, Pixels, decode_image
from idc.curate.collection import CollectionStep, Survivors
from idc.curate.describing import model_version
from idc.curate.duplicates import FINGERPRINT
from idc.curate.embed import REASON as NO_EMBEDDING
from idc.curate.embed import EmbedFaces, EmbedSubjects
from idc.curate.faces import FaceTracks, embedder_name
from idc.curate.fingerprints import Hashes, distance, from_text, mirrored, perceptual_hash
from idc.curate.sources.shards import META as FROM_SHARDS
from idc.data.benchmark import Item
from idc.data.item_sources import ItemSource
from idc.data.video import VideoError
from idc.errors import UserError
from idc.models.embedders import ImageTextEmbedder
from idc.models.faces import Embedding, FaceBackend

VIDEO, CAPTION, PICTURE, SUBJECT = "excluded video", "excluded caption", "excluded picture", "excluded subject"
SAME_VIDEO = "video of an excluded one"


class Match(NamedTuple):
    """Why a candidate is excluded, and what it is like."""

    reason: str
    detail: str


@dataclass
class ExclusionList:
    """What is looked for, and the item that each of it belongs to.

    Attributes:
        videos: ids of source videos.
        captions: normalised caption -> item.
        hashes: perceptual hashes of the items' pictures, uint64 `[M]`; `pictures`: their items.
        vectors: name of an embedder -> (unit vectors `[K, D]`, their items).
    """

    videos: frozenset[str] = frozenset()
    captions: dict[str, str] = field(default_factory=dict)
    hashes: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))
    pictures: list[str] = field(default_factory=list)
    vectors: dict[str, tuple[np.ndarray, list[str]]] = field(default_factory=dict)


def normal_caption(text: str) -> str:
    """A caption's words in small letters, in one form of Unicode, without punctuation: equal captions are equal."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


class Exclude(CollectionStep):
    """Drops what the evaluation set has: the same source video, caption, picture or subject.

    Pictures are compared by the fingerprints that the step `Fingerprint` gives clips and references; subjects by the
    embeddings that they have by the same networks. Where a collection has subjects by several embedders, a step for
    each compares them; one that can compare none of its kind of subjects is refused, since that would be a quiet leak.

    Args:
        items: evaluation sets, such as `idc.data.item_sources.Benchmark`; their prompts and pictures are looked for.
        videos: ids of source videos, or the name of a file with one a line.
        captions: whether captions are looked for.
        bits: a clip's frame or a reference is an item's picture, or its mirror image, if their hashes differ in at most
            so many of 64 bits; None does not compare them.
        faces: embeds the faces of the items' pictures, as `EmbedFaces` embeds people; None does not compare them.
        face_cosine: from which a person is taken for an item's.
        embedder: embeds the items' pictures, as `EmbedSubjects` embeds subjects; None does not compare them.
        cosine: from which a subject is taken for an item's.
        whole_videos: what comes from the same video as something that is dropped here is dropped, too.
    """

    def __init__(
        self,
        items: Sequence[ItemSource] = (),
        videos: str | Sequence[str] = (),
        captions: bool = True,
        bits: int | None = 6,
        faces: FaceBackend | None = None,
        face_cosine: float = 0.7,
        embedder: ImageTextEmbedder | None = None,
        cosine: float = 0.95,
        whole_videos: bool = True,
    ) -> None:
        if bits is not None and not 0 <= bits < 32:
            raise UserError(f"bits={bits}: must be in [0, 31], since unlike pictures differ in about 32; 6 is usual")
        for name, value in (("face_cosine", face_cosine), ("cosine", cosine)):
            if not 0 < value <= 1:
                raise UserError(f"{name}={value}: must be above 0 and at most 1")
        self.items, self.videos, self.captions, self.bits = tuple(items), videos, captions, bits
        self.faces, self.face_cosine, self.embedder, self.cosine = faces, face_cosine, embedder, cosine
        self.whole_videos = whole_videos

    def check(self) -> None:
        """As `CollectionStep.check`: items, their pictures and the list of videos can be read."""
        self._read_items()
        _read_videos(self.videos)

    def decide(self, survivors: Survivors) -> Iterable[Dropped]:
        wanted = self.make_list()
        found: dict[str, Match] = {}
        videos: dict[str, str] = {}
        fingerprinted = not len(survivors) or not len(wanted.hashes)
        compared = _Compared(wanted.vectors, self.faces)
        for candidate in survivors:
            compared.see(candidate)
            fingerprinted |= FINGERPRINT in candidate.meta
            if match := self.match(candidate, wanted):
                found[candidate.key] = match
                videos.setdefault(candidate.video, candidate.key)
        if not fingerprinted:
            raise UserError(
                "exclude: no clip has a fingerprint to compare pictures by; add the step "
                "idc.curate.duplicates.Fingerprint behind the others, or set bits: null"
            )
        compared.check()
        for candidate in survivors:
            if candidate.key in found:
                yield candidate.dropped(self.name, *found[candidate.key])
            elif self.whole_videos and (other := videos.get(candidate.video)):
                yield candidate.dropped(self.name, SAME_VIDEO, f"{other}: {found[other].reason}, {found[other].detail}")

    def make_list(self) -> ExclusionList:
        """The list of the settings; reads the items' pictures and runs the networks over them.

        Raises:
            UserError: for items or pictures that cannot be read: what is not compared might leak.
        """
        captions, pictures = self._read_items()
        hashes = [(perceptual_hash(picture), id) for id, picture in pictures] if self.bits is not None else []
        known = [(hash, id) for hash, id in hashes if hash is not None]
        return ExclusionList(
            frozenset(_read_videos(self.videos)),
            captions if self.captions else {},
            np.array([hash for hash, _ in known], np.uint64),
            [id for _, id in known],
            dict(self._vectors(pictures)),
        )

    def _read_items(self) -> tuple[dict[str, str], list[tuple[str, Pixels]]]:
        """Normalised captions -> item, and the items' pictures with their items."""
        pictures: list[tuple[str, Pixels]] = []
        captions: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as folder:
            for source in self.items:
                items, failures = _items_of(source, Path(folder))
                if failures:
                    name, why = next(iter(failures.items()))
                    raise UserError(f"exclude: item {name!r} cannot be read: {why}")
                for item in items:
                    if normal := normal_caption(item.prompt):
                        captions.setdefault(normal, item.id)
                    pictures += _pictures(item)
        return captions, pictures

    def match(self, candidate: Candidate, wanted: ExclusionList) -> Match | None:
        """Why the candidate is excluded, or None."""
        references = [reference for subject in candidate.subjects for reference in subject.references]
        for video in (candidate.video, *(reference.video for reference in references)):
            if video in wanted.videos:
                return Match(VIDEO, video)
        if item := wanted.captions.get(normal_caption(candidate.caption)):
            return Match(CAPTION, f"item {item}")
        if self.bits is not None and len(wanted.hashes):
            texts = [*candidate.meta.get(FINGERPRINT, ()), *(r.meta.get(FINGERPRINT) for r in references)]
            if match := _same_picture(from_text([text for text in texts if text]), wanted, self.bits):
                return match
        matches = (self._same_subject(subject, wanted) for subject in candidate.subjects)
        return next((match for match in matches if match), None)

    def _same_subject(self, subject: CuratedSubject, wanted: ExclusionList) -> Match | None:
        if subject.embedding is None or subject.embedder not in wanted.vectors:
            return None
        vectors, items = wanted.vectors[subject.embedder]
        cosines = vectors @ subject.embedding
        best = int(np.argmax(cosines))
        least = self.face_cosine if self.faces and subject.embedder == embedder_name(self.faces) else self.cosine
        return Match(SUBJECT, f"item {items[best]}: cosine {cosines[best]:.3f}") if cosines[best] >= least else None

    def _vectors(self, pictures: Sequence[tuple[str, Pixels]]) -> Iterator[tuple[str, tuple[np.ndarray, list[str]]]]:
        if self.faces is not None and pictures:
            self.faces.load()
            faces = [(id, vector) for id, picture in pictures for vector in _faces(self.faces, picture)]
            self.faces.unload()
            if faces:
                yield embedder_name(self.faces), (np.stack([v for _, v in faces]), [id for id, _ in faces])
        if self.embedder is not None and pictures:
            self.embedder.load("cuda" if torch.cuda.is_available() else "cpu")
            for id, picture in pictures:
                if reason := self.embedder.unfit(picture):
                    raise UserError(f"exclude: item {id!r}: {reason}")
            vectors = self.embedder.embed_images([picture for _, picture in pictures]).numpy()
            name = model_version(self.embedder)
            self.embedder.unload()
            yield name, (vectors, [id for id, _ in pictures])


class _Compared:
    """Which lists of vectors had subjects to be compared with.

    Args:
        names: of the embedders that there are vectors by.
        faces: that of them which embeds people, where there is one; the other is for all else.
    """

    def __init__(self, names: Iterable[str], faces: FaceBackend | None) -> None:
        self._faces = embedder_name(faces) if faces else ""
        # As provenance names what a step used.
        self._models = {name: set(faces.models) if faces and name == self._faces else {name} for name in names}
        self._used: set[str] = set()
        self._missed: dict[bool, tuple[str, str, str]] = {}  # whether people -> (key, name, its embedder), the first

    def see(self, candidate: Candidate) -> None:
        if FROM_SHARDS not in candidate.meta:  # there, models tell what was done long ago, and vectors are not kept
            for step in (FaceTracks, EmbedFaces, EmbedSubjects):
                asked = set(candidate.models.get(step.name, "").split("; "))
                self._used |= {name for name, models in self._models.items() if models <= asked}
        for subject in candidate.subjects:
            embedder = "" if subject.embedding is None else subject.embedder
            if embedder in self._models:
                self._used.add(embedder)
            elif embedder or (subject.box is not None and NO_EMBEDDING not in subject.meta):
                self._missed.setdefault(subject.kind in PEOPLE, (candidate.key, subject.name, embedder))

    def check(self) -> None:
        """Raise UserError for a list that nothing was compared with, though there was something."""
        for name in self._models:
            missed = self._missed.get(name == self._faces)
            if name in self._used or missed is None:
                continue
            key, subject, other = missed
            setting, step = ("faces", "EmbedFaces") if name == self._faces else ("embedder", "EmbedSubjects")
            had = f"by {other}" if other else "not embedded"
            raise UserError(
                f"exclude: {setting} is {name}, by which no subject has an embedding to be compared ({subject!r} of "
                f"{key} is {had}); give the {setting} that the steps embed subjects by, add the step "
                f"idc.curate.embed.{step} with this one, or set {setting}: null"
            )


def _items_of(source: ItemSource, folder: Path) -> tuple[list[Item], Mapping[str, str]]:
    try:
        source.prepare()
        return source.items(folder)
    except UserError as error:
        raise UserError(f"exclude: {error}; give the evaluation set, or items: [] to train on any of it") from None


def _faces(backend: FaceBackend, picture: Pixels) -> list[Embedding]:
    return [backend.embed(picture, face) for face in backend.detect(picture)]


def _same_picture(hashes: Hashes, wanted: ExclusionList, bits: int) -> Match | None:
    """The item whose picture one of the hashes is nearest to, if near enough."""
    if not len(hashes):
        return None
    both = np.stack([hashes, mirrored(hashes)])[..., None, None]
    near = distance(both, wanted.hashes[:, None]).min((0, 1))
    best = int(np.argmin(near))
    return Match(PICTURE, f"item {wanted.pictures[best]}: {near[best]} bits apart") if near[best] <= bits else None


def _pictures(item: Item) -> Iterator[tuple[str, Pixels]]:
    for path in item.references:
        try:
            yield item.id, decode_image(path.read_bytes())
        except (OSError, VideoError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"exclude: item {item.id!r}: picture {path} cannot be read: {why}") from None


def _read_videos(videos: str | Sequence[str]) -> list[str]:
    if not isinstance(videos, str):
        return list(videos)
    try:
        lines = Path(videos).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"videos={videos!r}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return [line.strip() for line in lines if line.strip()]
