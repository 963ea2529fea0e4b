"""Which item of a recipe's list is wrong: the parser of `idc curate` names the list alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser
from omegaconf import OmegaConf

from idc.curate.candidate import Source, Step
from idc.curate.collection import CollectionStep
from idc.errors import UserError, nearest
from idc.explain import explain, finish
from idc.recipes import merged

LISTS: dict[str, type] = {"sources": Source, "steps": Step, "collection": CollectionStep}
_INSIDE = re.compile(rf"--(?P<list>{'|'.join(LISTS)})\.(?P<name>[\w.-]+)")
_COMMON = re.compile(r"\$\{(common\.[\w.]+)\}")
_GIVEN = re.compile(r"--common\.(\w+)")
_ITEM = "item"


def check_no_inner(args: Sequence[str]) -> None:
    """Refuse `--steps.batch 3`: the parser takes it for a setting of the last step, whichever that is.

    Raises:
        UserError: with the settings of `common` that the items of this list take it from, where the recipe has any.
    """
    for arg in args:
        if not (found := _INSIDE.match(arg)):
            continue
        name = found["name"].removeprefix("init_args.")
        taken = [_taken_from(node).get(name) for node in _items(_of_files(args).get(found["list"]))]
        common = [f"--{place} VALUE" for place in dict.fromkeys(filter(None, taken))]
        hint = f"; the recipe has it in common: write {' or '.join(common)}" if common else ""
        raise UserError(
            f"{found[0]}: {found['list']} is a list, whose items have no settings on the command line; "
            f"write the whole list into an overlay (--config FILE)" + hint
        )


def check_common(args: Sequence[str]) -> None:
    """Refuse `--common.NAME` where the recipes have a `common` without that name: nothing would read it.

    Raises:
        UserError: with the nearest name.
    """
    given = [found[1] for arg in args if (found := _GIVEN.match(arg))]
    known = _of_files(args).get("common") if given else None
    if not isinstance(known, Mapping):
        return
    for name in given:
        if name not in known:
            raise UserError(f"--common.{name}: the recipe has no such value{nearest(name, known)}")


def blamed(args: Sequence[str], tree: Mapping[str, Any], command: str) -> str | None:
    """What is wrong with the first item of a list that cannot be made by itself, with its number and class.

    Args:
        args: the command line.
        tree: all settings that it gives (`idc.recipes.merged`).
        command: for `idc.explain.finish`.

    Returns:
        one line, with names as they are written in the item or, where it takes them from there, in `common`; None
        where all of them can be made, so that the fault lies elsewhere.
    """
    for group, base in LISTS.items():
        numbered = not any(arg.startswith(f"--{group}+") for arg in args)  # added to a list that is not in the tree
        for key in (group, f"{group}+"):
            for number, node in enumerate(_items(tree.get(key)), 1):
                if wrong := _fault(base, node, tree.get("common"), command):
                    which = f", number {number}" if numbered and key == group else ""
                    return f"{group}{which} ({str(node.get('class_path')).rpartition('.')[2]}): {wrong}"
    return None


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> Any:
        hints = {action.dest: getattr(action, "_typehint", None) for action in self._actions if action.dest == _ITEM}
        names = [action.dest for action in self._actions if action.dest not in ("help", "print_config")]
        raise UserError(explain(message, names, hints)) from None


def _fault(base: type, node: Mapping[str, Any], common: Any, command: str) -> str:
    """What is wrong with one item, "" where it can be made or where nothing can be said of it by itself."""
    try:
        whole = OmegaConf.create({"common": common or {}, _ITEM: dict(node)})
        tree = {_ITEM: OmegaConf.to_container(whole, resolve=True)[_ITEM]}  # type: ignore[call-overload, index]
        parser = _Parser(add_help=False)
        parser.add_argument(f"--{_ITEM}", type=base)
        parser.instantiate_classes(parser.parse_object(tree))
    except UserError as error:
        taken = _taken_from(node)
        text = finish(str(error), command, tree).removeprefix(f"{_ITEM}: ")
        return re.sub(rf"\b{_ITEM}\.init_args\.(\w+)", lambda found: taken.get(found[1], found[1]), text)
    except Exception:  # such as an interpolation of another place: the whole recipe's parser has said what is wrong
        return ""
    return ""


def _taken_from(node: Mapping[str, Any]) -> dict[str, str]:
    """Settings of an item that it has from `common` -> their place there."""
    settings = node.get("init_args")
    found = {name: _COMMON.fullmatch(str(value)) for name, value in (settings or {}).items()}
    return {name: match[1] for name, match in found.items() if match}


def _items(value: Any) -> list[Mapping[str, Any]]:
    return [node for node in (value if isinstance(value, list) else [value]) if isinstance(node, Mapping)]


def _of_files(args: Sequence[str]) -> dict[str, Any]:
    """What the recipes of a command line give, without its other settings, which would stand in the lists' place."""
    files = [
        part
        for arg, following in zip(args, [*args[1:], ""], strict=True)
        for part in ([arg, following] if arg in ("--config", "-c") else [arg] if arg.startswith("--config=") else [])
    ]
    return merged(files)
