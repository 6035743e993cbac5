"""What an adapter folder says of itself: PEFT's config and svdbank's record beside it, read once and together, without the tensors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svdbank.adapter.checksums import check_record
from svdbank.adapter.methods import METHODS, RESIDUAL_METHODS, lora_scale
from svdbank.adapter.settings import CACHE, CONFIG, FILES, SLIM, WEIGHTS, AdapterCache, LoraSettings, by_pattern
from svdbank.core import disk
from svdbank.core.errors import CheckpointError, OptionError, abridge
from svdbank.core.places import OnDisk, locate
from svdbank.core.specs import from_json

if TYPE_CHECKING:
    from svdbank.bank.reading import Bank

#: Bytes of a config or record: 100,000 experts with a line each in several components have less.
_DOCUMENT = 1 << 26

#: ``init_lora_weights`` of PEFT, or how it begins, with which an adapter belongs to a base that was changed when it was made.
_CHANGED_BASE = ("pissa", "milora", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class BaseIdentity:
    """Which model an adapter belongs to.

    Attributes
    ----------
    name, revision
        For people; None where the folder does not say.
    digest, weights
        sha256 over the names and hashes of those weights of the base (:func:`svdbank.bank.reading.base_digest`), as recorded; empty
        where it is not known.
    """

    name: str | None = None
    revision: str | None = None
    digest: str = ""
    weights: tuple[str, ...] = ()

    def is_of(self, bank: Bank) -> bool | None:
        """Whether a bank is of these weights; None where the digest is not known, or the bank lacks some of them."""
        if not self.digest or not self.weights or not all(name in bank for name in self.weights):
            return None
        return bank.base_digest(self.weights) == self.digest

    def alone(self) -> BaseIdentity:
        """Without the digest: for other weights of the same base."""
        return BaseIdentity(self.name, self.revision)


#: Fields of PEFT's config that say nothing of what a saved adapter does: how its training began, ran and was stored, and by whom.
SILENT = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
    }
)

#: Fields with which an adapter is no sum ``s·B·A`` on the base's own weights, where they are set.
KINDS_BEYOND = {
    "alora_invocation_tokens": "an activated LoRA, which acts on some tokens only,",
    "arrow_config": "a mixture of LoRAs (Arrow)",
    "bias": "a LoRA with biases",
    "ensure_weight_tying": "a LoRA that is tied as embedding and head are",
    "kasa_config": "KaSA, whose base lacks its smallest singular values,",
    "layer_replication": "a LoRA over replicated layers",
    "lora_bias": "a LoRA with biases of its own",
    "megatron_config": "a LoRA of a model that is parallel by Megatron",
    "monteclora_config": "MonteCLoRA, which samples its factors,",
    "trainable_token_indices": "a LoRA with trained tokens",
    "use_bdlora": "a LoRA of diagonal blocks (BD-LoRA)",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}

#: Those of them that PEFT's ``merge_and_unload`` adds to their base right (not activated LoRAs, biases where the base has none, …).
MERGED_BY_PEFT = frozenset(
    {"bias", "kasa_config", "monteclora_config", "trainable_token_indices", "use_bdlora", "use_dora", "velora_config"}
)

#: Values of ``init_lora_weights`` with which training begins on the base as it is.
UNCHANGED_BASE = frozenset({"true", "false", "gaussian", "orthogonal", "eva", "mica"})


def _set_beyond(config: Mapping[str, object]) -> str | None:
    """The first field of a config that is set and makes the adapter another than ``s·B·A``, as a sentence names it; None for a LoRA."""
    for name, value in config.items():
        if value in (None, False, "", "none", [], {}):
            continue
        if name in KINDS_BEYOND:
            return f"{KINDS_BEYOND[name]} ({name})"
        if name not in SILENT and name not in LoraSettings.__struct_fields__:
            return f"an adapter with {name!r} in its {CONFIG}, which svdbank does not know,"
    return None


@dataclass(frozen=True)
class Documents:
    """The two documents of a folder. ``cache`` is svdbank's own, None where there is none.

    ``beyond`` names the field of the config with which the adapter is something else than ``s·B·A``, None for an ordinary LoRA.
    """

    path: Path
    settings: LoraSettings
    cache: AdapterCache | None
    beyond: str | None = None

    def rank(self, module: str) -> int:
        """The rank that the config gives a module, with PEFT's patterns applied."""
        rank = int(self._by_pattern(self.settings.rank_pattern, module, self.settings.r))
        if rank < 1:
            raise CheckpointError(f"{self.path / CONFIG}: rank {rank} of {module}")
        return rank

    def alpha(self, module: str) -> float:
        """The α that the config gives a module, with PEFT's patterns applied."""
        return float(self._by_pattern(self.settings.alpha_pattern, module, self.settings.lora_alpha))

    def _by_pattern(self, patterns: Mapping[str, float], module: str, default: float) -> float:
        try:
            return by_pattern(patterns, module, default)
        except OptionError as cause:
            raise CheckpointError(f"{self.path / CONFIG}: {cause}") from cause

    def scale(self, module: str) -> float:
        """α/r, or α/√r with rsLoRA, with PEFT's per-module patterns applied."""
        try:
            return lora_scale(self.rank(module), self.alpha(module), rslora=self.settings.use_rslora)
        except OptionError as cause:
            raise CheckpointError(f"{self.path / CONFIG}: {module}: {cause}") from cause

    @property
    def base(self) -> BaseIdentity:
        """The base that the config names, else the record, with the digest that the record holds."""
        name, revision = self.settings.base_model_name_or_path, self.settings.revision
        if self.cache is None:
            return BaseIdentity(name, revision)
        return BaseIdentity(name or self.cache.base, revision, self.cache.base_digest, self.cache.weights)

    def base_names(self, kind: str) -> tuple[str, ...]:
        """Names under which the base may be found, the likeliest first: a residual method's config may name the base without its start."""
        named = self.settings.base_model_name_or_path
        if named and self.settings.revision and not isinstance(locate(named), OnDisk):
            named = f"{named}@{self.settings.revision}"
        own = self.cache.base if self.cache is not None else None
        names = (own, named) if kind in RESIDUAL_METHODS else (named, own)
        return tuple(dict.fromkeys(name for name in names if name))

    def made_as(self, method: str | None = None) -> str:
        """What the folder was initialised as: what the caller says, else the record, else the config.

        Raises :class:`OptionError` for a method that is none, :class:`CheckpointError` for what no bank can put on the unchanged base.
        """
        if method is not None:
            if method not in (*METHODS, "lora"):
                raise OptionError(f"{method!r} is not a method: {', '.join((*METHODS, 'lora'))}")
            return method
        said = self.settings.init_lora_weights
        known = said.lower() if isinstance(said, str) else ""
        if self.cache is not None and (self.cache.method in RESIDUAL_METHODS or not known.startswith(_CHANGED_BASE)):
            return self.cache.method
        if known.startswith(_CHANGED_BASE) and known not in METHODS:
            raise CheckpointError(
                f"{self.path}: initialised as {said!r}, which changed the base it was trained on; on the unchanged base it would be "
                "another model",
                hint="save it with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…): that is for the base",
            )
        if known not in METHODS and str(said).lower() not in UNCHANGED_BASE:
            raise CheckpointError(
                f"{self.path}: init_lora_weights is {said!r}, which svdbank does not know: whether it changed the base cannot be told"
            )
        return known if known in METHODS else "lora"


def read_documents(path: str | Path, *, slim: bool = False) -> Documents:
    """The documents of an adapter folder, with ``slim`` also those that a slim one carries.

    Raises :class:`CheckpointError`, :class:`DamageError` for a record that is not as svdbank wrote it.
    """
    folder = Path(path)
    check_there(folder, slim=slim)
    inside = folder
    if slim and (folder / SLIM).is_file():
        inside = folder / FILES
        check_there(inside)
    config = disk.read_document(inside / CONFIG, error=CheckpointError, largest=_DOCUMENT)
    settings = from_json(config, LoraSettings, where=str(inside / CONFIG), error=CheckpointError)
    if inside == folder and not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{folder}: adapter_model.bin is a pickle, which can run code, and is not read",
                hint="load it where you trust it and save it again with save_pretrained(…): that writes safetensors",
            )
        there = sorted(path.name for path in folder.iterdir() if path.name not in (CONFIG, CACHE, "README.md"))
        beside = f"; beside {CONFIG} there is {abridge(there)}" if there else ""
        raise CheckpointError(f"{folder}: {WEIGHTS} is missing{beside}")
    cache = None
    if (inside / CACHE).is_file():
        record = disk.read_document(inside / CACHE, error=CheckpointError, largest=_DOCUMENT)
        cache = from_json(record, AdapterCache, where=str(inside / CACHE), error=CheckpointError)
        check_record(cache, inside / CACHE)
    everything = from_json(config, dict, where=str(inside / CONFIG), error=CheckpointError)
    return Documents(folder, settings, cache, _set_beyond(everything))


def check_there(folder: Path, *, slim: bool = False) -> None:
    """Raise :class:`CheckpointError` for a folder that is no PEFT adapter, nor, with ``slim``, a slim one."""
    if (folder / CONFIG).is_file() or (slim and (folder / SLIM).is_file()):
        return
    if (folder / SLIM).is_file():
        raise CheckpointError(
            f"{folder}: a slim adapter, whose B is in its bank",
            hint=f"svdbank export {folder} --to peft --bank BANK -o FOLDER",
        )
    making = "svdbank init MODEL -o FOLDER"
    if folder.exists():
        inner = sorted(path for path in folder.iterdir() if (path / CONFIG).is_file()) if folder.is_dir() else []
        hint = making if not inner else f"there is one in {', '.join(map(str, inner[:3]))}: name that folder"
        raise CheckpointError(f"{folder}: no adapter here ({CONFIG} is missing)", hint=hint)
    meant = _alike(folder)
    raise CheckpointError(f"{folder}: no such folder", hint=making if meant is None else f"did you mean {meant}?")


def _alike(folder: Path) -> Path | None:
    """The adapter beside a folder that is not there whose name is nearest to its own; None where none is near."""
    try:
        adapters = [path.name for path in folder.parent.iterdir() if (path / CONFIG).is_file() or (path / SLIM).is_file()]
    except OSError:
        return None
    near = difflib.get_close_matches(folder.name, sorted(adapters), n=1)
    return folder.parent / near[0] if near else None
