"""What a sample's JSON says: where it comes from, what was found out about it and by which models.

Training reads `kinds` (name -> kind of its reference) and `category` of it; the rest is for whoever asks later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

from idc.curate.candidate import Candidate, CuratedSubject, Reference
from idc.curate.collection import Adopt
from idc.curate.decisions import Decisions
from idc.curate.sources import rle
from idc.data import storage

# What a subject is -> what its reference is to the metrics, of `idc.data.benchmark.KINDS`.
REFERENCE_KINDS = {"person": "human", "face": "face", "place": "background"}
_PLACE = re.compile(r"(?:/|~|[A-Za-z]:[\\/]|[A-Za-z][A-Za-z0-9+.-]*://)\S+(?: \S+)*")  # an absolute path, or a URL

MADE = ("generated", "augmented")  # how origins of references begin that an image editor made


@dataclass(frozen=True)
class Choice:
    """Which picture a subject has in the sample: its own of that number, or that which it takes over.

    Attributes:
        subject: its number in the candidate.
        reference: number of its own picture; of the other's, where `adopt` is there.
    """

    subject: int
    reference: int = 0
    adopt: Adopt | None = None


def choose_references(candidate: Candidate, decisions: Decisions) -> list[Choice]:
    """The picture of each subject that has one, in the order of the subjects.

    The first that is taken over as first choice comes before the subject's own first, any other after it; but a made
    reference that was put first stays it: a drawn share has one. Own ones that were taken from a video on the other
    side of the split (as shards of an earlier collection may have them) are none.
    """
    adopted = decisions.adopted.get(candidate.key, ())
    choices = []
    for number, subject in enumerate(candidate.subjects):
        offered = [adopt for adopt in adopted if adopt.subject == number]
        first = next((adopt for adopt in offered if adopt.first), None)
        own = (n for n, r in enumerate(subject.references) if not decisions.crosses(candidate.video, r.video))
        mine = next(own, None)
        made = mine is not None and subject.references[mine].origin.startswith(MADE)
        if mine is not None and (first is None or made):
            choices.append(Choice(number, mine))
        elif (adopt := first or next(iter(offered), None)) is not None:
            choices.append(Choice(number, adopt.reference, adopt))
    return choices


def adopted_reference(adopt: Adopt, giver: Candidate) -> Reference:
    """The reference that a subject takes over, as its own provenance tells it."""
    taken = giver.subjects[adopt.other_subject].references[adopt.reference]
    return Reference(
        image=taken.image,
        ext=taken.ext,
        origin="other_video",
        video=taken.video or giver.video,
        seconds=taken.seconds,
        similarity=adopt.similarity,
        model=adopt.model,
        meta={**taken.meta, "taken_from": {"key": giver.key, "source": giver.source, "origin": taken.origin}},
    )


def provenance(candidate: Candidate, choices: Sequence[Choice], chosen: Sequence[Reference]) -> dict[str, Any]:
    """The `meta` of a sample, plain JSON.

    Args:
        candidate: with masks.
        choices, chosen: of the references that the sample has, in their order.
    """
    numbers = {choice.subject: number for number, choice in enumerate(choices)}
    used = [candidate.subjects[choice.subject] for choice in choices]
    kinds = [REFERENCE_KINDS.get(subject.kind, "object") for subject in used]
    return {
        "category": category_of(kinds),
        **candidate.meta,
        "kinds": dict(zip((subject.name for subject in used), kinds, strict=True)),
        "source": candidate.source,
        "licence": candidate.licence,
        "video": candidate.video,
        "path": public_path(candidate),
        "span": None if candidate.span is None else list(candidate.span),
        "crop": None if candidate.crop is None else list(candidate.crop),
        "ranks": list(candidate.ranks),
        "fps": candidate.fps,
        "scores": dict(candidate.scores),
        "models": dict(candidate.models),
        "safety": dict(candidate.safety),
        "subjects": [
            _subject(
                subject, choices[place] if place is not None else None, chosen[place] if place is not None else None
            )
            | {"reference": place}
            for subject, place in ((s, numbers.get(n)) for n, s in enumerate(candidate.subjects))
        ],
    }


def category_of(kinds: Sequence[str]) -> str:
    """The benchmark's item type of a sample with references of these kinds (`idc.data.benchmark.KINDS`).

    Items of two or more people are "multihuman", or "multiface" where only faces are shown, whatever else is in them:
    the types with an object have one person. Places count as objects, as in the benchmark. "" without references.

    >>> category_of(["human", "object"]), category_of(["face", "face"]), category_of(["background"])
    ('humanobj', 'multiface', 'singleobj')
    """
    people = [kind for kind in kinds if kind in ("human", "face")]
    if not people:
        return ("singleobj" if len(kinds) == 1 else "multiobject") if kinds else ""
    person = "human" if "human" in people else "face"
    if len(people) > 1:
        return f"multi{person}"
    return f"single{person}" if len(kinds) == 1 else f"{person}obj"


def public_path(candidate: Candidate) -> str:
    """Where the material was, fit to be published (`public`); of a local file what the source names it by."""
    named = PurePath(candidate.path).as_posix().endswith(f"/{candidate.video}")
    return (
        candidate.video if candidate.video and named and not storage.is_url(candidate.path) else public(candidate.path)
    )


def public(value: Any) -> Any:
    """Plain JSON in which every path and URL is fit to be published: URLs without user and query, which may hold keys;
    of absolute paths the last part alone, since the folders of a machine are nobody else's business.

    >>> public({"path": "/home/me/films", "url": "https://me:secret@host/a.mp4?key=1"})
    {'path': 'films', 'url': 'https://host/a.mp4'}
    """
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if not isinstance(value, str) or not _PLACE.fullmatch(value):
        return value
    if "://" in value:
        parts = urlsplit(value)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return PurePath(value).name


def _subject(subject: CuratedSubject, choice: Choice | None, chosen: Reference | None) -> dict[str, Any]:
    own = list(subject.references)
    if choice is not None and chosen is not None:
        if choice.adopt is None:
            own.pop(choice.reference)
        own.insert(0, chosen)
    return {
        "name": subject.name,
        "kind": subject.kind,
        "box": None if subject.box is None else list(subject.box),
        "mask": None if subject.mask is None else rle.encode(subject.mask),
        "frame": subject.frame,
        "score": subject.score,
        "embedder": subject.embedder,
        "references": [_reference(reference) for reference in own],
        "meta": dict(subject.meta),
    }


def _reference(reference: Reference) -> Mapping[str, Any]:
    names = ("origin", "video", "seconds", "similarity", "model", "ext")
    return {name: getattr(reference, name) for name in names} | {"meta": dict(reference.meta)}
