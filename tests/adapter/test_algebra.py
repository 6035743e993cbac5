"""The algebra of adapters is that of the dense matrices they stand for: checked in float64, on random small adapters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdbank.adapter.components import Component, Free, InBank, bands_of, indices_of
from svdbank.adapter.model import Adapter, combination
from svdbank.adapter.weights import AdaptedWeight, BaseWeight, check_bases
from svdbank.core.errors import OptionError, WrongBaseError

OUT, IN, STORED = 20, 15, 12

#: Each operation rounds to float32 once, 6e-8 of its operands; a handful of operations stays below this.
ROUNDING = 1e-6

BASIS = torch.linalg.qr(torch.randn(OUT, OUT, generator=torch.Generator().manual_seed(7), dtype=torch.float64))[0].float()


def dense(adapter: Adapter) -> dict[str, Tensor]:
    """Every ΔW in float64 from the factors of every component, without the code under test."""
    return {
        key: sum(
            (c.factors[1].double() @ c.factors[0].double() for c in weight.components.values()), torch.zeros(OUT, IN).double()
        )
        for key, weight in adapter.weights.items()
    }


def size(matrices: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(matrix.square().sum()) for matrix in matrices.values()))


def close(adapter: Adapter, expected: dict[str, Tensor], *, scale: float) -> bool:
    found = dense(adapter)
    keys = found.keys() | expected.keys()
    zero = torch.zeros(OUT, IN).double()
    return size({key: found.get(key, zero) - expected.get(key, zero) for key in keys}) <= ROUNDING * max(scale, 1e-30)


@st.composite
def components(draw: st.DrawFn) -> Component:
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        indices = draw(st.sets(st.integers(0, STORED - 1), min_size=1, max_size=6))
        bands = bands_of(indices)
        rows = list(indices_of(bands))
        return InBank(bands, torch.randn(len(rows), IN, generator=generator), BASIS[:, rows])
    rank = draw(st.integers(1, 5))
    return Free(torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator))


@st.composite
def adapters(draw: st.DrawFn, names: tuple[str, ...] = ("one", "two")) -> Adapter:
    keys = draw(st.sets(st.sampled_from(["q", "k", "v"]), min_size=1))
    weights = {}
    for key in sorted(keys):
        own = draw(st.sets(st.sampled_from(names), min_size=1))
        weights[key] = AdaptedWeight(OUT, IN, {name: draw(components()) for name in sorted(own)})
    return Adapter(weights)


quick = settings(max_examples=25, deadline=None, derandomize=True)


@quick
@given(adapters(), adapters(), st.floats(-3, 3), st.floats(-3, 3))
def test_linear_combinations_are_those_of_the_dense_matrices(a: Adapter, b: Adapter, x: float, y: float) -> None:
    A, B = dense(a), dense(b)
    zero = torch.zeros(OUT, IN).double()
    expected = {key: x * A.get(key, zero) + y * B.get(key, zero) for key in A.keys() | B.keys()}
    scale = 3 * (size(A) + size(B))
    assert close(x * a + y * b, expected, scale=scale)
    assert close(combination([(x, a), (y, b)], name="merged"), expected, scale=scale)
    assert close(x * a - (-y) * b, expected, scale=scale)
    negative = -a
    assert close(-negative, A, scale=scale)


@quick
@given(adapters(), adapters())
def test_norms_and_inner_products_are_those_of_the_dense_matrices(a: Adapter, b: Adapter) -> None:
    A, B = dense(a), dense(b)
    product = sum(float((A[key] * B[key]).sum()) for key in A.keys() & B.keys())
    assert a.inner(b) == pytest.approx(product, abs=ROUNDING * size(A) * size(B))
    assert a.norm() == pytest.approx(size(A), rel=ROUNDING)
    assert a.cosine(b) == pytest.approx(product / (size(A) * size(B)), abs=ROUNDING)


@quick
@given(adapters())
def test_coefficients_alone_have_the_norm_of_the_matrix(a: Adapter) -> None:
    """Isometry: the basis is orthonormal to float32 rounding."""
    for weight in a.weights.values():
        total = weight.total()
        if isinstance(total, InBank):
            assert float(total.C.double().norm()) == pytest.approx(float(weight.delta().double().norm()), rel=ROUNDING)


@quick
@given(adapters(names=("law", "law2")), adapters(names=("med",)))
def test_dropping_what_was_stacked_gives_the_rest_to_the_bit(law: Adapter, med: Adapter) -> None:
    rest = (law + med).drop("med")
    assert rest.names == law.names and rest.weights.keys() == law.weights.keys()
    for key, weight in law.weights.items():
        assert torch.equal(rest.weights[key].delta(), weight.delta())
    assert all(torch.equal((law + med).only("med").delta(key), med.delta(key)) for key in med.weights)


@quick
@given(adapters(names=("law",)), adapters(names=("med",)), st.floats(-2, 2))
def test_scaling_one_component_leaves_the_other(law: Adapter, med: Adapter, factor: float) -> None:
    L, M = dense(law), dense(med)
    zero = torch.zeros(OUT, IN).double()
    expected = {key: factor * L.get(key, zero) + M.get(key, zero) for key in L.keys() | M.keys()}
    assert close((law + med).scaled("law", factor), expected, scale=2 * (size(L) + size(M)))


@quick
@given(adapters(), st.integers(1, 8))
def test_truncation_is_the_best_approximation_of_its_rank(a: Adapter, rank: int) -> None:
    """Eckart–Young: no matrix of that rank is nearer, and the error is the tail of the dense spectrum."""
    cut = a.truncate(rank)
    for key, matrix in dense(a).items():
        sigma = torch.linalg.svdvals(matrix)
        found = dense(cut)[key]
        assert int((torch.linalg.svdvals(found) > 1e-5 * sigma[0]).sum()) <= rank
        tail = float(sigma[rank:].norm())
        assert float((matrix - found).norm()) == pytest.approx(tail, abs=ROUNDING * float(sigma.norm()))
        mine = a.spectrum()[key]
        assert torch.allclose(mine[: len(sigma)], sigma[: len(mine)], atol=ROUNDING * float(sigma[0]), rtol=0)


@quick
@given(adapters(), st.integers(2, 6))
def test_truncations_nest(a: Adapter, rank: int) -> None:
    smaller = a.truncate(rank - 1)
    assert close(a.truncate(rank).truncate(rank - 1), dense(smaller), scale=10 * a.norm())


def test_the_sum_stays_on_the_union_of_the_bands_and_its_rank_grows_only_by_new_directions() -> None:
    def one(start: int, stop: int) -> Adapter:
        C = torch.ones(stop - start, IN)
        return Adapter({"q": AdaptedWeight(OUT, IN, {"x": InBank(((start, stop),), C, BASIS[:, start:stop])})})

    assert (one(0, 4) + one(0, 4)).rank == 4
    assert (one(0, 4) + one(2, 6)).bands("q") == ((0, 6),)
    apart = one(0, 4) + one(8, 10)
    assert apart.bands("q") == ((0, 4), (8, 10)) and apart.rank == 6
    assert one(0, 4).inner(one(8, 10)) == 0.0


def test_directions_that_differ_in_rounding_are_not_mixed_up() -> None:
    """The same index, once as bfloat16 left it: the sum is exact, on factors of its own."""
    C = torch.randn(3, IN, generator=torch.Generator().manual_seed(1))
    exact = Adapter({"q": AdaptedWeight(OUT, IN, {"x": InBank(((0, 3),), C, BASIS[:, :3])})})
    rounded = BASIS[:, :3].bfloat16().float()
    other = Adapter({"q": AdaptedWeight(OUT, IN, {"x": InBank(((0, 3),), C, rounded, orthonormal=False)})})
    total = exact + other
    assert isinstance(total.weights["q"].total(), Free) and total.rank == 6
    assert close(total, {"q": (BASIS[:, :3].double() + rounded.double()) @ C.double()}, scale=total.norm())
    assert other.norm() == pytest.approx(float((rounded.double() @ C.double()).norm()), rel=1e-12)


def test_other_bases_are_refused_with_exit_code_12() -> None:
    free = Free(torch.ones(1, IN), torch.ones(OUT, 1))
    one = Adapter({"q": AdaptedWeight(OUT, IN, {"x": free}, source=BaseWeight("q.weight", "aa"))})
    other = Adapter({"q": AdaptedWeight(OUT, IN, {"x": free}, source=BaseWeight("q.weight", "bb"))})
    wider = Adapter({"q": AdaptedWeight(OUT, IN + 1, {"x": Free(torch.ones(1, IN + 1), torch.ones(OUT, 1))})})
    unknown = Adapter({"q": AdaptedWeight(OUT, IN, {"x": free})})
    for wrong in (other, wider):
        with pytest.raises(WrongBaseError) as caught:
            one + wrong
        assert caught.value.exit_code == 12
    with pytest.raises(WrongBaseError):
        combination([(1.0, one), (1.0, unknown), (1.0, other)])
    assert (unknown + one).weights["q"].source == BaseWeight("q.weight", "aa")


def test_what_cannot_be_meant_is_refused() -> None:
    adapter = Adapter({"q": AdaptedWeight(OUT, IN, {"x": Free(torch.ones(1, IN), torch.ones(OUT, 1))})})
    for call in (
        lambda: adapter.drop("y"),
        lambda: adapter.drop("x"),
        lambda: adapter * math.nan,
        lambda: adapter.truncate(0),
        lambda: adapter.delta("k"),
        lambda: combination([]),
    ):
        with pytest.raises(OptionError):
            call()


def named(*keys: str, seed: int = 0, sha256: str | None = None) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {key: Free(torch.randn(2, IN, generator=generator), torch.randn(OUT, 2, generator=generator)) for key in keys}
    source = None if sha256 is None else BaseWeight("weight", sha256)
    return Adapter({key: AdaptedWeight(OUT, IN, {"one": own}, source=source) for key, own in factors.items()})


def test_adapters_saved_from_a_model_and_from_the_model_around_it_add_up() -> None:
    bare, whole = named("layers.0.q", "layers.1.q"), named("model.layers.0.q", "lm_head", seed=1)
    renamed = {"model." + key: value for key, value in dense(bare).items()}
    for total in (bare + whole, whole + bare):
        assert set(total.weights) == {"model.layers.0.q", "model.layers.1.q", "lm_head"}
        expected = {key: renamed.get(key, 0) + dense(whole).get(key, 0) for key in total.weights}
        assert close(total, expected, scale=size(expected))
        assert any("called model.…" in note for note in total.notes)
    assert bare.inner(whole) == pytest.approx(float((renamed["model.layers.0.q"] * dense(whole)["model.layers.0.q"]).sum()))
    # Other layers, other modules: what stands before the number tells.
    assert set((named("layers.7.v") + whole).weights) == {"model.layers.7.v", "model.layers.0.q", "lm_head"}
    assert set((named("visual.blocks.0.q") + whole).weights) == {"visual.blocks.0.q", "model.layers.0.q", "lm_head"}
    with pytest.raises(WrongBaseError, match="different bases"):
        named("layers.0.q", sha256="a") + named("model.layers.0.q", sha256="b")


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_the_error_about_different_bases_says_whose_where_the_adapters_have_names(silent: int) -> None:
    """One of the three records no hash; the other two differ, wherever they stand."""
    weights = [named("q", sha256=None if i == silent else f"{i}").weights for i in range(3)]
    one, other = (name for i, name in enumerate(("law", "med", "fin")) if i != silent)
    with pytest.raises(WrongBaseError, match=rf"^{one} and {other} were made on different bases: q had other bytes$") as caught:
        check_bases(weights, ("law", "med", "fin"), hint="--rebase")
    assert caught.value.hint == "--rebase"
    with pytest.raises(WrongBaseError, match=r"^these adapters were made on different bases: q had other bytes$") as caught:
        check_bases(weights)
    assert caught.value.hint == "adapter.rebase(bank) carries one over"
    check_bases([weights[silent], weights[silent - 1]])


def test_one_weight_of_two_shapes_is_of_two_models() -> None:
    small = {"q": AdaptedWeight(OUT, IN, {}), "k": AdaptedWeight(OUT, IN, {})}
    large = {"k": AdaptedWeight(OUT, IN, {}), "q": AdaptedWeight(OUT + 1, IN, {})}
    with pytest.raises(
        WrongBaseError, match=rf"^q is \({OUT}, {IN}\) in law and \({OUT + 1}, {IN}\) in med: they belong to different"
    ):
        check_bases([small, large], ["law", "med"])
    with pytest.raises(
        WrongBaseError, match=rf"^q is \({OUT}, {IN}\) in one adapter and \({OUT + 1}, {IN}\) in another: they belong"
    ):
        check_bases([small, large])


def test_modules_that_could_be_either_of_two_are_refused() -> None:
    both = named("text.layers.0.q", "image.layers.0.q")
    with pytest.raises(OptionError, match=r"under image\. and text\."):
        both + named("layers.0.q")
