"""What the collection steps decide together: who is dropped, who is held out, and who takes whose reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from idc.curate.candidate import Candidate, Dropped
from idc.curate.collection import Adopt, CollectionStep, Survivors
from idc.curate.split import SPLIT, held_out_videos, part_of
from idc.errors import UserError, counted


@dataclass(frozen=True)
class Decisions:
    """What happens to the survivors when they are written.

    Attributes:
        drops: by number of the survivor in their order.
        adopted: key of a candidate -> what its subjects take over, in the order of the steps.
        held_out, train: ids of the videos that are held out, and of those that are not.
        crossed: adoptions that were not allowed, since one of the two is held out and the other is not.
    """

    drops: Mapping[int, Dropped] = field(default_factory=dict)
    adopted: Mapping[str, Sequence[Adopt]] = field(default_factory=dict)
    held_out: frozenset[str] = frozenset()
    train: frozenset[str] = frozenset()
    crossed: int = 0

    def crosses(self, video: str, other: str) -> bool:
        """Whether a picture from the video `other` would carry something over the split into a sample of `video`."""
        return other in (self.train if video in self.held_out else self.held_out) and other != video


def decide(survivors: Survivors, steps: Sequence[CollectionStep], held_out: float = 0.0) -> Decisions:
    """Run the collection steps in order, each over what the ones before it have left.

    Training and held-out data are parted before the first step with `after_split`, or behind the last one; from there
    on each candidate's `meta["split"]` names its part.

    Args:
        held_out: share of the samples that are held out.

    Raises:
        UserError: for a step that decides over what it was not shown.
    """
    view = _View(survivors)
    adopted: dict[str, list[Adopt]] = {}
    for step in steps:
        if step.after_split and view.held_out is None:
            view.held_out = held_out_videos(view, held_out)
        dropped: dict[str, Dropped] = {}
        for decision in step.decide(view):
            if isinstance(decision, Dropped):
                dropped[decision.key] = decision
            else:
                adopted.setdefault(decision.key, []).append(decision)
        view.drop(dropped, step)
    if view.held_out is None:
        view.held_out = held_out_videos(view, held_out)
    return _checked(view, view.held_out, adopted)


def _checked(view: _View, held_out: frozenset[str], adopted: Mapping[str, Sequence[Adopt]]) -> Decisions:
    """The decisions without the adoptions whose giver or taker is dropped, or that cross the split."""
    kept: dict[str, list[Adopt]] = {}
    crossed = 0
    concerned = {*adopted, *(adopt.other for some in adopted.values() for adopt in some)}
    parts: dict[str, str] = {}
    videos: set[str] = set()
    for candidate in view:
        videos.add(candidate.video)
        if candidate.key in concerned:
            parts[candidate.key] = candidate.meta[SPLIT]
    for key, some in adopted.items():
        for adopt in some:
            if key not in parts or adopt.other not in parts:
                continue
            if parts[key] != parts[adopt.other]:
                crossed += 1
            else:
                kept.setdefault(key, []).append(adopt)
    return Decisions(view.drops, kept, held_out, frozenset(videos - held_out), crossed)


class _View:
    """The survivors that no step has dropped, marked with their part once that is decided."""

    def __init__(self, survivors: Survivors) -> None:
        self._survivors = survivors
        self.drops: dict[int, Dropped] = {}
        self.held_out: frozenset[str] | None = None

    def __len__(self) -> int:
        return len(self._survivors) - len(self.drops)

    def __iter__(self) -> Iterator[Candidate]:
        for number, candidate in enumerate(self._survivors):
            if number not in self.drops:
                if self.held_out is not None:
                    candidate = candidate.changed(meta={SPLIT: part_of(candidate, self.held_out)})
                yield candidate

    def drop(self, dropped: dict[str, Dropped], step: CollectionStep) -> None:
        if not dropped:
            return
        for number, candidate in enumerate(self._survivors):
            if number not in self.drops and candidate.key in dropped:
                self.drops[number] = dropped.pop(candidate.key)
        if dropped:
            raise UserError(
                f"{step.name}: drops {counted(len(dropped), 'candidate')} that it was not shown, such as "
                f"{next(iter(dropped))!r}"
            )
