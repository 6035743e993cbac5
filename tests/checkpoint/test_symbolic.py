"""Traced tensors go through rearrangements as real ones do, and say where each entry came from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdbank.checkpoint.naming.symbolic import Arrangement, Joined, NotTracedError, Traced, cut, slices, stored, without_axis

STORED = {"a": torch.arange(24 * 6).reshape(24, 6), "b": torch.arange(1000, 1000 + 4 * 6 * 6).reshape(4, 6, 6)}

Rearrangement = Callable[[dict[str, Tensor]], Tensor | tuple[Tensor, ...]]


def entries(places: Arrangement) -> Tensor:
    """The values that lie at ``places`` of the stored tensors."""
    if isinstance(places, Joined):
        return torch.cat([entries(part) for part in places.parts], places.axis)
    factors = [factor for axis in places.axes for factor in axis]
    view = STORED[places.source].as_strided([size for size, _ in factors], [stride for _, stride in factors], places.offset)
    return view.reshape(places.shape)


def assert_followed(rearrange: Rearrangement) -> None:
    """The same entries come out, whether values or traced tensors go in."""
    wanted, traced = (
        rearrange(STORED),
        rearrange({name: Traced.of(stored(name, value.shape)) for name, value in STORED.items()}),
    )
    pairs = zip(*(value if isinstance(value, tuple) else (value,) for value in (wanted, traced)), strict=True)
    for value, other in pairs:
        assert isinstance(other, Traced) and other.shape == value.shape
        assert torch.equal(entries(other.places), value)


@pytest.mark.parametrize(
    "rearrange",
    [
        pytest.param(lambda s: s["a"].view(2, 2, 6, 6).transpose(1, 2).reshape(24, 6), id="permute-for-rope"),
        pytest.param(lambda s: s["a"].reshape(12, 2, 6).transpose(0, 1).reshape(24, 6), id="deinterleave"),
        pytest.param(lambda s: torch.chunk(s["a"], 3, dim=0), id="three-blocks"),
        pytest.param(lambda s: torch.split(s["a"], [4, 8, 12], dim=0), id="unequal-blocks"),
        pytest.param(lambda s: torch.chunk(s["a"], 5), id="a-last-block-that-is-shorter"),
        pytest.param(lambda s: torch.cat([s["a"], s["b"].reshape(-1, 6)])[20:30], id="rows-of-two"),
        pytest.param(lambda s: torch.stack([s["a"], s["a"]])[1], id="one-of-a-stack"),
        pytest.param(lambda s: torch.cat([s["b"], s["b"]], dim=1)[3], id="an-expert-of-two-halves"),
        pytest.param(lambda s: torch.cat([s["b"], s["b"]], dim=2).transpose(1, 2)[0], id="an-expert-stored-in-out"),
        pytest.param(lambda s: s["b"].permute(2, 0, 1)[1:3, 2], id="permute-and-slice"),
        pytest.param(lambda s: s["b"].unsqueeze(0).squeeze(0).flatten(1).contiguous(), id="axes-of-one"),
        pytest.param(lambda s: s["b"][-1].t().clone(), id="from-the-end"),
    ],
)
def test_entries_are_followed(rearrange: Rearrangement) -> None:
    assert_followed(rearrange)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_chain_of_rearrangements_is_followed_or_refused(data: st.DataObject) -> None:
    steps: list[Callable[[Tensor], Tensor]] = []

    def go(s: dict[str, Tensor]) -> Tensor:
        value = torch.cat([s["a"], s["a"]]) if two else s["b"]
        for step in steps:
            value = step(value)
        return value

    two = data.draw(st.booleans())
    value = go(STORED)
    for _ in range(data.draw(st.integers(1, 5))):
        axis, other = (data.draw(st.integers(0, value.dim() - 1)) for _ in range(2))
        size = value.shape[axis]
        kind = data.draw(st.sampled_from(["swap", "half", "factor", "flat", "select", "join"]))
        if kind == "swap":
            steps.append(lambda t, i=axis, j=other: t.transpose(i, j))  # type: ignore[misc]
        elif kind == "half" and size > 1:
            steps.append(lambda t, i=axis: torch.chunk(t, 2, dim=i)[-1])  # type: ignore[misc]
        elif kind == "factor" and size % 2 == 0:
            steps.append(lambda t, i=axis: t.reshape(*t.shape[:i], 2, t.shape[i] // 2, *t.shape[i + 1 :]))  # type: ignore[misc]
        elif kind == "flat" and axis + 1 < value.dim():
            steps.append(lambda t, i=axis: t.flatten(i, i + 1))  # type: ignore[misc]
        elif kind == "select" and axis == 0 and value.dim() > 1:
            steps.append(lambda t: t[-1])
        elif kind == "join":
            steps.append(lambda t, i=axis: torch.cat([t, t], dim=i))  # type: ignore[misc]
        value = go(STORED)
    with contextlib.suppress(
        NotTracedError
    ):  # a chain that no strided views can describe is said to be one, never answered wrongly
        assert_followed(go)


@pytest.mark.parametrize(
    "compute", [lambda t: t + 1, lambda t: t * t, lambda t: t.sum(), lambda t: t.float(), lambda t: t[::2], lambda t: t[t > 3]]
)
def test_what_is_no_rearrangement_is_refused_by_name(compute: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotTracedError, match=r"add|mul|sum|float|step|gt|indexing"):
        compute(Traced.of(stored("a", (24, 6))))


def test_slices_are_those_of_each_index_by_itself() -> None:
    one, two = (torch.stack([Traced.of(stored(f"{part}{e}", (4, 6))) for e in range(3)]) for part in "ab")
    for places in (torch.cat([one, two], dim=1).places, torch.cat([one, two], dim=0).places, stored("whole", (3, 4, 6))):
        each = [without_axis(cut(places, 0, e, e + 1), 0) for e in range(places.shape[0])]
        assert slices(places) == each
