"""Steps over the whole collection: what one candidate cannot know of itself, such as that it is there twice.

They run after all units are through their steps, over the survivors without their pixels, in the order of the sources.
What they decide is applied when shards are written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from idc.curate.candidate import Candidate, Dropped
from idc.curate.describing import plain_settings, words_of


class Survivors(Protocol):
    """All candidates that came through the steps: `clip`, masks and the references' images are empty, all else is
    there. May be passed over many times; each pass streams from the disk in the same order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Candidate]: ...


class Collected(Survivors, Protocol):
    """The survivors with their pixels, as they are written. It is pickled to processes: paths, no open files."""

    def load(self, number: int, clip: bool = True) -> Candidate:
        """Survivor `number` of the order, from 0, with its references' images, and with `clip` its clip and masks.

        Raises:
            UserError: where what the steps left on the disk cannot be read, with what to do.
        """


@dataclass(frozen=True)
class Adopt:
    """A subject takes a reference of the same subject in another candidate as its own.

    Attributes:
        key, subject: who takes it: candidate, and number of its subject.
        other, other_subject, reference: whose reference, by number.
        similarity: cosine of the two subjects' embeddings, by `model`.
        first: it becomes the subject's first choice.
    """

    key: str
    subject: int
    other: str
    other_subject: int
    reference: int
    similarity: float
    first: bool = True
    model: str = ""


Decision = Dropped | Adopt


class CollectionStep(ABC):
    """Decides over the survivors of the steps before it: those dropped by an earlier collection step are not shown.

    Attributes:
        name: in tables and drops; the class's name in words by default.
        after_split: whether it must know which candidates are held out: then `meta["split"]` of each says so.
    """

    name: str = ""
    after_split: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" not in vars(cls):
            cls.name = words_of(cls)

    @abstractmethod
    def decide(self, survivors: Survivors) -> Iterable[Decision]:
        """Drops and adoptions; the same for the same survivors, whatever else. At most one drop a candidate."""

    def check(self) -> None:  # noqa: B027  # most need nothing
        """Look at what it will need, before the first unit is opened.

        Raises:
            UserError: for what would stop it when all steps are done.
        """

    def describe(self) -> Mapping[str, Any]:
        """Settings that decide what comes out, plain JSON."""
        return plain_settings(self)
