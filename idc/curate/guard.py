"""What keeps runs into one folder apart: a lock, and the settings that the folder was begun with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from idc.curate.candidate import Source, Step
from idc.curate.chunks import Encoding
from idc.curate.parts import VERSION
from idc.curate.records import dumps
from idc.data import storage
from idc.errors import UserError

SETTINGS, LOCK = "settings.json", "lock"
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
    """Remove the temporary files that a killed run left in a local folder, which is locked."""
    if not storage.is_url(folder):
        for path in Path(folder).glob("*.tmp"):
            path.unlink(missing_ok=True)


def check_settings(
    folder: str, sources: Sequence[Source], steps: Sequence[Step], encoding: Encoding, chunk: int
) -> str:
    """Compare the settings with those that the folder was begun with, or write them down.

    Sources may come and go; one that stays must stay as it was.

    Returns:
        a digest of the steps' and the encoding's settings.

    Raises:
        UserError: naming what has changed.
    """
    now = json.loads(
        dumps(
            {
                "version": VERSION,
                "chunk": chunk,
                "encoding": vars(encoding),
                "steps": [dict(step.describe()) for step in steps],
                "sources": {source.name: dict(source.describe()) for source in sources},
            }
        )
    )
    path = storage.join(folder, SETTINGS)
    before = _load(path)
    if before:
        now["sources"] = {**before["sources"], **now["sources"]}
        _compare(folder, before, now)
    if now != before:
        with storage.open_atomic(path) as stream:
            stream.write(json.dumps(now, indent=1, sort_keys=True).encode() + b"\n")
    return hashlib.sha256(dumps({key: now[key] for key in ("version", "encoding", "steps")}).encode()).hexdigest()


def _load(path: str) -> dict[str, Any]:
    try:
        with storage.open_read(path) as stream:
            return json.loads(stream.read())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path}: damaged; remove the folder to begin anew") from None


def _compare(folder: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    was, classes = _classes(before["steps"]), _classes(now["steps"])
    if was != classes:
        changed = [f"steps are {', '.join(classes) or 'none'} (were {', '.join(was) or 'none'})"]
    else:
        old, new = dict(_flat(before)), dict(_flat(now))
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        # A source that is new is no change of what was there.
        names = [name for name in names if not name.startswith("sources.") or _known(name, before["sources"])]
        changed = [f"{name} is {_shown(new.get(name))} (was {_shown(old.get(name))})" for name in names]
    if changed:
        more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
        raise UserError(
            f"{folder}: begun with other settings: {'; '.join(changed[:NAMED])}{more}; "
            "take these back, or give another --out"
        )


def _classes(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(step.get("class", "?")).rpartition(".")[2] for step in steps]


def _known(name: str, sources: Mapping[str, Any]) -> bool:
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
