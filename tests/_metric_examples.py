"""How to build each metric of `idc.metrics` offline and tiny, with clips that it can score and one that it cannot.

`tests/test_metrics_contract.py` holds every exported class to the contract with these; a new metric is a line in
`EXAMPLES`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from idc.metrics.base import Clip, Reference, Score, VideoMetric


@dataclass(frozen=True)
class Example:
    """One metric.

    Attributes:
        make: from the folder that `save_models` filled.
        clips: four that get a score, not all the same one.
        failing: one that applies and gets none; None where there is no such clip.
    """

    make: Callable[[Path], VideoMetric]
    clips: Callable[[], list[Clip]]
    failing: Callable[[], Clip] | None = None


def save_models(folder: Path) -> Path:
    from _tiny_embedders import aesthetic_head, save_clip, save_gme
    from _tiny_judges import save_qwen_judge

    save_clip(folder / "clip")
    save_gme(folder / "gme")
    torch.save(aesthetic_head().state_dict(), folder / "head.pth")
    save_qwen_judge(folder / "judge")
    return folder


def noise(count: int = 5) -> list[Clip]:
    """Blocks of random colours, brighter from clip to clip, that drift to the right."""
    clips = []
    for seed in range(4):
        blocks = np.random.default_rng(seed).integers(0, 60 * (seed + 1), (6, 10, 3), dtype=np.uint8)
        picture = blocks.repeat(8, axis=0).repeat(8, axis=1)
        frames = np.stack([picture[:, t : t + 56] for t in range(count)])
        clips.append(Clip(f"noise-{seed}", frames, prompt=["a red ball", "the cat", "blue cube", "green floor"][seed]))
    return clips


def flashes() -> list[Clip]:
    """Still clips with jumps of brightness, none to three of them."""
    clips = []
    for jumps in range(4):
        levels = [0, 0, 0, *[255 * (t % 2) for t in range(1, jumps + 1)], *[255 * (jumps % 2)] * 6]
        frames = np.ones((len(levels), 28, 28, 3), np.uint8) * np.array(levels, np.uint8)[:, None, None, None]
        clips.append(Clip(f"flashes-{jumps}", frames))
    return clips


def toys() -> list[Clip]:
    """Toy clips that show what they should, and one that shows another's content."""
    from idc.data.toy import ToyWorld, render_clip

    specs = [ToyWorld().spec(seed) for seed in range(4)]
    shown = [specs[0], specs[1], specs[2], specs[0]]
    pairs = zip(specs, shown, strict=True)
    return [Clip(f"toy-{i}", render_clip(show), meta={"toy": spec.to_json()}) for i, (spec, show) in enumerate(pairs)]


@cache
def _heads() -> list[np.ndarray]:
    """Heads and shoulders of the six people in insightface's photo, about 140 pixels wide."""
    import importlib.util

    from PIL import Image

    from idc.models.faces import YuNetSFace

    package = importlib.util.find_spec("insightface")
    assert package is not None
    assert package.origin is not None
    photo = np.asarray(Image.open(Path(package.origin).parent / "data" / "images" / "t1.jpg").convert("RGB"))
    heads = []
    for face in YuNetSFace().detect(photo):
        left, top, size = int(face.box.left), int(face.box.top), int(max(face.box.width, face.box.height))
        margin = size // 2
        heads.append(photo[max(0, top - margin) : top + size + margin, max(0, left - margin) : left + size + margin])
    return heads


def people() -> list[Clip]:
    """Three clips of a person with the person's reference, and one with somebody else's."""
    heads = _heads()
    clips = []
    for i, (shown, asked) in enumerate([(0, 0), (1, 1), (2, 2), (3, 4)]):
        frames = np.stack([heads[shown], (heads[shown] * 0.8).astype(np.uint8)])
        reference = Reference(np.ascontiguousarray(heads[asked][:, ::-1]), "person", "face")
        clips.append(Clip(f"people-{i}", frames, references=(reference,), category="singleface"))
    return clips


def faceless() -> Clip:
    """Asked for a person whose reference has no face."""
    reference = Reference(np.zeros((40, 40, 3), np.uint8), "person", "face")
    return Clip("faceless", people()[0].frames_THWC, references=(reference,), category="singleface")


class Shouting:
    """A judge that calls a clip the better the brighter its first picture is, and refuses pictures without red."""

    name = "shouting judge"

    def load(self, device: torch.device | str = "cpu") -> None: ...

    def unload(self) -> None: ...

    def answers(self, images: Sequence[np.ndarray], prompt: str, seeds: Sequence[int]) -> list[str]:
        level = 1 + int(4 * images[0].mean() / 256)
        return [str(level) if images[0][..., 0].any() else "I would rather not say." for _ in seeds]


class LeftHalf:
    """A detector and segmenter that takes the left half of a picture for the subject, unless it is black."""

    name = "left half"
    device = torch.device("cpu")

    def load(self, device: torch.device | str = "cpu") -> None: ...

    def unload(self) -> None: ...

    def detect_each(self, queries: Sequence[Any]) -> list[list[Any]]:
        from idc.models.grounding import Detection

        return [[Detection(0, 0, p.shape[1] / 2, p.shape[0], 0.9)] if p.any() else [] for p, _, _ in queries]

    def masks_each(self, prompts: Sequence[Any]) -> list[np.ndarray]:
        return [
            np.array([np.tile(np.arange(p.shape[1]) < box.right, (p.shape[0], 1)) for box in boxes])
            for p, boxes in prompts
        ]


class Brightness:
    """Rates frames by their mean."""

    name = "brightness"

    def load(self, device: torch.device | str = "cpu") -> None: ...

    def unload(self) -> None: ...

    def rate(self, frames_THWC: Sequence[np.ndarray] | np.ndarray) -> float:
        return float(np.mean(frames_THWC)) / 255


def _aesthetics(folder: Path) -> VideoMetric:
    from idc.metrics import Aesthetics
    from idc.models.aesthetic import AestheticPredictor
    from idc.models.embedders import CLIPEmbedder

    return Aesthetics(AestheticPredictor(str(folder / "head.pth"), CLIPEmbedder(str(folder / "clip"))))


def _gme(folder: Path) -> VideoMetric:
    from idc.metrics import GmeScore
    from idc.models.embedders import GMEEmbedder

    return GmeScore(GMEEmbedder(str(folder / "gme"), 4, 16, dtype="float32"), frames=4)


def _plain(name: str, frames: int | None = None, **settings: Any) -> Callable[[Path], VideoMetric]:
    def make(folder: Path) -> VideoMetric:
        import idc.metrics

        metric = getattr(idc.metrics, name)(**settings)
        metric.frames = frames or metric.frames
        return metric

    return make


def _nexus(folder: Path) -> VideoMetric:
    from idc.metrics import NexusScore
    from idc.models.embedders import CLIPEmbedder
    from idc.models.grounding import GroundedMasks

    grounding = GroundedMasks(LeftHalf(), LeftHalf())  # type: ignore[arg-type]
    metric = NexusScore("paper", CLIPEmbedder(str(folder / "clip")), grounding=grounding)
    metric.frames = 3
    return metric


def referenced(name: str = "ball") -> list[Clip]:
    """The noise, each clip with its own first frame mirrored as the reference."""
    pictures = [np.ascontiguousarray(clip.frames_THWC[0, :, ::-1]) for clip in noise()]
    return [replace(clip, references=(Reference(p, name),)) for clip, p in zip(noise(), pictures, strict=True)]


def _qalign(folder: Path) -> VideoMetric:
    from idc.metrics import QAlign
    from idc.models.judges import ImageTextJudge

    return QAlign(ImageTextJudge(str(folder / "judge"), dtype="float32"))


def _one_frame(clips: Callable[[], list[Clip]]) -> Clip:
    clip = clips()[0]
    return Clip("one", clip.frames_THWC[:1], clip.prompt, clip.references, category=clip.category, meta=clip.meta)


EXAMPLES: dict[str, Example] = {
    "Aesthetics": Example(_aesthetics, noise),
    "CopyPaste": Example(_plain("CopyPaste", frames=1), people, faceless),
    "FaceSim": Example(_plain("FaceSim", frames=1), people, faceless),
    "GmeScore": Example(_gme, noise, lambda: Clip("silent", noise()[0].frames_THWC)),
    "IdentityTracking": Example(_plain("IdentityTracking", frames=1), people, faceless),
    "MotionAmplitude": Example(_plain("MotionAmplitude"), noise, lambda: _one_frame(noise)),
    "MotionSmoothness": Example(_plain("MotionSmoothness", rater=Brightness()), flashes, lambda: _one_frame(flashes)),
    "NaturalScore": Example(
        _plain("NaturalScore", judge=Shouting()), noise, lambda: Clip("black", np.zeros((3, 28, 28, 3), np.uint8))
    ),
    "NexusScore": Example(_nexus, referenced, lambda: referenced(name="")[0]),
    "QAlign": Example(_qalign, noise, lambda: Clip("stopped", noise()[0].frames_THWC, fps=0)),
    "ToyIdentity": Example(
        _plain("ToyIdentity"), toys, lambda: Clip("no spec", toys()[0].frames_THWC, meta={"toy": 3})
    ),
    "ToyScores": Example(_plain("ToyScores"), toys, lambda: Clip("no spec", toys()[0].frames_THWC, meta={"toy": 3})),
}


def rank_main(rank: int, port: int, folder: str, names: Sequence[str]) -> None:
    """One of two ranks: scores every second clip, writes what all ranks together computed to `rank<n>.json`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        found = {name: _on_rank(rank, Path(folder), EXAMPLES[name]) for name in names}
    finally:
        torch.distributed.destroy_process_group()
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))


def _on_rank(rank: int, folder: Path, example: Example) -> dict[str, list[float]]:
    metric = example.make(folder)
    scores = [metric.score(clip) for clip in example.clips()[rank::2]]
    metric.update(scores)
    if rank == 1:
        metric.update(Score.failed("on one rank only"))
    shared = _summary(metric)
    alone = metric.scored
    metric.reset()
    if rank == 0:  # the other rank has no clips
        metric.update(scores)
    lonely = _summary(metric)
    metric.reset()
    metric.update(Score.failed("nobody has a score"))
    return {"shared": [*shared, alone], "lonely": lonely, "none": _summary(metric)}


def _summary(metric: VideoMetric) -> list[float]:
    value = metric.compute().item()
    with metric.sync_context():
        return [value, metric.scored, int(metric.expected)]
