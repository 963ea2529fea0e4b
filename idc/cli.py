"""`python -m idc`: fit, validate, test and predict through Lightning's command line, and the kit's own commands.

What a user can get wrong in a command or a recipe is checked before anything heavy is imported, and answered with
one message: the value, the rule, the nearest valid choice.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Sequence
from typing import NoReturn

from idc.errors import UserError, nearest

LIGHTNING = ("fit", "validate", "test", "predict")
ALIASES = {"evaluate": "test", "generate": "predict", "edit": "predict"}
COMMANDS = {
    "fit": "train a stage: idc fit --config recipes/sft.yaml [--config OVERLAY ...] [--KEY VALUE ...]",
    "validate": "the held-out loss of a checkpoint: idc validate --config ... --ckpt_path last",
    "test": "as validate, on the test data",
    "predict": "previews from a checkpoint, without training",
    "generate": "videos from prompts and reference pictures: idc generate --config recipes/generate.yaml",
    "edit": "edits of videos, without training: idc edit --config recipes/edit.yaml",
    "plan": "what a training run would take: memory, operations, hours: idc plan --config ... [--device h100]",
    "report": "the paper's tables and a page of videos from results: idc report RUN... [--out DIR]",
    "evaluate": "score videos: idc evaluate --config recipes/evaluate.yaml --model.init_args.videos DIR",
    "export": "a trained run as one folder to load and share: idc export RUN --out DIR",
    "curate": "from raw videos and data sets to shards: idc curate --config recipes/curate.yaml",
    "shards": "build, index, lint, count or look at WebDataset shards: idc shards --help",
    "pairs": "preference pairs for DPO, from generated videos or real clips: idc pairs --help",
    "rewards": "serve a reward to runs on other machines: idc rewards serve --help",
    "bench": "time of training, generation, alignment or data here, against peers: idc bench --help",
    "study": "ask people which videos are better, blind and in pairs: idc study --help",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 done, 1 `idc shards` found faults or `idc plan --strict` too little
    memory, 2 for what the user can mend, 3 done with failures on record, such as what `idc study build` left out."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except UserError as error:
        print(f"idc: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if "huggingface" not in str(error).lower():
            raise
        print(
            f"idc: error: the model hub gave nothing: {str(error).splitlines()[0]} Give a local folder.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("idc: interrupted", file=sys.stderr)
        return 130


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        import idc

        print(f"idc {idc.__version__}")
        return 0
    command, rest = ALIASES.get(args[0], args[0]), args[1:]
    if command in LIGHTNING:
        from idc.recipes import HELP, check_command_line, check_recipe_given, check_stage

        check_recipe_given(rest, args[0])
        check_command_line(rest)
        if HELP & set(rest):
            from idc.stage_help import show

            return show(command, rest, args[0])
        check_stage(rest, args[0])
        from idc.lightning_cli import run

        return run(command, rest, args[0])
    if command == "plan":
        from idc.plan.command import main as plan

        return plan(rest)
    if command == "curate":
        from idc.curate.command import main as curate

        return curate(rest)
    if command == "shards":
        from idc.curate.cli import main as shards

        return shards(rest)
    if command == "report":
        from idc.report.cli import main as report

        return report(rest)
    if command == "export":
        from idc.export import main as export

        return export(rest)
    if command == "pairs":
        from idc.stages.pairs_cli import main as pairs

        return pairs(rest)
    if command == "rewards":
        from idc.rewards.cli import main as rewards

        return rewards(rest)
    if command == "bench":
        from idc.bench.cli import main as bench

        return bench(rest)
    if command == "study":
        from idc.study.cli import main as study

        return study(rest)
    raise UserError(f"{command!r}: no such command{nearest(command, COMMANDS)}")


def _usage() -> str:
    lines = ["usage: idc COMMAND [...]", "", "commands:"]
    lines += [f"  {name:10}{text}" for name, text in COMMANDS.items()]
    lines += ["", "idc COMMAND --help says more. README.md has a first run that takes minutes."]
    return "\n".join(lines)


def cli() -> NoReturn:
    """Entry point of the console script. Status 141, as a shell has it of SIGPIPE, where nobody reads on (`| head`)."""
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()  # here, where a pipe that is closed can be told
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        # The interpreter flushes again at its end, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    raise SystemExit(status)


def _nobody_reads() -> bool:
    """Whether standard output is the pipe that broke, and not one between processes of a run."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
