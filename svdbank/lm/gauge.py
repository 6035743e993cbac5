"""A model in memory that measures one adapter after another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from svdbank.core.errors import OptionError
from svdbank.lm.adapters import acting, with_adapters
from svdbank.lm.libraries import quiet_transformers
from svdbank.lm.loading import Dtype, LoadIn, check_quantiser, load_model, open_model
from svdbank.lm.measuring import summed_losses
from svdbank.lm.texts import check_text, documents_of, named_texts
from svdbank.lm.windows import batches, windows


class Gauge:
    """A base model in memory and windows of texts, to measure many adapters one after another on the same tokens.

    Arguments are those of ``eval``, and so are the errors, all before the weights are loaded. ``tokens`` bounds what is kept
    of each text.
    """

    def __init__(
        self,
        model: str | Path,
        data: Mapping[str, str | Path] | Sequence[str | Path],
        *,
        tokens: int,
        length: int | None = None,
        batch_size: int = 4,
        field: str = "text",
        split: str = "train",
        dtype: Dtype = "auto",
        load_in: LoadIn | None = None,
    ) -> None:
        if batch_size < 1 or tokens < 1:
            raise OptionError("batch size and tokens are 1 or more")
        texts = named_texts(data)
        if not texts:
            raise OptionError("nothing to measure on was named", hint="name files of text")
        check_quantiser(load_in)
        opened = open_model(str(model))
        window = opened.length(length)
        for text in texts.values():
            check_text(text, field, split)
        self._batches = {
            name: list(
                batches(windows(documents_of(text, field=field, split=split), opened.tokenizer, window, tokens), batch_size)
            )
            for name, text in texts.items()
        }
        empty = [name for name, kept in self._batches.items() if not kept]
        if empty:
            raise OptionError(f"{empty[0]}: holds no two tokens in a row to predict", hint="name another file")
        self._model = with_adapters(load_model(opened, dtype=dtype, load_in=load_in), {})

    def losses(self, folder: str | Path | None) -> dict[str, float]:
        """Loss in nats a token on each text, with the adapter in ``folder`` or, for None, of the base alone."""
        stack = () if folder is None else (str(folder),)
        with quiet_transformers():
            self._model = with_adapters(self._model, {"": stack} if stack else {})
            losses = {}
            for name, kept in self._batches.items():
                with acting(self._model, stack):
                    total = math.fsum(value for batch in kept for value in summed_losses(self._model, batch))
                losses[name] = total / sum(window.predicted for batch in kept for window in batch)
            if stack:
                self._model = self._model.unload()
        return losses
