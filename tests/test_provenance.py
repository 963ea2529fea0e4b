"""Which commit a result names, for a checkout, a copy of one, and code from elsewhere."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from idc.stages import provenance


def git(folder: Path, *args: str) -> str:
    settings = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *settings, *args], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "a checkout"
    (root / "idc").mkdir(parents=True)
    (root / "idc" / "a.py").write_text("A = 1\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def installed(checkout: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, origin: dict | None = None) -> Path:
    """A copy as pip makes one, with what pip writes down about it."""
    package = folder / "idc"
    package.mkdir(parents=True)
    (package / "a.py").write_bytes((checkout / "idc" / "a.py").read_bytes())
    (package / "stages").mkdir()
    text = json.dumps(origin or {"dir_info": {}, "url": checkout.as_uri()})
    monkeypatch.setattr(provenance, "__file__", str(package / "stages" / "provenance.py"))
    monkeypatch.setattr(provenance, "distribution", lambda _: SimpleNamespace(read_text=lambda _: text))
    return package


def test_a_copy_has_the_commit_of_the_checkout_it_came_from(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(checkout, tmp_path / "site", monkeypatch)
    head = git(checkout, "rev-parse", "HEAD").strip()
    assert provenance.commit() == head
    (checkout / "notes.txt").write_text("untracked")
    assert provenance.commit() == head


def test_a_copy_of_changed_files_says_so(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "idc" / "a.py").write_text("A = 2\n")
    installed(checkout, tmp_path / "site", monkeypatch)
    assert provenance.commit() == git(checkout, "rev-parse", "HEAD").strip() + "+changes"


def test_a_checkout_that_has_moved_on_tells_nothing(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(checkout, tmp_path / "site", monkeypatch)
    (checkout / "idc" / "a.py").write_text("A = 3\n")
    git(checkout, "commit", "-qam", "second")
    assert provenance.commit() == ""


def test_a_copy_from_a_repository_has_the_commit_that_pip_wrote_down(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"url": "https://example.org/idc.git", "vcs_info": {"vcs": "git", "commit_id": "c" * 40}}
    installed(checkout, tmp_path / "site", monkeypatch, told)
    assert provenance.commit() == "c" * 40


def test_a_wheel_and_a_checkout_that_is_gone_tell_nothing(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(checkout, tmp_path / "one", monkeypatch, {"url": "https://example.org/idc.whl", "archive_info": {}})
    assert provenance.commit() == ""
    installed(checkout, tmp_path / "two", monkeypatch, {"dir_info": {}, "url": (tmp_path / "gone").as_uri()})
    assert provenance.commit() == ""
