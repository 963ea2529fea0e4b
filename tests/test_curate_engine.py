"""The engine of curation: nothing lost, nothing twice, whatever happens, and the same bytes however it is run."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import resource
import shutil
import signal
import tarfile
import time
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import _curate
import numpy as np
import pytest
from _curate import STEPS, Again, Cut, Dies, Fails, Heavy, Idle, Numbers, Resets, Split, Weigh, curation, files
from _server import join, launch

from idc.cli import main
from idc.curate.candidate import Box, Candidate, CuratedSubject, Dropped, EncodedClip, Reference
from idc.curate.chunks import Encoding
from idc.curate.local import LocalExecutor
from idc.curate.parts import Count, Outcomes, Part, write_part
from idc.curate.plan import chunks
from idc.curate.records import settle, take_apart
from idc.curate.writing import ShardWriting
from idc.data.video import decode_video
from idc.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _forks() -> None:
    """Workers fork from the server of all tests."""
    join(launch(print, [()]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    curation(out).run()
    return files(out)


def full_candidate(key: str = "film-1") -> Candidate:
    draw = np.random.default_rng(0)
    mask = draw.random((9, 11)) > 0.5
    subject = CuratedSubject(
        "the woman in red",
        "person",
        Box(1.5, 2, 30.25, 40),
        mask,
        3,
        0.75,
        draw.random(5, np.float32),
        "sface 2021",
        (Reference(b"png bytes", seconds=1.25, similarity=0.5, meta={"a": [1]}), Reference(b"\xff\xd8 jpg", "jpg")),
        ((4, Box(0, 1, 2, 3)), (9, Box(1, 1, 2, 3))),
        {"known": True},
    )
    return Candidate(
        key,
        "films",
        "a/film.mp4",
        "s3://bucket/a/film.mp4",
        (3, 90),
        Box(0, 0, 64, 48),
        (3, 5, 7),
        8.0,
        draw.integers(0, 256, (3, 6, 4, 3), dtype=np.uint8),
        EncodedClip(b"an mp4", 3, 6, 4),
        "A woman in red — “walks”.",
        (subject, CuratedSubject("a dog")),
        {"aesthetic": 0.1},
        {"detector": "yunet"},
        "CC BY 4.0",
        {"nsfw": False},
        {"note": [1, {"x": None}]},
    )


def part_of(*candidates: Candidate, drops: tuple[Dropped, ...] = ()) -> bytes:
    stream = BytesIO()
    count = Count("source", len(candidates), 0, len(candidates), len(drops))
    write_part(stream, Outcomes([("films", "a")], [count], list(drops), candidates))
    return stream.getvalue()


def assert_equal(one: Candidate, other: Candidate) -> None:
    (record, blobs), (record2, blobs2) = take_apart(one), take_apart(other)
    assert record == record2
    assert blobs.keys() == blobs2.keys()
    for name, blob in blobs.items():
        assert np.array_equal(blob, blobs2[name]) if isinstance(blob, np.ndarray) else blob == blobs2[name], name


def test_a_part_gives_back_every_field_and_its_known_facts_without_pixels() -> None:
    candidates = [full_candidate(), Candidate("bare", "films", "b", "b.mp4")]
    drop = Dropped("films", "c", "", "source", "no frames", "0 of 0")
    data = part_of(*candidates, drops=(drop,))
    part = Part(data)
    for number, candidate in enumerate(candidates):
        assert_equal(part.load(number), candidate)
    assert part.keys == ["film-1", "bare"]
    assert part.units == [("films", "a")]
    assert list(part.drops()) == [drop]
    assert part.counts == [Count("source", 2, 0, 2, 1)]
    assert part_of(*part.whole(), drops=tuple(part.drops())) == data

    known, _ = part
    assert known.clip is None
    assert known.encoded == EncodedClip(b"", 3, 6, 4)
    assert known.subjects[0].mask is None
    assert np.array_equal(known.subjects[0].embedding, candidates[0].subjects[0].embedding)
    assert known.subjects[0].references[0].image == b""
    assert known.subjects[0].references[0].seconds == 1.25
    pictures = part.load(0, clip=False)
    assert pictures.clip is None
    assert [reference.image for reference in pictures.subjects[0].references] == [b"png bytes", b"\xff\xd8 jpg"]


def test_a_part_is_a_plain_tar_without_pickle() -> None:
    with tarfile.open(fileobj=BytesIO(part_of(full_candidate()))) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
    assert list(contents) == [
        "part.json",
        "candidates.jsonl",
        "drops.jsonl",
        "film-1.clip.npy",
        "film-1.mp4",
        "film-1.s0.mask.png",
        "film-1.s0.ref0.png",
        "film-1.s0.ref1.jpg",
    ]
    assert contents["film-1.mp4"] == b"an mp4"
    assert np.load(BytesIO(contents["film-1.clip.npy"]), allow_pickle=False).shape == (3, 6, 4, 3)


@pytest.mark.parametrize("cut", [0, 100, 700, 2000])
def test_a_part_that_was_cut_or_overwritten_is_named(cut: int, tmp_path: Path) -> None:
    data = part_of(full_candidate())
    path = tmp_path / "part-0.tar"
    path.write_bytes(data[:cut])
    with pytest.raises(UserError, match=r"part-0.tar: damaged \(.*remove it"):
        list(Part(str(path)).whole())
    path.write_bytes(data[:cut] + bytes(len(data) - cut))
    with pytest.raises(UserError, match="damaged"):
        list(Part(str(path)).whole())


def test_what_a_step_gives_is_plain_data_for_the_next_one() -> None:
    candidate = full_candidate().changed(
        scores={"clip": np.float32(0.1)}, meta={"pair": (1, np.int64(2)), "by": {3: Path("x")}}, ranks=np.arange(3)
    )
    plain = settle(candidate)
    assert plain.scores == {"clip": float(np.float32(0.1))}
    assert type(plain.scores["clip"]) is float
    assert plain.meta["pair"] == [1, 2]
    assert plain.meta["by"] == {"3": "x"}
    assert plain.ranks == (0, 1, 2)
    assert isinstance(plain.crop, Box)
    assert plain.clip is candidate.clip  # pixels are not copied
    assert_equal(settle(plain), plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": "a.b"}, "key='a.b'"),
        ({"scores": {"x": float("nan")}}, "not JSON compliant"),
        ({"meta": {"x": object()}}, "object is no plain data"),
        ({"clip": np.zeros((1, 2, 2, 3), np.float32)}, "clip is float32"),
        ({"clip": np.zeros((0, 2, 2, 3), np.uint8)}, "clip is uint8"),
        ({"subjects": (CuratedSubject("x", mask=np.zeros((2, 2), np.uint8)),)}, "s0: mask is uint8"),
        ({"subjects": (CuratedSubject("x", embedding=np.zeros((2, 2), np.float32)),)}, "s0: embedding"),
    ],
)
def test_what_cannot_be_written_is_said_where_it_is_made(change: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        settle(full_candidate().changed(**change))


def test_clips_are_encoded_behind_the_last_step(tmp_path: Path) -> None:
    report = curation(tmp_path, 4, steps=(Cut(encoded=False, size=32),)).run()
    assert report.kept == 4
    (shard,) = (tmp_path / "train").glob("*.tar")
    with tarfile.open(shard) as tar:
        clips = [tar.extractfile(member).read() for member in tar if member.name.endswith(".mp4")]  # type: ignore[union-attr]
    for clip in clips:
        assert decode_video(clip).shape == (1, 32, 32, 3)
    odd = Candidate("k", "s", "v", "p", clip=np.zeros((2, 15, 16, 3), np.uint8))
    assert Encoding(pixel_format="yuv420p")(odd.changed(fps=8.0)).reason == "cannot be encoded"  # type: ignore[union-attr]
    assert Encoding()(odd.changed(fps=8.0)).encoded[1:] == (2, 15, 16)  # type: ignore[union-attr, index]
    assert Encoding()(odd).reason == "cannot be encoded"  # type: ignore[union-attr]  # moving, without a rate
    assert Encoding()(odd.changed(clip=None)).reason == "no clip"  # type: ignore[union-attr]


def test_counts_add_up_and_say_what_each_step_did(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    report = curation(tmp_path).run()
    rows = {count.step: (count.came, count.made, count.kept, count.dropped) for count in report.counts}
    thirds = sum(n % 3 == 0 and n % 7 != 3 for n in range(60))
    sevenths = sum(n % 7 == 3 for n in range(60))
    assert rows["source"] == (60, 0, 60, 0)
    assert rows["split"] == (60, thirds, 60 + thirds - sevenths, sevenths)
    assert rows["heavy"][3] > 0  # or the recipe tests less than it says
    assert report.read == 60 + thirds == report.kept + report.dropped
    drops = [json.loads(line) for line in undisturbed["drops.jsonl"].splitlines()]
    assert Counter(drop["step"] for drop in drops) == {n: row[3] for n, row in rows.items() if row[3]}
    assert json.loads(undisturbed["counts.json"])["read"] == report.read


def test_runs_are_equal_to_the_byte_and_a_second_one_opens_nothing(
    undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    steps = (Cut(), Split(), Weigh(log=str(log)), Heavy())
    for workers in (0, 2):
        out = tmp_path / str(workers)
        report = curation(out, workers=workers, steps=steps).run()
        assert report.done_before == 0
        assert files(out) == undisturbed
    lines = log.read_text().splitlines()
    batches = Counter(line for line in lines if line.startswith("batch"))
    assert set(batches.values()) == {2}  # the same batches, once in each run
    assert len([line for line in lines if line.startswith("load")]) <= 3  # once a process
    log.write_text("")
    report = curation(tmp_path / "0", steps=steps).run()
    assert report.done_before == report.units == 60
    assert log.read_text() == ""
    assert files(tmp_path / "0") == undisturbed


def test_fifty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    draw = random.Random(0)
    curation(tmp_path / "undisturbed", 24).run()
    undisturbed = files(tmp_path / "undisturbed")
    began = time.monotonic()
    assert join(launch(_curate.run, [(str(tmp_path / "timed"), 24)])) == [0]
    usual = time.monotonic() - began
    kills, interrupted, number = 0, 0, 0
    while kills < 50:
        out = str(tmp_path / str(number))
        (process,) = launch(_curate.run, [(out, 24)])
        process.join(draw.uniform(0, usual))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        interrupted += process.exitcode == -signal.SIGKILL and len(list(Path(out, "work").glob("part-*.tar"))) > 0
        if process.exitcode == 0:  # it was faster: compare, and begin another
            assert files(out) == undisturbed
            number += 1
    curation(out, 24).run()
    assert files(out) == undisturbed
    assert interrupted > 5  # some of the kills fell into the work


def test_a_run_whose_parent_is_killed_leaves_no_worker_in_the_way(
    undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    for number in range(2):
        (process,) = launch(_curate.run, [(str(tmp_path), 60, number * 2)])
        process.join(0.3)
        process.kill()
        process.join()
    curation(tmp_path, workers=2).run()
    assert files(tmp_path) == undisturbed


@pytest.mark.parametrize(("workers", "number"), [(0, signal.SIGINT), (0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_ends_politely_and_the_same_command_goes_on(
    workers: int, number: int, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = (str(out), str(tmp_path / "mark"), str(log), workers, number)
    assert join(launch(_curate.stopped, [arguments])) == [130]
    words = log.read_text()
    assert f"what is done stays in {out}/work; the same command goes on" in words
    assert "Traceback" not in words
    assert not list(out.rglob("*.tmp"))
    begun = len(list(out.rglob("part-*.tar")))
    assert join(launch(_curate.stopped, [arguments])) == [0]
    assert begun < len(list(out.rglob("part-*.tar")))
    assert {k: v for k, v in files(out).items() if k.endswith("drops.jsonl")} == {
        "drops.jsonl": undisturbed["drops.jsonl"]
    }


def test_a_fault_in_a_step_drops_its_candidate_alone(tmp_path: Path) -> None:
    report = curation(tmp_path, steps=(Cut(), Fails((20, 41))), keep=None).run() if False else None
    assert report is None
    report = curation(tmp_path, steps=(Cut(), Fails((20, 41)))).run()
    assert report.kept == 58
    drops = [json.loads(line) for line in (tmp_path / "drops.jsonl").read_text().splitlines()]
    assert [(drop["video"], drop["step"], drop["reason"]) for drop in drops] == [
        ("n00020", "fails", "step failed"),
        ("n00041", "fails", "step failed"),
    ]
    assert drops[0]["detail"] == "RuntimeError: number 20 is not liked"


def test_a_step_names_the_models_that_it_used_and_leaves_those_of_what_it_left(tmp_path: Path) -> None:
    for source, idle in ((Again(3), "idle 0.1"), (Numbers(3), "idle 1.0")):
        curation(tmp_path / idle, sources=[source], steps=(Cut(), Weigh(), Idle())).run()
        models = json.loads((tmp_path / idle / "manifest.json").read_text())["models"]
        assert (models["weigh"], models["idle"]) == (["linear 1.0"], [idle])
        assert models.get("caption", ["a writer"]) == ["a writer"]


def test_a_fault_of_the_encoder_drops_its_clip_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"preset='slwo' is none of x264's; did you mean 'slow'\?"):
        Encoding(preset="slwo")
    encoding = Encoding()
    object.__setattr__(encoding, "preset", "slwo")  # what FFmpeg refuses, whatever it is
    report = curation(tmp_path, 3, steps=(Cut(encoded=False, size=32),), encoding=encoding).run()
    assert report.written is not None
    assert report.written.dropped == {"encode": {"step failed": 3}}
    assert (report.counts[2].step, report.counts[2].failed) == ("encode", 3)


@pytest.mark.parametrize("most", [1000, 100_000])  # bytes: less than a part has, and than a shard
def test_a_disk_that_is_full_is_told_in_one_line(most: int, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    few = curation(tmp_path, 60, writing=ShardWriting(held_out=0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}(/work)?: OSError: .*File too large$"):
            few.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert bool(list(tmp_path.rglob("part-*.tar"))) == (most > 1000)
    few.run()


def test_a_store_that_ends_connections_is_told_by_workers_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/work: ConnectionResetError: \[Errno 104\] Connection reset by peer$"):
        curation(tmp_path, sources=[Resets(6)], workers=1).run()


def test_many_faults_stop_the_run_and_what_failed_is_done_again_when_asked(tmp_path: Path) -> None:
    bad = tuple(range(10, 40))
    for workers in (0, 2):
        out = tmp_path / str(workers)
        with pytest.raises(UserError, match=r"failed by a fault, more than max_failure_rate=0.05; .*not liked"):
            curation(out, steps=(Cut(), Fails(bad)), workers=workers).run()
    report = curation(out, steps=(Cut(), Fails(bad)), max_failure_rate=1.0).run()
    assert report.kept == 30
    mended = Fails(bad)
    mended.describe = lambda: Fails(bad).describe()  # type: ignore[method-assign]  # as by a new version of the code
    mended.numbers = ()
    assert curation(out, steps=(Cut(), mended), retry_failed=True).run().kept == 60


def test_a_step_that_gives_nonsense_is_a_fault_and_a_users_error_ends_the_run(tmp_path: Path) -> None:
    class Odd(Numbers):
        def open(self, id: str, payload: Any) -> Any:
            number = payload["number"]
            if number == 3:
                return
            yield from super().open(id, payload)
            if number == 4:
                raise KeyError("moov")
            if number == 5:
                yield Dropped(self.name, id, "", "source", "second track", "is sound")

    class Nonsense(Cut):
        name = "nonsense"

        def __call__(self, candidates: Any) -> Any:
            (candidate,) = candidates
            number = candidate.meta["number"]
            if number == 6:
                return [[]]
            if number == 7:
                return []
            if number == 8:
                return [[candidate.scored(x=float("inf"))]]
            if number == 9:
                return [[None]]
            return super().__call__(candidates)

    report = curation(tmp_path, steps=(Nonsense(),), sources=[Odd(12)]).run()
    drops = [json.loads(line) for line in (tmp_path / "drops.jsonl").read_text().splitlines()]
    reasons = {drop["video"]: drop["reason"] for drop in drops}
    assert reasons == {
        "n00003": "nothing in it",
        "n00004": "source failed",
        "n00005": "second track",
        **{f"n0000{number}": "step failed" for number in (6, 7, 8, 9)},
    }
    assert report.read == 14 == report.kept + report.dropped  # two units gave a candidate and a drop
    assert report.kept == 7

    class Unloadable(Cut):
        def load(self, device: Any = "cpu") -> None:
            raise OSError("no space left")

    with pytest.raises(UserError, match="step 'unready': no weights at /models/sam"):
        curation(tmp_path / "a", steps=(_curate.Unready(),)).run()
    with pytest.raises(UserError, match="step 'unloadable' cannot be loaded: OSError: no space left"):
        curation(tmp_path / "b", steps=(Unloadable(),)).run()


def test_a_worker_that_dies_loses_its_chunk_alone(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    report = curation(tmp_path / "always", workers=2, steps=(*_curate.STEPS, Dies((20,))), max_failure_rate=1.0).run()
    (chunk,) = [found for found in chunks([Numbers(60)], 6) if any(unit.id == "n00020" for unit in found)]
    drops = [json.loads(line) for line in (tmp_path / "always" / "drops.jsonl").read_text().splitlines()]
    dead = [drop for drop in drops if drop["reason"] == "worker died"]
    assert [drop["video"] for drop in dead] == [unit.id for unit in chunk]
    assert dead[0]["detail"].startswith("twice, by signal 9 (Killed)")
    assert report.read == report.kept + report.dropped

    (tmp_path / "marks").mkdir()
    once = (*_curate.STEPS, Dies((2, 20, 50), str(tmp_path / "marks")))
    curation(tmp_path / "once", workers=2, steps=once).run()
    assert len(list((tmp_path / "marks").iterdir())) == 3
    never = curation(tmp_path / "never", steps=(*_curate.STEPS, Dies())).run()
    assert never.kept
    assert files(tmp_path / "once") == files(tmp_path / "never")


def test_settings_that_changed_are_named_and_nothing_is_touched(tmp_path: Path) -> None:
    curation(tmp_path, 20).run()
    before = files(tmp_path)
    for more, words in (
        ({"steps": (Cut(), Split(), Weigh(), Heavy(limit=3))}, r"steps.3.Heavy.limit is 3 \(was -60.0\)"),
        ({"steps": (Cut(), Split())}, r"steps are Cut, Split \(were Cut, Split, Weigh, Heavy\)"),
        ({"chunk": 7}, r"chunk is 7 \(was 6\)"),
        ({"encoding": Encoding(crf=20)}, r"encoding.crf is 20 \(was 18.0\)"),
        ({"sources": [Numbers(20, first=0), Renamed(3)]}, None),
    ):
        if words is None:
            assert curation(tmp_path, 20, **more).run().done_before == 20
            continue
        with pytest.raises(UserError, match=words):
            curation(tmp_path, 20, **more).run()
        assert files(tmp_path) == before
    changed = Renamed(3, licence="MIT")
    with pytest.raises(UserError, match=r"sources.others.licence is \"MIT\" \(was \"\"\)"):
        curation(tmp_path, 20, sources=[Numbers(20), changed]).run()


class Renamed(Numbers):
    """Others of the same kind."""

    def __init__(self, count: int, licence: str = "") -> None:
        super().__init__(count, name="others")
        self.licence = licence

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "licence": self.licence}


def test_units_that_come_or_go_change_their_own_chunks_alone(tmp_path: Path) -> None:
    class Listed(Numbers):
        numbers = range(0, 100, 2)

        def units(self) -> Any:
            for number in self.numbers:
                yield f"n{number:05d}", {"number": number}

    curation(tmp_path / "grown", sources=[Listed()]).run()
    more = Listed()
    more.numbers = sorted({*Listed.numbers, 31} - {80})  # type: ignore[assignment]
    report = curation(tmp_path / "grown", sources=[more]).run()
    assert 0 < report.units - report.done_before <= 2 * 4 * 6  # at most two chunks, of four times the usual at most
    assert report.units - report.done_before < 30
    curation(tmp_path / "new", sources=[more]).run()
    old, new = files(tmp_path / "grown"), files(tmp_path / "new")
    assert new.items() <= old.items()  # the parts that are left over do no harm
    assert all(name.startswith("work/part-") for name in old.keys() - new.keys())


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_hold_every_unit_once_in_order(chunk: int) -> None:
    sources = [Numbers(100), Renamed(31), Renamed(0)]
    found = list(chunks(sources, chunk))
    ids = [(unit.source, unit.id) for units in found for unit in units]
    assert ids == [(n, id) for n, source in enumerate(sources) for id, _ in source.units()]
    assert all(len({unit.source for unit in units}) == 1 and len(units) <= 4 * chunk for units in found)
    limited = list(chunks(sources, chunk, limit=3))
    assert [unit.id for units in limited for unit in units] == ["n00000", "n00001", "n00002"] * 2


def test_keys_and_units_that_come_twice_are_told(tmp_path: Path) -> None:
    class Same(Renamed):
        def open(self, id: str, payload: Any) -> Any:
            yield from Numbers(1).open(id, payload)

    report = curation(tmp_path, 20, sources=[Numbers(20), Same(20)], steps=(Cut(),)).run()
    assert (report.kept, report.dropped) == (20, 20)
    drops = [json.loads(line) for line in (tmp_path / "drops.jsonl").read_text().splitlines()]
    assert {(drop["reason"], drop["source"]) for drop in drops} == {("key comes twice", "numbers")}

    class Stutters(Numbers):
        def units(self) -> Any:
            yield from super().units()
            yield from super().units()

    with pytest.raises(UserError, match="twice"):
        curation(tmp_path / "b", sources=[Stutters(20)], steps=(Cut(),)).run()
    with pytest.raises(UserError, match="two are named 'numbers'"):
        curation(tmp_path / "c", sources=[Numbers(1), Numbers(2)])


def test_two_runs_into_one_folder_do_not_meet(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with open(tmp_path / "work" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 77 on node3\n")
        lock.flush()
        with pytest.raises(UserError, match=r"another run is at work there \(process 77 on node3\)"):
            curation(tmp_path).run()
    assert curation(tmp_path, 6).run().kept


def test_shards_of_another_recipe_or_of_other_material_are_never_replaced(tmp_path: Path) -> None:
    """Wherever the parts lie, and also where they are gone; the same recipe over the same material goes on."""
    out, elsewhere = tmp_path / "out", str(tmp_path / "elsewhere")
    weighed = (*STEPS[:3], Heavy(limit=3))
    curation(out, 20).run()
    before = files(out)
    for work in (elsewhere, None):
        for again in (curation(out, 20, steps=weighed, work=work), curation(out, 19, work=work)):
            named = "recipe: steps.3.Heavy.limit is 3 \\(was -60.0\\)|of other material"
            if work is None and again.steps == weighed:
                shutil.rmtree(out / "work")
                before = files(out)
            with pytest.raises(UserError, match=rf"^{re.escape(str(out))}: holds .*({named}); .*delete that folder"):
                again.run()
            with pytest.raises(UserError, match=named):
                again.plan()
        assert {name: data for name, data in files(out).items() if not name.startswith("work")} == {
            name: data for name, data in before.items() if not name.startswith("work")
        }
    assert curation(out, 20, work=elsewhere).run().done_before == 0
    curation(tmp_path / "new", 20, work=str(tmp_path / "third")).run()
    assert files(out) == files(tmp_path / "new")
    (tmp_path / "new" / "manifest.json").unlink()  # as while shards are replaced
    with pytest.raises(UserError, match=r"new: holds \w+/curated-000000.tar without the manifest.json that"):
        curation(tmp_path / "new", 19, work=str(tmp_path / "fourth")).run()
    assert curation(tmp_path / "new", 20, work=str(tmp_path / "third")).run().kept
    finer = ShardWriting(samples_per_shard=4)  # the parts are this folder's own: what is written of them may change
    assert curation(out, 20, work=elsewhere, writing=finer).run().done_before == 20


def test_two_runs_into_one_folder_with_parts_in_two_do_not_meet(tmp_path: Path) -> None:
    second = curation(tmp_path / "out", 6, work=str(tmp_path / "b"))

    class Meets(Split):
        def apply(self, candidate: Candidate) -> Any:
            with pytest.raises(UserError, match=rf"out/work: another run is at work there \(process {os.getpid()} on"):
                second.run()
            return candidate

    assert curation(tmp_path / "out", 6, steps=(Cut(), Meets()), work=str(tmp_path / "a")).run().kept == 6
    assert not (tmp_path / "b" / "settings.json").exists()


def test_of_two_runs_into_one_url_the_second_replaces_nothing(tmp_path: Path) -> None:
    """Nothing can be locked there; what a run finds at its end, and was not there at its beginning, is another's."""
    out = f"memory://meeting{tmp_path}"
    first = curation(out, 6, steps=(Cut(),), work=str(tmp_path / "a"))

    class Meets(LocalExecutor):
        def run(self, *args: Any) -> Any:
            yield from super().run(*args)
            assert first.run().kept == 6

    with pytest.raises(UserError, match="holds shards that the same recipe has made of other material"):
        curation(out, 5, steps=(Cut(),), work=str(tmp_path / "b"), executor=Meets()).run()
    written = first.run().written
    assert written is not None
    assert written.kept == written.shards > 0


def test_memory_stays_flat_however_many_come(tmp_path: Path) -> None:
    count, size = 2000, 16 * 1024
    answer = tmp_path / "answer"
    assert join(launch(_curate.peak_growth, [(str(tmp_path / "out"), count, size, str(answer))])) == [0]
    assert int(answer.read_text()) < 0.5 * count * size
    with tarfile.open(tmp_path / "out-whole" / "train" / "curated-000000.tar") as tar:
        assert sum(member.size == size for member in tar) == 256


def test_a_source_of_nothing_and_steps_that_keep_nothing_end_well(tmp_path: Path) -> None:
    report = curation(tmp_path / "a", 0).run()
    assert (report.read, report.kept) == (0, 0)
    report = curation(tmp_path / "b", 10, steps=(Cut(), Weigh(), Heavy(limit=-1e9))).run()
    assert (report.kept, report.dropped) == (0, 10)


def test_devices_are_given_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [LocalExecutor(4).device_of(worker) for worker in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert LocalExecutor(device="cpu").device_of(3) == "cpu"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert LocalExecutor(4).device_of(1) == "cpu"
    with pytest.raises(UserError, match="workers=-1"):
        LocalExecutor(-1)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "numbers.yaml"
    path.write_text(
        f"out: {tmp_path}/out\n"
        "common: {count: 20, batch: 4}\n"
        "sources: [{class_path: _curate.Numbers, init_args: {count: '${common.count}'}}]\n"
        "steps:\n"
        "  - class_path: _curate.Cut\n"
        "  - {class_path: _curate.Weigh, init_args: {batch: '${common.batch}'}}\n"
        "  - class_path: _curate.Heavy\n"
    )
    return path


def test_the_command_says_what_there_is_to_do_and_then_does_it(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("common: {count: 25}\n")
    arguments = ["curate", "--config", str(recipe), "--config", str(overlay)]
    assert main([*arguments, "--dry-run"]) == 0
    words = capsys.readouterr().out
    assert "numbers              Numbers: 25 units" in words
    assert "Weigh (heavy, batches of 4)" in words
    assert "0 chunks done, 25 units left" in words
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    words = capsys.readouterr().out
    assert "25 units\n25 read = 23 kept + 2 dropped\n" in words
    assert "% of the steps' time" in words
    assert main([*arguments, "--dry-run"]) == 0
    assert "0 units left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--chnk", "3"], "there is no setting 'chnk'; did you mean 'chunk'?"),
        (
            ["--executor.workrs", "3"],
            "there is no setting 'executor.workrs'; did you mean 'executor.workers'?",
        ),
        (["--executor.workers", "x"], "'x' is not a whole number"),
        (["--executor", "LocalExecuter"], "did you mean 'idc.curate.local.LocalExecutor'?"),
        (["--config", "recipes/hardware/cpu2.yaml"], "there is no setting 'trainer'"),
        (["--config", "recipes/hardware/rey.yaml"], "did you mean 'recipes/hardware/ray.yaml'?"),
        (["--writing.held_out", "2"], "held_out=2.0: "),
        (["--common.count", "x"], "'x' is not a whole number"),
        (["--chunk", "0"], "chunk=0: must be at least 1"),
        (["--limit", "0"], "limit=0: must be at least 1"),
        (["--max_failure_rate", "2"], "max_failure_rate=2.0: must be in [0, 1]"),
        (["--sources", "[]"], "sources: none is given"),
        (["--steps.size", "3"], "--steps.size: steps is a list, whose items have no settings on the command line"),
        (["--sources.count=3"], "the recipe has it in common: write --common.count VALUE"),
    ],
)
def test_a_wrong_recipe_is_answered_in_one_line(
    arguments: list[str], words: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["curate", "--config", str(recipe), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("idc: error: ")
    assert words in line


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("class_path: _curate.Cut, init_args: {sise: 8}", "(Cut): there is no setting 'sise'; did you mean 'size'?"),
        (
            "class_path: idc.curate.faces.PeopleInWindow, init_args: {max_people: tall}",
            "(PeopleInWindow): max_people: 'tall' is not a whole number",
        ),
        (
            "class_path: idc.curate.filters.MotionFilter, init_args: {motion: [2, 1]}",
            "(MotionFilter): motion=[2.0, 1.0]",
        ),
        (
            "class_path: idc.curate.filters.MotionFiltr",
            "(MotionFiltr): there is no class 'idc.curate.filters.MotionFiltr'; "
            "did you mean 'idc.curate.filters.MotionFilter'?",
        ),
        (
            "class_path: idc.curate.embed.EmbedSubjects, init_args: {embedder: '${common.clip}'}",
            "(EmbedSubjects): there is no setting 'common.clip.init_args.pth'; "
            "did you mean 'common.clip.init_args.path'?",
        ),
    ],
)
@pytest.mark.parametrize("added", [False, True])
def test_a_wrong_item_of_a_list_is_named_by_number_and_class(
    added: bool, item: str, words: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one that an overlay or the command line adds, the class alone: it has no number in any file."""
    overlay = tmp_path / "overlay.yaml"
    clip = "{class_path: idc.models.embedders.CLIPEmbedder, init_args: {pth: x}}"
    steps = f"[{{class_path: _curate.Cut}}, {{{item}}}]"
    overlay.write_text(f"common: {{clip: {clip}}}\n" + ("" if added else f"steps: {steps}\n"))
    more = [f"--steps+={{{item}}}"] if added else []
    assert main(["curate", "--config", str(recipe), "--config", str(overlay), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"idc: error: steps{'' if added else ', number 2'} {words}")


def test_a_value_of_common_that_nothing_reads_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", "--config", "recipes/curate.yaml", "--common.fpss", "3", "--dry-run"]) == 2
    assert "--common.fpss: the recipe has no such value; did you mean 'fps'?" in capsys.readouterr().err


def test_help_shows_the_settings_and_those_of_a_recipes_own_classes(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["curate"]) == 0
    words = capsys.readouterr().out
    assert words.startswith("usage: idc curate --config RECIPE")
    assert "--retry_failed  bool = false" in words
    assert main(["curate", "--config", str(recipe), "--help"]) == 0
    assert "steps: _curate.Weigh\n  --batch  int = 4" in capsys.readouterr().out
    assert main(["curate", "--executor.workers", "3"]) == 2
    assert "write idc curate --config recipes/curate.yaml" in capsys.readouterr().err
    assert main(["curate", "--config", "recipes/hardware/ray.yaml"]) == 2
    assert "write --config recipes/curate.yaml --config recipes/hardware/ray.yaml" in capsys.readouterr().err


def test_shards_and_parts_behind_a_url_are_the_same(undisturbed: dict[str, bytes]) -> None:
    import fsspec

    for done in (0, 60):
        assert curation("memory://bucket/collection").run().done_before == done
    memory = fsspec.filesystem("memory")
    found = {path.removeprefix("/bucket/collection/"): memory.cat(path) for path in memory.find("/bucket/collection")}
    assert undisturbed.items() <= found.items()
    assert found.keys() - undisturbed.keys() == {"work/plan.jsonl", "work/settings.json"}
