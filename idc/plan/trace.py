"""Memory of a forward and backward pass, by running the real code on tensors without content.

torch's `FakeTensorMode` runs every operator for shapes, dtypes and aliases alone, and a dispatch mode follows the life
of each storage. Whatever the model's code does is counted as it does it: autocast's copies of weights, what autograd
keeps, what checkpointing recomputes. A deep model is traced at the depth of a few layers, since what a layer keeps is
the same for all of a kind; a test holds that equal to tracing all layers.

Weights and their gradients are there before and not counted. What is run are the operators of the CPU under the CPU's
autocast; where CUDA keeps something else, a trace for a GPU counts that (`idc.plan.cuda`). Attention is PyTorch's fused
one, which keeps what FlashAttention keeps (queries, keys, values, outputs, and one number a query and head).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from idc.plan.cuda import as_on_cuda

_DEPTH = 3  # layers that are traced: the second is like all that follow


class Passed(NamedTuple):
    """Bytes that a pass takes besides weights and gradients.

    Attributes:
        kept: what autograd holds between the forward and the backward pass, copies of weights apart.
        kept_copies: copies of weights in the compute dtype (autocast's) that are held until the backward pass.
        forward: the most at any moment of the forward pass.
        backward: the most at any moment of the backward pass.
    """

    kept: int
    kept_copies: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return max(self.forward, self.backward)

    @property
    def working(self) -> int:
        """What the peak holds besides what is kept: recomputed layers, gradients of activations, temporary results."""
        return self.peak - self.kept - self.kept_copies


class Storages(TorchDispatchMode):
    """Follows the storages that operators make: bytes that live now, and the most so far.

    Args:
        weights: a model whose parameters and buffers were there before.

    Attributes:
        live, peak: bytes. copies: bytes of each living copy of a weight in another dtype, by its number.
    """

    def __init__(self, weights: nn.Module | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.copies: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._count = 0
        own = () if weights is None else (*weights.parameters(), *weights.buffers())
        self._weights = {tensor.untyped_storage()._cdata for tensor in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # two thirds of all calls, on tensors without content alone
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        copy = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), copy)
        return result

    def _note(self, storage: Any, copy: bool) -> None:
        key = storage._cdata
        if key in self._sizes or key in self._weights:
            return
        self._sizes[key] = size = storage.nbytes()
        self._count += 1
        if copy:
            self.copies[self._count] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, self._count)

    def _free(self, key: int, number: int) -> None:
        self.live -= self._sizes.pop(key)
        self.copies.pop(number, None)


def trace(
    build: Callable[[int, int], nn.Module],
    layers: int,
    id_layers: int,
    loss: Callable[[nn.Module], Tensor],
    on_gpu: bool = False,
) -> Passed:
    """What a pass through a model of `layers` layers takes, of which the first `id_layers` have an id block.

    Args:
        build: makes the model on "meta" with that many layers and id blocks, ready to be trained.
        loss: runs the forward pass on tensors it makes itself, and returns the loss without a backward pass.
        on_gpu: what it takes on CUDA; else on the CPU.
    """
    depth, ids = min(layers, _DEPTH), min(id_layers, _DEPTH if id_layers == layers else _DEPTH - 1)
    model: Any = build(depth, ids)
    with _without_content(), as_on_cuda() if on_gpu else nullcontext():
        _take_content(model)
        storages = Storages(model)
        with storages, _watched(model, storages) as (seconds, turn):
            result = loss(model)
            forward, kept, copies = storages.peak, storages.live, sum(storages.copies.values())
            kinds = {kind: layer.settled(storages.copies) for kind, layer in seconds.items()}
            storages.peak = storages.live
            result.backward()
            backward = storages.peak
    every = _times(kinds, {"blocks": layers - depth, "id_blocks": id_layers - ids})
    # What layers without an id block keep is free again when the backward pass comes to those that have one.
    lower = _times(kinds, dict.fromkeys(kinds, id_layers - ids)) if turn.passes == 1 else every
    return Passed(
        kept=kept - copies + every.kept,
        kept_copies=copies + every.kept_copies,
        forward=forward + every.kept + every.copies,
        backward=max(turn.peak + every.kept + every.kept_copies, backward + lower.kept + lower.kept_copies),
    )


class _Grown(NamedTuple):
    """By how much a layer lets the living bytes grow: what it keeps, copies of weights apart; these copies at its end;
    and those of them that live on until the backward pass."""

    kept: int
    copies: int
    kept_copies: int


def _times(kinds: dict[str, _Grown], layers: dict[str, int]) -> _Grown:
    """Of that many layers of each kind together."""
    every = [(count, kinds[kind]) for kind, count in layers.items() if kind in kinds]
    return _Grown(*(sum(count * getattr(grown, name) for count, grown in every) for name in _Grown._fields))


class _Turn:
    """Where the backward pass comes to the last layer that has an id block: the peak until then.

    Attributes:
        peak: 0 before. passes: through that layer in the forward pass.
    """

    def __init__(self, storages: Storages) -> None:
        self._storages = storages
        self.peak = self.passes = 0

    def leave(self, _: nn.Module, inputs: Any, outputs: tuple[Tensor | None, ...]) -> None:
        video = outputs[0]
        if video is not None and not self.peak:  # else it is the subject side alone, or is computed again
            self.passes += 1
            video.register_hook(self._reached)

    def _reached(self, _: Tensor) -> None:
        self.peak = max(self.peak, self._storages.peak)
        self._storages.peak = self._storages.live


class _Second:
    """The second layer of a kind, over all passes through it: from its beginning to the beginning of what follows."""

    def __init__(self, storages: Storages) -> None:
        self._storages = storages
        self._live = self._grown = 0
        self._before: set[int] = set()
        self._copies: dict[int, int] = {}

    def enter(self, *_: Any) -> None:
        self._live, self._before = self._storages.live, set(self._storages.copies)

    def leave(self, *_: Any) -> None:
        self._grown += self._storages.live - self._live
        self._copies |= {n: size for n, size in self._storages.copies.items() if n not in self._before}

    def settled(self, living: dict[int, int]) -> _Grown:
        copies = sum(self._copies.values())
        return _Grown(self._grown - copies, copies, sum(size for n, size in self._copies.items() if n in living))


@contextmanager
def _without_content() -> Iterator[None]:
    """A context in which tensors have no content."""
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")  # of operators, on dtypes
        yield


def _take_content(model: nn.Module) -> None:
    """Give a model tensors without content, in that context."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                content = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = made = nn.Parameter(content, requires_grad=parameter.requires_grad)
                if parameter.requires_grad:
                    # Reality adds a gradient to what is there; without content, each would be a new tensor.
                    made.register_post_accumulate_grad_hook(_drop_gradient)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _watched(model: Any, storages: Storages) -> Iterator[tuple[dict[str, _Second], _Turn]]:
    """The second layer of each kind, watched while the context lasts, and the turn; a model of fewer than three layers
    has no second ones."""
    found: dict[str, _Second] = {}
    turn, handles = _Turn(storages), []
    if len(model.id_blocks):
        handles.append(model.id_blocks[-1].register_forward_hook(turn.leave))
    order = [layer for pair in zip_longest(model.blocks, model.id_blocks) for layer in pair if layer is not None]
    for kind in ("blocks", "id_blocks"):
        layers = list(getattr(model, kind))
        if len(model.blocks) < _DEPTH or len(layers) < 2:
            continue
        second = found[kind] = _Second(storages)
        following = order[order.index(layers[1]) + 1]
        handles.append(layers[1].register_forward_pre_hook(second.enter))
        handles.append(following.register_forward_pre_hook(second.leave))
    yield found, turn
    for handle in handles:
        handle.remove()
