"""What of the made pictures is kept: the same subject, yet not the same picture; one subject, whole and to be seen.

Plain augmentation, whose pictures are copies by intent, is exempt from the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from idc.curate.candidate import PEOPLE, Pixels
from idc.curate.fingerprints import Hashes, distance, mirrored, perceptual_hash
from idc.curate.synthetic.masks import subject_mask
from idc.errors import UserError
from idc.metrics.copy_paste import View, compare, face_view, masked_view
from idc.metrics.facesim import find_faces
from idc.models.embedders import ImageTextEmbedder
from idc.models.faces import Embedding, FaceBackend, YuNetSFace

_MIRRORED_LANDMARKS = [1, 0, 2, 4, 3]  # left is right
FACE_SHARE = 0.25  # of the largest face's area, from which another one is somebody and not a face on a poster


class Bounds(NamedTuple):
    """What a similarity must be: `low` at least, for the same subject, and `cap` at most, for another picture of it."""

    low: float
    cap: float


@dataclass(frozen=True)
class Verdict:
    """What the checks found.

    Attributes:
        reason: "" where the picture is kept; else one of a few phrases without numbers.
        similarity: to the most similar given picture, cosine in [-1, 1]; None where nothing could be compared.
        model: what compared.
        numbers: all that was measured, by name.
    """

    reason: str = ""
    similarity: float | None = None
    model: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        return not self.reason


class Known(NamedTuple):
    """A picture, looked at once.

    Attributes:
        by: what it is compared by: "face", "image", or "" where nothing could look at it.
        embedding: unit vector `[D]`; None for `by` "".
        views: the subject in the common crop of `idc.metrics.copy_paste`, as it is and mirrored; empty for none.
        codes: perceptual hashes of the picture as it is and mirrored, `[2]`; none of a flat one.
        people: faces that are somebody's; those on posters are left out. None where nobody counted.
    """

    by: str
    embedding: Embedding | None
    views: tuple[View, ...]
    codes: Hashes
    people: int | None = None


class ReferenceCheck:
    """Compares made pictures with those they were made from.

    People are compared by their largest face, everything else by an image embedder; so are people none of whose
    pictures shows a face. What nothing can compare is not kept.

    Args:
        faces: finds and tells apart faces.
        embedder: CLIP, SigLIP or the like; None leaves all but faces without a comparison.
        face: bounds for faces. SFace: one person mostly 0.5 to 0.9, other people below 0.35; nearly one picture 0.95.
        image: bounds for the embedder. They are CLIP's; other embedders need others.
        copy_cap: most that fine structure may agree after alignment (`idc.metrics.copy_paste`), in [0, 1]: copies,
            also turned or compressed, reach 0.87 and more, the same person in another clip about 0.2.
        hash_bits: fewer differing bits of 64 (perceptual hash, also of the mirrored picture) are a copy.
        min_side: of the made picture, in pixels.
        min_contrast: least standard deviation of its luma, in levels of 255: less is blank.

    Raises:
        UserError: for bounds out of range.
    """

    def __init__(
        self,
        faces: FaceBackend | None = None,
        embedder: ImageTextEmbedder | None = None,
        face: tuple[float, float] = (0.45, 0.95),
        image: tuple[float, float] = (0.75, 0.97),
        copy_cap: float = 0.7,
        hash_bits: int = 6,
        min_side: int = 128,
        min_contrast: float = 6.0,
    ) -> None:
        for name, bounds in {"face": face, "image": image}.items():
            if len(bounds) != 2 or not -1 <= bounds[0] < bounds[1] <= 1:
                raise UserError(f"{name}={bounds}: must be (low, cap) with -1 <= low < cap <= 1")
        if not 0 < copy_cap <= 1:
            raise UserError(f"copy_cap={copy_cap}: must be above 0 and at most 1; 1 lets every copy through")
        if not 0 <= hash_bits <= 64 or min_side < 1 or min_contrast < 0:
            raise UserError(
                f"hash_bits={hash_bits}, min_side={min_side}, min_contrast={min_contrast}: must be from 0 to 64, at "
                "least 1, and 0 or more"
            )
        self.faces = YuNetSFace() if faces is None else faces
        self.embedder = embedder
        self.face, self.image = Bounds(*face), Bounds(*image)
        self.copy_cap, self.hash_bits, self.min_side, self.min_contrast = copy_cap, hash_bits, min_side, min_contrast

    @property
    def models(self) -> tuple[str, ...]:
        return self.faces.models + (self.embedder.models if self.embedder else ())

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load the networks; idempotent."""
        self.faces.load(device)
        if self.embedder is not None:
            self.embedder.load(device)

    def unload(self) -> None:
        """Free them."""
        self.faces.unload()
        if self.embedder is not None:
            self.embedder.unload()

    def describe(self) -> Mapping[str, Any]:
        """Settings that decide what is kept, plain JSON."""
        settings = {key: value for key, value in vars(self).items() if key not in ("faces", "embedder")}
        settings |= {"face": list(self.face), "image": list(self.image), "faces": list(self.faces.models)}
        embedder = self.embedder
        return settings | {"embedder": embedder and [embedder.name, embedder.fingerprint]}

    def look(self, pictures_HWC: Sequence[Pixels], kind: str) -> list[Known]:
        """The pictures of a subject of this kind, ready to be compared.

        Those of a person by face where any shows one; then a picture that shows none is compared with by its pixels
        alone. Else all by the embedder, where there is one.
        """
        if kind in PEOPLE:
            looked = [self._face(picture) for picture in pictures_HWC]
            if any(known.by for known in looked):
                return looked
        return [self._image(picture) for picture in pictures_HWC]

    def judge(
        self, made_HWC: Pixels, known: Sequence[Known], kind: str, rivals: Sequence[Known] = (), copies: bool = False
    ) -> Verdict:
        """Whether a made picture is kept.

        Args:
            known: the subject's own pictures, by `look`.
            rivals: those of other subjects: what is more like one of them shows the wrong one.
            copies: it is a copy by intent, of an editor that only moves and tints pixels (`ImageEditor.copies`):
                neither `copy_cap`, `hash_bits` nor the caps of `face` and `image` are asked for; all else is.
        """
        numbers = {"side": float(min(made_HWC.shape[:2])), "contrast": float(made_HWC.mean(-1).std())}
        if numbers["side"] < self.min_side:
            return Verdict("too small", numbers=numbers)
        if numbers["contrast"] < self.min_contrast:
            return Verdict("blank", numbers=numbers)
        by = next((one.by for one in known if one.by), "")
        if not by:
            return Verdict("nothing compares it", numbers=numbers)
        made = self._face(made_HWC) if by == "face" else self._image(made_HWC)
        if by == "image" and not made.by:
            return Verdict("nothing compares it", numbers=numbers)
        people = made.people if kind not in PEOPLE or by == "face" else self._face(made_HWC).people
        if people is not None:
            numbers["people"] = float(people)
            if people > 1 or (by == "face" and not people):
                return Verdict("several people" if people else "no face", numbers=numbers)
        return self._compare(made, known, rivals, copies, numbers)

    def _compare(
        self, made: Known, known: Sequence[Known], rivals: Sequence[Known], copies: bool, numbers: dict[str, float]
    ) -> Verdict:
        similarity = _most_like(made, known)
        rival = _most_like(made, rivals) if any(one.by == made.by for one in rivals) else -1.0
        numbers |= {"similarity": similarity, "rival": rival}
        bounds = self.face if made.by == "face" else self.image
        if similarity < bounds.low or rival > similarity:
            reason = "another subject"
        elif not copies and (self._copied(made, known, numbers) or similarity > bounds.cap):
            reason = "copy"
        else:
            reason = ""
        return Verdict(reason, similarity, self._model(made.by), numbers)

    def _copied(self, made: Known, known: Sequence[Known], numbers: dict[str, float]) -> bool:
        """By its pixels, mirrored or not."""
        numbers["bits"] = float(min(_bits(one, made) for one in known))
        # Of the subject alone: one that is cut out and put before another background is a copy as well.
        pairs = [(one.views[0], view) for one in known for view in made.views if one.views]
        numbers["copy"] = max((compare(*pair).subject for pair in pairs), default=0.0)
        return numbers["bits"] < self.hash_bits or numbers["copy"] > self.copy_cap

    def _model(self, by: str) -> str:
        return self.faces.models[-1] if by == "face" or self.embedder is None else self.embedder.name

    def _face(self, picture_HWC: Pixels) -> Known:
        """By its largest face."""
        found = find_faces(picture_HWC, self.faces)
        if found is None:
            return Known("", None, (), _codes(picture_HWC), 0)
        picture, faces = found
        largest = max(faces, key=lambda face: face.box.area)
        people = sum(face.box.area >= FACE_SHARE * largest.box.area for face in faces)
        turned = largest.landmarks[_MIRRORED_LANDMARKS] * (-1, 1) + (picture.shape[1] - 1, 0)
        views = face_view(picture, largest.landmarks), face_view(_mirrored(picture), turned)
        return Known("face", self.faces.embed(picture, largest), views, _codes(picture_HWC), people)

    def _image(self, picture_HWC: Pixels) -> Known:
        mask = subject_mask(picture_HWC)
        # Its outline against the background says little: all round things would be copies of each other.
        inside = np.where(mask[..., None], picture_HWC, picture_HWC[mask].mean(0).astype(np.uint8))
        both = masked_view(inside, mask), masked_view(_mirrored(inside), mask[:, ::-1])
        views, codes = tuple(view for view in both if view is not None), _codes(picture_HWC)
        if self.embedder is None or self.embedder.unfit(picture_HWC):
            return Known("", None, views, codes)
        return Known("image", self.embedder.embed_images([picture_HWC])[0].numpy(), views, codes)


def _mirrored(picture_HWC: Pixels) -> Pixels:
    return np.ascontiguousarray(picture_HWC[:, ::-1])


def _codes(picture_HWC: Pixels) -> Hashes:
    hash = perceptual_hash(picture_HWC)
    own = np.array([] if hash is None else [hash], np.uint64)
    return np.concatenate([own, mirrored(own)])


def _bits(one: Known, made: Known) -> int:
    """In which the hashes differ, mirrored or not; 64 where there are none to compare."""
    if not (len(one.codes) and len(made.codes)):
        return 64
    return int(distance(one.codes[:1, None], made.codes[:, None]).min())


def _most_like(made: Known, known: Sequence[Known]) -> float:
    """Highest cosine with those that are compared by the same."""
    assert made.embedding is not None
    alike = [one.embedding for one in known if one.by == made.by and one.embedding is not None]
    return min(1.0, max((float(embedding @ made.embedding) for embedding in alike), default=-1.0))
