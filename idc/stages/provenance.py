"""Which code made a result: the commit and the versions of what it stands on."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "torch",
    "torchmetrics",
    "lightning",
    "transformers",
    "diffusers",
    "av",
    "opencv-python",
    "numpy",
    "insightface",
)


def commit() -> str:
    """The checkout's commit, with "+changes" where tracked files differ from it; "" for an installed package."""
    root = Path(__file__).resolve().parents[2]
    head = _git(root, "rev-parse", "--show-toplevel", "HEAD").split("\n")
    if len(head) != 2 or Path(head[0]).resolve() != root:  # another project's checkout that we are installed in
        return ""
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return head[1] + ("+changes" if changed else "")


def versions() -> dict[str, str]:
    """Of this package and of those that scores depend on, where installed."""
    import idc

    found = {"idc": idc.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
