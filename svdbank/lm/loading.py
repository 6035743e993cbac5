"""A causal language model and its tokenizer through Transformers, with what can go wrong said before anything large is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from svdbank.core.errors import CheckpointError, MissingExtraError, OptionError
from svdbank.core.places import OnDisk, OnHub, locate, refusal, refuse_empty
from svdbank.lm.libraries import first_line, import_transformers, quiet_transformers
from svdbank.lm.marks import marks_of
from svdbank.lm.memory import out_of_memory

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LoadIn = Literal["4bit", "8bit"]

#: Tokens of a block where nothing is asked for and the model takes as many.
LENGTH = 1024


@dataclass(frozen=True)
class CausalModel:
    """A causal language model before its weights are loaded: its folder, or Hub id and revision; configuration; tokenizer."""

    name: str
    revision: str | None
    config: Any
    tokenizer: Any

    @property
    def positions(self) -> int | None:
        """The longest sequence the model was made for; None where its configuration does not say."""
        return getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "n_positions", None)

    def length(self, asked: int | None) -> int:
        """Tokens of a block: what is asked for, else :data:`LENGTH` or what the model takes. Raises :class:`OptionError`."""
        longest = self.positions
        least = len(marks_of(self.tokenizer).before) + 2
        if asked is None:
            return min(LENGTH, longest or LENGTH)
        if asked < least:
            raise OptionError(f"a block of {asked} tokens holds nothing to predict", hint=f"--length {least} or more")
        if longest is not None and asked > longest:
            raise OptionError(
                f"blocks of {asked} tokens are longer than the {longest} positions that {self.name} was made for",
                hint=f"--length {longest}",
            )
        return asked


def open_model(model: str) -> CausalModel:
    """Configuration and tokenizer of a model folder or ``org/name[@revision]``; no weight is read.

    Raises :class:`CheckpointError` where they cannot be had, :class:`OptionError` for a model that is no causal language model.
    """
    name, revision = _place(model)
    transformers = import_transformers()
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(name, revision=revision)
        except Exception as cause:
            raise CheckpointError(
                f"{model}: no model configuration to be read: {first_line(cause)}",
                hint="name a folder with config.json, or org/name[@revision]; HF_TOKEN for a private or gated model",
            ) from cause
        # Encoders are in Transformers' table of causal models too, for those that were made decoders.
        encoder = type(config) in transformers.AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
        if encoder or type(config) not in transformers.AutoModelForCausalLM._model_mapping:
            raise OptionError(
                f"{model}: a {config.model_type} model does not predict next tokens, which this needs",
                hint="name a causal model",
            )
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
        except Exception as cause:
            raise CheckpointError(
                f"{model}: its tokenizer cannot be loaded: {first_line(cause)}",
                hint="the folder needs tokenizer.json or the files of its tokenizer class beside config.json",
            ) from cause
    return CausalModel(name, revision, config, tokenizer)


def load_model(model: CausalModel, *, dtype: Dtype = "auto", load_in: LoadIn | None = None) -> Any:
    """The model with its weights, in ``dtype`` (``auto``: :func:`chosen_dtype`), or quantised by bitsandbytes while loading."""
    import torch

    transformers = import_transformers()
    options: dict[str, Any] = {"dtype": getattr(torch, chosen_dtype(dtype)), "revision": model.revision}
    if load_in is not None:
        options["quantization_config"] = _quantisation(transformers, load_in, options["dtype"])
    if load_in is not None and torch.cuda.is_available():
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    with quiet_transformers(), out_of_memory():
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(model.name, **options)
        except (OSError, ValueError, ImportError) as cause:
            raise CheckpointError(
                f"{model.name}: the model cannot be loaded: {first_line(cause)}",
                hint="the weights have to lie beside config.json, whole; fetch the model again, or name another one",
            ) from cause
    rows, words = loaded.get_input_embeddings().weight.shape[0], len(model.tokenizer)
    if words > rows:
        raise CheckpointError(
            f"{model.name}: its tokenizer has {words:,} tokens, its embedding {rows:,} rows",
            hint=f"model.resize_token_embeddings({words}), model.save_pretrained(FOLDER), or take the tokenizer of this model",
        )
    return loaded


def chosen_dtype(dtype: Dtype) -> Dtype:
    """What ``auto`` stands for: bfloat16 on a GPU that computes in it, else float32."""
    import torch

    if dtype != "auto":
        return dtype
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def check_quantiser(load_in: LoadIn | None) -> None:
    """Refuse ``load_in`` where bitsandbytes is missing, before any work."""
    if load_in is None:
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as cause:
        raise MissingExtraError(
            "loading a model in 4 or 8 bit needs the package 'bitsandbytes', which is not installed",
            hint="pip install bitsandbytes",
        ) from cause


def _quantisation(transformers: Any, load_in: LoadIn, dtype: Any) -> Any:
    if load_in == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _place(model: str) -> tuple[str, str | None]:
    refuse_empty(model, "the model's name", "name a model folder or org/name on the Hub")
    place = locate(model)
    if isinstance(place, OnHub):
        return place.repository, place.revision
    if not isinstance(place, OnDisk):
        raise refusal(place)
    if not place.path.is_dir():
        raise OptionError(f"{model}: a file, where the folder of a model is needed", hint="name the folder with config.json")
    return str(place.path), None
