"""A causal language model and its tokenizer through Transformers, with what can go wrong said before anything large is read."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from typing import Any, Literal

from svdbank.core.errors import CheckpointError, MissingExtraError, OptionError
from svdbank.core.places import OnDisk, OnHub, locate, refusal, refuse_empty
from svdbank.lm.libraries import allow_bitsandbytes, first_line, import_transformers, quiet_transformers
from svdbank.lm.marks import marks_of
from svdbank.lm.memory import out_of_memory

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LoadIn = Literal["4bit", "8bit"]

_CAUSAL, _WITH_IMAGES = "AutoModelForCausalLM", "AutoModelForImageTextToText"

#: Tokens of a block where nothing is asked for and the model takes as many.
LENGTH = 1024


@dataclass(frozen=True)
class CausalModel:
    """A causal language model before its weights are loaded: its folder, or Hub id and revision; configuration; tokenizer.

    ``automatic`` is Transformers' class that loads it: the one for causal models, which of many multimodal ones takes the language model
    alone, else the one for models of images and text, which are given text.
    """

    name: str
    revision: str | None
    config: Any
    tokenizer: Any
    automatic: str = _CAUSAL

    @property
    def positions(self) -> int | None:
        """The longest sequence the model was made for; None where its configuration does not say."""
        text = self.config.get_text_config(decoder=True)
        return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)

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
        if getattr(config, "quantization_config", None) is not None:
            allow_bitsandbytes()
        automatic = _automatic(transformers, config, model)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
        except Exception as cause:
            raise CheckpointError(
                f"{model}: its tokenizer cannot be loaded: {first_line(cause)}",
                hint="the folder needs tokenizer.json or the files of its tokenizer class beside config.json",
            ) from cause
    return CausalModel(name, revision, config, tokenizer, automatic)


def _automatic(transformers: Any, config: Any, model: str) -> str:
    """The class that loads a model for text. OptionError where none does."""
    # Encoders are in Transformers' table of causal models too, for those that were made decoders.
    encoder = type(config) in transformers.AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    if type(config) in transformers.AutoModelForCausalLM._model_mapping and not encoder:
        return _CAUSAL
    with_images = transformers.AutoModelForImageTextToText._model_mapping
    if type(config) not in with_images or config.is_encoder_decoder:
        raise OptionError(
            f"{model}: a {config.model_type} model does not predict next tokens, which this needs",
            hint="name a causal model",
        )
    inputs = inspect.signature(with_images[type(config)].forward).parameters
    needed = [name for name, own in inputs.items() if own.default is own.empty and own.kind is own.POSITIONAL_OR_KEYWORD]
    others = [name for name in needed if name not in ("self", "input_ids")]
    if others or "labels" not in inputs:
        raise OptionError(
            f"{model}: a {config.model_type} model is given {' and '.join(others) or 'no labels'}, and here there is text alone",
            hint="name a causal model",
        )
    return _WITH_IMAGES


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
            loaded, info = getattr(transformers, model.automatic).from_pretrained(
                model.name, output_loading_info=True, **options
            )
        except (OSError, ValueError, ImportError) as cause:
            raise CheckpointError(
                f"{model.name}: the model cannot be loaded: {first_line(cause)}",
                hint="the weights have to lie beside config.json, whole; fetch the model again, or name another one",
            ) from cause
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise CheckpointError(
            f"{model.name}: {len(lacking)} parameters of {type(loaded).__name__} are not among its weights, first {lacking[0]}, and would "
            "be random numbers",
            hint="save the model whole, in the class that config.json names",
        )
    if model.automatic == _WITH_IMAGES:
        _try_text(loaded, model.name)
    rows, words = loaded.get_input_embeddings().weight.shape[0], len(model.tokenizer)
    if words > rows:
        raise CheckpointError(
            f"{model.name}: its tokenizer has {words:,} tokens, its embedding {rows:,} rows",
            hint=f"model.resize_token_embeddings({words}), model.save_pretrained(FOLDER), or take the tokenizer of this model",
        )
    return loaded


def _try_text(model: Any, name: str) -> None:
    """OptionError where a model of images and text does not take text alone."""
    import torch

    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)
    except Exception as cause:
        raise OptionError(
            f"{name}: {type(model).__name__} does not take text alone: {first_line(cause)}", hint="name a causal model"
        ) from cause


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
    allow_bitsandbytes()
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
