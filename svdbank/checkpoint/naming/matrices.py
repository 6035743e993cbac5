"""Every matrix of a checkpoint by the module of the loaded model that holds it, and who knew: our table, or Transformers' own module tree.

The table of ``architectures.py`` needs no Transformers and no torch. Its types are held to the tree by tests, with every version of
Transformers in :data:`KNOWN`; with another version, and for every other type, the tree decides where Transformers is installed. What
neither knows is taken by its stored names alone, which :attr:`Matrices.decided` says.
"""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from svdbank.checkpoint.configuration import ModelFacts, facts
from svdbank.checkpoint.dtypes import FLOATING
from svdbank.checkpoint.naming.architectures import ARCHITECTURES
from svdbank.checkpoint.naming.correspondence import MAX_SLICES, Parameter, architecture_of, correspondence
from svdbank.checkpoint.naming.roles import Role, role_of, tied_head
from svdbank.core.specs import TensorSource

if TYPE_CHECKING:
    from svdbank.checkpoint.naming.symbolic import Arrangement
    from svdbank.checkpoint.naming.tree import Made, ModuleTree, TreeWeight
    from svdbank.checkpoint.source import Checkpoint

#: Versions of Transformers, first and first not, with which tests compare the table and the tree.
KNOWN = ((5, 17), (5, 24))


@dataclass(frozen=True)
class Matrices:
    """What a checkpoint is made of.

    Attributes
    ----------
    found
        Every matrix: what it is of the loaded model, and the tensors it is made of.
    tied
        Module of the output head and the embedding that it is, where it has no tensor of its own.
    names
        Of each tensor: the parameter that it is, or is part of; its own name where the model has none for it.
    reasons
        Of each tensor that makes no matrix: why.
    whole
        Of each parameter that is one stored tensor as it is, vectors too: that tensor.
    decided
        Who knew: ``table``, ``names`` (nobody), or Transformers' version and class.
    doubt
        Why nobody knew, where names alone were gone by.
    """

    found: list[tuple[Role, Parameter]]
    tied: tuple[str, Parameter] | None
    names: dict[str, str]
    reasons: dict[str, str]
    whole: dict[str, TensorSource]
    decided: str
    doubt: str | None = None


def matrices(checkpoint: Checkpoint) -> Matrices:
    """Every matrix of ``checkpoint``, worked out once. CheckpointError if ``config.json`` has a key of the wrong type."""
    found: Matrices | None = checkpoint.kept.get("matrices")
    if found is None:
        found = _worked_out(checkpoint, facts(checkpoint.config, f"{checkpoint.name}: config.json"))
        checkpoint.kept["matrices"] = found
    return found


def _worked_out(checkpoint: Checkpoint, about: ModelFacts) -> Matrices:
    version = transformers_version()
    if in_table(about) and (version is None or KNOWN[0] <= version < KNOWN[1]):
        return by_table(checkpoint.tensors, about, "table", None)
    if not checkpoint.config:
        return by_table(checkpoint.tensors, about, "names", "there is no config.json")
    if version is None:
        if in_table(about):
            return by_table(checkpoint.tensors, about, "table", None)
        doubt = f"{about.model_type or 'its model type'!s} is not in the table, and Transformers, which may know it, is not installed"
        return by_table(checkpoint.tensors, about, "names", doubt)
    from svdbank.checkpoint.naming.tree import ModuleTree, UnknownModelError

    try:
        tree = ModuleTree(checkpoint.config, about)
        return by_tree(checkpoint.tensors, tree, tree.made_from(checkpoint.tensors))
    except UnknownModelError as cause:
        return by_table(checkpoint.tensors, about, "table" if in_table(about) else "names", str(cause))


def transformers_version() -> tuple[int, int] | None:
    """(major, minor) of the installed Transformers, which is not imported for it; None where there is none."""
    try:
        major, minor = importlib.metadata.version("transformers").split(".")[:2]
        return int(major), int(minor)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def in_table(about: ModelFacts) -> bool:
    """True where the table has the model type and those of all parts that it has paths for."""
    row = ARCHITECTURES.get(about.model_type)
    return row is not None and all(about.parts.get(key, "") in ARCHITECTURES for key, _ in row.parts if key in about.parts)


def by_table(
    tensors: Mapping[str, TensorSource], about: ModelFacts, decided: str = "table", doubt: str | None = None
) -> Matrices:
    """What our own table makes of the tensors, or their names alone where it does not have the model type."""
    found = correspondence(tensors, about)
    experts_under = {name.partition(".experts.")[0] for name in found.names.values() if ".experts." in name}
    members: list[tuple[Role, Parameter]] = []
    reasons = dict(found.incomplete)
    for parameter in found.parameters:
        role = role_of(parameter, about, experts_under)
        if isinstance(role, Role):
            members.append((role, parameter))
        else:
            reasons.update((source.name, role) for source in parameter.sources)
    head = tied_head(about, members, architecture_of(about).head)
    whole = {
        parameter.name: parameter.sources[0]
        for parameter in found.parameters
        if parameter.expert is None and len(parameter.sources) == 1
    }
    return Matrices(members, head, found.names, reasons, whole, decided, doubt)


def by_tree(tensors: Mapping[str, TensorSource], tree: ModuleTree, made: Made) -> Matrices:
    """What Transformers makes of the tensors, of which ``made`` says where the entries of each parameter lie."""
    from svdbank.checkpoint.naming.symbolic import NotTracedError, View
    from svdbank.checkpoint.naming.tree import is_whole, matrix_of

    members: list[tuple[Role, Parameter]] = []
    by_name: dict[str, Parameter] = {}
    reasons = dict(made.reasons)
    of_parameter: dict[str, list[str]] = defaultdict(list)
    for own, target in made.names.items():
        of_parameter[target].append(own)
    count = 0
    for name, weight in tree.weights.items():
        if name not in made.places:
            continue
        stacked = len(weight.shape) == 3
        count += made.places[name].shape[0] if stacked else 0
        try:
            pieces = _pieces(name, weight, made.places[name], tensors, count)
        except NotTracedError as cause:
            reason = f"{name} is made of it in a way that is not understood: {cause}"
            reasons.update(dict.fromkeys(of_parameter[name], reason))
            continue
        unfit = next((source for _, piece in pieces for source in piece.sources if source.dtype not in FLOATING), None)
        if unfit is not None:
            reasons.update(dict.fromkeys(of_parameter[name], f"stored as {unfit.dtype}: codes, not values"))
            continue
        by_name[name] = pieces[0][1]
        members += pieces
    # A linear module that shares another one's tensor: PEFT adapts each, so each has its basis.
    for name, weight in tree.weights.items():
        other = next((of for of in sorted(tree.tied.get(name, ())) if of in by_name), None)
        if weight.kind == "linear" and len(weight.shape) == 2 and name not in made.places and other is not None:
            matrix = matrix_of(made.places[other], tensors, transposed=weight.transposed)
            members.append((Role(weight.module, weight.kind, matrix.transposed), Parameter(name, matrix.sources)))
    used = {source.name for _, parameter in members for source in parameter.sources}
    for own, target in made.names.items():
        if own not in used and own not in reasons:
            reasons[own] = _reason(tensors[own], target)
    tied = next(
        (
            (weight.module, by_name[of])
            for name, weight in tree.weights.items()
            if weight.kind == "head" and name not in made.places
            for of in sorted(tree.tied[name] & by_name.keys())
        ),
        None,
    )
    whole = {
        name: tensors[places.source]
        for name, places in made.places.items()
        if isinstance(places, View) and is_whole(places, tensors)
    }
    names = made.names | {name: name for name in made.reasons if name not in made.names}
    return Matrices(members, tied, names, reasons, whole, f"Transformers {tree.version}: {tree.name}")


def _pieces(
    name: str, weight: TreeWeight, places: Arrangement, tensors: Mapping[str, TensorSource], count: int
) -> list[tuple[Role, Parameter]]:
    """The matrix of a module, or each expert's of a stacked parameter. NotTracedError where it is made in a way that is not understood."""
    from svdbank.checkpoint.naming.symbolic import NotTracedError, slices
    from svdbank.checkpoint.naming.tree import is_whole, matrix_of

    if len(places.shape) != len(weight.shape):
        raise NotTracedError(f"it has {len(weight.shape)} dimensions in the model, {len(places.shape)} in the file")
    if 0 in places.shape:
        raise NotTracedError("it is empty")
    if places.shape != weight.shape and (len(weight.shape) == 3 or not is_whole(places, tensors)):
        raise NotTracedError(f"it is {weight.shape} in the model and {places.shape} of what is here")
    if len(weight.shape) == 2:
        matrix = matrix_of(places, tensors, transposed=weight.transposed)
        return [(Role(weight.module, weight.kind, matrix.transposed), Parameter(name, matrix.sources))]
    if count > MAX_SLICES:
        raise NotTracedError(f"one of more than {MAX_SLICES:,} stacked experts: no model has so many")
    made = []
    for expert, own in enumerate(slices(places)):
        matrix = matrix_of(own, tensors, transposed=weight.transposed)
        made.append((Role(weight.module, weight.kind, matrix.transposed), Parameter(name, matrix.sources, expert)))
    return made


def _reason(source: TensorSource, target: str) -> str:
    """Why a tensor that is the parameter ``target``, or part of it, makes no matrix."""
    if len(source.shape) < 2:
        return "a vector (norm, bias or scale): only matrices are decomposed"
    if len(source.shape) > 2:
        return f"{len(source.shape)}-D (a convolution, buffer or stacked weights): only matrices are decomposed"
    return f"{target} is the weight of no linear or embedding module (a norm, buffer or free parameter)"
