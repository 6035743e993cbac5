"""What stands at the place of a bank, and what is left to do there: found by looking at files, not by hashing them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svdbank.bank.files import Folder
from svdbank.bank.index import read_manifest
from svdbank.bank.layout import MANIFEST, plan_name
from svdbank.bank.reading import Bank, open_bank
from svdbank.bank.sessions import current_session
from svdbank.building.freezing import Frozen, frozen_plan, read_plan
from svdbank.building.planning import make_plan
from svdbank.building.request import BuildRequest
from svdbank.cache import default_output, refuse_foreign_folder
from svdbank.checkpoint.naming.selection import decomposable
from svdbank.checkpoint.planned import other_files, same_files
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import BankError, OptionError, SvdbankError, WrongBaseError
from svdbank.core.specs import BuildOptions, Plan, Skip, WeightSpec


@dataclass(frozen=True)
class Survey:
    """A place and a request, compared.

    Attributes
    ----------
    root, published
        The place, and the bank published there, if any.
    generation
        Number of the plan that is to be carried out: 0 for a first build, n for the n-th extension.
    plan, frozen
        That plan, of the weights asked for that are not published; ``frozen`` where an unfinished build or extension has frozen it at
        the place: building the weights of that plan resumes it.
    other_file
        The first weight file of the model that is not known to be the one the frozen plan is of.
    recorded
        Names of the weights whose shards an unfinished build has recorded.
    decided_before
        Who knew which matrices there are for the plans that are published already, where that is another than of :attr:`plan`.
    asked, skips, known
        What was asked for, what is left out of the model and why, and where the published weights lie in the checkpoint.
    """

    root: Path
    published: Bank | None
    generation: int
    plan: Plan
    frozen: Frozen | None
    other_file: str | None
    recorded: frozenset[str]
    asked: tuple[WeightSpec, ...]
    skips: tuple[Skip, ...]
    known: tuple[WeightSpec, ...]
    decided_before: tuple[str, ...]

    @property
    def new(self) -> list[WeightSpec]:
        """The weights asked for that are not published: those of :attr:`plan`."""
        return [weight for weight in self.asked if self.published is None or weight.name not in self.published]

    @property
    def left(self) -> list[WeightSpec]:
        """Those that a build solves: neither published nor recorded."""
        return [weight for weight in self.new if weight.name not in self.recorded]


def place(checkpoint: Checkpoint, request: BuildRequest) -> Path:
    """Where the bank is or goes; OptionError where no bank can be or something else stands."""
    root = request.output or default_output(checkpoint, request.options)
    refuse_foreign_folder(root)
    return root


def survey(checkpoint: Checkpoint, request: BuildRequest) -> Survey:
    """Compare what stands at the place of ``request`` with what is asked for.

    Raises OptionError for a bank or an unfinished build of other options or targets, and for targets that match nothing; WrongBaseError
    where what is there was made of another model, as far as names, shapes, configuration and the identities of files tell; BankError for
    a damaged bank or plan.
    """
    root = place(checkpoint, request)
    if checkpoint.planned:
        return _as_frozen(root, request)
    asked, skips = decomposable(checkpoint, request.targets)
    published, generation = _published(root, request.options)
    known = () if published is None else _known_weights(checkpoint, published, asked)
    new = [weight for weight in asked if published is None or weight.name not in published]
    plan = make_plan(checkpoint, new, skips, request.options, threads=request.threads, generation=generation, known=known)
    frozen = frozen_plan(root)
    other_file = None
    recorded: frozenset[str] = frozenset()
    if frozen is not None and new:
        _refuse_other_plan(root, frozen.plan, plan)
        plan = frozen.plan
        recorded = _recorded(root, plan)
        other_file = _other_file(checkpoint, frozen)
        if other_file is not None and frozen.sources is not None and not recorded:
            raise other_files(checkpoint.name, frozen.sources, other_file)
    before = _others_decided(root, generation, plan.decided)
    return Survey(root, published, generation, plan, frozen, other_file, recorded, tuple(asked), tuple(skips), known, before)


def _as_frozen(root: Path, request: BuildRequest) -> Survey:
    """What a frozen plan says of itself, where the checkpoint was opened by it."""
    frozen = frozen_plan(root)
    if frozen is None or frozen.sources is None or not is_asked(frozen, request):
        raise BankError(f"{root}: what was to be built here has changed meanwhile", hint="run the same command again")
    published, plan = _published(root, request.options)[0], frozen.plan
    before = _others_decided(root, frozen.generation, plan.decided)
    recorded = _recorded(root, plan)
    return Survey(
        root, published, frozen.generation, plan, frozen, None, recorded, frozen.sources.weights, plan.skips, (), before
    )


def is_asked(frozen: Frozen, request: BuildRequest) -> bool:
    """True where a frozen plan is the answer to ``request``, word for word."""
    return frozen.sources is not None and (frozen.plan.options, frozen.sources.targets) == (request.options, request.targets)


def _other_file(checkpoint: Checkpoint, frozen: Frozen) -> str | None:
    """The first weight file of a model that is not known to be the one a frozen plan is of."""
    if frozen.sources is None:
        return checkpoint.files[0].name if checkpoint.files else None
    used = {file.name for file in frozen.sources.files}
    return same_files(tuple(file for file in checkpoint.files if file.name in used), frozen.sources.files)


def _others_decided(root: Path, generations: int, now: str) -> tuple[str, ...]:
    """Who decided the published plans, without ``now``. A plan that cannot be read is left to who checks the bank."""
    before = []
    for generation in range(generations):
        with contextlib.suppress(SvdbankError, OSError):
            before.append(read_plan(root / plan_name(generation)).decided)
    return tuple(dict.fromkeys(decided for decided in before if decided != now))


def _published(root: Path, options: BuildOptions) -> tuple[Bank | None, int]:
    if not (root / MANIFEST).exists():
        return None, 0
    manifest = read_manifest(Folder(root))
    _refuse_other_options(root, manifest.options, options)
    return open_bank(root), len(manifest.plans)


def _known_weights(checkpoint: Checkpoint, bank: Bank, asked: Sequence[WeightSpec]) -> tuple[WeightSpec, ...]:
    """Where the weights of a published bank lie in the checkpoint; WrongBaseError for one that is not there with its shape."""
    specs = {weight.name: weight for weight in asked}
    if not all(name in specs for name in bank):
        everything, _ = decomposable(checkpoint, (".*",))
        specs = {weight.name: weight for weight in everything}
    known = []
    for name in bank:
        basis = bank[name]
        spec = specs.get(name)
        if spec is None or (spec.out_features, spec.in_features) != (basis.out_features, basis.in_features):
            raise WrongBaseError(
                f"{bank.place} was built from another model: {checkpoint.name} has no {name} of {basis.out_features}x{basis.in_features}",
                hint="give the bank another place with -o, or delete it",
            )
        known.append(spec)
    return tuple(known)


def _refuse_other_plan(root: Path, frozen: Plan, plan: Plan) -> None:
    """An unfinished build or extension is carried out as it stands; errors name what is now asked otherwise."""
    _refuse_other_options(root, frozen.options, plan.options)
    if frozen.base.config_digest != plan.base.config_digest:
        raise WrongBaseError(
            f"{root} was begun for {frozen.base.name}, whose configuration is not that of {plan.base.name}",
            hint="give the bank another place with -o, or delete it",
        )
    if (frozen.families, frozen.aliases) != (plan.families, plan.aliases):
        ours = {name for family in plan.families for name in family.weights} | {alias.name for alias in plan.aliases}
        theirs = {name for family in frozen.families for name in family.weights} | {alias.name for alias in frozen.aliases}
        differs = sorted(ours ^ theirs)[:3] or ["the shape of a family"]
        names = sorted({re.sub(r"\.(weight|[0-9]+)$", "", name).rpartition(".")[2] for name in theirs})
        raise OptionError(
            f"{root} has an unfinished build of other targets ({len(theirs)} weights, now {len(ours)}; e.g. {', '.join(differs)})",
            hint=f"finish it first (its modules end in {', '.join(names)}), then build again with more targets; or delete the bank",
        )


def _recorded(root: Path, plan: Plan) -> frozenset[str]:
    session = current_session(root)
    done = session.recorded(plan) if session is not None else set()
    families = {family.name: family for family in plan.families}
    return frozenset(
        name
        for shard in plan.shards
        if (shard.family, shard.index) in done
        for name in families[shard.family].weights[shard.start : shard.stop]
    )


def _refuse_other_options(root: Path, theirs: BuildOptions, ours: BuildOptions) -> None:
    """OptionError naming the first option in which a bank differs from what is asked for."""
    for field in ("rank", "side", "dtype", "principal", "solver"):
        if getattr(theirs, field) != getattr(ours, field):
            raise OptionError(
                f"{root} is a bank with {field} {getattr(theirs, field)}; {getattr(ours, field)} was asked for",
                hint=f"another {field} is another bank: choose another -o, or delete this one",
            )
