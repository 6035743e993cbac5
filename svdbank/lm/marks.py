"""What a tokenizer puts before and after a text, asked of the tokenizer itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from svdbank.core.errors import OptionError

#: A text that every vocabulary can write, none of whose tokens is special.
_SAMPLE = "a"


@dataclass(frozen=True)
class Marks:
    """Tokens that a tokenizer adds ``before`` a text (BOS, as a rule, or nothing) and ``after`` it."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def marks_of(tokenizer: Any) -> Marks:
    """What the tokenizer adds, whoever adds it: a post-processor, ``add_bos_token``, a class's own code.

    Raises :class:`OptionError` for one that changes the text's own tokens where it adds others.
    """
    plain = _ids(tokenizer, add_special_tokens=False)
    whole = _ids(tokenizer, add_special_tokens=True)
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return Marks(tuple(whole[:start]), tuple(whole[start + len(plain) :]))
    raise OptionError(
        f"the model's tokenizer makes {plain} of {_SAMPLE!r}, and {whole} with the tokens that it adds to a text: where a text begins "
        "cannot be told",
        hint="name a model with another tokenizer",
    )


def end_of_document(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that close a document in a block: what the tokenizer adds after a text, else its end-of-sequence token.

    Raises :class:`OptionError` for a tokenizer without one.
    """
    after = marks_of(tokenizer).after
    if after:
        return after
    if tokenizer.eos_token_id is None:
        raise OptionError(
            "the model's tokenizer has no end-of-sequence token to put between documents",
            hint="name one as eos_token in the model's tokenizer_config.json",
        )
    return (int(tokenizer.eos_token_id),)


def missing_bos(tokenizer: Any) -> int | None:
    """The tokenizer's BOS where it has one and adds nothing before a text; None where there is nothing to miss."""
    if marks_of(tokenizer).before or tokenizer.bos_token_id is None:
        return None
    return int(tokenizer.bos_token_id)


def _ids(tokenizer: Any, *, add_special_tokens: bool) -> list[int]:
    return list(tokenizer(_SAMPLE, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
