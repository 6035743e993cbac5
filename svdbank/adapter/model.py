"""The adapter as a value: named components for each weight, with exact algebra.

Everything a component says is in :mod:`svdbank.adapter.components`, everything a weight says in :mod:`svdbank.adapter.weights`; this
module carries the arithmetic over all weights of a model and keeps the bases apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import msgspec
from torch import Tensor

from svdbank.adapter.components import Component, InBank, bands_of, combined, inner, scaled
from svdbank.adapter.documents import BaseIdentity
from svdbank.adapter.naming import common_prefixes
from svdbank.adapter.settings import LoraSettings
from svdbank.adapter.spectra import singular_values
from svdbank.adapter.weights import AdaptedWeight, check_bases, rebased, shares_in, united
from svdbank.adapter.whole import WholeTensors, summed
from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError


@dataclass(frozen=True, eq=False)
class Adapter:
    """A set of small changes to the weights of one base model. Immutable: every operation gives a new one.

    Attributes
    ----------
    weights
        By the module's path in the model; an expert's weight is ``<path of the parameter>.<number>``.
    base
        The base model, with the digest that a folder records of it. What touches other weights than the folder carries none.
    method
        What the adapter was made as: ``mica``, ``milora``, ``pissa`` or ``lora``.
    settings
        The config it was read with: task type, dropout and the like are written again, ranks and scales follow from the components.
    notes
        What a reader should know, in sentences: a cache that contradicts its tensors, a base that could not be compared.
    whole
        What it brings along whole: trained modules that replace the model's, and the base beneath adapted embeddings. Sums take the
        first along as ``W₀ + Σ wᵢ (Wᵢ − W₀)`` where W₀ is known, or where that needs none; what looks at ΔW alone refuses them.
    """

    weights: Mapping[str, AdaptedWeight]
    base: BaseIdentity = field(default_factory=BaseIdentity)
    method: str = "lora"
    settings: LoraSettings = field(default_factory=lambda: LoraSettings(r=1, lora_alpha=1))
    notes: tuple[str, ...] = ()
    whole: WholeTensors = field(default_factory=WholeTensors)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the components, in the order they came, also where no weight has all of them."""
        found: list[str] = []
        for weight in self.weights.values():
            place = 0
            for name in weight.components:
                if name not in found:
                    found.insert(place, name)
                place = found.index(name) + 1
        return tuple(found)

    @property
    def rank(self) -> int:
        """Largest rank of any weight, as bounded by the components."""
        return max((weight.total().max_rank for weight in self.weights.values()), default=0)

    def __repr__(self) -> str:
        return f"Adapter({self.method}: {len(self.weights)} weights, rank {self.rank}, {' + '.join(self.names) or 'empty'})"

    def delta(self, module: str) -> Tensor:
        """``ΔW`` (out, in) of one weight, float32. Raises :class:`OptionError` for a weight that the adapter does not touch."""
        return self._weight(module).delta()

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """``A`` (k, in) and ``B`` (out, k), float32, with ``ΔW = B A``: every scale is in A."""
        return self._weight(module).total().factors

    def _weight(self, module: str) -> AdaptedWeight:
        try:
            return self.weights[module]
        except KeyError:
            raise OptionError(f"the adapter does not touch {module!r}", hint="Adapter.weights lists what it touches") from None

    # Linear combinations

    def __add__(self, other: Adapter) -> Adapter:
        """The sum. Components of the same name add up; others stay apart, so that they can be dropped or scaled later."""
        return combination([(1.0, self), (1.0, other)])

    def __sub__(self, other: Adapter) -> Adapter:
        return combination([(1.0, self), (-1.0, other)])

    def __neg__(self) -> Adapter:
        return -1.0 * self

    def __mul__(self, factor: float) -> Adapter:
        if not isinstance(factor, int | float) or not math.isfinite(factor):
            raise OptionError(f"an adapter is scaled by a finite number, not {factor!r}")
        changed = self._each(lambda _, component: scaled(component, factor))
        return replace(changed, whole=summed([(factor, self.whole)]))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Adapter:
        return self * (1.0 / divisor)

    def scaled(self, name: str, factor: float) -> Adapter:
        """One component multiplied by ``factor``, the others as they are."""
        self._check(name)
        if not math.isfinite(factor):
            raise OptionError(f"a component is scaled by a finite number, not {factor!r}")
        if factor != 1:
            self.whole.refuse_replacing(self, f"which of them are of {name!r} is not known")
        return self._each(lambda own, component: scaled(component, factor) if own == name else component)

    def drop(self, name: str) -> Adapter:
        """Without one component; weights that only it touched are left out. Raises :class:`OptionError` for the last one."""
        self._check(name)
        if self.names == (name,):
            raise OptionError(
                f"{name!r} is the only component: nothing would be left", hint=f"there are: {', '.join(self.names)}"
            )
        return self._chosen(lambda own: own != name)

    def only(self, name: str) -> Adapter:
        """One component alone."""
        self._check(name)
        return self._chosen(lambda own: own == name)

    def named(self, name: str) -> Adapter:
        """All components of a weight added up into one called ``name``: what a merge is, and what can no longer be taken apart."""
        return self._weights({key: replace(w, components={name: w.total()}) for key, w in self.weights.items()})

    # Measures

    def inner(self, other: Adapter) -> float:
        """``⟨ΔW₁, ΔW₂⟩`` summed over the weights that both touch, from coefficients or factors, and ``W − W₀`` of whole tensors.

        Raises :class:`OptionError` for whole tensors whose W₀ is not known, and where one holds whole what the other has factors of.
        """
        one, two = aligned([self, other])
        check_bases([one.weights, two.weights])
        check_kinds([one, two])
        shared = [key for key in one.weights if key in two.weights]
        mine, theirs = one.whole.differences(self), two.whole.differences(other)
        whole = [float((mine[name] * theirs[name]).sum()) for name in mine if name in theirs]
        return math.fsum([*(inner(one.weights[key].total(), two.weights[key].total()) for key in shared), *whole])

    def norm(self) -> float:
        """Frobenius norm over all weights."""
        return math.sqrt(max(0.0, self.inner(self)))

    def cosine(self, other: Adapter) -> float:
        """``⟨a, b⟩ / (‖a‖ ‖b‖)``; 0 where one of them is zero."""
        size = self.norm() * other.norm()
        return self.inner(other) / size if size else 0.0

    def spectrum(self) -> dict[str, Tensor]:
        """Singular values of each ``ΔW``, float64, descending."""
        return {key: singular_values(weight.total()) for key, weight in self.weights.items()}

    def truncate(self, rank: int) -> Adapter:
        """The best approximation of rank ``rank`` of every weight (Eckart–Young, by an SVD of a small matrix).

        Its squared error in a weight is the sum of the squares of the singular values left out (:meth:`spectrum`). The components of a
        weight that is cut become one, named after all of them.
        """
        if rank < 1:
            raise OptionError(f"rank {rank} is not positive", hint="drop the adapter instead")
        return self._weights({key: weight.truncated(rank) for key, weight in self.weights.items()})

    def share_in(self, bank: Bank) -> dict[str, float]:
        """Share of ``‖ΔW‖²`` of each weight that lies in the directions which ``bank`` stores; 1 where ``ΔW`` is zero.

        Raises :class:`BankError` for weights that the bank lacks.
        """
        return shares_in(bank, self.weights)

    def rebase(self, bank: Bank, *, minimum_share: float = 1 - 1e-6, force: bool = False) -> Adapter:
        """Carried over to the directions of another bank, ``C' = U'ᵀ ΔW``: of another machine, or of a changed base.

        Each component stays in its bands where they keep ``minimum_share`` of its ``‖ΔW‖²``, else it is projected on all that the bank
        stores. The share kept is in the notes. Raises :class:`OptionError` where a weight keeps less than ``minimum_share``, unless
        ``force``; :class:`BankError` for weights that the bank lacks.
        """
        self.whole.refuse_replacing(self, "they are of the base they were trained on")
        if self.whole.beneath:
            raise OptionError(
                f"{self}: holds the base's own {next(iter(self.whole.beneath))}.base_layer.weight, which is not another base's",
                hint="leave embedding and head out of the adapter, or start from the other base",
            )
        weights, base, note = rebased(bank, self.weights, minimum_share, force=force)
        return replace(self, weights=weights, base=base, notes=(*self.notes, note))

    def bands(self, module: str) -> tuple[tuple[int, int], ...]:
        """The bands of the bank that the adapter uses in one weight, ascending; of components that are in a bank."""
        components = self._weight(module).components.values()
        return bands_of(index for c in components if isinstance(c, InBank) for index in c.indices)

    # What is behind it

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise OptionError(f"there is no component {name!r}", hint=f"there are: {', '.join(self.names)}")

    def _each(self, change: Callable[[str, Component], Component]) -> Adapter:
        return self._weights(
            {
                key: replace(weight, components={name: change(name, c) for name, c in weight.components.items()})
                for key, weight in self.weights.items()
            }
        )

    def _chosen(self, wanted: Callable[[str], bool]) -> Adapter:
        chosen = {}
        for key, weight in self.weights.items():
            components = {name: c for name, c in weight.components.items() if wanted(name)}
            if components:
                chosen[key] = replace(weight, components=components)
        if len(self.names) > 1:
            self.whole.refuse_replacing(self, "whose they are is not known")
        settings = self.settings
        if len(chosen) < len(self.weights):
            settings = msgspec.structs.replace(settings, target_modules=None, target_parameters=None)
        return replace(self._weights(chosen), base=self.base.alone(), settings=settings, whole=self.whole.kept(chosen))

    def _weights(self, weights: Mapping[str, AdaptedWeight]) -> Adapter:
        return replace(self, weights=weights)


def combination(terms: Sequence[tuple[float, Adapter]], *, name: str | None = None) -> Adapter:
    """``Σ wᵢ aᵢ`` in one pass. With ``name``, every weight's components become one of that name; else equal names add up.

    Modules are called as in the adapter with the longest names (:func:`aligned`). Ranks, alphas, bands and sets of weights may differ.
    Raises :class:`WrongBaseError` for adapters of different bases and :class:`OptionError` for none.
    """
    factors = [factor for factor, _ in terms]

    def added(_: str, parts: Mapping[int, AdaptedWeight]) -> Mapping[str, Component]:
        grouped: dict[str, list[tuple[float, Component]]] = {}
        for number, weight in parts.items():
            for own, component in weight.components.items():
                grouped.setdefault(name or own, []).append((factors[number], component))
        return {own: combined(found) for own, found in grouped.items()}

    return joined([adapter for _, adapter in terms], added, factors)


def joined(
    adapters: Sequence[Adapter],
    components_of: Callable[[str, Mapping[int, AdaptedWeight]], Mapping[str, Component]],
    factors: Sequence[float] | None = None,
) -> Adapter:
    """One adapter on the weights of all. ``components_of`` gives a weight's components from its name and what each adapter, by number,
    does to it; ``factors`` multiply whole tensors, which are refused without them.

    Raises as :func:`combination` does.
    """
    if not adapters:
        raise OptionError("a combination of no adapters")
    if factors is None:
        for adapter in adapters:
            adapter.whole.refuse_replacing(adapter, "only a linear combination takes them along")
    adapters = aligned(adapters)
    check_kinds(adapters)
    whole = summed([(1.0 if factors is None else factors[i], adapter.whole) for i, adapter in enumerate(adapters)])
    weights = united([adapter.weights for adapter in adapters], components_of)
    methods = {adapter.method for adapter in adapters}
    notes = tuple(dict.fromkeys(note for adapter in adapters for note in adapter.notes))
    base = adapters[0].base.alone()
    return replace(
        adapters[0],
        weights=weights,
        settings=_common_targets([adapter.settings for adapter in adapters]),
        base=base,
        notes=notes,
        method=adapters[0].method if len(methods) == 1 else "lora",
        whole=whole,
    )


def _common_targets(settings: Sequence[LoraSettings]) -> LoraSettings:
    """The first settings, without what they select where others select something else."""
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")

    def targets(one: LoraSettings) -> list[object]:
        said = [getattr(one, field) for field in fields]
        return [
            sorted(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else value
            for value in said
        ]

    if all(targets(one) == targets(settings[0]) for one in settings):
        return settings[0]
    return msgspec.structs.replace(settings[0], target_modules=None, target_parameters=None)


def check_kinds(adapters: Sequence[Adapter]) -> None:
    """Raise :class:`OptionError` where one adapter has factors of what another holds as a whole tensor."""
    whole = {name for adapter in adapters for name in adapter.whole.replacing}
    both = next((key for adapter in adapters for key in adapter.weights if f"{key}.weight" in whole), None)
    if both is not None:
        raise OptionError(
            f"{both}.weight is replaced whole (modules_to_save) by one adapter, changed by factors in another: PEFT has no such adapter",
            hint="svdbank fuse one of them into the base, and the other into what that writes",
        )


def aligned(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with one way of naming modules, the longest: ``layers.0.…`` becomes ``model.layers.0.…`` where another says so.

    A note of an adapter says that it was renamed. Raises :class:`OptionError` where it cannot be told which modules are meant.
    """
    found = []
    for adapter, prefix in zip(adapters, common_prefixes([list(adapter.weights) for adapter in adapters]), strict=True):
        if prefix:
            note = f"its modules are called {prefix}… here, as in the adapters beside it"
            weights = {prefix + key: weight for key, weight in adapter.weights.items()}
            adapter = replace(adapter, weights=weights, notes=(*adapter.notes, note), whole=adapter.whole.prefixed(prefix))
        found.append(adapter)
    return found
