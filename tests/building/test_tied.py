"""A tied embedding and output head are one matrix: one SVD, stored once, read from both sides."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

import svdbank
from svdbank.bank.layout import Index
from svdbank.bank.reading import Bank
from svdbank.core.errors import DamageError
from svdbank.core.specs import Alias, to_json
from svdbank.verbs.build import BuildReport
from svdbank_cli.main import run
from tests.docs.spec_reader import RefusedError, SpecBank

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, device: str) -> Path:
    """Names and configuration of a tied Llama: the head is not stored. Builds take the device that ``auto`` finds: the test's."""
    folder = tmp_path_factory.mktemp("tied")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        EMBEDDING: torch.randn(60, 24, generator=generator),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(24, 24, generator=generator),
    }
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 60, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def build(checkpoint: Path, bank: Path, *targets: str, **options: Any) -> tuple[Bank, BuildReport]:
    reports: list[BuildReport] = []
    made = svdbank.build(checkpoint, bank, rank=6, targets=targets, on_report=reports.append, **options)
    return made, reports[0]


def assert_one_svd_from_both_sides(bank: Bank) -> None:
    embedding, head = bank[EMBEDDING], bank[HEAD]
    assert sorted((embedding.exchanged, head.exchanged)) == [False, True]
    assert (embedding.out_features, embedding.in_features, embedding.kind) == (24, 60, "embedding")
    assert (head.out_features, head.in_features, head.kind) == (60, 24, "head")
    assert embedding.source_sha256 == head.source_sha256 and embedding.certificate == head.certificate
    both = [EMBEDDING, HEAD]
    left, right = bank.left(both, 4), bank.right(both, 4)
    assert torch.equal(left[HEAD], right[EMBEDDING]) and torch.equal(left[EMBEDDING], right[HEAD])
    assert torch.equal(head.sigma(4), embedding.sigma(4))


def test_one_svd_serves_both_and_the_vectors_are_stored_once(checkpoint: Path, tmp_path: Path) -> None:
    bank, report = build(checkpoint, tmp_path / "bank", "embed_tokens", "lm_head", "q_proj", principal=3)
    assert (report.weights, report.solved) == (3, 2)
    assert_one_svd_from_both_sides(bank)
    assert bank[HEAD].exchanged
    embedding = torch.randn(60, 24, generator=torch.Generator().manual_seed(0)).double()
    U, S, Vh = torch.linalg.svd(embedding, full_matrices=False)  # the head is (vocabulary, hidden)
    for name, side in ((HEAD, U), (EMBEDDING, Vh.mT)):
        basis = bank[name].left(6).double()
        # Entries in float32: each column is off by at most 2⁻²⁵ of itself.
        assert float(torch.linalg.matrix_norm(basis - side[:, -6:] @ (side[:, -6:].mT @ basis), 2)) < 1e-6
        largest = bank.principal_left([name], 3)[name].double()
        assert float(torch.linalg.matrix_norm(largest - side[:, :3] @ (side[:, :3].mT @ largest), 2)) < 1e-6
    assert torch.allclose(bank[HEAD].sigma(6), S[-6:], rtol=0, atol=1e-12 * float(S[0]))
    assert svdbank.verify(bank.path, data=True).sound
    only, _ = build(checkpoint, tmp_path / "only", "embed_tokens", "q_proj", principal=3)
    assert only.manifest.nbytes == bank.manifest.nbytes
    assert only.base_digest() == bank.base_digest(only.names) != bank.base_digest()


def test_plan_and_info_show_that_one_decomposition_serves_both(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, ends = str(tmp_path / "bank"), ["--targets", "embed_tokens", "--targets", "lm_head"]
    said = f"{HEAD} is {EMBEDDING} with the sides exchanged"
    assert run(["plan", str(checkpoint), "-o", place, "--rank", "6", *ends]) == 0
    assert said in capsys.readouterr().out
    build(checkpoint, tmp_path / "bank", "embed_tokens")
    assert run(["plan", str(checkpoint), "-o", place, "--rank", "6", *ends]) == 0
    text = capsys.readouterr().out
    assert said in text and "weights   0 of tied" in text and "1 are in the bank already" in text
    build(checkpoint, tmp_path / "bank", "q_proj", "embed_tokens", "lm_head")
    assert run(["info", place]) == 0
    text = capsys.readouterr().out
    assert said in text and "3 weights" in text
    rows = {line.split()[0]: line for line in text.splitlines() if "24x" in line}
    assert "1 + 1 tied" in rows["model.embed_tokens-24x60"]
    assert all("tied" not in row for name, row in rows.items() if "embed" not in name) and len(rows) == 2
    assert run(["info", place, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tied"] == {HEAD: EMBEDDING}
    assert {family["name"]: family["tied"] for family in document["families"]} == {
        "model.embed_tokens-24x60": 1,
        "model.layers.self_attn.q_proj-24x24-x1": 0,
    }


def test_a_reader_of_the_format_finds_the_head(checkpoint: Path, tmp_path: Path) -> None:
    bank, _ = build(checkpoint, tmp_path / "bank", "embed_tokens", "lm_head")
    spec = SpecBank(bank.path)
    assert spec.aliases == {HEAD: EMBEDDING}
    for array, own in (("left", bank[HEAD].left(5)), ("right", bank[HEAD].right(5))):
        assert torch.equal(torch.from_numpy(spec.vectors(HEAD, array, 5).copy())[:5].flip(0).mT, own)


@pytest.mark.parametrize("first, then", [("embed_tokens", "lm_head"), ("lm_head", "embed_tokens")])
def test_extending_a_bank_by_the_other_one_solves_nothing(checkpoint: Path, tmp_path: Path, first: str, then: str) -> None:
    build(checkpoint, tmp_path / "bank", first)
    bank, report = build(checkpoint, tmp_path / "bank", then)
    assert (report.weights, report.solved, report.reused) == (2, 0, 1)
    assert_one_svd_from_both_sides(bank)
    assert bank[HEAD].exchanged == (first == "embed_tokens")
    assert svdbank.verify(bank.path, data=True).sound
    again, report = build(checkpoint, tmp_path / "bank", "embed_tokens", "lm_head", "q_proj")
    assert (report.weights, report.solved) == (3, 1)
    assert_one_svd_from_both_sides(again)


def test_a_bank_of_left_vectors_alone_needs_both(checkpoint: Path, tmp_path: Path) -> None:
    bank, report = build(checkpoint, tmp_path / "bank", "embed_tokens", "lm_head", side="left")
    assert report.solved == 2 and not bank[HEAD].exchanged and not bank[EMBEDDING].exchanged
    assert bank[HEAD].left(4).shape == (60, 4) and bank[EMBEDDING].left(4).shape == (24, 4)


def test_a_bank_without_such_a_pair_has_no_such_field(checkpoint: Path, tmp_path: Path) -> None:
    bank, _ = build(checkpoint, tmp_path / "bank", "q_proj")
    assert set(json.loads((bank.path / bank.manifest.index).read_bytes())) == {"families"}
    assert "aliases" not in json.loads((bank.path / "plan.json").read_bytes())


@pytest.mark.parametrize("name, of", [(HEAD, "nothing"), (EMBEDDING, EMBEDDING), ("x.weight", HEAD)])
def test_an_alias_of_nothing_or_of_a_name_that_is_taken_is_refused(
    checkpoint: Path, tmp_path: Path, name: str, of: str
) -> None:
    bank, _ = build(checkpoint, tmp_path / "bank", "embed_tokens", "lm_head")
    manifest = json.loads((bank.path / "manifest.json").read_bytes())
    bad = msgspec.structs.replace(bank.index, aliases=(Alias(name=name, module="x", kind="head", of=of),))
    assert isinstance(bad, Index)
    data = to_json(bad)
    sha256 = hashlib.sha256(data).hexdigest()
    record = manifest["files"].pop(manifest["index"]) | {"size": len(data), "sha256": sha256}
    manifest["index"] = f"index-{sha256[:16]}.json"
    manifest["files"][manifest["index"]] = record
    manifest["digest"] = "0" * 64
    text = json.dumps(manifest).encode()
    (bank.path / manifest["index"]).write_bytes(data)
    (bank.path / "manifest.json").write_bytes(text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1))
    with pytest.raises(DamageError, match="with the sides exchanged"):
        svdbank.open(bank.path)
    with pytest.raises(RefusedError, match="alias"):
        SpecBank(bank.path)
