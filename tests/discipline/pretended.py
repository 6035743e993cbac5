"""A CUDA device for machines without one: it computes on the CPU, keeps the rules of a device and counts what would cost time there.

A tensor on it is a wrapper around a CPU tensor. Its ``device`` says ``cuda``; underneath, torch's C++ takes it for one on ``meta``, which
nothing there tries to read. (A wrapper that is ``cuda`` in C++ as well fails at in-place slices, and starts CUDA at the first factory.)
Every operation on one comes through :meth:`PretendedDevice.run`, which raises where

- a tensor of the CPU with dimensions meets one of the device (:class:`TwoDevicesMet`);
- a result is brought to the host by a function that is not on the list of those that may (:class:`BroughtToHost`);
- float64 is asked of a device that has none (:class:`NoFloat64`), where the device was made so.

What is counted, between :meth:`PretendedDevice.counting`'s begin and end: operations that would launch a kernel or several; products with
their flops; the heavier routines by name; synchronisations by the place that asked for them; bytes that cross over. Threads that are
started meanwhile are held to the same rules, and counted with the rest.

Everything has happened when the next line runs: it cannot see one stream that does not wait for another. It knows no graphs, events or
random generators of a device, and takes no notice of memory.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten

#: Packages whose functions can be places; torch itself never is one.
PACKAGES = ("svdbank", "peft", "transformers", "accelerate")
#: Makes room or looks at it: no kernel.
ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "_linalg_check_errors",
    "_local_scalar_dense",
    "is_same_size",
    "lift_fresh",
    "resize_",
}
#: Routines that read a result on the host before they return, whoever calls them: status words, sizes of what was found.
SYNCHRONISING = {
    "_local_scalar_dense",
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "linalg_eig",
    "linalg_lstsq",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
}
#: What is worth a line of its own in a table.
ROUTINES = {
    "linalg_cholesky_ex": "cholesky",
    "cholesky_inverse": "inverse",
    "linalg_inv_ex": "inverse",
    "linalg_solve_triangular": "triangular",
    "triangular_solve": "triangular",
    "linalg_qr": "qr",
    "_linalg_eigh": "eigh",
    "_linalg_svd": "svd",
}


class IndisciplineError(AssertionError):
    """Something that a device forbids, or that costs too much on one. No code under test catches it."""


class TwoDevicesMet(IndisciplineError):  # noqa: N818 - the names say what happened
    pass


class BroughtToHost(IndisciplineError):  # noqa: N818
    pass


class NoFloat64(IndisciplineError):  # noqa: N818
    pass


@dataclass
class Counts:
    """What a piece of work would have cost on the device. ``syncs`` are by place; bytes are of copies in either direction."""

    launches: int = 0
    products: int = 0
    flops: int = 0
    routines: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    to_device: int = 0
    to_host: int = 0

    @property
    def synchronisations(self) -> int:
        return self.syncs.total()

    def row(self, label: str) -> str:
        """One line of a table under :data:`HEADING`."""
        routines = " ".join(f"{name} {count}" for name, count in sorted(self.routines.items()))
        figures = f"{self.launches:9d} {self.products:9d} {self.flops / 1e9:8.2f} {self.synchronisations:6d}"
        return f"{label:28s} {figures} {self.to_device / 1e6:8.2f} {self.to_host / 1e6:8.2f}  {routines}"


HEADING = f"{'':28s} {'launches':>9s} {'products':>9s} {'GFLOP':>8s} {'syncs':>6s} {'MB in':>8s} {'MB out':>8s}  routines"


class OnDevice(torch.Tensor):
    """A tensor of the pretended device; ``inner`` holds its values."""

    inner: Tensor
    owner: PretendedDevice
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, owner: PretendedDevice) -> OnDevice:
        outer = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="meta",
            requires_grad=False,
        )
        outer.inner, outer.owner = inner, owner
        return outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = next(value.owner for value in tree_flatten((args, kwargs))[0] if isinstance(value, OnDevice))
        return owner.run(func, args, kwargs or {})

    device = property(lambda self: torch.device("cuda", 0))
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = self.detach().clone()
        if getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied


class PretendedDevice:
    """The rules and the counts; a context in which ``cuda`` means this device.

    ``allowed`` maps the places that may bring results to the host, ``module:function``, to the reason. ``float64``: whether it has any.
    ``strict`` off: what is not allowed is written down in ``found`` instead of raised.
    """

    def __init__(self, allowed: Mapping[str, str], *, float64: bool = True, strict: bool = True) -> None:
        self.allowed = allowed
        self.float64 = float64
        self.strict = strict
        self.found: Counter[str] = Counter()
        self.counts = Counts()
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ in and out

    def put(self, value: Tensor) -> OnDevice:
        """A copy of a CPU tensor on the device."""
        self._crossed("to_device", value)
        return self._wrapped(value.detach().clone())

    def put_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Every parameter and buffer of a model, tied ones staying tied."""
        moved: dict[int, Any] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.device.type != "meta":
                    if id(parameter) not in moved:
                        moved[id(parameter)] = torch.nn.Parameter(self.put(parameter.data), parameter.requires_grad)
                    module._parameters[name] = moved[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = self.put(buffer)
        return model

    def scalar(self, value: Any, dtype: torch.dtype | None = None) -> Any:
        """A number as a tensor without dimensions, where torch's C++ would make one on ``meta`` and lose it."""
        return self._wrapped(torch.tensor(value, dtype=dtype)) if isinstance(value, bool | int | float) else value

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Counts of what happens inside, also in threads."""
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = before

    @contextmanager
    def present(self) -> Iterator[PretendedDevice]:
        """``cuda`` means this device, in this thread and those started inside."""
        start = threading.Thread.run

        def run(thread: threading.Thread) -> None:
            with _Interception(self):
                start(thread)

        def plain_type(value: Any) -> type:
            if not isinstance(value, OnDevice):
                return type(value)
            return torch.nn.Parameter if getattr(value, "_is_param", False) else torch.Tensor

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading.Thread, "run", run)
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "device_count", lambda: 1)
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
            patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
            patch.setattr(torch.cuda, "get_device_name", lambda *_: "pretended")
            patch.setattr(torch.cuda, "mem_get_info", lambda *_: (64 * 2**30, 80 * 2**30))
            patch.setattr(torch.cuda, "empty_cache", lambda: None)
            patch.setattr(torch.cuda, "synchronize", lambda *_: self._synchronised("synchronize"))
            patch.setattr(torch.cuda, "Stream", lambda *_, **__: _Stream(self))
            patch.setattr(torch.cuda, "Event", _Event)
            patch.setattr(torch.cuda, "current_stream", lambda *_: _Stream(self))
            patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
            # A tensor of a real device is a plain one, to code that asks for its type.
            for name in ("svdbank.core.probe", "svdbank.peft.layers"):
                if name in sys.modules:
                    patch.setattr(sys.modules[name], "type", plain_type, raising=False)
            with _Interception(self):
                yield self

    # ------------------------------------------------------------------ the rules

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation with at least one tensor of the device among its arguments."""
        name = func._schema.name.partition("::")[2]
        if name == "copy_":
            return self._copy(args[0], args[1])
        if name == "_to_copy" and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return self.fetch(args[0].inner).to(kwargs.get("dtype") or args[0].dtype)
        values, _ = tree_flatten((args, kwargs))
        tensors = [value for value in values if isinstance(value, Tensor)]
        outer = {id(value.inner): value for value in tensors if isinstance(value, OnDevice)}
        strangers = [value for value in tensors if not isinstance(value, OnDevice) and value.ndim > 0]
        lost = [value for value in tensors if not isinstance(value, OnDevice) and value.device.type == "meta"]
        if lost and name != "_has_compatible_shallow_copy_type":
            raise IndisciplineError(f"{name}: a tensor without values, on meta, at {_place()}")
        # An index may lie on the CPU: torch copies it, and waits for the copy.
        if strangers and name not in ("index", "index_put", "index_put_"):
            raise TwoDevicesMet(
                f"{name}: tensors of shapes {[tuple(v.shape) for v in strangers]} lie on the CPU, at {_place()}"
            )
        if name in ("index", "index_put", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self._synchronised(f"{name} by a mask")
        elif strangers or name in SYNCHRONISING:
            self._synchronised(name)
        inner_args, inner_kwargs = tree_map(lambda v: v.inner if isinstance(v, OnDevice) else v, (args, kwargs))
        if inner_kwargs.get("device") is not None:
            inner_kwargs["device"] = torch.device("cpu")
        inner_kwargs.pop("driver", None)  # of cuSOLVER, which the CPU has not
        result = func(*inner_args, **inner_kwargs)
        self._count(func, name, inner_args, result)
        return tree_map(lambda v: self._returned(v, outer, name), result)

    def fetch(self, inner: Tensor) -> Tensor:
        """A copy for the host, if whoever asks may have one."""
        self._crossed("to_host", inner)
        self._synchronised("copy to the CPU")
        return inner.clone()

    def _copy(self, target: Tensor, source: Tensor) -> Tensor:
        if not isinstance(target, OnDevice):
            assert isinstance(source, OnDevice)
            return target.copy_(self.fetch(source.inner))
        if isinstance(source, OnDevice):
            source = source.inner
            with self._lock:
                self.counts.launches += 1
        elif source.device.type == "meta":
            raise IndisciplineError(f"copy_: a tensor without values, on meta, at {_place()}")
        else:
            self._crossed("to_device", source)
        target.inner.copy_(source)
        return target

    def _returned(self, value: Any, outer: dict[int, OnDevice], name: str) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = outer.get(id(value))
        if known is None:
            return self._wrapped(value)
        assert known.shape == value.shape, f"{name} changed the shape of its argument, which a pretended tensor cannot"
        return known

    def _wrapped(self, inner: Tensor) -> OnDevice:
        if not self.float64 and inner.dtype in (torch.float64, torch.complex128):
            raise NoFloat64(f"a float64 tensor of shape {tuple(inner.shape)} at {_place()}")
        return OnDevice(inner, self)

    def _synchronised(self, what: str) -> None:
        place = _place()
        if place is None:  # the test itself looks
            return
        with self._lock:
            self.counts.syncs[place] += 1
        if place in self.allowed:
            return
        if self.strict:
            raise BroughtToHost(f"{what} at {place}, which is not on the list of places that may")
        with self._lock:
            self.found[f"{place} ({what})"] += 1

    def _crossed(self, way: str, value: Tensor) -> None:
        with self._lock:
            setattr(self.counts, way, getattr(self.counts, way) + value.numel() * value.element_size())

    def _count(self, func: Any, name: str, args: Any, result: Any) -> None:
        returns = func._schema.returns
        view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        with self._lock:
            self.counts.launches += not (view or name in ALLOCATIONS)
            if name in ROUTINES:
                self.counts.routines[ROUTINES[name]] += 1
            flops = _flops(name, args)
            self.counts.products += flops > 0
            self.counts.flops += flops


class _Event:
    """What was copied has been copied."""

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Stream:
    """A stream on which everything has happened already."""

    def __init__(self, device: PretendedDevice) -> None:
        self._device = device

    def wait_stream(self, other: _Stream) -> None:
        pass

    def synchronize(self) -> None:
        self._device._synchronised("synchronize")


class _Interception(TorchFunctionMode):
    """What must not reach torch's C++, which would look for CUDA: factories on the device, and moves to it and from it."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self._device, func, args, kwargs)
        if not _is_cuda(kwargs.get("device")):
            return func(*args, **kwargs)
        del kwargs["device"]
        if any(isinstance(value, OnDevice) for value in tree_flatten((args, kwargs))[0]):
            return func(*args, **kwargs)  # of the device already: empty_like, new_zeros …
        if kwargs.get("generator") is not None:
            raise TwoDevicesMet(f"{func.__name__}: the generator is of the CPU, at {_place()}")
        requires_grad = kwargs.pop("requires_grad", False)
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            return self._device.put(func(*args, device="cpu", **kwargs)).requires_grad_(requires_grad)
        made = self._device._wrapped(func(*args, device="cpu", **kwargs))
        with self._device._lock:
            self._device.counts.launches += not func.__name__.startswith("empty")
        return made.requires_grad_(requires_grad)


def _to(device: PretendedDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    value, *rest = args
    target = kwargs.pop("device", None)
    if rest and isinstance(rest[0], Tensor):
        target, rest = rest[0].device, [rest[0].dtype, *rest[1:]]
    elif rest and isinstance(rest[0], str | torch.device | int):
        target, rest = rest[0], rest[1:]
    if target is None or (isinstance(value, OnDevice) and _is_cuda(target)):
        return func(value, *rest, **kwargs) if rest or kwargs else value
    if isinstance(value, OnDevice):
        if torch.device(target).type == "meta":
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return func(device.fetch(value.inner), *rest, **kwargs)
    if not _is_cuda(target):
        return func(value, torch.device(target), *rest, **kwargs)
    if value.device.type == "meta":
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    moved = device.put(value)  # cast afterwards: there, as torch does
    return func(moved, *rest, **kwargs) if rest or kwargs else moved


def _cpu(device: PretendedDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return device.fetch(args[0].inner) if isinstance(args[0], OnDevice) else func(*args, **kwargs)


def _cuda(device: PretendedDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args[0] if isinstance(args[0], OnDevice) else device.put(args[0])


def _tolist(device: PretendedDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return device.fetch(args[0].inner).tolist() if isinstance(args[0], OnDevice) else func(*args, **kwargs)


def _numpy(device: PretendedDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], OnDevice):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")  # torch's own words
    return func(*args, **kwargs)


def _new_tensor(device: PretendedDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], OnDevice):
        return func(*args, **kwargs)
    kwargs.pop("device", None)
    return device.put(func(args[0].inner, *args[1:], **kwargs))


def _set_data(device: PretendedDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    value, other = args
    if isinstance(value, OnDevice) and isinstance(other, OnDevice):
        value.inner = other.inner
    elif isinstance(value, OnDevice) or isinstance(other, OnDevice):
        raise NotImplementedError(
            f"torch lets .data bring a tensor to another device, a pretended one cannot follow, at {_place()}"
        )
    return func(*args, **kwargs)


def _where(device: PretendedDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if not isinstance(args[0], OnDevice):
        return func(*args, **kwargs)
    return func(*(device.scalar(value) for value in args), **kwargs)


def _get_item(device: PretendedDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    target, index = args
    return func(target, _index(index) if isinstance(target, OnDevice) else index, **kwargs)


def _set_item(device: PretendedDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    target, index, value = args
    if not isinstance(target, OnDevice):
        return func(*args, **kwargs)
    return func(target, _index(index), device.scalar(value, target.dtype), **kwargs)


def _index(index: Any) -> Any:
    """Lists of numbers as tensors of the CPU, where torch's C++ would make some on ``meta``."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _pin_memory(device: PretendedDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args[0]


_SPECIAL: dict[Any, Callable[[PretendedDevice, Any, Any, dict[str, Any]], Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.tolist: _tolist,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _numpy,
    torch.Tensor.new_tensor: _new_tensor,
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.Tensor.pin_memory: _pin_memory,
    torch.Tensor.record_stream: lambda device, func, args, kwargs: None,
    torch.where: _where,
    torch.Tensor.__getitem__: _get_item,
    torch.Tensor.__setitem__: _set_item,
}


def _is_cuda(device: Any) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return device is not None and torch.device(device).type == "cuda"


def _place() -> str | None:
    """The function that asks: the innermost frame of :data:`PACKAGES`, or None where svdbank is nowhere above."""
    frame, found = sys._getframe(1), None
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        package = module.partition(".")[0]
        if found is None and package in PACKAGES:
            # Functions and comprehensions inside one count as part of it; which of them have a name of their own depends on the Python.
            found = f"{module}:{frame.f_code.co_qualname.partition('.<locals>')[0]}"
        if package == "svdbank":
            return found
        frame = frame.f_back
    return None


def _flops(name: str, args: Any) -> int:
    if name in ("mm", "bmm"):
        left, right = args[0], args[1]
    elif name in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
        left, right = args[1], args[2]
    else:
        return 0
    return int(2 * left.numel() * right.shape[-1])
