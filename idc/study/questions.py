"""A study's plan, and which questions a rater gets: balanced over comparisons, systems and sides.

The plan (`study.json`) is the key that un-blinds the answers; it is never served.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from idc.errors import UserError

PLAN = "study.json"
ANSWERS = "answers.sqlite"
PUBLIC = "public"
MEDIA = "media"
CHOICES = ("left", "right", "tie", "skip")  # skip: the page could not play the videos
MEDIA_NAME = re.compile(r"[0-9a-f]{24}\.(mp4|jpg)")


class Criterion(NamedTuple):
    """One of the four questions that are asked of each pair."""

    key: str
    title: str
    question: str


CRITERIA = (
    Criterion("aesthetics", "Aesthetics", "Which looks better: composition, light, colour?"),
    Criterion("identity", "Identity", "Which keeps closer to the people and things in the reference pictures?"),
    Criterion("quality", "Video quality", "Which is clearer, with fewer faults and less flicker?"),
    Criterion("motion", "Motion", "In which is the movement more natural?"),
)


class Comparison(NamedTuple):
    """Two systems' videos of one item; `a` comes before `b` in the study's order of systems."""

    item: str
    a: str
    b: str


class Question(NamedTuple):
    """One page of a questionnaire.

    Attributes:
        kind: "compare" (counts), "repeat" (an earlier one with its sides swapped) or "catch" (a known answer).
        item: which prompt.
        left, right: names of systems; in a catch, "" is the corrupted video.
        left_file, right_file: the videos' random names.
        repeats: position of the question that is repeated, or -1.
    """

    kind: str
    item: str
    left: str
    right: str
    left_file: str
    right_file: str
    repeats: int = -1


@dataclass(frozen=True)
class Catch:
    """A video and its corrupted copy."""

    item: str
    system: str
    good: str
    bad: str


@dataclass(frozen=True)
class Study:
    """What `build` writes and the rest reads.

    Attributes:
        systems: names in the order they were given; the first is "ours" unless a report says otherwise.
        items: per id `{"prompt", "references": [{"file", "width", "height", "label"}]}`.
        videos: per item and system the video's random name.
        sizes: per video (width, height) in pixels.
        catches: the catch questions to draw from.
        pairs, repeats, catch_count: questions of each kind in a questionnaire.
    """

    title: str
    seed: int
    systems: tuple[str, ...]
    items: Mapping[str, Mapping[str, Any]]
    videos: Mapping[str, Mapping[str, str]]
    sizes: Mapping[str, tuple[int, int]]
    catches: tuple[Catch, ...]
    pairs: int
    repeats: int
    catch_count: int

    @property
    def id(self) -> str:
        """Twelve letters that change with the plan; the page keeps the progress of each study apart by it."""
        return hashlib.sha256(self.as_json().encode()).hexdigest()[:12]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def comparisons(self) -> list[Comparison]:
        """All that can be asked: each pair of systems that both have a video of an item."""
        return [
            Comparison(item, a, b)
            for item, videos in self.videos.items()
            for a, b in combinations([system for system in self.systems if system in videos], 2)
        ]

    def criteria(self, item: str) -> tuple[Criterion, ...]:
        """All four, or three where the item has no reference to keep to."""
        return tuple(c for c in CRITERIA if c.key != "identity" or self.items[item]["references"])

    def media(self) -> set[str]:
        """Names of all files that raters may get."""
        pictures = {reference["file"] for item in self.items.values() for reference in item["references"]}
        return pictures | set(self.sizes)


def read_study(folder: Path) -> Study:
    """The plan in a study's folder.

    Raises:
        UserError: if there is none, or it is not one that `idc study build` wrote.
    """
    path = folder / PLAN
    if not path.is_file():
        hint = "the build did not finish; run it again" if (folder / PUBLIC).is_dir() else "idc study build makes one"
        raise UserError(f"{folder}: holds no study ({PLAN} is missing); {hint}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["systems"] = tuple(fields["systems"])
        fields["catches"] = tuple(Catch(**catch) for catch in fields["catches"])
        fields["sizes"] = {name: (width, height) for name, (width, height) in fields["sizes"].items()}
        study = Study(**fields)
        bad = [name for name in study.media() if not MEDIA_NAME.fullmatch(name)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: is not a plan that idc study build wrote ({type(error).__name__}: {error})"
        ) from error
    if bad:
        raise UserError(f"{path}: {bad[0]!r} is not a name that idc study build gives")
    return study


@dataclass
class Load:
    """How often each comparison was asked so far, and each system in it stood on the left."""

    asked: Counter[Comparison]
    left: Counter[tuple[Comparison, str]]


def questionnaire(study: Study, load: Load, rater: int) -> list[Question]:
    """The questions of one rater, in order; the same arguments give the same questions.

    Comparisons asked least so far come first; among these, ones whose prompt the rater has not had, then systems and
    prompts asked least. Sides are balanced per comparison, then per rater and system. Repeats come from the first half,
    stand in the last third and swap the sides; catches are spread evenly.

    Args:
        rater: a number from 0; with the study's seed it fixes all random choices.
    """
    random_ = random.Random(f"{study.seed}/{rater}")
    chosen = _choose(study, load, random_)
    random_.shuffle(chosen)
    lefts: Counter[str] = Counter()
    questions = [_oriented(study, comparison, load, lefts, random_) for comparison in chosen]
    _insert_catches(study, questions, random_)
    early = [n for n, question in enumerate(questions[: (len(questions) + 1) // 2]) if question.kind == "compare"]
    repeated = random_.sample(early, min(study.repeats, len(early)))
    late = len(questions) - len(questions) // 3
    # Inserted from the back, so that positions before each stay what they are.
    for position, original in sorted(((random_.randint(late, len(questions)), n) for n in repeated), reverse=True):
        _, item, left, right, left_file, right_file, _ = questions[original]
        questions.insert(position, Question("repeat", item, right, left, right_file, left_file, original))
    return questions


def _choose(study: Study, load: Load, random_: random.Random) -> list[Comparison]:
    pool = study.comparisons()
    random_.shuffle(pool)
    pairs: Counter[tuple[str, str]] = Counter()
    items: Counter[str] = Counter()
    for comparison, count in load.asked.items():
        pairs[comparison.a, comparison.b] += count
        items[comparison.item] += count
    own: Counter[str] = Counter()
    chosen: list[Comparison] = []

    def rank(c: Comparison) -> tuple[int, ...]:
        return load.asked[c], own[c.item], pairs[c.a, c.b], items[c.item]

    for _ in range(min(study.pairs, len(pool))):
        best = min(pool, key=rank)
        pool.remove(best)
        chosen.append(best)
        own[best.item] += 1
        pairs[best.a, best.b] += 1
        items[best.item] += 1
    return chosen


def _oriented(
    study: Study, comparison: Comparison, load: Load, lefts: Counter[str], random_: random.Random
) -> Question:
    item, a, b = comparison

    def rank(system: str) -> tuple[float, ...]:
        return load.left[comparison, system], lefts[system], random_.random()

    left, right = sorted((a, b), key=rank)
    lefts[left] += 1
    lefts[right] -= 1
    files = study.videos[item]
    return Question("compare", item, left, right, files[left], files[right])


def _insert_catches(study: Study, questions: list[Question], random_: random.Random) -> None:
    catches = random_.sample(study.catches, min(study.catch_count, len(study.catches)))
    step = len(questions) / max(1, len(catches))
    corrupt_left = random_.random() < 0.5
    for n, catch in reversed(list(enumerate(catches))):
        position = int(step * (n + random_.random()))
        sides = [(catch.system, catch.good), ("", catch.bad)]
        (left, left_file), (right, right_file) = reversed(sides) if corrupt_left else sides
        questions.insert(position, Question("catch", catch.item, left, right, left_file, right_file))
        corrupt_left = not corrupt_left
