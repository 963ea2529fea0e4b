"""Preference pairs from generated videos: of each condition's candidates the best against the worst.

Candidates are the videos of one condition (prompt, references and all else that was asked for) in one folder or in
several, such as one folder a seed. What makes no pair is named with its reason: nothing is lost in silence, and what
has no score is never taken for a bad one.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from idc.data import storage
from idc.data.benchmark import ITEMS, Item, file_name, read_items
from idc.data.index import INDEX_NAME, ShardIndex, build_index
from idc.data.pairs import PAIR, RECORD, Pair, Side
from idc.data.plan import stable_hash
from idc.data.shards import Reference, ShardWriter
from idc.data.video import VideoError, VideoInfo, probe
from idc.data.videos import find_videos
from idc.errors import UserError, counted
from idc.metrics.base import Score
from idc.models.sampling import to_uint8
from idc.pictures import read_picture

PREFIX, DROPS = "pairs", "drops.jsonl"
MARGIN = 0.05


@dataclass(frozen=True)
class Drop:
    """What makes no pair: a clip, or a condition with all its clips, by the name of its first."""

    what: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Candidate:
    """A generated video of an item.

    Attributes:
        name: folder and id, as messages and shards have it.
        condition: hash of all that was asked for, and of the video's size: winner and loser share it.
    """

    name: str
    item: Item
    video: Path
    info: VideoInfo
    condition: str
    sha256: str


class Scorer(Protocol):
    """Where the scores come from."""

    by: str

    @property
    def record(self) -> Mapping[str, Any]:
        """After `scores`: what it is as plain JSON, and the networks that it stands on under "models"."""

    def scores(self, candidates: Sequence[Candidate]) -> list[Score]:
        """One for each, in order, comparable within a condition; a failed one has its reason."""


@dataclass
class Mined:
    """What came of mining.

    Attributes:
        pairs: how many were written. conditions, clips: of how many. means: of the scores, by folder.
        drops: everything else, with reasons.
    """

    pairs: int = 0
    conditions: int = 0
    clips: int = 0
    margins: list[float] = field(default_factory=list)
    means: dict[str, float] = field(default_factory=dict)
    drops: list[Drop] = field(default_factory=list)

    def reasons(self) -> Counter[str]:
        """How many drops there are of each reason."""
        return Counter(drop.reason for drop in self.drops)


@dataclass(frozen=True)
class Choice:
    """A pair as it will be written."""

    winner: Candidate
    loser: Candidate
    pair: Pair


# Candidates ---------------------------------------------------------------------------------------------------------


def gather(folders: Sequence[str | Path]) -> tuple[list[Candidate], list[Drop]]:
    """The videos of folders that `idc generate` made, in order, and what is missing, broken, or there twice.

    Raises:
        UserError: for a folder without `items.jsonl`, or without any of their videos.
    """
    found: list[Candidate] = []
    drops: list[Drop] = []
    first: dict[tuple[str, str], str] = {}  # (condition, bytes) -> whose
    condition = _Conditions()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give folders of videos as idc generate makes them")
        if not (folder / ITEMS).is_file():
            raise UserError(f"{folder}: no {ITEMS} here; give folders of videos as idc generate makes them")
        items = read_items(folder / ITEMS)
        videos = find_videos(folder, [item.id for item in items])
        for item in items:
            name = f"{folder}/{item.id}"
            made = _candidate(name, item, videos.videos.get(item.id), videos.reasons.get(item.id, ""), condition)
            if isinstance(made, Drop):
                drops.append(made)
            elif twin := first.get((made.condition, made.sha256)):
                drops.append(Drop(name, "the same clip as another of its condition", twin))
            else:
                first[made.condition, made.sha256] = name
                found.append(made)
        drops += [Drop(f"{folder}/{name}", "belongs to no item", why) for name, why in videos.extra.items()]
    return found, drops


def _candidate(
    name: str, item: Item, video: Path | None, why: str, condition: Callable[[Item, VideoInfo], str]
) -> Candidate | Drop:
    if video is None:
        return Drop(name, "no video", why)
    try:
        info = probe(video)
        with video.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return Candidate(name, item, video, info, condition(item, info), sha256)
    except (VideoError, OSError) as error:
        return Drop(name, "broken video", str(error))
    except UserError as error:
        return Drop(name, "a reference cannot be read", str(error))


class _Conditions:
    """Hash of all that was asked for and of the size; equal pictures count as equal wherever they lie."""

    def __init__(self) -> None:
        self._digests: dict[Path, str] = {}

    def __call__(self, item: Item, info: VideoInfo) -> str:
        pictures = [self._digest(picture) for picture in item.references]
        asked = [item.prompt, pictures, item.labels, item.kinds, item.category, item.meta]
        return stable_hash([*asked, info.frames, info.height, info.width])

    def _digest(self, picture: Path) -> str:
        if picture not in self._digests:
            pixels_CHW = read_picture(picture)
            content = str(tuple(pixels_CHW.shape)).encode() + pixels_CHW.numpy().tobytes()
            self._digests[picture] = hashlib.sha256(content).hexdigest()
        return self._digests[picture]


# Choice -------------------------------------------------------------------------------------------------------------


def choose(
    candidates: Sequence[Candidate], scores: Sequence[Score], margin: float, by: str
) -> tuple[list[Choice], list[Drop]]:
    """The best against the worst of each condition, in the order of their first candidates.

    Of equal scores the first counts, so equal input gives equal pairs.

    Args:
        margin: the least by which the winner's score exceeds the loser's; a tie makes no pair at any margin.
        by: what scored them.
    """
    groups: dict[str, list[tuple[Candidate, Score]]] = {}
    for candidate, score in zip(candidates, scores, strict=True):
        groups.setdefault(candidate.condition, []).append((candidate, score))
    choices: list[Choice] = []
    drops: list[Drop] = []
    for members in groups.values():
        drops += [Drop(c.name, "no score", score.reason) for c, score in members if score.value is None]
        scored = [(c, score.value) for c, score in members if score.value is not None]
        what = members[0][0].name
        if len(scored) < 2:
            alone = "the only clip of its condition" if len(members) == 1 else "fewer than two clips have a score"
            drops.append(Drop(what, alone))
            continue
        (winner, high), (loser, low) = (f(scored, key=lambda entry: entry[1]) for f in (max, min))
        if high == low:
            drops.append(Drop(what, "all clips have the same score", f"{len(scored)} clips, {high:.4g}"))
        elif high - low < margin:
            drops.append(Drop(what, f"margin below {margin:g}", f"{high:.4g} - {low:.4g} = {high - low:.4g}"))
        else:
            pair = Pair(Side(winner.name, high), Side(loser.name, low), by, len(scored))
            choices.append(Choice(winner, loser, pair))
    return choices, drops


# All of it ----------------------------------------------------------------------------------------------------------


def mine(
    folders: Sequence[str | Path],
    scorer: Scorer,
    out: str | Path,
    margin: float = MARGIN,
    record: Mapping[str, Any] | None = None,
) -> Mined:
    """Write preference shards with their index, and `drops.jsonl` with what makes no pair.

    What an interrupted call left in `out` is replaced.

    Args:
        folders: of generated videos with their `items.jsonl`.
        margin: see `choose`.
        record: plain JSON that goes into `pairs.json`.

    Raises:
        UserError: for folders that hold no videos, an `out` with other shards, a margin below 0, or where not one pair
            comes of it all.
    """
    if not margin >= 0:
        raise UserError(f"margin={margin}: must be 0 or more, in units of the score; {MARGIN:g} is the default")
    out = Path(out)
    check_free(out)
    candidates, drops = gather(folders)
    scores = scorer.scores(candidates)
    choices, more = choose(candidates, scores, margin, scorer.by)
    report = Mined(len(choices), len({c.condition for c in candidates}), len(candidates), drops=[*drops, *more])
    report.margins = [choice.pair.margin or 0.0 for choice in choices]
    report.means = _means(candidates, scores)
    write_drops(out, report.drops)
    if not choices:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in report.reasons().most_common())
        clips = counted(len(candidates) + len(drops), "clip")
        raise UserError(f"no pair came of {clips}: {reasons} (each in {out / DROPS})")
    with ShardWriter(out, PREFIX) as writer:
        for key, choice in zip(_keys(choices), choices, strict=True):
            write_choice(writer, key, choice)
    counts = {"by": scorer.by, "margin": margin, "pairs": len(choices), "clips": len(candidates), **scorer.record}
    finish(out, {**counts, **(record or {})})
    return report


def check_free(out: Path) -> None:
    """Make `out` ready for pairs: nothing finished or foreign lies there, and nothing unfinished any more.

    Raises:
        UserError: for shards that are none of ours, or pairs that are complete.
    """
    tars = storage.list_tars(out) if out.is_dir() else []
    foreign = [name for name in tars if not name.startswith(f"{PREFIX}-")]
    if foreign or (out / RECORD).exists():
        what = f"holds other shards ({foreign[0]})" if foreign else "holds finished pairs"
        raise UserError(f"out={out}: {what}; give the pairs a folder of their own")
    for name in (INDEX_NAME, *tars):
        (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)


def write_choice(writer: ShardWriter, key: str, choice: Choice) -> None:
    """One pair into a shard: the videos' own bytes, and the references as the model sees them."""
    item, info = choice.winner.item, choice.winner.info
    # As rewards ask for them: a sample of the pair is judged like the candidates were.
    told = {"kinds": dict(zip(item.labels, item.kinds, strict=False)), "category": item.category}
    writer.write(
        key,
        choice.winner.video.read_bytes(),
        item.prompt,
        references(item),
        fps=info.fps,
        frames=info.frames,
        height=info.height,
        width=info.width,
        source="generated",
        meta={**{name: value for name, value in told.items() if value}, **item.meta, PAIR: choice.pair.to_json()},
        loser=choice.loser.video.read_bytes(),
    )


def references(item: Item) -> list[Reference]:
    """An item's pictures as a shard takes them: upright, on white, as PNG."""
    labels = item.labels or ("",) * len(item.references)
    return [(label, png(read_picture(path)), "png") for label, path in zip(labels, item.references, strict=True)]


def png(image_CHW: torch.Tensor) -> bytes:
    """A picture in [-1, 1] as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image_CHW)).save(buffer, "png")
    return buffer.getvalue()


def write_drops(out: Path, drops: Sequence[Drop]) -> None:
    """`drops.jsonl`, whole or not at all."""
    with storage.open_atomic(str(out / DROPS)) as stream:
        stream.writelines(json.dumps(asdict(drop), ensure_ascii=False).encode() + b"\n" for drop in drops)


def finish(out: Path, record: Mapping[str, Any]) -> ShardIndex:
    """The index of finished shards, and the record that they are finished, last."""
    index = build_index(out)
    index.save()
    with storage.open_atomic(str(out / RECORD)) as stream:
        stream.write((json.dumps({**record, "index": index.hash}, indent=1) + "\n").encode())
    return index


def _keys(choices: Sequence[Choice]) -> Iterator[str]:
    """Item and condition, as one item may have been made for several."""
    for choice in choices:
        yield f"{file_name(choice.winner.item.id).replace('.', '_')[:60]}-{choice.winner.condition[:12]}"


def _means(candidates: Sequence[Candidate], scores: Sequence[Score]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for candidate, score in zip(candidates, scores, strict=True):
        if score.value is not None:
            values.setdefault(str(candidate.video.parent), []).append(score.value)
    return {folder: sum(each) / len(each) for folder, each in values.items()}
