"""``stack``: several domains act at once, and each can still be scaled or taken out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from svdbank.adapter.folder import check_apart, check_output
from svdbank.adapter.model import Adapter
from svdbank.adapter.writing import write_adapter
from svdbank.bank.reading import Bank
from svdbank.composition.fitting import FitOptions, FitReport, fit_weights
from svdbank.composition.inputs import Places, domains_of, named_places, notes_of, read_inputs
from svdbank.composition.stacking import Domain, Overlap, as_domain, overlaps, stacked
from svdbank.core.errors import OptionError
from svdbank.core.folders import output_folder
from svdbank.core.specs import ProgressCallback, Struct


class StackReport(Struct, frozen=True):
    """What ``stack`` wrote: the domains, the rank of their sum, and which of them are not in bands of their own."""

    adapter: str
    domains: dict[str, Domain]
    dropped: tuple[str, ...]
    rank: int
    touched: int
    overlaps: tuple[Overlap, ...]
    fit: FitReport | None
    notes: tuple[str, ...]


def stack(
    adapters: Places,
    *,
    output: str | Path,
    scale: Mapping[str, float] | None = None,
    drop: Sequence[str] = (),
    bank: str | Path | Bank | None = None,
    rebase: str | Path | Bank | None = None,
    base: str | Path | None = None,
    fit: FitOptions | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> StackReport:
    """Write the sum of adapters as one PEFT folder, with every domain's own coefficients kept beside it.

    Parameters
    ----------
    adapters
        Folders or ``org/name[@revision]`` on the Hub, also as ``NAME=PLACE`` or by name; of those that ``stack`` wrote the domains come
        along under their names. One stack alone is enough:
        then ``scale`` and ``drop`` change it, without the adapters that it was made from.
    scale
        By domain: what it is multiplied by, relative to what is in the folder.
    drop
        Domains to leave out. What is left is to the bit what it would be without them.
    bank, rebase, base
        As in :func:`svdbank.composition.inputs.read_inputs`.
    fit
        Choose the scales on held-out text, starting from ``scale``.

    Raises :class:`OptionError` for unknown or repeated names and an output in use, :class:`WrongBaseError` for adapters of different
    bases, before any work.
    """
    path = output_folder(output)
    check_output(path, force=force)
    check_apart(path, (place for place, _ in named_places(adapters).values()))
    read = read_inputs(adapters, bank=bank, rebase=rebase, base=base)
    for name, adapter in read.items() if fit is not None else ():
        adapter.whole.refuse_replacing(name, "fitting moves factors alone")
    domains = domains_of(read)
    scales = _checked_scales(domains, scale or {}, drop)
    if len(domains) == 1 and not scale and fit is None:
        raise OptionError(
            f"{next(iter(domains))} alone is no stack", hint="name more adapters, or change its strength with --scale NAME=0.7"
        )
    if fit is None and not any(scales.values()):
        raise OptionError("every scale is 0: the result would change nothing", hint="--drop NAME takes a domain out")
    left = {name: adapter for name, adapter in domains.items() if name in scales}
    fitted = None
    if fit is not None:
        fitted = fit_weights(lambda chosen: stacked(left, dict(zip(left, chosen, strict=True))), scales, fit, progress)
        scales = fitted.weights
    result = stacked(left, scales)
    write_adapter(result, path, force=force)
    return StackReport(
        adapter=str(path),
        domains={name: as_domain(adapter, scales[name]) for name, adapter in left.items()},
        dropped=tuple(drop),
        rank=result.rank,
        touched=len(result.weights),
        overlaps=tuple(overlaps(left)),
        fit=fitted,
        notes=tuple(notes_of(read)),
    )


def _checked_scales(domains: Mapping[str, Adapter], scale: Mapping[str, float], drop: Sequence[str]) -> dict[str, float]:
    unknown = [name for name in (*scale, *drop) if name not in domains]
    if unknown:
        raise OptionError(f"there is no domain {unknown[0]!r}", hint=f"there are: {', '.join(domains)}")
    both = sorted(set(scale) & set(drop))
    if both:
        raise OptionError(f"{both[0]!r} is scaled and dropped")
    if not all(math.isfinite(factor) for factor in scale.values()):
        raise OptionError("a scale is not a finite number")
    left = {name: float(scale.get(name, 1.0)) for name in domains if name not in drop}
    if not left:
        raise OptionError("every domain is dropped: nothing would be left", hint=f"there are: {', '.join(domains)}")
    return left
