"""Pictures of subjects as a source, such as the paper's subject-image set (people and clothing, section B.1)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from idc.curate.candidate import (
    Box,
    Candidate,
    CuratedSubject,
    Dropped,
    Outcome,
    Pixels,
    Reference,
    Source,
    check_kinds,
    decode_cutout,
    encode_png,
    key_of,
)
from idc.curate.geometry import box_of_mask
from idc.curate.reaching import UnreachedError, reaching
from idc.curate.sources.listing import File, is_image, is_text, walk, with_marks
from idc.curate.sources.sidecars import Licences, SidecarError, identity_of, unit_of, with_sidecars
from idc.data import storage
from idc.data.scan import IMAGE_EXTS
from idc.data.video import VideoError
from idc.errors import UserError, nearest

SAME = ("file", "folder")


class SubjectImages(Source):
    """All pictures below a folder, local or behind an fsspec URL: each a candidate of one frame that shows one subject.

    The picture itself is a reference of its subject, cut out by its alpha channel (on white) where it has one. With
    same_subject="folder" all pictures of a folder show one subject: pictures beside a picture come first among its
    references, since its own one pays for copying, and the folder is what splits and pairs go by.

    What lies beside a picture is read as that beside a video is (`idc.curate.sources.sidecars`); subjects that it names
    take the place of the one that is made of the settings.

    Args:
        path: the folder.
        kind: of the subjects: "person", "face", "clothing", "object" or "place".
        kinds: other kinds by pattern of the relative path ("clothes/*": "clothing"); the first that fits counts.
        name, licence, licences: as in `VideoFolder`.
        subject: words that name the subject; its kind by default. "{folder}" in it stands for its folder's name.
        same_subject: "file" or "folder".
        others: with "folder", how many pictures beside a picture become references of it.
        max_side: references larger than that are scaled down, in pixels.
        leave_out: a local folder below `path` that is not looked into.

    Raises:
        UserError: for an unknown kind, or a number out of its range.
    """

    def __init__(
        self,
        path: str,
        kind: str = "person",
        kinds: Mapping[str, str] | None = None,
        name: str = "subject-images",
        licence: str = "",
        licences: Mapping[str, str] | str = "",
        subject: str = "",
        same_subject: Literal["file", "folder"] = "file",
        others: int = 3,
        max_side: int = 1024,
        leave_out: str = "",
    ) -> None:
        check_kinds("kind", [kind])
        check_kinds("kinds", (kinds or {}).values())
        if same_subject not in SAME:
            raise UserError(f"same_subject={same_subject!r} is not known{nearest(same_subject, SAME)}")
        if others < 0 or max_side < 16:
            raise UserError(f"others={others}, max_side={max_side}: 0 or more, and 16 pixels or more")
        # What begins with _ is not in `describe`: the folder may be moved while a collection is made of it.
        self._path, self._leave_out = str(path), str(leave_out)
        self.kind, self.kinds, self.name, self.licence = kind, dict(kinds or {}), name, licence
        self.subject, self.same_subject, self.others, self.max_side = subject, same_subject, others, max_side
        self.licences = Licences(licences, self._path)

    @property
    def identity(self) -> int:
        return identity_of(self._path)

    def units(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """A unit for each picture, with an id by `idc.curate.sources.sidecars.unit_of`."""
        found = False
        for files in walk(self._path, self._leave_out):
            listed = {file.path: file for file in files}
            pictures = [file for file in files if is_image(PurePosixPath(file.path).name)]
            pictures = list(with_marks(pictures, self._path))
            for number, file in enumerate(pictures):
                found = True
                id, payload = unit_of(file, listed, self._path)
                yield id, {**payload, "others": [list(other) for other in self._beside(pictures, number)]}
        if not found:
            raise UserError(f"path={self._path}: no pictures in it")

    def _beside(self, pictures: list[File], number: int) -> list[File]:
        """The pictures of a folder that follow one, in a circle."""
        if self.same_subject == "file":
            return []
        following = [*pictures[number + 1 :], *pictures[:number]]
        return [file for file in following if is_text(file.path)][: self.others]

    def open(self, id: str, payload: Mapping[str, Any]) -> Iterator[Outcome]:
        """One candidate, or why the picture gives none."""
        path = payload["path"]
        if "problem" in payload:
            yield Dropped(self.name, path, "", "source", payload["problem"])
            return
        key = key_of(PurePosixPath(path).stem, f"{self.name}/{path}")
        licence = self.licences.of(path, self.licence)
        place = storage.join(self._path, path)
        candidate = Candidate(key, self.name, self._video(path), place, span=(0, 1), licence=licence)
        try:
            subject, own = self._look(path)
            candidate = with_sidecars(candidate, self._path, path, payload["beside"])
        except VideoError as error:
            yield candidate.dropped("source", "unreadable picture", str(error))
        except SidecarError as error:
            yield candidate.dropped("source", "side-car cannot be read", str(error))
        else:
            if not candidate.subjects:
                others = self._references([path for path, *_ in payload["others"]])
                candidate = candidate.changed(subjects=(replace(subject, references=(*others, own)),))
            yield candidate

    def _video(self, path: str) -> str:
        folder = str(PurePosixPath(path).parent)
        return path if self.same_subject == "file" or folder == "." else folder

    def _look(self, path: str) -> tuple[CuratedSubject, Reference]:
        """The subject that a picture shows, and the picture as a reference of it."""
        try:
            data = read_picture(storage.join(self._path, path))
            pixels, mask = decode_cutout(data)
        except VideoError as error:
            raise VideoError(f"{path}: {error}") from None
        height, width = pixels.shape[:2]
        box = Box(0, 0, width, height)
        if mask is not None:
            found = box_of_mask(mask)
            if found is None:
                raise VideoError(f"{path}: all of it is transparent")
            box = found
        kind = next((kind for pattern, kind in self.kinds.items() if fnmatchcase(path, pattern)), self.kind)
        folder = PurePosixPath(path).parent.name.replace("_", " ")
        name = " ".join(self.subject.replace("{folder}", folder).split()) or kind
        image, ext = encode_reference(data, pixels, None if mask is None else box, self.max_side)
        reference = Reference(image, ext, "given", video=path, seconds=0.0)
        return CuratedSubject(name, kind, box, mask, score=1.0), reference

    def _references(self, paths: Sequence[str]) -> Iterator[Reference]:
        """Those of some pictures that can be read; the others are dropped as candidates of their own."""
        for path in paths:
            with suppress(VideoError):
                yield self._look(path)[1]


def read_picture(path: str) -> bytes:
    """The bytes of a picture's file.

    Raises:
        VideoError: where it is not there, or empty.
        UnreachedError: where it cannot be read now.
    """
    try:
        with reaching(path), storage.open_read(path) as stream:
            data = stream.read()
    except UnreachedError:
        raise
    except Exception as error:  # every file system behind fsspec has its own
        raise VideoError(f"cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})") from None
    if not data:
        raise VideoError("the file is empty")
    return data


def encode_reference(data: bytes, pixels: Pixels, box: Box | None, max_side: int) -> tuple[bytes, str]:
    """A picture as a shard has it, (bytes, extension): the file as it is where any reader shows it as we do, a PNG of
    the box, scaled down to `max_side`, where not."""
    from PIL import ExifTags, Image

    with Image.open(io.BytesIO(data)) as image:
        ext = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}.get(image.format or "", "")
        plain = image.mode in ("RGB", "L") and not image.has_transparency_data
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    if box is None and ext in IMAGE_EXTS and plain and upright and max(pixels.shape[:2]) <= max_side:
        return data, ext
    left, top, right, bottom = map(int, box or (0, 0, pixels.shape[1], pixels.shape[0]))
    shown = Image.fromarray(pixels[top:bottom, left:right])
    shown.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return encode_png(np.asarray(shown)), "png"
