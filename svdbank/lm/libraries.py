"""The libraries beneath: where one is missing its extra is named, and their bars and remarks stay off the terminal."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from logging import ERROR, getLogger
from typing import Any

from svdbank.core.errors import missing_extra


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError as cause:
        raise missing_extra("transformers", "peft") from cause
    return transformers


def import_datasets() -> Any:
    try:
        import datasets
    except ImportError as cause:
        raise missing_extra("datasets", "peft") from cause
    return datasets


def import_peft() -> Any:
    try:
        import peft
    except ImportError as cause:
        raise missing_extra("peft", "peft") from cause
    return peft


def spare_bitsandbytes() -> None:
    """For a process that is ours alone, before PEFT is imported: PEFT imports bitsandbytes too, a second, whether a base needs it or not.

    Until :func:`allow_bitsandbytes` it looks as if it were not installed.
    """
    modules: dict[str, Any] = sys.modules
    modules.setdefault("bitsandbytes", None)


def allow_bitsandbytes() -> None:
    """Take :func:`spare_bitsandbytes` back, before PEFT is imported."""
    modules: dict[str, Any] = sys.modules
    if modules.get("bitsandbytes", ...) is None:
        del modules["bitsandbytes"]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the bars and remarks of Transformers and what it calls: progress goes to our callback, and errors are raised."""
    logging = import_transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("bitsandbytes").setLevel(ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the bars of ``datasets``: progress goes to our callback."""
    datasets = import_datasets()
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def first_line(error: BaseException) -> str:
    """What a library's error says, without the pages that may follow."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
