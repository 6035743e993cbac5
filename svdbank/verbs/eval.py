"""``eval``: loss and perplexity of a base model and its adapters on texts, with standard errors.

Each text is read once, document by document, and every adapter is asked about the same windows of tokens, so the change against the
base is measured pairwise. Memory is bounded by one batch of windows, whatever the size of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from svdbank.core.errors import OptionError
from svdbank.core.specs import Progress, ProgressCallback, Struct, ignore_progress
from svdbank.lm.adapters import with_adapters
from svdbank.lm.libraries import quiet_transformers
from svdbank.lm.loading import Dtype, LoadIn, check_quantiser, load_model, open_model
from svdbank.lm.measuring import measure, needs_bos
from svdbank.lm.memory import out_of_memory
from svdbank.lm.scores import BASE, Score
from svdbank.lm.tasks import TaskScore, import_lm_eval, task_scores
from svdbank.lm.texts import check_source, check_text, documents_of, named_texts


class EvalReport(Struct, frozen=True):
    """The table, text by text, and what it was measured with. ``length`` is the window in tokens; ``notes`` are for people."""

    model: str
    length: int
    dtype: str
    scores: tuple[Score, ...]
    tasks: tuple[TaskScore, ...]
    notes: tuple[str, ...] = ()


def eval(
    model: str | Path,
    *,
    data: Mapping[str, str | Path] | Sequence[str | Path] = (),
    adapters: Mapping[str, str | Path | Sequence[str | Path]] | None = None,
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    task_folder: str | Path | None = None,
    field: str = "text",
    split: str = "train",
    length: int | None = None,
    tokens: int | None = None,
    batch_size: int = 4,
    dtype: Dtype = "auto",
    load_in: LoadIn | None = None,
    progress: ProgressCallback | None = None,
) -> EvalReport:
    """Measure the base and every adapter on every text.

    Parameters
    ----------
    model
        Folder or ``org/name[@revision]`` of a causal language model.
    data
        Texts by name: files, folders, Hub datasets, as in ``train``. Without names, the file names serve.
    adapters
        PEFT folders, or ``org/name[@revision]`` on the Hub, by name; several under one name act together.
    tasks, task_limit, task_folder
        lm-eval tasks (needs the extra ``eval``), examples a task, a folder with task files of your own.
    length
        Tokens of a window, which begins with what the tokenizer puts before a text. A longer document is cut, and the last token of a
        window is read again at the head of the next, so that every token is predicted once; where the tokenizer puts nothing before a
        text, all but a document's first. 1024, or what the model takes.
    tokens
        Stop a text after so many predicted tokens.

    Raises :class:`OptionError` for what cannot be meant, :class:`CheckpointError` for what cannot be read, all before the weights
    are loaded; :class:`MissingExtraError` for tasks without lm-eval.
    """
    texts = named_texts(data)
    if not texts and not tasks:
        raise OptionError("nothing to measure on was named", hint="--data NAME=FILE, or --tasks TASK")
    if batch_size < 1 or (tokens is not None and tokens < 1):
        raise OptionError("batch size and tokens are 1 or more")
    for text in texts.values():
        check_source(text)
    stacks = _stacks(adapters or {})
    if tasks:
        import_lm_eval()
    check_quantiser(load_in)
    opened = open_model(str(model))
    window = opened.length(length)
    for text in texts.values():
        check_text(text, field, split)
    tell = progress or ignore_progress
    with quiet_transformers():
        tell(Progress("loading the model", 0, 1, "model", opened.name))
        loaded = with_adapters(load_model(opened, dtype=dtype, load_in=load_in), stacks)
        tell(Progress("loading the model", 1, 1, "model", opened.name))
        scores, notes = [], []
        with out_of_memory("lower --batch-size or --length, or load the base with --load-in 4bit"):
            for name, text in texts.items():
                notes += needs_bos(
                    loaded, opened.tokenizer, name, documents_of(text, field=field, split=split), window, batch_size
                )
                documents = documents_of(text, field=field, split=split)
                scores += measure(loaded, opened.tokenizer, stacks, name, documents, window, tokens, batch_size, tell)
            results = task_scores(loaded, opened.tokenizer, stacks, tasks, task_limit, task_folder, batch_size) if tasks else ()
    return EvalReport(
        opened.name, window, str(loaded.dtype).removeprefix("torch."), tuple(scores), tuple(results), tuple(notes)
    )


def _stacks(adapters: Mapping[str, str | Path | Sequence[str | Path]]) -> dict[str, tuple[str, ...]]:
    from svdbank.adapter.documents import read_documents
    from svdbank.adapter.fetching import located

    stacks = {}
    for name, folders in adapters.items():
        if name == BASE:
            raise OptionError(f"{BASE!r} is the model without an adapter", hint="give the adapter another name")
        named = (folders,) if isinstance(folders, str | Path) else folders
        stacks[name] = tuple(str(located(folder)[0]) for folder in named)
        for folder in stacks[name]:
            read_documents(folder)
    return stacks
