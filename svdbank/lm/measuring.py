"""``eval``: loss and perplexity of a base model and its adapters on texts, with standard errors.

Each text is read once, document by document, and every adapter is asked about the same windows of tokens, so the change against the
base is measured pairwise. Memory is bounded by one batch of windows, whatever the size of the text.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from svdbank.core.errors import MissingExtraError, OptionError
from svdbank.core.specs import Progress, ProgressCallback, Struct
from svdbank.lm.loading import Dtype, LoadIn, check_quantiser, load_model, open_source, out_of_memory, quiet_transformers
from svdbank.lm.texts import document_marks, documents_of

if TYPE_CHECKING:
    from torch import Tensor

#: The base's name in tables.
BASE = "base"


class Score(Struct, frozen=True):
    """One cell of the table: an adapter on a text.

    ``loss`` is nats a token, ``perplexity`` its exponential. ``error`` is the standard error of ``loss``, with ``over`` (documents, or
    windows where there is one document) as the independent draws: tokens of one document depend on each other. ``change`` is loss
    minus the base's, ``change_error`` its standard error over the same draws, in pairs.
    """

    adapter: str
    text: str
    loss: float
    error: float
    perplexity: float
    change: float
    change_error: float
    tokens: int
    draws: int
    over: Literal["documents", "windows"]


class TaskScore(Struct, frozen=True):
    """One metric of an lm-eval task."""

    adapter: str
    task: str
    metric: str
    value: float
    error: float | None


class EvalReport(Struct, frozen=True):
    """The table, text by text, and what it was measured with. ``length`` is the window in tokens."""

    model: str
    length: int
    dtype: str
    scores: tuple[Score, ...]
    tasks: tuple[TaskScore, ...]


@dataclass
class Moments:
    """What a mean a token and its standard error need, of sums ``s`` over ``n`` tokens a draw; nothing a draw is kept."""

    draws: int = 0
    tokens: int = 0
    s: float = 0.0
    ss: float = 0.0
    sn: float = 0.0
    nn: float = 0.0

    def add(self, total: float, tokens: int) -> None:
        self.draws += 1
        self.tokens += tokens
        self.s += total
        self.ss += total * total
        self.sn += total * tokens
        self.nn += tokens * tokens

    def mean(self) -> float:
        """Σs / Σn."""
        return self.s / self.tokens

    def error(self) -> float:
        """Standard error of the ratio Σs / Σn with draws as clusters (Cochran, Sampling Techniques, 6.4); NaN for a single draw."""
        if self.draws < 2:
            return math.nan
        mean = self.mean()
        squares = max(0.0, self.ss - 2 * mean * self.sn + mean * mean * self.nn)
        return math.sqrt(squares * self.draws / (self.draws - 1)) / self.tokens


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
        PEFT folders by name; several folders under one name act together.
    tasks, task_limit, task_folder
        lm-eval tasks (needs the extra ``eval``), examples a task, a folder with task files of your own.
    length
        Tokens of a window; a longer document is cut, and the last token of a window begins the next, so that every token but a
        document's first is predicted once. 1024, or what the model takes.
    tokens
        Stop a text after so many predicted tokens.

    Raises :class:`OptionError` for what cannot be meant, :class:`CheckpointError` for what cannot be read, all before the weights
    are loaded; :class:`MissingExtraError` for tasks without lm-eval.
    """
    texts = _named(data)
    stacks = _stacks(adapters or {})
    if not texts and not tasks:
        raise OptionError("nothing to measure on was named", hint="--data NAME=FILE, or --tasks TASK")
    if batch_size < 1 or (tokens is not None and tokens < 1):
        raise OptionError("batch size and tokens are 1 or more")
    if tasks:
        _lm_eval()
    check_quantiser(load_in)
    source = open_source(str(model))
    window = source.length(length)
    for text in texts.values():
        _first_document(text, field, split)
    tell = progress or _ignore
    with quiet_transformers():
        tell(Progress("loading the model", 0, 1, "model", source.name))
        loaded = _with_adapters(load_model(source, dtype=dtype, load_in=load_in), stacks)
        tell(Progress("loading the model", 1, 1, "model", source.name))
        scores = []
        with out_of_memory("lower --batch-size or --length, or load the base with --load-in 4bit"):
            for name, text in texts.items():
                documents = documents_of(text, field=field, split=split)
                scores += _measure(loaded, source.tokenizer, stacks, name, documents, window, tokens, batch_size, tell)
            results = _tasks(loaded, source.tokenizer, stacks, tasks, task_limit, task_folder, batch_size) if tasks else ()
    return EvalReport(source.name, window, str(loaded.dtype).removeprefix("torch."), tuple(scores), tuple(results))


def _measure(
    model: Any,
    tokenizer: Any,
    stacks: Mapping[str, Sequence[str]],
    text: str,
    documents: Iterator[str],
    length: int,
    limit: int | None,
    batch_size: int,
    tell: ProgressCallback,
) -> list[Score]:
    """Scores of the base and every adapter on one text."""
    tallies = {name: _Tally() for name in (BASE, *stacks)}
    seen = 0
    for batch in _batches(_windows(documents, tokenizer, length, limit), batch_size):
        sums = {name: _sums(model, stacks.get(name, ()), batch) for name in tallies}
        for name, tally in tallies.items():
            for window, own, base in zip(batch, sums[name], sums[BASE], strict=True):
                tally.add(window, own, own - base)
        seen += sum(window.predicted for window in batch)
        tell(Progress(f"measuring on {text}", seen, limit or seen, "tokens"))
    return [tally.score(name, text) for name, tally in tallies.items()]


@dataclass(frozen=True)
class _Window:
    """Tokens to run and how many of them are predicted; ``ends`` the document."""

    tokens: list[int]
    ends: bool

    @property
    def predicted(self) -> int:
        return len(self.tokens) - 1


@dataclass
class _Tally:
    """Sums of one adapter on one text, by window and by document."""

    windows: tuple[Moments, Moments] = field(default_factory=lambda: (Moments(), Moments()))
    documents: tuple[Moments, Moments] = field(default_factory=lambda: (Moments(), Moments()))
    open: tuple[float, float, int] = (0.0, 0.0, 0)

    def add(self, window: _Window, loss: float, change: float) -> None:
        for moments, value in zip(self.windows, (loss, change), strict=True):
            moments.add(value, window.predicted)
        self.open = (self.open[0] + loss, self.open[1] + change, self.open[2] + window.predicted)
        if window.ends:
            self._close()

    def _close(self) -> None:
        for moments, value in zip(self.documents, self.open[:2], strict=True):
            moments.add(value, self.open[2])
        self.open = (0.0, 0.0, 0)

    def score(self, adapter: str, text: str) -> Score:
        if self.open[2]:
            self._close()
        by_document = self.documents[0].draws > 1
        loss, change = self.documents if by_document else self.windows
        return Score(
            adapter=adapter,
            text=text,
            loss=loss.mean(),
            error=loss.error(),
            perplexity=math.exp(min(loss.mean(), 700.0)),
            change=change.mean(),
            change_error=change.error(),
            tokens=loss.tokens,
            draws=loss.draws,
            over="documents" if by_document else "windows",
        )


def _windows(documents: Iterator[str], tokenizer: Any, length: int, limit: int | None) -> Iterator[_Window]:
    """Windows of documents in order; documents of a single token are left out, as nothing in them is predicted."""
    prefix, _ = document_marks(tokenizer)
    left = math.inf if limit is None else limit
    for text in documents:
        ids = [*prefix, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        starts = range(0, len(ids) - 1, length - 1)
        for start in starts:
            if left <= 0:
                return
            tokens = ids[start : start + length][: int(min(left, length)) + 1]
            yield _Window(tokens, ends=start == starts[-1])
            left -= len(tokens) - 1


def _batches(windows: Iterator[_Window], size: int) -> Iterator[list[_Window]]:
    batch: list[_Window] = []
    for window in windows:
        batch.append(window)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _sums(model: Any, adapters: Sequence[str], batch: Sequence[_Window]) -> list[float]:
    """Summed loss of each window, in nats."""
    import torch

    longest = max(len(window.tokens) for window in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, window in enumerate(batch):
        tokens[row, : len(window.tokens)] = torch.tensor(window.tokens)
        mask[row, : len(window.tokens)] = 1
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    with torch.inference_mode(), _active(model, adapters):
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    losses = [row_loss(logits[row], tokens[row], len(window.tokens)) for row, window in enumerate(batch)]
    sums: list[float] = torch.stack(losses).tolist()  # at once: a GPU is waited for at every number that it is asked for
    return sums


def row_loss(logits: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Summed loss in nats of predicting ``tokens`` (length,) from ``logits`` (length, vocabulary), of the first ``count`` tokens."""
    import torch

    return torch.nn.functional.cross_entropy(logits[: count - 1].float(), tokens[1:count], reduction="sum")


def _with_adapters(model: Any, stacks: Mapping[str, Sequence[str]]) -> Any:
    """The model with every folder loaded once, frozen, under its path as PEFT's name."""
    import torch

    if torch.cuda.is_available() and not getattr(model, "hf_device_map", None):
        model = model.to("cuda")
    if stacks:
        from svdbank.peft import load_adapter

        for folder in dict.fromkeys(folder for stack in stacks.values() for folder in stack):
            model = load_adapter(model, folder, adapter_name=_peft_name(folder), is_trainable=False)
    return model.eval()


@contextlib.contextmanager
def _active(model: Any, folders: Sequence[str]) -> Iterator[None]:
    """The model with exactly these adapters acting."""
    if folders:
        model.base_model.set_adapter([_peft_name(folder) for folder in folders], inference_mode=True)
        yield
    elif hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield


def _peft_name(folder: str) -> str:
    """A name for PEFT: it becomes a part of module paths, so it holds no dot and no slash."""
    import hashlib

    return "a" + hashlib.sha256(folder.encode()).hexdigest()[:16]


def _named(data: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, str]:
    if isinstance(data, Mapping):
        return {name: str(source) for name, source in data.items()}
    named: dict[str, str] = {}
    for source in data:
        name = Path(str(source)).name
        if name in named:
            raise OptionError(f"two texts are called {name!r}", hint="--data NAME=FILE gives them names")
        named[name] = str(source)
    return named


def _stacks(adapters: Mapping[str, str | Path | Sequence[str | Path]]) -> dict[str, tuple[str, ...]]:
    from svdbank.adapter.folder import read_settings

    stacks = {}
    for name, folders in adapters.items():
        if name == BASE:
            raise OptionError(f"{BASE!r} is the model without an adapter", hint="give the adapter another name")
        stacks[name] = (str(folders),) if isinstance(folders, str | Path) else tuple(str(folder) for folder in folders)
        for folder in stacks[name]:
            read_settings(Path(folder))
    return stacks


def _first_document(source: str, field: str, split: str) -> None:
    if next(documents_of(source, field=field, split=split), None) is None:
        raise OptionError(f"{source}: holds no text", hint="look at the file, or name another --field")


def _tasks(
    model: Any,
    tokenizer: Any,
    stacks: Mapping[str, Sequence[str]],
    tasks: Sequence[str],
    limit: int | None,
    folder: str | Path | None,
    batch_size: int,
) -> list[TaskScore]:
    """lm-eval's own figures of each task, for the base and every adapter."""
    lm_eval = _lm_eval()
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder) if folder is not None else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise OptionError(f"lm-eval knows no task {', '.join(map(repr, unknown))}", hint="lm-eval ls tasks lists them")
    found = []
    for name in (BASE, *stacks):
        with _active(model, stacks.get(name, ())):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            results = lm_eval.simple_evaluate(
                wrapped, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
            )["results"]
        for task, values in results.items():
            for key, value in values.items():
                metric, _, kind = key.partition(",")
                if isinstance(value, int | float) and not metric.endswith("_stderr") and kind:
                    error = values.get(f"{metric}_stderr,{kind}")
                    number = float(error) if isinstance(error, int | float) else None
                    found.append(TaskScore(name, task, metric, float(value), number))
    return found


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as cause:
        raise MissingExtraError(
            "tasks need the package 'lm-eval', which is not installed", hint="pip install 'svdbank[eval]'"
        ) from cause
    return lm_eval


def _ignore(progress: Progress) -> None:
    del progress


class Gauge:
    """A base model in memory and windows of texts, to measure many adapters one after another on the same tokens.

    Arguments are those of :func:`eval`, and so are the errors, all before the weights are loaded. ``tokens`` bounds what is kept
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
        texts = _named(data)
        if not texts:
            raise OptionError("nothing to measure on was named", hint="name files of text")
        check_quantiser(load_in)
        source = open_source(str(model))
        window = source.length(length)
        for text in texts.values():
            _first_document(text, field, split)
        self._batches = {
            name: list(
                _batches(_windows(documents_of(text, field=field, split=split), source.tokenizer, window, tokens), batch_size)
            )
            for name, text in texts.items()
        }
        empty = [name for name, batches in self._batches.items() if not batches]
        if empty:
            raise OptionError(f"{empty[0]}: holds no two tokens in a row to predict", hint="name another file")
        self._model = _with_adapters(load_model(source, dtype=dtype, load_in=load_in), {})

    def losses(self, folder: str | Path | None) -> dict[str, float]:
        """Loss in nats a token on each text, with the adapter in ``folder`` or, for None, of the base alone."""
        stack = () if folder is None else (str(folder),)
        with quiet_transformers():
            self._model = _with_adapters(self._model, {"": stack} if stack else {})
            losses = {}
            for name, batches in self._batches.items():
                total = math.fsum(value for batch in batches for value in _sums(self._model, stack, batch))
                losses[name] = total / sum(window.predicted for batch in batches for window in batch)
            if stack:
                self._model = self._model.unload()
        return losses
