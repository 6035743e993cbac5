"""What a report says of a build that is not finished: how far it is, who is at it, what to run."""

from __future__ import annotations

from collections import Counter
from shlex import quote

from svdbank.building.standing import UnfinishedInfo
from svdbank.reporting.document import Chapter, Figure, Section, Table, brief, counted, shortened
from svdbank.reporting.drawing import bar_chart

_FIGURES = 16


def build_chapter(info: UnfinishedInfo, shards: Counter[str]) -> Chapter:
    """``shards`` are those of the plan by family."""
    left = Counter(one.family for one in info.left)
    held = Counter(one.family for one in info.left if one.held_by is not None)
    done = info.recorded / info.weights if info.weights else 0.0
    revision = f" @{info.revision[:12]}" if info.revision else ""
    kind = "An extension" if info.extends else "A build"
    verdict = f"{kind} that is not finished: {info.recorded:,} of {info.weights:,} weights ({done:.0%})."
    if info.workers:
        verdict += f" {counted(len(info.workers), 'worker is', 'workers are')} at it."
    elif info.left:
        verdict += " Nobody is at it: the same svdbank build goes on where it stopped."
    else:
        verdict += f" All is recorded: svdbank publish {quote(info.path)}"
    shown = sorted(shards, key=lambda family: -shards[family])[:_FIGURES]
    parts = [
        ("recorded", [float(shards[family] - left[family]) for family in shown]),
        ("being solved", [float(held[family]) for family in shown]),
        ("left", [float(left[family] - held[family]) for family in shown]),
    ]
    labels = [brief(family.rpartition(".")[2], 22) for family in shown]
    texts = [f"{shards[family] - left[family]}/{shards[family]}" for family in shown]
    table = Table(
        ("family", "shards", "recorded", "being solved", "left"),
        [
            (family, str(count), str(count - left[family]), str(held[family]), str(left[family] - held[family]))
            for family, count in shards.most_common()
        ],
    )
    facts = [
        ("Model", info.model + revision),
        ("Place", info.path),
        ("Rank", str(info.rank)),
        ("Weights", f"{info.recorded:,} of {info.weights:,}"),
        ("Shards", f"{info.recorded_shards:,} of {info.shards:,}"),
    ]
    figure = Figure(
        "Progress by family", "Shards of the plan.", bar_chart(labels, parts, x="shards", texts=texts), shortened(table)
    )
    tables = []
    if info.workers:
        rows = [(w.host, str(w.pid), w.device, str(len(w.shards)), ", ".join(w.shards[:3])) for w in info.workers]
        tables.append(("Workers", Table(("host", "process", "device", "holds", "shards"), rows)))
    if info.left:
        waiting = [(f"{one.family}/{one.index}", ", ".join(one.weights[:3]), one.held_by or "–") for one in info.left]
        tables.append(
            ("Shards that are left", shortened(Table(("shard", "weights", "held by"), waiting), 60, "svdbank info --missing"))
        )
    return Chapter("unfinished build", info.model, verdict, [Section("Progress", facts=facts, figures=[figure], tables=tables)])
