"""What a report says is what the bank and the adapters hold; what cannot be reported on is refused before anything is written."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import svdbank
from svdbank.adapter.settings import TRAINING_FIGURES
from svdbank.core.errors import BankNotFoundError, MissingExtraError, OptionError
from svdbank.lm.scores import Score
from svdbank.reporting.certificates import as_ranges
from svdbank.reporting.document import Chapter, Section, Table, shortened, visible
from svdbank.reporting.families import family_labels
from svdbank.reporting.page import render
from svdbank.reporting.training import read_evaluation
from svdbank.verbs.eval import EvalReport
from svdbank.verbs.report import WrittenReport
from svdbank_cli.main import run
from tests.building.small import write_made_checkpoint
from tests.reporting.conftest import HOSTILE, IN_JSON, write_trained


class Page(HTMLParser):
    """Tables of a page by caption, its headings, and its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self._caption, self._cell, self._open = "", "", ""
        self._rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        if tag in ("th", "td", "caption", "h2", "h3"):
            self._open, self._cell = tag, ""

    def handle_data(self, data: str) -> None:
        self._cell += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self._rows[-1].append(self._cell)
        elif tag == "caption":
            self._caption = self._cell
        elif tag in ("h2", "h3"):
            self.headings.append(self._cell.strip())
        elif tag == "table":
            self.tables[self._caption] = self._rows


@pytest.fixture(scope="module")
def page(everything: WrittenReport) -> Page:
    return Page(Path(everything.path).read_text(encoding="utf-8"))


def test_a_page_of_everything_has_every_section_and_each_figure_its_numbers(everything: WrittenReport, page: Page) -> None:
    for heading in (
        "The minor end of the spectrum",
        "The principal end",
        "Certificates, the worst first",
        "Ranks whose boundary the data do not define",
        "Bytes by rank",
        "Build time by solver and shape",
        "Norms by layer",
        "Angles and conflict",
        "Bands in use",
        "Training",
        "Losses before and after",
        "Drift of each weight",
        "Progress",
        "Losses",
    ):
        assert heading in page.headings, heading
    text = Path(everything.path).read_text(encoding="utf-8")
    assert everything.nbytes == len(text.encode()) < 2_000_000
    assert text.count("<figure") == text.count("<details>") == everything.figures
    assert (len(everything.banks), len(everything.builds), len(everything.evaluations)) == (1, 1, 1)
    assert set(everything.adapters) == {"law", "code", "med", "domains/law", "domains/med"}


def test_the_tables_say_what_the_bank_says(page: Page, made_bank: svdbank.Bank) -> None:
    rows = {row.name: row for row in made_bank.spectrum()}
    header, *certificates = page.tables["Certificates"]
    assert header[:3] == ["weight", "residual", "orthogonality"] and {row[0] for row in certificates} == set(rows)
    assert all(row[1] == f"{rows[row[0]].residual:.1e}" for row in certificates)
    undefined = {row[0]: row[1:] for row in page.tables["Weights with such ranks"][1:]}
    # Ranks 1 to 3 lie among zeros; between two equal singular values rank 6; another zero, rank 4.
    assert [undefined[name][0] for name in made_bank] == ["1–3", "1–3, 6", "1–4"]
    spectrum = page.tables["query"]
    sigma = made_bank.sigma(made_bank.names, 8)[made_bank.names[0]].flip(0)
    assert spectrum[1][0] == "layer 0" and spectrum[1][-1] == f"{float(sigma[-1]) / 20:.1e}"
    sizes = {row[0]: row[1:] for row in page.tables["Read by a lookup of all weights"][1:]}
    assert sizes["8"] == ["4.6 kB", "12.3 kB"]  # 3 weights, a chunk of 16 vectors, of 24 or of 24 and 40 float32


def test_the_tables_say_what_compare_says(page: Page, adapters: dict[str, Path]) -> None:
    (pair,) = svdbank.compare([adapters["law"], adapters["code"]]).pairs
    rows = {row[0]: row for row in page.tables["Pairs"][1:]}
    assert rows["law · code"][1:4] == [f"{pair.all.cosine:+.3f}", f"{pair.all.agreement:.3f}", f"{pair.all.conflict:.3f}"]
    assert rows["law · med"][1] == "+0.000" and rows["law · domains/law"][1] == "+1.000"
    bands = [row[:2] for row in page.tables["Directions that each adapter writes on"][1:]]
    assert ["law", "0–4"] in bands and ["domains/med", "4–8"] in bands


def test_drift_is_the_largest_singular_value_over_the_weights_own(
    page: Page, adapters: dict[str, Path], made_bank: svdbank.Bank
) -> None:
    read = svdbank.read_adapter(adapters["law"], bank=made_bank)
    for key, norm, largest, share, *_ in page.tables["law: drift of each weight"][1:]:
        delta = read.delta(key).double()
        assert float(norm) == pytest.approx(float(delta.norm()), rel=1e-3)  # four digits are shown
        assert float(largest) == pytest.approx(float(delta.svd().S[0]), rel=1e-3)
        # σ_max of the weights that were made is 20; three digits are shown
        assert float(share.removesuffix(" %")) == pytest.approx(100 * float(delta.svd().S[0]) / 20, rel=1e-2)


def test_training_and_evaluation_keep_their_numbers(page: Page) -> None:
    assert ["30", "2.8000", "2.9000"] in page.tables["Loss of med"]
    losses = [row for caption, rows in page.tables.items() if caption == "Losses" for row in rows]
    assert ["law", "law", "2.8000 ± 0.1000", "16.40", "-0.2000 ± 0.0200", "100", "0 "] in losses


def test_names_from_outside_are_text(everything: WrittenReport, page: Page) -> None:
    """One in a table, in a figure, in a caption, in a heading, in the title."""
    shown = visible(IN_JSON)
    assert not {"script", "img", "iframe", "object", "link"} & page.tags
    assert not {name for name in page.attributes if name.startswith("on") or name == "src"}
    assert any(shown in cell for rows in page.tables.values() for row in rows for cell in row)
    text = render(
        HOSTILE,
        [Chapter(HOSTILE, HOSTILE, HOSTILE, [Section(HOSTILE, [HOSTILE], [(HOSTILE, HOSTILE)], legend=[(HOSTILE, "s0")])])],
    )
    assert not {"script", "img"} & Page(text).tags and "\x1b" not in text and "\u202e" not in text
    text.encode("utf-8")


def test_a_hostile_adapter_and_bank_are_reported_and_do_nothing(made_bank: svdbank.Bank, tmp_path: Path) -> None:
    folder = write_trained(tmp_path / "<b>a & $x$", made_bank, (0, 4), 0)
    report = svdbank.report([folder], tmp_path / "r.html")
    assert report.adapters == ("b-a-x",)
    text = Path(report.path).read_text()
    assert "<b>" not in text and "&lt;b&gt;a &amp; $x$" in text


def test_the_same_sources_give_the_same_file(made_bank: svdbank.Bank, adapters: dict[str, Path], tmp_path: Path) -> None:
    pages = []
    for name in ("one.html", "other.html"):
        svdbank.report([adapters["med"], "again=" + str(adapters["law"])], tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_a_bank_of_one_weight_and_an_adapter_of_another_base(
    made_bank: svdbank.Bank, adapters: dict[str, Path], tmp_path: Path
) -> None:
    model = write_made_checkpoint(tmp_path / "model", [[3.0, 2.0, 1.0]], out=3, width=5)
    single = svdbank.build(model, tmp_path / "bank", rank="all")
    other = write_trained(tmp_path / "other", single, (0, 2), 0)
    report = svdbank.report([single.path, other, adapters["law"]], tmp_path / "r.html")
    page = Page(Path(report.path).read_text(encoding="utf-8"))
    assert report.adapters == ("other", "law")  # a part each: they cannot be held against each other
    assert page.headings.count("Drift of each weight") == 2 and "Angles and conflict" not in page.headings
    assert page.tables["Certificates"][1][0] == single.names[0]


def test_an_adapter_without_its_bank_is_reported_and_the_page_says_so(adapters: dict[str, Path], tmp_path: Path) -> None:
    report = svdbank.report(adapters["code"], tmp_path / "r.html")
    text = Path(report.path).read_text(encoding="utf-8")
    assert "No bank of their base is at hand" in text and "Training" not in Page(text).headings


def test_what_eval_prints_is_read_with_its_gaps(tmp_path: Path) -> None:
    import msgspec

    nan = float("nan")
    score = Score("law", "legal", 2.5, nan, 12.2, -0.1, nan, 100, 1, "windows")
    path = tmp_path / "eval.json"
    path.write_bytes(msgspec.json.encode(EvalReport("org/model", 128, "float32", (score,), ())))
    (read,) = read_evaluation(path).scores
    assert (read.adapter, read.loss, read.error, read.over) == ("law", 2.5, None, "windows")


def test_train_and_eval_end_with_a_report_where_they_are_asked_for_one(
    small: Path,
    small_bank: svdbank.Bank,
    legal: Path,
    own_texts_cache: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page, adapter = tmp_path / "train.html", tmp_path / "law"
    options = ["--length", "32", "--batch-size", "2", "--held-out-blocks", "4", "--learning-rate", "1e-3", "--keep", "last"]
    command = ["train", str(small), "-o", str(adapter), "--data", str(legal), "--bank", str(small_bank.path), "--steps", "2"]
    assert run([*command, *options, "--report", str(page)]) in (0, 5)  # two steps may have made it worse
    tables = Page(page.read_text(encoding="utf-8")).tables
    figures = json.loads((adapter / TRAINING_FIGURES).read_text())
    assert [row[0] for row in tables["Loss of law"][1:]] == ["0", "2"]
    before = f"{figures['held_out']['before']:.4f} ± {figures['held_out']['before_error']:.4f}"
    assert before in [row[2] for row in tables["Losses"][1:]]
    command = [
        "eval",
        str(small),
        "--adapter",
        f"law={adapter}",
        "--data",
        f"legal={legal}",
        "--length",
        "32",
        "--tokens",
        "200",
    ]
    capsys.readouterr()
    assert run([*command, "--json", "--report", str(tmp_path / "eval.html")]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    shown = Page((tmp_path / "eval.html").read_text(encoding="utf-8"))
    assert "Drift of each weight" in shown.headings
    assert shown.tables["Losses"][-1][3] == f"{scores[-1]['perplexity']:.2f}"
    assert run([*command, "--report", str(tmp_path / "nowhere" / "eval.html")]) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "Missing argument"),
        (["{bank}", "-o", "{tmp}/report.pdf"], 2, "ends in .html"),
        (["{bank}", "-o", "{tmp}/nowhere/report.html"], 2, "its folder does not exist"),
        (["{bank}", "-o", "{tmp}/mine.html"], 2, "is no report of svdbank"),
        (["{tmp}", "-o", "{tmp}/r.html"], 2, "holds no bank, no adapter and no evaluation"),
        (["{tmp}/other.json", "-o", "{tmp}/r.html"], 2, "is not what svdbank eval --json prints"),
        (["", "-o", "{tmp}/r.html"], 2, "is empty"),
        (["{tmp}/gone", "-o", "{tmp}/r.html"], 10, "no such path"),
    ],
)
def test_what_cannot_be_reported_on_is_refused_and_nothing_is_written(
    arguments: list[str], code: int, said: str, made_bank: svdbank.Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.html").write_text("<html>mine</html>")
    (tmp_path / "other.json").write_text(json.dumps({"scores": 3}))
    assert run(["report", *(argument.format(bank=made_bank.path, tmp=tmp_path) for argument in arguments)]) == code
    assert said in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "<html>mine</html>" and not (tmp_path / "r.html").exists()


def test_a_report_is_replaced_and_another_page_only_with_force(
    made_bank: svdbank.Bank, evaluation: Path, tmp_path: Path
) -> None:
    place = tmp_path / "r.html"
    place.write_text("mine")
    with pytest.raises(OptionError):
        svdbank.report([evaluation], place)
    svdbank.report([evaluation], place, force=True)
    assert svdbank.report([evaluation], place).figures == 1


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_the_extra_the_error_names_the_command(
    package: str, evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError) as caught:
        svdbank.report([evaluation], tmp_path / "r.html")
    assert "pip install 'svdbank[report]'" in str(caught.value.hint) and not (tmp_path / "r.html").exists()


def test_an_unknown_model_is_no_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BankNotFoundError):
        svdbank.report(["no-such-place"], tmp_path / "r.html")


def test_labels_tell_families_apart_and_long_tables_say_that_they_are_cut(made_bank: svdbank.Bank) -> None:
    import msgspec

    spec = made_bank.index.families[0].spec
    names = ("a.mlp.up_proj-8x4", "b.mlp.up_proj-8x4", "a.attn.q_proj-4x4", "a.attn.k_proj-4x4", "a.attn.k_proj-2x4")
    specs = [msgspec.structs.replace(spec, name=name, out_features=int(name[-3]), in_features=int(name[-1])) for name in names]
    labels = family_labels(specs)
    assert len(set(labels.values())) == len(names) and labels["a.attn.q_proj-4x4"] == "q_proj"
    assert as_ranges([7, 1, 2, 3]) == "1–3, 7"
    cut = shortened(Table(("a",), [("1",)] * 10), 4, "the CSV")
    assert len(cut.rows) == 4 and cut.note == "The first 4 of 10 rows; the CSV has all."
