"""``bank="auto"``: the bank that a model needs, from the cache, or made of the model's own weights where they lie and kept there."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from svdbank import cache
from svdbank.adapter.methods import RESIDUAL_METHODS, InitialisationMethod
from svdbank.adapter.starting import check_rank, check_sides
from svdbank.bank.reading import Bank
from svdbank.building.loaded import Built, build_loaded
from svdbank.building.request import build_request
from svdbank.checkpoint.loaded import about_digest
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import BankError, OptionError, SvdbankError, abridge
from svdbank.core.specs import ProgressCallback, ignore_progress
from svdbank.peft.layers import Slot
from svdbank.peft.lookup import check_ranks, check_shapes, match, recognise
from svdbank.peft.origins import WeightOrigin, absence, files_of, kind_of_model, origin
from svdbank.peft.targets import Target

#: What a caller says instead of a bank.
AUTO = "auto"

_log = logging.getLogger("svdbank")


@dataclass(frozen=True)
class Automatic:
    """A bank to be found or made once the model is seen; of ``rank`` where that is above what the adapter asks for."""

    rank: int | None = None
    progress: ProgressCallback = ignore_progress

    def bank(self, root: nn.Module, layers: Sequence[Slot], method: InitialisationMethod) -> Built:
        """The bank for the layers of an adapter, and how many weights were decomposed for it now: 0 where the cache had it.

        Raises :class:`OptionError` for weights that do not lie whole and unquantised in the model, by name, and for ranks that cannot be.
        """
        targets = [target for layer in layers for target in layer.targets]
        check_ranks(targets)
        asked = max(target.rank for target in targets)
        if self.rank is not None and type(self.rank) is not int:
            raise OptionError(f"rank is a number, not {self.rank!r}", hint=f"rank={asked} or more, or leave it out")
        if self.rank is not None and self.rank < asked:
            raise OptionError(f"rank {self.rank} is below the {asked} that the adapter asks for", hint=f"rank={asked} or more")
        need = _Need(targets, method, self.rank or asked, getattr(root, "base_model_prefix", ""))
        checkpoint = files_of(root)
        try:
            cached = [] if checkpoint is None else cache.cached_banks(checkpoint)
            for bank in [*cached, *cache.banks_of_memory(about_digest(kind_of_model(root)))]:
                if need.is_met_by(bank):
                    cache.mark_used(bank.path)
                    return Built(bank, 0)
            _refuse_absent(targets, checkpoint)
            found = origin(root, layers, checkpoint, need.prefix, self.progress)
            return make(found, need.rank, method, self.progress, device=targets[0].weight.device)
        finally:
            if checkpoint is not None:
                checkpoint.close()


def make(
    of: WeightOrigin, rank: int, method: InitialisationMethod, progress: ProgressCallback, *, device: torch.device
) -> Built:
    """Decompose and keep; says so in the log, before and after. ``device`` solves what comes from files."""
    request = build_request(
        of.checkpoint.name,
        None,
        rank=rank,
        targets=of.modules,
        side="both" if method in RESIDUAL_METHODS else "left",
        principal=rank if method == "pissa" else 0,
    )
    place = cache.default_output(of.checkpoint, request.options)
    own = f" ({of.differs} is not as in the files: the bank is one of what is in memory)" if of.differs else ""
    _log.warning(
        "no bank in the cache for these weights of %s%s: they are decomposed now, once, at rank %d, and kept in %s",
        of.checkpoint.name,
        own,
        rank,
        place,
    )
    begun = time.perf_counter()
    try:
        built = build_loaded(of.checkpoint, request, device=device, progress=progress)
    except OSError as cause:
        if isinstance(cause, SvdbankError):
            raise
        raise BankError(
            f"{place}: the bank cannot be kept: {cause.strerror or cause}",
            hint="SVDBANK_HOME names a folder for banks on a disk that takes them; what is finished is kept",
        ) from cause
    _log.warning("%d weights decomposed in %.1f s; the next start is a lookup", built.solved, time.perf_counter() - begun)
    return built


@dataclass(frozen=True)
class _Need:
    """What a bank has to hold: the targets, for ``method``, at ``rank`` or all that a smaller weight has."""

    targets: list[Target]
    method: InitialisationMethod
    rank: int
    prefix: str

    def is_met_by(self, bank: Bank) -> bool:
        """Whether a bank holds all of it, and the model's values are its base's as far as they can be read."""
        try:
            check_sides(bank, self.method)
            names = match(bank, self.targets, prefix=self.prefix)
            check_shapes(bank, names, self.targets)
            for name, target in zip(names, self.targets, strict=True):
                check_rank(bank, name, min(self.rank, target.out_features, target.in_features), method=self.method)
            recognise(bank, names, self.targets)
        except SvdbankError:
            return False
        return True


def _refuse_absent(targets: Sequence[Target], checkpoint: Checkpoint | None) -> None:
    absent = [f"{target.label} ({reason})" for target in targets if (reason := absence(target)) is not None]
    if not absent:
        return
    model = "MODEL" if checkpoint is None else str(checkpoint.folder) if checkpoint.revision is None else checkpoint.name
    raise OptionError(
        f"there is no bank in the cache, and bank={AUTO!r} makes one of weights that lie whole in the model: {abridge(absent)}",
        hint=f"svdbank build {model}, then bank={model!r}",
    )
