"""The small model and text of the training tests."""

from tests.training.conftest import _deprecations_of_others, _one_thread, _own_texts_cache, legal, small, small_bank

__all__ = ["_deprecations_of_others", "_one_thread", "_own_texts_cache", "legal", "small", "small_bank"]
