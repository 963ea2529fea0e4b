"""Checks on recipes that need nothing heavy: do the files exist, parse, and come in an order that makes sense."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from idc.errors import UserError, nearest

# An overlay may only change what an earlier file has set. A later layer that is written before an earlier one
# would be silently undone by it.
ORDER = ("stage", "scale", "protocols", "data", "alignment", "rewards", "hardware", "ablations")

HELP = {"-h", "--help", "--help.trainer"}

# The recipe to start from, by command.
RECIPES = {
    "fit": "recipes/sft.yaml",
    "validate": "recipes/sft.yaml",
    "plan": "recipes/sft.yaml",
    "predict": "recipes/generate.yaml",
    "generate": "recipes/generate.yaml",
    "edit": "recipes/edit.yaml",
    "test": "recipes/evaluate.yaml",
    "evaluate": "recipes/evaluate.yaml",
    "curate": "recipes/curate.yaml",
}

# The commands that run a stage, the one to name first; every other class of idc.stages is trained.
_STAGES = {
    "idc.stages.generate.Generate": ("generate", "predict"),
    "idc.stages.generate.Edit": ("edit", "predict"),
    "idc.stages.evaluate.Evaluate": ("evaluate", "test"),
}
_TRAINED = ("fit", "validate", "test", "predict", "plan")
# The only recipe that a folder's overlays lie over, where there is but one, and its stage.
_OVER = dict.fromkeys(("alignment", "rewards"), ("recipes/grpo.yaml", "idc.stages.grpo.GRPO"))
# The command whose stages an overlay changes, by its folder; those of other folders may go with any.
_OVERLAYS = {"protocols": "evaluate", **dict.fromkeys(("scale", "data", "alignment", "rewards", "ablations"), "fit")}

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


def check_command_line(args: Sequence[str], command: str = "fit") -> None:
    """Check the names of settings and every `--config` of a command line; `command` is the word that was typed.

    Raises:
        UserError: for a list's item as a setting, a setting of a class without a value, a missing file, broken YAML, or
            overlays before what they change.
    """
    _check_no_items(args)
    for arg, following in zip(args, [*args[1:], "--"], strict=True):
        if re.fullmatch(r"--(model|data)\.[\w.]+\+?", arg) and following.startswith("--") and not arg.endswith(".help"):
            raise UserError(f"{arg}: needs a value behind it, as in {arg} VALUE; null is one")
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
            f"write --config {RECIPES[command]} --config {paths[0]}"
        )


def check_recipe_given(args: Sequence[str], command: str) -> None:
    """Raises UserError for a command line that names no stage; `command` is the word that was typed."""
    asks = any(arg in HELP or arg.endswith(".help") or arg.startswith("--model") for arg in args)
    if not asks and not _config_paths(args):
        raise no_recipe(command)


def check_stage(args: Sequence[str], command: str) -> None:
    """Check that the `command`, as it was typed, runs the stage that a command line names, and its overlays with it.

    A class of somebody else's may do anything and is not checked.

    Raises:
        UserError: where it does not, with the command that does.
    """
    stage = _stage_of(merged(args))
    full = next((path for path in _STAGES if stage in (path, path.rpartition(".")[2])), stage)
    if not full.startswith("idc.stages."):
        return
    runs = _STAGES.get(full, _TRAINED)
    contents = {path: _load(path) for path in _config_paths(args)}
    if command not in runs:
        files = [path for path, content in contents.items() if _stage_of(content) == stage]
        what = f"{files[-1]} is a recipe" if files else f"model.class_path={stage} is a stage"
        line = " ".join(f"--config {path}" for path in contents) or f"--config {RECIPES[runs[0]]}"
        raise UserError(
            f"{what} of idc {runs[0]}, not of idc {command}; write idc {runs[0]} {line}, "
            f"or idc {command} --config {RECIPES[command]}"
        )
    for path, content in contents.items():
        owner = _OVERLAYS.get(_layer(path, content) or "", runs[0])
        if owner != runs[0]:
            hint = "; a trained run brings its own settings, by model.init_args.checkpoint" if owner == "fit" else ""
            raise UserError(
                f"--config {path}: overlays in {path.parent.name}/ change stages of idc {owner}, not of idc {command}"
                + hint
            )
        recipe, wanted = _OVER.get(_layer(path, content) or "", ("", full))
        if wanted not in (full, full.rpartition(".")[2]):
            base = next((str(p) for p, c in contents.items() if _layer(p, c) == "stage"), stage)
            raise UserError(
                f"--config {path}: files of recipes/{path.parent.name}/ lie over {recipe} and not over {base}; "
                f"write idc {command} --config {recipe} --config {path}"
            )


def _stage_of(content: Mapping[str, Any]) -> str:
    """The class of the model in a tree of settings, "" where there is none."""
    model = content.get("model")
    return str((model.get("class_path") if isinstance(model, Mapping) else model) or "")


def no_recipe(command: str) -> UserError:
    """What to answer to a command line that names no stage."""
    return UserError(f"idc {command}: no recipe was given; write idc {command} --config {RECIPES[command]}")


def merged(args: Sequence[str]) -> dict[str, Any]:
    """All settings that a command line gives, its recipes' among them, as one tree; later ones win."""
    tree: dict[str, Any] = {}
    for path in _config_paths(args):
        _merge(tree, _load(path))
    for i, arg in enumerate(args):
        if not arg.startswith("--") or arg.split("=")[0] == "--config":
            continue
        key, assigned, value = arg[2:].partition("=")
        if not assigned:
            value = args[i + 1] if i + 1 < len(args) else ""
        try:
            content = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # the latter for what looks like a date and is none
            content = value
        for name in reversed(key.removesuffix("+").split(".")):
            content = {name: content}
        _merge(tree, content)
    return tree


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict) and not _another_class(tree[key], value):
            _merge(tree[key], value)
        elif isinstance(value, str) and isinstance(tree.get(key), dict) and "class_path" in tree[key]:
            tree[key]["class_path"] = value  # --model.init_args.optimizer NAME
        else:
            tree[key] = value


def _another_class(node: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether `other` names a class, and not that of `node`, whose settings it may not take."""
    return "class_path" in node and other.get("class_path", node["class_path"]) != node["class_path"]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the tree's settings, as they are typed: `model.init_args.sampling.scale`."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def as_typed(place: str, tree: Mapping[str, Any], inside: bool = False) -> str:
    """`place` with the `init_args` that a parser leaves out of its messages, so that it can be typed back.

    Args:
        place: names joined by dots, as the parser reports them.
        tree: what was given (`merged`): there is a class wherever it has `class_path` or `init_args`.
        inside: name the place of the settings inside `place`: `model` -> `model.init_args`.
    """
    names: list[str] = []
    node: Any = tree
    for name in place.split("."):
        node = _enter_class(node, names, name)
        names.append(name)
        node = node.get(name) if isinstance(node, Mapping) else None
    if inside:
        _enter_class(node, names, "")
    return ".".join(names)


def _enter_class(node: Any, names: list[str], name: str) -> Any:
    if isinstance(node, Mapping) and name not in node and {"class_path", "init_args"} & set(node):
        names.append("init_args")
        return node.get("init_args")
    return node


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
