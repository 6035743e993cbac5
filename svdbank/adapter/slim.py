"""Slim adapters: coefficients alone, with B by reference to a bank.

A slim folder holds ``slim.json``, ``coefficients.safetensors`` (everything of ``adapter_model.safetensors`` but the B that the bank has)
and, under ``files/``, the other files of the adapter as they were. With the bank, the adapter folder comes back byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from svdbank.adapter.experts import parameters_of, split
from svdbank.adapter.folder import AdapterFolder, check_output, key_of, new_folder
from svdbank.adapter.naming import bank_names
from svdbank.adapter.settings import COEFFICIENTS, FILES, SLIM, WEIGHTS
from svdbank.bank.reading import Bank
from svdbank.checkpoint.header import PREFIX, header_length, parse_header
from svdbank.core import disk
from svdbank.core.errors import BankError, CheckpointError, DamageError, OptionError, WrongBaseError
from svdbank.core.specs import Struct, from_json, to_json

#: What to do about a slim folder that is not as it was written.
_AGAIN = "copy the folder again, or write it anew: svdbank export ADAPTER --to slim"

#: Bytes by which the file of what is kept may exceed the whole: its header.
_HEADER = 1 << 26

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BankColumns(Struct, frozen=True):
    """One B (out, r) as columns of the bank: ``weight`` is the bank's name, ``columns`` minor indices in the order of B's columns."""

    weight: str
    columns: tuple[int, ...]


class Reference(Struct, frozen=True):
    """The B of one tensor: one piece, or one for each expert.

    ``rounding`` is the dtype that the bank's vectors went through, ``sha256`` is of the tensor's bytes.
    """

    pieces: tuple[BankColumns, ...]
    rounding: str
    sha256: str


class SlimRecord(Struct, frozen=True):
    """``slim.json``. ``header`` is that of the original file, ``sha256`` and ``size`` are of that file; ``references`` by tensor name,
    ``files`` the other files of the folder with the sha256 of each.

    ``base_digest`` is over the weights referred to, ``bank_digest`` the digest in the manifest of the bank they were found in.
    """

    format: Literal[1]
    base: str
    base_digest: str
    bank_digest: str
    header: str
    sha256: str
    size: int
    references: dict[str, Reference]
    files: dict[str, str]


def write_slim(folder: AdapterFolder, output: Path, bank: Bank, *, force: bool = False) -> SlimRecord:
    """Write an adapter folder as a slim one. Raises :class:`OptionError` where no B is the bank's to the bit."""
    check_output(output, force=force)
    source = folder.path
    raw = (source / WEIGHTS).read_bytes()
    header = raw[PREFIX : PREFIX + header_length(raw[:PREFIX], size=len(raw), where=str(source / WEIGHTS))]
    tensors = safetensors.torch.load(raw)
    references = _references(folder, tensors, bank)
    if not references:
        raise OptionError(
            f"{source}: none of its B is made of the bank's vectors to the bit, so nothing can be left out",
            hint="--to lora keeps both factors",
        )
    carried = [path for path in sorted(source.iterdir()) if path.is_file() and not path.is_symlink() and path.name != WEIGHTS]
    contents = {path.name: path.read_bytes() for path in carried}
    names = {piece.weight for reference in references.values() for piece in reference.pieces}
    record = SlimRecord(
        format=1,
        base=bank.manifest.base.name,
        base_digest=bank.base_digest(names),
        bank_digest=bank.manifest.digest,
        header=header.decode(),
        sha256=hashlib.sha256(raw).hexdigest(),
        size=len(raw),
        references=references,
        files={name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    )
    kept = {name: value for name, value in tensors.items() if name not in references}
    written = {SLIM: to_json(record), COEFFICIENTS: safetensors.torch.save(kept, metadata={"format": "pt"})}
    written |= {f"{FILES}/{name}": data for name, data in contents.items()}
    _write(output, written, force=force)
    return record


def expand_slim(source: Path, output: Path, bank: Bank, *, force: bool = False) -> SlimRecord:
    """Write the adapter folder that ``source`` is the slim form of, byte for byte.

    Raises :class:`WrongBaseError` for the bank of another base, :class:`BankError` for one whose vectors are rounded or signed otherwise,
    :class:`DamageError` for files that are not those it was made with.
    """
    check_output(output, force=force)
    record = read_record(source)
    try:
        kept = safetensors.torch.load(
            disk.read_document(source / COEFFICIENTS, error=CheckpointError, largest=record.size + _HEADER)
        )
    except (OSError, safetensors.SafetensorError) as cause:
        raise CheckpointError(f"{source / COEFFICIENTS}: {cause}", hint=_AGAIN) from cause
    raw = _restored(record, kept, bank, source)
    contents = {WEIGHTS: raw}
    for name, sha256 in record.files.items():
        contents[name] = _carried(disk.safe_join(source / FILES, name, error=CheckpointError), sha256)
    _write(output, contents, force=force)
    return record


def _carried(path: Path, sha256: str) -> bytes:
    """One of the other files; DamageError unless it is the one recorded. A pipe is not waited for."""
    try:
        data = disk.read_document(path, error=CheckpointError, largest=1 << 40)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamageError(f"{path}: missing, or not the bytes that were written", hint=_AGAIN)
    return data


def read_record(source: Path) -> SlimRecord:
    """``slim.json`` of a folder. Raises :class:`CheckpointError`."""
    try:
        data = disk.read_document(source / SLIM, error=CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(
            f"{source}: no slim adapter here ({SLIM} is missing)", hint="name the folder that svdbank export --to slim wrote"
        ) from None
    return from_json(data, SlimRecord, where=str(source / SLIM), error=CheckpointError)


def _references(folder: AdapterFolder, tensors: Mapping[str, Tensor], bank: Bank) -> dict[str, Reference]:
    """Tensors of B that are the bank's vectors to the bit, and which ones they are."""
    parameters = parameters_of(folder.settings, folder.factors)
    pieces: dict[str, list[tuple[str, Tensor]]] = {}
    for module, pair in folder.factors.items():
        path = parameters.get(module, module)
        if module in parameters:
            pairs = split(pair.A, pair.B, folder.rank(path), module)
            alone = len(pairs) == 1 and path.endswith(".weight")
            own = (path.removesuffix(".weight") if alone else f"{path}.{expert}" for expert in range(len(pairs)))
            pieces[module] = [(key, B) for key, (_, B) in zip(own, pairs, strict=True)]
        else:
            pieces[module] = [(path, pair.B)]
    names = bank_names(bank, [key for parts in pieces.values() for key, _ in parts])
    lefts = bank.rows("left", names.values())
    found = {}
    for module, parts in pieces.items():
        tensor = next((name for name in (key_of(module, "B"), key_of(module, "B", embedding=True)) if name in tensors), None)
        if tensor is None or any(key not in names for key, _ in parts):
            continue
        for rounding, dtype in _DTYPES.items():
            columns = [_columns(B, lefts[names[key]], dtype) for key, B in parts]
            if all(own is not None for own in columns):
                made = tuple(
                    BankColumns(names[key], own) for (key, _), own in zip(parts, columns, strict=True) if own is not None
                )
                found[tensor] = Reference(made, rounding, _sha256(tensors[tensor]))
                break
    return found


def _columns(B: Tensor, left: Tensor, rounding: torch.dtype) -> tuple[int, ...] | None:
    """Which rows of ``left`` the columns of B are, after one rounding; None unless to the bit."""
    count = B.shape[1]
    if count > left.shape[0] or B.shape[0] != left.shape[1]:
        return None
    usual = torch.arange(count).flip(0)
    for rows in (usual, (left.float() @ B.float()).argmax(dim=0)):
        if torch.equal(left[rows].to(rounding).mT.to(B.dtype), B):
            return tuple(int(row) for row in rows)
    return None


def _restored(record: SlimRecord, kept: Mapping[str, Tensor], bank: Bank, source: Path) -> bytes:
    names = sorted({piece.weight for reference in record.references.values() for piece in reference.pieces})
    lacking = [name for name in names if name not in bank]
    if lacking:
        raise BankError(
            f"{bank.place}: the bank lacks {len(lacking)} weights of this adapter, first {lacking[0]}",
            hint=f"svdbank build {record.base} with --targets for them adds them to the bank",
        )
    if bank.base_digest(names) != record.base_digest:
        raise WrongBaseError(
            f"{source}: its coefficients belong to another base than {bank.place}", hint=f"name a bank of {record.base}"
        )
    header = record.header.encode()
    entries = parse_header(header, file=WEIGHTS, size=record.size, where=f"{source / SLIM}: header")
    lefts = bank.rows("left", names)
    raw = bytearray(record.size)
    raw[:PREFIX] = len(header).to_bytes(PREFIX, "little")
    raw[PREFIX : PREFIX + len(header)] = header
    declared: dict[str, Any] = json.loads(header)
    for name, entry in entries.items():
        reference = record.references.get(name)
        if reference is None and name not in kept:
            raise CheckpointError(f"{source / COEFFICIENTS}: lacks {name}", hint=_AGAIN)
        value = kept[name] if reference is None else _made(reference, lefts, declared[name], source)
        if reference is not None and _sha256(value) != reference.sha256:
            raise BankError(
                f"{bank.place}: its vectors of {name} are not those that the adapter was made with, though the base is the same",
                hint="another machine's bank differs in signs and roundings: ask for the adapter with --to lora, and rebase it",
            )
        data = _raw(value)
        if len(data) != entry.end - entry.begin:
            raise CheckpointError(f"{source / COEFFICIENTS}: {name} has another size than the header says", hint=_AGAIN)
        raw[entry.begin : entry.end] = data
    if hashlib.sha256(raw).hexdigest() != record.sha256:
        raise DamageError(f"{source}: does not come back as it was: {COEFFICIENTS} was changed", hint=_AGAIN)
    return bytes(raw)


def _made(reference: Reference, lefts: Mapping[str, Tensor], entry: Mapping[str, Any], source: Path) -> Tensor:
    """B of one tensor from the bank's vectors."""
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}.get(entry["dtype"])
    rounding = _DTYPES.get(reference.rounding)
    if dtype is None or rounding is None or not reference.pieces:
        raise CheckpointError(
            f"{source / SLIM}: a reference with dtype {entry['dtype']} and rounding {reference.rounding!r}", hint=_AGAIN
        )
    parts = []
    for piece in reference.pieces:
        left = lefts[piece.weight]
        if not piece.columns or min(piece.columns) < 0:
            raise CheckpointError(f"{source / SLIM}: columns of {piece.weight} that no bank has", hint=_AGAIN)
        if max(piece.columns) >= left.shape[0]:
            raise BankError(
                f"the bank stores {left.shape[0]} directions of {piece.weight}, the adapter needs more",
                hint=f"svdbank build MODEL --rank {max(piece.columns) + 1}",
            )
        parts.append(left[list(piece.columns)].to(rounding).mT.to(dtype))
    return parts[0] if len(parts) == 1 else torch.stack(parts, dim=-1).flatten(1)


def _raw(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _sha256(value: Tensor) -> str:
    return hashlib.sha256(_raw(value)).hexdigest()


def _write(output: Path, contents: Mapping[str, bytes], *, force: bool) -> None:
    with new_folder(output, force=force) as folder:
        for name, data in contents.items():
            disk.make_dirs((folder / name).parent)
            disk.write_new(folder / name, data)
        for path in {(folder / name).parent for name in contents}:
            disk.fsync_dir(path)
