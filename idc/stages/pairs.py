"""Preference pairs that a recipe makes for itself, on first use: mined from a model, or from real clips.

One process makes them, on one device, and goes on where it was stopped. At scale, make candidates with `idc generate`
on as many cards as there are, a folder a seed, mine them with `idc pairs mine`, and read the shards by
`idc.data.sources.ShardSource`.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray

from idc.data.benchmark import file_name
from idc.data.corruptions import Corruption, frames_of
from idc.data.index import Entry, ShardIndex
from idc.data.item_sources import ItemSource
from idc.data.pairs import PAIR, RECORD, Pair, Side, is_pair
from idc.data.plan import seed_for
from idc.data.requests import GenerationData
from idc.data.shards import SampleError, ShardWriter, clip_ext, parse_sample, read_members
from idc.data.sources import Source, source_name
from idc.data.video import encode_video
from idc.errors import UserError, counted
from idc.flow.editing import check_strength
from idc.models.checkpoints import Which
from idc.models.sampling import Sampler, SamplingChanges, to_uint8
from idc.models.sampling import Source as Edited
from idc.models.system import System, open_system
from idc.progress import track
from idc.rewards.base import Reward
from idc.stages.candidates import make_candidates
from idc.stages.generate import Encoding, Generate
from idc.stages.judged import describe
from idc.stages.mining import (
    MARGIN,
    PREFIX,
    Drop,
    Mined,
    check_free,
    finish,
    mine,
    png,
    write_drops,
)
from idc.stages.mining_scores import SCORES, FromReward
from idc.types import Bucket, Sample

CANDIDATES = "candidates"


class MadePairs(ABC):
    """A source of preference shards that are written on first use; processes that ask at once wait for the writer."""

    path: str
    weight: float | None
    name: str | None

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that the pairs depend on, as plain JSON."""

    @abstractmethod
    def make(self) -> Mined:
        """Write them into `path`, with the record that they are finished."""

    def prepare(self) -> None:
        """Make the pairs unless they are there.

        Raises:
            UserError: where other pairs lie at `path`, or none can be made.
        """
        if self._ready():
            return
        from filelock import FileLock

        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{os.path.normpath(self.path)}.lock"):
            if self._ready():
                return
            # A run that makes its pairs trains as one that finds them.
            with isolate_rng():
                rank_zero_info(summary(self.make(), self.path))

    def index(self) -> ShardIndex:
        """Read the index. Raises `UserError` where `prepare` has not run."""
        return ShardIndex.load(self.path, source=source_name(self))

    def _ready(self) -> bool:
        try:
            record = json.loads((Path(self.path) / RECORD).read_bytes())
        except (OSError, ValueError):
            return False
        before, now = record.get("settings"), json.loads(json.dumps(self.settings))
        if before == now:
            return True
        known = before if isinstance(before, Mapping) else {}
        changed = sorted(name for name in {*known, *now} if known.get(name) != now.get(name))
        raise UserError(
            f"path={self.path!r}: the pairs there were made with another {', '.join(changed)}; give another path, or "
            "delete that folder to make them anew"
        )


def summary(report: Mined, path: str | Path) -> str:
    """What came of it, in a line or two."""
    parts = [f"{counted(report.pairs, 'pair')} of {counted(report.conditions, 'condition')} in {path}"]
    if report.margins:
        parts.append(f"mean margin {sum(report.margins) / len(report.margins):.3f}")
    if report.means:
        parts.append(f"mean score {sum(report.means.values()) / len(report.means):.3f}")
    reasons = "; ".join(f"{count} x {reason}" for reason, count in report.reasons().most_common())
    return ", ".join(parts) + (f"\n{len(report.drops)} dropped: {reasons}" if reasons else "")


@dataclass
class MinedPairs(MadePairs):
    """Samples a model several times for each item and keeps the best against the worst by a reward.

    Attributes:
        path: folder of their own; the candidates stay under `candidates/`, one folder a seed, their scores under
            `scores/`.
        items: the conditions.
        reward: what tells best from worst.
        checkpoint: what samples; as in `idc.stages.generate.Generate`.
        candidates: videos of each condition.
        margin: the least difference of the two rewards.
        seed: of the first candidate's noise.
        sampling: what differs from how the model's run samples.
        frames, height, width, fps, reference_area: of the videos, as in `GenerationData`.
        encoding: of the videos.
        weight, name: as in `ShardSource`.

    Raises:
        UserError: for fewer than two candidates, or a margin below 0.
    """

    path: str
    items: ItemSource
    reward: Reward
    checkpoint: str
    candidates: int = 4
    margin: float = MARGIN
    seed: int = 0
    weights: Which = "ema"
    sampling: SamplingChanges | None = None
    frames: int = 81
    height: int = 480
    width: int = 832
    fps: float | None = None
    encoding: Encoding = field(default_factory=Encoding)
    weight: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise UserError(f"candidates={self.candidates}: a pair takes two or more; 4 is the default")
        if not self.margin >= 0:
            raise UserError(
                f"margin={self.margin}: must be 0 or more, in units of the reward; {MARGIN:g} is the default"
            )
        self._data(0)

    @property
    def settings(self) -> dict[str, Any]:
        system = open_system(self.checkpoint, which=self.weights)
        sampling = (self.sampling or SamplingChanges()).over(system.sampling)
        return {
            "checkpoint": system.identity,
            "sampling": sampling.identity,
            "items": describe(self.items, 6),
            "reward": describe(self.reward, 8),
            "size": self._data(0).settings,
            "encoding": asdict(self.encoding),
            "candidates": self.candidates,
            "margin": self.margin,
            "seed": self.seed,
        }

    def make(self) -> Mined:
        folder = Path(self.path)
        check_free(folder)
        self.items.prepare()
        stage = Generate(str(folder), self.checkpoint, self.weights, self.sampling, encoding=self.encoding)
        seeds = range(self.seed, self.seed + self.candidates)
        folders = make_candidates(stage, [self._data(seed) for seed in seeds], folder / CANDIDATES)
        scorer = FromReward(self.reward, folder / SCORES)
        return mine(folders, scorer, folder, self.margin, record={"settings": self.settings})

    def _data(self, seed: int) -> GenerationData:
        return GenerationData(self.items, self.frames, self.height, self.width, self.fps, seed)


@dataclass
class CorruptedPairs(MadePairs):
    """Real clips against worse copies of themselves (DenseDPO-style; see `idc.data.corruptions`).

    The winner is the clip itself: the model learns towards real data, and away from one fault.

    Attributes:
        path: folder of their own.
        source: the clips.
        corruption: what is done to the copies.
        limit: only the first so many clips.
        seed: of what is drawn.
        encoding: of the copies.
        weight, name: as in `ShardSource`.
    """

    path: str
    source: Source
    corruption: Corruption
    limit: int | None = None
    seed: int = 0
    encoding: Encoding = field(default_factory=Encoding)
    weight: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit={self.limit}: must be 1 or more, or null for all")

    @property
    def settings(self) -> dict[str, Any]:
        self.source.prepare()
        return {
            "source": self.source.index().hash,
            "corruption": self.corruption.settings,
            "limit": self.limit,
            "seed": self.seed,
            "encoding": asdict(self.encoding),
        }

    def make(self) -> Mined:
        folder = Path(self.path)
        check_free(folder)
        settings, index = self.settings, self.source.index()
        entries = list(index.entries[: self.limit])
        self.corruption.load("cuda" if torch.cuda.is_available() else "cpu")
        report = Mined(conditions=len(entries), clips=len(entries))
        keys: set[str] = set()
        with ShardWriter(folder, PREFIX) as writer:
            for entry in track(entries, "worse copies", len(entries)):
                try:
                    self._write(writer, index.root, entry, keys)
                except (SampleError, UserError) as error:
                    report.drops.append(Drop(entry.id, str(error)))
        report.pairs = len(keys)
        write_drops(folder, report.drops)
        if not keys:
            reasons = "; ".join(f"{count} x {reason}" for reason, count in report.reasons().most_common())
            raise UserError(f"no pair came of {counted(len(entries), 'clip')}: {reasons}")
        finish(folder, {"settings": settings})
        return report

    def _write(self, writer: ShardWriter, root: str, entry: Entry, keys: set[str]) -> None:
        if is_pair(entry):
            raise UserError("is a pair already")
        files = read_members(root, entry)
        sample = parse_sample(files, entry)
        real_THWC = frames_of(sample)
        worse_THWC = self.corruption.corrupt(sample, seed_for(self.seed, 0, entry.id))
        if np.array_equal(real_THWC, worse_THWC):
            raise UserError("its copy is the clip itself")
        key = _key(entry, keys)
        pair = Pair(Side(entry.id), Side(f"{self.corruption.name} of {entry.id}"), self.corruption.name)
        meta = {name: value for name, value in sample.meta.items() if name not in ("source", "licence")}
        writer.write(
            key,
            files["mp4"] if clip_ext(files) == "mp4" else self._encoded(real_THWC, entry.fps),
            sample.caption,
            [(subject.name, png(subject.image_CHW), "png") for subject in sample.subjects],
            fps=entry.fps,
            frames=entry.bucket.frames,
            height=entry.bucket.height,
            width=entry.bucket.width,
            source=str(sample.meta.get("source", "")),
            licence=str(sample.meta.get("licence", "")),
            meta={**meta, PAIR: pair.to_json()},
            loser=self._encoded(worse_THWC, entry.fps),
        )
        keys.add(key)

    def _encoded(self, video_THWC: NDArray[np.uint8], fps: float) -> bytes:
        return encode_video(video_THWC, fps, **asdict(self.encoding))


def _key(entry: Entry, taken: set[str]) -> str:
    """The sample's own, whose first part names the video that it was cut from, where it can be kept."""
    if re.fullmatch(r"[\w-]{1,80}", entry.key, re.ASCII) and entry.key not in taken:
        return entry.key
    return f"{file_name(entry.key).replace('.', '_')[:60]}-{entry.sha256[:12]}"


class Regenerate(Corruption):
    """The clip noised up to t = `strength` and denoised by a model (SDEdit, arXiv 2108.01073): its faults on a real
    scene, as in DenseDPO.

    Args:
        checkpoint: what denoises; as in `idc.stages.generate.Generate`.
        strength: in (0, 1]: how much noise; 1 keeps nothing of the clip.
        sampling: what differs from how the model's run samples.

    Raises:
        UserError: for a strength out of its range.
    """

    name = "regenerated"

    def __init__(
        self,
        checkpoint: str,
        strength: float = 0.7,
        weights: Which = "ema",
        sampling: SamplingChanges | None = None,
    ) -> None:
        check_strength(strength)
        if strength == 0:
            raise UserError("strength=0: gives the clip itself back; 0.7 is the default")
        self.checkpoint, self.strength, self.weights = checkpoint, strength, weights
        self.sampling = sampling or SamplingChanges()
        self._system: System | None = None
        self._sampler: Sampler | None = None

    @property
    def settings(self) -> dict[str, Any]:
        system = self._open()
        sampling = self.sampling.over(system.sampling).identity
        return {"name": self.name, "checkpoint": system.identity, "strength": self.strength, "sampling": sampling}

    def _open(self) -> System:
        self._system = self._system or open_system(self.checkpoint, which=self.weights)
        return self._system

    def load(self, device: torch.device | str = "cpu") -> None:
        if self._sampler is None:
            system, place = self._open(), torch.device(device)
            system.encoders.place(place)
            dtype = getattr(torch, system.compute_dtype)
            transformer = system.build_transformer("cpu", dtype).requires_grad_(False).to(place)
            self._sampler = Sampler(transformer, system.encoders, place, dtype)

    def corrupt(self, sample: Sample, seed: int) -> NDArray[np.uint8]:
        self.load()
        assert self._sampler is not None
        assert sample.video_CTHW is not None
        source = Edited(sample.video_CTHW[None], self.strength)
        frames, height, width = sample.video_CTHW.shape[1:]
        bucket = Bucket(frames, height, width, len(sample.subjects)).check()
        sampling = self.sampling.over(self._open().sampling)
        video_BCTHW = self._sampler.videos([sample], bucket, torch.tensor([seed]), sampling, source)
        return to_uint8(video_BCTHW[0])
