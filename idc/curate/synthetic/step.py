"""The step that adds made references: which subjects get one, how often it is tried, what becomes of a failure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from idc.curate.candidate import Candidate, CuratedSubject, Outcome, Pixels, Reference, Step, encode_png
from idc.curate.reaching import UNREACHED, UnreachedError
from idc.curate.synthetic import prompts
from idc.curate.synthetic.checks import Known, ReferenceCheck, Verdict
from idc.curate.synthetic.editors import EditError, ImageEditor, check_size, sheet
from idc.data.plan import draw, seed_for
from idc.data.video import VideoError
from idc.errors import UserError, nearest

Policy = Literal["first", "extra", "replace"]
OnFailure = Literal["keep", "drop"]
_MOST_GIVEN = 3  # pictures of one subject that a request shows: more say little that is new
_FINE = 1 << 30  # shares are told apart as finely as this


class Made(NamedTuple):
    """A picture that was made for a subject, with what the checks said of it."""

    picture_HWC: Pixels
    verdict: Verdict
    prompt: str
    seed: int
    scene: str = ""  # the prompt of the scene that it was taken out of


class Synthesise(Step):
    """Adds references that an image editor makes of a subject's own pictures.

    They are kept where `check` finds them like the subject and no copy of its pictures; those of plain augmentation are
    copies by intent and exempt from the latter.

    A drawn share of the subjects is taken apart from its pictures: shown alone, whole, in another pose, view and
    light. For a drawn share of the candidates with several subjects these are first put together into a new scene,
    from which each chosen subject is then taken: so it has met others and another light. Which subjects, and every
    prompt and seed, depend on the candidate's key, the subject's name and `seed` alone.

    `meta["synthetic"]` of a candidate that had a chosen subject counts: asked, made, and why pictures were not kept.

    Args:
        editor: makes the pictures.
        check: says what is kept; None for `ReferenceCheck()`, which knows faces alone.
        share: of the subjects that get made references, in [0, 1].
        per_subject: references each of them gets.
        attempts: pictures asked for, with other seeds and prompts, until one of them is kept.
        best_of: pictures that pass before the most similar of them is taken; more cost more.
        compose_share: of the candidates with two subjects or more whose made references come out of a common scene.
        kinds: of subjects that may be chosen; None for all.
        policy: a made reference becomes the "first" choice, comes "extra" after the others, or they "replace" all.
        on_failure: of a chosen subject for which not even one picture was kept: "keep" the candidate as it is, or
            "drop" it. An editor that does not answer is another thing: that drops it in either case, as a fault.
        size: (height, width) in pixels that is asked for.
        seed: of all that is drawn.
        batch: candidates in a call.

    Raises:
        UserError: for settings out of range.
    """

    heavy: ClassVar[bool] = True

    def __init__(
        self,
        editor: ImageEditor,
        check: ReferenceCheck | None = None,
        share: float = 0.1,
        per_subject: int = 1,
        attempts: int = 3,
        best_of: int = 1,
        compose_share: float = 0.0,
        kinds: Sequence[str] | None = None,
        policy: Policy = "first",
        on_failure: OnFailure = "keep",
        size: tuple[int, int] = (1024, 1024),
        seed: int = 0,
        batch: int = 8,
    ) -> None:
        for name, value in {"share": share, "compose_share": compose_share}.items():
            if not 0 <= value <= 1:
                raise UserError(f"{name}={value}: must be from 0 to 1")
        counts = {"per_subject": per_subject, "attempts": attempts, "best_of": best_of, "batch": batch}
        for name, count in counts.items():
            if count < 1:
                raise UserError(f"{name}={count}: must be at least 1")
        if best_of > attempts:
            raise UserError(f"best_of={best_of}: must be at most attempts={attempts}")
        for name, chosen, choices in (("policy", policy, Policy), ("on_failure", on_failure, OnFailure)):
            if chosen not in get_args(choices):
                raise UserError(f"{name}={chosen!r}: no such one{nearest(chosen, get_args(choices))}")
        self.editor, self.check = editor, ReferenceCheck() if check is None else check
        self.share, self.per_subject, self.attempts, self.best_of = share, per_subject, attempts, best_of
        self.compose_share, self.kinds = compose_share, None if kinds is None else tuple(kinds)
        self.policy, self.on_failure = policy, on_failure
        self.size, self.seed, self.batch = check_size(size), seed, batch

    @property
    def models(self) -> tuple[str, ...]:
        version = self.editor.version
        return (f"{self.editor.name}@{version}" if version else self.editor.name, *self.check.models)

    @property
    def networks(self) -> tuple[Any, ...]:
        return self.editor, self.check

    def remark(self) -> str:
        return self.editor.remark()

    def __call__(self, candidates: Sequence[Candidate]) -> list[Sequence[Outcome]]:
        """As `Step.__call__`. Editors that gain from it are asked for several candidates at once; the checks, whose
        networks know one thread, take turns."""
        turns = Lock()
        if self.editor.concurrency == 1 or len(candidates) < 2:
            return [[self._outcome(candidate, turns)] for candidate in candidates]
        workers = min(self.editor.concurrency, len(candidates))
        with ThreadPoolExecutor(workers, thread_name_prefix="synthesise") as pool:
            return [[outcome] for outcome in pool.map(lambda one: self._outcome(one, turns), candidates)]

    def _outcome(self, candidate: Candidate, turns: Lock) -> Outcome:
        try:
            return Work(self, candidate, turns).outcome()
        except VideoError as error:
            return candidate.dropped(self.name, "unreadable reference", str(error))
        except UnreachedError as error:  # without this picture it would be another sample than it is tomorrow
            return candidate.dropped(self.name, UNREACHED, str(error))

    def chosen(self, candidate: Candidate) -> list[int]:
        """Numbers of the subjects that get made references, by key and name alone."""
        found = []
        for number, subject in enumerate(candidate.subjects):
            may = self.kinds is None or subject.kind in self.kinds
            if may and self._drawn(candidate, f"subject {subject.name}", self.share):
                found.append(number)
        return found

    def composed(self, candidate: Candidate) -> bool:
        """Whether its made references come out of a scene of all subjects."""
        several = sum(bool(subject.references) for subject in candidate.subjects) > 1
        return several and self._drawn(candidate, "compose", self.compose_share)

    def _drawn(self, candidate: Candidate, purpose: str, share: float) -> bool:
        return draw(seed_for(self.seed, 0, candidate.key), f"synthetic {purpose}", _FINE) < share * _FINE


class Work:
    """One candidate on its way through `Synthesise`."""

    def __init__(self, step: Synthesise, candidate: Candidate, turns: Lock) -> None:
        self.step, self.candidate, self.turns = step, candidate, turns
        self.failures: Counter[str] = Counter()
        self.asked = self.made = 0
        self._pictures: dict[int, list[Pixels]] = {}
        self._looked: dict[int, list[Known]] = {}
        self._scenes: dict[str, tuple[Pixels | EditError, str]] = {}

    def outcome(self) -> Outcome:
        step, subjects = self.step, list(self.candidate.subjects)
        chosen = step.chosen(self.candidate)
        if not chosen:
            return self.candidate
        composed = step.composed(self.candidate)
        for number in chosen:
            references = self.references(number, composed)
            subjects[number] = self._with(subjects[number], references)
            if not references and step.on_failure == "drop":
                why = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.failures.items()))
                return self.candidate.dropped(step.name, "no made reference kept", f"{subjects[number].name}: {why}")
        counts = {"asked": self.asked, "made": self.made, "failed": dict(sorted(self.failures.items()))}
        return self.candidate.changed(subjects=tuple(subjects), meta={"synthetic": counts})

    def references(self, number: int, composed: bool) -> list[Reference]:
        """The made references of one subject that are kept, at most `per_subject`."""
        if not self.candidate.subjects[number].references:
            self.failures["no picture to start from"] += 1
            return []
        found = []
        for turn in range(self.step.per_subject):
            passing: list[Made] = []
            for attempt in range(self.step.attempts):
                self.asked += 1
                try:
                    made = self._attempt(number, f"{turn} {attempt}", composed)
                except EditError as error:
                    self.failures[error.reason] += 1
                    continue
                if made.verdict.kept:
                    passing.append(made)
                else:
                    self.failures[made.verdict.reason] += 1
                if len(passing) == self.step.best_of:
                    break
            if passing:
                found.append(self._reference(max(passing, key=_similarity)))
        self.made += len(found)
        return found

    def _attempt(self, number: int, label: str, composed: bool) -> Made:
        subject = self.candidate.subjects[number]
        seed = seed_for(self.step.seed, 0, f"{self.candidate.key} {subject.name} {label}")
        pictures, scene = self.pictures(number)[: self._room()], ""
        if composed:
            whole, scene = self._scene(label)
            prompt = prompts.extract(_named(subject), seed, on_sheet=self._room() < 2)
            picture = self._edit([whole, pictures[0]], prompt, seed)
        else:
            others = [other.name for n, other in enumerate(self.candidate.subjects) if n != number]
            prompt = prompts.decompose(_named(subject, len(pictures)), self.candidate.caption, seed, others=others)
            picture = self._edit(pictures, prompt, seed)
        return Made(picture, self._verdict(picture, number), prompt, seed, scene)

    def _scene(self, label: str) -> tuple[Pixels, str]:
        """All subjects together, and its prompt: once for the chosen subjects of a candidate.

        Raises:
            EditError: at each call, where it cannot be had.
        """
        if label not in self._scenes:
            seed = seed_for(self.step.seed, 0, f"{self.candidate.key} scene {label}")
            chosen = self.step.chosen(self.candidate)
            shown = [n for n, subject in enumerate(self.candidate.subjects) if subject.references]
            shown = sorted(sorted(shown, key=lambda n: n not in chosen)[: prompts.MOST_SUBJECTS])
            pictures = [self.pictures(n)[0] for n in shown]
            named = [_named(self.candidate.subjects[n]) for n in shown]
            on_sheet = len(pictures) > self.step.editor.max_pictures
            prompt = prompts.compose(named, self.candidate.caption, seed, on_sheet)
            try:
                self._scenes[label] = self._edit(pictures, prompt, seed), prompt
            except EditError as error:
                self._scenes[label] = EditError(f"scene: {error.reason}", str(error)), prompt
        scene, prompt = self._scenes[label]
        if isinstance(scene, EditError):
            raise scene
        return scene, prompt

    def _room(self) -> int:
        return min(_MOST_GIVEN, self.step.editor.max_pictures)

    def _edit(self, pictures: Sequence[Pixels], prompt: str, seed: int) -> Pixels:
        """By the editor, on one sheet where it takes fewer pictures."""
        given = pictures if len(pictures) <= self.step.editor.max_pictures else [sheet(pictures)]
        return self.step.editor.edit(given, prompt, seed, self.step.size)

    def _verdict(self, picture_HWC: Pixels, number: int) -> Verdict:
        with self.turns:
            rivals = [known for n in range(len(self.candidate.subjects)) if n != number for known in self._known(n)]
            kind = self.candidate.subjects[number].kind
            return self.step.check.judge(picture_HWC, self._known(number), kind, rivals, self.step.editor.copies)

    def pictures(self, number: int) -> list[Pixels]:
        """A subject's references, decoded once.

        Raises:
            VideoError: for one that is no picture.
        """
        if number not in self._pictures:
            self._pictures[number] = [one.pixels() for one in self.candidate.subjects[number].references]
        return self._pictures[number]

    def _known(self, number: int) -> list[Known]:
        if number not in self._looked:
            pictures = self.pictures(number)
            self._looked[number] = self.step.check.look(pictures, self.candidate.subjects[number].kind)
        return self._looked[number]

    def _reference(self, made: Made) -> Reference:
        verdict, editor = made.verdict, self.step.models[0]
        numbers = {name: round(value, 4) for name, value in sorted(verdict.numbers.items())}
        meta: dict[str, Any] = {"prompt": made.prompt, "seed": made.seed, "editor": editor, "checks": numbers}
        return Reference(
            encode_png(made.picture_HWC),
            "png",
            self.step.editor.origin,
            similarity=verdict.similarity,
            model=verdict.model,
            meta={**meta, "scene": made.scene} if made.scene else meta,
        )

    def _with(self, subject: CuratedSubject, made: Sequence[Reference]) -> CuratedSubject:
        old, new = subject.references, tuple(made)
        if self.step.policy == "extra":
            return replace(subject, references=old + new)
        return replace(subject, references=new if new and self.step.policy == "replace" else new + old)


def _named(subject: CuratedSubject, pictures: int = 1) -> prompts.Named:
    return prompts.Named(subject.name, subject.kind, pictures)


def _similarity(made: Made) -> float:
    return -1.0 if made.verdict.similarity is None else made.verdict.similarity
