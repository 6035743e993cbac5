"""Memory that runs out, said with what to lower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from svdbank.core.errors import SvdbankError
from svdbank.lm.libraries import first_line


class OutOfMemoryError(SvdbankError, MemoryError):
    """The machine or its GPU has too little memory for what was asked."""


@contextlib.contextmanager
def out_of_memory(hint: str = "lower --batch-size, or load the base with --load-in 4bit") -> Iterator[None]:
    """Memory that runs out, on a GPU or in the machine, as an error that says what to lower."""
    import torch

    try:
        yield
    except SvdbankError:
        raise
    except MemoryError as cause:
        raise OutOfMemoryError("out of memory", hint=hint) from cause
    except torch.OutOfMemoryError as cause:
        raise OutOfMemoryError(f"out of GPU memory: {first_line(cause)}", hint=hint) from cause
    except RuntimeError as cause:
        # torch's CPU allocator has no class of its own.
        if "not enough memory" not in str(cause) and "can't allocate memory" not in str(cause):
            raise
        raise OutOfMemoryError(f"out of memory: {first_line(cause)}", hint=hint) from cause
