"""Are the bases of a bank the smallest triplets of its model's weights? Each, or some that are drawn, measured against the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from torch import Tensor

from svdbank.bank.reading import Bank
from svdbank.building.checking import Damage
from svdbank.checkpoint.naming.selection import decomposable
from svdbank.checkpoint.source import open_checkpoint
from svdbank.core.errors import DamageError, WrongBaseError
from svdbank.core.specs import Progress, ProgressCallback
from svdbank.solver.stored import StoredCheck, StoredTriplets, check_stored

#: Worst residual, over ‖W‖_F, and worst entry of UᵀU − I, of a basis cast to the storage dtype: entries off by 2⁻²⁵, 2⁻¹²,
#: 2⁻⁹ of themselves move a product of unit vectors by at most twice that; the rest is room.
_STORED = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def prove(
    bank: Bank, model: str | os.PathLike[str], names: Sequence[str], progress: ProgressCallback | None
) -> Iterator[Damage]:
    """Hash the weights of ``names`` and measure the stored bases of each: residual, orthogonality, and that nothing smaller was missed.

    Raises WrongBaseError for a model whose weights are others.
    """
    with open_checkpoint(model) as checkpoint:
        specs = {weight.name: weight for weight in decomposable(checkpoint, (".*",))[0]}
        for done, name in enumerate(names):
            basis = bank[name]
            spec = specs.get(name)
            if spec is None or (spec.out_features, spec.in_features) != (basis.out_features, basis.in_features):
                raise WrongBaseError(
                    f"{bank.place} was built from another model: {checkpoint.name} has no {name} of "
                    f"{basis.out_features}x{basis.in_features}",
                    hint=f"verify it against {bank.manifest.base.name}",
                )
            weight, sha256 = checkpoint.read_hashed(spec)
            if sha256 != basis.source_sha256:
                raise WrongBaseError(
                    f"{bank.place} was built from another model: {name} of {checkpoint.name} has other bytes",
                    hint=f"verify it against {bank.manifest.base.name}",
                )
            yield from _wrong_with(bank, name, weight)
            if progress is not None:
                progress(Progress("verify against model", done + 1, len(names), "weights", name))


def _wrong_with(bank: Bank, name: str, weight: Tensor) -> Iterator[Damage]:
    try:
        minor = _stored(bank, name, "")
        principal = _stored(bank, name, "principal_") if bank[name].family.principal else None
    except DamageError as error:
        yield Damage(name, str(error).removeprefix(f"{bank.place}/"))
        return
    for found, end in zip(check_stored(weight, minor, principal), ("smallest", "largest"), strict=False):
        if wrong := _first_wrong(found, _STORED[bank.dtype], end):
            yield Damage(name, wrong)


def _first_wrong(found: StoredCheck, limit: float, end: str) -> str | None:
    # Comparisons are written so that NaN fails them.
    if not found.residual <= limit:
        return f"the stored basis misses the weight by {found.residual:.1e} of its norm"
    if not found.orthogonality <= limit:
        return f"the stored vectors are not orthonormal: off by {found.orthogonality:.1e}"
    if not found.ordered:
        return "the stored singular values are not in their order"
    if not found.complete:
        return f"the stored triplets are not those of the {end} singular values: one beyond them was left out"
    return None


def _stored(bank: Bank, name: str, end: str) -> StoredTriplets:
    left = bank.rows(f"{end}left", [name])[name]  # type: ignore[arg-type]
    right = bank.rows(f"{end}right", [name])[name] if bank.side == "both" else None  # type: ignore[arg-type]
    return StoredTriplets(left, right, bank.rows(f"{end}sigma", [name])[name])  # type: ignore[arg-type]
