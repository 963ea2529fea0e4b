"""`idc bench train|generate|grpo|data`: arguments, the run, tables and JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from idc.errors import UserError, check_file, make_folder, nearest
from idc.models.speed import Speed

COMMANDS = {
    "train": "a training step and its parts, its modes, and a plain diffusers + PyTorch loop",
    "generate": "a video with 0 to N subjects, and diffusers' WanPipeline",
    "grpo": "an iteration of alignment: all steps against one, the subject cache on and off",
    "data": "batches a second from shards, and plain webdataset",
}
USAGE = "idc bench train|generate|grpo|data [--config RECIPE ...] [--size SIZE] [--json FILE] [--profile DIR]"


def main(argv: Sequence[str]) -> int:
    """Run one benchmark. 0 done, 3 done with failures on record (out of memory among them), 130 interrupted."""
    args = list(argv)
    if not args or args[0] in ("-h", "--help"):
        print("\n".join([f"usage: {USAGE}", "", *(f"  {name:10}{text}" for name, text in COMMANDS.items())]))
        print("\nidc bench COMMAND --help says more. Weights are random; nothing is downloaded.")
        return 0
    if args[0] not in COMMANDS:
        raise UserError(f"bench {args[0]}: no such benchmark{nearest(args[0], COMMANDS)}")
    options, rest = _parser(args[0]).parse_known_args(args[1:])
    if args[0] == "data" and options.config:
        raise UserError(f"--config {options.config[0]}: idc bench data reads toy shards that it writes; leave it out")
    _check(options, rest)
    return _run(args[0], options, rest, args)


_SHARES = (
    "Two shares are told. `of ceiling`: operations without recomputation over the whole time and the matrix ceiling "
    "measured here, the larger of one at the start and one at the end; the aims are in it. `planner's share`: "
    "operations with recomputation over the time of forward and backward and the peak that the device's maker states; "
    "this one goes into idc plan --share."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"bench: {message}; idc bench {self.prog.split()[-1]} --help lists the options")


def _parser(command: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"idc bench {command}",
        description=COMMANDS[command],
        allow_abbrev=False,
        epilog=_SHARES if command == "train" else None,
    )
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="FILE", help="a recipe and overlays: its model and sizes")
    add("--size", help="tiny, toy, 1.3b or 14b; what suits the machine if left out")
    add("--device", default="auto", help="auto, cpu or cuda")
    for name in ("frames", "height", "width"):
        add(f"--{name}", type=int, help="of the video, in pixels" if name != "frames" else "of the video, 4n + 1")
    add("--subjects", type=int, help="references of a video")
    add("--batch", type=int, help="videos of a training step")
    add("--steps", type=int, help="of the sampler (50 at the real sizes)")
    add("--rounds", type=int, help="turns that every case takes")
    add("--repeats", type=int, help="of a case in each turn")
    add("--warm-up", type=int, help="repeats of the first turn that do not count")
    add(
        "--attention",
        action="append",
        default=[],
        metavar="BACKEND",
        help="of ours, in place of the recipe's; further ones are modes of train",
    )
    add("--checkpointing", choices=("none", "attention", "full"), help="of ours")
    add(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="auto: as the recipe has it; without one, on a GPU",
    )
    add("--seed", type=int, default=0)
    add("--json", metavar="FILE", help="everything, also by round")
    add("--profile", metavar="DIR", help="top kernels by time (on a CPU: operators), and a trace of cases there")
    if command == "grpo":
        add("--group", type=int, help="rollouts of a condition")
        add("--rollouts", type=int, help="of an iteration")
    if command == "data":
        add("--clips", type=int, default=128, help="toy clips that are written; not with --config")
        add("--workers", type=int, nargs="*", default=[0, 2])
    return parser


_LEAST = {"frames": 1, "height": 16, "width": 16, "subjects": 0, "batch": 1, "steps": 1, "rounds": 1, "repeats": 1,
          "warm_up": 0, "group": 2, "rollouts": 2, "clips": 16}  # fmt: skip


def _check(options: argparse.Namespace, rest: Sequence[str]) -> None:
    for name, least in _LEAST.items():
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {least} or more")
    for workers in getattr(options, "workers", []):
        if workers < 0:
            raise UserError(f"--workers {workers}: must be 0 or more")
    if options.config and options.size:
        raise UserError(f"--size {options.size}: a recipe has its own sizes; leave out --size or --config")
    for backend in options.attention:
        Speed(attention=backend)  # says what is wrong with the name
    known = [f"--{name.replace('_', '-')}" for name in vars(options)]
    wrong = [arg for arg in rest if arg.startswith("--") and not (options.config and "." in arg)]
    if wrong or (rest and not options.config):
        raise UserError(f"{(wrong or rest)[0]}: no such option{nearest((wrong or rest)[0], known)}")
    if options.json:
        check_file(Path(options.json), "--json")
    if options.profile:
        make_folder(Path(options.profile), "--profile")


def _run(command: str, options: argparse.Namespace, rest: Sequence[str], args: Sequence[str]) -> int:
    from idc.bench.cases import run
    from idc.bench.context import check_attention, quiet
    from idc.bench.device import environment, find_device, known_device, larger_ceiling, matrix_ceiling
    from idc.bench.profiling import STEPS, profile_groups
    from idc.bench.results import Report
    from idc.bench.tables import print_report

    quiet()
    device = find_device(options.device)
    bench = _bench(command, options, rest, device)
    if options.attention:
        check_attention(bench, training=command != "generate")
    report = Report(
        command, bench.setup.plain() if command != "data" else {}, environment(device, args), checks=bench.checks
    )
    module = import_module(f"idc.bench.{command}")
    outcomes: list[Any] = []
    groups = module.groups(bench)  # light; what is wrong with the settings shows here
    try:
        if command != "data":
            _tell("the device's matrix ceiling")
            start = matrix_ceiling(device)
            report.ceiling = {**larger_ceiling(start, None), **known_device(device)}
        run(groups, device, bench.rounds, bench.repeats, bench.warm_up, outcomes, _tell)
        if report.ceiling:
            report.ceiling |= larger_ceiling(start, _ceiling_again(device))
        if options.profile:
            short = module.groups(bench.with_steps(STEPS))
            report.kernels += profile_groups(short, device, Path(options.profile), _tell)
    except KeyboardInterrupt:
        report.interrupted = True
    _conclude(module, bench, report, outcomes)
    print_report(report)
    if options.json:
        Path(options.json).write_text(json.dumps(report.as_json(), indent=1, default=str) + "\n", encoding="utf-8")
    if report.interrupted:
        return 130
    return 3 if any(row.status != "ok" for row in report.rows) else 0


def _ceiling_again(device: Any) -> dict[str, Any] | None:
    """None where it cannot be measured any more: what was measured before it is worth more."""
    from idc.bench.cases import reason
    from idc.bench.device import matrix_ceiling

    _tell("the device's matrix ceiling again")
    try:
        return matrix_ceiling(device)
    except Exception as error:  # a case may have left the device in a state in which nothing runs
        _tell(f"no ceiling at the end: {reason(error)}")
        return None


def _conclude(module: Any, bench: Any, report: Any, outcomes: list[Any]) -> None:
    from idc.bench.results import rows_of

    ceiling = report.ceiling or {}
    report.rows = rows_of(outcomes, ceiling.get("tflops"), ceiling.get("stated_tflops"))
    report.aims = module.aims(report, bench)
    report.at_the_aims = bench.cuda and bench.setup.is_papers


def _tell(line: str) -> None:
    print(f"idc bench: {line}", file=sys.stderr, flush=True)


def _bench(command: str, options: argparse.Namespace, rest: Sequence[str], device: Any) -> Any:
    """All settings together."""
    from dataclasses import replace

    from idc.bench.context import Bench, default_speed
    from idc.bench.setup import compute_dtype, default_size, from_recipes, named

    recipe: Any = None
    if options.config:
        files = [word for file in options.config for word in ("--config", file)]
        setup, recipe = from_recipes([*files, *rest])
    else:
        setup = named(options.size or default_size(device))
    names = ("frames", "height", "width", "subjects", "batch", "seed")
    changes = {name: value for name in names if (value := getattr(options, name)) is not None}
    sampling = setup.sampling if options.steps is None else replace(setup.sampling, steps=options.steps)
    setup = replace(setup, sampling=sampling, **changes).check()
    slow = device.type == "cuda" and command in ("generate", "grpo")  # a repeat is a minute there
    rounds, repeats = (3, 1) if slow else (3, 3)
    return Bench(
        setup=setup,
        device=device,
        dtype=compute_dtype(device),
        speed=default_speed(device, recipe, options),
        rounds=rounds if options.rounds is None else options.rounds,
        repeats=repeats if options.repeats is None else options.repeats,
        warm_up=1 if options.warm_up is None and slow else 2 if options.warm_up is None else options.warm_up,
        recipe=recipe,
        options={
            "attention": tuple(options.attention),
            "steps": options.steps,
            "sized": any(getattr(options, name) is not None for name in ("frames", "height", "width")),
            "compile_modes": device.type == "cuda" or options.compile == "on",
            **{name: getattr(options, name) for name in ("group", "rollouts", "clips", "workers")
               if hasattr(options, name)},
        },
    )  # fmt: skip
