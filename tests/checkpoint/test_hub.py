"""The real ``huggingface_hub`` client against a local Hub: each case is a process of its own, as the client reads its settings once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from svdbank.checkpoint import open_checkpoint
from svdbank.checkpoint.hub import parse_id
from svdbank.errors import OptionError
from tests.checkpoint.hub_server import Fault, LocalHub

PROGRAM = """
import json, sys
from svdbank.checkpoint import decomposable, open_checkpoint
from svdbank.errors import SvdbankError
calls = []
try:
    with open_checkpoint(sys.argv[1], progress=lambda *call: calls.append(call)) as c:
        specs = decomposable(c)[0]
        hashes = {spec.name: c.read_hashed(spec)[1] for spec in specs} if "read" in sys.argv else {}
        print(json.dumps({"name": c.name, "revision": c.revision, "key": c.cache_key, "folder": str(c.folder), "config": c.config,
                          "files": [(f.name, f.identity) for f in c.files], "specs": len(specs), "hashes": hashes, "calls": calls}))
except SvdbankError as error:
    print(json.dumps({"error": str(error), "hint": error.hint, "kind": type(error).__name__}))
"""
CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()


def weights(seed: int, count: int = 2) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return save({f"layers.{i}.q_proj.weight": torch.randn(8, 6, generator=generator) for i in range(count)})


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub() as server:
        yield server


class Client:
    """Runs ``open_checkpoint`` in a process whose Hub is ``hub`` and whose cache is ``home``."""

    def __init__(self, hub: LocalHub, home: Path) -> None:
        self.hub, self.home = hub, home

    def __call__(self, model: str, *words: str, **settings: str) -> dict:
        keep = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "SVDBANK_"))}
        environment = {**keep, "HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), **settings}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, model, *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "%|" not in done.stderr, "the library must draw no progress bar"
        return json.loads(done.stdout)

    def snapshots(self) -> list[Path]:
        return sorted(self.home.glob("hub/models--*/snapshots/*/*"))


@pytest.fixture
def client(hub: LocalHub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


def test_a_name_is_pinned_to_the_commit_it_resolved_to_and_only_configuration_and_weights_are_fetched(
    hub: LocalHub, client: Client
) -> None:
    files = {"config.json": CONFIG, "model.safetensors": weights(0), "README.md": b"hello", "pytorch_model.bin": b"x" * 1000}
    commit = hub.commit("org/name", {**files, "onnx/model.safetensors": weights(9)})
    seen = client("org/name", "read")
    blob = hub.repositories["org/name"].commits[commit]["model.safetensors"]
    assert (seen["name"], seen["revision"], seen["specs"]) == ("org/name", commit, 2)
    assert seen["files"] == [["model.safetensors", blob.sha256]]
    assert seen["config"] == json.loads(CONFIG)
    assert sorted(path.name for path in client.snapshots()) == ["config.json", "model.safetensors"]
    assert all(path.is_symlink() for path in client.snapshots())
    stage, done, total = seen["calls"][-1]
    assert (stage, done, total) == ("download", len(CONFIG) + len(blob.data), len(CONFIG) + len(blob.data))
    assert [call[1] for call in seen["calls"]] == sorted(call[1] for call in seen["calls"])


def test_a_readme_commit_leaves_the_cache_key_unchanged_and_a_weight_commit_changes_it(hub: LocalHub, client: Client) -> None:
    hub.commit("org/name", {"config.json": CONFIG, "model.safetensors": weights(0)})
    first = client("org/name")
    second_commit = hub.commit("org/name", {"README.md": b"new"})
    second = client("org/name")
    assert second["revision"] == second_commit != first["revision"]
    assert second["key"] == first["key"]
    assert (
        second["calls"] == []
        or second["calls"][-1][1] == 0
        or not any("GET" in r and "model.safetensors" in r for r in hub.requests[-8:])
    )
    hub.commit("org/name", {"model.safetensors": weights(1)})
    assert client("org/name")["key"] != first["key"]


def test_branch_tag_and_commit_name_their_own_weights(hub: LocalHub, client: Client) -> None:
    first = hub.commit("org/name", {"config.json": CONFIG, "model.safetensors": weights(0)})
    second = hub.commit("org/name", {"model.safetensors": weights(1)})
    third = hub.commit("org/name", {"config.json": CONFIG, "model.safetensors": weights(2, 3)}, branch="dev")
    seen = {model: client(model) for model in (f"org/name@{first}", "org/name@dev", "hf://org/name", "hf://org/name@main")}
    assert [s["revision"] for s in seen.values()] == [first, third, second, second]
    assert [s["specs"] for s in seen.values()] == [2, 3, 2, 2]
    assert len({s["key"] for s in seen.values()}) == 3


def test_offline_the_cached_commit_gives_the_same_key_and_no_request(hub: LocalHub, client: Client) -> None:
    hub.commit("org/name", {"config.json": CONFIG, "model.safetensors": weights(0)})
    online = client("org/name", "read")
    hub.commit("org/name", {"model.safetensors": weights(1)})
    asked = len(hub.requests)
    for model in ("org/name", f"org/name@{online['revision']}", "hf://org/name@main"):
        offline = client(model, "read", HF_HUB_OFFLINE="1")
        assert {**offline, "calls": []} == {**online, "calls": []}
    assert len(hub.requests) == asked
    with open_checkpoint(online["folder"]) as checkpoint:
        assert checkpoint.cache_key == online["key"]


def test_a_cached_commit_needs_no_request_even_with_a_connection(hub: LocalHub, client: Client) -> None:
    commit = hub.commit("org/name", {"config.json": CONFIG, "model.safetensors": weights(0)})
    online = client(f"org/name@{commit}")
    asked = len(hub.requests)
    assert client(f"org/name@{commit}")["key"] == online["key"]
    assert len(hub.requests) == asked


def test_a_hub_that_is_down_falls_back_to_the_cache(hub: LocalHub, client: Client) -> None:
    hub.commit("org/name", {"config.json": CONFIG, "model.safetensors": weights(0)})
    online = client("org/name")
    assert client("org/name", HF_ENDPOINT="http://127.0.0.1:9")["key"] == online["key"]
    hub.faults.append(Fault("status", "/api/models/", times=50, status=503))
    assert client("org/name")["key"] == online["key"]


SHARDS = {
    "model-00001-of-00002.safetensors": save({"layers.0.q_proj.weight": torch.ones(4, 4)}),
    "model-00002-of-00002.safetensors": save({"layers.1.q_proj.weight": torch.ones(4, 4)}),
}
INDEX = json.dumps({"weight_map": {f"layers.{i}.q_proj.weight": name for i, name in enumerate(SHARDS)}}).encode()


def test_shards_are_fetched_by_the_index_and_nothing_else(hub: LocalHub, client: Client) -> None:
    files = {"config.json": CONFIG, "model.safetensors.index.json": INDEX, **SHARDS}
    hub.commit("org/name", {**files, "consolidated.safetensors": weights(7), "model-00003-of-00002.safetensors": weights(8)})
    seen = client("org/name", "read")
    assert [name for name, _ in seen["files"]] == list(SHARDS)
    assert sorted(path.name for path in client.snapshots()) == sorted(files)
    for path in client.snapshots():
        if path.name == "model-00002-of-00002.safetensors":
            path.unlink()
    offline = client("org/name", HF_HUB_OFFLINE="1")
    assert "not complete in the Hugging Face cache" in offline["error"]
    assert client("org/name", "read")["hashes"] == seen["hashes"]


@pytest.mark.parametrize("name", ["../../secret.safetensors", "sub/x.safetensors", "*.safetensors", "gone.safetensors"])
def test_an_index_on_the_hub_cannot_name_files_outside_or_missing(hub: LocalHub, client: Client, name: str) -> None:
    index = json.dumps({"weight_map": {"a.weight": name}}).encode()
    hub.commit(
        "org/name",
        {
            "config.json": CONFIG,
            "model.safetensors.index.json": index,
            "other.safetensors": weights(0),
            "sub/x.safetensors": weights(0),
        },
    )
    seen = client("org/name")
    assert seen["kind"] == "CheckpointError"
    assert "only a bare" in seen["error"] or "which the repository does not hold" in seen["error"]
    assert [path.name for path in client.snapshots()] == ["model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("model", "said", "hint"),
    [
        ("org/nothing", "neither a path here nor a repository", "hf auth login"),
        ("org/name@nothing", "no such revision", "branch"),
        ("org/gated", "access to this repository must be granted", "hf auth login"),
        ("org/pickled", "can run code", "save_pretrained"),
        ("org/empty", "no *.safetensors file", "org/name"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_next_step(
    hub: LocalHub, client: Client, model: str, said: str, hint: str
) -> None:
    hub.commit("org/name", {"config.json": CONFIG, "model.safetensors": weights(0)})
    hub.commit("org/gated", {"config.json": CONFIG, "model.safetensors": weights(0)}, gated=True)
    hub.commit("org/pickled", {"config.json": CONFIG, "pytorch_model.bin": b"x"})
    hub.commit("org/empty", {"README.md": b"x"})
    seen = client(model)
    assert said in seen["error"] and model in seen["error"] and hint in seen["hint"]
    assert "Traceback" not in seen["error"]
    assert not client.home.exists() or not any(path.suffix == ".safetensors" for path in client.home.rglob("*"))


def test_a_token_opens_a_gated_repository_and_is_never_shown(hub: LocalHub, client: Client) -> None:
    hub.commit("org/gated", {"config.json": CONFIG, "model.safetensors": weights(0)}, gated=True)
    seen = client("org/gated", HF_TOKEN="hf_secretsecret")
    assert seen["specs"] == 2
    hub.faults.append(Fault("status", "/api/models/", times=50, status=403))
    seen = client("org/gated", HF_TOKEN="hf_secretsecret")
    assert "HTTP 403" in seen["error"] and "secretsecret" not in json.dumps(seen)


def test_offline_without_a_cached_copy_is_said(client: Client) -> None:
    seen = client("org/name@v1", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids" in seen["error"]
    assert seen["hint"].endswith("HF_HUB_OFFLINE=0 hf download org/name --revision v1")


def test_no_connection_and_no_cached_copy_is_said(client: Client) -> None:
    seen = client("org/name", HF_ENDPOINT="http://127.0.0.1:9")
    assert "the Hub cannot be reached" in seen["error"] and "HF_ENDPOINT" in seen["hint"]


def test_wrong_bytes_are_found_by_their_sha256_and_do_not_stay_in_the_cache(hub: LocalHub, client: Client) -> None:
    hub.commit("org/name", {"config.json": CONFIG, "model.safetensors": weights(0)})
    hub.faults.append(Fault("wrong-bytes", "model.safetensors"))
    seen = client("org/name")
    assert "other bytes than the Hub's sha256" in seen["error"]
    assert [path.name for path in client.snapshots()] == ["config.json"]
    assert "HF_HUB_OFFLINE forbids" in client("org/name", HF_HUB_OFFLINE="1")["error"]
    assert client("org/name", "read")["specs"] == 2


@pytest.mark.parametrize("kind", ["drop", "status"])
def test_a_connection_that_breaks_ends_in_the_right_bytes_or_a_clear_error_and_the_next_run_finishes(
    hub: LocalHub, client: Client, kind: str
) -> None:
    commit = hub.commit("org/name", {"config.json": CONFIG, "model.safetensors": weights(0, 200)})
    hub.faults.append(Fault("drop" if kind == "drop" else "status", "model.safetensors", times=1, status=500))
    seen = client("org/name", "read")
    if "error" in seen:
        assert "org/name" in seen["error"] and seen["hint"]
        seen = client("org/name", "read")
    assert seen["revision"] == commit and len(seen["hashes"]) == 200


def test_a_path_that_exists_wins_over_the_hub(
    hub: LocalHub, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/name", {"config.json": CONFIG, "model.safetensors": weights(0)})
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights(1, 5))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    local, remote = client("org/name"), client("hf://org/name")
    assert (local["revision"], local["specs"], local["folder"]) == (None, 5, str(folder))
    assert remote["specs"] == 2
    assert hub.requests


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", ("org/name", None)),
        ("org/name@main", ("org/name", "main")),
        ("HuggingFaceTB/SmolLM2-135M@refs/pr/1", ("HuggingFaceTB/SmolLM2-135M", "refs/pr/1")),
        ("a/b.c-d_e@v1.0", ("a/b.c-d_e", "v1.0")),
    ],
)
def test_an_id_is_read_in_its_parts(text: str, parts: tuple[str, str | None]) -> None:
    assert parse_id(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "a/b/c",
        "../x",
        "a/..",
        "a/b@",
        "a/b@../../x",
        "a/b@x/../y",
        "a/b@/x",
        "a/b c",
        "a/b\n",
        "datasets/a/b",
        "",
        "a/b@x@y",
        "é/b",
    ],
)
def test_what_is_no_id_is_refused_before_any_request(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_id(text)
    assert caught.value.hint
