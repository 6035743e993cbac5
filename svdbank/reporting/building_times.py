"""How long a build took, by solver and shape, from the log in a bank's folder: times are in no digest and may be gone."""

from __future__ import annotations

from statistics import median

import msgspec

from svdbank.bank.files import Folder
from svdbank.bank.layout import LOG
from svdbank.bank.reading import Bank
from svdbank.reporting.document import Figure, Section, Table, counted, duration
from svdbank.reporting.drawing import bar_chart
from svdbank.reporting.families import shape_of

#: A log is read as far as this; some hundred thousand shards.
_MOST_BYTES = 64 << 20
_TITLE = "Build time by solver and shape"
#: Rows of the figure.
_BARS = 14


class _Event(msgspec.Struct):
    """A line of the log, as far as it is used."""

    event: str = ""
    family: str = ""
    index: int = -1
    seconds: float = 0.0
    recorded: bool = True


def shard_seconds(bank: Bank) -> dict[tuple[str, int], float]:
    """Seconds of each shard, by family and number; of one solved more than once, the last. Empty where there is no log."""
    if not isinstance(bank.files, Folder):
        return {}
    try:
        with (bank.path / LOG).open("rb") as file:
            lines = file.read(_MOST_BYTES).splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        try:
            event = msgspec.json.decode(line, type=_Event)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        if event.event == "shard" and event.recorded and 0 < event.seconds < 1e9:
            found[event.family, event.index] = event.seconds
    return found


def build_times(bank: Bank) -> Section:
    """Seconds by solver and shape."""
    seconds = shard_seconds(bank)
    groups: dict[tuple[str, str], list[tuple[float, int]]] = {}
    timed = 0
    for family in bank.index.families:
        spec = family.spec
        for shard in range(len(next(iter(family.files.values())))):
            if (spec.name, shard) not in seconds:
                continue
            members = family.weights[shard * spec.weights_per_shard : (shard + 1) * spec.weights_per_shard]
            path = " + ".join(sorted({weight.certificate.path for weight in members}))
            groups.setdefault((path, shape_of(spec)), []).append((seconds[spec.name, shard], len(members)))
            timed += len(members)
    if not groups:
        return Section(_TITLE, ["The build's log is not with this bank: times are known where it was built."])
    ordered = sorted(groups.items(), key=lambda item: -sum(taken for taken, _ in item[1]))
    totals = {key: sum(taken for taken, _ in found) for key, found in ordered}
    shown = ordered[:_BARS]
    drawn = bar_chart(
        [f"{path} {shape}" for (path, shape), _ in shown],
        [("seconds", [totals[key] for key, _ in shown])],
        x="seconds, summed over shards",
        texts=[duration(totals[key]) for key, _ in shown],
    )
    table = Table(
        ("solver", "out × in", "weights", "shards", "in all", "median a shard", "a weight"),
        [
            (
                path,
                shape,
                f"{sum(count for _, count in found):,}",
                f"{len(found):,}",
                duration(totals[path, shape]),
                duration(median(taken for taken, _ in found)),
                duration(totals[path, shape] / sum(count for _, count in found)),
            )
            for (path, shape), found in ordered
        ],
    )
    says = f"Seconds from a shard's solve to its record, {counted(timed, 'weight')} in all; solves that ran beside each other count each."
    return Section(_TITLE, [says], figures=[Figure("Where the time went", "By solver and shape.", drawn, table)])
