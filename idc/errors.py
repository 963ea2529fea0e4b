"""Errors that a user caused and can mend: one message with the value, the rule and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The command line prints its message on one line and exits with status 2, without a traceback."""


def nearest(value: object, choices: Iterable[object], n: int = 1) -> str:
    """The closest choices to `value` by spelling, for an error message: `"; did you mean 'x'?"`, or all of them."""
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(str(value), names, n=n, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(name) for name in close) + "?"
    return "; choose from " + ", ".join(repr(name) for name in sorted(names)) if names else ""
