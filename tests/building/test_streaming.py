"""Builds of models that lie on a Hub: the bank of a local build comes out, or a clear error, and the next run finishes it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import svdbank
from svdbank.bank.layout import RECORDS
from svdbank_cli.main import run
from tests.building.small import tree
from tests.checkpoint.hub_server import Fault, LocalHub
from tests.checkpoint.small_models import load
from tests.peft.models import quiet

ROOT = Path(__file__).parents[2]
LAYERS = 4

#: Answers lines of JSON, [verb, model, bank, options], one by one.
PROGRAM = """
import json, sys
import msgspec, svdbank
for line in sys.stdin:
    verb, model, bank, options = json.loads(line)
    reports = []
    try:
        if verb == "build":
            svdbank.build(model, bank, rank=8, on_report=reports.append, **options)
        elif verb == "plan":
            reports.append(svdbank.plan(model, bank, rank=8, **options))
        else:
            reports.append(svdbank.verify(bank, model=model))
        seen = msgspec.to_builtins(reports[0])
    except svdbank.SvdbankError as error:
        seen = {"error": str(error), "hint": error.hint, "kind": type(error).__name__}
    print(json.dumps(seen), flush=True)
"""


class Builder:
    """A process with a Hugging Face cache of its own that plans and builds; ``most`` is the most that lay in the cache at a time."""

    def __init__(self, hub: LocalHub, folder: Path, **settings: str) -> None:
        self.cache = folder / "home" / "hub"
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        places = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**keep, **places, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr").open("a"),
            text=True,
        )
        self.errors = folder / "stderr"
        self.most = 0

    def __call__(self, verb: str, model: str, bank: Path, **options: object) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,))
        self.most = 0
        watcher.start()
        try:
            self.process.stdin.write(json.dumps([verb, model, str(bank), options]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        finally:
            done.set()
            watcher.join()
        assert line, self.errors.read_text()
        return json.loads(line)

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(0.002):
            self.most = max(self.most, self.weights_on_disk())

    def weights_on_disk(self) -> int:
        """Bytes of everything in the cache but the small files that are not weights."""
        total = 0
        for blob in self.cache.glob("models--*/blobs/*"):
            try:
                total += size if (size := blob.stat().st_size) > 100_000 else 0
            except FileNotFoundError:
                continue
        return total

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with LocalHub() as server:
        yield server


@pytest.fixture(scope="module")
def model(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Query, key and value of MiniLM's first layers, a file a layer, in whose order the families do not come."""
    folder = tmp_path_factory.mktemp("sharded")
    weight_map = {}
    with safe_open(minilm / "model.safetensors", "pt") as source:
        for layer in range(LAYERS):
            names = [f"encoder.layer.{layer}.attention.self.{part}.weight" for part in ("query", "key", "value")]
            file = f"model-{layer + 1:05}-of-{LAYERS:05}.safetensors"
            save_file({name: source.get_tensor(name)[:160].contiguous() for name in names}, folder / file)
            weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    return folder


@pytest.fixture(scope="module")
def shard(model: Path) -> int:
    """Bytes of one file."""
    return (model / "model-00001-of-00004.safetensors").stat().st_size


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bank of the same weights built from a local folder."""
    bank = tmp_path_factory.mktemp("local") / "bank"
    svdbank.build(model, bank, rank=8)
    return content(bank)


def content(bank: Path) -> dict[str, bytes]:
    """Every file of a bank but the two that name where the model came from."""
    return {name: data for name, data in tree(bank).items() if name not in ("plan.json", "manifest.json")}


@pytest.fixture(scope="module")
def shared_builder(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    builder = Builder(hub, tmp_path_factory.mktemp("builder"))
    yield builder
    builder.close()


@pytest.fixture
def builder(shared_builder: Builder, hub: LocalHub) -> Iterator[Builder]:
    yield shared_builder
    hub.faults.clear()
    hub.redirects = False


@pytest.fixture
def repo(hub: LocalHub, model: Path, request: pytest.FixtureRequest) -> str:
    """The model under a name that no other test uses, so that nothing of it is cached."""
    name = "org/" + hashlib.sha1(request.node.nodeid.encode()).hexdigest()[:12]
    hub.commit(name, {path.name: path.read_bytes() for path in model.iterdir()})
    return name


def weight_requests(hub: LocalHub, repo: str) -> list[str]:
    return [line for line in hub.requests if line.startswith("GET") and repo in line and line.endswith(".safetensors")]


WAYS = {
    "cache": {"fetch": "cache"},
    "shards": {"fetch": "shards"},
    "shards-deleted": {"fetch": "shards", "keep": False},
    "ranges": {"fetch": "ranges"},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_bank_of_a_local_build(
    way: str, hub: LocalHub, builder: Builder, repo: str, tmp_path: Path, shard: int, expected: dict[str, bytes]
) -> None:
    report = builder("build", repo, tmp_path / "bank", **WAYS[way])
    assert content(tmp_path / "bank") == expected
    fetch = report["fetch"]
    assert fetch["way"] == way.removesuffix("-deleted") and fetch["waiting_seconds"] > 0
    assert fetch["checked"] == (way != "ranges")
    # The header's guess is fetched on opening: 64 KiB of each file.
    assert LAYERS * shard * 0.99 < fetch["nbytes"] <= LAYERS * (shard + (64 << 10))
    assert builder.weights_on_disk() == (LAYERS * shard if way in ("cache", "shards") else 0) + left_before(builder, repo)
    if way in ("cache", "shards"):
        asked = len(weight_requests(hub, repo))
        again = builder("build", repo, tmp_path / "again", fetch="auto")["fetch"]
        assert (again["way"], again["checked"]) == ("local", False), "what is in the cache is trusted, not hashed again"
        assert len(weight_requests(hub, repo)) == asked, "what is in the cache is not fetched again"


def left_before(builder: Builder, repo: str) -> int:
    """What other tests left in the shared cache."""
    mine = f"models--{repo.replace('/', '--')}"
    blobs = [blob for blob in builder.cache.glob("models--*/blobs/*") if mine not in str(blob)]
    return sum(blob.stat().st_size for blob in blobs if blob.stat().st_size > 100_000)


@pytest.mark.parametrize("room", [1, 2])
def test_a_disk_budget_is_kept_at_every_moment(
    room: int, builder: Builder, repo: str, tmp_path: Path, shard: int, expected: dict[str, bytes]
) -> None:
    before = builder.weights_on_disk()
    budget = room * shard + 1000
    plan = builder("plan", repo, tmp_path / "bank", disk_budget=budget)["fetch"]
    assert (plan["way"], plan["keep"], plan["checked"]) == ("shards", False, True) and plan["disk_bytes"] <= budget
    report = builder("build", repo, tmp_path / "bank", disk_budget=budget)
    assert 0 < builder.most - before <= budget
    assert builder.weights_on_disk() == before, "all that was downloaded is deleted"
    assert report["fetch"]["way"] == "shards"
    assert content(tmp_path / "bank") == expected


def test_a_budget_below_a_shard_means_ranges_and_leaves_nothing_on_disk(
    builder: Builder, repo: str, tmp_path: Path, shard: int, expected: dict[str, bytes]
) -> None:
    before = builder.weights_on_disk()
    options = {"disk_budget": shard - 1, "targets": ["query", "value"]}
    plan = builder("plan", repo, tmp_path / "bank", **options)
    assert plan["fetch"]["way"] == "ranges" and plan["fetch"]["nbytes"] == plan["fetch_bytes"] == 2 * LAYERS * 160 * 384 * 4
    report = builder("build", repo, tmp_path / "bank", **options)
    assert builder.most == before
    assert report["fetch"]["nbytes"] <= plan["fetch"]["nbytes"] + LAYERS * (64 << 10)
    names = [name for name in content(tmp_path / "bank") if "/c/" in name and ("query" in name or "value" in name)]
    assert names and all(content(tmp_path / "bank")[name] == expected[name] for name in names)


@pytest.mark.parametrize("way", ["shards", "ranges"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault("drop", "-of-0000", times=4),
        Fault("status", "-of-0000", times=4, status=503),
        Fault("status", "-of-0000", times=2, status=429, retry_after="1"),
        Fault("slow", "00002-of", times=1, seconds=2.5),
        Fault("drop", "/storage/", times=4),
    ],
    ids=["drop", "503", "429", "slow", "storage-drop"],
)
def test_a_bad_connection_ends_in_the_right_bank(
    way: str, fault: Fault, hub: LocalHub, builder: Builder, repo: str, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    hub.redirects = fault.path == "/storage/"
    faulty = Fault(**{**vars(fault), "skip": LAYERS if fault.times > 1 else 1})  # headers first
    hub.faults.append(faulty)
    report = builder("build", repo, tmp_path / "bank", **WAYS["shards-deleted" if way == "shards" else way])
    assert "error" not in report, report
    assert faulty.times == 0 and report["fetch"]["retries"] >= fault.times
    assert content(tmp_path / "bank") == expected
    assert hub.leaked == []


def test_a_server_that_asks_for_a_second_is_not_asked_before(
    hub: LocalHub, builder: Builder, repo: str, tmp_path: Path
) -> None:
    hub.faults.append(Fault("status", "-of-0000", times=1, skip=LAYERS, status=429, retry_after="1"))
    report = builder("build", repo, tmp_path / "bank", fetch="shards", keep=False)
    assert report["fetch"]["waiting_seconds"] >= 0.9 and report["fetch"]["retries"] == 1


def test_a_server_that_stays_down_is_an_error_and_the_next_run_goes_on_in_the_middle_of_a_shard(
    hub: LocalHub, builder: Builder, repo: str, tmp_path: Path, shard: int, expected: dict[str, bytes]
) -> None:
    second = "model-00002-of-00004.safetensors"
    hub.faults += [Fault("drop", second, skip=1), Fault("status", second, times=100, skip=1, status=503)]
    report = builder("build", repo, tmp_path / "bank", fetch="shards", keep=False)
    assert "HTTP 503" in report["error"] and "after 8 tries" in report["error"] and report["hint"]
    assert not (tmp_path / "bank" / "manifest.json").exists()
    hub.faults.clear()
    asked = len(hub.ranges)
    again = builder("build", repo, tmp_path / "bank", fetch="shards", keep=False)
    assert content(tmp_path / "bank") == expected
    begins = [int(said[6:].split("-")[0]) for path, said in hub.ranges[asked:] if path.endswith(second)]
    assert begins == [shard // 2], "what was missing, and no header again: the plan says where the bytes lie"
    assert not [path for path, said in hub.ranges[asked:] if "00001-of" in path and not said.startswith("bytes=0-65535")]
    assert again["reused"] >= 3


def test_a_build_that_is_killed_while_files_come_is_finished_by_the_next(
    hub: LocalHub, model: Path, repo: str, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    hub.faults.append(Fault("slow", "00003-of", times=100, skip=1, seconds=4))  # longer than the client waits: it asks again
    killed = Builder(hub, tmp_path)
    assert killed.process.stdin is not None
    killed.process.stdin.write(json.dumps(["build", repo, str(tmp_path / "bank"), {"fetch": "shards"}]) + "\n")
    killed.process.stdin.flush()
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "bank" / RECORDS).rglob("*.json"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)  # the three weights of each of the first two files
    killed.process.kill()
    killed.process.wait()
    hub.faults.clear()
    assert not (tmp_path / "bank" / "manifest.json").exists()
    asked = len(hub.ranges)
    builder = Builder(hub, tmp_path)
    report = builder("build", repo, tmp_path / "bank", fetch="shards")
    builder.close()
    assert (report["reused"], report["solved"]) == (6, 6)
    assert content(tmp_path / "bank") == expected
    assert {path[-len("00003-of-00004.safetensors") :] for path, _ in hub.ranges[asked:]} == {
        f"0000{number}-of-00004.safetensors" for number in (3, 4)
    }, "what had come is not fetched again"
    assert not list(tmp_path.rglob("*.incomplete"))


def test_wrong_bytes_of_a_shard_are_fetched_again_and_if_they_stay_wrong_are_an_error(
    hub: LocalHub, builder: Builder, repo: str, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    hub.faults.append(Fault("wrong-bytes", "00003-of", times=100, skip=1))
    before = builder.weights_on_disk()
    report = builder("build", repo, tmp_path / "bank", fetch="shards", keep=False)
    assert "00003-of-00004.safetensors arrived twice with other bytes" in report["error"] and report["hint"]
    hub.faults[:] = [Fault("wrong-bytes", "00003-of", times=1, skip=1)]
    assert "error" not in builder("build", repo, tmp_path / "bank", fetch="shards", keep=False)
    assert content(tmp_path / "bank") == expected and builder.weights_on_disk() == before


@pytest.mark.parametrize(
    "kind, said",
    [
        ("other-range", "were asked for, the server sends"),
        ("other-etag", "its ETag is another one now"),
        ("other-file", "the server has another file there"),
        ("no-range", "does not answer byte ranges"),
    ],
)
def test_an_answer_to_another_question_is_refused(
    kind: Any, said: str, hub: LocalHub, builder: Builder, repo: str, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    hub.faults.append(Fault(kind, "-of-0000", times=100, skip=LAYERS))
    report = builder("build", repo, tmp_path / "bank", fetch="ranges")
    assert said in report["error"] and report["kind"] == "AnswerError" and report["hint"]
    hub.faults.clear()
    assert "error" not in builder("build", repo, tmp_path / "bank", fetch="ranges")
    assert content(tmp_path / "bank") == expected


def test_wrong_bytes_of_a_range_are_found_by_verify(hub: LocalHub, builder: Builder, repo: str, tmp_path: Path) -> None:
    """The Hub has no hash of a range: the report says that it was not checked, and a second reading tells."""
    hub.faults.append(Fault("wrong-bytes", "00003-of", times=1, skip=1))
    report = builder("build", repo, tmp_path / "bank", fetch="ranges")
    assert report["fetch"]["checked"] is False
    assert "other bytes" in builder("verify", repo, tmp_path / "bank")["error"]


def test_a_token_reaches_the_hub_and_not_where_it_redirects_to(hub: LocalHub, model: Path, tmp_path: Path) -> None:
    hub.commit("org/gated", {path.name: path.read_bytes() for path in model.iterdir()}, gated=True)
    hub.redirects = True
    for token, said in (("hf_secretsecret", None), ("", "hf auth login")):
        folder = tmp_path / ("with" if token else "without")
        folder.mkdir()
        builder = Builder(hub, folder, **({"HF_TOKEN": token} if token else {}))
        for way in ("ranges", "shards-deleted") if token else ("ranges",):
            report = builder("build", "org/gated", folder / way, **WAYS[way])
            assert (said or "") in report.get("hint", "") and ("error" in report) == bool(said), report
        builder.close()
        assert "secretsecret" not in (folder / "stderr").read_text()
    hub.redirects = False
    assert hub.leaked == [] and any(line.startswith("GET /storage/") for line in hub.requests)


def test_a_plan_downloads_no_weights_and_leaves_out_what_is_there(
    hub: LocalHub, builder: Builder, repo: str, tmp_path: Path, shard: int
) -> None:
    before = builder.weights_on_disk()
    report = builder("plan", repo, tmp_path / "bank")
    assert report["fetch"] == {
        "way": "shards", "files": LAYERS, "nbytes": LAYERS * shard, "disk_bytes": LAYERS * shard, "keep": True, "checked": True
    }  # fmt: skip
    asked = [said for path, said in hub.ranges if repo in path]
    assert asked == ["bytes=0-65535"] * LAYERS == ["bytes=0-65535"] * len(weight_requests(hub, repo))
    for targets, options in ((["nothing_like_it"], {}), (["query"], {"fetch": "shards", "disk_budget": 10})):
        said = builder("build", repo, tmp_path / "bank", targets=targets, **options)
        assert said["kind"] == "OptionError" and said["hint"]
    assert {said for path, said in hub.ranges if repo in path} == {"bytes=0-65535"} and builder.weights_on_disk() == before
    builder("build", repo, tmp_path / "bank", targets=["query"], fetch="ranges")
    assert builder("plan", repo, tmp_path / "bank", targets=["query"])["fetch"]["way"] == "local"
    rest = builder("plan", repo, tmp_path / "bank")
    assert rest["present"] == LAYERS and sum(family["count"] for family in rest["families"]) == 2 * LAYERS
    assert "rank 8; 9" not in json.dumps(rest)


def test_a_second_build_and_a_readme_commit_fetch_no_weights(
    hub: LocalHub, builder: Builder, repo: str, tmp_path: Path
) -> None:
    builder("build", repo, tmp_path / "bank", fetch="ranges")
    asked = len(hub.ranges)
    assert builder("build", repo, tmp_path / "bank")["reused"] == 3 * LAYERS
    assert {said for _, said in hub.ranges[asked:]} == {"bytes=0-65535"}


@pytest.mark.parametrize("banks", ["a bank each", "one bank"])
def test_two_processes_fetch_no_byte_twice(
    banks: str, hub: LocalHub, repo: str, model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """With one Hugging Face cache: whoever comes second to a file waits for it, also one that helps with another's share."""
    hub.faults.append(Fault("slow", repo, times=1000, seconds=0.1))  # so that they meet
    two = [Builder(hub, tmp_path) for _ in range(2)]
    places = [tmp_path / "bank", tmp_path / ("bank" if banks == "one bank" else "other")]
    shares: list[dict[str, str]] = [{"shard": "1/2"}, {"shard": "2/2"}] if banks == "one bank" else [{}, {}]
    try:
        with ThreadPoolExecutor(2) as pool:
            calls = [
                pool.submit(builder, "build", repo, place, fetch="shards", keep=True, **share)
                for builder, place, share in zip(two, places, shares, strict=True)
            ]
            reports = [call.result() for call in calls]
    finally:
        hub.faults.clear()
        for builder in two:
            builder.close()
    assert not any("error" in report for report in reports), reports
    assert all(content(place) == expected for place in places)
    # On opening, the header's guess: 64 KiB of each file. All else is asked for once.
    asked = [(path, said) for path, said in hub.ranges if repo in path and said != "bytes=0-65535"]
    assert len(asked) == len({*asked}) and {path.rpartition("/")[2] for path, _ in asked} == {
        path.name for path in model.glob("*.safetensors")
    }


def test_what_cannot_be_meant_is_said_before_any_request(builder: Builder, hub: LocalHub, tmp_path: Path) -> None:
    asked = len(hub.requests)
    for options in (
        {"fetch": "ranges", "keep": True},
        {"fetch": "cache", "keep": False},
        {"disk_budget": -1},
        {"fetch": "ftp"},
    ):
        assert builder("build", "org/none", tmp_path / "bank", **options)["kind"] == "OptionError"
    assert len(hub.requests) == asked


def test_the_same_values_in_other_shards_are_the_same_base(model: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    tensors = {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "model.safetensors").write_bytes(save(tensors))
    (tmp_path / "whole" / "config.json").write_bytes((model / "config.json").read_bytes())
    bank = svdbank.build(model, tmp_path / "bank", rank=8)
    again = svdbank.build(tmp_path / "whole", tmp_path / "bank", rank=8)
    assert again.base_digest() == bank.base_digest() and content(tmp_path / "bank") == expected


def test_the_same_values_in_another_dtype_are_recognised_and_a_change_that_is_no_cast_is_refused(
    model: Path, tmp_path: Path
) -> None:
    tensors = {name: tensor.bfloat16() for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for name, saved in {
        "bf16": tensors,
        "fp32": {name: tensor.float() for name, tensor in tensors.items()},
        "tuned": {name: tensor.float() * 1.01 for name, tensor in tensors.items()},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(save(saved))
        (tmp_path / name / "config.json").write_bytes((model / "config.json").read_bytes())
    svdbank.build(tmp_path / "bf16", tmp_path / "bank", rank=8, targets=["query"])
    before = tree(tmp_path / "bank")
    reports: list[Any] = []
    for again in ("bf16", "fp32"):
        svdbank.build(tmp_path / again, tmp_path / "bank", rank=8, targets=["query"], on_report=reports.append)
    assert [(report.same_bytes, report.solved, report.reused) for report in reports] == [(True, 0, 4), (False, 0, 4)]
    # The bank of the float32 original serves what it rounds to; that of the rounded weights is not one of the original.
    svdbank.build(model, tmp_path / "original", rank=8, targets=["query"])
    svdbank.build(tmp_path / "bf16", tmp_path / "original", rank=8, targets=["query"], on_report=reports.append)
    assert (reports[-1].same_bytes, reports[-1].reused) == (False, 4)
    with pytest.raises(svdbank.WrongBaseError, match="other bytes"):
        svdbank.build(model, tmp_path / "bank", rank=8, targets=["query"])
    with pytest.raises(svdbank.WrongBaseError, match="other bytes"):
        svdbank.build(tmp_path / "tuned", tmp_path / "bank", rank=8, targets=["query"])
    with pytest.raises(svdbank.WrongBaseError, match="saved in another dtype"):
        svdbank.build(tmp_path / "fp32", tmp_path / "bank", rank=8)
    assert tree(tmp_path / "bank") == before


def test_a_model_saved_again_is_recognised_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bfloat16 in one file, then by transformers again in shards, in float32, and with one value of a weight changed."""
    from transformers import AutoModelForCausalLM

    with quiet():
        load("llama-untied").to(torch.bfloat16).save_pretrained(tmp_path / "first")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype="auto")
        again.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
        again.float().save_pretrained(tmp_path / "float32", max_shard_size="200KB")
        with torch.no_grad():
            again.model.layers[1].mlp.up_proj.weight.mul_(1.01)
        again.save_pretrained(tmp_path / "tuned")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2 < len(list((tmp_path / "float32").glob("*.safetensors")))
    command = ["-o", str(tmp_path / "bank"), "--rank", "4", "--targets", "up_proj"]
    assert run(["build", str(tmp_path / "first"), *command]) == 0
    before = tree(tmp_path / "bank")
    seen = {}
    for name in ("shards", "float32"):
        capsys.readouterr()
        assert run(["build", str(tmp_path / name), *command]) == 0
        seen[name] = capsys.readouterr().out
        assert "reused 3 of 3 weights: nothing to do" in seen[name]
        assert run(["build", str(tmp_path / name), *command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["same_bytes"] == (name == "shards")
    said = "the same values saved in another dtype: it serves this model as it is"
    assert said in seen["float32"] and said not in seen["shards"]
    assert run(["build", str(tmp_path / "tuned"), *command]) == 12
    assert "layers.1.mlp.up_proj.weight of tuned has other bytes" in capsys.readouterr().err
    assert tree(tmp_path / "bank") == before
