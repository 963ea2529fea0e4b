"""Checks on recipes that need nothing heavy: do the files exist, parse, and come in an order that makes sense."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from idc.errors import UserError, nearest

# An overlay may only change what an earlier file has set. A later layer that is written before an earlier one
# would be silently undone by it.
ORDER = ("stage", "scale", "protocols", "data", "hardware", "ablations")


_ITEM = re.compile(r"--(?P<list>[A-Za-z_][\w.]*?)\.\d+(?:\.[\w.]+)?(?=\+?(?:=|$))")


class _Strict(yaml.SafeLoader):
    """YAML that refuses a key written twice, of which the parser would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is written twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


def check_command_line(args: Sequence[str]) -> None:
    """Check the names of settings and every `--config` of a command line.

    Raises:
        UserError: for a list's item as a setting, a missing file, broken YAML, or overlays before what they change.
    """
    _check_no_items(args)
    paths = _config_paths(args)
    layers = [(path, _layer(path, _load(path))) for path in paths]
    ranks = [ORDER.index(layer) if layer else None for _, layer in layers]
    known = [rank for rank in ranks if rank is not None]
    if known != sorted(known):
        by_rank = sorted(zip(paths, ranks, strict=True), key=lambda item: len(ORDER) if item[1] is None else item[1])
        raise UserError(
            f"--config order {' '.join(map(str, paths))}: a later file wins, so the order is "
            f"{', '.join(ORDER)}; write " + " ".join(f"--config {path}" for path, _ in by_rank)
        )
    if paths and all(layer not in (None, "stage") for _, layer in layers):
        raise UserError(
            f"--config {paths[0]}: an overlay changes a stage recipe and does not run alone; "
            f"write --config recipes/sft.yaml --config {paths[0]}"
        )


def _check_no_items(args: Sequence[str]) -> None:
    """Refuse `--sources.0.path`: the parser finds no such setting, or takes it for another one (betas.0 sets both)."""
    for arg in args:
        if found := _ITEM.match(arg):
            raise UserError(
                f"{found[0]}: an item of a list cannot be set by its number; write the whole list into an overlay "
                f"(--config FILE) or behind --{found['list']}, or add items at its end with --{found['list']}+"
            )


def _config_paths(args: Sequence[str]) -> list[Path]:
    paths = []
    for i, arg in enumerate(args):
        if arg in ("--config", "-c"):
            if i + 1 >= len(args):
                raise UserError("--config: needs a file, for example recipes/sft.yaml")
            paths.append(Path(args[i + 1]))
        elif arg.startswith("--config="):
            paths.append(Path(arg.split("=", 1)[1]))
    return paths


def _load(path: Path) -> dict:
    if not path.is_file():
        known = sorted(str(p) for p in Path("recipes").rglob("*.yaml")) if Path("recipes").is_dir() else []
        raise UserError(f"--config {path}: no such file{nearest(path, known) or '; recipes lie in recipes/'}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Strict)
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(f"--config {path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: must be a mapping of settings, found {type(content).__name__}")
    trainer = content.get("trainer")
    if isinstance(trainer, dict) and {"callbacks", "callbacks+"} <= set(trainer):
        # The parser would drop the former without a word.
        raise UserError(
            f"--config {path}: trainer has both callbacks and callbacks+; write all of them under callbacks"
        )
    return content


def _layer(path: Path, content: dict) -> str | None:
    """What a recipe is: a whole stage (it names the model's class and how it runs), or an overlay of its folder's kind.

    A stage without a data module of its own, such as evaluation, is known by its trainer.
    """
    model = content.get("model")
    if isinstance(model, dict) and "class_path" in model and {"data", "trainer"} & set(content):
        return "stage"
    return path.parent.name if path.parent.name in ORDER else None
