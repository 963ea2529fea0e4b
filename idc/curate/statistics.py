"""What shards hold, counted in one streamed pass: the paper's table S.8 and what its figures S.9 and S.10 draw."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from idc.curate.looking import COUNTS, MANIFEST, Collection, Seen, SeenDrop, SeenSubject
from idc.curate.scenarios import HUMAN, SCENARIOS, content_words, head_noun, scenario
from idc.curate.tallies import Spread, Tally
from idc.data.buckets import Assignment, BucketRule, assign
from idc.types import Bucket

CUT_OUT = ("same_frame", "other_moment", "other_video")  # origins of pictures that are cut out of a video
GENERATED = "generated"
UNSAID = "not said"
GENERAL, HIGH_FIDELITY, OTHER = ROLES = ("general", "high-fidelity", "other")
_VIDEOS = {
    GENERAL: ("General Videos", "Broad domain pre-training"),
    HIGH_FIDELITY: ("High-Fidelity Videos", "Fine-tuning for video quality"),
    OTHER: ("Videos", ""),
}
_GENERATED_FOR = {GENERAL: "Initial subject synthesis capability", HIGH_FIDELITY: "Enhancing appearance diversity"}
# Quantities that the paper prints in table S.8, by role and content.
PUBLISHED = {
    (GENERAL, "General Videos"): 218_230,
    (GENERAL, "Masked Subjects"): 535_259,
    (GENERAL, "Generated Subjects"): 3_098,
    (HIGH_FIDELITY, "High-Fidelity Videos"): 9_374,
    (HIGH_FIDELITY, "Generated Subjects"): 3_000,
    ("", "Total Static Images"): 14_976,
    ("", "- Human-centric Images"): 2_877,
    ("", "- Isolated Clothing Items"): 3_458,
}


@dataclass
class SourceCounts:
    """What one data source gives; the units of table S.8."""

    videos: int = 0
    stills: int = 0
    human_stills: int = 0
    clothing_stills: int = 0
    masked: int = 0
    generated: int = 0
    augmented: int = 0
    unsaid: int = 0
    seconds: Spread = field(default_factory=Spread)

    def add(self, seen: Seen) -> None:
        """Count a sample."""
        if seen.still:
            self.stills += 1
            human = any(scenario(subject.name, subject.kind) == HUMAN for subject in seen.subjects)
            self.human_stills += human
            self.clothing_stills += not human and any(subject.kind == "clothing" for subject in seen.subjects)
        else:
            self.videos += 1
            self.seconds.add(seen.seconds)
        for subject in seen.subjects:
            origins = [reference.origin for reference in subject.references if reference.ext]
            self.masked += subject.mask is not None or any(origin in CUT_OUT for origin in origins)
            self.generated += sum(origin.startswith(GENERATED) for origin in origins)
            self.augmented += origins.count("augmented")
            self.unsaid += subject.mask is None and bool(origins) and not any(origins)

    def rows(self, role: str) -> list[tuple[str, int, str]]:
        """(content, quantity, purpose) of table S.8; what a source has nothing of is left out."""
        content, purpose = _VIDEOS[role]
        images = "Rich priors for appearance synthesis"
        rows = [
            (content, self.videos, purpose),
            ("Masked Subjects", self.masked, "Learning subject-background separation"),
            ("Generated Subjects", self.generated, _GENERATED_FOR.get(role, _GENERATED_FOR[HIGH_FIDELITY])),
            ("Augmented Subjects", self.augmented, "Baseline of generated subjects"),
            ("Subjects of unsaid origin", self.unsaid, ""),
            ("Total Static Images", self.stills, images),
            ("- Human-centric Images", self.human_stills, images),
            ("- Isolated Clothing Items", self.clothing_stills, images),
        ]
        return [row for row in rows if row[1]]


@dataclass
class Part:
    """A split of the collection, or the whole of one that is not split. `videos` are hashes of source videos."""

    samples: int = 0
    seconds: float = 0.0
    videos: array[int] = field(default_factory=lambda: array("Q"))


class Statistics:
    """Counts of a collection. Memory does not grow with the samples, but for 8 bytes each that tell videos apart.

    Args:
        rule: how training assigns samples to buckets; None leaves that out.
        batch_size: samples of a training step over all ranks.
        roles: source -> "general", "high-fidelity" or "other": which rows of table S.8 its videos are.
    """

    def __init__(
        self, rule: BucketRule | None = None, batch_size: int = 1, roles: Mapping[str, str] | None = None
    ) -> None:
        self.rule, self.batch_size, self.roles = rule, batch_size, dict(roles or {})
        self.samples = 0
        self.sources: dict[str, SourceCounts] = defaultdict(SourceCounts)
        self.parts: dict[str, Part] = defaultdict(Part)
        self.sizes: dict[str, Counter[Bucket]] = defaultdict(Counter)  # by folder
        self.scenarios: dict[str, Tally] = {name: Tally() for name in SCENARIOS}
        self.categories, self.licences, self.kinds, self.origins = Tally(), Tally(), Tally(), Tally()
        self.names, self.words = Tally(), Tally()  # words of subjects' names, and of captions
        self.subjects: Counter[int] = Counter()
        self.caption_words, self.seconds = Spread(), Spread()
        self.scores: dict[str, Spread] = defaultdict(Spread)
        self.similarity: dict[str, Spread] = defaultdict(Spread)
        self.models: dict[str, Tally] = defaultdict(Tally)
        self.problems = Tally()
        self.drops: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # (step, reason) -> source
        self.folders: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []  # counts.json as curation wrote it

    def add(self, seen: Seen) -> None:
        """Count a sample."""
        self.samples += 1
        self.sources[seen.source].add(seen)
        part = self.parts[seen.split]
        part.samples += 1
        part.seconds += seen.seconds
        if seen.video:
            digest = hashlib.blake2b(seen.video.encode(), digest_size=8).digest()
            part.videos.append(int.from_bytes(digest, "little"))
        self.sizes[seen.root][seen.entry.bucket] += 1
        self.categories.add(seen.category or UNSAID)
        self.licences.add(seen.licence or UNSAID)
        self.subjects[seen.entry.bucket.subjects] += 1
        self.caption_words.add(seen.entry.caption_words)
        if not seen.still:
            self.seconds.add(seen.seconds)
        self.words.update(content_words(seen.caption))
        for name, value in seen.scores.items():
            self.scores[name].add(value)
        for step, model in seen.models.items():
            self.models[step].add(str(model))
        if seen.problem:
            self.problems.add(seen.problem)
        for subject in seen.subjects:
            self._add_subject(subject)

    def _add_subject(self, subject: SeenSubject) -> None:
        self.kinds.add(subject.kind or UNSAID)
        self.scenarios[scenario(subject.name, subject.kind)].add(head_noun(subject.name) or "unnamed")
        self.names.update(content_words(subject.name))
        for reference in subject.references:
            if not reference.ext:
                continue  # the sample tells of it and does not have it
            self.origins.add(reference.origin or UNSAID)
            if reference.similarity is not None:
                self.similarity[reference.origin or UNSAID].add(reference.similarity)

    def add_drop(self, drop: SeenDrop) -> None:
        """Count what was dropped."""
        self.drops[drop.step or UNSAID, drop.reason or UNSAID][drop.source or UNSAID] += 1

    @property
    def dropped(self) -> int:
        """How many were dropped."""
        return sum(sum(counts.values()) for counts in self.drops.values())

    def table_s8(self) -> list[dict[str, Any]]:
        """Rows of the paper's table S.8: source, content, quantity, purpose, and the quantity that the paper prints."""
        rows = []
        for source, counts in sorted(self.sources.items()):
            role = self.roles.get(source) or (GENERAL if "opens2v" in source.lower() else OTHER)
            for content, quantity, purpose in counts.rows(role):
                published = PUBLISHED.get((role, content), PUBLISHED.get(("", content)))
                rows.append(
                    {
                        "source": source,
                        "content": content,
                        "quantity": quantity,
                        "purpose": purpose,
                        "published": published,
                    }
                )
        return rows

    def buckets(self) -> Assignment | None:
        """What each bucket of training keeps and drops, by folder; None without a rule."""
        if self.rule is None:
            return None
        return assign([(root, sizes.elements()) for root, sizes in self.sizes.items()], self.rule)

    def shared_videos(self) -> dict[tuple[str, str], int]:
        """How many source videos two splits have in common: 0, or clips of one video are trained on and judged by."""
        videos = {name: np.unique(np.frombuffer(part.videos, np.uint64)) for name, part in self.parts.items() if name}
        return {
            (one, two): len(np.intersect1d(videos[one], videos[two], assume_unique=True))
            for one, two in combinations(sorted(videos), 2)
        }

    def to_json(self) -> dict[str, Any]:
        """All counts as plain JSON; lists of names are cut after the most frequent thousand."""
        assignment = self.buckets()
        return {
            "samples": self.samples,
            "folders": self.folders,
            "table_s8": self.table_s8(),
            "scenarios": {name: dict(tally.top(1000)) for name, tally in self.scenarios.items()},
            "categories": dict(self.categories.top(1000)),
            "kinds": dict(self.kinds.top()),
            "seconds": {"all": self.seconds.to_json()}
            | {f"source {name}": counts.seconds.to_json() for name, counts in sorted(self.sources.items())},
            "caption_words": self.caption_words.to_json(),
            "subjects": {str(count): number for count, number in sorted(self.subjects.items())},
            "origins": dict(self.origins.top()),
            "similarity": {name: spread.to_json() for name, spread in sorted(self.similarity.items())},
            "licences": dict(self.licences.top(1000)),
            "scores": {name: spread.to_json() for name, spread in sorted(self.scores.items())},
            "models": {step: dict(tally.top(100)) for step, tally in sorted(self.models.items())},
            "splits": {name or "all": self.split(part) for name, part in sorted(self.parts.items())},
            "shared_videos": {" and ".join(pair): count for pair, count in self.shared_videos().items()},
            "sizes": [
                {**size._asdict(), "samples": n} for size, n in sorted(sum(self.sizes.values(), Counter()).items())
            ],
            "buckets": None if assignment is None else assignment_json(assignment),
            "names": dict(self.names.top(1000)),
            "words": dict(self.words.top(1000)),
            "problems": dict(self.problems.top(1000)),
            "read": self.samples + self.dropped,
            "kept": self.samples,
            "dropped": self.dropped,
            "drops": self.drop_rows(),
            "counts": self.told,
        }

    def drop_rows(self) -> list[dict[str, Any]]:
        """Drops by step and reason, the most frequent first, with their sources."""
        order = sorted(self.drops.items(), key=lambda item: (-sum(item[1].values()), item[0]))
        return [
            {"step": step, "reason": reason, "count": sum(counts.values()), "sources": dict(sorted(counts.items()))}
            for (step, reason), counts in order
        ]

    @staticmethod
    def split(part: Part) -> dict[str, Any]:
        """Samples, hours and number of source videos (0 where samples do not name them) of a split."""
        videos = len(np.unique(np.frombuffer(part.videos, np.uint64)))
        return {"samples": part.samples, "hours": part.seconds / 3600, "videos": videos}


def assignment_json(assignment: Assignment) -> list[dict[str, Any]]:
    """A row a folder and bucket, or a row a folder and reason of its drops."""
    rows: list[dict[str, Any]] = []
    for root in assignment.kept:
        for bucket, count in sorted(assignment.kept[root].items()):
            rows.append({"folder": root, "bucket": list(bucket), "samples": count})
        for why, count in sorted(assignment.dropped[root].items(), key=lambda item: (-item[1], item[0])):
            rows.append({"folder": root, "dropped": why, "samples": count})
    return rows


def count(
    collection: Collection,
    rule: BucketRule | None = None,
    batch_size: int = 1,
    roles: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Count all samples and drops of a collection.

    Args:
        rule, batch_size: of the training whose buckets are asked for.
        roles: source -> role for table S.8; by default as the manifest says: sources of OpenS2V are general, folders
            and buckets of videos high-fidelity.
        progress: called with the samples done, now and then.

    Raises:
        UserError: for an index that is damaged.
    """
    known = {name: role for manifest in collection.beside(MANIFEST) for name, role in manifest_roles(manifest)}
    statistics = Statistics(rule, batch_size, {**known, **(roles or {})})
    for folder in collection.folders:
        told = {key: getattr(folder, key) for key in ("root", "split", "samples", "shards", "bytes", "hash")}
        statistics.folders.append({**told, "problems": [problem._asdict() for problem in folder.problems]})
    for done, seen in enumerate(collection, 1):
        statistics.add(seen)
        if progress and not done % 1000:
            progress(done)
    for drop in collection.drops():
        statistics.add_drop(drop)
    statistics.told = collection.beside(COUNTS)
    return statistics


def manifest_roles(content: Any) -> list[tuple[str, str]]:
    """(source, role) of the sources that a manifest describes, wherever in it: mappings with a class and a name."""
    if isinstance(content, list):
        return [found for item in content for found in manifest_roles(item)]
    if not isinstance(content, Mapping):
        return []
    kind, name = content.get("class"), content.get("name")
    if isinstance(kind, str) and isinstance(name, str) and ".sources" in kind:
        kind = kind.lower()
        role = GENERAL if "opens2v" in kind else HIGH_FIDELITY if "folder" in kind or "videos" in kind else OTHER
        return [(name, role)]
    return [found for item in content.values() for found in manifest_roles(item)]
