"""The README's short script, from training to a report that opens in a browser, on clips of 32 pixels."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from _browser import find_browser, open_browser
from _server import join, launch
from _sft_worker import ROOT, WORLD, merge, tiny_overlay, toy

from idc.cli import main

README = (ROOT / "README.md").read_text()


def script() -> list[list[str]]:
    (block,) = re.findall(r"```sh end-to-end\n(.*?)```", README, re.S)
    lines = [shlex.split(line) for line in block.splitlines()]
    assert [words[:2] for words in lines] == [["idc", verb] for verb in ("fit", "generate", "evaluate", "report")]
    return [words[1:] for words in lines]


def overlays(data: Path) -> dict[str, dict[str, Any]]:
    """What makes each command small: five frames of 32x32 pixels, six steps of training, eight videos."""
    held_out = {
        "class_path": "idc.data.sources.ToyShards",
        "init_args": toy(f"{data}/held_out", 8, 1_000_000)["init_args"],
    }
    items = {"class_path": "idc.data.item_sources.Shards", "init_args": {"shards": held_out}}
    size = {name: WORLD[name] for name in ("frames", "height", "width")}
    fit = merge(tiny_overlay(data, "runs"), {"trainer": {"max_steps": 6, "limit_val_batches": 1}})
    cpu = {"trainer": {"accelerator": "cpu"}}
    return {"fit": fit, "generate": {**cpu, "data": {"init_args": {"items": items, **size}}}, "evaluate": cpu}


def run(words: list[str], folder: Path, log: Path) -> None:
    """A command's own process, in `folder`; what it writes goes to `log`."""
    torch.set_num_threads(1)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    status = main(words)
    sys.stdout.flush()
    sys.exit(status)


def test_the_readmes_script_ends_in_a_report_that_opens_in_a_browser(toy_data: Path, tmp_path: Path) -> None:
    find_browser()
    small = overlays(toy_data)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for command, *rest in script():
        extra = []
        if command in small:
            (tmp_path / f"{command}.json").write_text(json.dumps(small[command]))
            extra = ["--config", f"{command}.json"]
            last = max(number for number, word in enumerate(rest) if word.startswith("recipes/"))
            rest = [*rest[: last + 1], *extra, *rest[last + 1 :]]
        log = tmp_path / f"{command}.log"
        assert join(launch(run, [([command, *rest], tmp_path, log)]), 200) == [0], log.read_text()[-3000:]
    assert len(list((tmp_path / "videos" / "toy").glob("*.mp4"))) == 8
    with open_browser() as browser:
        browser.get((tmp_path / "report" / "index.html").as_uri())
        page = browser.find_element("tag name", "body").text
        assert "Table 1" in page
        assert "8/8" in page
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
