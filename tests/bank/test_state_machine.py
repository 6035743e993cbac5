"""Build, extend, kill, damage, verify, repair, push and pull in any order, against a model of what must hold.

What is published can be looked up at every moment, as it was computed: after a kill the old bank or the new one, under damage the sound
weights, the others with an error. ``verify`` is right, ``repair`` ends sound, an undisturbed bank has the same bytes, the Hub holds
what was last pushed and nothing unsound.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor

import svdbank
from svdbank.bank.layout import MANIFEST
from svdbank.building.freezing import frozen_plan
from svdbank.core import disk
from svdbank.core.errors import DamageError, OptionError
from tests.bank.test_repair import HARMS, KINDS
from tests.building.crashes import Crash, FaultyDisk
from tests.building.small import tree
from tests.checkpoint.hub_server import LocalHub

RANK = 6
LAYERS = {"query": 3, "key": 2}
#: Documents without which all is solved anew, under one plan: other bytes of the same subspaces.
ANEW = ("manifest", "index", "plan")


def write_model(folder: Path) -> Path:
    """Three weights of one role and two of another."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"encoder.layer.{layer}.attention.self.{role}.weight": torch.randn(8, 12 + 2 * number, generator=generator)
        for number, (role, count) in enumerate(LAYERS.items())
        for layer in range(count)
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    return folder


@cache
def references(model: Path) -> tuple[dict[tuple[str, ...], dict[str, bytes]], dict[str, Tensor]]:
    """Files of undisturbed banks by the order of their roles, and the vectors of each weight."""
    files, vectors = {}, {}
    for order in (("query",), ("key",), ("query", "key"), ("key", "query")):
        place = model.parent / "-".join(order)
        for role in order:
            bank = svdbank.build(model, place, rank=RANK, targets=[role], device="cpu", threads=1)
        files[order] = tree(place)
        vectors |= {name: bank[name].left(RANK) for name in bank.names}
    return files, vectors


class Life(RuleBasedStateMachine):
    """One bank and one repository."""

    model: Path
    place: Path
    hub: LocalHub
    #: Lives lived, and steps in them, refused ones too.
    counted: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=self.place))
        self.bank = self.folder / "bank"
        self.order: tuple[str, ...] = ()
        #: The role of an extension that was killed before it was published.
        self.begun: str | None = None
        self.harmed = False
        #: Whether index or manifest were harmed: then all that is planned is solved, that of a killed extension too.
        self.lost = False
        self.repairing = False
        self.same_bytes = True
        self.pushed: dict[str, bytes] | None = None
        self.repository = f"me/{self.folder.name.lower().strip('_').replace('_', 'x')}"

    def teardown(self) -> None:
        self.counted["lives"] += 1
        shutil.rmtree(self.folder)

    @property
    def left(self) -> tuple[str, ...]:
        """Roles of the plan that a kill left unfinished."""
        with contextlib.suppress(DamageError):
            frozen = frozen_plan(self.bank) if self.bank.exists() else None
            names = () if frozen is None else [name for family in frozen.plan.families for name in family.weights]
            return tuple(role for role in LAYERS if any(f".{role}." in name for name in names))
        return ()

    def build(self, role: str) -> None:
        svdbank.build(self.model, self.bank, rank=RANK, targets=[role], device="cpu", threads=1)

    @initialize(role=st.sampled_from(sorted(LAYERS)))
    def first(self, role: str) -> None:
        self.build(role)
        self.order = (role,)

    @precondition(lambda self: not self.harmed)
    @rule(role=st.sampled_from(sorted(LAYERS)))
    def extend(self, role: str) -> None:
        left = self.left
        if left and role not in left and role not in self.order:
            with pytest.raises(OptionError, match="unfinished"):
                self.build(role)
            return
        self.build(role)
        self.order = tuple(dict.fromkeys((*self.order, role)))

    @precondition(lambda self: not self.harmed and len(self.order) < len(LAYERS))
    @rule(at=st.integers(0, 90))
    def kill_an_extension(self, at: int) -> None:
        (role,) = set(LAYERS) - set(self.order)
        with disk.observe(FaultyDisk(self.folder, stop_at=at)), contextlib.suppress(Crash):
            self.build(role)
        names = svdbank.open(self.bank).names
        if any(f".{role}." in name for name in names):
            self.order = (*self.order, role)
        else:
            self.begun = role

    @precondition(lambda self: not self.harmed)
    @rule(
        kind=st.sampled_from(sorted(KINDS)),
        harm=st.sampled_from(["flipped", "cut", "deleted", "a pipe"]),
        which=st.integers(0, 3),
    )
    def damage(self, kind: str, harm: str, which: int) -> None:
        pattern = KINDS[kind].replace("c/1/0/0", "c/0/0/0")
        found = sorted(self.bank.glob(pattern))
        recorded = {path for path in found if path.parent == self.bank or path.parts[len(self.bank.parts)] in self.families()}
        path = sorted(recorded)[which % len(recorded)]
        HARMS[harm](path)
        self.harmed = True
        self.lost = self.lost or kind in ("manifest", "index")
        self.same_bytes = self.same_bytes and kind not in ANEW

    def families(self) -> set[str]:
        return {family.spec.name for family in svdbank.open(self.bank).index.families}

    @rule()
    def verify(self) -> None:
        if not self.repairing:
            with contextlib.suppress(DamageError):
                assert svdbank.verify(self.bank, data=True).sound is not self.harmed

    @rule()
    def repair(self) -> None:
        svdbank.repair(self.bank, model=self.model)
        self.harmed = self.repairing = False
        assert svdbank.verify(self.bank, data=True, model=self.model).sound

    @precondition(lambda self: self.harmed)
    @rule(at=st.integers(0, 60))
    def kill_a_repair(self, at: int) -> None:
        self.repairing = True
        with disk.observe(FaultyDisk(self.folder, stop_at=at)), contextlib.suppress(Crash):
            svdbank.repair(self.bank, model=self.model)
            self.harmed = self.repairing = False

    @rule()
    def push(self) -> None:
        if self.repairing:
            return
        options: dict[str, Any] = {"base": "org/base", "source": self.model, "force": True}
        if self.harmed:
            with pytest.raises(DamageError):
                svdbank.push(self.bank, self.repository, **options)
            return
        svdbank.push(self.bank, self.repository, **options)
        self.pushed = {name: data for name, data in tree(self.bank).items() if name in self.recorded()}

    def recorded(self) -> set[str]:
        from svdbank.sharing.inventory import inventory

        return {file.name for file in inventory(svdbank.open(self.bank))}

    @precondition(lambda self: self.pushed is not None)
    @rule()
    def pull(self) -> None:
        there = self.folder / "pulled"
        svdbank.pull(f"hf://{self.repository}", into=there)
        assert self.pushed is not None
        found = {name: data for name, data in tree(there).items() if not name.startswith(".")}
        assert {name: found.get(name) for name in self.pushed} == self.pushed
        assert svdbank.verify(there, data=True).sound
        shutil.rmtree(there)

    @invariant()
    def what_is_published_is_as_it_was_computed(self) -> None:
        self.counted["steps"] += 1
        if not self.order:
            return
        files, vectors = references(self.model)
        try:
            bank = svdbank.open(self.bank)
        except DamageError:
            assert self.harmed
            return
        roles = {name.split(".")[-2] for name in bank.names}
        if self.lost and roles == {*self.order, self.begun}:
            self.order = (*self.order, *(roles - {*self.order}))
        assert roles == set(self.order)
        wrong = 0
        for name in bank.names:
            try:
                left = bank[name].left(RANK)
            except DamageError:
                wrong += 1
                continue
            # A bank that was made anew has them of the same machine, solver and threads.
            assert torch.equal(left, vectors[name])
        assert self.harmed or not wrong
        if not self.harmed and self.same_bytes and not self.left:
            own = tree(self.bank)
            assert {name: own.get(name) for name in files[self.order]} == files[self.order]
            assert (self.bank / MANIFEST).exists()


@pytest.fixture
def lives(memory_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with LocalHub() as hub:
        hub.point(monkeypatch, tmp_path / "hf", token=hub.login("me"))
        monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "svdbank"))
        model = write_model(memory_disk / "model")
        hub.commit("org/base", {path.name: path.read_bytes() for path in model.iterdir()})
        yield type("OneLife", (Life,), {"model": model, "place": memory_disk, "hub": hub})


def test_any_order_of_what_befalls_a_bank(lives: Any, single_thread: None) -> None:
    own = settings(
        max_examples=6, stateful_step_count=9, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(lives, settings=own)  # type: ignore[no-untyped-call]


@pytest.mark.soak
def test_any_order_of_what_befalls_a_bank_for_long(lives: Any, single_thread: None) -> None:
    count = int(os.environ.get("SVDBANK_LIVES", "300"))
    own = settings(max_examples=count, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(lives, settings=own)  # type: ignore[no-untyped-call]
    print(dict(Life.counted))
