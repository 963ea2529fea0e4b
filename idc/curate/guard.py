"""What keeps runs into one folder apart: a lock, and the settings that the folder was begun with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from idc.curate.candidate import Source, Step
from idc.curate.chunks import Encoding
from idc.curate.executors import BEGUN
from idc.curate.films import remove_films
from idc.curate.parts import VERSION
from idc.curate.records import dumps
from idc.data import storage
from idc.errors import UserError

SETTINGS, LOCK = "settings.json", "lock"
IDENTITY = "identity"  # of a source: how its units are told apart
NAMED = 5  # changed settings that a message names


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Hold a local folder against other runs for as long as this process lives. Behind URLs nothing is held.

    Raises:
        UserError: where another run holds it.
    """
    if storage.is_url(folder):
        yield
        return
    with open(Path(folder, LOCK), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise UserError(
                f"{folder}: another run is at work there ({who}); wait for its end, or give another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


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
    was, classes = _classes(before["steps"]), _classes(now["steps"])
    if was != classes:
        changed = [f"steps are {', '.join(classes) or 'none'} (were {', '.join(was) or 'none'})"]
    else:
        old, new = dict(_flat(before)), dict(_flat(now))
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        both = before["sources"].keys() & now["sources"].keys()
        names = [name for name in names if not name.startswith("sources.") or _of(name, both)]
        changed = [f"{name} is {_shown(new.get(name))} (was {_shown(old.get(name))})" for name in names]
    if changed:
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        raise UserError(
            f"{folder}: begun with other settings: {'; '.join(changed[:NAMED])}{more}; "
            "take these back, or give another --out"
        )


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


def _of(name: str, sources: Collection[str]) -> bool:
    return any(name.startswith(f"sources.{source}.") for source in sources)


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
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
