"""``demo``: the whole way on a real model and real text, without a network.

The model and the texts ship inside packages of PyPI, which are opened as data and never imported.
"""

from __future__ import annotations

import os
import time

from svdbank import cache
from svdbank.adapter.settings import TRAINING_FIGURES
from svdbank.core import disk
from svdbank.core.specs import Progress, ProgressCallback, Struct, ignore_progress, to_json
from svdbank.lm.libraries import quiet_transformers
from svdbank.lm.packaged import libraries, licence_texts, smollm2_folder
from svdbank.reporting.figures import load_matplotlib
from svdbank.reporting.page import checked_place, load_template
from svdbank.reporting.training import LossChange, Training
from svdbank.training.demonstration import DemoSettings, demo_windows, mean_loss, train_demo


class DemoReport(Struct, frozen=True):
    """Figures and places. Losses are nats a token on held-out text with the standard error over windows; times are seconds.

    ``build_seconds`` is of a build in this run; ``weights_reused`` tells how many weights an earlier demo had left in the bank.
    ``peft_seconds`` is PEFT's own ``"mica"`` initialisation, ``attach_seconds`` the bank's; ``svd_free_load_seconds`` loads the folder.
    ``report`` is an HTML file about the bank and the trained adapter.
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
    report: str

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
    """SmolLM2-135M → bank → MiCA adapter → PEFT → training on licence texts → report; returns every figure. Minutes on two cores.

    ``output`` holds the bank, the adapters and the report. By default the bank is in the cache, where ``train`` and ``ls`` find it, and
    the rest in ``demo`` in svdbank's own folder; what an earlier run left there is replaced. Deterministic up to rounding and time.
    Raises :class:`MissingExtraError` with the pip command where a package is missing.
    """
    chosen = settings or DemoSettings()
    tell = progress or ignore_progress
    peft, transformers, torch = libraries()
    from svdbank.peft import get_peft_model, load_adapter
    from svdbank.verbs.build import BuildReport, build
    from svdbank.verbs.init import init
    from svdbank.verbs.report import report

    load_matplotlib()
    load_template()
    given = cache.given_output(output)
    root = given or cache.home() / "demo"
    page = root / "report.html"
    if root.is_dir():
        checked_place(page)
    texts = licence_texts()
    folder = smollm2_folder(progress=progress)
    reports: list[BuildReport] = []
    begun = time.perf_counter()
    place = None if given is None else root / "bank"
    bank = build(folder, place, rank=chosen.bank_rank, progress=progress, on_report=reports.append)
    built = time.perf_counter() - begun
    fresh, trained = root / "adapter-fresh", root / "adapter-trained"
    init(bank, rank=chosen.rank, output=fresh, base_model=str(folder), task_type="CAUSAL_LM", force=True)

    with quiet_transformers():
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

    training, held_out = demo_windows(texts, tokenizer, chosen)
    before = mean_loss(tuned, held_out, tell, "held-out loss before")
    begun = time.perf_counter()
    losses = train_demo(tuned, training, chosen, tell)
    training_seconds = time.perf_counter() - begun
    after = mean_loss(tuned, held_out, tell, "held-out loss after")
    tuned.save_pretrained(str(trained))
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    tokens = chosen.steps * chosen.batch * chosen.length
    figures = Training(
        model=str(folder),
        method="mica",
        steps=chosen.steps,
        tokens=tokens,
        seconds=training_seconds,
        trainable_parameters=trainable,
        learning_rate=chosen.rate,
        kept_step=chosen.steps,
        curve=[(step, loss) for step, loss in enumerate(losses, 1)],
        held_out=LossChange(
            "licence texts",
            before=before[0],
            before_error=before[1],
            after=after[0],
            after_error=after[1],
            change=after[0] - before[0],
        ),
    )
    disk.write_bytes(trained / TRAINING_FIGURES, to_json(figures, indent=2))
    report([bank.path, f"licences={trained}"], page, title="svdbank demo", progress=progress)
    return DemoReport(
        model=str(folder),
        bank=bank.place,
        fresh_adapter=str(fresh),
        trained_adapter=str(trained),
        weights=len(bank),
        weights_reused=reports[0].reused,
        bank_bytes=bank.manifest.nbytes,
        trainable_parameters=trainable,
        build_seconds=built,
        peft_seconds=peft_seconds,
        attach_seconds=attach_seconds,
        svd_free_load_seconds=load_seconds,
        training_seconds=training_seconds,
        steps=chosen.steps,
        tokens=tokens,
        loss_before=before[0],
        loss_before_error=before[1],
        loss_after=after[0],
        loss_after_error=after[1],
        losses=tuple(losses),
        report=str(page),
    )
