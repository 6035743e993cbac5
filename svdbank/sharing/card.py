"""The card of a bank on the Hub: what it is of, how exact, how large, how it is read; and what others find it by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from svdbank.adapter.card import escaped
from svdbank.bank.reading import Bank
from svdbank.building.checking import FamilyInfo
from svdbank.sharing.bases import HubBase

#: What is asked for on the Hub: this tag, and ``base_model``. Under this key a card says what it is of.
TAG = KEY = "svdbank"

ATTRIBUTES = ".gitattributes"
CARD = "README.md"

#: What :func:`svdbank.sharing.repository.is_large` says, in the language of git.
_LARGE = ("**/c/**", "index-*.json", "plan*.json")


def attributes(there: bytes) -> bytes:
    """``.gitattributes``: which files of a bank are large ones, after what is there and speaks of other files."""
    lines = [f"{pattern} filter=lfs diff=lfs merge=lfs -text" for pattern in _LARGE]
    missing = [line for line in lines if line not in there.decode("utf-8", "replace").splitlines()]
    before = there if there.endswith(b"\n") or not there else there + b"\n"
    return before + "".join(f"{line}\n" for line in missing).encode()


def metadata(bank: Bank, base: HubBase) -> dict[str, Any]:
    """What a program reads of the card. ``svdbank.weight_files`` are the base's weight files with the Hub's ids."""
    manifest, options = bank.manifest, bank.manifest.options
    return {
        "library_name": TAG,
        "base_model": base.repository,
        "base_model_relation": "adapter",
        **base.licence,
        "tags": [TAG],
        KEY: {
            "format": manifest.format,
            "digest": manifest.digest,
            "base_commit": base.commit,
            "base_digest": manifest.base_digest,
            "rank": options.rank,
            "side": options.side,
            "dtype": options.dtype,
            "weights": manifest.weights,
            "weight_files": dict(sorted(base.files.items())),
        },
    }


def card(
    bank: Bank,
    base: HubBase,
    repository: str,
    families: Sequence[FamilyInfo],
    sizes: Sequence[tuple[int, int, int | None]],
) -> bytes:
    """README.md of the bank in ``repository``; the same for the same bank. ``sizes`` are ranks, with the bytes that lookups read."""
    from huggingface_hub import ModelCardData

    front = ModelCardData(**metadata(bank, base)).to_yaml(line_break="\n")
    return f"---\n{front}\n---\n{_body(bank, base, repository, families, sizes)}".encode()


def _body(
    bank: Bank,
    base: HubBase,
    repository: str,
    families: Sequence[FamilyInfo],
    sizes: Sequence[tuple[int, int, int | None]],
) -> str:
    manifest, options = bank.manifest, bank.manifest.options
    rank = "all ranks" if options.rank == "all" else f"ranks up to {options.rank}"
    sides = "left and right" if options.side == "both" else "left"
    return f"""
# Minor singular vectors of {base.repository}

A bank of [svdbank](https://pypi.org/project/svdbank/): the {sides} singular vectors of the smallest singular values of
{manifest.weights} weights, {rank}, stored as {options.dtype} ({_size(manifest.nbytes)}). With it a MiCA or MiLoRA adapter
of this model starts by a lookup, without an SVD.

| | |
| --- | --- |
| base | [{base.repository}](https://huggingface.co/{base.repository}/tree/{base.commit}) at `{base.commit}` |
| digest of the base's weights | `{manifest.base_digest}` |
| digest of the bank | `{manifest.digest}` |
| format | {manifest.format}, written by {manifest.created_by} |

## Use

```python
{_snippet(bank, base, repository)}```

`hf://{repository}` fetches the parts that are asked for, and keeps them; `svdbank pull {repository}` brings all of it.

## Families

Residual and orthogonality are the largest of each family's certificates. Anybody can measure them again:
`svdbank verify hf://{repository} --source {base.repository}@{base.commit} --sample 5%`.

| family | kind | weights | out | in | rank | residual | orthogonality | σ |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{"".join(_row(family) for family in families)}
## Sizes

What a lookup of all weights reads.

| rank | left | both |
| --- | --- | --- |
{"".join(f"| {r} | {_size(left)} | {'' if both is None else _size(both)} |{chr(10)}" for r, left, both in sizes)}
## Licence

{_licence(base)}
"""


def _snippet(bank: Bank, base: HubBase, repository: str) -> str:
    loader = "AutoModelForCausalLM" if base.causal else "AutoModel"
    least = min(family.spec.rank for family in bank.index.families)
    return f"""from peft import LoraConfig
from transformers import {loader}

from svdbank.peft import get_peft_model

model = {loader}.from_pretrained({json.dumps(base.repository)}, revision={json.dumps(base.commit)})
config = LoraConfig(r={min(16, least)}, init_lora_weights="mica", target_modules="all-linear")
model = get_peft_model(model, config, bank={json.dumps(f"hf://{repository}")})
"""


def _row(family: FamilyInfo) -> str:
    sigma = f"{family.sigma_min:.2e} to {family.sigma_max:.2e}"
    return (
        f"| {family.name} | {family.kind} | {family.weights} | {family.out_features} | {family.in_features} | {family.rank} "
        f"| {family.residual:.1e} | {family.orthogonality:.1e} | {sigma} |\n"
    )


def _licence(base: HubBase) -> str:
    named = base.licence.get("license_name") or base.licence.get("license")
    link = base.licence.get("license_link")
    shown = (
        escaped(", ".join(named) if isinstance(named, list) else named)
        if named
        else "the licence of its repository, whose card names none"
    )
    files = ", ".join(f"[{name}]({name})" for name in sorted(base.documents))
    return (
        f"The bank is computed from the weights of {base.repository} and comes under their licence: {shown}"
        + (f" ({escaped(str(link))})" if link else "")
        + "."
        + (f" Copied from there: {files}." if files else "")
    )


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
