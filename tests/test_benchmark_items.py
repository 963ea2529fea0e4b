"""Items: what a benchmark's file or a file of lines says is what is asked for, and a fault in it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from idc.data.benchmark import KINDS, Item, file_name, kind_of, read_benchmark, read_items, write_items
from idc.data.item_sources import Benchmark, ItemFile, Prompt
from idc.data.requests import Size, read_picture, read_request
from idc.errors import UserError


def record(*pictures: str, **changes: Any) -> dict[str, Any]:
    labels = [f"thing {k}" for k in range(len(pictures))]
    return {"img_paths": list(pictures), "prompt": "they meet", "class_label": labels, "synthesis_flag": "1", **changes}


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_benchmark_is_read_in_its_order_with_categories_and_kinds(tmp_path: Path) -> None:
    content = {
        "singleface_12": record("Images/crop_woman/3.png"),
        "humanobj_1": record("Images/man/1.jpg", "Images/thing/2.jpg", "Images/place/3.jpg"),
        "multiobject_3": record("a.png", "b.png"),
    }
    items = read_benchmark(written(tmp_path / "eval.json", content))
    assert [item.id for item in items] == list(content)
    assert [item.category for item in items] == ["singleface", "humanobj", "multiobject"]
    assert [item.kinds for item in items] == [("face",), ("human", "object", "background"), ("object", "object")]
    assert items[1].references[0] == tmp_path / "Images/man/1.jpg"
    assert items[1].labels == ("thing 0", "thing 1", "thing 2")
    assert items[0].meta == {"synthesis_flag": "1"}
    assert read_benchmark(tmp_path / "eval.json", "/elsewhere")[2].references[1] == Path("/elsewhere/b.png")
    path = str(tmp_path / "eval.json")
    chosen, failures = Benchmark(path, categories=["humanobj", "multiobject"], limit=1).items(tmp_path)
    assert ([item.id for item in chosen], failures) == (["humanobj_1"], {})
    with pytest.raises(UserError, match="'humanobjs'; did you mean 'humanobj'"):
        Benchmark(path, categories=["humanobjs"]).items(tmp_path)
    with pytest.raises(UserError, match="limit=0"):
        Benchmark(path, limit=0).items(tmp_path)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("x/man/1.png", "human"),
        ("x/crop_man/1.png", "face"),
        ("man.png", "object"),
        ("Woman/a.png", "human"),
        ("postman/1.png", "object"),
        ("scene/1.png", "background"),
    ],
)
def test_a_references_kind_follows_from_whole_folder_names(path: str, kind: str) -> None:
    assert kind_of(path) == kind


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not valid JSON"),
        ("[]", "found a list"),
        ("{}", "found no records"),
        ('{"a": {}, "a": {}}', "'a' comes twice"),
        ({"a": 3}, "'a' is a int"),
        ({"a": {"img_path": [], "prompt": ""}}, "no 'img_paths'; did you mean 'img_path'"),
        ({"a": record("x", prompt=3)}, "'a': img_paths and class_label are lists"),
        ({"a": record("x", class_label=["one", "two"])}, "2 labels for 1 references"),
        ({"../a": record("x")}, "'../a'.*'a' would do"),
    ],
)
def test_a_fault_in_a_benchmark_is_named(content: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        read_benchmark(written(tmp_path / "eval.json", content))


def test_a_missing_file_names_its_neighbour_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "Open-Domain_Eval.json", {})
    with pytest.raises(UserError, match=r"no such file; did you mean 'Open-Domain_Eval\.json'"):
        read_benchmark(tmp_path / "Open-Domain-Eval.json")
    with pytest.raises(UserError, match=r"domains\.json: no such file$"):  # a stranger's name is no help
        read_benchmark(tmp_path / "domains.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="not UTF-8"):
        read_benchmark(tmp_path / "binary.json")


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True)
ITEMS = st.builds(
    lambda id_, prompt, kinds, meta, source: Item(
        id=id_,
        prompt=prompt,
        references=tuple(Path("/elsewhere") / f"{k}.png" for k in range(len(kinds))),
        labels=tuple(f"é {k}" for k in range(len(kinds))),
        kinds=tuple(kinds),
        meta=meta,
        source=Path("/clips/a.mp4") if source else None,
    ),
    NAMES,
    st.text(),
    st.lists(st.sampled_from(KINDS), max_size=4),
    st.dictionaries(st.text(), st.integers() | st.text()),
    st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ITEMS, min_size=1, max_size=5, unique_by=lambda item: item.id.lower()))
def test_items_that_are_written_are_read_back(items: list[Item]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        assert read_items(write_items(folder, items)) == items


def test_files_inside_the_folder_are_named_relative_to_it(tmp_path: Path) -> None:
    item = Item("a", "b", (tmp_path / "references" / "a_0.png", Path("/elsewhere/x.png")))
    line = json.loads(write_items(tmp_path, [item]).read_text())
    assert line["references"] == ["references/a_0.png", "/elsewhere/x.png"]
    moved = tmp_path.with_name(tmp_path.name + "_moved")
    tmp_path.rename(moved)
    assert read_items(moved / "items.jsonl")[0].references[0] == moved / "references" / "a_0.png"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "no items"),
        ('{"id": "a"}\n', "line 1: .*an id and a prompt"),
        ('{"id": "a", "prompt": "b"}\nnonsense\n', "line 2: not valid JSON"),
        ('{"id": "a", "prompt": "b", "reference": []}', "no key 'reference'; did you mean 'references'"),
        ('{"id": "a", "prompt": "b", "references": "x.png"}', "references must be a list"),
        ('{"id": "a", "prompt": "b", "references": ["x"], "kinds": ["humans"]}', "did you mean 'human'"),
        ('{"id": "A", "prompt": "b"}\n\n{"id": "a", "prompt": "c"}', "'a' comes twice"),
    ],
)
def test_a_fault_in_a_file_of_items_is_named(content: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        ItemFile(str(written(tmp_path / "items.jsonl", content))).items(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_text_can_be_made_an_id(text: str) -> None:
    Item(file_name(text), "")


# Reading one item ---------------------------------------------------------------------------------------------------


def test_a_picture_is_upright_on_white_and_in_range(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    expected = torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(read_picture(tmp_path / "turned.png"), expected)
    Image.fromarray(np.zeros((4, 4, 4), np.uint8), "RGBA").save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png") == 1).all()
    (tmp_path / "folder.png").mkdir()
    for name, reason in (("no.png", "no such file"), ("folder.png", "cannot be read")):
        with pytest.raises(UserError, match=reason):
            read_picture(tmp_path / name)


def test_a_request_has_the_size_of_the_data_and_a_seed_of_its_own(tmp_path: Path) -> None:
    Image.new("RGB", (100, 50), "red").save(tmp_path / "red.png")
    ((item,), _) = Prompt("a red thing", [str(tmp_path / "red.png")], ["thing"]).items(tmp_path)
    request = read_request(item, Size(9, 32, 48), 0, None, 16 * 256)
    assert request.bucket == (9, 32, 48, 1)
    assert request.fps == 16
    assert request.sample is not None
    (subject,) = request.sample.subjects
    assert subject.name == "thing"
    assert subject.image_CHW.shape == (3, 48, 80)  # multiples of 16, at most 16 x 256 pixels
    seeds = {
        read_request(Item(name, "x"), Size(9, 32, 48), seed, None, 256).seed for name in ("a", "b") for seed in (0, 1)
    }
    assert len(seeds) == 4
    assert "set frames, height and width" in read_request(item, Size(9, None, None), 0, None, 256).problem
