"""What two adapters are to each other, in figures and in words."""

from __future__ import annotations

from collections.abc import Sequence

from svdbank.core.specs import Struct

#: A weight with a cosine below this has two adapters pulling against each other: unrelated ones of the sizes in use (rank 8 or more, inputs
#: of some hundred features) stay within ±0.05.
OPPOSED = -0.05

#: The same for adapters as a whole, where thousands of times more coefficients leave chance no room.
OPPOSED_IN_ALL = -0.02

#: Overlap and conflict below this are not worth a word: less than one part in a hundred of the adapters' size.
NEGLIGIBLE = 0.01


class Relation(Struct, frozen=True):
    """Two adapters in one place: a weight, a layer, or all.

    Attributes
    ----------
    where
        Weight or layer; empty for all.
    norms
        ‖ΔW‖ of the two, Frobenius, over the weights that both touch there.
    cosine
        ``⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖)``: what is added to or taken from the sum's size; ``agreement − conflict``.
    agreement, conflict
        The share of ``‖ΔW₁‖ ‖ΔW₂‖`` in products of coefficients of equal and of opposite sign. Conflict is what cancels in the sum: 0
        where the adapters stand on directions of their own, about 0.3 each for unrelated adapters on the same directions.
    overlap
        Share of both adapters' ``‖ΔW‖²`` (their geometric mean) that lies in output directions of the other.
    weights
        How many weights both touch there.
    """

    where: str
    norms: tuple[float, float]
    cosine: float
    agreement: float
    conflict: float
    overlap: float
    weights: int


class Pair(Struct, frozen=True):
    """Two adapters, in all, by layer and by weight; and what that means, in a sentence."""

    one: str
    other: str
    all: Relation
    layers: tuple[Relation, ...]
    weights: tuple[Relation, ...]
    verdict: str


def verdict(one: str, other: str, whole: Relation, layers: Sequence[Relation], weights: Sequence[Relation]) -> str:
    """Whether two adapters meet, agree or fight, and where, in a sentence."""
    names = f"{one} and {other}"
    if not weights:
        return f"{names} touch no weight in common"
    nothing = [name for name, norm in zip((one, other), whole.norms, strict=True) if not norm]
    if nothing:
        return f"{' and '.join(nothing)}: ΔW is zero there"
    against = sorted((relation for relation in weights if relation.cosine < OPPOSED), key=lambda relation: relation.cosine)
    worst = "".join(f"{r.where} (cosine {r.cosine:+.2f})" for r in against[:1])
    places = f"{len(against)} of {len(weights)} weights, most in {worst}"
    if whole.cosine < OPPOSED_IN_ALL:
        layer = min(layers, key=lambda relation: relation.cosine)
        where = "" if layer.where == "-" else f", most of all in layer {layer.where} ({layer.cosine:+.2f})"
        among = f"in {places}" if against else f"a little in many weights, in none below {OPPOSED:+.2f}"
        return f"{names} fight: they pull against each other as a whole (cosine {whole.cosine:+.2f}){where}; {among}"
    agree = whole.cosine > -OPPOSED_IN_ALL
    if against:
        return f"{names} fight in {places}" + (f"; as a whole they agree (cosine {whole.cosine:+.2f})" if agree else "")
    if whole.overlap < NEGLIGIBLE and whole.conflict < NEGLIGIBLE:
        return f"{names} do not meet: their outputs lie in directions of their own"
    how = "and agree there" if agree else "without pulling together or against each other"
    cancels = whole.conflict >= NEGLIGIBLE
    lost = f"coefficients of opposite sign cancel {whole.conflict:.0%}" if cancels else "nothing cancels"
    return f"{names} share directions ({whole.overlap:.0%} of their size) {how} (cosine {round(whole.cosine, 2) + 0.0:+.2f}); {lost}"
