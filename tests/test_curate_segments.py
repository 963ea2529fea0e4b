"""Long videos in segments: shots and samples come out as they do of the whole, whichever way the film is divided."""

from __future__ import annotations

import json
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from idc.curate.candidate import Candidate, Dropped
from idc.curate.checks import DecodeCheck
from idc.curate.engine import Curation
from idc.curate.parts import Part
from idc.curate.plan import chunks
from idc.curate.reading import span_of
from idc.curate.records import settle
from idc.curate.segments import Segment, Transition, shot_edges
from idc.curate.shots import ColourCuts, SceneDetect, Shots
from idc.curate.sources import VideoFolder
from idc.curate.transnet import TransNetV2
from idc.curate.windows import Cut, Windows
from idc.data import storage
from idc.data.video import encode_video
from idc.errors import UserError


def divided(frames: int, cuts: list[int], total: int) -> list[tuple[int, int]]:
    """Shots of all segments, each of which is shown no more of the cuts than it looks at."""
    shots: list[tuple[int, int]] = []
    for number in range(total):
        segment = Segment(number, total)
        first, end = segment.look(frames)
        seen = [Transition(cut, cut) for cut in cuts if first < cut < end]
        behind = [t for t in seen if t.start >= segment.span(frames)[1]][:1]
        edges = shot_edges([t for t in seen if t.start < segment.span(frames)[1]] + behind, segment, frames)
        shots += [(before.start, after.end) for before, after in pairwise(edges)]
    return shots


@pytest.mark.parametrize("seed", range(40))
def test_the_segments_shots_are_the_films_whatever_the_division(seed):
    draw = np.random.default_rng(seed)
    frames, total = int(draw.integers(1, 60_000)), int(draw.integers(1, 30))
    cuts = sorted({int(cut) for cut in draw.integers(1, frames + 1, int(draw.integers(0, 80)))} - {frames})
    edges = [0, *cuts, frames]
    # Long shots end at each border behind which they go on for a quarter of a segment, all others are whole.
    borders = {frames * n // total for n in range(1, total)}
    for border in borders:
        following = min(edge for edge in edges if edge >= border)
        if border not in edges and following > border + frames // total // 4:
            cuts.append(border)
    whole = list(pairwise([0, *sorted(cuts), frames]))
    assert divided(frames, sorted(set(edges[1:-1])), total) == whole


def test_segments_tile_the_frames_and_look_around_themselves():
    for frames, total in ((1, 1), (10, 3), (7, 7), (3, 5), (1000, 13)):
        spans = [Segment(number, total).span(frames) for number in range(total)]
        assert spans[0][0] == 0
        assert spans[-1][1] == frames
        assert all(one[1] == other[0] for one, other in pairwise(spans))
    first, end = Segment(3, 10).look(100_000)
    assert first % 50 == 0
    assert first <= 30_000 - 200
    assert end == 40_000 + 2_500 + 250


def test_a_soft_edge_at_a_border_belongs_to_neither_side():
    around = [Transition(495, 505)]
    assert shot_edges(around, Segment(0, 2), 1000) == [Transition(0, 0), Transition(495, 505)]
    assert shot_edges(around, Segment(1, 2), 1000) == [Transition(495, 505), Transition(1000, 1000)]


def scene(seed: int, frames: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    picture = cv2.resize(small, (64, 48), interpolation=cv2.INTER_CUBIC)
    return np.stack([np.roll(picture, shift // 2, axis=1) for shift in range(frames)])


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> tuple[Path, list[int]]:
    """A film of 31 drawn shots of 10 to 60 frames, and where they begin."""
    lengths = np.random.default_rng(4).integers(10, 61, 31)
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    video = np.concatenate([scene(seed, int(length)) for seed, length in enumerate(lengths)])
    path.write_bytes(encode_video(video, 25, crf=12, preset="ultrafast"))
    return path, np.cumsum([0, *lengths])[:-1].tolist()


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> TransNetV2:
    """A network that scores how much a frame differs from those around it."""

    class Change(torch.nn.Module):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            x = frames.float() / 255
            change = (x[:, 1:] - x[:, :-1]).abs().mean((2, 3, 4))
            around = torch.nn.functional.avg_pool1d(change[:, None], 9, 1, 4)[:, 0]
            return torch.cat([change[:, :1] * 0, (change - around) * 8], 1)[..., None]

    path = tmp_path_factory.mktemp("transnet") / "change.pt"
    torch.jit.script(Change()).save(str(path))
    return TransNetV2(str(path), threshold=0.5, logits=False)


@pytest.mark.parametrize("name", ["adaptive", "content", "colours", "transnet"])
@pytest.mark.parametrize("total", [2, 4])
def test_detectors_find_in_segments_what_they_find_in_the_whole(name, total, film, network):
    path, begins = film
    detectors: dict[str, Any] = {
        "adaptive": SceneDetect(), "content": SceneDetect("content"), "colours": ColourCuts(), "transnet": network,
    }  # fmt: skip
    step = Shots(detectors[name], min_seconds=0)
    whole = Candidate("film-1", "films", "film.mp4", str(path))
    (expected,) = step([whole])
    parts = [settle(whole.changed(segment=Segment(number, total))) for number in range(total)]
    found = [shot for outcomes in step(parts) for shot in outcomes if isinstance(shot, Candidate)]
    assert [(shot.key, shot.span) for shot in found] == [(shot.key, shot.span) for shot in expected]
    assert [shot.meta["shots"]["soft"] for shot in found] == [shot.meta["shots"]["soft"] for shot in expected]
    if name in ("adaptive", "content"):
        assert [shot.span[0] for shot in found] == begins


def test_a_long_shot_is_ended_at_each_border_that_it_goes_far_beyond(tmp_path):
    path = tmp_path / "lecture.mp4"
    path.write_bytes(encode_video(np.concatenate([scene(1, 60), scene(2, 270)]), 25, crf=12, preset="ultrafast"))
    whole = Candidate("lecture-1", "films", "lecture.mp4", str(path))
    spans = []
    for number in range(6):  # borders at 55, 110, 165, 220, 275: the first shot is whole, 5 frames behind the first one
        (outcomes,) = Shots(min_seconds=0)([whole.changed(segment=Segment(number, 6))])
        spans += [outcome.span for outcome in outcomes if isinstance(outcome, Candidate)]
    assert spans == [(0, 60), (60, 110), (110, 165), (165, 220), (220, 275), (275, 330)]
    dropped = whole.changed(segment=Segment(2, 6)).dropped("step", "reason", "detail")
    assert dropped.detail == "detail (segment 3 of 6)"


def test_of_one_long_take_hardly_anything_is_lost(tmp_path):
    path = tmp_path / "take.mp4"
    path.write_bytes(encode_video(scene(3, 900), 25, crf=12, preset="ultrafast"))

    def kept(segment_minutes: float) -> int:
        source = VideoFolder(str(tmp_path), segment_minutes=segment_minutes, segment_from_mib=0)
        opened = [candidate for unit in source.units() for candidate in source.open(*unit)]
        shots = [shot for found in Shots(min_seconds=1)(opened) for shot in found if isinstance(shot, Candidate)]
        return sum(len(found) for found in Windows(frames=25, fps=25)(shots))

    assert kept(0) == 900 // 25
    assert kept(0.1) == 6 * (150 // 25)  # 36 s in segments of 6


def test_without_shots_a_segment_is_its_own_frames_and_an_empty_one_is_dropped(film):
    path, _ = film
    step = Windows(frames=9, fps=25)
    whole = Candidate("film-1", "films", "film.mp4", str(path))
    parts = [whole.changed(segment=Segment(number, 3)) for number in range(3)]
    windows = [window for outcomes in step(parts) for window in outcomes]
    assert len({window.key for window in windows}) == len(windows)
    for part, outcomes in zip(parts, step(parts), strict=True):
        first, end = span_of(part)
        assert outcomes[0].ranks[0] == first
        assert outcomes[-1].ranks[-1] < end
    (outcomes,) = DecodeCheck(min_side=16)([whole.changed(segment=Segment(0, 10**6))])
    assert isinstance(outcomes[0], Dropped)
    assert "segment 1 of 1000000 holds none" in outcomes[0].detail


def test_a_box_of_a_sidecar_stays_with_the_shot_of_its_frame(film, tmp_path):
    path, begins = film
    (tmp_path / "film.mp4").write_bytes(path.read_bytes())
    at = begins[4] + 3
    box = {"name": "ball", "box": [4, 4, 20, 20], "frame": at}
    (tmp_path / "film.json").write_text(json.dumps({"subjects": [box, {"name": "cup"}]}))
    for minutes in (0, 0.16):
        source = VideoFolder(str(tmp_path), segment_minutes=minutes, segment_from_mib=0)
        opened = [candidate for unit in source.units() for candidate in source.open(*unit)]
        assert (len(opened) > 2) == bool(minutes)
        step = Shots(SceneDetect(), min_seconds=0)
        shots = [shot for outcomes in step(opened) for shot in outcomes if isinstance(shot, Candidate)]
        placed = {shot.span[0]: shot.subjects[0].frame for shot in shots if shot.subjects[0].box}
        assert placed == {begins[4]: 3}
        assert all(shot.subjects[1].name == "cup" for shot in shots)


class TestWhole:
    """Through the engine."""

    steps = staticmethod(
        lambda: [
            DecodeCheck(min_side=16),
            Shots(SceneDetect(), min_seconds=0.2),
            Windows(frames=9, fps=25, stride=0, max_per_shot=1),
            Cut(height=48, width=64),
        ]
    )

    def curated(self, folder: Path, out: Path, minutes: float) -> tuple[Curation, dict[str, bytes]]:
        source = VideoFolder(str(folder), "films", "CC0", segment_minutes=minutes, segment_from_mib=0.01)
        run = Curation([source], self.steps(), str(out), progress=False)
        report = run.run()
        assert report.read == report.kept + report.dropped
        found = {}
        for name in storage.list_tars(run.folder):
            if name.startswith("part-"):
                found |= {c.key: c.encoded.mp4 for c in Part(storage.join(run.folder, name)).whole() if c.encoded}
        return run, found

    def test_samples_of_a_divided_film_are_those_of_the_whole_and_each_segment_is_a_chunk(self, film, tmp_path):
        folder = tmp_path / "films"
        folder.mkdir()
        (folder / "film.mp4").write_bytes(film[0].read_bytes())
        (folder / "a short one.mp4").write_bytes(encode_video(scene(90, 20), 25, preset="ultrafast"))
        (folder / "broken.mp4").write_bytes(b"\0" * 50_000)
        whole, expected = self.curated(folder, tmp_path / "whole", 0)
        divided, found = self.curated(folder, tmp_path / "divided", 0.16)
        assert len(expected) > 25
        assert sorted(found) == sorted(expected)
        assert found == expected
        units = [[unit.id for unit in chunk] for chunk in chunks(divided.sources, 16)]
        parts = [chunk for chunk in units if any(id.startswith("film.mp4") for id in chunk)]
        assert len(parts) > 3
        assert all(len(chunk) == 1 for chunk in parts)
        assert sum(map(len, chunks(whole.sources, 16))) == 3
        # A part that is lost, as of a run that was killed at it, is made again alone.
        lost = storage.join(divided.folder, next(n for n in storage.list_tars(divided.folder) if n.startswith("part")))
        before = Path(lost).read_bytes()
        Path(lost).unlink()
        assert divided.plan().left in (1, 2)
        divided.run()
        assert Path(lost).read_bytes() == before

    @pytest.mark.parametrize(
        "setting", [{"segment_minutes": -1}, {"segment_minutes": float("nan")}, {"segment_from_mib": float("nan")}]
    )
    def test_bad_sizes_of_segments_are_told(self, setting, tmp_path):
        with pytest.raises(UserError, match=f"{next(iter(setting))}=.*: must be"):
            VideoFolder(str(tmp_path), **setting)

    def test_a_long_video_behind_a_url_is_divided_alike(self, film):
        folder = f"memory://{uuid.uuid4().hex}"
        with storage.open_atomic(f"{folder}/film.mp4") as stream:
            stream.write(film[0].read_bytes())
        sources = [VideoFolder(f, segment_minutes=0.1, segment_from_mib=0) for f in (folder, str(film[0].parent))]
        there, here = ([(id, payload["segment"]) for id, payload in source.units()] for source in sources)
        assert [segment for _, segment in there] == [segment for _, segment in here]
        assert len(there) > 3
