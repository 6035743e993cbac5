"""What a report says of a bank: from its index and σ, and from its build's log where it is there. Loads no torch."""

from __future__ import annotations

import math
from collections import Counter

from svdbank.bank.reading import Bank
from svdbank.bank.spectrum import Spectrum
from svdbank.core.basis import RESIDUAL_LIMIT
from svdbank.core.units import size
from svdbank.reporting.building_times import build_times
from svdbank.reporting.certificates import certificates, nearness, undefined_ranks
from svdbank.reporting.document import Chapter, Section, counted, sci
from svdbank.reporting.families import family_labels
from svdbank.reporting.sizes import bytes_by_rank
from svdbank.reporting.spectra import minor_end, principal_end


def bank_chapter(bank: Bank) -> Chapter:
    """All sections of a bank."""
    rows = bank.spectrum()
    manifest = bank.manifest
    labels = family_labels([family.spec for family in bank.index.families])
    return Chapter(
        "bank",
        manifest.base.name + (f" @{manifest.base.revision[:12]}" if manifest.base.revision else ""),
        _verdict(rows),
        [
            _overview(bank, rows),
            minor_end(bank, labels),
            *([principal_end(bank, labels)] if any(family.spec.principal for family in bank.index.families) else []),
            certificates(bank, rows, labels),
            undefined_ranks(bank, rows, labels),
            bytes_by_rank(bank, labels),
            build_times(bank),
        ],
    )


def _verdict(rows: Spectrum) -> str:
    worst = max(rows, key=nearness)
    unresolved = sum(row.unresolved for row in rows)
    lacking = sum(math.isinf(row.condition) for row in rows)
    said = [
        f"{counted(len(rows), 'weight')}, every one certified: the worst is {worst.name}, whose residual is {sci(worst.residual)} σ_max "
        f"({RESIDUAL_LIMIT / max(worst.residual, 1e-300):,.0f} times below the limit).",
        "The data define the subspace of every rank stored."
        if not unresolved
        else f"{counted(unresolved, 'pair')} of weight and rank have a boundary that the data do not define; see below.",
    ]
    if lacking:
        said.append(f"{counted(lacking, 'weight lacks', 'weights lack')} rank: the smallest singular value is 0.")
    return " ".join(said)


def _overview(bank: Bank, rows: Spectrum) -> Section:
    manifest, options = bank.manifest, bank.manifest.options
    paths = Counter(row.path for row in rows)
    shards = sum(len(next(iter(family.files.values()))) for family in bank.index.families)
    facts = [
        ("Weights", f"{len(rows):,} in {counted(len(bank.index.families), 'family', 'families')}"),
        ("Rank", f"{options.rank}" + (f", and {options.principal} of the largest" if options.principal else "")),
        ("Vectors", f"{'left and right' if options.side == 'both' else 'left'}, {options.dtype}, {size(manifest.nbytes)}"),
        ("Shards", f"{shards:,}"),
        ("Solved by", ", ".join(f"{path} ({count:,})" for path, count in paths.most_common())),
        ("Base digest", manifest.base_digest[:16]),
        ("Format", f"{manifest.format}, {manifest.created_by}"),
        ("Place", bank.place),
    ]
    return Section("Overview", facts=facts)
