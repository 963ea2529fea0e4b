"""Every notebook runs from top to bottom in an empty folder, shows pictures, leaves nothing; its two halves agree."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbmake.nb_run import NotebookRun

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = sorted({path.stem for path in (*NOTEBOOKS.glob("*.py"), *NOTEBOOKS.glob("*.ipynb"))})


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.timeout(600)  # a kernel of its own, beside other tests
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_and_leaves_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads beside another test wait for each other most of the time
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    # Or a fifth of a kernel's time is garbage collection, in what imports leave.
    (startup / "collect_seldom.py").write_text("import gc\ngc.set_threshold(100_000)\n")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    path = tmp_path / "here" / f"{name}.ipynb"
    path.parent.mkdir()
    shutil.copy(NOTEBOOKS / path.name, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's own transport
        result = NotebookRun(path, default_timeout=240).execute()
    assert result.error is None, result.error.trace
    outputs = [output for cell in result.nb.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    assert not [output.text for output in outputs if "Traceback" in output.get("text", "")]
    assert not [output.text for output in outputs if "Warning" in output.get("text", "")]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert not list(scratch.glob("tmp*"))  # torch keeps caches of its own


@pytest.mark.parametrize("name", NAMES)
def test_the_two_halves_of_a_pair_agree(name: str) -> None:
    source = jupytext.read(NOTEBOOKS / f"{name}.py")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    assert cells(source) == cells(notebook), "after a change: jupytext --sync notebooks/*.py"


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_stored_without_outputs(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
    assert notebook.metadata.kernelspec.name == "python3"  # that of the environment that runs it


def test_there_are_the_three_that_newcomers_are_told_of() -> None:
    assert NAMES == ["explore_shards", "from_checkpoint_to_video", "read_an_evaluation"]
