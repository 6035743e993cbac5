"""Draws the diagrams of README.md and docs/concepts.md as SVG; the figures in them are read from docs/benchmarks.md.

python docs/draw_diagrams.py           writes docs/images/bank.svg and docs/images/domains.svg
python docs/draw_diagrams.py --check   exits 1 if they are not what would be written

Each picture has a background of its own and follows the reader's light or dark setting by a media query inside the file, so that it is
legible on GitHub, on the site and alone, without a network.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
IMAGES = HERE / "images"

STYLE = """\
text { font: 15px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2328 }
.small { font-size: 13px } .head { font-weight: 600 } .mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px }
.middle { text-anchor: middle } .end { text-anchor: end }
.page { fill: #ffffff; stroke: #d0d7de } .box { fill: #f6f8fa; stroke: #57606a } .line { stroke: #57606a; fill: none; stroke-width: 1.5 }
.tip { fill: #57606a } .rest { fill: #afb8c1 } .law { fill: #0969da } .med { fill: #bc4c00 } .both { fill: #6639ba } .on { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .page { fill: #0d1117; stroke: #30363d } .box { fill: #161b22; stroke: #8b949e }
  .line { stroke: #8b949e } .tip { fill: #8b949e } .rest { fill: #484f58 } .law { fill: #58a6ff } .med { fill: #f0883e }
  .both { fill: #bc8cff } .on { fill: #0d1117 }
}"""


def picture(width: int, height: int, title: str, description: str, parts: list[str]) -> str:
    """An SVG of this size that says to a screen reader what it shows."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            ' role="img" aria-labelledby="title description">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="description">{escape(description)}</desc>',
            f"<style>\n{STYLE}\n</style>",
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto-start-reverse">'
            '<path class="tip" d="M0 0 10 5 0 10z"/></marker></defs>',
            f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>',
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" class="{kind}"/>'


def arrow(*points: tuple[float, float]) -> str:
    path = " L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path class="line" d="M{path}" marker-end="url(#tip)"/>'


def spectrum(x: float, bottom: float, *, bars: int, step: float, tall: float, domains: dict[int, str]) -> list[str]:
    """Bars that fall as singular values do; ``domains`` gives the kind of those at the minor end, counted from the last one."""
    drawn = []
    for i in range(bars):
        height = tall * (0.9 * 2.718 ** (-i / 5.5) + 0.1 * (bars - i) / bars) + 4
        kind = domains.get(bars - 1 - i, "rest")
        drawn.append(
            f'<rect x="{x + i * step:g}" y="{bottom - height:.1f}" width="{step - 3:g}" height="{height:.1f}" class="{kind}"/>'
        )
    return drawn


def bank() -> str:
    """The diagram of docs/concepts.md: once for each model, then for each adapter."""
    bands = dict.fromkeys(range(4), "law") | dict.fromkeys(range(4, 8), "med")
    parts = [
        text(30, 40, "once for each base model", "head"),
        box(30, 60, 190, 62),
        text(125, 86, "checkpoint", "head middle"),
        text(125, 108, "opened, never loaded", "small middle"),
        arrow((220, 91), (270, 91)),
        text(245, 82, "W", "middle"),
        text(285, 70, "W = U Σ Vᵀ: the singular values of one weight", "small"),
        *spectrum(285, 190, bars=24, step=13.5, tall=100, domains=bands),
        text(285, 212, "principal", "small"),
        text(606, 212, "minor end", "small end"),
        arrow((622, 140), (672, 140)),
        box(678, 60, 192, 152),
        text(774, 86, "bank", "head middle"),
        text(774, 110, "a folder: the minor σ, U, V", "small middle"),
        text(774, 130, "of every weight, and for", "small middle"),
        text(774, 150, "each a certificate that", "small middle"),
        text(774, 170, "no smaller σ was missed", "small middle"),
        text(774, 194, "rank r = the first r", "mono middle"),
        '<path class="line" stroke-dasharray="5 5" d="M20 240H880"/>',
        text(30, 266, "for each adapter: a lookup", "head"),
    ]
    for left, kind, name, band in ((30, "law", "law", "0:4"), (250, "med", "med", "4:8")):
        parts += [
            box(left, 296, 190, 92),
            f'<rect x="{left + 14}" y="312" width="14" height="60" class="{kind}"/>',
            text(left + 34, 366, "B", "small"),
            f'<rect x="{left + 34}" y="312" width="48" height="14" class="{kind}" opacity="0.45"/>',
            text(left + 62, 343, "A", "small"),
            text(left + 90, 326, f"adapter {name}", "head small"),
            text(left + 90, 347, f"band {band}", "mono"),
            text(left + 90, 368, "B frozen", "small"),
        ]
    parts += [
        arrow((440, 342), (488, 342)),
        box(494, 296, 376, 92),
        text(510, 322, "exact arithmetic on the small C", "head small"),
        text(510, 346, "stack · drop · scale · merge · compare", "mono"),
        text(510, 370, "then PEFT, or fuse into a checkpoint", "small"),
        arrow((774, 212), (774, 280), (125, 280), (125, 294)),
        arrow((345, 280), (345, 294)),
    ]
    return picture(
        900,
        408,
        "From a checkpoint to a bank, once; from the bank to adapters, each a lookup",
        "Each weight of a checkpoint is decomposed once. A bank keeps the minor end of its singular values and vectors."
        " Adapter law stands on the last four directions, adapter med on the next four;"
        " stacking, dropping, scaling, merging and comparing them is arithmetic on"
        " small matrices.",
        parts,
    )


#: Rows of the table of docs/benchmarks.md, "Composing", and their names here.
ROWS = {"legal": "legal alone", "medical": "medical alone", "stack, bands apart, 0.7 each": "in one stack, with code"}


def losses() -> dict[str, dict[str, tuple[float, float]]]:
    """By row of the table, the change of the loss on legal and on medical text with its standard error, nats a token."""
    page = (HERE / "benchmarks.md").read_text(encoding="utf-8")
    found = {}
    for row in ROWS:
        lines = re.findall(rf"^\| {re.escape(row)} \|(.*)$", page, re.MULTILINE)
        (changes,) = [c for line in lines if len(c := re.findall(r"\(([+-][\d.]+) ± ([\d.]+)\)", line)) == 3]
        found[row] = {name: (float(c), float(e)) for name, (c, e) in zip(("legal", "code", "medical"), changes, strict=True)}
    return found


def domains() -> str:
    """The picture of README.md: two domains in directions of their own, and what each text gained."""
    bands = dict.fromkeys(range(4), "law") | dict.fromkeys(range(4, 8), "med")
    parts = [
        text(30, 38, "One base, two domains", "head"),
        *spectrum(30, 190, bars=24, step=12, tall=100, domains=bands),
        text(30, 60, "each in directions of its own", "small"),
        text(30, 212, "what the base uses most", "small"),
        text(318, 212, "… and least", "small end"),
        '<rect x="30" y="236" width="14" height="14" class="law"/>',
        text(52, 248, "law: trained first, band 0:16", "small"),
        '<rect x="30" y="262" width="14" height="14" class="med"/>',
        text(52, 274, "med: trained on top of it, a band further", "small"),
        text(30, 304, "svdbank stack domains --drop med", "mono"),
        text(30, 324, "leaves law as it was, to the bit", "small"),
        text(380, 38, "Loss on text held out, change against the base", "head"),
        text(380, 60, "nats a token; bars fall below the base; whiskers ± standard error", "small"),
    ]
    scale = 330.0
    for column, (row, name) in enumerate(ROWS.items()):
        left = 384 + column * 172
        parts += [text(left + 70, 88, name, "small middle"), f'<path class="line" d="M{left} 100H{left + 142}"/>']
        for place, (domain, kind) in enumerate((("legal", "law"), ("medical", "med"))):
            change, error = losses()[row][domain]
            x, height = left + 14 + place * 64, max(-change * scale, 1.5)
            bottom = 100 + height
            parts += [
                f'<rect x="{x}" y="100" width="50" height="{height:.1f}" class="{kind}"/>',
                f'<path class="line" d="M{x + 25} {bottom - error * scale:.1f}V{bottom + error * scale:.1f}"/>',
                text(x + 25, 100 + height + error * scale + 18, f"{change:+.2f}".replace("-", "−"), "small middle"),
                text(x + 25, 100 + height + error * scale + 34, domain, "small middle"),
            ]
    parts.append(text(380, 324, "SmolLM2-135M, rank 16, 30 steps each: docs/benchmarks.md, “Composing”", "small"))
    return picture(
        900,
        344,
        "Two domains on one base, each in directions of its own",
        "Left: the singular values of a weight; two adapters stand on neighbouring bands at the minor end."
        " Right: change of the loss on legal and medical text for the legal adapter, the medical adapter and a stack: "
        + "; ".join(
            f"{name}: {losses()[row]['legal'][0]:+.2f} on legal, {losses()[row]['medical'][0]:+.2f} on medical text"
            for row, name in ROWS.items()
        )
        + ".",
        parts,
    )


def main() -> int:
    stale = []
    for name, drawn in {"bank.svg": bank(), "domains.svg": domains()}.items():
        target = IMAGES / name
        if "--check" not in sys.argv[1:]:
            IMAGES.mkdir(exist_ok=True)
            target.write_text(drawn, encoding="utf-8")
        elif not target.is_file() or target.read_text(encoding="utf-8") != drawn:
            stale.append(f"docs/images/{name}")
    if stale:
        sys.stderr.write(f"{', '.join(stale)} stale: run python docs/draw_diagrams.py\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
