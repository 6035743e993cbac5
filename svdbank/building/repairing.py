"""Putting a damaged bank in order: what is not as published is made again from the weights, what is sound stays.

The families with damage are published a second time as a small bank of their own inside the folder, from records of what is sound and
new bases of what is not. Its files then take the place of the damaged ones by renames, the manifest last. Nothing is removed before its
successor stands beside it, so lookups of sound weights go on meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from svdbank.bank.index import base_digest, data_files
from svdbank.bank.layout import (
    MANIFEST,
    NO_DIGEST,
    FamilyIndex,
    FileRecord,
    Index,
    Manifest,
    ShardRecord,
    WeightRecord,
    attempt_file,
    manifest_digest,
    shard_file,
)
from svdbank.bank.reading import Bank, open_bank
from svdbank.bank.sessions import begin_session
from svdbank.bank.store import file_record
from svdbank.bank.writing import BankWriter
from svdbank.building.checking import Damage
from svdbank.building.freezing import read_plan
from svdbank.building.mending import Mender
from svdbank.building.planning import shards_of
from svdbank.checkpoint.source import Checkpoint
from svdbank.core import disk
from svdbank.core.errors import DamageError, OptionError, SvdbankError
from svdbank.core.processors import available_cpus
from svdbank.core.specs import BaseSpec, DevicePath, Plan, ProgressCallback, ShardSpec, WeightSpec, to_json

#: Where the small bank is made, inside the damaged one. No reader looks at names that begin with a dot.
WORKSHOP = ".repair"

#: Coordinate arrays that only the weights can give back.
_OF_THE_WEIGHTS = ("sigma", "principal_sigma", "probe")


@dataclass(frozen=True)
class Task:
    """What a repair will do.

    Attributes
    ----------
    families
        The families that are published a second time.
    solved
        By family: the weights that are solved again.
    files
        The damaged files that are recorded; ``strays`` are what lies in the folder and is neither recorded nor a regular file.
    """

    families: tuple[FamilyIndex, ...]
    solved: dict[str, tuple[str, ...]]
    files: frozenset[str]
    strays: tuple[str, ...]

    @property
    def weights(self) -> int:
        """How many weights are solved."""
        return sum(len(names) for names in self.solved.values())

    @property
    def records(self) -> list[WeightRecord]:
        """What the index says of the weights that are solved."""
        return [one for family in self.families for one in family.weights if one.name in self.solved[family.spec.name]]


def source_of(base: BaseSpec, model: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    """Where a bank's weights are: the ``model`` given, or the repository that its ``base`` names; OptionError where neither says."""
    if model is not None:
        return model
    if base.revision is None:
        raise OptionError(
            f"the bank was built from a folder called {base.name!r}, which it does not know the path of", hint="--source MODEL"
        )
    return f"{base.name}@{base.revision}"


def task_of(bank: Bank, damage: Sequence[Damage]) -> Task:
    """What the damage of a bank, all of it, asks for. Sound bases of a shared shard are found by reading them."""
    recorded = {*bank.manifest.files}
    families, solved, files = [], {}, set[str]()
    harmed = {one.file for one in damage}
    for family in bank.index.families:
        own = {*family.metadata, *(name for name, _ in data_files(family))}
        recorded |= own
        if not (wrong := own & harmed):
            continue
        families.append(family)
        files |= wrong
        whole = any(name.split("/")[1] in _OF_THE_WEIGHTS for name in wrong)
        solved[family.spec.name] = tuple(
            weight.name for row, weight in enumerate(family.weights) if whole or not _is_sound(bank, family, row, wrong)
        )
    files |= harmed & {*bank.manifest.files}
    return Task(tuple(families), solved, frozenset(files), tuple(sorted(harmed - recorded)))


def _is_sound(bank: Bank, family: FamilyIndex, row: int, wrong: set[str]) -> bool:
    name, shard = family.weights[row].name, row // family.spec.weights_per_shard
    arrays = [array for array in family.files if shard_file(family.spec.name, array, shard) in wrong]
    if not arrays:
        return True
    if family.spec.weights_per_shard == 1:
        return False
    try:
        for array in arrays:
            bank.rows(array, [name])  # type: ignore[arg-type]
    except (DamageError, FileNotFoundError):
        return False
    return True


def carry_out(
    bank: Bank,
    task: Task,
    checkpoint: Checkpoint | None,
    specs: dict[str, WeightSpec],
    *,
    device: torch.device,
    progress: ProgressCallback,
) -> tuple[str, ...]:
    """Repair a bank as ``task`` says, solving on ``device``; the weights whose stored bytes are others than before, empty where all came
    back as they were.

    The caller holds the bank's lock. Raises WrongBaseError for a checkpoint of other weights, before anything is replaced.
    """
    workshop = bank.path / WORKSHOP
    if workshop.exists():
        disk.remove_tree(workshop)
    plan = _plan_of(bank, task.families)
    disk.make_dirs(workshop)
    disk.write_bytes(workshop / "plan.json", to_json(plan, indent=1))
    session = begin_session(workshop, [family.name for family in plan.families])
    writer = BankWriter(workshop, plan, generation=0, session=session)
    writer.begin()
    made: list[ShardRecord] = []
    wanted = {name for names in task.solved.values() for name in names}
    mender = Mender(bank, wanted, checkpoint, specs, device, progress)
    families = {family.spec.name: family for family in task.families}
    again: list[ShardSpec] = []
    for shard in plan.shards:
        family = families[shard.family]
        if any(weight.name in wanted for weight in family.weights[shard.start : shard.stop]):
            again.append(shard)
        else:
            session.add(mender.kept(family, shard))
    for shard, bases, record in mender.made(plan, families, again):
        complete = writer.write_shard(shard, bases, record)
        assert complete is not None
        made.append(complete)
    writer.publish(earlier=None, earlier_index=None)
    changed = _put_in_place(bank, task, open_bank(workshop, may_be_empty=True), made)
    for name in task.strays:
        if (bank.path / name).is_dir() and not (bank.path / name).is_symlink():
            continue
        disk.unlink(bank.path / name)
    disk.remove_tree(workshop)
    return changed


def _plan_of(bank: Bank, families: Sequence[FamilyIndex]) -> Plan:
    """How the families were solved, by the bank's plans; by the rule that made those where they are harmed."""
    shards: dict[str, list[ShardSpec]] = {}
    devices: dict[str, dict[str, DevicePath]] = {}
    for name in bank.manifest.plans:
        try:
            plan = read_plan(bank.path / name)
        except (SvdbankError, OSError):
            continue
        for shard in plan.shards:
            shards.setdefault(shard.family, []).append(shard)
        for kind, paths in plan.devices.items():
            own = {family.spec.name: paths[family.spec.name] for family in families if family.spec.name in paths}
            devices.setdefault(kind, {}).update(own)
    options = bank.manifest.options
    used = []
    for family in families:
        spec = family.spec
        told = sorted(shards.get(spec.name, []), key=lambda shard: shard.index)
        usual = shards_of(spec, options, threads=available_cpus())
        places = [(one.index, one.start, one.stop) for one in usual]
        used += told if [(one.index, one.start, one.stop) for one in told] == places else usual
    return Plan(
        format=1,
        base=bank.manifest.base,
        options=options,
        families=tuple(family.spec for family in families),
        shards=tuple(used),
        skips=(),
        devices=devices,
    )


def _put_in_place(bank: Bank, task: Task, workshop: Bank, made: Sequence[ShardRecord]) -> tuple[str, ...]:
    """Rename the new files over the damaged ones, and what is new to the index into it; the weights whose bytes changed."""
    root, source = bank.path, workshop.path
    fresh = {family.spec.name: family for family in workshop.index.families}
    old = {family.spec.name: family for family in task.families}
    changed, news = list[str](), False
    for record in made:
        before = {array: records[record.index] for array, records in old[record.family].files.items()}
        same = before == record.files
        news |= not same or record.weights != _members(old[record.family], record)
        if not same:
            changed += [weight.name for weight in record.weights if weight.name in task.solved[record.family]]
        for array in record.files:
            name = shard_file(record.family, array, record.index)
            if not same or name in task.files:
                move(source / attempt_file(record.family, array, record.index, record.attempt), root / name)
    for name, family in fresh.items():
        for path, record_now in family.metadata.items():
            if record_now != old[name].metadata.get(path) or path in task.files:
                move(source / path, root / path)
        news |= family.metadata != old[name].metadata
    named = dict(bank.manifest.files)
    for path in sorted(task.files & {*named} - {bank.manifest.index}):
        if path == "zarr.json":
            move(source / path, root / path)
        else:  # a plan
            disk.write_bytes(source / "again.json", to_json(_plan_again(bank, path), indent=1))
            move(source / "again.json", root / path)
        now = file_record((root / path).read_bytes())
        news |= now != named[path]
        named[path] = now
    if news:
        _republish(bank, tuple(fresh.get(f.spec.name, f) for f in bank.index.families), named)
    return tuple(changed)


def _members(family: FamilyIndex, record: ShardRecord) -> tuple[WeightRecord, ...]:
    names = {weight.name for weight in record.weights}
    return tuple(weight for weight in family.weights if weight.name in names)


def _plan_again(bank: Bank, path: str) -> Plan:
    """A plan as far as the index tells: which families it was of, not what was left out."""
    generation = bank.manifest.plans.index(path)
    mine = [family for family in bank.index.families if _generation(family.spec.name) == generation]
    return msgspec.structs.replace(_plan_of(bank, mine), aliases=bank.index.aliases if generation == 0 else ())


def _generation(family: str) -> int:
    _, sign, number = family.rpartition("-x")
    return int(number) if sign and number.isdecimal() else 0


def _republish(bank: Bank, families: tuple[FamilyIndex, ...], named: dict[str, FileRecord]) -> None:
    """An index and a manifest of what stands there now; the old index goes last."""
    index = Index(families=families, aliases=bank.index.aliases)
    hashes = {weight.name: weight.source_sha256 for family in families for weight in family.weights}
    hashes.update({alias.name: hashes[alias.of] for alias in index.aliases})
    data = to_json(index)
    record = file_record(data)
    index_file = f"index-{record.sha256[:16]}.json"
    disk.write_bytes(bank.path / index_file, data)
    files = {name: value for name, value in named.items() if name != bank.manifest.index} | {index_file: record}
    manifest: Manifest = msgspec.structs.replace(
        bank.manifest, base_digest=base_digest(hashes), index=index_file, files=files, digest=NO_DIGEST
    )
    encoded = to_json(manifest, indent=1)
    manifest = msgspec.structs.replace(manifest, digest=manifest_digest(encoded, NO_DIGEST))
    disk.write_bytes(bank.path / MANIFEST, to_json(manifest, indent=1))
    if bank.manifest.index != index_file:
        disk.unlink(bank.path / bank.manifest.index)


def take_over(root: Path, made: Bank, tell: Callable[[str], None]) -> None:
    """Every file of a whole bank that was made anew, renamed over what stands at ``root``; the manifest last, then what is left over."""
    names = [*made.manifest.files, *(name for family in made.index.families for name in _files_of(family))]
    for name in names:
        move(made.path / name, root / name)
        tell(name)
    move(made.path / MANIFEST, root / MANIFEST)
    for path in (*root.glob("index-*.json"), *root.glob("plan-*.json")):
        if path.name not in made.manifest.files:
            disk.unlink(path)
    families = {family.spec.name for family in made.index.families}
    for path in root.iterdir():  # families of extensions, which are one plan with the others now
        if not path.name.startswith(".") and path.name not in families and (path / "zarr.json").is_file():
            disk.remove_tree(path)


def _files_of(family: FamilyIndex) -> Iterator[str]:
    yield from family.metadata
    yield from (name for name, _ in data_files(family))


def move(source: Path, target: Path) -> None:
    """Rename over what stands there, within a bank. A folder in a file's place is moved into the workshop first."""
    disk.make_dirs(target.parent)
    if target.is_dir() and not target.is_symlink():
        disk.replace(target, source.with_name(f"{source.name}.was"))
    disk.replace(source, target)
