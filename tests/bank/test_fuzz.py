"""Whatever stands in a bank's, an adapter's or a checkpoint's documents: an answer or an error of ours, in little time.

Documents are taken apart as JSON, changed in one to three places, and put together again with every hash made to fit, so that the change is
looked at and not only its hash; or bytes are changed as they are. ``SVDBANK_FUZZ_SECONDS`` is how long the soak goes on.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import svdbank
from svdbank import cache
from svdbank.adapter.settings import CACHE, CONFIG, WEIGHTS
from svdbank.bank.layout import MANIFEST, NO_DIGEST, ShardRecord, manifest_digest
from svdbank.building.freezing import frozen_plan
from svdbank.building.standing import unfinished_info
from svdbank.checkpoint import open_checkpoint
from svdbank.core.errors import DamageError, SvdbankError
from svdbank.core.specs import from_json
from tests.structure.source import ROOT

#: What a stranger writes where something else belongs.
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 16, 2**31, 2**63, 2**70, -(2**70), 1e308, -1e308, 1e-320, 0.5, "", "x", "NaN", "../..", "a/b", "\0",
    "\u202e", "é" * 300, "x" * 5000, [], {}, [[]], [0] * 50, {"a": {}}, ["x"] * 20, "(a+)+$", "float32", "left", "all",
]  # fmt: skip


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(document, dict):
        for key, value in document.items():
            yield from places(value, (*at, key))
    elif isinstance(document, list):
        for number, value in enumerate(document[:6]):
            yield from places(value, (*at, number))


def mutated(document: Any, chance: random.Random) -> Any:
    """The document with one to three of its values replaced, removed, doubled or moved."""
    document = json.loads(json.dumps(document))
    for _ in range(chance.randint(1, 3)):
        at = chance.choice(list(places(document)))
        if not at:
            if chance.random() < 0.1:
                return copy.deepcopy(chance.choice(NASTY))
            continue
        parent = document
        for step in at[:-1]:
            parent = parent[step]
        kind, last = chance.randrange(5), at[-1]
        if kind == 0 and isinstance(parent, dict):
            del parent[last]
        elif kind == 1 and isinstance(parent, dict):
            parent[chance.choice(["x", "", last + "x", "digest"])] = parent.pop(last)
        elif kind == 2 and isinstance(parent, list):
            parent.insert(last, copy.deepcopy(parent[last]))
        elif kind == 3 and isinstance(parent[last], int):
            parent[last] += chance.choice([-1, 1, 7, 2**33])
        else:
            parent[last] = copy.deepcopy(chance.choice(NASTY))
    return document


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if changed:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed[: chance.randrange(len(changed) + 1)] if chance.random() < 0.2 else changed)


def fitted(bank: Path, chance: random.Random) -> None:
    """Change manifest, index, plan or metadata, and make every hash that covers it fit again."""
    manifest = json.loads((bank / MANIFEST).read_bytes())
    index = json.loads((bank / manifest["index"]).read_bytes())
    which, name = chance.randrange(4), manifest["index"]
    if which == 0:
        manifest = mutated(manifest, chance)
    elif which == 1:
        index = mutated(index, chance)
    elif which == 2:
        path = chance.choice(sorted(bank.glob("*/*/zarr.json")))
        data = json.dumps(mutated(json.loads(path.read_bytes()), chance)).encode()
        path.write_bytes(data)
        record = index["families"][0]["metadata"].get(path.relative_to(bank).as_posix())
        if record is not None:
            record.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    else:
        data = json.dumps(mutated(json.loads((bank / "plan.json").read_bytes()), chance)).encode()
        (bank / "plan.json").write_bytes(data)
        manifest["files"]["plan.json"].update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    publish(bank, manifest, index, name)


def publish(bank: Path, manifest: Any, index: Any, name: str) -> None:
    """Write an index and a manifest whose hashes fit."""
    data = json.dumps(index).encode()
    (bank / name).write_bytes(data)
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) and isinstance(manifest["files"].get(name), dict):
        manifest["files"][name].update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    if isinstance(manifest, dict):
        manifest["digest"] = NO_DIGEST
    data = json.dumps(manifest).encode()
    (bank / MANIFEST).write_bytes(data.replace(NO_DIGEST.encode(), manifest_digest(data, NO_DIGEST).encode()))


def use_bank(bank: Path) -> None:
    """Everything that reads a bank; each use by itself, so that one refusal hides no other."""
    opened = None
    with contextlib.suppress(SvdbankError):
        opened = svdbank.open(bank)
    uses: list[Callable[[], object]] = [
        lambda: svdbank.verify(bank, data=True),
        lambda: svdbank.info(bank),
        lambda: cache.is_bank(bank),
        lambda: svdbank.repair(bank, dry_run=True),
    ]
    if opened is not None:
        held = opened
        for name in held.names[:2]:
            uses += [lambda name=name: held[name].left(4), lambda name=name: held[name].right(18)]  # type: ignore[misc]
            uses += [lambda name=name: held[name].sigma(2), lambda name=name: held[name].probe()]  # type: ignore[misc]
        uses += [held.base_digest, lambda: held.rank, lambda: repr(held)]
    for use in uses:
        with contextlib.suppress(SvdbankError):
            use()


def attack_bank(folder: Path, chance: random.Random) -> None:
    bank = Path(shutil.copytree(ROOT / "tests" / "data" / "format-1", folder / "bank"))
    if chance.random() < 0.8:
        fitted(bank, chance)
    else:
        path = chance.choice(sorted(path for path in bank.rglob("*") if path.is_file()))
        path.write_bytes(mutated_bytes(path.read_bytes(), chance))
    use_bank(bank)


def attack_unfinished(folder: Path, chance: random.Random) -> None:
    """A frozen plan and the records beside it."""
    bank = Path(shutil.copytree(ROOT / "tests" / "data" / "format-1", folder / "bank"))
    (bank / MANIFEST).unlink()
    plan = json.loads((bank / "plan.json").read_bytes())
    (bank / "plan.json").write_text(json.dumps(mutated(plan, chance)))
    session = bank / "records" / "0123456789abcdef" / plan["families"][0]["name"]
    session.mkdir(parents=True)
    record = {"family": plan["families"][0]["name"], "index": 0, "attempt": "x", "weights": [], "files": {}, "sigma": [[1.0]]}
    data = json.dumps(mutated(record | {"principal_sigma": [], "probe": [[0.5]]}, chance)).encode()
    (session / "0.json").write_bytes(data)
    for use in (
        lambda: frozen_plan(bank),
        lambda: unfinished_info(bank),
        lambda: from_json(data, ShardRecord, where="record", error=DamageError),
        lambda: cache.is_bank(bank),
        lambda: svdbank.open(bank),
        lambda: svdbank.repair(bank, dry_run=True),
    ):
        with contextlib.suppress(SvdbankError):
            use()


def adapter(folder: Path) -> Path:
    source = folder.parent / "source"
    if not source.exists():
        svdbank.init(ROOT / "tests" / "data" / "format-1", output=source, rank=2)
    return Path(shutil.copytree(source, folder / "adapter"))


def attack_adapter(folder: Path, chance: random.Random) -> None:
    place = adapter(folder)
    if chance.random() < 0.85:
        path = place / chance.choice([CONFIG, CACHE])
        document = json.loads(path.read_bytes())
        document = mutated(document, chance)
        if path.name == CACHE and isinstance(document, dict):
            document["digest"] = ""
        path.write_text(json.dumps(document))
    else:
        path = place / chance.choice([CONFIG, CACHE, WEIGHTS])
        path.write_bytes(mutated_bytes(path.read_bytes(), chance))
    bank = ROOT / "tests" / "data" / "format-1"
    for use in (
        lambda: svdbank.read_adapter(place),
        lambda: svdbank.read_adapter(place, bank=svdbank.open(bank)),
        lambda: svdbank.stack([place], output=folder / "stack", scale={"adapter": 0.5}),
    ):
        with contextlib.suppress(SvdbankError):
            use()


def attack_checkpoint(folder: Path, chance: random.Random) -> None:
    import torch
    from safetensors.torch import save_file

    place = folder / "model"
    place.mkdir()
    name = "encoder.layer.0.attention.self.query.weight"
    save_file({name: torch.ones(4, 3), "encoder.layer.0.x": torch.ones(2)}, place / "model.safetensors")
    (place / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertModel"], "num_hidden_layers": 1})
    )
    data = (place / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    if chance.random() < 0.6:
        header = json.dumps(mutated(json.loads(data[8 : 8 + length]), chance)).encode()
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
    else:
        data = mutated_bytes(data, chance)
    (place / "model.safetensors").write_bytes(data)
    if chance.random() < 0.3:
        config = json.loads((place / "config.json").read_bytes())
        (place / "config.json").write_text(json.dumps(mutated(config, chance)))
    with contextlib.suppress(SvdbankError), open_checkpoint(place) as checkpoint:
        svdbank.plan(place, rank=2, targets=("query",))
        list(checkpoint.tensors)


ATTACKS = {
    "bank": attack_bank,
    "unfinished": attack_unfinished,
    "adapter": attack_adapter,
    "checkpoint": attack_checkpoint,
}


def once(kind: str, seed: int, folder: Path) -> None:
    place = folder / f"{kind}-{seed}"
    place.mkdir(parents=True)
    begun = time.process_time()
    try:
        ATTACKS[kind](place, random.Random(seed))
    except Exception as error:
        raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(place)
    assert time.process_time() - begun < 30, f"{kind}, seed {seed}"


@pytest.mark.parametrize("kind", ATTACKS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_strange_documents_end_in_an_answer_or_an_error_of_ours(kind: str, seed: int, memory_disk: Path) -> None:
    once(kind, seed, memory_disk)


@pytest.mark.soak
def test_strange_documents_for_a_quarter_of_an_hour(memory_disk: Path) -> None:
    until, seed, counts = time.time() + float(os.environ.get("SVDBANK_FUZZ_SECONDS", "900")), 0, dict.fromkeys(ATTACKS, 0)
    while time.time() < until:
        for kind in ATTACKS:
            once(kind, seed, memory_disk)
            counts[kind] += 1
        seed += 1
    print(counts)
    assert all(counts.values())
