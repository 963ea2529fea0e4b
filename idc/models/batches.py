"""Several pictures through a network at once: which are the same, and what to do where memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_WHO = "each_picture_once"  # in messages


def same_pictures(pictures: Iterable[NDArray[np.uint8]]) -> list[list[int]]:
    """The places of each different picture, in the order of their first ones. Arrays over the same memory are the same
    picture, as two views of a clip's frame are; copies are not."""
    places: dict[Any, list[int]] = {}
    for place, picture in enumerate(pictures):
        memory = picture.__array_interface__["data"][0], picture.shape, picture.strides
        places.setdefault(memory, []).append(place)
    return list(places.values())


def for_the_fit(
    items: Sequence[_In],
    fit: Callable[[_In], bool],
    compute: Callable[[Sequence[_In]], list[_Out]],
    otherwise: Callable[[_In], _Out],
) -> list[_Out]:
    """What `compute` gives for the items that are `fit`, which it gets together, and `otherwise` for each other one."""
    which = [fit(item) for item in items]
    found = iter(compute([item for item, fits in zip(items, which, strict=True) if fits]) if any(which) else ())
    return [next(found) if fits else otherwise(item) for item, fits in zip(items, which, strict=True)]


def in_batches(items: Sequence[_In], size: int, compute: Callable[[Sequence[_In]], list[_Out]]) -> list[_Out]:
    """What `compute` gives for each item, `size` of them at a time; where the device's memory does not suffice, by
    halves. Nothing is remembered of that: numbers depend on the items, and not on earlier calls.

    Raises:
        torch.OutOfMemoryError: where it does not suffice for one.
    """
    found: list[_Out] = []
    for start in range(0, len(items), size):
        found += _by_halves(items[start : start + size], compute)
    return found


def _by_halves(items: Sequence[_In], compute: Callable[[Sequence[_In]], list[_Out]]) -> list[_Out]:
    try:
        return compute(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
    # No exception is under way here, whose traceback would hold what filled the memory.
    half = len(items) // 2
    return _by_halves(items[:half], compute) + _by_halves(items[half:], compute)


@contextmanager
def each_picture_once(encoder: nn.Module, pictures: Sequence[int]) -> Iterator[None]:
    """Within it `encoder` computes rows of its batch that are the same picture once, and gives them to each of them.

    It is for a model that has no argument for features which it was given before, and calls `encoder` by position with
    tensors `[B, ...]`; what that returns may be tensors `[B, ...]` in lists and tuples.

    Args:
        pictures: for each row the number of its picture, from 0, new ones in rising order.

    Raises:
        RuntimeError: inside, where the model calls `encoder` in another way or that returns something else, as after
            an update of its library: rows would be given to the wrong pictures.
    """
    first = [pictures.index(number) for number in range(max(pictures) + 1)]
    if len(first) == len(pictures):
        yield
        return

    def reduce(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        tensors = [value for value in given if isinstance(value, Tensor)]
        rows = [len(tensor) if tensor.ndim else 0 for tensor in tensors]
        if not tensors or len(tensors) < len(given) or set(rows) != {len(pictures)} or named:
            raise RuntimeError(
                f"{_WHO}: {type(module).__name__} is called with tensors of {rows} rows by position and "
                f"{sorted(named)} by name; known is {len(pictures)} rows in each, all by position"
            )
        return tuple(tensor[first] for tensor in tensors), named

    def spread(module: nn.Module, tensors: Any, output: Any) -> Any:
        return _rows(output, pictures, len(first))

    hooks = encoder.register_forward_pre_hook(reduce, with_kwargs=True), encoder.register_forward_hook(spread)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rows(nested: Any, rows: Sequence[int], computed: int) -> Any:
    if isinstance(nested, Tensor) and nested.ndim and len(nested) == computed:
        return nested[list(rows)]
    if type(nested) in (list, tuple):
        return type(nested)(_rows(part, rows, computed) for part in nested)
    what = f"a tensor {list(nested.shape)}" if isinstance(nested, Tensor) else type(nested).__name__
    raise RuntimeError(f"{_WHO}: {what} came back; known are tensors of {computed} rows in lists and tuples")
