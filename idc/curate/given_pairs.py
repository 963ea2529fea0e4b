"""Cross-video pairs that a source knows of its candidates, as decisions.

Such a source says under a key of a candidate's `meta` {"id": what it calls it, "pairs": [{"own": of this side, "other":
of the other side with its "id", "image_similarity", ...}]}. A side names its subject by "class_name" and, where a name
comes twice, "class_id" (OpenS2V-5M, `idc.curate.sources.opens2v_pairs`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from idc.curate.candidate import Candidate, CuratedSubject
from idc.curate.collection import Adopt, Survivors
from idc.curate.names import words_of_name
from idc.curate.split import SPLIT

MODEL = "given with the data"
REAL = ("other_moment", "same_frame", "given")  # origins of pictures that show the subject itself


class _Wish(NamedTuple):
    """A subject of a candidate, and which side of a pair it may take a picture from."""

    key: str
    subject: int
    record: str
    split: str
    other: Mapping[str, Any]
    similarity: float


def given_pairs(survivors: Survivors, near_duplicate: float, first: bool = True) -> dict[str, list[Adopt]]:
    """By key of the taker, adoptions for the pairs whose both sides have survived, most similar first.

    Left out are pairs of a record with itself, across the split, or more similar than `near_duplicate`. Both may be of
    one source video: OpenS2V-5M pairs the parts of one, which are other moments of it.
    """
    wishes: dict[tuple[str, str], list[_Wish]] = defaultdict(list)
    for candidate in survivors:
        for known in _known(candidate):
            for wish in _wishes(candidate, known, near_duplicate):
                wishes[candidate.source, str(wish.other["id"])].append(wish)
    found: dict[tuple[str, int], dict[str, Adopt]] = defaultdict(dict)
    for candidate in survivors if wishes else ():
        for known in _known(candidate):
            for wish in wishes.get((candidate.source, str(known.get("id"))), ()):
                number = _subject_of(candidate, wish.other)
                apart = str(known.get("id")) != wish.record and candidate.meta.get(SPLIT, "") == wish.split
                if number is None or not apart or (picture := picture_of(candidate.subjects[number])) < 0:
                    continue
                adopt = Adopt(
                    wish.key, wish.subject, candidate.key, number, picture, round(wish.similarity, 6), first, MODEL
                )
                # One record may have become several clips: the first of them gives the picture.
                found[wish.key, wish.subject].setdefault(str(known["id"]), adopt)
    taken: dict[str, list[Adopt]] = defaultdict(list)
    for (key, _), offers in found.items():
        taken[key] += offers.values()
    return {key: sorted(offers, key=lambda adopt: (-adopt.similarity, adopt.subject)) for key, offers in taken.items()}


def picture_of(subject: CuratedSubject) -> int:
    """Number of the first reference that shows the subject itself and not what a model made of it; -1 without one."""
    shown = (number for number, reference in enumerate(subject.references) if reference.origin in REAL)
    return next(shown, -1)


def _known(candidate: Candidate) -> Iterator[Mapping[str, Any]]:
    """What sources say of the candidate's pairs."""
    for value in candidate.meta.values():
        if isinstance(value, Mapping) and "id" in value and isinstance(value.get("pairs"), list):
            yield value


def _wishes(candidate: Candidate, known: Mapping[str, Any], near_duplicate: float) -> Iterator[_Wish]:
    for pair in known["pairs"]:
        similarity = pair.get("image_similarity") if isinstance(pair, Mapping) else None
        if not isinstance(similarity, int | float) or not similarity <= near_duplicate:
            continue
        own, other = pair.get("own"), pair.get("other")
        if not isinstance(own, Mapping) or not isinstance(other, Mapping) or "id" not in other:
            continue
        number = _subject_of(candidate, own)
        if number is not None:
            split = candidate.meta.get(SPLIT, "")
            yield _Wish(candidate.key, number, str(known["id"]), split, other, float(similarity))


def _subject_of(candidate: Candidate, side: Mapping[str, Any]) -> int | None:
    """Number of the subject that a side names, or None. Of several of one name its id tells which; else the first."""
    named = words_of_name(str(side.get("class_name", "")))
    found = [
        number
        for number, subject in enumerate(candidate.subjects)
        if words_of_name(_class(subject, "class_name", subject.name)) == named
    ]
    exact = (n for n in found if str(_class(candidate.subjects[n], "number", "")) == str(side.get("class_id")))
    return next(exact, found[0] if found else None)


def _class(subject: CuratedSubject, key: str, default: str) -> str:
    """What the source said of the subject, where it said anything."""
    said = (value[key] for value in subject.meta.values() if isinstance(value, Mapping) and key in value)
    return str(next(said, default))
