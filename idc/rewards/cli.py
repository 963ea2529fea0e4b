"""`idc rewards serve`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from idc.errors import UserError, counted, nearest

if TYPE_CHECKING:
    from idc.rewards.base import Reward

LOOPBACK = ("127.0.0.1", "::1", "localhost")
EPILOG = """\
FILE is YAML with the reward that is served, a single one or a whole composite:

  reward:
    class_path: idc.rewards.FaceReward
    init_args: {min_weight: 0.5}

and a run takes it as

  class_path: idc.rewards.HttpReward
  init_args: {url: "http://THIS-MACHINE:8900", name: face}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `idc rewards` with the arguments after that word.

    Returns:
        the exit status: 0, or 2 for bad input (on stderr, no traceback).
    """
    parser = argparse.ArgumentParser(prog="idc rewards", description="Rewards on a machine of their own.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="serve")
    serve = commands.add_parser(
        "serve",
        help="serve a reward over HTTP until Ctrl-C",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = serve.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="YAML with the reward")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines (default: 127.0.0.1)")
    add("--port", type=int, default=8900, help="0 picks a free one (default: 8900)")
    add("--device", default="auto", help="where networks run; auto: cuda if there is one (default)")
    add("--max-mb", type=float, default=512.0, help="the largest clip in megabytes of pixels (default: 512)")
    add("--concurrency", type=int, default=8, help="clips in memory at once (default: 8)")
    add(
        "--token-env",
        default="IDC_REWARD_TOKEN",
        metavar="NAME",
        help="environment variable with a token that clients must send too; unset asks for none",
    )
    serve.set_defaults(run=_serve)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"idc rewards {arguments.command}: {error}", file=sys.stderr)
        return 2


def read_reward(path: Path) -> Reward:
    """The reward that a YAML file describes under "reward".

    Raises:
        UserError: for a file that cannot be read, or a setting that there is not.
    """
    import yaml
    from jsonargparse import ArgumentParser

    from idc import rewards
    from idc.explain import explain, finish

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UserError(explain(message, *_hints(self))) from None

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {_why(path, error)}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or set(tree) != {"reward"}:
        found = ", ".join(map(repr, tree)) if isinstance(tree, dict) and tree else "nothing such"
        raise UserError(f"--config {path}: must hold one key, 'reward', with a class_path; it has {found}")
    for name in rewards.__all__:  # so that a misspelt class has neighbours
        getattr(rewards, name)
    parser = Parser(exit_on_error=False)
    parser.add_argument("--reward", type=rewards.Reward, required=True)
    try:
        return parser.instantiate(parser.parse_object(tree)).reward
    except UserError as error:
        raise UserError(f"--config {path}: {finish(str(error), tree=tree)}") from None


def _why(path: Path, error: OSError) -> str:
    """Why a file cannot be read, in words."""
    if isinstance(error, FileNotFoundError):
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"no such file{nearest(path.name, [name for name in names if name.endswith(('.yaml', '.yml'))])}"
    return "is a folder; give a file" if isinstance(error, IsADirectoryError) else f"cannot be read ({error.strerror})"


def check_device(name: str) -> str:
    """The device that `--device` names; "auto" is the GPU where there is one.

    Raises:
        UserError: for none of torch's, or one that this machine lacks.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = f"{torch.cuda.device_count()} of CUDA" if torch.cuda.is_available() else "no CUDA"
        why = " ".join(str(error).split(". ")[0].split())[:120]
        raise UserError(f"--device {name}: not on this machine, which has the CPU and {found} ({why})") from None
    return name


def _hints(parser: Any) -> tuple[list[str], dict[str, Any]]:
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions if action.dest != "help"}
    return list(hints), hints


def _serve(arguments: argparse.Namespace) -> int:
    reward = read_reward(arguments.config)

    device = check_device(arguments.device)

    from idc.rewards.server import RewardServer

    sizes = arguments.max_mb, arguments.concurrency
    with RewardServer(reward, arguments.host, arguments.port, *sizes, arguments.token_env) as server:
        reward.load(device)
        stands = f", on {', '.join(reward.models)}" if reward.models else ""
        port = server.server_address[1]
        print(f"http://{arguments.host}:{port}  serves {reward.name!r}{stands}  (Ctrl-C ends)", flush=True)
        if arguments.host not in LOOPBACK and not server.token:
            print(f"others can reach it without a token; {arguments.token_env} sets one", flush=True)
        # A supervisor's polite end is the same as Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"\n{counted(server.scored, 'clip')} scored, {server.failed} failed")
    return 0
