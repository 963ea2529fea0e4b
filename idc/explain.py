"""Turn jsonargparse's nested messages into one line: the setting, the value, the rule, the nearest valid choice.

A wrong setting deep in a recipe is reported by one parser inside another, each wrapping the message of the inner one
in "does not validate against any of the union subtypes". The inner parser knows its own settings, so it explains
first; the outer ones only add where it happened.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable

from idc.errors import nearest

_AT = "\x1f"  # between the place and the explanation, until the outermost parser is done
_BOILERPLATE = re.compile(
    r"Parser key|Does not validate|Subtypes:|Errors:$|Given value|Problem with given class"
    r"|Expected a <class 'NoneType'>|Expected an? <class '[\w.]+'>$"
)
_UNKNOWN = (
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
    re.compile(r"unrecognized arguments: --(?P<key>[\w.]+)"),
    re.compile(r"does not accept option '(?P<key>[^']+)'"),
)
_LITERAL = re.compile(r"Expected a typing\.Literal\[(?P<choices>.*)\]\. Got value: (?P<value>.*)")
_TYPE = re.compile(r"Expected an? <class '(?P<type>[\w.]+)'>\. Got value: (?P<value>.*)")
_ATTRIBUTE = re.compile(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'")


def explain(message: str, settings: Iterable[str] = ()) -> str:
    """One line for `message`; `settings` are the names that the reporting parser knows.

    The result still carries the place apart, for an outer parser; `finish` joins the two.
    """
    place = re.findall(r'Parser key "([^"]+)":', message)[:1]
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    causes = [line for line in lines if line and not _BOILERPLATE.match(line)]
    cause = causes[0] if causes else lines[0]
    if _AT in cause:
        inner, cause = cause.split(_AT, 1)
        place += [inner] if inner else []
    return ".".join(place) + _AT + _reword(cause, list(settings))


def finish(explained: str) -> str:
    """The place and the explanation as one line."""
    place, _, cause = explained.rpartition(_AT)
    return f"{place}: {cause}" if place else cause


def _reword(cause: str, settings: list[str]) -> str:
    for pattern in _UNKNOWN:
        if found := pattern.search(cause):
            key = found["key"]
            return f"there is no setting {key!r}{_nearest_setting(key, settings)}"
    if found := _LITERAL.search(cause):
        choices = re.findall(r"'([^']*)'", found["choices"])
        return f"{found['value']!r} is not one of {', '.join(map(repr, choices))}{nearest(found['value'], choices)}"
    if found := _TYPE.search(cause):
        return f"{found['value']!r} is not of type {found['type']}"
    if found := _ATTRIBUTE.search(cause):
        return f"there is no {found['module']}.{found['name']}{_nearest_class(found['module'], found['name'])}"
    return cause


def _nearest_setting(key: str, settings: list[str]) -> str:
    """By full name; failing that by the last part among the settings of the same group."""
    parent, _, last = key.rpartition(".")
    group = {s.rpartition(".")[2] for s in settings if s.rpartition(".")[0] == parent} if parent else set()
    if group:
        return nearest(last, group)
    top = {s.partition(".")[0] for s in settings}
    return nearest(key.partition(".")[0], top) if top else ""


def _nearest_class(module: str, name: str) -> str:
    found = importlib.import_module(module)
    public = [n for n, value in vars(found).items() if isinstance(value, type) and not n.startswith("_")]
    return nearest(f"{module}.{name}", [f"{module}.{n}" for n in public]) if public else ""
