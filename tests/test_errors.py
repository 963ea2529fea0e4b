"""Words of messages: choices are named, and a long list of them is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from idc.data.videos import find_videos
from idc.errors import UserError, counted, make_folder, nearest


def test_the_nearest_choice_is_named_and_a_few_are_listed_where_none_is_near():
    assert nearest("facesin", ["facesim", "toy"]) == "; did you mean 'facesim'?"
    assert nearest("x", ["b", "a"]) == "; choose from 'a', 'b'"
    assert nearest("x", []) == ""
    assert nearest("zzz", [f"a{n:02}" for n in range(20)]).count("'a") == 20
    assert nearest("zzz", [f"a{n:02}" for n in range(21)]) == "; choose from 'a00', 'a01', 'a02', ... (21 of them)"


def test_a_video_of_no_item_is_told_in_a_line_whatever_the_number_of_items(tmp_path: Path):
    ids = [f"singlehuman_{n}" for n in range(180)]
    for name in (ids[0], "zzz", "singlehuman_200"):
        (tmp_path / f"{name}.mp4").touch()
    extra = find_videos(tmp_path, ids).extra
    assert extra["zzz.mp4"].startswith("no item has the id 'zzz'; choose from 'singlehuman_0'")
    assert extra["zzz.mp4"].endswith("(180 of them)")
    assert all(len(reason) < 150 for reason in extra.values())
    assert "did you mean" in extra["singlehuman_200.mp4"]


@pytest.mark.parametrize(("number", "text"), [(0, "0 items"), (1, "1 item"), (2, "2 items")])
def test_one_of_a_kind_is_singular(number: int, text: str):
    assert counted(number, "item") == text


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_a_file_in_a_folders_place_is_named(below: str, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^--out {tmp_path}/file.*: {tmp_path}/file is a file; give the name of a"):
        make_folder(tmp_path / "file" / below)
    for _ in range(2):
        make_folder(tmp_path / "folder" / below)
    assert (tmp_path / "folder" / below).is_dir()
    with pytest.raises(UserError, match=r"^--out /proc/idc: cannot be made"):
        make_folder(Path("/proc/idc"))
