"""Every notebook runs from top to bottom as plain Python, in an empty folder, and is stored without outputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[tuple[int, dict]]:
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    return [(number, cell) for number, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "IPython.display", None)  # as where IPython is not installed
    namespace: dict = {"__name__": "__main__"}
    for number, cell in cells(path):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)
    assert capsys.readouterr().out.strip()
    assert not any(tmp_path.iterdir())  # it leaves nothing behind


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path: Path):
    assert not any(cell["outputs"] or cell["execution_count"] for _, cell in cells(path))


def test_there_are_notebooks():
    assert NOTEBOOKS
