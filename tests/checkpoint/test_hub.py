"""The real ``huggingface_hub`` client against a local Hub: each case is a process of its own, as the client reads its settings once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save

from svdbank.checkpoint import open_checkpoint
from svdbank.checkpoint.remote.shards import admitted
from svdbank.core.errors import CheckpointError, OptionError
from svdbank.core.hub_refusals import FIRST_WAIT, wait_before_retry
from svdbank.core.places import OnHub, locate
from tests.checkpoint.hub_server import Fault, LocalHub

#: Answers one line of JSON, [model, whether to download and read], with another.
PROGRAM = """
import json, sys
from svdbank.checkpoint import decomposable, open_checkpoint
from svdbank.core.errors import SvdbankError
for line in sys.stdin:
    model, read = json.loads(line)
    calls = []
    try:
        with open_checkpoint(model) as c:
            specs = decomposable(c)[0]
            if read and c.remote is not None:
                c.remote.download(lambda *call: calls.append(call))
                c.remote.remember()
            hashes = {spec.name: c.read_hashed(spec)[1] for spec in specs} if read else {}
            seen = {"name": c.name, "revision": c.revision, "key": c.cache_key, "folder": str(c.folder), "config": c.config,
                    "files": [(f.name, f.identity) for f in c.files], "specs": len(specs), "hashes": hashes, "calls": calls}
    except SvdbankError as error:
        seen = {"error": str(error), "hint": error.hint, "kind": type(error).__name__}
    print(json.dumps(seen), flush=True)
"""
ROOT = Path(__file__).parents[2]
CONFIG = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()


def weights(seed: int, count: int = 2) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return save({f"layers.{i}.q_proj.weight": torch.randn(8, 6, generator=generator) for i in range(count)})


class Client:
    """Processes that run ``open_checkpoint`` with one cache, one for each combination of settings."""

    def __init__(self, hub: LocalHub, folder: Path) -> None:
        self.hub, self.folder, self.home = hub, folder, folder / "home"
        self.workers: dict[tuple[tuple[str, str], ...], subprocess.Popen[str]] = {}

    def __call__(self, model: str, *, read: bool = False, **settings: str) -> dict:
        worker = self.workers.get(key := tuple(sorted(settings.items())))
        if worker is None:
            keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "SVDBANK_"))}
            environment = {**keep, "HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "PYTHONPATH": str(ROOT), **settings}
            with self.errors.open("a") as errors:
                worker = self.workers[key] = subprocess.Popen(
                    [sys.executable, "-c", PROGRAM],
                    env=environment,
                    cwd=self.folder,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(json.dumps([model, read]) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        assert line, self.errors.read_text()
        return json.loads(line)

    @property
    def errors(self) -> Path:
        return self.folder / "stderr"

    def snapshots(self, name: str) -> list[Path]:
        """The files of a repository in the cache."""
        return sorted(self.home.glob(f"hub/models--{name.replace('/', '--')}/snapshots/*/*"))

    def close(self) -> None:
        for worker in self.workers.values():
            worker.communicate(timeout=30)


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with LocalHub() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub, tmp_path_factory.mktemp("hub-client"))
    yield client
    client.close()


@pytest.fixture
def repo(hub: LocalHub, request: pytest.FixtureRequest) -> Iterator[str]:
    """A repository id that no other test uses."""
    yield "org/" + hashlib.sha1(request.node.nodeid.encode()).hexdigest()[:12]
    hub.faults.clear()


def test_a_name_is_pinned_to_the_commit_it_resolved_to_and_only_configuration_and_weights_are_fetched(
    hub: LocalHub, client: Client, repo: str
) -> None:
    files = {"config.json": CONFIG, "model.safetensors": weights(0), "README.md": b"hello", "pytorch_model.bin": b"x" * 1000}
    commit = hub.commit(repo, {**files, "onnx/model.safetensors": weights(9)})
    seen = client(repo, read=True)
    blob = hub.repositories[repo].commits[commit]["model.safetensors"]
    assert (seen["name"], seen["revision"], seen["specs"]) == (repo, commit, 2)
    assert seen["files"] == [["model.safetensors", blob.sha256]]
    assert seen["config"] == json.loads(CONFIG)
    assert sorted(path.name for path in client.snapshots(repo)) == ["config.json", "model.safetensors"]
    assert all(path.is_symlink() for path in client.snapshots(repo))
    stage, done, total = seen["calls"][-1]
    assert (stage, done, total) == ("download", len(blob.data), len(blob.data))
    assert [call[1] for call in seen["calls"]] == sorted(call[1] for call in seen["calls"])


def test_a_readme_commit_leaves_the_cache_key_unchanged_and_a_weight_commit_changes_it(
    hub: LocalHub, client: Client, repo: str
) -> None:
    hub.commit(repo, {"config.json": CONFIG, "model.safetensors": weights(0)})
    first = client(repo, read=True)
    second_commit = hub.commit(repo, {"README.md": b"new"})
    asked = len(hub.requests)
    second = client(repo)
    assert second["revision"] == second_commit != first["revision"]
    assert second["key"] == first["key"]
    assert not [request for request in hub.requests[asked:] if request.startswith("GET") and "/resolve/" in request]
    hub.commit(repo, {"model.safetensors": weights(1)})
    assert client(repo)["key"] != first["key"]


def test_branch_tag_and_commit_name_their_own_weights(hub: LocalHub, client: Client, repo: str) -> None:
    first = hub.commit(repo, {"config.json": CONFIG, "model.safetensors": weights(0)})
    second = hub.commit(repo, {"model.safetensors": weights(1)})
    third = hub.commit(repo, {"config.json": CONFIG, "model.safetensors": weights(2, 3)}, branch="dev")
    seen = {model: client(model) for model in (f"{repo}@{first}", f"{repo}@dev", f"hf://{repo}", f"hf://{repo}@main")}
    assert [s["revision"] for s in seen.values()] == [first, third, second, second]
    assert [s["specs"] for s in seen.values()] == [2, 3, 2, 2]
    assert len({s["key"] for s in seen.values()}) == 3


def test_offline_the_cached_commit_gives_the_same_key_and_no_request(hub: LocalHub, client: Client, repo: str) -> None:
    hub.commit(repo, {"config.json": CONFIG, "model.safetensors": weights(0)})
    online = client(repo, read=True)
    hub.commit(repo, {"model.safetensors": weights(1)})
    asked = len(hub.requests)
    for model in (repo, f"{repo}@{online['revision']}", f"hf://{repo}@main"):
        offline = client(model, read=True, HF_HUB_OFFLINE="1")
        assert {**offline, "calls": []} == {**online, "calls": []}
    assert len(hub.requests) == asked
    with open_checkpoint(online["folder"]) as checkpoint:
        assert checkpoint.cache_key == online["key"]


def test_a_cached_commit_needs_no_request_even_with_a_connection(hub: LocalHub, client: Client, repo: str) -> None:
    commit = hub.commit(repo, {"config.json": CONFIG, "model.safetensors": weights(0)})
    online = client(f"{repo}@{commit}", read=True)
    asked = len(hub.requests)
    assert client(f"{repo}@{commit}")["key"] == online["key"]
    assert len(hub.requests) == asked


def test_a_hub_that_is_down_falls_back_to_the_cache(hub: LocalHub, client: Client, repo: str) -> None:
    hub.commit(repo, {"config.json": CONFIG, "model.safetensors": weights(0)})
    online = client(repo, read=True)
    assert client(repo, HF_ENDPOINT="http://127.0.0.1:9")["key"] == online["key"]
    hub.faults.append(Fault("status", "/api/models/", times=50, status=503))
    assert client(repo)["key"] == online["key"]


SHARDS = {
    "model-00001-of-00002.safetensors": save({"layers.0.q_proj.weight": torch.ones(4, 4)}),
    "model-00002-of-00002.safetensors": save({"layers.1.q_proj.weight": torch.ones(4, 4)}),
}
INDEX = json.dumps({"weight_map": {f"layers.{i}.q_proj.weight": name for i, name in enumerate(SHARDS)}}).encode()


def test_shards_are_fetched_by_the_index_and_nothing_else(hub: LocalHub, client: Client, repo: str) -> None:
    files = {"config.json": CONFIG, "model.safetensors.index.json": INDEX, **SHARDS}
    hub.commit(repo, {**files, "consolidated.safetensors": weights(7), "model-00003-of-00002.safetensors": weights(8)})
    seen = client(repo, read=True)
    assert [name for name, _ in seen["files"]] == list(SHARDS)
    assert sorted(path.name for path in client.snapshots(repo)) == sorted(files)
    for path in client.snapshots(repo):
        if path.name == "model-00002-of-00002.safetensors":
            path.unlink()
    offline = client(repo, HF_HUB_OFFLINE="1")
    assert "not complete in the Hugging Face cache" in offline["error"]
    assert client(repo, read=True)["hashes"] == seen["hashes"]


def test_a_cache_whose_links_lead_nowhere_is_fetched_again_and_said_offline(hub: LocalHub, client: Client, repo: str) -> None:
    """Somebody has cleaned up ``blobs/``."""
    hub.commit(repo, {"config.json": CONFIG, "model.safetensors.index.json": INDEX, **SHARDS})
    seen = client(repo, read=True)
    links = [path for path in client.snapshots(repo) if path.suffix == ".safetensors"]
    for gone in ("model-00001-of-00002.safetensors", "config.json"):
        link = next(path for path in client.snapshots(repo) if path.name == gone)
        link.resolve().unlink()
        assert link.is_symlink() and not link.exists()
        assert "not complete in the Hugging Face cache" in client(repo, HF_HUB_OFFLINE="1")["error"]
        with pytest.raises(CheckpointError, match="cannot be followed") as caught:
            open_checkpoint(links[0].parent)
        assert caught.value.hint and "download the model again" in caught.value.hint
        assert client(repo, read=True)["hashes"] == seen["hashes"]
        assert link.exists()


def test_weights_in_the_cache_without_their_configuration_are_no_model_offline(
    hub: LocalHub, client: Client, repo: str
) -> None:
    """``hf download --include '*.safetensors'``: GPT-2 would be read untransposed, codes as values."""
    commit = hub.commit(repo, {"config.json": CONFIG, "model.safetensors": weights(0)})
    seen = client(repo, read=True)
    (config,) = [path for path in client.snapshots(repo) if path.name == "config.json"]
    config.unlink()
    assert "not complete in the Hugging Face cache" in client(repo, HF_HUB_OFFLINE="1")["error"]
    assert client(f"{repo}@{commit}")["config"] == seen["config"], "known by its commit, and asked for all the same"
    assert client(repo, HF_HUB_OFFLINE="1")["key"] == seen["key"]


def test_a_model_without_configuration_is_one_offline_too(hub: LocalHub, client: Client, repo: str) -> None:
    hub.commit(repo, {"model.safetensors": weights(0)})
    seen = client(repo, read=True)
    offline = client(repo, HF_HUB_OFFLINE="1")
    assert offline["key"] == seen["key"] and offline["config"] == seen["config"] == {}


@pytest.mark.parametrize("name", ["../../secret.safetensors", "sub/x.safetensors", "*.safetensors", "gone.safetensors"])
def test_an_index_on_the_hub_cannot_name_files_outside_or_missing(hub: LocalHub, client: Client, repo: str, name: str) -> None:
    index = json.dumps({"weight_map": {"a.weight": name}}).encode()
    hub.commit(
        repo,
        {
            "config.json": CONFIG,
            "model.safetensors.index.json": index,
            "other.safetensors": weights(0),
            "sub/x.safetensors": weights(0),
        },
    )
    seen = client(repo)
    assert seen["kind"] == "CheckpointError"
    assert "only a bare" in seen["error"] or "which the repository does not hold" in seen["error"]
    assert [path.name for path in client.snapshots(repo)] == ["model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("files", "revision", "said", "hint"),
    [
        (None, "", "neither a path here nor a repository", "hf auth login"),
        ({"model.safetensors": weights(0)}, "@nothing", "no such revision", "branch"),
        (
            {"gated": b"", "config.json": CONFIG, "model.safetensors": weights(0)},
            "",
            "access to this repository must be",
            "hf auth login",
        ),
        ({"config.json": CONFIG, "pytorch_model.bin": b"x"}, "", "can run code", "save_pretrained"),
        ({"README.md": b"x"}, "", "no *.safetensors file", "org/name"),
    ],
    ids=["unknown", "revision", "gated", "pickled", "empty"],
)
def test_what_the_hub_refuses_is_said_with_the_next_step(
    hub: LocalHub, client: Client, repo: str, files: dict[str, bytes] | None, revision: str, said: str, hint: str
) -> None:
    if files is not None:
        hub.commit(repo, files, gated="gated" in files)
    seen = client(repo + revision)
    assert said in seen["error"] and repo + revision in seen["error"] and hint in seen["hint"]
    assert client.snapshots(repo) == []


QUANTISED = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


@pytest.mark.parametrize("scheme", QUANTISED)
def test_a_quantised_repository_is_refused_with_the_model_that_its_card_names(
    hub: LocalHub, client: Client, repo: str, scheme: str
) -> None:
    config = json.dumps({"model_type": "llama", "quantization_config": QUANTISED[scheme]}).encode()
    card = b"---\nlicense: mit\nbase_model:\n- Org/Full-7B\n---\n# Quantised\n"
    hub.commit(repo, {"config.json": config, "model.safetensors": weights(0), "README.md": card})
    seen = client(repo)
    assert "after training" in seen["error"]
    assert seen["hint"] == "name the full-precision repository; this one says it was made from Org/Full-7B"
    assert [path.name for path in client.snapshots(repo)] == ["README.md", "config.json"]
    assert not [path for path, _ in hub.ranges if repo in path], "refused before any header"
    hub.faults.append(Fault("status", "README.md", times=99, status=403, method="HEAD"))
    hub.commit(repo, {"README.md": card + b"more"})
    seen = client(repo)
    assert "after training" in seen["error"] and "its model card says which one" in seen["hint"]


def test_packed_weights_without_a_configuration_are_refused_with_the_model_that_the_card_names(
    hub: LocalHub, client: Client, repo: str
) -> None:
    packed = {
        "a.qweight": torch.zeros(16, 128, dtype=torch.int32),
        "a.qzeros": torch.zeros(1, 16, dtype=torch.int32),
        "a.scales": torch.ones(1, 128, dtype=torch.float16),
    }
    card = b"---\nbase_model: Org/Full-7B\n---\n"
    hub.commit(repo, {"config.json": CONFIG, "model.safetensors": save(packed), "README.md": card})
    assert client(repo)["hint"].endswith("made from Org/Full-7B")


def test_a_token_opens_a_gated_repository_and_is_never_shown(hub: LocalHub, client: Client, repo: str) -> None:
    hub.commit(repo, {"config.json": CONFIG, "model.safetensors": weights(0)}, gated=True)
    seen = client(repo, HF_TOKEN="hf_secretsecret")
    assert seen["specs"] == 2
    hub.faults.append(Fault("status", "/api/models/", times=50, status=403))
    seen = client(repo, HF_TOKEN="hf_secretsecret")
    assert "HTTP 403" in seen["error"] and "secretsecret" not in json.dumps(seen)


def test_too_many_requests_is_said_as_such(hub: LocalHub, client: Client, repo: str) -> None:
    hub.commit(repo, {"config.json": CONFIG, "model.safetensors": weights(0)})
    hub.faults.append(Fault("status", f"/api/models/{repo}", times=50, status=429))
    seen = client(repo)
    assert "too many requests" in seen["error"] and "run it again" in seen["hint"]


def test_offline_without_a_cached_copy_is_said(client: Client, repo: str) -> None:
    seen = client(f"{repo}@v1", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids" in seen["error"]
    assert seen["hint"].endswith(f"HF_HUB_OFFLINE=0 hf download {repo} --revision v1")


def test_no_connection_and_no_cached_copy_is_said(client: Client, repo: str) -> None:
    seen = client(repo, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the Hub cannot be reached" in seen["error"] and "HF_ENDPOINT" in seen["hint"]


def test_wrong_bytes_are_found_by_their_sha256_and_do_not_stay_in_the_cache(hub: LocalHub, client: Client, repo: str) -> None:
    hub.commit(repo, {"config.json": CONFIG, "model.safetensors": weights(0)})
    hub.faults.append(Fault("wrong-bytes", "model.safetensors", skip=1))  # after the header
    seen = client(repo, read=True)
    assert "other bytes than the Hub's sha256" in seen["error"]
    assert [path.name for path in client.snapshots(repo)] == ["config.json"]
    assert "HF_HUB_OFFLINE forbids" in client(repo, HF_HUB_OFFLINE="1")["error"]
    assert client(repo, read=True)["specs"] == 2


def test_no_file_of_a_failed_download_stays_unchecked_in_the_cache(hub: LocalHub, client: Client, repo: str) -> None:
    # Both shards arrive wrong, or one wrong and the other not at all: neither may be trusted by the next run.
    parts = {f"model-{i}-of-2.safetensors": weights(i, 1) for i in (1, 2)}
    parts["model-2-of-2.safetensors"] = save({"layers.1.q_proj.weight": torch.ones(8, 6)})
    names = {"layers.0.q_proj.weight": "model-1-of-2.safetensors", "layers.1.q_proj.weight": "model-2-of-2.safetensors"}
    commit = hub.commit(
        repo, {"config.json": CONFIG, "model.safetensors.index.json": json.dumps({"weight_map": names}).encode(), **parts}
    )
    for first in (Fault("wrong-bytes", "model-1", times=9), Fault("status", "model-1", times=99, status=403)):
        first.skip = 1  # the header
        hub.faults[:] = [first, Fault("wrong-bytes", "model-2", times=9, skip=1)]
        failed = client(repo, read=True)
        assert "model-2-of-2.safetensors" in failed["error"] and "other bytes" in failed["error"]
        assert not [path for path in client.snapshots(repo) if path.suffix == ".safetensors"]
    hub.faults.clear()
    seen = client(repo, read=True)
    files = hub.repositories[repo].commits[commit]
    assert seen["files"] == [[name, files[name].sha256] for name in sorted(parts)]


def test_a_file_id_that_is_no_hash_is_refused_since_it_would_be_a_path(hub: LocalHub, client: Client, repo: str) -> None:
    commit = hub.commit(repo, {"config.json": CONFIG, "model.safetensors": weights(0)})
    hub.repositories[repo].commits[commit]["model.safetensors"].__dict__["sha256"] = "../../../outside"
    seen = client(repo)
    assert seen["kind"] == "CheckpointError" and "no hash" in seen["error"] and seen["hint"]


@pytest.mark.parametrize("kind", ["drop", "status"])
def test_a_connection_that_breaks_ends_in_the_right_bytes_or_a_clear_error_and_the_next_run_finishes(
    hub: LocalHub, client: Client, repo: str, kind: str
) -> None:
    commit = hub.commit(repo, {"config.json": CONFIG, "model.safetensors": weights(0, 200)})
    hub.faults.append(Fault("drop" if kind == "drop" else "status", "model.safetensors", times=1, skip=1, status=500))
    seen = client(repo, read=True)
    if "error" in seen:
        assert repo in seen["error"] and seen["hint"]
        seen = client(repo, read=True)
    assert seen["revision"] == commit and len(seen["hashes"]) == 200


def test_a_path_that_exists_wins_over_the_hub(hub: LocalHub, client: Client, repo: str) -> None:
    hub.commit(repo, {"config.json": CONFIG, "model.safetensors": weights(0)})
    folder = client.folder / repo
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights(1, 5))
    local, remote = client(repo), client(f"hf://{repo}")
    assert (local["revision"], local["specs"], local["folder"]) == (None, 5, str(folder.resolve()))
    assert (remote["specs"], remote["name"]) == (2, repo)


def test_nothing_was_drawn_or_printed_by_the_library(client: Client) -> None:
    # The last test of these processes: huggingface_hub's own log lines are its own, bars and tracebacks would be ours.
    text = client.errors.read_text()
    assert "%|" not in text and "it/s" not in text and "Traceback" not in text


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
    assert locate(text) == locate(f"hf://{text}") == OnHub(*parts)


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
        open_checkpoint(f"hf://{text}")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("https://huggingface.co/org/name/", "org/name"),
        ("hf.co/org/na.me?library=x", "org/na.me"),
        ("https://huggingface.co/org/name/tree/v1.0", "org/name@v1.0"),
        ("https://huggingface.co/org/name/resolve/main/model.safetensors", "org/name@main"),
        ("https://huggingface.co/datasets/org/name", None),
        ("https://example.org/org/name", None),
    ],
)
def test_the_address_of_a_page_is_refused_with_the_name_of_its_model(address: str, named: str | None) -> None:
    with pytest.raises(OptionError) as caught:
        open_checkpoint(address)
    assert caught.value.hint == (f"name it as {named}" if named else "write org/name or org/name@revision, or check the path")


def test_a_blob_that_repositories_share_is_read_and_a_link_elsewhere_is_not(tmp_path: Path) -> None:
    """The Hub client keeps Xet files once for all repositories: the blob is then a link into the cache's own store."""
    repository = tmp_path / "hub" / "models--org--name"
    digest, store = "ab" * 32, tmp_path / "hub" / "blobs" / "ab"
    for folder in (store, repository / "blobs", repository / "snapshots" / "c0ffee"):
        folder.mkdir(parents=True)
    (store / digest).write_bytes(weights(0))
    (repository / "blobs" / "the-id").symlink_to(Path("../../blobs/ab") / digest)
    link = repository / "snapshots" / "c0ffee" / "model.safetensors"
    link.symlink_to("../../blobs/the-id")
    with open_checkpoint(link.parent) as checkpoint:
        assert [file.identity for file in checkpoint.files] == ["the-id"]
    (tmp_path / "secret").write_bytes(weights(0))
    (repository / "blobs" / "the-id").unlink()
    (repository / "blobs" / "the-id").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="only the Hugging Face cache's links"):
        open_checkpoint(link.parent)


def test_files_are_admitted_where_they_fit_beside_those_that_are_still_read() -> None:
    uses = [frozenset("a"), frozenset("ab"), frozenset("b"), frozenset("bc"), frozenset("c"), frozenset("a")]
    sizes = dict.fromkeys("abc", 10)
    assert admitted(uses, sizes, None) == ["a", "b", "c"]
    assert admitted(uses, sizes, 30) == ["a", "b", "c"]
    # a is needed to the end: with room for two, b comes in beside it and c does not, until b is through.
    assert admitted(uses, sizes, 20) == ["a", "b"]
    assert admitted(uses[:5], sizes, 20) == ["a", "b", "c"]
    assert admitted(uses[:5], sizes, 10) == ["a", "c"]
    assert admitted(uses, sizes, 9) == []


@pytest.mark.parametrize(
    ("status", "headers", "low", "high"),
    [
        (429, {"Retry-After": "7"}, 7, 7),
        (429, {"RateLimit": '"resolvers";r=0;t=55'}, 55, 55),
        (503, {}, 0.5 * FIRST_WAIT * 4, 1.5 * FIRST_WAIT * 4),
        (503, {"Retry-After": "100000"}, None, None),
        (404, {}, None, None),
        (403, {"Retry-After": "1"}, None, None),
    ],
)
def test_a_server_is_asked_again_when_it_says_or_after_ever_longer_waits(
    status: int, headers: dict[str, str], low: float | None, high: float | None
) -> None:
    response = SimpleNamespace(status_code=status, headers=headers, request=None)
    error = HfHubHTTPError("no", response=response)  # type: ignore[arg-type]
    wait = wait_before_retry(error, 3)
    assert wait is None if low is None or high is None else wait is not None and low <= wait <= high
