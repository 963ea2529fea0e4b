"""`idc curate`: a recipe of sources and steps -> shards."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ArgumentParser
from omegaconf.errors import OmegaConfBaseException

from idc.errors import UserError, counted, nearest
from idc.explain import explain, finish
from idc.recipes import HELP, RECIPES, check_command_line, merged, no_recipe
from idc.setting_help import class_settings, setting_line

if TYPE_CHECKING:
    from idc.curate.engine import Curation, CurationReport

COMMAND = "curate"
GROUPS = ("sources", "steps", "collection", "executor", "writing")
DEFAULT_EXECUTOR = "idc.curate.local.LocalExecutor"
DRY_RUN = ("--dry-run", "--dry_run")
REASONS = 30  # rows of the table of reasons


def main(args: Sequence[str]) -> int:
    """Run `idc curate` with the arguments after that word. Returns 0.

    Raises:
        UserError: for a recipe that does not parse, and from the run.
    """
    dry = any(arg in DRY_RUN for arg in args)
    args = [arg for arg in args if arg not in DRY_RUN]
    if HELP & set(args) or ("--print_config" not in args and not args):
        return _help([arg for arg in args if arg not in HELP])
    check_command_line(args, COMMAND)
    curation = parse(args)
    if curation is None:
        return 0
    if dry:
        _dry_run(curation)
        return 0
    with _polite_end(curation):
        report = curation.run()
    _print(report, curation)
    return 0


class _Parser(ArgumentParser):
    """Raises one message in the place of a usage and a nest of types."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        hints = {a.dest: getattr(a, "_typehint", None) for a in self._actions if a.dest not in ("help", "print_config")}
        raise UserError(explain(message, hints, hints)) from None


def parse(args: Sequence[str]) -> Curation | None:
    """The curation of a command line, its classes made; None where it only asks for the settings to be printed.

    Raises:
        UserError: for a setting that is wrong, on one line with its full name.
    """
    import idc.curate.ray  # noqa: F401  # so that its executor is among the choices that messages name
    from idc.curate.engine import Curation
    from idc.curate.list_faults import blamed, check_common, check_no_inner
    from idc.curate.recipe_checks import check_recipe

    check_no_inner(args)
    check_common(args)
    parser = _Parser(prog=f"idc {COMMAND}", parser_mode="omegaconf+", allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--common", type=dict[str, Any], default={}, help="values for ${common.NAME} in the recipe")
    parser.add_class_arguments(Curation, None, fail_untyped=True)
    tree = merged(args)
    if "sources" not in tree and "--print_config" not in args:
        raise no_recipe(COMMAND)
    _check_names(tree)
    try:
        # The parser would replace `common` as a whole, and knows no settings of an executor that nobody names.
        common = [f"--common={json.dumps(tree['common'])}"] if isinstance(tree.get("common"), dict) else []
        settings = parser.parse_args([f"--executor={DEFAULT_EXECUTOR}", *args, *common])
        made = parser.instantiate_classes(settings)
    except UserError as error:
        raise UserError(blamed(args, tree, COMMAND) or finish(str(error), COMMAND, tree, _names())) from error
    except OmegaConfBaseException as error:
        raise UserError(f"interpolation: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        if "Does not validate" not in str(error):
            raise
        told = blamed(args, tree, COMMAND) or finish(explain(str(error)), COMMAND, tree, _names())
        raise UserError(told) from None
    except SystemExit as end:
        if end.code:
            raise
        return None  # --print_config
    known = {name: value for name, value in vars(made).items() if name not in ("config", "common")}
    curation = Curation(**known)
    check_recipe(curation.sources, curation.steps, curation.collection)
    return curation


def _names() -> list[str]:
    from idc.curate.engine import Curation

    return [setting.name for setting in class_settings(Curation)]


def _check_names(tree: Mapping[str, Any]) -> None:
    """Refuse what belongs to a recipe of another command, which the parser answers by its innermost setting."""
    known = [name for name in _names() if "." not in name] + ["common", "config", "print_config"]
    for name in tree:
        if name.rstrip("+") not in known:
            raise UserError(f"there is no setting {name!r}{nearest(name, known)}")


@contextmanager
def _polite_end(curation: Curation) -> Iterator[None]:
    """Ctrl-C, or a supervisor's SIGTERM, ends with a word on how to go on."""
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    else:
        before = None
    try:
        yield
    except KeyboardInterrupt:
        print(f"idc {COMMAND}: what is done stays in {curation.folder}; the same command goes on", file=sys.stderr)
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _dry_run(curation: Curation) -> None:
    plan = curation.plan()
    print("sources:")
    for source in curation.sources:
        licence = f", {source.licence}" if source.licence else ""
        print(f"  {source.name:20} {type(source).__name__}{licence}: {counted(plan.by_source[source.name], 'unit')}")
    print("steps:")
    for number, step in enumerate(curation.steps, 1):
        how = f"heavy, batches of {step.batch}" if step.heavy else "light"
        print(f"  {number:2}  {step.name:20} {type(step).__name__} ({how})")
    for collection in curation.collection:
        print(f"   *  {collection.name:20} {type(collection).__name__} (over the collection)")
    print(f"executor: {type(curation.executor).__name__}({_shown(curation.executor)})")
    done = len(plan.parts) - len(plan.todo)
    print(
        f"{counted(plan.units, 'unit')} in {counted(len(plan.parts), 'chunk')} -> {curation.out}; "
        f"{counted(done, 'chunk')} done, {counted(plan.left, 'unit')} left"
    )


def _shown(thing: Any) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in vars(thing).items() if not name.startswith("_"))


def _print(report: CurationReport, curation: Curation) -> None:
    from rich.console import Console

    from idc.curate.showing import limit_of, reason_table, step_table

    console = Console(soft_wrap=True)
    console.print(step_table(report))
    if report.dropped:
        console.print(reason_table(report, REASONS))
    if limit := limit_of(report):
        print(limit)
    for step in curation.steps:
        if said := step.remark():
            print(f"{step.name}: {said}")
    if report.crossed:
        print(f"{counted(report.crossed, 'reference')} not taken from the other side of training and held-out videos")
    if faults := sum(count.failed for count in report.counts):
        print(f"{counted(faults, 'drop')} by faults, see drops.jsonl; --retry_failed true does their chunks again")
    assert report.written is not None
    parts = ", ".join(f"{number} {part.replace('_', ' ')}" for part, number in report.written.samples.items())
    before = f" ({report.done_before} of them before)" if report.done_before else ""
    print(f"{counted(report.units, 'unit')}{before}")
    print(f"{report.read} read = {report.kept} kept + {report.dropped} dropped")
    print(f"{counted(report.kept, 'sample')} ({parts}) in {curation.out}")
    if not report.kept:
        raise UserError(f"no sample came of it; each drop is in {curation.out}/drops.jsonl")


def _help(args: Sequence[str]) -> int:
    """The settings, and with `--config` those of the recipe's own sources and steps."""
    from idc.curate.engine import Curation

    recipe = RECIPES[COMMAND]
    print(f"usage: idc {COMMAND} --config RECIPE [--config OVERLAY ...] [--dry-run] [--KEY VALUE ...]\n")
    print(
        "From raw videos and data sets to shards. Stopped in whatever way, the same command goes on.\n\n"
        f"examples:\n  idc {COMMAND} --config {recipe}\n  idc {COMMAND} --config {recipe} --dry-run\n"
        f"  idc {COMMAND} --config {recipe} --config recipes/hardware/ray.yaml --out s3://bucket/collection\n"
    )
    print("\n".join(map(setting_line, class_settings(Curation))))
    print("  --common  dict\n        values for ${common.NAME} in the recipe\n")
    tree = merged(args)
    for group in GROUPS:
        for node in _nodes(tree.get(group)):
            print(f"{group}: {node['class_path']}")
            print("\n".join(map(setting_line, _settings_of(node["class_path"]))) + "\n")
    if not args:
        print(f"What the recipe's sources and steps take: idc {COMMAND} --config {recipe} --help")
    print("A setting's value is YAML; --config takes a file of them, of which the last wins.")
    return 0


def _nodes(value: Any) -> Iterator[Mapping[str, Any]]:
    for node in value if isinstance(value, list) else [value]:
        if isinstance(node, Mapping) and "class_path" in node:
            yield node


def _settings_of(path: str) -> Iterator[Any]:
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return
    yield from class_settings(cls)
