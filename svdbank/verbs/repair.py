"""``repair``: a damaged bank becomes the one that was published, from where it came from or the weights it was made of."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from svdbank import cache
from svdbank.bank.claims import refuse_claimed
from svdbank.bank.layout import MANIFEST
from svdbank.bank.reading import open_bank
from svdbank.bank.sessions import current_session
from svdbank.building.checking import Damage, examine
from svdbank.building.devices import named_device
from svdbank.building.estimate import solve_seconds
from svdbank.building.freezing import read_plan
from svdbank.building.mending import solving_device
from svdbank.building.repairing import WORKSHOP, carry_out, source_of, take_over, task_of
from svdbank.checkpoint.naming.selection import decomposable
from svdbank.checkpoint.source import open_checkpoint
from svdbank.core import disk
from svdbank.core.errors import BankError, BankNotFoundError, DamageError
from svdbank.core.locks import locked
from svdbank.core.places import refuse_address, refuse_empty
from svdbank.core.specs import Progress, ProgressCallback, Struct, ignore_progress
from svdbank.sharing.restoring import as_there, bring, fetchable, origin_of


class RepairReport(Struct, frozen=True):
    """What a repair found and did, or with ``dry_run`` would do.

    Attributes
    ----------
    damage
        What was not as published. Empty where the bank was sound: then nothing was done.
    solved, kept
        Weights that were solved again, and those that stayed as they were.
    anew
        True where index or manifest were lost and came from nowhere, so that nothing else could be believed and all was solved again.
    fetched, origin
        Files that came from ``origin``, the address of the same bank elsewhere, as their bytes were recorded.
    changed
        Weights whose stored bytes are others than before, of the same subspaces: slim adapters on them refuse this bank by name.
    seconds
        What it took; with ``dry_run`` an estimate.
    sound
        Whether every byte of the bank is as published now.
    """

    path: str
    damage: tuple[Damage, ...]
    solved: int
    kept: int
    anew: bool
    changed: tuple[str, ...]
    seconds: float
    dry_run: bool
    sound: bool
    fetched: tuple[str, ...] = ()
    origin: str | None = None


def repair(
    bank: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    origin: str | None = None,
    device: str = "auto",
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> RepairReport:
    """Find what is damaged, fetch it from where the bank came from or solve it again from weights whose hashes match, and put it in place
    by renames.

    Every byte is hashed first. Sound bases stay, also those that share a file with a damaged one, and can be looked up meanwhile. On the
    machine, and with the versions, that built the bank its bytes come back; elsewhere the same subspaces with other roundings and signs,
    which the report says. Where index or manifest are lost and come from nowhere, all is solved again.

    Parameters
    ----------
    bank
        The bank's folder.
    model
        The model it was built from: a folder, a file, or ``org/name[@revision]``; by default the one that the bank names.
    origin
        The address of the same bank elsewhere, as :func:`svdbank.pull` takes it; by default the one it was pulled from, if the cache
        knows. Only damaged files are fetched, and a manifest or index only where the plans or the other of the two are as there.
    device
        Where weights are solved: ``cpu``, ``cuda``, ``cuda:1`` …. ``auto`` is the kind of device that solved them before, if it is here:
        another gives other bytes. Where all is solved again, as :func:`svdbank.build` takes it.
    dry_run
        Say what would be done and how long it takes on one processor, and change nothing.

    Raises BankNotFoundError where there is no bank, BankError where ``origin`` is another bank, WrongBaseError for a model of other
    weights, OptionError and DeviceError for a device that is not here or does not compute, LockedError where somebody writes.
    """
    refuse_empty(bank, "the bank's name", "svdbank ls shows the banks there are")
    refuse_address(bank)
    if device != "auto":
        named_device(device)
    root, tell, begun = disk.expanded(bank), progress or ignore_progress, time.perf_counter()
    if not cache.is_bank(root) and not (root / "plan.json").exists() and not (root / "manifest.json").exists():
        raise BankNotFoundError(f"{root}: no bank here", hint="svdbank ls shows the banks there are")
    with contextlib.nullcontext() if dry_run else locked(root):
        if not dry_run:
            refuse_claimed(root)
        far, lost, damage, changed = None, "", list[Damage](), tuple[str, ...]()
        try:
            opened = open_bank(root)
        except (DamageError, BankNotFoundError) as cause:
            lost = str(cause)
            is_begun = isinstance(cause, BankNotFoundError) and not any(root.glob("index-*.json"))
            if is_begun and (origin is None or current_session(root) is not None):
                raise  # a build that has not finished: that goes on by itself
            if (far := origin_of(root, origin, tell)) is None:
                return _anew(root, lost, model, device, dry_run, tell, begun)
            opened, damage = as_there(root, far, lost.removeprefix(f"{root}/"))
        damage += examine(opened, data=True, progress=tell).damage
        far = far or (origin_of(root, origin, tell) if damage else None)
        wanted, manifest = fetchable(opened, far, damage) if far else {}, any(one.file == MANIFEST for one in damage)
        if far is not None and (wanted or manifest) and not dry_run:
            if not bring(root, far, wanted, manifest=manifest, named=origin is not None, tell=tell):
                if lost:
                    return _anew(root, lost, model, device, dry_run, tell, begun)
                wanted = {}
            opened = open_bank(root)
        left = [one for one in damage if one.file not in wanted and one.file != MANIFEST]
        task = task_of(opened, left)
        if left and not dry_run:
            source = source_of(opened.manifest.base, model) if task.weights else None
            with contextlib.nullcontext() if source is None else open_checkpoint(source) as checkpoint:
                specs = {} if checkpoint is None else {one.name: one for one in decomposable(checkpoint, (".*",))[0]}
                where = solving_device(device, task.records)
                changed = carry_out(opened, task, checkpoint, specs, device=where, progress=tell)
        sound = not damage or (not dry_run and not examine(open_bank(root), data=True, progress=tell).damage)
        work = [(family.spec, len(task.solved[family.spec.name])) for family in task.families]
        seconds = solve_seconds(work) if dry_run and damage else time.perf_counter() - begun
    kept = sum(len(family.weights) for family in opened.index.families) - task.weights
    fetched, place = (*wanted, *([MANIFEST] if manifest else [])), far.place if far and (wanted or manifest) else None
    return RepairReport(str(root), tuple(damage), task.weights, kept, False, changed, seconds, dry_run, sound, fetched, place)


def _anew(
    root: Path,
    why: str,
    model: str | os.PathLike[str] | None,
    device: str,
    dry_run: bool,
    tell: ProgressCallback,
    begun: float,
) -> RepairReport:
    """Without index or manifest nothing says which bytes are right: the bank is built again, as its plans say, and takes the place."""
    from svdbank.verbs.build import build

    damage = (Damage(MANIFEST, why.removeprefix(f"{root}/").removeprefix(f"{MANIFEST}: ")),)
    try:
        plans = [read_plan(path) for path in sorted(root.glob("plan*.json"))]
    except BankError:
        plans = []
    if not plans:
        raise DamageError(
            f"{root}: neither its manifest and index nor its plan can be read ({why}): nothing says what it was",
            hint="svdbank rm, then svdbank build MODEL with the options it had",
        )
    named = [name for plan in plans for family in plan.families for name in family.weights]
    named += [alias.name for plan in plans for alias in plan.aliases]
    seconds = solve_seconds([(family, len(family.weights)) for plan in plans for family in plan.families])
    if dry_run:
        return RepairReport(str(root), damage, len(named), 0, True, (), seconds, True, False)
    source = source_of(plans[0].base, model)
    with open_checkpoint(source) as checkpoint:
        specs = {one.name: one for one in decomposable(checkpoint, (".*",))[0]}
    if lacking := [name for name in named if name not in specs]:
        raise BankError(f"{root} was built from another model: {checkpoint.name} has no {lacking[0]}", hint="--source MODEL")
    tell(Progress("repair", 0, 1, "note", f"{len(named)} weights are solved again, about {seconds:.0f} s on one processor"))
    if (workshop := root / WORKSHOP).exists():
        disk.remove_tree(workshop)
    options = plans[0].options
    made = build(
        source,
        workshop,
        rank=options.rank,
        targets=tuple(dict.fromkeys(specs[name].module for name in named)),
        side=options.side,
        dtype=options.dtype,
        solver=options.solver,
        principal=options.principal,
        device=device,
        progress=tell,
    )
    take_over(root, made, lambda name: tell(Progress("put in place", 0, 1, "files", name)))
    disk.remove_tree(workshop)
    sound = not examine(bank := open_bank(root), data=True, progress=tell).damage
    return RepairReport(str(root), damage, len(bank), 0, True, bank.names, time.perf_counter() - begun, False, sound)
