"""Which code made a result: the commit and the versions of what it stands on."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from urllib.parse import unquote, urlparse

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
    """The commit of this code, with "+changes" where tracked files differ from it; "" where nothing tells.

    A copy that pip installed from a checkout has that checkout's commit, as long as it still holds the same code.
    """
    root = Path(__file__).resolve().parents[2]
    return _commit_of(root) or _installed_commit(root / "idc")


def _installed_commit(package: Path) -> str:
    try:
        origin = json.loads(distribution("idc").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return ""
    if told := origin.get("vcs_info", {}).get("commit_id"):
        return told
    address = urlparse(origin.get("url", ""))
    source = Path(unquote(address.path))
    if address.scheme != "file" or not _same_code(package, source / "idc"):
        return ""
    return _commit_of(source)


def _same_code(package: Path, source: Path) -> bool:
    def files(folder: Path) -> dict[Path, bytes]:
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.py")}

    return source.is_dir() and files(package) == files(source)


def _commit_of(root: Path) -> str:
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
