"""A report's page of two small runs, with names and texts that try to act."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from _runs import tracking, write_run
from PIL import Image

from idc.data.benchmark import Item, write_items
from idc.data.video import encode_video
from idc.metrics.results import Problem, Result, read_run
from idc.report.layout import TABLE_1, TABLE_2
from idc.report.measure import Measured
from idc.report.page import write_page
from idc.report.tables import fill

EVIL = '<img src="https://example.com/x.png" onerror="window.hacked=1"></script><script>window.hacked=2</script>'
ODD_ID = """<b>it's "odd" & 'quoted'"""


def clip(frames: int, side: int = 32) -> bytes:
    video = np.zeros((frames, side, side, 3), np.uint8)
    for t in range(frames):
        video[t, :, : 1 + t % side] = (200, 80, 40)
    return encode_video(video, 16.0)


def make_run(folder: Path, system: str, mean: float, frames: int) -> Path:
    videos = folder / "videos"
    videos.mkdir(parents=True)
    (videos / "good_1.mp4").write_bytes(clip(frames))
    (videos / "broken_2.mp4").write_bytes(b"no video")
    (videos / f"{ODD_ID}.mp4").write_bytes(clip(frames))
    Image.new("RGB", (300, 200), (10, 120, 200)).save(videos / "ada.png")
    references = (videos / "ada.png", videos / "gone.png")
    items = [Item("good_1", "Ada meets Bob.", references, ("Ada", EVIL), ("human", "human"), "multihuman")]
    write_items(videos, items)
    details = tracking([[0.7, 0.6, None, -0.1], [0.2, None, None, 0.3]], ["Ada", EVIL])
    told = {"category": "multihuman", "prompt": EVIL}
    results = [
        Result(
            "good_1", "identity", 0.4, details=details, video="good_1.mp4", category="multihuman", prompt="Ada meets"
        ),
        Result("good_1", "gmescore", mean, video="good_1.mp4", category="multihuman", prompt="Ada meets Bob."),
        Result("broken_2", "gmescore", None, "does not decode", video="broken_2.mp4", category="singleobj"),
        Result(ODD_ID, "gmescore", 1 - mean, video=f"{ODD_ID}.mp4", **told),
        Result("none_3", "gmescore", None, EVIL, category="singleobj"),
    ]
    problem = Problem("extra.mp4", "no item of this name")
    return write_run(folder / "run", system, results, videos=str(videos), problems=[problem])


def make_page(folder: Path) -> Path:
    """The index of a page in `folder/out` of the runs `folder/a/run` and `folder/b/run`."""
    paths = [make_run(folder / "a", "sft", 0.8, 9), make_run(folder / "b", EVIL, 0.3, 17)]
    runs = [Measured(read_run(path), resamples=50) for path in paths]
    tables = [fill(layout, runs, with_published=True) for layout in (TABLE_1, TABLE_2)]
    return write_page(folder / "out", runs, tables, title=EVIL, links={"Human study": "study/index.html"})
