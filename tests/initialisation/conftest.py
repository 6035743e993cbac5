"""The bank and the adapters that tests of the room below use too."""

from __future__ import annotations

from tests.adapter.conftest import _one_thread, pair_bank, trained

__all__ = ["_one_thread", "pair_bank", "trained"]
