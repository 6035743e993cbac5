"""A push that is killed at any of its requests leaves the commit that was there or the whole new one, and the next push ends well."""

from __future__ import annotations

import copy
import multiprocessing
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

import svdbank
from tests.building.small import tree
from tests.checkpoint.hub_server import LocalHub, point_client

BESIDE = {"README.md", ".gitattributes", "LICENSE.md"}


def push_in_child(bank: Path, url: str, home: Path, token: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        point_client(patch, url, home, token)
        svdbank.push(bank, "me/bank", force=True)


def killed_at(hub: LocalHub, bank: Path, home: Path, number: int) -> str | None:
    """Push in a process of its own, kill it as request ``number`` comes in; that request, None where the push ended before it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["svdbank.verbs.push", "huggingface_hub.hf_api", __name__])
    process: ForkServerProcess = context.Process(target=push_in_child, args=(bank, hub.url, home, "hf_aToken"))
    seen: list[str] = []

    def kill(request: str) -> None:
        seen.append(request)
        if len(seen) == number:
            process.kill()
            process.join()

    hub.before = kill
    process.start()
    process.join()
    hub.before = None
    while hub.under_way:  # what the dead process asked for is carried out or not, as on a real Hub
        time.sleep(0.01)
    return seen[number - 1] if len(seen) >= number and process.exitcode != 0 else None


class Case:
    """A repository that holds one bank, into which another is pushed."""

    def __init__(self, hub: LocalHub, banks: dict[str, Path], home: Path) -> None:
        self.hub, self.bank, self.home = hub, banks["hub"], home
        svdbank.push(banks["less"], "me/bank")
        self.before, self.objects = copy.deepcopy(hub.repositories["me/bank"]), dict(hub.objects)
        self.old, self.new = tree(banks["less"]), tree(banks["hub"])

    def kill(self, number: int) -> str | None:
        """Kill a push at a request, look at what is there, and push again."""
        self.hub.repositories["me/bank"], self.hub.objects = copy.deepcopy(self.before), dict(self.objects)
        request = killed_at(self.hub, self.bank, self.home, number)
        found = self.shown()
        assert found in (self.old, self.new), request
        uploads = sum(one.startswith("PUT") for one in self.hub.requests)
        svdbank.push(self.bank, "me/bank", force=True)
        assert self.shown() == self.new, request
        assert len(self.hub.repositories["me/bank"].commits) == len(self.before.commits) + 1, request
        if found == self.new or (request is not None and "/commit/" in request):
            assert sum(one.startswith("PUT") for one in self.hub.requests) == uploads, request
        return request

    def shown(self) -> dict[str, bytes]:
        head = self.hub.repositories["me/bank"].head()
        return {name: blob.data for name, blob in head.items() if name not in BESIDE}

    def requests(self) -> list[str]:
        """Those of a push that nobody disturbs. The second: what the Hub's client has in its cache it does not ask for again."""
        for _ in ("with an empty cache", "as all that follow"):
            self.hub.repositories["me/bank"], self.hub.objects = copy.deepcopy(self.before), dict(self.objects)
            self.hub.requests.clear()
            svdbank.push(self.bank, "me/bank", force=True)
        return list(self.hub.requests)


@pytest.fixture
def case(hub: LocalHub, banks: dict[str, Path], tmp_path: Path) -> Case:
    return Case(hub, banks, tmp_path / "hf")


def test_a_push_that_is_killed_leaves_the_old_commit_or_the_new_one(case: Case) -> None:
    requests = case.requests()
    first = [one.split()[0] for one in requests].index("PUT") + 1
    commit = next(number for number, one in enumerate(requests, 1) if "/commit/" in one)
    for number in (first, commit - 1, commit, commit + 1):
        assert case.kill(number) is not None


@pytest.mark.soak
def test_a_push_that_is_killed_at_each_request_leaves_the_old_commit_or_the_new_one(case: Case) -> None:
    kills = [case.kill(number) for number in range(1, len(case.requests()) + 1)]
    assert None not in kills
