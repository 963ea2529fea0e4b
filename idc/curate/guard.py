"""What keeps runs into one folder apart: locks, the settings that it was begun with, and whose shards it holds."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from idc.curate.candidate import Source, Step
from idc.curate.chunks import Encoding
from idc.curate.executors import BEGUN, files_in
from idc.curate.films import remove_films
from idc.curate.parts import VERSION
from idc.curate.provenance import public
from idc.curate.records import dumps
from idc.curate.split import PARTS
from idc.curate.writing import MANIFEST, note_path, read_note
from idc.data import storage
from idc.errors import UserError, brief

SETTINGS, LOCK = "settings.json", "lock"
IDENTITY = "identity"  # of a source: how its units are told apart
NAMED = 5  # changed settings that a message names


@contextmanager
def locked(*folders: str) -> Iterator[None]:
    """Hold local folders against other runs for as long as this process lives. Behind URLs, and on disks that know no
    locks, nothing is held.

    Raises:
        UserError: where another run holds one of them.
    """
    with ExitStack() as held:
        for folder in {os.path.realpath(folder): folder for folder in folders if not storage.is_url(folder)}.values():
            with files_in(folder):
                _lock(folder, held.enter_context(open(Path(folder, LOCK), "a+")))
        yield


def _lock(folder: str, file: IO[str]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip() or "another process"
        raise UserError(
            f"{folder}: another run is at work there ({who}); wait for its end, or give another --out"
        ) from None
    except OSError:  # of a disk without locks
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def check_shards(out: str, work: str, recipe: Mapping[str, Any], material: str = "") -> None:
    """Let no run replace shards that another has made. Those are its own that `work` has notes of, whatever has become
    of the recipe: `Settings` says what may. Without them, as where `work` was deleted, the manifest must tell of the
    same recipe and material: then the same comes out again.

    Runs behind URLs, where nothing is locked, ask again before they write: of two into one place the one that comes to
    its end first is safe from the other.

    Args:
        out: folder or URL of the shards.
        work: folder or URL of the parts and notes.
        recipe: as it goes into the manifest.
        material: digest of the units (`idc.curate.plan.Plan`); "" as long as they are not known.

    Raises:
        UserError: where `out` has the manifest of others.
    """
    ways = "give another --out, or delete that folder first"
    try:
        with storage.open_read(storage.join(out, MANIFEST)) as stream:
            manifest = json.loads(stream.read())
        shards, before = [(one["shard"], one["sha256"]) for one in manifest["shards"]], manifest["recipe"]
        before["steps"], before["sources"]
    except FileNotFoundError:
        tars = (storage.join(part, name) for part in PARTS for name in storage.list_tars(storage.join(out, part)))
        if not _load(storage.join(work, SETTINGS)) and (shard := next(tars, None)):
            raise UserError(f"{out}: holds {shard} without the {MANIFEST} that would say whose it is; {ways}") from None
        return
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{out}: its {MANIFEST} is not of curation, or damaged; {ways}") from None
    if not shards or any(_noted(work, *shard) for shard in shards):
        return
    if changed := _changes(before, json.loads(dumps(public(recipe)))):
        raise UserError(f"{out}: holds the shards of another recipe: {changed}; {ways}")
    if material and manifest.get("material", material) != material:
        raise UserError(f"{out}: holds shards that the same recipe has made of other material; {ways}")


def _noted(work: str, shard: str, digest: str) -> bool:
    return read_note(note_path(work, shard)).get("sha256") == digest


def clean(folder: str) -> None:
    """Remove what a run left in a folder, which is locked: temporary files, notes of what it was at, films."""
    remove_films(folder)
    for name in storage.list_names(folder):
        if name.endswith((BEGUN, ".tmp")):
            storage.remove(storage.join(folder, name))


class Settings:
    """The settings that a folder's parts depend on, as they are now and as the folder was begun with.

    Sources may come and go; one that stays must stay as it was.
    """

    def __init__(
        self, folder: str, sources: Sequence[Source], steps: Sequence[Step], encoding: Encoding, chunk: int
    ) -> None:
        self._folder, self._path = folder, storage.join(folder, SETTINGS)
        settings = {
            "version": VERSION,
            "chunk": chunk,
            "encoding": vars(encoding),
            "steps": [dict(step.describe()) for step in steps],
            "sources": {source.name: {**source.describe(), IDENTITY: source.identity} for source in sources},
        }
        self._now = json.loads(dumps(settings))
        self._before = _load(self._path)

    def compare(self) -> str:
        """A digest of the steps' and the encoding's settings.

        Raises:
            UserError: naming what has changed since the folder was begun.
        """
        if self._before:
            _compare(self._folder, self._before, self._now)
        return hashlib.sha256(dumps([self._now[key] for key in ("version", "encoding", "steps")]).encode()).hexdigest()

    def keep(self) -> str:
        """Compare, and write down what is new."""
        digest = self.compare()
        known = {**self._now, "sources": {**self._before.get("sources", {}), **self._now["sources"]}}
        if known != self._before:
            with storage.open_atomic(self._path) as stream:
                stream.write(json.dumps(known, indent=1, sort_keys=True).encode() + b"\n")
        return digest


def _load(path: str) -> dict[str, Any]:
    try:
        with storage.open_read(path) as stream:
            settings = json.loads(stream.read())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path}: damaged; remove the folder to begin anew") from None
    for source in settings["sources"].values():
        source.setdefault(IDENTITY, 1)  # there was no other before it was written down
    return settings


def _compare(folder: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    _check_identity(folder, before["sources"], now["sources"])
    both = before["sources"].keys() & now["sources"].keys()
    stay = [{**all, "sources": {name: all["sources"][name] for name in both}} for all in (before, now)]
    if changed := _changes(*stay):
        raise UserError(f"{folder}: begun with other settings: {changed}; take these back, or give another --out")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs in two trees of settings with `steps`, the first few in words; "" for nothing."""
    was, classes = _classes(before["steps"]), _classes(now["steps"])
    if was != classes:
        changed = [f"steps are {', '.join(classes) or 'none'} (were {', '.join(was) or 'none'})"]
    else:
        old, new = dict(_flat(before)), dict(_flat(now))
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        changed = [f"{name} is {_shown(new.get(name))} (was {_shown(old.get(name))})" for name in names]
    more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
    return "; ".join(changed[:NAMED]) + more


def _check_identity(folder: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in before.keys() & now.keys():
        same_kind = before[name].get("class") == now[name].get("class")
        if same_kind and before[name][IDENTITY] != now[name][IDENTITY]:
            raise UserError(
                f"{folder}: begun by another version of idc, which told the files of source {name!r} apart in another "
                "way, so that nobody can say which of them are done; finish it by that version, or give another --out"
            )


def _classes(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(step.get("class", "?")).rpartition(".")[2] for step in steps]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a tree of settings by their names joined with dots; steps by class."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            label = str(item.get("class", number)).rpartition(".")[2] if isinstance(item, Mapping) else str(number)
            yield from _flat(item, f"{name}.{number}.{label}")
    else:
        yield name, value


def _shown(value: Any) -> str:
    return brief(json.dumps(value, ensure_ascii=False))
