"""One type from its configuration to the fused checkpoint: each stage by itself, so that a later one runs where it can."""

from __future__ import annotations

import ast
import copy
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tests.architectures import feeding, plain, small

#: ``refused``: by our own error; ``failed``: by any other; ``skipped``: an earlier stage is lacking; ``cannot``: not ours to do.
State = Literal["ok", "refused", "wrong", "failed", "skipped", "cannot"]
STAGES = ("make", "save", "peft", "forward", "build", "attach", "step", "init", "fuse")
RANK, BANK_RANK = 2, 4
#: Of a fused weight against PEFT's merged one, in the Frobenius norm over that of the weight: float32 sums in another order.
FUSED = 1e-5


@dataclass
class Result:
    """What came of a stage; ``message`` is the error, or the figures; ``seconds`` are of the processor."""

    state: State
    message: str = ""
    seconds: float = 0.0


@dataclass
class Type:
    """What came of one type."""

    name: str
    kind: str = ""
    parameters: int = 0
    targets: plain.Targets | None = None
    stages: dict[str, Result] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Everything that is ours went well: a loss where one could be had of the model, a folder's values where PEFT reads its own."""
        states = [self.stages[stage].state for stage in ("build", "attach", "fuse")]
        return {*states} == {"ok"} and all(self.stages[stage].state in ("ok", "cannot") for stage in ("step", "init"))


class _WrongError(Exception):
    """Values that are not what they have to be."""


class _SkippedError(Exception):
    """What an earlier stage should have made is not there."""


class _CannotError(Exception):
    """The model does not do this, whoever asks."""


def run(model_type: str, work: Path) -> Type:
    """Every stage of one type; ``work`` is an empty folder."""
    report, started = Type(model_type), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _Run(report, work).all()
    report.seconds = time.process_time() - started
    return report


class _Run:
    def __init__(self, report: Type, work: Path) -> None:
        self.report, self.work = report, work
        self.made: nn.Module | None = None
        self.base: nn.Module | None = None
        self.lost: tuple[str, ...] = ()
        self.bank: Any = None
        self.adapted: Any = None

    def all(self) -> None:
        for stage in STAGES:
            self.report.stages[stage] = self._one(getattr(self, stage))

    def _one(self, stage: Callable[[], str | None]) -> Result:
        from svdbank import SvdbankError

        started, state, message = time.process_time(), "ok", ""
        try:
            message = stage() or ""
        except _WrongError as error:
            state, message = "wrong", str(error)
        except _SkippedError as error:
            state, message = "skipped", str(error)
        except (_CannotError, feeding.NotFedError, small.CannotBeMadeError) as error:
            state, message = "cannot", str(error)
        except SvdbankError as error:
            hint = getattr(error, "hint", None)
            state, message = "refused", f"{type(error).__name__}: {error}" + (f" — {hint}" if hint else "")
        except Exception as error:
            state, message = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Result(state, message.replace(str(self.work), "WORK"), time.process_time() - started)  # type: ignore[arg-type]

    def make(self) -> None:
        self.made = small.small_model(self.report.name)
        self.report.kind = type(self.made).__name__
        self.report.parameters = sum(parameter.numel() for parameter in self.made.parameters())

    def save(self) -> None:
        if self.made is None:
            raise _SkippedError("not made")
        self.base, self.lost = small.saved(self.made, self.work / "model")
        self.made = None
        if self.lost:
            raise _WrongError(f"{len(self.lost)} parameters are not given back: {'; '.join(self.lost[:3])}")

    def peft(self) -> str:
        adapted = plain.attached(self._base(), RANK)
        self.report.targets = found = plain.targets_of(adapted, RANK)
        return f"{len(found.modules)} modules, {len(found.parameters)} parameters"

    def forward(self) -> str:
        """A loss, and gradients of a plain LoRA where PEFT attaches one: what a training needs of the model itself."""
        base = self._base()
        model = base if self.report.targets is None else plain.attached(base, RANK)
        loss = feeding.loss_of(model)
        if not loss.isfinite():
            raise _CannotError(f"loss {float(loss)}")
        if self.report.targets is not None:
            if not loss.requires_grad:
                raise _CannotError("a plain LoRA gets no gradients either: the loss depends on no parameter that trains")
            loss.backward()
        return f"loss {float(loss):.3g}"

    def build(self) -> str:
        import svdbank

        self._base()
        self.bank = svdbank.build(self.work / "model", self.work / "bank", rank=BANK_RANK, device="cpu")
        return f"{len(self.bank)} weights"

    def attach(self) -> str:
        from peft import LoraConfig

        import svdbank.peft
        from svdbank import OptionError

        self._wanted()
        base, left_out = self._base(), []
        while True:
            config = LoraConfig(r=RANK, init_lora_weights="mica", target_modules="all-linear", exclude_modules=left_out or None)
            try:
                self.adapted = svdbank.peft.get_peft_model(copy.deepcopy(base), config, bank=self.work / "bank")
                break
            except OptionError as error:
                # Followed as it stands: a hint has to work.
                asked = re.search(r"exclude_modules=(\[[^\]]*\])", str(getattr(error, "hint", "")))
                more = [name for name in (ast.literal_eval(asked[1]) if asked else []) if name not in left_out]
                if not more:
                    raise
                left_out += more
        self._compare(left_out)
        return f"left out as the hint says: {', '.join(left_out)}" if left_out else ""

    def _compare(self, left_out: list[str]) -> None:
        found = list(plain.matrices(self.adapted))
        targets = self.report.targets
        if targets is not None:
            ours = {re.sub(r"\[\d+\]$", "", matrix.path) for matrix in found}
            lacking = sorted({*targets.modules, *targets.parameters} - ours)
            if lacking and not left_out:
                raise _WrongError(f"{len(lacking)} of PEFT's layers are not there: {', '.join(lacking[:3])}")
        wrong = []
        for matrix in found:
            distance, most = plain.minor_distance(matrix)
            if not distance <= most or matrix.A.any():
                wrong.append(f"{matrix.path} {distance:.2g}")
        if wrong:
            raise _WrongError(f"{len(wrong)} of {len(found)} B are of other vectors: {', '.join(wrong[:3])}")

    def step(self) -> str:
        if self.adapted is None:
            raise _SkippedError("not attached")
        if self.report.stages["forward"].state != "ok":
            raise _CannotError("no loss without an adapter either")
        before = {name: value.clone() for name, value in self.adapted.named_parameters()}
        trained = [value for value in self.adapted.parameters() if value.requires_grad]
        loss = feeding.loss_of(self.adapted)
        loss.backward()
        torch.optim.SGD(trained, lr=1.0).step()
        moved = {name for name, value in self.adapted.named_parameters() if not torch.equal(value, before[name])}
        if not loss.isfinite() or not moved or any(".lora_A." not in name for name in moved):
            raise _WrongError(f"loss {float(loss):.3g}, {len(moved)} parameters moved: {', '.join(sorted(moved)[:3])}")
        lacking = [name for name in before if ".lora_A." in name and name not in moved]
        return f"loss {float(loss):.3g}, {len(moved)} A moved" + (f", {len(lacking)} did not" if lacking else "")

    def init(self) -> None:
        import safetensors.torch
        from peft import PeftModel, get_peft_model_state_dict

        import svdbank

        self._wanted()
        folder = self.work / "init"
        svdbank.init(self.bank, output=folder, rank=RANK, base_model=str(self.work / "model"))
        loaded = PeftModel.from_pretrained(copy.deepcopy(self._base()), str(folder))
        written = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        read = dict(get_peft_model_state_dict(loaded, save_embedding_layers=False))
        wrong = list(small.different(written, read))
        if wrong and {_key(line) for line in wrong} <= self._lost_by_peft(folder):
            raise _CannotError(f"PEFT does not give the values of a plain LoRA back either: {len(wrong)} of {len(written)}")
        if wrong:
            raise _WrongError(f"{len(wrong)} of {len(written)} values are not those of the folder: {'; '.join(wrong[:3])}")

    def _lost_by_peft(self, folder: Path) -> set[str]:
        """Keys whose values PEFT itself does not read again from a plain LoRA on the same modules that it wrote."""
        import safetensors.torch
        from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

        config = LoraConfig.from_pretrained(str(folder))
        config.init_lora_weights, config.inference_mode = True, False
        adapted, generator = get_peft_model(copy.deepcopy(self._base()), config), torch.Generator().manual_seed(2)
        for name, value in adapted.named_parameters():
            if ".lora_" in name:
                value.data = torch.randn(value.shape, generator=generator)
        adapted.save_pretrained(str(self.work / "plain"))
        loaded = PeftModel.from_pretrained(copy.deepcopy(self._base()), str(self.work / "plain"))
        written = safetensors.torch.load_file(self.work / "plain" / "adapter_model.safetensors")
        read = dict(get_peft_model_state_dict(loaded, save_embedding_layers=False))
        return {_key(line) for line in small.different(written, read)}

    def fuse(self) -> str:
        import svdbank

        base = self._base()
        if self.report.targets is None:
            raise _SkippedError("PEFT attaches nothing")
        adapted, generator = plain.attached(base, RANK, lora_alpha=2 * RANK), torch.Generator().manual_seed(1)
        for name, value in adapted.named_parameters():
            if ".lora_" in name:
                value.data = torch.randn(value.shape, generator=generator) * 0.1
        adapted.save_pretrained(str(self.work / "lora"))
        merged = dict(adapted.merge_and_unload().named_parameters())
        svdbank.fuse(self.work / "model", self.work / "lora", self.work / "fused")
        anything: Any = type(base)
        fused = dict(anything.from_pretrained(self.work / "fused").named_parameters())
        lost = {line.partition(":")[0] for line in self.lost}
        if merged.keys() - lost != fused.keys() - lost:
            raise _WrongError(f"parameters: {', '.join(sorted(merged.keys() ^ fused.keys())[:3])}")
        apart = {name: _apart(fused[name], merged[name]) for name in merged if name not in lost}
        wrong = {name: by for name, by in apart.items() if not by <= FUSED}
        if wrong:
            worst = sorted(wrong, key=lambda name: -wrong[name])
            raise _WrongError(f"{len(wrong)} of {len(apart)}: " + ", ".join(f"{name} {wrong[name]:.2g}" for name in worst[:3]))
        before = dict(base.named_parameters())
        changed = sum(not torch.equal(fused[name], before[name]) for name in apart)
        return f"{changed} parameters changed, {max(apart.values()):.1g} apart"

    def _base(self) -> nn.Module:
        if self.base is None:
            raise _SkippedError("not made, or not saved")
        return self.base

    def _wanted(self) -> None:
        if self.bank is None:
            raise _SkippedError("not built")
        if self.report.targets is None:
            raise _SkippedError("PEFT attaches nothing")


def _key(line: str) -> str:
    return line.partition(":")[0]


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    size = float(other.double().norm())
    return float((one.double() - other.double()).norm()) / (size or 1.0)
