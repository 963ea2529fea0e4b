"""`idc pairs mine | corrupt`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from idc.errors import UserError

if TYPE_CHECKING:
    from idc.data.corruptions import Corruption
    from idc.stages.mining_scores import FromReward, FromRuns

CORRUPTIONS = ("shuffled_frames", "turned_colours", "swapped_subjects", "regenerated")
MINE = """\
DIR is a run of idc evaluate (with --metric), or a folder of videos with its items.jsonl, as idc generate makes it (with
--reward). Several of the same items, such as one a seed, give several candidates for each condition:

  for seed in 0 1 2 3; do
    idc generate --config recipes/generate.yaml --data.init_args.seed $seed --model.init_args.out videos/seed-$seed
  done
  idc pairs mine videos/seed-* --reward reward.yaml --out data_shards/pairs

--reward's FILE is as `idc rewards serve` takes it. What makes no pair is listed in DIR/drops.jsonl with its reason."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `idc pairs` with the arguments after that word.

    Returns:
        the exit status: 0, or 2 for bad input (on stderr, no traceback).
    """
    parser = argparse.ArgumentParser(prog="idc pairs", description="Preference pairs, as shards that DPO reads.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="mine|corrupt")
    _add_mine(
        commands.add_parser(
            "mine",
            help="best against worst of several videos of each condition",
            epilog=MINE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_corrupt(commands.add_parser("corrupt", help="real clips against worse copies of themselves"))
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"idc pairs {arguments.command}: {error}", file=sys.stderr)
        return 2


def _add_mine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", type=Path, nargs="+", metavar="DIR", help="runs of idc evaluate, or folders of videos")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the preference shards")
    add(
        "--metric",
        action="append",
        default=[],
        metavar="NAME[=WEIGHT]",
        help="of the runs; several are summed with their weights, below 0 for what should fall (default weight: 1)",
    )
    add("--reward", type=Path, metavar="FILE", help="YAML with a reward, computed here")
    add("--margin", type=float, default=0.05, help="least difference of the two scores (default: 0.05)")
    add("--where", default="process", help="process, threads or pool: where the reward is computed (default: process)")
    add("--workers", type=int, default=1, help="threads or processes of the reward (default: 1)")
    add("--device", default="auto", help="of the reward; auto: cuda if there is one (default)")
    parser.set_defaults(run=_mine)


def _add_corrupt(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shards", metavar="SHARDS", help="folder of indexed shards with the real clips, or an fsspec URL")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the preference shards")
    add("--by", required=True, choices=CORRUPTIONS, help="what is done to the copies; swapped_subjects: toy clips only")
    add("--checkpoint", help="regenerated: the model, as idc generate takes it")
    add("--strength", type=float, default=0.7, help="regenerated: noise level in (0, 1] (default: 0.7)")
    add("--limit", type=int, help="at most this many clips")
    add("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    add("--crf", type=float, default=18, help="x264's quality of the copies, 0 to 51 (default: 18)")
    add("--pixel-format", default="yuv420p", help="of the copies; yuv444p for tiny clips (default: yuv420p)")
    parser.set_defaults(run=_corrupt)


def _mine(arguments: argparse.Namespace) -> int:
    if (arguments.reward is None) == (not arguments.metric):
        given = "neither --metric nor" if arguments.reward is None else "both --metric and"
        raise UserError(f"{given} --reward is given; one of the two tells the better clip")

    from idc.stages.mining import check_free, mine
    from idc.stages.pairs import summary

    check_free(arguments.out)
    scorer: FromRuns | FromReward
    if arguments.metric:
        scorer = _from_runs(arguments)
        folders = scorer.folders
    else:
        scorer = _from_reward(arguments)
        folders = [_videos(folder) for folder in arguments.folders]
    print(summary(mine(folders, scorer, arguments.out, arguments.margin), arguments.out))
    return 0


def _from_runs(arguments: argparse.Namespace) -> FromRuns:
    from idc.metrics.results import RUN_FILE
    from idc.stages.mining_scores import FromRuns

    for folder in arguments.folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give runs of idc evaluate")
        if not (folder / RUN_FILE).is_file():
            raise UserError(f"{folder}: no {RUN_FILE} here; --metric takes runs of idc evaluate, --reward also videos")
    return FromRuns(arguments.folders, dict(_weighted(text) for text in arguments.metric))


def _from_reward(arguments: argparse.Namespace) -> FromReward:
    from idc.rewards.cli import check_device, read_reward
    from idc.stages.mining_scores import SCORES, FromReward

    device = check_device(arguments.device)
    keep = arguments.out / SCORES
    return FromReward(read_reward(arguments.reward), keep, arguments.where, arguments.workers, device)


def _weighted(text: str) -> tuple[str, float]:
    name, equals, weight = text.partition("=")
    try:
        return name, float(weight) if equals else 1.0
    except ValueError:
        raise UserError(f"--metric {text}: {weight!r} is no number; NAME or NAME=WEIGHT") from None


def _videos(folder: Path) -> Path:
    """The videos of a run, or the folder itself."""
    from idc.metrics.results import RUN_FILE, read_info

    return Path(read_info(folder).videos) if (folder / RUN_FILE).is_file() else folder


def _corrupt(arguments: argparse.Namespace) -> int:
    from idc.data.sources import ShardSource
    from idc.stages.generate import Encoding
    from idc.stages.pairs import CorruptedPairs, summary

    made = CorruptedPairs(
        str(arguments.out),
        ShardSource(arguments.shards),
        _corruption(arguments),
        arguments.limit,
        arguments.seed,
        Encoding(arguments.crf, arguments.pixel_format),
    )
    print(summary(made.make(), arguments.out))
    return 0


def _corruption(arguments: argparse.Namespace) -> Corruption:
    from idc.data import corruptions
    from idc.stages.pairs import Regenerate

    if arguments.by != Regenerate.name:
        if arguments.checkpoint is not None:
            raise UserError(f"--checkpoint {arguments.checkpoint}: --by {arguments.by} takes none")
        classes = (corruptions.ShuffledFrames, corruptions.TurnedColours, corruptions.SwappedSubjects)
        return next(made() for made in classes if made.name == arguments.by)
    if arguments.checkpoint is None:
        raise UserError("--by regenerated: needs --checkpoint, a run of idc fit or a pipeline's folder")
    return Regenerate(arguments.checkpoint, arguments.strength)
