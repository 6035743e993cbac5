"""What has to change in a repository for it to hold a bank, with its card and the licence of its base."""

from __future__ import annotations

from collections.abc import Sequence

from svdbank.bank.reading import Bank
from svdbank.building.checking import family_info
from svdbank.sharing.bases import HubBase
from svdbank.sharing.card import ATTRIBUTES, CARD, attributes, card
from svdbank.sharing.inventory import LocalFile
from svdbank.sharing.replacing import stale
from svdbank.sharing.repository import RepositoryChange, Standing, differs, git_id, read_text


def change_of(
    bank: Bank,
    base: HubBase,
    repository: str,
    files: Sequence[LocalFile],
    sizes: Sequence[tuple[int, int, int | None]],
    before: Standing | None,
) -> RepositoryChange:
    """What ``before`` lacks or has too much. A card that somebody edited stays as it is while the bank stays the same."""
    held = {} if before is None else before.files
    lacking = tuple(file for file in files if differs(held.get(file.name), file))
    gone = tuple(stale(held, {file.name for file in files}))
    is_same = not lacking and not gone
    documents = dict(base.documents)
    if not is_same or CARD not in held:
        families = [family_info(bank, family) for family in bank.index.families]
        documents[CARD] = card(bank, base, repository, families, sizes)
    if not is_same or ATTRIBUTES not in held:
        there = read_text(repository, before.commit, ATTRIBUTES) if before is not None and ATTRIBUTES in held else b""
        documents[ATTRIBUTES] = attributes(there)
    wanted = {
        name: data
        for name, data in documents.items()
        if name not in held or (not is_same and held[name].identity != git_id(data))
    }
    return RepositoryChange(lacking, wanted, gone)
