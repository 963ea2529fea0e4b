"""NexusScore: whether the subjects of the references are in the video, and look like them. Two measures of one name.

paper (appendix C): Grounded-SAM cuts the subject out of each frame; mean cosine of an image encoder between cut-out
    and reference over ALL frames, 0 where nothing is found. Here both are cropped to the mask and padded to a square,
    since the encoder would see little of a small subject in a black frame (`crop=False` is the formula to the letter).
opens2v-1.0, opens2v-1.1: boxes of an image-guided detector, sifted by confidence and by GME against the label; mean
    GME cosine of what is left, DIVIDED by the number of frames with a box. The incentive is inverse: a subject seen
    in one frame of 32 scores up to 32 times what it scores when seen in all. The details of each score hold the plain
    mean over all frames and the share of frames in which the subject is found, which have no such fault. The
    benchmark's detector, YOLO-World with an image prompt, has no class in transformers: OWLv2 takes its place, and
    figures compare with published ones only as far as the two detectors' confidences do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from idc.errors import UserError, nearest
from idc.metrics.base import Clip, Reference, Score, VideoMetric, sample_frames
from idc.metrics.gme import INSTRUCTION
from idc.metrics.total import PROTOCOLS
from idc.models.batches import in_batches, same_pictures
from idc.models.embedders import CLIPEmbedder, GMEEmbedder, ImageTextEmbedder
from idc.models.grounding import Detector, GroundedMasks, Owlv2ByPicture, Query, has_word
from idc.models.pretrained import sliver

BOX = 0.5  # confidence from which a frame counts as one with a box
CONFIDENCE, LABEL_MATCH = 0.6, 0.30  # what a box needs to be compared with the reference
CUT_OUTS = 32  # in memory at a time


class Look(NamedTuple):
    """A box found in one frame for one reference: the detector's confidence and GME's cosines, each in [-1, 1]."""

    confidence: float
    label: float
    reference: float

    @property
    def kept(self) -> bool:
        return self.confidence > CONFIDENCE and self.label > LABEL_MATCH


def benchmark_score(looks: Sequence[Sequence[Look]]) -> tuple[float | None, dict[str, float]]:
    """The benchmark's rule over all (frame, reference) pairs, each with its boxes of a confidence above `BOX`.

    Returns:
        mean(kept cosines) / number of pairs with a box, None where no box is kept (the benchmark leaves such videos
        out); and `pairs_with_box`, `kept_boxes`, `mean_over_pairs` (each pair's best kept cosine, 0 without one) and
        `found_share` (of pairs with a kept box).
    """
    kept = [[look.reference for look in pair if look.kept] for pair in looks]
    with_box = sum(bool(pair) for pair in looks)
    cosines = [cosine for pair in kept for cosine in pair]
    details = {
        "pairs_with_box": with_box,
        "kept_boxes": len(cosines),
        "mean_over_pairs": math.fsum(max(pair, default=0.0) for pair in kept) / max(1, len(kept)),
        "found_share": sum(bool(pair) for pair in kept) / max(1, len(kept)),
    }
    return (math.fsum(cosines) / len(cosines) / with_box if cosines else None), details


def benchmark_references(clip: Clip) -> list[tuple[Reference, str]]:
    """The references that the benchmark looks for, each with its label: people labelled Man or Woman are left out of
    items on faces, and are "human" in items on humans."""
    item = clip.category or clip.id
    looked_for = []
    for reference in clip.references:
        person = reference.name in ("Man", "Woman")
        if person and "face" in item:
            continue
        looked_for.append((reference, "human" if person and "human" in item else reference.name))
    return looked_for


def cut_out(picture_HWC: NDArray[np.uint8], mask_HW: NDArray[np.bool_] | None, crop: bool = True) -> NDArray[np.uint8]:
    """The picture with black for what is not masked; with `crop`, cut to the mask's box and padded to a square.

    A mask of None keeps all.
    """
    if mask_HW is not None:
        picture_HWC = picture_HWC * mask_HW[..., None]
        if crop:
            rows, columns = (np.flatnonzero(mask_HW.any(axis)) for axis in (1, 0))
            picture_HWC = picture_HWC[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if not crop:
        return picture_HWC
    height, width = picture_HWC.shape[:2]
    spare = max(height, width) - np.array([height, width])
    before, after = spare // 2, spare - spare // 2
    return np.pad(picture_HWC, ((before[0], after[0]), (before[1], after[1]), (0, 0)))


class NexusScore(VideoMetric):
    """Subject consistency over 32 frames, in [-1, 1]; the two protocols' scores do not compare (see the header).

    A clip with known masks (the toy world's, or annotations) needs no grounding under `paper`: with `grounding=False`
    they are used. Clips without references are not scored, nor, under the benchmark's protocols, those whose only
    references are a Man's or Woman's face.

    Args:
        protocol: "paper", "opens2v-1.0" or "opens2v-1.1" (the two are alike here).
        embedder: the image encoder; by default CLIP ViT-L/14 for `paper` and GME for the benchmark, which also
            compares labels and so needs one for pictures and text.
        grounding: finds masks under `paper`; False takes those of the clip. None is Grounded-SAM.
        detector: finds boxes under the benchmark's protocols; None is OWLv2 guided by the reference.
        crop: under `paper`, compare what is cut out at full size.

    Raises:
        UserError: for an unknown protocol, or parts that belong to another one.

    Example:
        >>> benchmark_score([[Look(0.9, 0.4, 0.8)], [], [Look(0.9, 0.4, 0.6)], [Look(0.55, 0.4, 0.9)]])[0]  # 0.7 / 3
        0.2333333333333333
    """

    name = "nexusscore"
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)

    def __init__(
        self,
        protocol: str = "paper",
        embedder: ImageTextEmbedder | None = None,
        grounding: GroundedMasks | bool | None = None,
        detector: Detector | None = None,
        crop: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if protocol not in PROTOCOLS:
            raise UserError(f"protocol={protocol!r}: no such protocol{nearest(protocol, PROTOCOLS)}")
        self.protocol, self.crop, self.paper = protocol, crop, protocol == "paper"
        if self.paper and detector is not None:
            raise UserError("detector: belongs to the benchmark's protocols; under 'paper' give grounding")
        if not self.paper and grounding is not None:
            raise UserError(f"grounding: belongs to protocol 'paper'; under {protocol!r} give detector")
        if self.paper:
            self.grounding = GroundedMasks() if grounding in (None, True) else grounding
            self.embedder = embedder or CLIPEmbedder()
            finders: tuple[str, ...] = self.grounding.names if isinstance(self.grounding, GroundedMasks) else ()
        else:
            self.detector = detector or Owlv2ByPicture(threshold=BOX)
            self.embedder = embedder or GMEEmbedder()
            finders = (self.detector.name,)
        self.models = (*finders, self.embedder.name)

    def _parts(self) -> list[Any]:
        finder = self.grounding if self.paper else self.detector
        return [part for part in (finder, self.embedder) if part]

    def applies(self, clip: Clip) -> bool:
        return bool(clip.references if self.paper else benchmark_references(clip))

    def score(self, clip: Clip) -> Score:
        if not self.applies(clip):
            return Score.failed("no reference to look for")
        known = self.paper and not self.grounding
        nameless = [k + 1 for k, (reference, label) in enumerate(self._looked_for(clip)) if not has_word(label)]
        if nameless and not known:
            return Score.failed(f"reference {nameless[0]} has no name to look for")
        if known and clip.masks_TNHW is None:
            return Score.failed("the clip has no masks, and there is no grounding to find any")
        for part in self._parts():
            part.load(part.device)  # what is missing there is no fault of the clip's
        # A short clip's frames count more than once and are looked at once.
        indices, places = np.unique(sample_frames(len(clip.frames_THWC), self.frames), return_inverse=True)
        try:
            return (self._paper if self.paper else self._benchmark)(clip, indices, places)
        except (UserError, FloatingPointError) as error:
            return Score.failed(str(error))

    def _looked_for(self, clip: Clip) -> list[tuple[Reference, str]]:
        if not self.paper:
            return benchmark_references(clip)
        return [(reference, reference.name) for reference in clip.references]

    def _paper(self, clip: Clip, indices: NDArray[np.int64], places: NDArray[np.int64]) -> Score:
        frames, looked_for = list(clip.frames_THWC[indices]), self._looked_for(clip)
        if isinstance(self.grounding, GroundedMasks):
            masks = self.grounding.masks_each(_queries(frames, looked_for))
        else:
            assert clip.masks_TNHW is not None
            known_NTHW = clip.masks_TNHW[indices, : len(looked_for)].swapaxes(0, 1)
            masks = [mask if mask.any() else None for known_THW in known_NTHW for mask in known_THW]
        subjects: list[dict[str, Any]] = []
        similarities = self._similarities(frames, masks, [reference for reference, _ in looked_for])
        for (_, label), once in zip(looked_for, similarities, strict=True):
            similarity = [once[place] for place in places]
            found = [value for value in similarity if value is not None]
            shares = {"mean": math.fsum(found) / len(places), "found_share": len(found) / len(places)}
            subjects.append({"name": label, **shares, "similarity": similarity})
        value = math.fsum(subject["mean"] for subject in subjects) / len(subjects)
        return Score(value, details={"protocol": self.protocol, "subjects": subjects})

    def _similarities(
        self,
        frames: Sequence[NDArray[np.uint8]],
        masks: Sequence[NDArray[np.bool_] | None],
        references: Sequence[Reference],
    ) -> list[list[float | None]]:
        """For each reference the cosine of each frame's cut-out to its own, None where there is none. `masks` are in
        the order of `_queries`."""
        seen = [k for k, found in enumerate(masks) if found is not None]
        own = [known if (known := reference.mask_HW) is not None and known.any() else None for reference in references]
        parts = [(reference.image_HWC, mask) for reference, mask in zip(references, own, strict=True)]
        parts += [(frames[k % len(frames)], masks[k]) for k in seen]
        vectors = in_batches(
            parts, CUT_OUTS, lambda some: list(self._vectors([cut_out(*part, self.crop) for part in some]))
        )
        cosines: list[list[float | None]] = [[None] * len(frames) for _ in references]
        for k, vector_D in zip(seen, vectors[len(references) :], strict=True):
            subject, frame = divmod(k, len(frames))
            cosines[subject][frame] = float((vector_D @ vectors[subject]).clamp(-1, 1))
        return cosines

    def _benchmark(self, clip: Clip, indices: NDArray[np.int64], places: NDArray[np.int64]) -> Score:
        looked_for = self._looked_for(clip)
        once = self._looks(list(clip.frames_THWC[indices]), looked_for)
        seen = [[frames[place] for place in places] for frames in once]
        value, counts = benchmark_score([look for frames in seen for look in frames])
        subjects = [
            {"name": label, **benchmark_score(frames)[1]} for (_, label), frames in zip(looked_for, seen, strict=True)
        ]
        details = {"protocol": self.protocol, **counts, "subjects": subjects}
        if value is None:
            return Score.failed("no subject is found in any frame", **details)
        return Score(value, details=details)

    def _looks(
        self, frames: Sequence[NDArray[np.uint8]], looked_for: Sequence[tuple[Reference, str]]
    ) -> list[list[list[Look]]]:
        """What is found of each reference in each frame."""
        queries = _queries(frames, looked_for)
        boxes = [
            [box for box in found if box.score > BOX and not sliver(box.crop(query.picture))]
            for query, found in zip(queries, self.detector.detect_each(queries), strict=True)
        ]
        crops = [[box.crop(query.picture) for box in few] for query, few in zip(queries, boxes, strict=True)]
        looks: list[list[Look]] = [[] for _ in queries]
        found = [k for k, few in enumerate(crops) if few]
        if not found:
            return _rows(looks, len(frames))
        words = list(dict.fromkeys(queries[k].label for k in found))
        labels_ND = _finite(self.embedder.embed_texts(words, INSTRUCTION))
        subjects_ND = self._vectors([queries[k].reference for k in found])
        vectors = iter(self._vectors([crop for few in crops for crop in few]))
        for k, subject_D in zip(found, subjects_ND, strict=True):
            label_D = labels_ND[words.index(queries[k].label)]
            for box in boxes[k]:
                vector_D = next(vectors)
                label, reference = ((vector_D @ other_D).clamp(-1, 1).item() for other_D in (label_D, subject_D))
                looks[k].append(Look(box.score, label, reference))
        return _rows(looks, len(frames))

    def _vectors(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Unit vectors, float64 `[N, D]`; what is there several times, as a box that is the best for two subjects, is
        embedded once."""
        groups = same_pictures(pictures)
        vectors_ND = _finite(self.embedder.embed_images([pictures[group[0]] for group in groups]))
        numbers = {place: number for number, group in enumerate(groups) for place in group}
        return vectors_ND[[numbers[place] for place in range(len(pictures))]]


def _queries(frames: Sequence[NDArray[np.uint8]], looked_for: Sequence[tuple[Reference, str]]) -> list[Query]:
    """All frames for the first reference, then for the next one."""
    return [Query(frame, label, reference.image_HWC) for reference, label in looked_for for frame in frames]


def _rows(looks: list[list[Look]], frames: int) -> list[list[list[Look]]]:
    return [looks[start : start + frames] for start in range(0, len(looks), frames)]


def _finite(vectors_ND: Tensor) -> Tensor:
    """In float64, or `FloatingPointError`."""
    if not vectors_ND.isfinite().all():
        raise FloatingPointError("the model gave a vector that is not finite")
    return vectors_ND.double()
