"""What the parts of a recipe want of each other: told when it is parsed, not when the first film is half done.

Only what is sure is refused. What the classes of others do is not known here, nor what shards tell that are read again:
where a recipe has them, the steps themselves say what they lack.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from idc.curate.candidate import Source, Step
from idc.curate.collection import CollectionStep
from idc.curate.duplicates import Duplicates, Fingerprint
from idc.curate.embed import EmbedFaces, EmbedSubjects
from idc.curate.exclusion import Exclude
from idc.curate.faces import FaceTracks, PeopleInWindow
from idc.curate.filters import AestheticFilter, MotionFilter, TechnicalFilter
from idc.curate.pairs import CrossVideoPairs, face_thresholds
from idc.curate.reading import CACHE_SETTING
from idc.curate.sources import ExistingShards, OpenS2V5M
from idc.curate.sources.opens2v_record import FRAME_SCORES, META, SCORES
from idc.curate.windows import Cut, Windows
from idc.errors import UserError, nearest

PEOPLE_SCORES = ("people", "face_height", "face_sharpness", "face_yaw")
GIVEN: Mapping[type, Sequence[str]] = {  # the scores that candidates have of each class, where it gives any
    OpenS2V5M: [f"{META}_{name}" for name in (*SCORES, *FRAME_SCORES)],
    TechnicalFilter: ("brightness", "dark", "glaring", "black", "white", "frozen", "short_side", "sharpness"),
    MotionFilter: ("motion",),
    AestheticFilter: ("aesthetic",),
    FaceTracks: PEOPLE_SCORES,
    PeopleInWindow: PEOPLE_SCORES,
}


def check_recipe(sources: Sequence[Source], steps: Sequence[Step], collection: Sequence[CollectionStep]) -> None:
    """Look at what the steps of a recipe want of each other, of the sources and of the environment.

    Raises:
        UserError: for a `Cut` that no step chooses frames for, a score that `Duplicates` prefers and none gives, a
            threshold of `CrossVideoPairs` for an embedder that the recipe has not, and an `Exclude` that nothing is
            made ready for; also for a size of the cache in the environment that is none.
    """
    _check_cache(os.environ.get(CACHE_SETTING, ""))
    for number, step in enumerate(steps):
        if isinstance(step, Cut) and not _chosen(sources, steps[:number]):
            raise UserError(
                f"steps, number {number + 1} (Cut): no step before it chooses the frames of a clip; put "
                "idc.curate.windows.Windows before it"
            )
    for number, decider in enumerate(collection, 1):
        where = f"collection, number {number} ({type(decider).__name__})"
        if isinstance(decider, Duplicates) and decider.prefer:
            scores = _scores([*sources, *steps])
            if scores is not None and decider.prefer not in scores:
                wrong = f"prefer={decider.prefer!r}: no source or step of the recipe gives that score"
                raise UserError(f"{where}: {wrong}{nearest(decider.prefer, scores)}")
        if isinstance(decider, Exclude) and decider.items and _known(steps):
            _check_exclusion(decider, where, sources, steps)
        if isinstance(decider, CrossVideoPairs) and _known(steps):
            known = {*face_thresholds(), *(name.split(" ")[0] for name in _networks(steps))}
            for name in decider.thresholds:
                if name not in known:
                    wrong = f"thresholds: no step of the recipe embeds subjects by {name!r}"
                    raise UserError(f"{where}: {wrong}{nearest(name, known)}")


def _check_cache(size: str) -> None:
    """Workers read it with the first film behind a URL, and each film would be dropped by a fault."""
    with suppress(ValueError):
        if not size or 0 < float(size) < math.inf:
            return
    number = re.match(r"\s*(\d+(?:\.\d+)?)", size)
    near = f"; did you mean {number[1]}?" if number and float(number[1]) else ""
    raise UserError(f"{CACHE_SETTING}={size!r} in the environment: must be a number of GiB, more than 0{near}")


def _known(things: Iterable[Any]) -> bool:
    """Whether all are of this package, and so do what is known here."""
    return all(type(thing).__module__.partition(".")[0] == __name__.partition(".")[0] for thing in things)


def _chosen(sources: Sequence[Source], before: Sequence[Step]) -> bool:
    """Whether candidates may have their frames when they have come through the steps `before`."""
    ready = (source for source in sources if isinstance(source, ExistingShards) or not _known([source]))
    return any(isinstance(step, Windows) for step in before) or not _known(before) or len(list(ready)) == len(sources)


def _scores(things: Sequence[Any]) -> set[str] | None:
    """The scores that candidates may have; None where nobody knows."""
    if not _known(things) or any(isinstance(thing, ExistingShards) for thing in things):
        return None
    return {name for thing in things for kind, names in GIVEN.items() if isinstance(thing, kind) for name in names}


def _networks(steps: Iterable[Step]) -> list[str]:
    """Names of the networks of the steps."""
    return [str(network.name) for step in steps for network in step.networks if hasattr(network, "name")]


def _check_exclusion(exclude: Exclude, where: str, sources: Sequence[Source], steps: Sequence[Step]) -> None:
    """What `Exclude` says when all steps are done and no subject or clip can be compared, as far as it is sure now."""
    told = any(isinstance(source, ExistingShards) for source in sources) or not _known(sources)
    if exclude.bits is not None and not told and not any(isinstance(step, Fingerprint) for step in steps):
        raise UserError(
            f"{where}: no step gives clips the fingerprints that pictures are compared by; add the step "
            "idc.curate.duplicates.Fingerprint behind the others, or set bits: null"
        )
    for setting, network, kinds in (
        ("faces", exclude.faces, (FaceTracks, EmbedFaces)),
        ("embedder", exclude.embedder, (EmbedSubjects,)),
    ):
        known = _networks(step for step in steps if isinstance(step, kinds))
        if network is not None and network.name not in known:
            raise UserError(
                f"{where}: no step embeds subjects by {setting}={network.name!r}{nearest(network.name, known)}; add "
                f"the step idc.curate.embed.{kinds[-1].__name__} with it, or set {setting}: null"
            )
