"""Every tensor and every setting of an adapter is used, carried over, or refused by name, by every verb: no verb ends well and is wrong.

The table of what each verb does is in docs/adapters.md; ``python -m tests.adapter.test_every_setting`` writes it anew.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import svdbank
from svdbank.adapter.documents import KINDS_BEYOND, MERGED_BY_PEFT
from svdbank.bank.reading import Bank
from svdbank.core.errors import CheckpointError, SvdbankError
from tests.adapter.every import MODELS, TOKENS, VERBS, Made, make, off, write_base
from tests.adapter.settings import cases, logits, settings
from tests.peft.models import quiet

#: Of float32: sums of some hundred terms in another order, through two layers.
EXACT = 1e-5

DOCUMENT = Path(__file__).parents[2] / "docs" / "adapters.md"
BEGIN, END = "<!-- every setting -->\n", "<!-- end of every setting -->\n"

#: What the table says of a verb that does what PEFT does, and of one that refuses.
RIGHT, REFUSED = "✓", "refused"


class Models:
    """The bases, each with a bank, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, tuple[Path, Bank]] = {}

    def __getitem__(self, name: str) -> tuple[Path, Bank]:
        if name not in self._made:
            base = write_base(name, self._folder / name)
            self._made[name] = base, svdbank.build(base, self._folder / f"{name}.bank", rank=8, principal=8)
        return self._made[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    with quiet():
        yield Models(tmp_path_factory.mktemp("models"))


def test_every_field_of_pefts_config_is_decided() -> None:
    import peft

    named = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    decided = set(settings()) - {"a field of a later PEFT", "beside the factors"}
    assert decided == named
    assert {case.model for case in cases().values()} <= set(MODELS)


def outcome(made: Made, verb: str, label: str, place: Path) -> str:
    """What a verb does with an adapter; an assertion where that is wrong, or a refusal that does not say why."""
    try:
        found = VERBS[verb](made, place / re.sub(r"\W", "-", verb))
    except SvdbankError as refusal:
        text = str(refusal).replace(str(place), "")
        if verb == "export --to slim" and "to the bit" in text:
            return "–"  # B is not of the bank, whatever the setting
        assert re.search(made.case.names or label.partition(":")[0], text), f"{verb} does not name it: {text}"
        return REFUSED
    assert found < EXACT, f"{verb} is off by {found:.1e}"
    return RIGHT


def outcomes(label: str, models: Models, place: Path) -> dict[str, str]:
    case = cases()[label]
    made = make(case, *models[case.model], place)
    return {verb: outcome(made, verb, label, place) for verb in VERBS}


def table(rows: dict[str, dict[str, str]]) -> str:
    lines = [f"| setting | {' | '.join(VERBS)} |", f"| --- | {' | '.join('---' for _ in VERBS)} |"]
    lines += [f"| `{label}` | {' | '.join(row.values())} |" for label, row in rows.items()]
    return "\n".join(lines) + "\n"


def written() -> dict[str, dict[str, str]]:
    text = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    return {row[0].strip("`"): dict(zip(VERBS, row[1:], strict=True)) for row in rows}


@pytest.mark.parametrize("label", list(cases()))
def test_a_setting_is_used_or_refused_by_name(label: str, models: Models, memory_disk: Path, single_thread: None) -> None:
    assert outcomes(label, models, memory_disk) == written()[label], (
        "python -m tests.adapter.test_every_setting writes the table"
    )


@pytest.mark.parametrize("label", [label for label in cases() if label.partition(":")[0] in KINDS_BEYOND])
def test_merging_by_peft_is_named_where_it_is_right(label: str, models: Models, memory_disk: Path) -> None:
    import peft

    case = cases()[label]
    made = make(case, *models[case.model], memory_disk)
    with pytest.raises(CheckpointError) as refused:
        svdbank.read_adapter(made.one)
    if refused.value.hint is not None:
        assert "merge_and_unload()" in refused.value.hint
        merged = peft.PeftModel.from_pretrained(made.fresh(), made.one).merge_and_unload()
        assert off(logits(merged.eval(), TOKENS), made.expected()) < EXACT
    assert (refused.value.hint is not None) == (label.partition(":")[0] in MERGED_BY_PEFT)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models, rows = Models(Path(folder) / "models"), {}
        for number, label in enumerate(cases()):
            rows[label] = outcomes(label, models, Path(folder) / str(number))
            print(label, *rows[label].values())
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table(rows) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
