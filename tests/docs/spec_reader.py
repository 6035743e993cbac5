"""A reader of bank format 1, written from docs/format.md alone: json, struct, hashlib, NumPy. No zarr, no svdbank, no torch."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from math import ceil, gcd
from pathlib import Path
from typing import Any

import numpy as np

ABSENT = 2**64 - 1
DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
ZARR_DTYPES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "uint16": "<u2", "uint8": "|u1", "int32": "<i4"}
FAMILY = re.compile(r"[a-z0-9_-][a-z0-9._-]*")
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
CRC = {"name": "crc32c"}


class RefusedError(Exception):
    """What the format says a reader must not accept."""


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli)."""
    value = 0xFFFFFFFF
    for byte in data:
        value = _TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def exact(value: Any, fields: str, where: str) -> dict[str, Any]:
    """An object with these fields and no others."""
    if not isinstance(value, dict) or set(value) != set(fields.split()):
        raise RefusedError(f"{where}: {sorted(value) if isinstance(value, dict) else value}")
    return value


def probe_positions(out_features: int, in_features: int) -> list[int]:
    size = out_features * in_features
    if size <= 256:
        return list(range(size))
    step = max(1, int(size * 0.6180339887498949))
    while gcd(step, size) != 1:
        step += 1
    return [(i * step) % size for i in range(256)]


def base_digest(hashes: dict[str, str]) -> str:
    return hashlib.sha256(
        b"".join(name.encode() + b"\0" + hashes[name].encode() + b"\n" for name in sorted(hashes))
    ).hexdigest()


class SpecBank:
    """A bank by the text of its format. ``weights`` maps names to (family entry, row)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        manifest = root / "manifest.json"
        if not manifest.is_file():
            raise RefusedError("no manifest")
        self.manifest = json.loads(manifest.read_bytes())
        if self.manifest.get("format") != 1:
            raise RefusedError(f"format {self.manifest.get('format')}")
        exact(self.manifest, "format created_by base base_digest options weights nbytes index plans files digest", "manifest")
        digest = self.manifest["digest"]
        if hashlib.sha256(manifest.read_bytes().replace(digest.encode(), b"0" * 64, 1)).hexdigest() != digest:
            raise RefusedError("the manifest is not the one that was published")
        exact(self.manifest["base"], "name revision config_digest", "base")
        self.options = exact(self.manifest["options"], "rank side dtype solver principal", "options")
        name = self.manifest["index"]
        if name not in self.manifest["files"] or "/" in name:
            raise RefusedError("the index is not among the files")
        data = self.checked_file(name, self.manifest["files"][name])
        if name != f"index-{hashlib.sha256(data).hexdigest()[:16]}.json":
            raise RefusedError("the index is not named by its content")
        index = json.loads(data)
        self.families = exact(index, "families aliases" if index.get("aliases") else "families", "index")["families"]
        self.weights: dict[str, tuple[dict[str, Any], int]] = {}
        for family in self.families:
            exact(family, "spec weights files metadata", "family")
            spec = exact(
                family["spec"], "name kind out_features in_features rank principal weights_per_shard weights", "family spec"
            )
            if not FAMILY.fullmatch(spec["name"]) or [w["name"] for w in family["weights"]] != spec["weights"]:
                raise RefusedError(spec["name"])
            if not 1 <= spec["rank"] <= min(spec["out_features"], spec["in_features"]):
                raise RefusedError(f"{spec['name']}: rank {spec['rank']}")
            for row, weight in enumerate(family["weights"]):
                exact(weight, "name module layer expert dtype source_sha256 certificate", "weight")
                exact(
                    weight["certificate"],
                    "path tried dtype device rank_full sigma_max sigma_min sigma_next orthogonality residual angle_bound completeness",
                    "certificate",
                )
                if weight["name"] in self.weights:
                    raise RefusedError(f"{weight['name']} stands twice")
                self.weights[weight["name"]] = (family, row)
        self.aliases: dict[str, str] = {}
        for alias in index.get("aliases", []):
            exact(alias, "name module kind of", "alias")
            if (
                self.options["side"] != "both"
                or alias["of"] not in self.weights
                or alias["name"] in {*self.weights, *self.aliases}
            ):
                raise RefusedError(f"{alias['name']}: alias")
            self.aliases[alias["name"]] = alias["of"]
        if len(self.weights) + len(self.aliases) != self.manifest["weights"]:
            raise RefusedError("count of weights")

    def recorded(self) -> dict[str, dict[str, Any]]:
        """Every file the bank is made of, with its record."""
        files = dict(self.manifest["files"])
        for family in self.families:
            files.update(family["metadata"])
            for array, records in family["files"].items():
                files.update({f"{family['spec']['name']}/{array}/c/{i}/0/0": record for i, record in enumerate(records)})
        return files

    def checked_file(self, name: str, record: dict[str, Any]) -> bytes:
        exact(record, "size sha256 chunk_bytes chunks index_crc32c", name)
        try:
            data = (self.root / name).read_bytes()
        except FileNotFoundError:
            raise RefusedError(f"{name} is missing") from None
        if len(data) != record["size"] or hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise RefusedError(f"{name} is not what was recorded")
        return data

    def metadata(self, family: dict[str, Any], array: str) -> dict[str, Any]:
        name = f"{family['spec']['name']}/{array}/zarr.json"
        meta = json.loads(self.checked_file(name, family["metadata"][name]))
        fields = (
            "shape data_type chunk_grid chunk_key_encoding fill_value codecs attributes dimension_names zarr_format node_type"
        )
        exact(meta, f"{fields} storage_transformers", name)
        if (meta["zarr_format"], meta["node_type"], meta["storage_transformers"]) != (3, "array", []):
            raise RefusedError(name)
        if meta["chunk_key_encoding"] != {"name": "default", "configuration": {"separator": "/"}}:
            raise RefusedError(name)
        return meta

    def coordinate(self, family: dict[str, Any], array: str) -> np.ndarray[Any, Any]:
        """A coordinate array, whole."""
        meta = self.metadata(family, array)
        dtype = np.dtype(ZARR_DTYPES[meta["data_type"]])
        little = {"name": "bytes"} if dtype.itemsize == 1 else BYTES
        if meta["codecs"] != [little, CRC] or meta["chunk_grid"]["configuration"]["chunk_shape"] != meta["shape"]:
            raise RefusedError(array)
        name = f"{family['spec']['name']}/{array}/c" + "/0" * len(meta["shape"])
        data = self.checked_file(name, family["metadata"][name])
        if struct.unpack("<I", data[-4:])[0] != crc32c(data[:-4]):
            raise RefusedError(f"{name}: checksum")
        return np.frombuffer(data[:-4], dtype).reshape(meta["shape"])

    def vectors(self, name: str, array: str, rank: int) -> np.ndarray[Any, Any]:
        """(rank, length) of one weight, as stored bits turned into float32 or float16, reading only the chunks it needs."""
        if name in self.aliases:
            name, array = self.aliases[name], array.replace("left", "?").replace("right", "left").replace("?", "right")
        family, row = self.weights[name]
        spec = family["spec"]
        principal = array.startswith("principal_")
        stored = spec["principal" if principal else "rank"]
        length = spec["out_features" if array.endswith("left") else "in_features"]
        per_shard, extent = spec["weights_per_shard"], 16 * ceil(stored / 16)
        dtype = np.dtype(DTYPES[self.options["dtype"]])

        meta = self.metadata(family, array)
        (sharding,) = meta["codecs"]
        if meta["shape"] != [len(spec["weights"]), stored, length] or meta["attributes"] != {"stored": self.options["dtype"]}:
            raise RefusedError(f"{array}: shape {meta['shape']}")
        if meta["dimension_names"] != [
            "weight",
            "principal_rank" if principal else "rank",
            "out" if array.endswith("left") else "in",
        ]:
            raise RefusedError(f"{array}: {meta['dimension_names']}")
        if np.dtype(ZARR_DTYPES[meta["data_type"]]) != dtype or meta["fill_value"] != (32704 if dtype == "<u2" else "NaN"):
            raise RefusedError(f"{array}: {meta['data_type']}")
        if meta["chunk_grid"] != {"name": "regular", "configuration": {"chunk_shape": [per_shard, extent, length]}}:
            raise RefusedError(f"{array}: {meta['chunk_grid']}")
        inner = {"chunk_shape": [1, 16, length], "codecs": [BYTES, CRC], "index_codecs": [BYTES, CRC], "index_location": "end"}
        if sharding != {"name": "sharding_indexed", "configuration": inner}:
            raise RefusedError(f"{array}: {sharding}")

        shard, within = divmod(row, per_shard)
        record = family["files"][array][shard]
        path = self.root / spec["name"] / array / "c" / str(shard) / "0" / "0"
        chunk_bytes = 16 * length * dtype.itemsize + 4
        chunks = per_shard * extent // 16
        if record["chunk_bytes"] != chunk_bytes or path.stat().st_size != record["size"]:
            raise RefusedError(f"{path}: size")
        rows = []
        with path.open("rb") as file:
            file.seek(-(16 * chunks + 4), 2)
            pairs, checksum = file.read(16 * chunks), file.read(4)
            if not struct.unpack("<I", checksum)[0] == crc32c(pairs) == record["index_crc32c"]:
                raise RefusedError(f"{path}: checksum of the shard's index")
            for along in range(ceil(rank / 16)):
                offset, size = struct.unpack_from("<QQ", pairs, 16 * (within * extent // 16 + along))
                if offset == ABSENT or size != chunk_bytes or offset % chunk_bytes:
                    raise RefusedError(f"{path}: chunk {along} is not there")
                file.seek(offset)
                data = file.read(size)
                found = struct.unpack("<I", data[-4:])[0]
                if found != crc32c(data[:-4]) or found != record["chunks"][offset // chunk_bytes]:
                    raise RefusedError(f"{path}: chunk at {offset}")
                rows.append(np.frombuffer(data[:-4], dtype).reshape(16, length))
        values = np.concatenate(rows)[:rank]
        if self.options["dtype"] == "bfloat16":
            values = (values.astype("<u4") << 16).view("<f4")
        if np.isnan(values).any():
            raise RefusedError(f"{path}: NaN")
        return values
