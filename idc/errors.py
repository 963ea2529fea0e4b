"""Errors that a user caused and can mend: one message with the value, the rule and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Bad input. The command line prints its message on one line and exits with status 2, without a traceback."""


class StoppedError(UserError):
    """Ends a run on all ranks alike, at a moment when the weights are those of the last complete step: that step can
    still be saved (`idc.callbacks.checkpoint`), by a stage that says `can_stop`."""


SHOWN = 20  # choices that an error message lists in full


def nearest(value: object, choices: Iterable[object], n: int = 1) -> str:
    """The closest choices to `value` by spelling, for an error message: `"; did you mean 'x'?"`, or all of them; of
    more than 20, the first few and their number."""
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(value), names, n=n, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(name) for name in close) + "?"
    if not names:
        return ""
    listed = sorted(names) if len(names) <= SHOWN else sorted(names)[:3]
    more = f", ... ({len(names)} of them)" if len(names) > len(listed) else ""
    return "; choose from " + ", ".join(map(repr, listed)) + more


def make_folder(path: Path, setting: str = "--out") -> None:
    """Make the folder that `setting` names, and those above it; one that is there may stay.

    Raises:
        UserError: if something else is there, or nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        above = next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), path)
        raise UserError(f"{setting} {path}: {above} is a file; give the name of a folder") from None
    except OSError as error:
        raise UserError(f"{setting} {path}: cannot be made ({error.strerror})") from None


def check_file(path: Path, setting: str) -> None:
    """Before anything runs, that a file of that name can be written later.

    Raises:
        UserError: where its folder is not there, or a folder has its name.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{setting} {path}: {folder} is no folder")
    if path.is_dir():
        raise UserError(f"{setting} {path}: is a folder; give the name of a file")


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 item", "2 items"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def brief(text: str, most: int = 60) -> str:
    """The beginning of a text that is longer than a message bears."""
    return text if len(text) <= most else text[: most - 3] + "..."
