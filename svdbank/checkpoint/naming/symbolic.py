"""Tensors that know where in stored tensors each of their entries lies, and hold none of them.

Transformers says how stored tensors become parameters by operations on tensors: concatenate, stack, split, transpose, reorder rows. Given
:class:`Traced` tensors, the same operations say it for every entry, without reading one. What is traced are rearrangements; anything that
computes, or that cannot be written as strided views laid side by side, raises :class:`NotTracedError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

#: One axis: (size, stride) of its factors, slowest first. An index of the axis counts through them in row-major order.
Axis = tuple[tuple[int, int], ...]


class NotTracedError(Exception):
    """An operation that is no rearrangement of entries, or one that cannot be followed; the message names it."""


@dataclass(frozen=True)
class View:
    """Entries of the stored tensor ``source``: the one at ``offset``, and along each axis those at its strides, in elements."""

    source: str
    offset: int
    axes: tuple[Axis, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(size for size, _ in axis) for axis in self.axes)


@dataclass(frozen=True)
class Joined:
    """Parts one after another along ``axis``."""

    axis: int
    parts: tuple[View | Joined, ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)


Arrangement = View | Joined


def stored(source: str, shape: Sequence[int]) -> View:
    """A stored tensor as it lies, row-major."""
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return View(source, 0, tuple(_axis([(size, stride)]) for size, stride in zip(shape, strides, strict=True)))


def _axis(factors: Iterable[tuple[int, int]]) -> Axis:
    """``factors`` without those of size 1, neighbours that are one run joined."""
    kept: list[tuple[int, int]] = []
    for size, stride in factors:
        if size == 1:
            continue
        if kept and kept[-1][1] == size * stride:
            kept[-1] = (kept[-1][0] * size, stride)
        else:
            kept.append((size, stride))
    return tuple(kept)


def swapped(places: Arrangement, one: int, other: int) -> Arrangement:
    """Two axes exchanged."""
    if isinstance(places, Joined):
        axis = {one: other, other: one}.get(places.axis, places.axis)
        return Joined(axis, tuple(swapped(part, one, other) for part in places.parts))
    axes = list(places.axes)
    axes[one], axes[other] = axes[other], axes[one]
    return replace(places, axes=tuple(axes))


def joined(parts: Sequence[Arrangement], axis: int) -> Arrangement:
    """Concatenation along ``axis``."""
    shapes = {(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}
    if len(shapes) != 1:
        raise NotTracedError(f"cat of shapes {[part.shape for part in parts]}")
    flat: list[Arrangement] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Joined) and part.axis == axis else (part,))
    return flat[0] if len(flat) == 1 else Joined(axis, tuple(flat))


def cut(places: Arrangement, axis: int, start: int, stop: int) -> Arrangement:
    """Entries ``[start, stop)`` along ``axis``."""
    if isinstance(places, Joined):
        if places.axis != axis:
            return Joined(places.axis, tuple(cut(part, axis, start, stop) for part in places.parts))
        kept, begin = [], 0
        for part in places.parts:
            end = begin + part.shape[axis]
            low, high = max(start, begin), min(stop, end)
            if low < high:
                kept.append(cut(part, axis, low - begin, high - begin))
            begin = end
        return joined(kept, axis) if kept else cut(places.parts[0], axis, 0, 0)
    size = places.shape[axis]
    if (start, stop) == (0, size):
        return places
    factors = places.axes[axis]
    if not factors:  # of size 1, and nothing of it is wanted
        raise NotTracedError("an empty slice")
    inner = prod(size for size, _ in factors[1:])
    if start % inner or stop % inner:
        raise NotTracedError(f"a slice [{start}, {stop}) across rows in another order")
    first = factors[0]
    own = _axis([((stop - start) // inner, first[1]), *factors[1:]])
    axes = (*places.axes[:axis], own, *places.axes[axis + 1 :])
    return View(places.source, places.offset + (start // inner) * first[1], axes)


def with_axis(places: Arrangement, axis: int) -> Arrangement:
    """A new axis of size 1 before ``axis``."""
    if isinstance(places, Joined):
        return Joined(places.axis + (axis <= places.axis), tuple(with_axis(part, axis) for part in places.parts))
    return replace(places, axes=(*places.axes[:axis], (), *places.axes[axis:]))


def without_axis(places: Arrangement, axis: int) -> Arrangement:
    """``axis``, of size 1, dropped."""
    if places.shape[axis] != 1:
        raise NotTracedError(f"axis {axis} of {places.shape} dropped")
    if isinstance(places, Joined):
        return Joined(places.axis - (axis < places.axis), tuple(without_axis(part, axis) for part in places.parts))
    return replace(places, axes=(*places.axes[:axis], *places.axes[axis + 1 :]))


def slices(places: Arrangement) -> list[Arrangement]:
    """Each slice of the leading axis, without that axis."""
    if isinstance(places, View):
        return [without_axis(cut(places, 0, index, index + 1), 0) for index in range(places.shape[0])]
    each = [slices(part) for part in places.parts]
    if places.axis == 0:
        return [one for part in each for one in part]
    return [joined(parts, places.axis - 1) for parts in zip(*each, strict=True)]


def reshaped(places: Arrangement, shape: Sequence[int]) -> Arrangement:
    """The entries in row-major order under another shape, of which one size may be -1."""
    shape = _resolved(places.shape, shape)
    if tuple(shape) == places.shape:
        return places
    if isinstance(places, Joined):
        same = places.axis + 1
        if tuple(shape[:same]) != places.shape[:same]:
            raise NotTracedError(f"reshape of {places.shape} to {tuple(shape)} across what was put together")
        return Joined(places.axis, tuple(reshaped(part, (*part.shape[:same], *shape[same:])) for part in places.parts))
    factors = [factor for axis in places.axes for factor in axis]
    axes: list[Axis] = []
    for size in shape:
        own: list[tuple[int, int]] = []
        missing = size
        while missing > 1:
            length, stride = factors.pop(0)
            if missing % length == 0:
                own.append((length, stride))
                missing //= length
            elif length % missing == 0:
                rest = length // missing
                own.append((missing, stride * rest))
                factors.insert(0, (rest, stride))
                missing = 1
            else:
                raise NotTracedError(f"reshape of {places.shape} to {tuple(shape)}")
        axes.append(_axis(own))
    return replace(places, axes=tuple(axes))


def _resolved(old: Sequence[int], new: Sequence[int]) -> list[int]:
    known = prod(size for size in new if size != -1)
    resolved = [size if size != -1 else prod(old) // max(known, 1) for size in new]
    if prod(resolved) != prod(old):
        raise NotTracedError(f"reshape of {tuple(old)} to {tuple(new)}")
    return resolved


class Traced(torch.Tensor):
    """A tensor without values that goes through operations of torch; ``places`` says where its entries lie."""

    places: Arrangement

    @staticmethod
    def of(places: Arrangement) -> Traced:
        """A tensor of these places."""
        made: Traced = torch.Tensor._make_subclass(Traced, torch.empty(places.shape, device="meta"))
        made.places = places
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if (rule := _RULES.get(name)) is not None:
            return rule(*args, **(kwargs or {}))
        if name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise NotTracedError(name)


def _dim(tensor: Traced, dim: int) -> int:
    return dim % len(tensor.places.shape)


def _sizes(shape: tuple[Any, ...]) -> list[int]:
    return [int(size) for size in (shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape)]


def _same(tensor: Traced, *_: Any, **__: Any) -> Traced:
    return tensor


def _transpose(tensor: Traced, dim0: int, dim1: int) -> Traced:
    return Traced.of(swapped(tensor.places, _dim(tensor, dim0), _dim(tensor, dim1)))


def _permute(tensor: Traced, *dims: Any) -> Traced:
    order, places = [_dim(tensor, dim) for dim in _sizes(dims)], tensor.places
    now = list(range(len(order)))
    for i, wanted in enumerate(order):
        at = now.index(wanted)
        places = swapped(places, i, at)
        now[i], now[at] = now[at], now[i]
    return Traced.of(places)


def _cat(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    return Traced.of(joined([tensor.places for tensor in tensors], _dim(tensors[0], dim)))


def _stack(tensors: Sequence[Traced], dim: int = 0) -> Traced:
    axis = dim % (len(tensors[0].places.shape) + 1)
    return Traced.of(joined([with_axis(tensor.places, axis) for tensor in tensors], axis))


def _split(tensor: Traced, split_size_or_sections: Any, dim: int = 0) -> tuple[Traced, ...]:
    axis = _dim(tensor, dim)
    whole = tensor.places.shape[axis]
    sizes = split_size_or_sections
    if isinstance(sizes, int):
        sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)]
    made, start = [], 0
    for size in sizes:
        made.append(Traced.of(cut(tensor.places, axis, start, start + size)))
        start += size
    return tuple(made)


def _chunk(tensor: Traced, chunks: int, dim: int = 0) -> tuple[Traced, ...]:
    return _split(tensor, -(-tensor.places.shape[_dim(tensor, dim)] // chunks), dim)


def _squeeze(tensor: Traced, dim: int | None = None) -> Traced:
    places = tensor.places
    axes = [i for i, size in enumerate(places.shape) if size == 1] if dim is None else [_dim(tensor, dim)]
    for axis in reversed(axes):
        if places.shape[axis] == 1:
            places = without_axis(places, axis)
    return Traced.of(places)


def _unsqueeze(tensor: Traced, dim: int) -> Traced:
    return Traced.of(with_axis(tensor.places, dim % (len(tensor.places.shape) + 1)))


def _reshape(tensor: Traced, *shape: Any) -> Traced:
    return Traced.of(reshaped(tensor.places, _sizes(shape)))


def _flatten(tensor: Traced, start_dim: int = 0, end_dim: int = -1) -> Traced:
    first, last = _dim(tensor, start_dim), _dim(tensor, end_dim)
    shape = tensor.places.shape
    return Traced.of(reshaped(tensor.places, (*shape[:first], prod(shape[first : last + 1]), *shape[last + 1 :])))


def _item(tensor: Traced, key: Any) -> Traced:
    places, axis = tensor.places, 0
    for one in key if isinstance(key, tuple) else (key,):
        if isinstance(one, bool) or not isinstance(one, int | slice):
            raise NotTracedError(f"indexing with {type(one).__name__}")
        size = places.shape[axis]
        if isinstance(one, int):
            places = without_axis(cut(places, axis, one % size, one % size + 1), axis)
            continue
        start, stop, step = one.indices(size)
        if step != 1:
            raise NotTracedError("a slice with a step")
        places, axis = cut(places, axis, start, stop), axis + 1
    return Traced.of(places)


_RULES: dict[str, Callable[..., Any]] = {
    "contiguous": _same,
    "clone": _same,
    "detach": _same,
    "to": _same,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "t": lambda tensor: _transpose(tensor, 0, 1),
    "permute": _permute,
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "stack": _stack,
    "split": _split,
    "chunk": _chunk,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "reshape": _reshape,
    "view": _reshape,
    "flatten": _flatten,
    "__getitem__": _item,
}

#: What may be asked of a tensor without moving an entry.
_FACTS = frozenset({"__get__", "size", "dim", "numel", "is_contiguous", "__len__", "__repr__", "element_size", "ndimension"})
