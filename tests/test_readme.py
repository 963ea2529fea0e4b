"""The README says what is so: commands and files exist, recipes parse, there are two set-up commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from idc.cli import ALIASES, COMMANDS, LIGHTNING
from idc.curate.cli import main as shards
from idc.recipes import check_command_line

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, re.S)


def commands() -> list[list[str]]:
    """Every `idc ...` line of the README's shell blocks, with continued lines joined and comments left out."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    found = []
    for words in lines:
        if "idc" in words:
            found.append(words[words.index("idc") + 1 :])
    return found


def test_there_are_exactly_two_set_up_commands() -> None:
    setup = blocks("sh setup")
    assert len(setup) == 2
    assert setup[0].strip().endswith("python -m idc fit --config recipes/sft.yaml")
    assert "pytest" in setup[1]


def test_every_command_of_the_readme_exists_and_its_recipes_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = commands()
    assert len(found) > 8
    for command, *rest in found:
        assert command in COMMANDS
        if ALIASES.get(command, command) in LIGHTNING:
            check_command_line(rest)


def test_the_shards_commands_of_the_readme_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in sorted({rest[0] for command, *rest in commands() if command == "shards"}):
        with pytest.raises(SystemExit) as exit_:
            shards([verb, "--help"])
        assert exit_.value.code == 0
        flags = {
            word for c, *rest in commands() if c == "shards" and rest[0] == verb for word in rest if word[:2] == "--"
        }
        text = capsys.readouterr().out
        assert all(flag in text for flag in flags), flags


def test_every_recipe_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"recipes/[\w./]+\.yaml", README))
    named |= {f"recipes/{path}" for path in re.findall(r"`((?:scale|data|hardware)/[\w.]+\.yaml)`", README)}
    assert named
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]


def test_figures_stand_apart_by_where_they_come_from() -> None:
    figures = README.split("## Figures")[1].split("## ")[0]
    groups = re.findall(r"\*\*(Measured here|Measured on a GPU|The paper's|Not reproduced)\*\*", figures)
    assert groups == ["Measured here", "Measured on a GPU", "The paper's", "Not reproduced"]


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script
    of_deepspeed = "python -m pytest tests/test_zero.py"  # which that command does not install
    own = script.replace(of_deepspeed, "")
    assert "pytest" not in own, "the command stands in the README alone"
    for tool in ("ruff check", "ruff format --check", "mypy", "lint-imports"):
        assert tool in script
