"""Preference pairs: which clips are chosen and why others are not, what the shards hold, and what reads them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _shards import clip, picture

from idc.cli import main
from idc.data.benchmark import Item, write_items
from idc.data.corruptions import ShuffledFrames, SwappedSubjects, TurnedColours, frames_of
from idc.data.index import ShardIndex, build_index
from idc.data.item_sources import Shards
from idc.data.loader import PlanLoader
from idc.data.module import VideoDataModule
from idc.data.output import FAILURES
from idc.data.pairs import PAIR, RECORD, Pair, Side, check_pairs, is_pair, rewards_of_pairs
from idc.data.plan import HeldOutPlan, MixSource
from idc.data.quarantine import Quarantine
from idc.data.reader import ReadSettings
from idc.data.shards import SampleError, ShardWriter, read_sample
from idc.data.sources import Catalogue, ShardSource, ToyShards
from idc.data.toy import ToyWorld
from idc.data.video import encode_video
from idc.data.videos import fingerprint
from idc.errors import UserError
from idc.metrics.base import Clip, Score
from idc.metrics.results import Result, RunInfo, append_result, write_info
from idc.rewards.base import Reward
from idc.rewards.composite import Composite, Term
from idc.rewards.measures import Brightness
from idc.stages import pairs
from idc.stages.mining import DROPS, Candidate, choose, gather, mine
from idc.stages.mining_scores import FromReward, FromRuns
from idc.stages.pairs import CorruptedPairs, Regenerate
from idc.stages.rewarded import clip_of_sample
from idc.types import Bucket


def grey(level: int, frames: int = 5, side: int = 32) -> bytes:
    return encode_video(np.full((frames, side, side, 3), level, np.uint8), 8, crf=0, pixel_format="yuv444p")


def folder(path: Path, levels: dict[str, int | bytes | None], prompts: dict[str, str] | None = None) -> Path:
    """Generated videos: grey clips by id; None is an item without a video. All share the prompt "p" but those named."""
    (path / "references").mkdir(parents=True)
    (path / "references" / "a.png").write_bytes(picture("red"))
    items = []
    for name, level in levels.items():
        prompt = (prompts or {}).get(name, "p")
        items.append(Item(name, prompt, (path / "references" / "a.png",), labels=("red thing",), meta={"n": 1}))
        if level is not None:
            (path / f"{name}.mp4").write_bytes(level if isinstance(level, bytes) else grey(level))
    write_items(path, items)
    return path


def brightness(tmp_path: Path) -> FromReward:
    return FromReward(Brightness(), tmp_path / "scores", shown=False)


def drops(out: Path) -> dict[str, list[str]]:
    """Names (from the last folder on) by reason."""
    found: dict[str, list[str]] = {}
    for line in (out / DROPS).read_text().splitlines():
        values = json.loads(line)
        found.setdefault(values["reason"], []).append("/".join(Path(values["what"]).parts[-2:]))
    return found


# Mining -------------------------------------------------------------------------------------------------------------


def test_the_best_stands_against_the_worst_of_each_condition_and_the_shards_say_so(tmp_path: Path) -> None:
    """Two conditions over three folders; winners and losers keep their own bytes."""
    other = {"y": "another prompt"}
    folders = [
        folder(tmp_path / "s0", {"x": 100, "y": 10}, other),
        folder(tmp_path / "s1", {"x": 200, "y": 250}, other),
        folder(tmp_path / "s2", {"x": 50, "y": 128}, other),
    ]
    out = tmp_path / "out"
    report = mine(folders, brightness(tmp_path), out)
    assert (report.pairs, report.conditions, report.clips, report.drops) == (2, 2, 6, [])
    assert report.margins == pytest.approx([150 / 255, 240 / 255], abs=0.01)
    index = ShardIndex.load(out)
    x, y = (read_sample(out, entry) for entry in index.entries)
    levels = [[round(float((v.mean() + 1) * 127.5)) for v in (s.video_CTHW, s.loser_CTHW)] for s in (x, y)]
    assert levels == [[200, 50], [250, 10]]
    assert (x.caption, y.caption) == ("p", "another prompt")
    assert [s.name for s in x.subjects] == ["red thing"]
    assert x.meta["n"] == 1
    pair = Pair.from_json(x.meta[PAIR])
    assert (pair.winner.clip, pair.loser.clip) == (str(folders[1] / "x"), str(folders[2] / "x"))
    assert (pair.by, pair.candidates) == ("brightness", 3)
    assert pair.margin == x.meta[PAIR]["margin"] == pytest.approx(150 / 255, abs=0.01)
    assert all(map(is_pair, index.entries))
    assert main(["shards", "lint", str(out)]) == 0


def test_a_pair_of_people_is_judged_as_the_samples_that_it_was_asked_for_are(tmp_path: Path) -> None:
    """What references show and the category go from shards through generated videos into the shards of the pairs."""
    meta = {"kinds": {"anna": "human", "kite": "object"}, "category": "humanobj"}
    subjects = [(name, picture(colour), "png") for name, colour in (("anna", "red"), ("kite", "blue"))]
    with ShardWriter(tmp_path / "people", "people") as writer:
        writer.write("p0", clip(1, 9), "words", subjects, fps=8, frames=9, height=32, width=32, meta=meta)
    build_index(tmp_path / "people").save()
    folders = []
    for name, level in (("s0", 10), ("s1", 200)):
        folders.append(tmp_path / name)
        items, _ = Shards(ShardSource(str(tmp_path / "people"))).items(folders[-1])
        write_items(folders[-1], items)
        (folders[-1] / "p0.mp4").write_bytes(grey(level))
    out = tmp_path / "out"
    mine(folders, brightness(tmp_path), out)
    found = []
    for root in (tmp_path / "people", out):
        sample = read_sample(root, ShardIndex.load(root).entries[0])
        judged = clip_of_sample(sample, sample.video_CTHW, "one")
        found.append((judged.prompt, judged.category, [(r.name, r.kind) for r in judged.references]))
    assert found[0] == found[1] == ("words", "humanobj", [("anna", "human"), ("kite", "object")])


def test_what_makes_no_pair_is_named_with_its_reason(tmp_path: Path) -> None:
    names = "abcdefg"
    prompts = {name: name for name in names}
    truncated = grey(90)[:300]
    one = {"a": 100, "b": 100, "c": 100, "d": None, "e": 60, "f": 77, "g": 10}
    two = {"a": 105, "b": grey(100), "c": truncated, "d": 80, "e": grey(60, side=48), "f": 78, "g": 200}
    first, second = folder(tmp_path / "s0", one, prompts), folder(tmp_path / "s1", two, prompts)
    (first / FAILURES).write_text(json.dumps({"id": "d", "reason": "out of memory"}) + "\n")
    (second / "stray.mp4").write_bytes(grey(3))
    out = tmp_path / "out"
    report = mine([first, second], brightness(tmp_path), out, margin=0.05)
    assert report.pairs == 1
    assert drops(out) == {
        "no video": ["s0/d"],
        "broken video": ["s1/c"],
        "the same clip as another of its condition": ["s1/b"],
        "belongs to no item": ["s1/stray.mp4"],
        "the only clip of its condition": ["s0/b", "s0/c", "s0/e", "s1/d", "s1/e"],
        "margin below 0.05": ["s0/a", "s0/f"],
    }
    assert next(drop.detail for drop in report.drops if drop.reason == "no video") == "out of memory"


def candidate(name: str, condition: str = "c") -> Candidate:
    return Candidate(name, Item(name, "p"), Path(name), None, condition, name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "margin", "pair", "reasons"),
    [
        ([0.5, 0.5, 0.5], 0.0, None, ["all clips have the same score"]),
        ([0.5, 0.4, 0.5, 0.4], 0.0, ("0", "1"), []),  # of equals the first
        ([0.5, 0.25], 0.25, ("0", "1"), []),  # the margin itself is enough
        ([0.5, 0.26], 0.25, None, ["margin below 0.25"]),
        ([-3.0, -1.0], 0.0, ("1", "0"), []),
        ([0.5], 0.0, None, ["the only clip of its condition"]),
        ([None, 0.5], 0.0, None, ["no score", "fewer than two clips have a score"]),
        ([None, 0.5, 0.75], 0.0, ("2", "1"), ["no score"]),  # a failure is never the worst
        ([], 0.0, None, []),
    ],
)
def test_the_choice(values: list[float | None], margin: float, pair: Any, reasons: list[str]) -> None:
    scores = [Score.failed("no face") if value is None else Score(value) for value in values]
    found, dropped = choose([candidate(str(i)) for i in range(len(values))], scores, margin, "r")
    assert [(c.winner.name, c.loser.name) for c in found] == ([] if pair is None else [pair])
    assert [drop.reason for drop in dropped] == reasons


def test_conditions_are_told_apart_by_references_and_size_and_not_by_where_they_lie(tmp_path: Path) -> None:
    same = [folder(tmp_path / name, {"x": level}) for name, level in (("a", 1), ("b", 2))]
    blue, large = folder(tmp_path / "c", {"x": 3}), folder(tmp_path / "d", {"x": grey(4, frames=9)})
    (blue / "references" / "a.png").write_bytes(picture("blue"))
    found, _ = gather([*same, blue, large])
    conditions = [c.condition for c in found]
    assert conditions[0] == conditions[1]
    assert len(set(conditions)) == 3


class Counted(Reward):
    """Brightness, counted; clips darker than `floor` have none."""

    name = "counted"

    def __init__(self, floor: float = 0.0) -> None:
        self.floor = floor
        self._calls = 0

    def score(self, clip: Clip) -> Score:
        self._calls += 1
        value = float(clip.frames_THWC.mean()) / 255
        return Score(value) if value >= self.floor else Score.failed("too dark")


def test_scores_are_computed_once_until_clip_or_reward_change(tmp_path: Path) -> None:
    folders = [folder(tmp_path / "s0", {"x": 100}), folder(tmp_path / "s1", {"x": 200})]
    reward = Counted()

    def run(reward: Counted, out: str) -> list[float]:
        return mine(folders, FromReward(reward, tmp_path / "scores", shown=False), tmp_path / out).margins

    first = run(reward, "a")
    assert reward._calls == 2
    assert run(reward, "b") == first
    assert reward._calls == 2
    assert run(other := Counted(0.1), "c") == first
    assert other._calls == 2
    (folders[0] / "x.mp4").write_bytes(grey(20))
    assert run(reward, "d") > first
    assert reward._calls == 3


def test_a_failed_score_is_dropped_with_its_reason(tmp_path: Path) -> None:
    folders = [folder(tmp_path / f"s{i}", {"x": level}) for i, level in enumerate((10, 100, 200))]
    out = tmp_path / "out"
    report = mine(folders, FromReward(Counted(0.2), out / "scores", shown=False), out)
    assert report.pairs == 1
    assert [(d.reason, d.detail) for d in report.drops] == [("no score", "counted: too dark")]


class Judged(Brightness):
    """Has its networks' names from elsewhere, as a reward behind HTTP has."""

    models = ()

    def load(self, device: torch.device | str = "cpu") -> None:
        self.models = ("sface",)


def test_pairs_say_what_chose_them_and_whoever_trains_on_the_shards_knows(tmp_path: Path) -> None:
    """Also where all scores were kept by a call before, which alone loaded the reward."""
    folders = [folder(tmp_path / f"s{i}", {"x": 100 * i}) for i in range(2)]
    for name in ("first", "second"):
        reward = Composite([Term(Judged(), 2.0, name="light")])
        mine(folders, FromReward(reward, tmp_path / "scores", shown=False), tmp_path / name)
        record = json.loads((tmp_path / name / RECORD).read_text())
        assert (record["by"], record["models"]) == ("composite", ["sface"])
        (term,) = record["reward"]["terms"]
        assert (term["name"], term["weight"], term["reward"]["class"]) == ("light", 2.0, "test_pairs.Judged")
        assert rewards_of_pairs(ShardSource(str(tmp_path / name)).path) == ["sface"]
    assert reward.models == ()  # the second was never loaded
    assert rewards_of_pairs(str(tmp_path)) == []
    (tmp_path / RECORD).write_text("[]")
    assert rewards_of_pairs(str(tmp_path)) == []


def test_a_composite_that_normalises_does_so_within_each_condition(tmp_path: Path) -> None:
    prompts = {"x": "one", "y": "two"}
    folders = [folder(tmp_path / f"s{i}", {"x": 100 + 10 * i, "y": 200 * i + 1}, prompts) for i in range(2)]
    reward = Composite([Term(Brightness())], normalise="group")
    report = mine(folders, FromReward(reward, tmp_path / "scores", shown=False), tmp_path / "out", margin=0.1)
    assert report.margins == pytest.approx([2, 2], rel=1e-3)


def evaluated(path: Path, videos: Path, values: dict[str, float | None], stale: str = "") -> Path:
    info = RunInfo("s", "toy", dict.fromkeys(values, ""), metrics={"face": {}, "copy": {}}, videos=str(videos))
    write_info(path, info)
    from idc.data.benchmark import read_items

    for item in read_items(videos / "items.jsonl"):
        mark = "old" if item.id == stale else fingerprint(item, videos / f"{item.id}.mp4")
        value = values[item.id]
        append_result(path, Result(item.id, "face", value, "" if value is not None else "no face", fingerprint=mark))
        append_result(path, Result(item.id, "copy", 0.5, fingerprint=mark))
    return path


def test_runs_of_the_evaluation_give_their_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = {"x": "one", "y": "two", "z": "three"}
    values = [{"x": 0.2, "y": 0.9, "z": 0.1}, {"x": 0.8, "y": None, "z": 0.3}]
    runs = []
    for i, scores in enumerate(values):
        videos = folder(tmp_path / f"v{i}", {"x": 10 + 5 * i, "y": 30 + 5 * i, "z": 50 + 5 * i}, prompts)
        runs.append(str(evaluated(tmp_path / f"run{i}", videos, scores, stale="z" if i else "")))
    out = tmp_path / "out"
    assert main(["pairs", "mine", *runs, "--metric", "face=2", "--metric", "copy=-1", "--out", str(out)]) == 0
    assert "1 pair of 3 conditions" in capsys.readouterr().out
    (entry,) = ShardIndex.load(out).entries
    pair = Pair.from_json(read_sample(out, entry).meta[PAIR])
    assert pair.margin == pytest.approx(1.2)
    assert pair.by == "2 face + -1 copy"
    assert drops(out) == {
        "no score": ["v1/y", "v1/z"],
        "fewer than two clips have a score": ["v0/y", "v0/z"],
    }
    with pytest.raises(UserError, match="did you mean 'face'"):
        FromRuns(runs, {"faces": 1.0})
    with pytest.raises(UserError, match="same videos"):
        FromRuns([runs[0], evaluated(tmp_path / "run2", tmp_path / "v0", values[0])], {"face": 1.0})


def test_the_command_computes_a_reward_and_refuses_what_it_cannot_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text("reward: {class_path: idc.rewards.Brightness}\n")
    videos = [str(folder(tmp_path / f"v{i}", {"x": 50 * i})) for i in range(2)]
    reward, out = ["--reward", str(tmp_path / "r.yaml")], ["--out", str(tmp_path / "out")]
    assert main(["pairs", "mine", *videos, *reward, *out]) == 0
    assert len(ShardIndex.load(tmp_path / "out")) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "toy-000000.tar").write_bytes(b"")
    capsys.readouterr()
    new = ["--out", str(tmp_path / "out2")]
    wrong = {
        "holds finished pairs": [*videos, *reward, *out],
        "holds other shards (toy-000000.tar)": [*videos, *reward, "--out", str(tmp_path / "other")],
        "neither --metric nor --reward": [*videos, "--out", str(tmp_path / "new")],
        "new: no such folder; give folders": [str(tmp_path / "new"), *reward, "--out", str(tmp_path / "out2")],
        "new: no such folder; give runs": [str(tmp_path / "new"), "--metric", "a", "--out", str(tmp_path / "out2")],
        "toy=nan: the weight must be": [str(tmp_path / "run"), "--metric", "toy=nan", "--out", str(tmp_path / "out2")],
        "--device cuda:99: not on this machine": [*videos, *reward, "--device", "cuda:99", *new],
        "no items.jsonl": [str(tmp_path), *reward, "--out", str(tmp_path / "new")],
        "no run.json": [*videos, "--metric", "face", "--out", str(tmp_path / "new")],
        "'lots' is no number": [str(tmp_path / "run"), "--metric", "face=lots", "--out", str(tmp_path / "new")],
        "margin=-1.0: must be 0": [*videos, *reward, "--margin", "-1", "--out", str(tmp_path / "new")],
        "1 x the only clip": [videos[0], *reward, "--out", str(tmp_path / "new")],
        "needs --checkpoint": None,
    }
    write_info(tmp_path / "run", RunInfo("s", "toy", {}, videos=str(tmp_path)))
    for message, arguments in wrong.items():
        command = ["corrupt", "x", "--out", "y", "--by", "regenerated"] if arguments is None else ["mine", *arguments]
        assert main(["pairs", *command]) == 2, message
        assert message in capsys.readouterr().err


# Shards -------------------------------------------------------------------------------------------------------------


def write_pairs(root: Path, count: int = 4, loser: bytes | None = None, lone: int = -1) -> ShardIndex:
    """Winners of grey 20 i, losers of 20 i + 10, each of 9 frames; `lone` has no loser."""
    with ShardWriter(root, "pairs", 3) as writer:
        for i in range(count):
            worse = None if i == lone else loser or clip(2 * i + 1, 9)
            size = {"fps": 8, "frames": 9, "height": 32, "width": 32}
            meta = {PAIR: Pair(Side("a", 1.0), Side("b", 0.5), "r").to_json()}
            writer.write(
                f"p{i}", clip(2 * i, 9), "words", [("dog", picture("red"), "png")], **size, meta=meta, loser=worse
            )
    index = build_index(root)
    index.save()
    return index


def test_a_pair_travels_whole_through_loader_workers_and_window(tmp_path: Path) -> None:
    """The window of five of nine frames is that of the winner, the ids and seeds those of any sample."""
    ramp = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.full((1, 32, 32, 3), 20, np.uint8)
    moving = encode_video(ramp, 8, crf=0, pixel_format="yuv444p")
    with ShardWriter(tmp_path / "shards", "pairs") as writer:
        for i in range(6):
            writer.write(f"p{i}", moving, "w", fps=8, frames=9, height=32, width=32, loser=moving)
    build_index(tmp_path / "shards").save()
    starts = set()
    for workers in (0, 1):
        data = VideoDataModule([ShardSource(str(tmp_path / "shards"))], [[5, 32, 32]], 2, num_workers=workers)
        data.setup("fit")
        for batch in data.train_dataloader():
            for sample in batch.samples:
                assert sample.loser_CTHW is not None
                assert sample.loser_CTHW.shape == (3, 5, 32, 32)
                assert torch.equal(sample.video_CTHW, sample.loser_CTHW)
                starts.add(round(float(sample.video_CTHW[0, 0].mean() + 1) * 127.5 / 20))
            moved = batch.to("cpu", dtype=torch.float64)
            assert moved.samples[0].loser_CTHW.dtype == torch.float64
        data.teardown()
    assert len(starts) > 1


def test_a_pair_with_a_broken_loser_is_put_aside_as_a_whole(tmp_path: Path) -> None:
    index = write_pairs(tmp_path)
    bad = index.entries[1]
    member = next(m for m in bad.members if m.ext == "loser.mp4")
    with (tmp_path / bad.shard).open("r+b") as stream:
        stream.seek(member.offset)
        stream.write(bytes(member.size))
    plan = HeldOutPlan([MixSource("s", np.zeros(4, np.int64))], [Bucket(9, 32, 32, 1)], 4, 0)
    loader = PlanLoader(
        plan, Catalogue([index]), ReadSettings(verify=False), quarantine=Quarantine(), max_corrupt_rate=0.9
    )
    (batch,) = loader
    assert bad.id not in batch.ids
    assert batch.padding == 1
    assert "broken loser.mp4" in batch.failures[0].reason


def test_a_loser_of_another_size_is_found_and_a_sample_without_one_is_named(tmp_path: Path) -> None:
    index = write_pairs(tmp_path / "a", loser=clip(1, 5))
    with pytest.raises(SampleError, match="5 frames of 32x32, the index says 9"):
        read_sample(tmp_path / "a", index.entries[0])
    lone = write_pairs(tmp_path / "b", lone=2)
    assert [is_pair(entry) for entry in lone.entries] == [True, True, False, True]
    with pytest.raises(UserError, match=r"sources: 1 sample without a second clip, such as b/pairs-000000/p2"):
        check_pairs(lone.entries, "sources")


def test_equal_input_gives_equal_shards_and_what_was_interrupted_is_replaced(tmp_path: Path) -> None:
    folders = [folder(tmp_path / f"s{i}", {"x": 50 * i}) for i in range(2)]
    scorer = brightness(tmp_path)
    for out in ("a", "b"):
        if out == "b":
            (tmp_path / out).mkdir()
            (tmp_path / out / "pairs-000003.tar").write_bytes(b"half of a shard")
        mine(folders, scorer, tmp_path / out)
    contents = [{p.name: p.read_bytes() for p in (tmp_path / out).glob("*.tar")} for out in "ab"]
    assert contents[0] == contents[1]


# Worse copies of real clips -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> ToyShards:
    path = tmp_path_factory.mktemp("real") / "toy"
    shards = ToyShards(str(path), 6, frames=5, height=32, width=32, reference_size=16)
    shards.prepare()
    return shards


def test_corruptions_change_what_they_say_and_only_that() -> None:
    world = ToyWorld(frames=5, subjects=(0, 1, 0))
    sample = world.sample(3)
    frames = frames_of(sample)
    shuffled = ShuffledFrames().corrupt(sample, 7)
    assert not np.array_equal(shuffled, frames)
    assert sorted(f.tobytes() for f in shuffled) == sorted(f.tobytes() for f in frames)
    turned = TurnedColours().corrupt(sample, 7)
    assert np.array_equal(np.sort(turned, -1), np.sort(frames, -1))
    assert not np.array_equal(turned, frames)
    swapped = SwappedSubjects().corrupt(sample, 7)
    assert 0 < (swapped != frames).any(-1).mean() < 0.6  # the background stays
    for corruption in (ShuffledFrames(), TurnedColours(), SwappedSubjects()):
        assert np.array_equal(corruption.corrupt(sample, 7), corruption.corrupt(sample, 7))
    still = replace(sample, video_CTHW=sample.video_CTHW[:, :1])
    with pytest.raises(UserError, match="one frame"):
        ShuffledFrames().corrupt(still, 0)
    with pytest.raises(UserError, match="no toy clip"):
        SwappedSubjects().corrupt(replace(sample, meta={}), 0)


def test_the_command_pairs_real_clips_with_worse_copies(
    real: ToyShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--by", "swapped_subjects", "--crf", "0", "--pixel-format", "yuv444p"]
    assert main(["pairs", "corrupt", real.path, "--out", str(out), *options]) == 0
    originals = {entry.key: read_sample(real.path, entry) for entry in real.index().entries}
    found = {entry.key: read_sample(out, entry) for entry in ShardIndex.load(out).entries}
    alone = {key for key, sample in originals.items() if len(sample.subjects) == 1}
    assert set(found) == set(originals) - alone
    for key, sample in found.items():
        assert torch.equal(sample.video_CTHW, originals[key].video_CTHW)
        assert not torch.equal(sample.loser_CTHW, sample.video_CTHW)
        assert (sample.caption, sample.meta["toy"]) == (originals[key].caption, originals[key].meta["toy"])
        assert sample.meta[PAIR]["by"] == "swapped_subjects"
    assert drops(out).get("no two subjects that look different", []) == [f"toy-000000/{key}" for key in sorted(alone)]
    assert "swapped" not in capsys.readouterr().err
    again = ["pairs", "corrupt", str(out), "--out", str(tmp_path / "twice"), "--by", "turned_colours"]
    assert main(again) == 2
    assert "is a pair already" in capsys.readouterr().err


def test_a_model_regenerates_clips_by_strength(real: ToyShards) -> None:
    """A weak edit stays nearer to the clip than a strong one; each is the same again."""
    sample = read_sample(real.path, real.index().entries[0])
    from idc.models.sampling import SamplingChanges

    def distance(strength: float) -> tuple[float, np.ndarray]:
        made = Regenerate("toy", strength, sampling=SamplingChanges(steps=2, scale=1.0)).corrupt(sample, 5)
        return float(np.abs(made.astype(int) - frames_of(sample)).mean()), made

    weak, strong = distance(0.2), distance(0.9)
    assert 0 < weak[0] < strong[0]
    assert np.array_equal(distance(0.9)[1], strong[1])
    for strength, message in ((0.0, "the clip itself"), (1.5, "strength=1.5")):
        with pytest.raises(UserError, match=message):
            Regenerate("toy", strength)


def test_pairs_are_made_once_and_never_mixed_with_others(real: ToyShards, tmp_path: Path) -> None:
    made = CorruptedPairs(str(tmp_path / "p"), real, ShuffledFrames(), limit=2)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    made.prepare()
    assert torch.equal(torch.get_rng_state(), before)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()}
    made.prepare()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "p").iterdir()} == stamps
    with pytest.raises(UserError, match=r"another corruption, limit; give another path"):
        CorruptedPairs(str(tmp_path / "p"), real, TurnedColours(), limit=3).prepare()
    shutil.rmtree(tmp_path / "p")
    made.prepare()
    assert len(made.index()) == 2
    for name, arguments in {"candidates=1": {"candidates": 1}, "margin=-0.1": {"margin": -0.1}}.items():
        with pytest.raises(UserError, match=name):
            pairs.MinedPairs("x", None, Brightness(), "toy", **arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="limit=0"):
        CorruptedPairs("x", real, TurnedColours(), limit=0)
