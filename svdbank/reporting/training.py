"""What a report says of training and of evaluations: curves, and tables of losses with their errors.

What ``train`` leaves beside an adapter and what ``eval --json`` prints are read leniently: files of other versions lack some figures and
have others, and a figure that is not there is not shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from svdbank.adapter.settings import TRAINING_FIGURES
from svdbank.core import disk
from svdbank.core.errors import OptionError
from svdbank.reporting.document import Chapter, Figure, Section, Table, brief, counted, duration, shortened, visible
from svdbank.reporting.drawing import SERIES, Line, dot_chart, line_chart

#: A file of figures is not larger.
_MOST_BYTES = 32 << 20
#: Points of a curve in a table.
_POINTS = 120


class LossChange(msgspec.Struct):
    """Loss on one text before and after a run, nats a token."""

    text: str = ""
    blocks: int = 0
    tokens: int = 0
    before: float | None = None
    before_error: float | None = None
    after: float | None = None
    after_error: float | None = None
    change: float | None = None
    change_error: float | None = None


class HeldOutPoint(msgspec.Struct):
    """The text held out after a step."""

    step: int = 0
    loss: float | None = None
    change: float | None = None
    change_error: float | None = None


class Training(msgspec.Struct):
    """Of ``training.json``, what is shown."""

    model: str = ""
    method: str = ""
    steps: int = 0
    tokens: int = 0
    seconds: float | None = None
    step_seconds: float | None = None
    trainable_parameters: int = 0
    learning_rate: float | None = None
    kept: str = "last"
    kept_step: int = 0
    curve: list[tuple[int, float | None]] = []
    measured: list[HeldOutPoint] = []
    held_out: LossChange | None = None
    retained: list[LossChange] = []
    notices: list[str] = []


class EvaluationScore(msgspec.Struct):
    """A row of ``eval``'s table."""

    adapter: str
    text: str
    loss: float | None
    error: float | None = None
    perplexity: float | None = None
    change: float | None = None
    change_error: float | None = None
    tokens: int = 0
    draws: int = 0
    over: str = ""


class TaskResult(msgspec.Struct):
    """A row of ``eval``'s table of tasks."""

    task: str
    adapter: str
    metric: str
    value: float | None
    error: float | None = None


class Evaluation(msgspec.Struct):
    """What ``eval --json`` prints, as far as it is shown."""

    model: str
    scores: list[EvaluationScore]
    length: int = 0
    dtype: str = ""
    tasks: list[TaskResult] = []
    notes: list[str] = []


def read_training(folder: Path) -> Training | None:
    """The figures of the run that an adapter's folder came from; None where it has none, or others than these."""
    try:
        document = disk.read_document(folder / TRAINING_FIGURES, error=OptionError, largest=_MOST_BYTES)
        return msgspec.json.decode(document, type=Training)
    except (OSError, OptionError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def read_evaluation(path: Path) -> Evaluation:
    """The document that ``svdbank eval --json`` printed. Raises :class:`OptionError` for any other file."""
    try:
        return msgspec.json.decode(disk.read_document(path, error=OptionError, largest=_MOST_BYTES), type=Evaluation)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as cause:
        raise OptionError(
            f"{path} is not what svdbank eval --json prints: {cause}", hint="svdbank eval MODEL --data TEXT --json > eval.json"
        ) from cause


def evaluation_of(report: object) -> Evaluation:
    """A report of ``svdbank.eval`` as what it prints."""
    return msgspec.json.decode(msgspec.json.encode(report), type=Evaluation)


def training_sections(runs: Sequence[tuple[str, Training]]) -> list[Section]:
    """Curves and losses of runs, by the adapter's name."""
    if not runs:
        return []
    figures = []
    curves = [(name, run) for name, run in runs if run.curve or run.measured]
    for number, (name, run) in enumerate(curves[:SERIES]):
        figures.append(_curve(name, run, number))
    facts = []
    for name, run in runs:
        rate = "" if run.learning_rate is None else f", rate {run.learning_rate:.3g}"
        took = "" if run.seconds is None else f" in {duration(run.seconds)}"
        facts.append((visible(name), f"{counted(run.steps, 'step')}, {run.tokens:,} tokens{took}{rate}; {_kept(run)}"))
    notices = [f"{name}: {notice}" for name, run in runs for notice in run.notices[:5]]
    return [Section("Training", notices, facts=facts, figures=figures), *_losses(runs)]


def _kept(run: Training) -> str:
    if run.kept == "nothing":
        return "nothing was kept"
    return f"kept: {run.kept}, step {run.kept_step}"


def _curve(name: str, run: Training, number: int) -> Figure:
    trained = [(float(step), loss) for step, loss in run.curve if loss is not None]
    held = [(float(point.step), point.loss) for point in run.measured if point.loss is not None]
    if held and run.held_out is not None and run.held_out.before is not None:
        held = [(0.0, run.held_out.before), *held]
    lines = [Line("training text", trained, 0), *([Line("held out", held, 1)] if held else [])]
    marks = [(float(run.kept_step), "kept")] if run.kept == "best" else []
    drawn = line_chart(lines, x="step", y="loss, nats a token", whole_x=True, marks=marks)
    steps = sorted({step for step, _ in trained} | {step for step, _ in held})
    one, other = dict(trained), dict(held)
    table = Table(
        ("step", "training text", "held out"),
        [(f"{step:.0f}", _loss(one.get(step)), _loss(other.get(step))) for step in steps],
    )
    return Figure(
        f"Loss of {visible(name)}", "Training text between two points, and the text held out.", drawn, shortened(table, _POINTS)
    )


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _losses(runs: Sequence[tuple[str, Training]]) -> list[Section]:
    changes = [
        (name, which, change)
        for name, run in runs
        for which, found in (("held out", [run.held_out]), ("retained", run.retained))
        for change in found
        if change is not None
    ]
    if not changes:
        return []
    rows = [
        (
            name,
            which if change.text in ("", which) else f"{Path(change.text).name} ({which})",
            _with_error(change.before, change.before_error),
            _with_error(change.after, change.after_error),
            _with_error(change.change, change.change_error, "+"),
            f"{change.tokens:,}",
        )
        for name, which, change in changes
    ]
    table = Table(("adapter", "text", "before", "after", "change", "tokens"), rows)
    drawn = [(n, w, c) for n, w, c in changes if c.change is not None]
    figures = []
    if drawn:
        labels = [f"{brief(n, 12)}: {brief(Path(c.text).name or w, 14)}" for n, w, c in drawn]
        order = list(dict.fromkeys(name for name, _, _ in drawn))
        chart = dot_chart(
            labels,
            [c.change or 0.0 for _, _, c in drawn],
            [c.change_error for _, _, c in drawn],
            x="change of loss, nats a token",
            numbers=[order.index(name) for name, _, _ in drawn],
        )
        figures.append(
            Figure("Change of the loss by training", "Left of 0 is better; bars are two standard errors.", chart, table)
        )
    says = ["Nats a token, with standard errors over blocks of text; the change is paired."]
    return [Section("Losses before and after", says, figures=figures, tables=[("Losses", table)])]


def evaluation_chapter(name: str, evaluation: Evaluation) -> Chapter:
    """The table of ``eval`` and a picture of the changes."""
    scores = [score for score in evaluation.scores if score.loss is not None]
    adapters = [score for score in scores if score.adapter != "base" and score.change is not None]
    table = Table(
        ("text", "adapter", "loss", "perplexity", "change", "tokens", "errors over"),
        [
            (
                score.text,
                score.adapter,
                _with_error(score.loss, score.error),
                "–" if score.perplexity is None else f"{score.perplexity:.2f}",
                "–" if score.adapter == "base" else _with_error(score.change, score.change_error, "+"),
                f"{score.tokens:,}",
                f"{score.draws:,} {score.over}",
            )
            for score in scores
        ],
    )
    figures = []
    if adapters:
        order = list(dict.fromkeys(score.adapter for score in adapters))
        chart = dot_chart(
            [f"{brief(score.text, 13)}: {brief(score.adapter, 13)}" for score in adapters],
            [score.change or 0.0 for score in adapters],
            [score.change_error for score in adapters],
            x="change of loss, nats a token",
            numbers=[order.index(score.adapter) for score in adapters],
        )
        figures.append(Figure("Change against the base", "Left of 0 is better; bars are two standard errors.", chart, table))
    tables = [("Losses", table)] if scores else []
    if evaluation.tasks:
        rows = [(t.task, t.adapter, t.metric, _with_error(t.value, t.error)) for t in evaluation.tasks]
        tables.append(("Tasks", Table(("task", "adapter", "metric", "value"), rows)))
    facts = [("Model", evaluation.model), ("Window", f"{evaluation.length} tokens"), ("Computed in", evaluation.dtype or "–")]
    verdict = _evaluated(adapters) if adapters else f"{counted(len(scores), 'loss', 'losses')} of {evaluation.model}."
    section = Section("Losses", evaluation.notes, facts=facts, figures=figures, tables=tables)
    return Chapter("evaluation", name, verdict, [section])


def _evaluated(scores: Sequence[EvaluationScore]) -> str:
    better = [s for s in scores if s.change is not None and s.change < -2 * (s.change_error or 0.0)]
    worse = [s for s in scores if s.change is not None and s.change > 2 * (s.change_error or 0.0)]
    undecided = len(scores) - len(better) - len(worse)
    return (
        f"Of {counted(len(scores), 'pair')} of adapter and text {len(better)} are better than the base by more than two standard errors, "
        f"{len(worse)} worse, {undecided} undecided."
    )
