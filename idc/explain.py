"""Turn jsonargparse's nested messages into one line: the setting, the value, the rule, the nearest valid choice.

A wrong setting deep in a recipe is reported by one parser inside another, each wrapping the message of the inner one
in "does not validate against any of the union subtypes". The inner parser knows its own settings and types, so it
explains first; the outer ones only add where it happened. What the whole command line says is known last: `finish`.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from idc.errors import nearest
from idc.recipes import as_typed, flatten

_AT = "\x1f"  # between the place and the explanation, until the outermost parser is done
_UNKNOWN_AT = "\x02"  # before an unknown setting and before each of the names that its parser knows
_BOILERPLATE = re.compile(
    r"Parser key|Does not validate|Subtypes:|Errors:$|Given value|Problem with given class|Expected a path but"
)
_UNKNOWN = (
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
    re.compile(r"unrecognized arguments: --(?P<key>[\w.-]+)"),
    re.compile(r"does not accept option '(?P<key>[^']+)'"),
)
_GOT = r"(?:\. Got value: (?P<value>.*))?$"
_LITERAL = re.compile(r"Expected a typing\.Literal\[(?P<choices>.*?)\]" + _GOT)
_TYPE = re.compile(r"Expected an? <class '(?P<type>[\w.]+)'>" + _GOT)
_NO_PATH = re.compile(r"Expected a dot import path string: (?P<value>.*)")
_CLASS_PATH = re.compile(r"Problem with given class_path '(?P<value>[^']+)'")
_NO_SUBCLASS = re.compile(r"Import path (?P<value>[\w.]+) does not correspond to a subclass")
_NO_CLASS = re.compile(r"has no attribute|No module named|not correspond to a subclass|[Uu]nable to import")
_NESTED = re.compile(r"NestedArg\(key='(?P<key>[^']+)'")
_WORDS = {
    "bool": "true or false",
    "collections.abc.Sequence": "a list",
    "dict": "a mapping",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "NoneType": "null",
    "str": "text",
}
_MANY = 12  # more choices than these are not listed

# What users of other trainers and samplers write, by its last part -> where it is here, for each of the subcommands.
_SCALE, _STEPS = "model.init_args.sampling.scale", "model.init_args.sampling.steps"
_LR, _SEEDS = "model.init_args.optimizer.init_args.lr", ("seed_everything", "data.init_args.seed")
_TRAINS: dict[str, tuple[str, ...]] = {
    "lr": (_LR,),
    "learning_rate": (_LR,),
    "batch": ("data.init_args.batch_size",),
    "train_batch_size": ("data.init_args.batch_size",),
    "epochs": ("trainer.max_steps",),
    "num_epochs": ("trainer.max_steps",),
    "steps": ("trainer.max_steps",),
    "seed": _SEEDS,
    "guidance": (_SCALE,),
    "guidance_scale": (_SCALE,),
    "cfg": (_SCALE,),
}
_MAKES: dict[str, tuple[str, ...]] = {
    "guidance": (_SCALE,),
    "guidance_scale": (_SCALE,),
    "cfg": (_SCALE,),
    "cfg_scale": (_SCALE,),
    "num_inference_steps": (_STEPS,),
    "seed": ("data.init_args.seed", "seed_everything"),
    "prompt": ("data.init_args.items",),
    "ckpt": ("model.init_args.checkpoint",),
}
SYNONYMS: dict[str, dict[str, tuple[str, ...]]] = {
    "fit": _TRAINS,
    "validate": _TRAINS,
    "predict": _MAKES,
    "test": {"seed": ("seed_everything",)},
}


def explain(message: str, settings: Iterable[str] = (), hints: Mapping[str, Any] | None = None) -> str:
    """One line for `message`; `settings` are the names that the reporting parser knows, `hints` their types.

    The result still carries the place apart, for an outer parser; `finish` joins the two.
    """
    place = re.findall(r'Parser key "([^"]+)":', message)[:1]
    lines = [line for line in (line.strip(" \t\n\r").removeprefix("- ") for line in message.split("\n")) if line]
    if inner := next((line for line in lines if _AT in line), None):
        deeper, cause = inner.split(_AT, 1)
        return ".".join(place + ([deeper] if deeper else [])) + _AT + cause
    given = " ".join(message.rpartition("Given value: ")[2].split()) if "Given value: " in message else None
    hint = (hints or {}).get(place[0]) if place else None
    return ".".join(place) + _AT + _reword(lines, given, list(settings), hint)


def finish(
    explained: str, command: str = "fit", tree: Mapping[str, Any] | None = None, settings: Sequence[str] = ()
) -> str:
    """The place and the explanation as one line, with names as they can be typed.

    Args:
        explained: what `explain` made.
        command: Lightning's subcommand.
        tree: all settings that the user gave, as `idc.recipes.merged` has them.
        settings: full names of the settings of the recipe's own classes, also of groups inside them.
    """
    place, _, cause = explained.rpartition(_AT)
    tree = tree or {}
    if not cause.startswith(_UNKNOWN_AT):
        return f"{as_typed(place, tree)}: {cause}" if place else cause
    _, key, *names = cause.split(_UNKNOWN_AT)
    full = as_typed(f"{place}.{key}" if place else key, tree)
    parent = as_typed(place, tree, inside=True) + "." if place else ""
    given = [name for name in flatten(tree) if _may_exist(name, full, settings)]
    hint = _nearest_setting(full, [parent + name for name in names], [*settings, *given], command)
    return f"there is no setting {full!r}{hint}"


def _may_exist(name: str, unknown: str, settings: Sequence[str]) -> bool:
    """Whether a setting that was given can be one: not a part of the unknown one, nor of a group that the recipe's own
    classes lack, such as a second mistake beside the first."""
    if name == unknown or name.startswith(unknown + "."):
        return False
    if not settings or not name.startswith(("model.init_args.", "data.init_args.")):
        return True
    group = ".".join(name.split(".")[:3])
    return any(known == group or known.startswith(group + ".") for known in settings)


def _reword(lines: list[str], given: str | None, settings: list[str], hint: Any) -> str:
    for line in lines:
        for pattern in _UNKNOWN:
            if found := pattern.search(line):
                return _UNKNOWN_AT + _UNKNOWN_AT.join([found["key"], *settings])
    named = next((found for line in lines if (found := _CLASS_PATH.search(line) or _NO_SUBCLASS.search(line))), None)
    if named and any(map(_NO_CLASS.search, lines)):
        return _no_class(named["value"], hint)
    leaves = (_LITERAL, _TYPE, _NO_PATH, _BOILERPLATE)
    if others := [line for line in lines if not any(pattern.match(line) for pattern in leaves)]:
        return others[0]
    rules = [found for line in lines if (found := _LITERAL.match(line) or _TYPE.match(line))]
    path = next(filter(None, map(_NO_PATH.match, lines)), None)
    if path and ("class_path" in (given or "") or all(rule.groupdict().get("type") == "NoneType" for rule in rules)):
        return _no_class(path["value"], hint)
    value = next((rule["value"] for rule in rules if rule["value"] is not None), given)
    return _broken_rules(rules, value) if rules and value is not None else lines[0]


def _broken_rules(rules: list[re.Match[str]], value: str) -> str:
    """That `value` is none of a union's types."""
    if nested := _NESTED.match(value):
        return f"there is no setting {nested['key']!r} inside; this is one value, not a group of settings"
    value = value if len(value) <= 200 else value[:200] + "..."
    choices = [choice for rule in rules for choice in re.findall(r"'([^']*)'", rule.groupdict().get("choices") or "")]
    types = list(dict.fromkeys(rule["type"] for rule in rules if "type" in rule.groupdict()))
    words = [_WORDS.get(name) or f"of type {name}" for name in sorted(types, key=lambda name: name == "NoneType")]
    if not choices:
        return f"{value!r} is not {' or '.join(words)}"
    close = nearest(value, choices)
    rule = " or ".join([", ".join(map(repr, choices)), *words])
    return f"{value!r} is not one of {rule}{close if 'did you mean' in close else ''}"


def _no_class(value: str, hint: Any) -> str:
    """That there is no class `value`, and the nearest of those that the setting takes, by the class's own name."""
    known = {path.rpartition(".")[2]: path for path in known_classes(hint)}
    close = difflib.get_close_matches(value.rpartition(".")[2], list(known), n=1, cutoff=0.5)
    if close:
        return f"there is no class {value!r}; did you mean {known[close[0]]!r}?"
    own = [path for path in known.values() if path.startswith("idc.")]
    return f"there is no class {value!r} that fits here" + (nearest(value, own) if len(own) <= _MANY else "")


def known_classes(hint: Any) -> list[str]:
    """Import paths of the public classes that have been imported and that a type hint accepts, also inside unions."""
    found: dict[str, None] = {}
    stack = [hint]
    while stack:
        item = stack.pop()
        if inner := get_args(item):
            stack += inner
        elif isinstance(item, type) and item.__module__ != "builtins" and item is not type(None):
            stack += type.__subclasses__(item)
            if not item.__qualname__.startswith("_") and not getattr(item, "__abstractmethods__", None):
                found[_import_path(item)] = None
    return sorted(found)


def _import_path(found: type) -> str:
    """As one writes it: a library's class (torch.optim.AdamW) by the shortest module that has it."""
    parts = found.__module__.split(".")
    if parts[0] != "idc":
        for end in range(1, len(parts)):
            module = ".".join(parts[:end])
            if getattr(sys.modules.get(module), found.__name__, None) is found:
                return f"{module}.{found.__name__}"
    return f"{found.__module__}.{found.__qualname__}"


def _nearest_setting(full: str, siblings: list[str], anywhere: list[str], command: str) -> str:
    """By what others call it; by spelling in its group; by its last part in any group; or the group's settings."""
    last = full.rpartition(".")[2].replace("-", "_")
    if known := SYNONYMS.get(command, {}).get(last):
        return "; did you mean " + " or ".join(map(repr, known)) + "?"
    group = full.rpartition(".")[0]
    near = {name.rpartition(".")[2]: name for name in siblings if name.rpartition(".")[0] == group}
    if close := difflib.get_close_matches(last, list(near), n=1, cutoff=0.6):
        return f"; did you mean {near[close[0]]!r}?"
    everywhere = list(dict.fromkeys([*siblings, *anywhere]))
    if same := [name for name in everywhere if name.rpartition(".")[2] == last and name != full]:
        return "; did you mean " + " or ".join(map(repr, same[:3])) + "?"
    by_last = {name.rpartition(".")[2]: name for name in reversed(everywhere) if name != full}
    if part := difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.75):
        return f"; did you mean {by_last[part[0]]!r}?"
    others = [name for name in everywhere if name != full and not near]  # of a known group, its settings say more
    if whole := difflib.get_close_matches(full, others, n=1, cutoff=0.8):
        return f"; did you mean {whole[0]!r}?"
    names = near or dict.fromkeys(name.partition(".")[0] for name in siblings)
    return "; choose from " + ", ".join(map(repr, sorted(names))) if names else ""
