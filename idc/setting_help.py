"""Settings of classes as help shows them: names, types in words, defaults, and what their docstrings say."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args, get_type_hints


class Setting(NamedTuple):
    """A setting: its full name, its type in words with its default, and what it is for."""

    name: str
    type: str
    text: str


def class_settings(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Settings of a class, named from `prefix` on, and of the dataclasses that it takes."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(add_help=False)
    parser.add_class_arguments(cls, prefix or None)
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is None or action.dest.endswith(".help"):
            continue
        kind = _words(hint) + (" (required)" if action.required else _default(action.default))
        yield Setting(action.dest, kind, "" if action.help in (None, "==SUPPRESS==") else str(action.help))
        yield from _inside(hint, action.dest)


def _inside(hint: Any, prefix: str) -> Iterator[Setting]:
    """Settings of the dataclasses that a type hint takes, and of those inside them."""
    for group in (hint, *get_args(hint)):
        if not (isinstance(group, type) and dataclasses.is_dataclass(group)):
            continue
        hints = get_type_hints(group)
        for field in dataclasses.fields(group):
            yield Setting(f"{prefix}.{field.name}", _words(hints[field.name]) + _default(field.default), "")
            yield from _inside(hints[field.name], f"{prefix}.{field.name}")


def _default(value: Any) -> str:
    """As YAML has it."""
    if value is None or value is dataclasses.MISSING or dataclasses.is_dataclass(value):
        return ""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else value
    return f" = {list(text) if isinstance(text, tuple) else text}"


def _words(hint: Any) -> str:
    """A type as a reader of help wants it: without modules, null for None."""
    text = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    text = re.sub(r"Optional\[(.*)\]$", r"\1 | null", re.sub(r"(\w+\.)+", "", text))
    return re.sub(r"\bNone(Type)?\b", "null", text)


def setting_line(setting: Setting) -> str:
    """A setting as help shows it."""
    head = f"  --{setting.name}  {setting.type}"
    text = " ".join(setting.text.split())
    body = textwrap.fill(text, 112, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return f"{head}\n{body}" if text else head
