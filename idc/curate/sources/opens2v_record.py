"""A record of OpenS2V-5M as a candidate, and a candidate as such a record.

What a candidate's own attributes say is in them alone; the rest of the record is in `meta["opens2v"]` (of the candidate
and of each subject), so that `to_record` gives back a record that went through no step as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from idc.curate.candidate import Box, Candidate, CuratedSubject, Mask
from idc.curate.sources import rle

META = "opens2v"
SCORES = ("tech", "motion", "aesthetic")  # of `metadata`; `Candidate.scores` has them as opens2v_tech, ...
FRAME_SCORES = ("foreground_ase_score", "background_ase_score")  # of the annotated frame
SPANS = ("face_cut", "cut")
CAPTIONS = ("face_cap_qwen", "face_cap_glm", "face_cap_Aria", "cap")
HEADS = {"human head", "head", "human face", "face"}


class RecordError(ValueError):
    """A record that is no sample: `reason` is one of a few phrases, `detail` has the numbers."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def from_record(
    record: Any, base: Candidate, spans: Sequence[str] = SPANS, captions: Sequence[str] = CAPTIONS
) -> Candidate:
    """What a record says, on top of `base` (key, source, video and path).

    The crop's order in the record is [x0, x1, y0, y1]. Boxes and masks are in pixels of the cropped picture, and of the
    annotated frame, whose number `frame` counts from the span's first one. Where that frame is outside of the span, the
    subjects have neither (both stay in their meta). A subject's score says how well its name fits its picture
    (`gme_score`), so that the best of several names of one person can be told.

    Args:
        record: {"metadata", "word_tags", "annotation"}.
        base: the candidate to fill in.
        spans: names of the spans in `metadata`, the first one that is there is taken.
        captions: names of the captions likewise.

    Raises:
        RecordError: for a record without a usable span or crop, or where a field is of another type.
    """
    if not isinstance(record, Mapping):
        raise RecordError("malformed record", f"{type(record).__name__} where a record was expected")
    metadata = dict(_mapping(record, "metadata"))
    if not metadata:
        raise RecordError("malformed record", "no metadata")
    span_name, span = _span(metadata, spans)
    crop = _crop(metadata)
    rest = {key: value for key, value in metadata.items() if key not in (span_name, "crop")}
    caption_name, number, caption = _caption(metadata, captions)
    if caption and number is None:
        del rest[caption_name]
    scores = {f"{META}_{name}": rest.pop(name) for name in SCORES if _is_number(rest.get(name))}
    annotation = _mapping(record, "annotation")
    frame_data = dict(_mapping(annotation, "ann_frame_data"))
    scores |= {f"{META}_{name}": frame_data.pop(name) for name in FRAME_SCORES if _is_number(frame_data.get(name))}
    tags = _mapping(record, "word_tags")
    reader = _Subjects(annotation, frame_data, tags, span, picture_size(metadata, crop))
    subjects = reader.subjects()
    known = {
        "metadata": rest,
        "span": span_name,
        "caption": [caption_name, number],
        "word_tags": dict(tags),
        "annotation": reader.rest(),
        "more": {key: value for key, value in record.items() if key not in ("metadata", "word_tags", "annotation")},
        "present": [key for key in ("metadata", "word_tags", "annotation") if key in record],
        "faults": reader.faults,
    }
    safety = metadata.get("safety")
    return base.changed(
        span=span,
        crop=crop,
        caption=caption,
        subjects=subjects,
        scores={**base.scores, **scores},
        licence=str(metadata.get("licence") or metadata.get("license") or base.licence),
        safety=dict(safety) if isinstance(safety, Mapping) else base.safety,
        meta={META: {**base.meta.get(META, {}), **known}},
    )


def to_record(candidate: Candidate) -> dict[str, Any]:
    """A candidate as a record of OpenS2V-5M: the one that it was read from, with what steps have changed since.

    It is for candidates that are not cut yet: afterwards boxes and masks are in pixels of the clip. Subjects that were
    not seen on the annotated frame are left out. A candidate of another source has its path as it is, and its span
    under "cut".
    """
    known = candidate.meta.get(META, {})
    metadata = dict(known.get("metadata", {"path": candidate.path, "fps": candidate.fps}))
    if candidate.span is not None:
        metadata[known.get("span") or "cut"] = list(candidate.span)
    if candidate.crop is not None:
        left, top, right, bottom = candidate.crop
        metadata["crop"] = [left, right, top, bottom]
    name, number = known.get("caption", (CAPTIONS[0], None))
    if number is not None:
        metadata[name] = [candidate.caption if n == number else text for n, text in enumerate(metadata[name])]
    elif candidate.caption:
        metadata[name] = candidate.caption
    metadata |= _scores(candidate, SCORES)
    record = {"metadata": metadata, "word_tags": dict(known.get("word_tags", {})), "annotation": _annotation(candidate)}
    present = known.get("present", list(record))
    return {key: value for key, value in record.items() if key in present or value} | dict(known.get("more", {}))


def kind_of(class_name: str, word_tags: Mapping[str, Any]) -> str:
    """ "person", "face", "object" or "place", by which list of tags names a class.

    The detector answers with parts of tags ("park" for "park or garden setting"): where no tag is equal, one that holds
    all words of the class counts. The dataset's subjects are people.
    """
    wanted = class_name.lower().split()
    lists = (("subject", "person"), ("pre_define", "person"), ("object", "object"), ("background", "place"))
    if " ".join(wanted) in HEADS:
        return "face"
    for fits in (lambda words: words == wanted, lambda words: bool(wanted) and set(wanted) <= set(words)):
        for name, kind in lists:
            tags = word_tags.get(name)
            if isinstance(tags, list) and any(isinstance(tag, str) and fits(tag.lower().split()) for tag in tags):
                return kind
    return "object"


class _Subjects:
    """Reads the subjects of a record's annotation; what of it cannot be used is noted in `faults`."""

    def __init__(
        self,
        annotation: Mapping[str, Any],
        frame_data: dict[str, Any],
        tags: Mapping[str, Any],
        span: tuple[int, int] | None,
        size: tuple[int, int] | None,
    ) -> None:
        self._annotation, self._tags, self._span, self._size = annotation, tags, span, size
        self._frame_data = frame_data
        self._items = frame_data.pop("annotations", [])
        self.faults: list[str] = []
        rank = frame_data.pop("ann_frame_idx", None)
        self.rank = int(rank) if _is_number(rank) and rank >= 0 else None
        masks = _mapping(annotation, "mask_annotation")
        self._masks = _mapping(masks, str(self.rank)) if self.rank is not None else {}
        if not isinstance(self._items, list):
            raise RecordError("malformed record", "annotations are no list")

    def subjects(self) -> tuple[CuratedSubject, ...]:
        if self.rank is None:
            if self._items:
                self.faults.append("no ann_frame_idx: annotations of no frame")
            return ()
        names: dict[str, int] = {}
        found = []
        for number, item in enumerate(self._items, 1):
            try:
                found.append(self._subject(number, item, names))
            except (RecordError, rle.RLEError) as error:
                self.faults.append(f"annotation {number}: {error}")
        return tuple(found)

    def rest(self) -> dict[str, Any]:
        """What of the annotation is in no subject."""
        masks = _mapping(self._annotation, "mask_annotation")
        others = {frame: masks[frame] for frame in masks if frame != str(self.rank)}
        rest = {
            key: value
            for key, value in self._annotation.items()
            if key not in ("ann_frame_data", "mask_annotation", "mask_map")
        }
        return {"frame": self.rank, "frame_data": self._frame_data, "other_masks": others, "rest": rest}

    def _subject(self, number: int, item: Any, names: dict[str, int]) -> CuratedSubject:
        if not isinstance(item, Mapping):
            raise RecordError("malformed record", "no annotation")
        mapped = _mapping(_mapping(self._annotation, "mask_map"), str(number))
        class_name = item.get("class_name") or mapped.get("class_name")
        if not isinstance(class_name, str):
            raise RecordError("malformed record", "no class_name")
        box = self._box(item.get("bbox"))
        code = self._masks.get(str(number))
        inside = self._span is None or self._span[0] <= self.rank < self._span[1]  # type: ignore[operator]
        mask = None if code is None else self._mask(code)
        names[class_name] = names.get(class_name, 0) + 1
        own = {"class_name": class_name, "number": number}
        own |= {"item": {key: value for key, value in item.items() if key not in ("class_name", "bbox")}}
        own |= {"mapped": {key: value for key, value in mapped.items() if key != "class_name"}}
        if code is not None:
            own["mask"] = dict(code) if not inside else {k: v for k, v in code.items() if k not in ("size", "counts")}
            own["compressed"] = not isinstance(code["counts"], list)
        if not inside:
            own["bbox"] = list(box)
        gme = item.get("gme_score")
        score = min(max(gme, 0.0), 1.0) if isinstance(gme, int | float) and _is_number(gme) else 0.0
        return CuratedSubject(
            name=class_name if names[class_name] == 1 else f"{class_name} {names[class_name]}",
            kind=kind_of(class_name, self._tags),
            box=box if inside else None,
            mask=mask if inside else None,
            frame=self.rank - (self._span[0] if self._span else 0) if inside else 0,  # type: ignore[operator]
            score=score,
            meta={META: own},
        )

    def _box(self, corners: Any) -> Box:
        if not isinstance(corners, list) or len(corners) != 4 or not all(map(_is_number, corners)):
            raise RecordError("malformed record", f"bbox {corners!r}")
        box = Box(*corners)
        if self._size is not None:
            height, width = self._size
            box = Box(max(box.left, 0), max(box.top, 0), min(box.right, width), min(box.bottom, height))
        if box.area <= 0:
            raise RecordError("malformed record", f"bbox {corners!r} holds nothing of the picture")
        return box

    def _mask(self, code: Any) -> Mask:
        if not isinstance(code, Mapping):
            raise RecordError("malformed record", "no mask")
        return rle.decode(code, self._size)


def _annotation(candidate: Candidate) -> dict[str, Any]:
    known = candidate.meta.get(META, {}).get("annotation", {})
    rank = next((_rank(candidate, subject) for subject in candidate.subjects if subject.box), known.get("frame"))
    items, mask_map, masks = [], {}, {}
    seen = [(subject, box) for subject in candidate.subjects if (box := _box_at(candidate, subject, rank))]
    for number, (subject, box) in enumerate(seen, 1):
        own = subject.meta.get(META, {})
        name = own.get("class_name", subject.name)
        items.append({"class_name": name, "bbox": list(box), **own.get("item", {})})
        mask_map[str(number)] = {"class_name": name, **own.get("mapped", {})}
        code = dict(own.get("mask", {}))
        if subject.mask is not None:
            code |= rle.encode(subject.mask, own.get("compressed", True))
        if "counts" in code:
            masks[str(number)] = code
    frame_data = dict(known.get("frame_data", {})) | _scores(candidate, FRAME_SCORES)
    if rank is not None:
        frame_data |= {"ann_frame_idx": rank, "annotations": items}
    all_masks = {**({str(rank): masks} if masks else {}), **known.get("other_masks", {})}
    parts = {"ann_frame_data": frame_data, "mask_map": mask_map, "mask_annotation": all_masks}
    return {**{key: part for key, part in parts.items() if part}, **known.get("rest", {})}


def _rank(candidate: Candidate, subject: CuratedSubject) -> int:
    """Rank in the source of the frame that a subject's box is of."""
    if candidate.ranks:
        return candidate.ranks[subject.frame]
    return subject.frame + (candidate.span[0] if candidate.span else 0)


def _box_at(candidate: Candidate, subject: CuratedSubject, rank: int | None) -> Box | None:
    """A subject's box in the cropped picture of the source's frame `rank`; None where it was not seen there."""
    if subject.box is not None:
        return subject.box if _rank(candidate, subject) == rank else None
    noted = subject.meta.get(META, {}).get("bbox")
    return Box(*noted) if noted and rank == candidate.meta[META]["annotation"]["frame"] else None


def _scores(candidate: Candidate, names: Sequence[str]) -> dict[str, float]:
    return {name: candidate.scores[f"{META}_{name}"] for name in names if f"{META}_{name}" in candidate.scores}


def _span(metadata: Mapping[str, Any], names: Sequence[str]) -> tuple[str, tuple[int, int] | None]:
    """(name, value) of the first span that is there; none of them is the whole video."""
    for name in names:
        value = metadata.get(name)
        if value is None:
            continue
        whole = isinstance(value, list) and len(value) == 2 and all(_is_number(n) and n == int(n) for n in value)
        if not whole or not 0 <= value[0] < value[1]:
            raise RecordError("no usable span", f"{name} {value!r}: [first, end) ranks of frames")
        return name, (int(value[0]), int(value[1]))
    return "", None


def _crop(metadata: Mapping[str, Any]) -> Box | None:
    value = metadata.get("crop")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        raise RecordError("no usable crop", f"{value!r}: [x0, x1, y0, y1] in pixels")
    left, right, top, bottom = value
    size = _resolution(metadata)
    if not (0 <= left < right and 0 <= top < bottom) or (size and (right > size[1] or bottom > size[0])):
        picture = f" of a picture of {size[1]}x{size[0]}" if size else ""
        raise RecordError("no usable crop", f"[x0, x1, y0, y1] = {value!r}{picture}")
    return Box(left, top, right, bottom)


def _resolution(metadata: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the source's picture, or None where the record does not say."""
    value = metadata.get("resolution")
    if not isinstance(value, Mapping) or not all(_is_number(value.get(side)) for side in ("height", "width")):
        return None
    return int(value["height"]), int(value["width"])


def picture_size(metadata: Mapping[str, Any], crop: Box | None) -> tuple[int, int] | None:
    """(height, width) of the cropped picture."""
    if crop is None:
        return _resolution(metadata)
    return round(crop.bottom) - round(crop.top), round(crop.right) - round(crop.left)


def _caption(metadata: Mapping[str, Any], names: Sequence[str]) -> tuple[str, int | None, str]:
    """(name, number in the list where it is one of several, text) of the first caption with any text."""
    for name in names:
        value = metadata.get(name)
        if isinstance(value, str) and value.strip():
            return name, None, value
        for number, text in enumerate(value if isinstance(value, list) else ()):
            if isinstance(text, str) and text.strip():
                return name, number, text
    return names[0] if names else CAPTIONS[0], None, ""


def _mapping(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a record; {} where there is none. Raises RecordError where it is something else."""
    value = record.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RecordError("malformed record", f"{name} is no dict")
    return value


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
