"""Help on a stage: its command, examples, and the settings of its own classes; Lightning's own come on request."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args, get_type_hints

from idc.recipes import HELP, RECIPES, merged

# The classes of a command's own recipe, for a help that reads no file.
_SFT = {"model": "idc.stages.sft.SFT", "data": "idc.data.module.VideoDataModule"}
_GENERATION = {"model": "idc.stages.generate.Generate", "data": "idc.data.requests.GenerationData"}
_CLASSES = {
    "fit": _SFT,
    "validate": _SFT,
    "predict": _GENERATION,
    "generate": _GENERATION,
    "edit": {**_GENERATION, "model": "idc.stages.generate.Edit"},
    "test": {"model": "idc.stages.evaluate.Evaluate"},
    "evaluate": {"model": "idc.stages.evaluate.Evaluate"},
}
_EXAMPLES = {
    "fit": "--config recipes/hardware/cpu2.yaml --trainer.max_steps 1000",
    "validate": "--ckpt_path last",
    "evaluate": "--model.init_args.videos DIR",
    "test": "--model.init_args.videos DIR",
}


class Setting(NamedTuple):
    """A setting of a stage: its full name, its type in words with its default, and what it is for."""

    name: str
    type: str
    text: str


def stage_settings(tree: Mapping[str, Any]) -> list[Setting]:
    """Settings of the model's and the data's classes in a tree of settings, those of groups inside them included.

    A class that cannot be imported has none: whoever asks has another message to give.
    """
    found: list[Setting] = []
    for top in ("model", "data"):
        node = tree.get(top)
        path = node.get("class_path") if isinstance(node, Mapping) else None
        module, _, name = str(path or "").rpartition(".")
        if not module:
            continue
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
        found += class_settings(cls, f"{top}.init_args")
    return found


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


def show(command: str, args: Sequence[str], typed: str) -> int:
    """Print the help of `typed`, which is Lightning's subcommand `command`. Returns 0.

    With `--config`, it is about the classes of that recipe; with `--help.trainer`, about Lightning's own settings.
    """
    recipe = RECIPES[typed]
    print(f"usage: idc {typed} --config RECIPE [--config OVERLAY ...] [--KEY VALUE ...]\n")
    if "--help.trainer" in args:
        print(_lightning_help(command))
        return 0
    example = _EXAMPLES.get(typed, "--model.init_args.checkpoint runs/sft")
    print(f"examples:\n  idc {typed} --config {recipe}\n  idc {typed} --config {recipe} {example}\n")
    given = merged([arg for arg in args if arg not in HELP])
    own = {top: {"class_path": path} for top, path in _CLASSES[typed].items()}
    tree = given if isinstance(given.get("model"), Mapping) and "class_path" in given["model"] else own
    settings = stage_settings(tree)
    for top in ("model", "data"):
        if lines := [setting for setting in settings if setting.name.startswith(f"{top}.")]:
            print(f"{top}: {tree[top]['class_path']}")
            print("\n".join(map(setting_line, lines)) + "\n")
    print(f"A setting's value is YAML; --config takes a file of them, of which the last wins. The recipe {recipe}")
    print(f"says more. Trainer, callbacks and logger: idc {typed} --help.trainer. All as it stands: --print_config.")
    return 0


def setting_line(setting: Setting) -> str:
    """A setting as help shows it."""
    head = f"  --{setting.name}  {setting.type}"
    text = " ".join(setting.text.split())
    body = textwrap.fill(text, 112, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return f"{head}\n{body}" if text else head


def _lightning_help(command: str) -> str:
    """What Lightning's parser says of itself, less its own usage, which is a page of all names."""
    from idc.lightning_cli import run

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        run(command, ["--help"])
    return shown.getvalue().partition("\n\n")[2].rstrip()
