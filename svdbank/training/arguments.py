"""A run's options as Transformers' settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from svdbank.core.errors import OptionError, missing_extra
from svdbank.training.options import RATES, TrainOptions


def training_arguments(options: TrainOptions, folder: Path) -> Any:
    """Transformers' settings for the options. Raises :class:`OptionError` for a schedule it does not know."""
    import torch

    try:
        import accelerate  # noqa: F401 - the Trainer needs it
        import transformers
    except ImportError as cause:
        raise missing_extra("accelerate", "peft") from cause

    known = options.schedule in [kind.value for kind in transformers.SchedulerType]
    if not known or not _stands_alone(transformers, options.schedule):
        raise OptionError(
            f"the schedule {options.schedule!r} needs settings of its own, which train does not have"
            if known
            else f"there is no schedule {options.schedule!r}",
            hint="--schedule cosine, linear or constant_with_warmup",
        )
    mixed = options.dtype if options.dtype != "float32" else None
    # Renamed in Transformers 5.
    fields = {entry.name for entry in dataclasses.fields(transformers.TrainingArguments)}
    recompute = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        # Where none is given, the one that is found takes this one's place before the optimiser is made.
        learning_rate=options.learning_rate or RATES[options.method],
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        bf16=mixed == "bfloat16",
        fp16=mixed == "float16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=options.log_steps,
        logging_strategy="steps",
        logging_nan_inf_filter=False,
        save_strategy="steps",
        # Without a number of steps, the clock decides, and the Trainer saves at the end.
        save_steps=options.save_steps or 10**9,
        save_total_limit=2,
        seed=options.seed,
        data_seed=options.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        **{recompute: options.gradient_checkpointing},
    )


def _stands_alone(transformers: Any, schedule: str) -> bool:
    """Whether a schedule is made of the rate, the steps and the warm-up alone."""
    import torch

    if schedule == "reduce_lr_on_plateau":  # it goes by evaluations that the Trainer would make
        return False
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        transformers.get_scheduler(schedule, optimizer, num_warmup_steps=1, num_training_steps=10)
    except (TypeError, ValueError):
        return False
    return True
