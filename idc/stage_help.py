"""Help on a stage: its command, examples, and the settings of its own classes; Lightning's own come on request."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from idc.recipes import HELP, RECIPES, merged
from idc.setting_help import Setting, class_settings, setting_line

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


def _lightning_help(command: str) -> str:
    """What Lightning's parser says of itself, less its own usage, which is a page of all names."""
    from idc.lightning_cli import run

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        run(command, ["--help"])
    return shown.getvalue().partition("\n\n")[2].rstrip()
