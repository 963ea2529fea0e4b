"""The toy world: a procedural stand-in for multi-subject video, small enough to learn on a CPU in minutes.

A clip shows one to three subjects (shape x texture x colour) that move and meet on a background; its caption names
them and what they do; its references show each subject at another angle, scale and background than the clip, so that
copying a reference does not pay. Half of the captions do not say what the subjects look like, so that ignoring the
references does not pay either. Everything follows from one integer seed. Subjects of one clip differ in colour, so that
the exact scorers (toy_scoring.py) can tell who is who.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from idc.data import toy_render as render
from idc.errors import UserError, nearest
from idc.types import Bucket, Sample, Subject, check_side

COMBINATIONS = ("all", "seen", "held_out")
ORDINALS = ("first", "second", "third")
Point = tuple[float, float]


@dataclass(frozen=True)
class ToySubject:
    """One subject: what it looks like and where it goes.

    Attributes:
        radius: in short sides of the frame.
        start, end: centre (x, y) in widths and heights at the first and the last frame; the path is a straight line.
        action: "moves", "stays", "meets" (moves until it touches `target`), "bounces" (to `end` and back) or
            "orbits" (turns about `target` at constant distance by `sweep` radians, clockwise on the screen).
        target: index of the other subject that the action is about, or None.
    """

    shape: str
    texture: str
    colour: str
    radius: float
    start: Point
    end: Point
    action: str = "moves"
    target: int | None = None
    sweep: float = 0.0

    @property
    def name(self) -> str:
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"{texture}{self.colour} {self.shape}"

    @property
    def direction(self) -> str:
        """Where the straight path leads: right, left, down or up (the larger component)."""
        dx, dy = self.end[0] - self.start[0], self.end[1] - self.start[1]
        if abs(dx) >= abs(dy):
            return "right" if dx >= 0 else "left"
        return "down" if dy >= 0 else "up"


@dataclass(frozen=True)
class ToyReference:
    """How a reference shows its subject: turned by `angle` radians, `radius` in sides of the picture, on `colour`."""

    angle: float
    radius: float
    colour: str


@dataclass(frozen=True)
class ToySpec:
    """Everything that a clip shows: the ground truth of the scorers. Plain JSON through `to_json` / `from_json`."""

    seed: int
    frames: int
    height: int
    width: int
    fps: float
    background_colour: str
    background_pattern: str
    subjects: tuple[ToySubject, ...]
    references: tuple[ToyReference, ...]
    reference_size: int
    curated: bool = True
    named: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> ToySpec:
        """The inverse of `to_json`, also after a trip through `json.dumps` (lists become tuples again)."""

        def subject(item: dict[str, Any]) -> ToySubject:
            return ToySubject(**{**item, "start": tuple(item["start"]), "end": tuple(item["end"])})

        return cls(
            **{
                **values,
                "subjects": tuple(subject(item) for item in values["subjects"]),
                "references": tuple(ToyReference(**item) for item in values["references"]),
            }
        )

    @property
    def caption(self) -> str:
        clauses = [self._clause(index) for index in range(len(self.subjects))]
        floor = "" if self.background_pattern == "plain" else f" {self.background_pattern}"
        return f"{', and '.join(clauses)}, on a {self.background_colour}{floor} floor"

    def name(self, index: int) -> str:
        """What the caption calls a subject."""
        return self.subjects[index].name if self.named else "object"

    def _clause(self, index: int) -> str:
        subject, name = self.subjects[index], self.name(index)
        other = "" if subject.target is None else f" the {self._other(subject.target)} one"
        verb = {
            "moves": f"moves {subject.direction}",
            "stays": "stays still",
            "meets": f"moves {subject.direction} and meets{other}",
            "bounces": f"bounces {subject.direction} and back",
            "orbits": f"circles around{other}",
        }[subject.action]
        return f"{'an' if name[0] in 'aeio' else 'a'} {name} {verb}"

    def _other(self, target: int) -> str:
        if self.named:
            return self.subjects[target].colour
        return "other" if len(self.subjects) == 2 else ORDINALS[target]

    def centres(self) -> NDArray[np.float32]:
        """Centres `[N, T, 2]` (x, y) of the subjects in pixels."""
        size = np.array([self.width, self.height], np.float32)
        t = np.linspace(0, 1, self.frames, dtype=np.float32)[:, None] if self.frames > 1 else np.zeros((1, 1))
        paths = []
        for subject in self.subjects:
            start, end = np.array(subject.start) * size, np.array(subject.end) * size
            if subject.action == "orbits" and subject.target is not None:
                centre = np.array(self.subjects[subject.target].start) * size
                dx, dy = start - centre
                angle = subject.sweep * t
                turned = [np.cos(angle) * dx - np.sin(angle) * dy, np.sin(angle) * dx + np.cos(angle) * dy]
                paths.append(centre + np.concatenate(turned, 1))
            else:
                share = 1 - np.abs(1 - 2 * t) if subject.action == "bounces" else t
                paths.append(start + (end - start) * share)
        return np.stack(paths).astype(np.float32)

    def radius_px(self, index: int) -> float:
        return self.subjects[index].radius * min(self.height, self.width)


def render_clip(spec: ToySpec) -> NDArray[np.uint8]:
    """The clip `[T, H, W, 3]`, uint8."""
    floor = render.background(spec.background_colour, spec.background_pattern, spec.height, spec.width)
    canvas = np.repeat(floor[None], spec.frames, 0)
    for index, (subject, centres) in enumerate(zip(spec.subjects, spec.centres(), strict=True)):
        render.paste(canvas, subject.colour, subject.shape, subject.texture, centres, spec.radius_px(index), 0.0)
    return to_uint8(canvas)


def render_references(spec: ToySpec) -> list[NDArray[np.uint8]]:
    """One picture `[S, S, 3]` (uint8) a subject; crops of the clip's middle frame where the spec is not curated."""
    if not spec.curated:
        return _crops(spec)
    size, pictures = spec.reference_size, []
    for subject, look in zip(spec.subjects, spec.references, strict=True):
        canvas = render.background(look.colour, "plain", size, size)[None].copy()
        centre = np.full((1, 2), size / 2, np.float32)
        render.paste(canvas, subject.colour, subject.shape, subject.texture, centre, look.radius * size, look.angle)
        pictures.append(to_uint8(canvas)[0])
    return pictures


def _crops(spec: ToySpec) -> list[NDArray[np.uint8]]:
    from PIL import Image

    frame, pictures = render_clip(spec)[spec.frames // 2], []
    for index, (x, y) in enumerate(spec.centres()[:, spec.frames // 2]):
        half = 1.3 * spec.radius_px(index)
        box = (max(x - half, 0), max(y - half, 0), min(x + half, spec.width), min(y + half, spec.height))
        size = (spec.reference_size, spec.reference_size)
        pictures.append(np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR, box=box)))
    return pictures


def to_uint8(canvas: NDArray[np.floating]) -> NDArray[np.uint8]:
    return (canvas * 255 + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class ToyWorld:
    """Draws clips from seeds.

    Args:
        frames, height, width: 4n + 1 frames; sides in multiples of 16 pixels.
        fps: frames per second.
        subjects: probabilities of one, two and three subjects (normalised).
        reference_size: side of the references in pixels, a multiple of 16.
        curated: False makes the references crops of the clip itself, the paper's "w/o curated data".
        combinations: "all"; "seen" leaves out every sixth (shape, texture, colour); "held_out" shows only those.
        named: probability that a caption names shape, texture and colour; else it says "an object" and only the
            references tell.

    Raises:
        UserError: for a size, probability or option that does not hold to these rules.
    """

    frames: int = 9
    height: int = 64
    width: int = 64
    fps: float = 8.0
    subjects: tuple[float, ...] = (0.3, 0.4, 0.3)
    reference_size: int = 32
    curated: bool = True
    combinations: str = "all"
    named: float = 0.5

    def __post_init__(self) -> None:
        Bucket(self.frames, self.height, self.width, 1).check()
        check_side("reference_size", self.reference_size)
        if self.combinations not in COMBINATIONS:
            raise UserError(f"combinations={self.combinations!r}: unknown{nearest(self.combinations, COMBINATIONS)}")
        if not 0 <= self.named <= 1:
            raise UserError(f"named={self.named}: a probability, between 0 (references alone tell) and 1")
        if not 1 <= len(self.subjects) <= 3 or min(self.subjects) < 0 or sum(self.subjects) <= 0:
            raise UserError(
                f"subjects={self.subjects}: 1 to 3 probabilities of 0 or more, not all 0, such as (0.3, 0.4, 0.3)"
            )

    def spec(self, seed: int) -> ToySpec:
        """What clip number `seed` (0 or more) shows."""
        rng = np.random.default_rng(seed)
        odds = np.asarray(self.subjects, float)
        count = 1 + int(rng.choice(len(odds), p=odds / odds.sum()))
        looks = self._looks(rng, count)
        floor = str(rng.choice(list(render.BACKGROUND_COLOURS)))
        others = [name for name in render.BACKGROUND_COLOURS if name != floor]
        return ToySpec(
            seed=seed,
            frames=self.frames,
            height=self.height,
            width=self.width,
            fps=self.fps,
            background_colour=floor,
            background_pattern=str(rng.choice(render.PATTERNS)),
            subjects=_scene(rng, looks),
            references=tuple(
                ToyReference(
                    angle=float(rng.uniform(0.25, 0.75) * rng.choice([-1, 1])),
                    radius=float(rng.uniform(0.32, 0.39)),
                    colour=str(rng.choice(others)),
                )
                for _ in looks
            ),
            reference_size=self.reference_size,
            curated=self.curated,
            named=bool(rng.random() < self.named),  # drawn last: the pictures do not depend on it
        )

    def _looks(self, rng: np.random.Generator, count: int) -> list[tuple[str, str, str]]:
        looks = []
        for colour in rng.permutation(len(render.COLOURS))[:count]:
            while True:
                shape, texture = rng.integers(len(render.SHAPES)), rng.integers(len(render.TEXTURES))
                held_out = (3 * shape + texture + colour) % 6 == 0
                if self.combinations == "all" or held_out == (self.combinations == "held_out"):
                    break
            looks.append((render.SHAPES[shape], render.TEXTURES[texture], list(render.COLOURS)[colour]))
        return looks

    def sample(self, seed: int) -> Sample:
        """The clip as `idc.types.Sample`: float video [-1, 1], references, caption, spec in `meta["toy"]`."""
        spec = self.spec(seed)

        def pixels(array: NDArray[np.uint8]) -> torch.Tensor:
            return torch.from_numpy(array).float() / 127.5 - 1

        return Sample(
            id=f"toy/{seed}",
            caption=spec.caption,
            video_CTHW=pixels(render_clip(spec)).permute(3, 0, 1, 2).contiguous(),
            subjects=tuple(
                Subject(pixels(picture).permute(2, 0, 1).contiguous(), spec.name(index))
                for index, picture in enumerate(render_references(spec))
            ),
            fps=spec.fps,
            meta={"toy": spec.to_json()},
        )


def _scene(rng: np.random.Generator, looks: list[tuple[str, str, str]]) -> tuple[ToySubject, ...]:
    """Lay out who goes where on a unit square, subjects inside it and never overlapping, then mirror and transpose."""
    count = len(looks)
    radius = float(rng.uniform(*{1: (0.19, 0.24), 2: (0.165, 0.19), 3: (0.145, 0.155)}[count]))
    moves = {1: _alone, 2: _pair, 3: _trio}[count](rng, radius)
    # An orbit has its direction drawn already, and mirrored it would turn the other way.
    mirror_x, mirror_y, transpose = (rng.random(3) < 0.5) & all(move[2] != "orbits" for move in moves)

    def place(point: Point) -> Point:
        x, y = (1 - point[0] if mirror_x else point[0]), (1 - point[1] if mirror_y else point[1])
        return (y, x) if transpose else (x, y)

    order = [int(index) for index in rng.permutation(count)]  # subject k makes move order[k]
    subjects = []
    for look, (start, end, action, other) in zip(looks, (moves[index] for index in order), strict=True):
        target = None if other is None else order.index(other)
        sweep = float(np.pi / 2) if action == "orbits" else 0.0
        subjects.append(ToySubject(*look, round(radius, 4), place(start), place(end), action, target, sweep))
    return tuple(subjects)


Move = tuple[Point, Point, str, int | None]  # start, end, action, the other move that it is about


def _lane(rng: np.random.Generator, radius: float, y: float, action: str, way: int = 1) -> Move:
    """A straight path along a horizontal lane, to the right for way = 1."""
    if action == "stays":
        x = float(rng.uniform(0.35, 0.65))
        return (x, y), (x, y), action, None
    near = 1.2 * radius
    travel = float(rng.uniform(0.18, 0.23))
    start = float(rng.uniform(near, 1 - near - travel))
    path = (start, y), (start + travel, y)
    return (*path, action, None) if way > 0 else (*path[::-1], action, None)


def _alone(rng: np.random.Generator, radius: float) -> list[Move]:
    return [_lane(rng, radius, float(rng.uniform(0.38, 0.62)), str(rng.choice(["moves", "moves", "bounces"])))]


def _pair(rng: np.random.Generator, radius: float) -> list[Move]:
    scene = rng.choice(["meet", "approach", "cross", "together", "orbit"])
    low, high = (0.27 + float(rng.uniform(-0.03, 0.03)), 0.73 + float(rng.uniform(-0.03, 0.03)))
    touch, edge = 1.02 * radius, 1.15 * radius
    if scene == "meet":
        y = float(rng.uniform(0.3, 0.7))
        return [((edge, y), (0.5 - touch, y), "meets", 1), ((1 - edge, y), (0.5 + touch, y), "meets", 0)]
    if scene == "approach":
        y, x = float(rng.uniform(0.3, 0.7)), 1 - edge - float(rng.uniform(0, 0.08))
        return [((edge, y), (x - 2 * touch, y), "meets", 1), ((x, y), (x, y), "stays", None)]
    if scene == "orbit":  # a quarter turn about a target that makes room on the side of the turn
        middle = float(rng.uniform(-np.pi, np.pi))
        start, distance = middle - np.pi / 4, 2.1 * radius
        x, y = 0.5 - 0.16 * float(np.cos(middle)), 0.5 - 0.16 * float(np.sin(middle))
        orbiter = x + distance * float(np.cos(start)), y + distance * float(np.sin(start))
        return [(orbiter, orbiter, "orbits", 1), ((x, y), (x, y), "stays", None)]
    ways = (1, -1) if scene == "cross" else (1, 1)
    return [_lane(rng, radius, y, "moves", way) for y, way in zip((low, high), ways, strict=True)]


def _trio(rng: np.random.Generator, radius: float) -> list[Move]:
    if rng.random() < 0.5:  # three lanes
        return [
            _lane(rng, radius, y, str(rng.choice(["moves", "moves", "stays"])), int(rng.choice([-1, 1])))
            for y in (0.18, 0.5, 0.82)
        ]
    low, high = float(rng.uniform(0.22, 0.3)), float(rng.uniform(0.7, 0.78))
    touch, edge = 1.02 * radius, 1.15 * radius
    return [
        ((edge, low), (0.5 - touch, low), "meets", 1),
        ((1 - edge, low), (0.5 + touch, low), "meets", 0),
        _lane(rng, radius, high, str(rng.choice(["moves", "bounces"])), int(rng.choice([-1, 1]))),
    ]
