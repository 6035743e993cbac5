"""Which matrices of a checkpoint are decomposed, from headers and ``config.json`` alone."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence

from svdbank.checkpoint.naming.correspondence import Parameter
from svdbank.checkpoint.naming.families import natural, with_families
from svdbank.checkpoint.naming.matrices import matrices
from svdbank.checkpoint.naming.roles import Role
from svdbank.checkpoint.naming.targets import ALL_LINEAR, ALL_LINEAR_KINDS, Targets, parse_targets
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import OptionError
from svdbank.core.specs import Skip, WeightKind, WeightSpec

_ON_REQUEST: dict[WeightKind, str] = {
    "embedding": "an embedding: decomposed when targeted by name",
    "head": "the output head: decomposed when targeted by name",
}


def decomposable(checkpoint: Checkpoint, targets: Sequence[str] = (ALL_LINEAR,)) -> tuple[list[WeightSpec], list[Skip]]:
    """The weights that ``targets`` select, and every other tensor with the reason why it is left out.

    ``targets`` speaks PEFT's language: ``all-linear`` (every linear weight and router, without embeddings and output head), names
    that match the end of a module path, or one regular expression that matches a whole module path. Names may stand
    beside ``all-linear``: they then add to it.

    Specs are sorted by (family, layer, expert, name); (out, in) is the orientation of PEFT's own SVD, so an embedding is
    (hidden, vocabulary). Raises OptionError if a target matches nothing that can be decomposed, CheckpointError if
    ``config.json`` has a key of the wrong type.
    """
    wanted = parse_targets(targets)
    found = matrices(checkpoint)
    reasons = dict(found.reasons)
    candidates = [_spec(role, parameter) for role, parameter in found.found]
    kinds = {role.module: role.kind for role, _ in found.found}
    if found.tied is not None:
        module, embedding = found.tied
        kinds[module] = "head"
        candidates.append(_spec(Role(module, "head", transposed=False), embedding))
    candidates = with_families(candidates)
    chosen = [
        spec
        for spec in candidates
        if (wanted.all_linear and kinds[spec.module] in ALL_LINEAR_KINDS) or wanted.named(spec.module)
    ]
    unfit = {found.names[name]: reason for name, reason in reasons.items()}
    _refuse_unmatched(checkpoint, wanted, targets, candidates, chosen, unfit)
    used = {source.name for spec in chosen for source in spec.sources}
    for role, parameter in found.found:
        for source in parameter.sources:
            if source.name not in used:
                reasons[source.name] = _ON_REQUEST.get(role.kind, "not targeted") if wanted.all_linear else "not targeted"
    skips = [
        Skip(name=name, shape=checkpoint.tensors[name].shape, reason=reasons[name]) for name in sorted(reasons, key=natural)
    ]
    return chosen, skips


def _spec(role: Role, parameter: Parameter) -> WeightSpec:
    rows, columns = parameter.shape
    expert = parameter.expert
    return WeightSpec(
        name=f"{role.module}.weight" if expert is None else f"{role.module}.{expert}",
        module=role.module,
        kind=role.kind,
        family="",
        out_features=columns if role.transposed else rows,
        in_features=rows if role.transposed else columns,
        dtype=parameter.sources[0].stored_as,
        sources=parameter.sources,
        operation="transpose" if role.transposed else "as_is" if len(parameter.sources) == 1 else "concat",
        expert=expert,
    )


def _refuse_unmatched(
    checkpoint: Checkpoint,
    wanted: Targets,
    targets: Sequence[str],
    candidates: list[WeightSpec],
    chosen: list[WeightSpec],
    reasons: dict[str, str],
) -> None:
    """OptionError if a target, each by itself, selects nothing: silence would look like success. ``reasons`` by name in the model."""
    each = [Targets(False, (name,), None) for name in wanted.names]
    if wanted.pattern is not None:
        each.append(wanted)
    for one in each:
        if any(one.named(spec.module) for spec in chosen):
            continue
        shown = one.names[0] if one.names else targets[0] if not isinstance(targets, str) else targets
        unfit = [name for name in reasons if one.named(name) or one.named(name.rpartition(".")[0])]
        if unfit:
            name = max(unfit, key=lambda name: name.endswith(".weight"))
            raise OptionError(
                f"{checkpoint.name}: the target {shown!r} matches {name}, which cannot be decomposed: {reasons[name]}",
                hint="leave --targets out for every linear weight",
            )
        raise OptionError(
            f"{checkpoint.name}: the target {shown!r} matches no module; there are: {inventory(candidates)}",
            hint=_closest(shown, candidates),
        )
    if not chosen:
        raise OptionError(
            f"{checkpoint.name}: no linear weight among {len(checkpoint.tensors)} tensors; there are: {inventory(candidates)}"
            + (f"; of {most[1]} others, {most[0]}" if (most := _commonest(reasons)) else ""),
            hint="name the modules to decompose with --targets" if candidates else None,
        )


def _commonest(reasons: Mapping[str, str]) -> tuple[str, int] | None:
    """Why most tensors make no matrix, vectors apart, and how many those are."""
    counts = Counter(reason for reason in reasons.values() if not reason.startswith("a vector"))
    return next(iter(counts.most_common(1)), None)


def inventory(specs: Sequence[WeightSpec]) -> str:
    """The last name components of what can be decomposed, with their counts: ``q_proj ×30, k_proj ×30, …``."""
    counts = Counter(spec.module.rpartition(".")[2] for spec in specs)
    return ", ".join(f"{name} ×{count}" for name, count in counts.most_common(40)) or "no matrices at all"


def _closest(target: str, specs: Sequence[WeightSpec]) -> str | None:
    suffixes = sorted({spec.module.rpartition(".")[2] for spec in specs} | {spec.module for spec in specs[:5000]})
    near = difflib.get_close_matches(target, suffixes, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "leave --targets out for every linear weight"
