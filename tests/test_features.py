"""The feature store: round trip, interruption, several writers, fork."""

from __future__ import annotations

import json
import math
import multiprocessing
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from idc.data.features import FeatureStore, feature_key
from idc.errors import UserError


def features(number: int) -> dict[str, Tensor]:
    """What the encoders of a sample with a reference make; sizes differ between samples."""
    generator = torch.Generator().manual_seed(number)
    return {
        "latents": torch.randn(16, 3, 8, 4 + number % 3, generator=generator),
        "text": torch.randn(5 + number, 32, generator=generator).bfloat16(),
        "vlm_no_text": torch.zeros(0, 7),
        "reference_0": torch.randn(16, 1, 4, 4, generator=generator).half(),
    }


def chunk(first: int, last: int) -> dict[str, dict[str, Tensor]]:
    return {f"toy/shard-000000/{i:04d}@abc": features(i) for i in range(first, last)}


def check(store: FeatureStore, number: int) -> bool:
    read, expected = store.read(f"toy/shard-000000/{number:04d}@abc"), features(number)
    return read.keys() == expected.keys() and all(
        read[name].dtype == expected[name].dtype and torch.equal(read[name], expected[name]) for name in expected
    )


def test_what_was_written_is_read_with_dtype_and_shape(tmp_path: Path):
    store = FeatureStore(tmp_path, {"codec": "a"})
    store.write(chunk(0, 5))
    store.write(chunk(5, 7))
    opened = FeatureStore(tmp_path, {"codec": "a"})
    assert len(opened) == 7
    assert all(check(opened, i) for i in (6, 0, 3, 5, 1))
    assert set(opened.read("toy/shard-000000/0002@abc", ["text"])) == {"text"}
    assert opened.missing(["toy/shard-000000/0002@abc", "x", "y"]) == ["x", "y"]
    assert "x" not in opened
    with pytest.raises(KeyError):
        opened.read("x")


def test_views_and_shared_tensors_are_stored_whole(tmp_path: Path):
    base = torch.arange(12.0).view(3, 4)
    store = FeatureStore(tmp_path, "f")
    store.write({"a": {"column": base[:, 1], "row": base[2], "same": base[2]}, "b": {"row": base[2]}})
    read = FeatureStore(tmp_path, "f").read("a")
    assert torch.equal(read["column"], base[:, 1])
    assert torch.equal(read["same"], base[2])


def test_another_fingerprint_is_another_store(tmp_path: Path):
    old = FeatureStore(tmp_path, {"codec": "a", "area": 256})
    old.write(chunk(0, 2))
    new = FeatureStore(tmp_path, {"codec": "b", "area": 256})
    assert len(new) == 0
    assert FeatureStore(tmp_path, {"area": 256, "codec": "a"}).path == old.path  # the order of keys does not matter


def test_a_chunk_cut_short_does_not_count_and_can_be_written_again(tmp_path: Path):
    store = FeatureStore(tmp_path, "f")
    store.write(chunk(0, 3))
    store.write(chunk(3, 6))
    (sidecar, *_) = [path for path in store.path.glob("*.json") if "0004" in path.read_text()]
    sidecar.unlink()  # killed between the tensors and the list of keys
    tensors = sidecar.with_suffix(".safetensors")
    tensors.write_bytes(tensors.read_bytes()[:100])
    again = FeatureStore(tmp_path, "f")
    missing = again.missing(chunk(0, 6))
    assert missing == list(chunk(3, 6))
    again.write(chunk(3, 6))
    assert all(check(FeatureStore(tmp_path, "f"), i) for i in range(6))


def cut(tensors: Path) -> None:
    tensors.write_bytes(tensors.read_bytes()[:-1])


def without_size(tensors: Path) -> None:
    sidecar = tensors.with_suffix(".json")
    sidecar.write_text(json.dumps({"ids": json.loads(sidecar.read_text())["ids"]}))


def half_a_list(tensors: Path) -> None:
    tensors.with_suffix(".json").write_text('{"ids": [')


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, r"has \d+ bytes, \d+ when written"),
        (Path.unlink, r"cannot be read \(No such file"),
        (without_size, "did not note its size"),
        (half_a_list, "unreadable list"),
    ],
)
@pytest.mark.parametrize("step", [3, 1])
def test_a_damaged_chunk_is_named_once_and_encoded_again(tmp_path: Path, damage: Callable, says: str, step: int):
    """Whether it comes again under its own name (all three at once) or in other chunks (one by one)."""
    store = FeatureStore(tmp_path, "f")
    store.write(chunk(0, 3))
    (tensors,) = store.path.glob("*.safetensors")
    store.write(chunk(3, 6))
    damage(tensors)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = FeatureStore(tmp_path, "f")
        again.refresh()
    (line,) = [str(warning.message) for warning in caught]
    assert re.search(rf"{tensors.name} .*{says}.*: its samples are encoded again", line)
    assert again.missing(chunk(0, 6)) == list(chunk(0, 3))
    for first in range(0, 3, step):
        again.write(chunk(first, first + step))
    if damage is half_a_list and step == 1:
        tensors.with_suffix(".json").unlink()  # whose samples nobody knows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = FeatureStore(tmp_path, "f")
    assert all(check(whole, i) for i in range(6))


def write_part(root: str, first: int) -> None:
    FeatureStore(root, "f").write(chunk(first, first + 4))


def read_part(store: FeatureStore, queue: multiprocessing.Queue) -> None:
    queue.put([check(store, i) for i in range(12)])


def test_processes_write_their_own_chunks_and_read_after_a_fork(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_part, args=(str(tmp_path), first)) for first in (0, 4, 8)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    store = FeatureStore(tmp_path, "f")
    assert check(store, 0)  # opens a chunk here, which the child must not share
    queue = context.Queue()
    reader = context.Process(target=read_part, args=(store, queue))
    reader.start()
    assert queue.get(timeout=30) == [True] * 12
    reader.join()
    assert check(pickle.loads(pickle.dumps(store)), 5)


def test_a_store_sees_what_others_wrote_after_refresh(tmp_path: Path):
    one, two = FeatureStore(tmp_path, "f"), FeatureStore(tmp_path, "f")
    one.write(chunk(0, 2))
    assert len(two) == 0
    two.refresh()
    assert check(two, 1)


DTYPES = (torch.int8, torch.float64, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.float32)


def test_tensors_of_every_size_and_dtype_lie_where_they_are_read(tmp_path: Path):
    mixed = {
        f"{dtype}_{'x'.join(map(str, shape))}": (torch.arange(60) % 7)[: math.prod(shape)].view(shape).to(dtype)
        for dtype in DTYPES
        for shape in ((), (1,), (3, 5), (0, 4))
    }
    FeatureStore(tmp_path, "f").write({"a": mixed, "b": {"odd": torch.ones(3, dtype=torch.int8)}})
    read = FeatureStore(tmp_path, "f").read("a")
    assert read.keys() == mixed.keys()
    for name, tensor in mixed.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].double(), tensor.double())


def test_writing_into_a_read_tensor_leaves_the_file_alone(tmp_path: Path):
    store = FeatureStore(tmp_path, "f")
    store.write(chunk(0, 1))
    store.read(next(iter(chunk(0, 1))))["latents"].zero_()
    assert check(FeatureStore(tmp_path, "f"), 0)


def test_any_label_is_read_back(tmp_path: Path):
    labels = ["7/text", 'a "3/b"', ',"0/x', "}{", "é"]
    stored = {label: torch.tensor([float(i)]) for i, label in enumerate(labels)}
    FeatureStore(tmp_path, "f").write({"a": stored, "b": {"x": torch.zeros(1)}})
    store = FeatureStore(tmp_path, "f")
    assert {label: tensor.item() for label, tensor in store.read("a").items()} == dict(
        zip(labels, range(5), strict=True)
    )
    assert set(store.read("b")) == {"x"}
    with pytest.raises(KeyError, match="absent"):
        store.read("b", ["x", "absent"])


def test_a_dtype_that_cannot_be_read_back_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"phase is torch\.complex64"):
        FeatureStore(tmp_path, "f").write({"a": {"phase": torch.zeros(2, dtype=torch.complex64)}})


@pytest.mark.parametrize("wrong", [{}, {"a": {}}])
def test_empty_chunks_are_refused(tmp_path: Path, wrong: dict):
    with pytest.raises(UserError, match="at least one"):
        FeatureStore(tmp_path, "f").write(wrong)


def test_keys_tell_contents_apart():
    assert feature_key("toy/a/1", "0" * 64) != feature_key("toy/a/1", "1" * 64)
