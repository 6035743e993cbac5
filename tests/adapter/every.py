"""What each verb makes of an adapter, held against PEFT."""

from __future__ import annotations

import copy
import filecmp
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import svdbank
from svdbank.bank.reading import Bank
from tests.adapter.settings import Case, logits, save, small_llama, wrapped

#: The first tokens of the fixed text; 5, 6 among them calls the activated LoRA.
TOKENS = torch.tensor([[4, 17, 5, 6, 33, 60, 71, 92, 93, 8, 7, 3]])

MODELS: dict[str, Callable[[], Any]] = {
    "untied": small_llama,
    "tied": lambda: small_llama(tied=True),
    "biased": lambda: small_llama(attention_bias=True),
}


def small_gpt2() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1)
    return transformers.GPT2LMHeadModel(config).eval()


MODELS["gpt2"] = small_gpt2


def write_base(name: str, folder: Path) -> Path:
    """The model in a folder, with a tokenizer of as many words as it has rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    MODELS[name]().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))  # type: ignore[arg-type]
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2").save_pretrained(folder)
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in TOKENS[0].tolist()))
    return folder


@dataclass(frozen=True)
class Made:
    """A case with two adapters, saved as ``one`` and ``two``, on a base in a folder; PEFT's own models of both."""

    case: Case
    base: Path
    one: Path
    two: Path
    models: tuple[Any, Any]
    bank: Bank

    def fresh(self, dtype: torch.dtype = torch.float32) -> Any:
        """The base as Transformers loads it."""
        import transformers

        kind = transformers.AutoModelForSequenceClassification if self.case.seq_cls else transformers.AutoModelForCausalLM
        torch.manual_seed(0)
        return kind.from_pretrained(self.base, dtype=dtype).eval()

    def expected(self) -> Tensor:
        return logits(self.models[0], TOKENS)

    def _start(self, dtype: torch.dtype = torch.float32) -> Any:
        """The base as training found it, embedding and head apart: what an adapter adds to one of a tied pair the other lacks."""
        base = self.fresh(dtype)
        if self.case.change is not None:
            self.case.change(base)
        _untie(base)
        return base

    def dense(self) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """W₀ and each W of the merged models, float64."""
        start = {name: value.double() for name, value in self._start().state_dict().items()}
        whole = []
        for model in self.models:
            own = copy.deepcopy(model)
            _untie(own.get_base_model())
            merged = own.double().merge_and_unload()
            whole.append({name: value.double() for name, value in merged.state_dict().items()})
        assert all(set(start) == set(own) for own in whole), "the merged model has other tensors"
        return start, whole

    def with_weights(self, weights: Mapping[str, Tensor]) -> Tensor:
        base = self._start(torch.float64)
        base.load_state_dict(dict(weights))
        return logits(base, TOKENS)

    def by_peft(self, folder: Path, dtype: torch.dtype = torch.float64) -> Tensor:
        import peft

        base = self.fresh(dtype)
        if self.case.change is not None and base.get_input_embeddings().weight.shape[0] != _rows_of(self.models[0]):
            self.case.change(base)  # PEFT itself loads other shapes onto no other model
        return logits(peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).to(dtype).eval(), TOKENS)


def _untie(model: Any) -> None:
    """Give a tied head a weight of its own, also where PEFT wrapped it."""
    head = model.get_output_embeddings()
    if head is None:
        return
    inner = getattr(head, "base_layer", getattr(head, "original_module", head))
    if isinstance(getattr(inner, "weight", None), torch.nn.Parameter):
        inner.weight = torch.nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def _rows_of(model: Any) -> int:
    return int(model.get_base_model().get_input_embeddings().weight.shape[0])


def make(case: Case, base: Path, bank: Bank, folder: Path) -> Made:
    """Both adapters of a case, trained and saved by PEFT."""
    made = Made(case, base, folder / "one", folder / "two", (None, None), bank)
    names = [name for name in bank if "q_proj" in name]
    left = {bank[name].module: bank.left([name], 8)[name] for name in names}
    models = tuple(wrapped(case, made.fresh(), seed, left) for seed in (1, 2))
    for model, place in zip(models, (made.one, made.two), strict=True):
        save(case, model, place)
    return Made(case, base, made.one, made.two, models, bank)  # type: ignore[arg-type]


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest entry wanted."""
    if found.shape != wanted.shape:
        return math.inf
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def fuse(made: Made, out: Path) -> float:
    import transformers

    svdbank.fuse(made.base, made.one, out)
    return off(logits(transformers.AutoModelForCausalLM.from_pretrained(out).eval(), TOKENS), made.expected())


def merge(made: Made, out: Path) -> float:
    svdbank.merge([made.one, made.two], output=out, weights=[0.75, 0.25])
    _, (one, two) = made.dense()
    return off(made.by_peft(out), made.with_weights({name: 0.75 * one[name] + 0.25 * two[name] for name in one}))


def stack(made: Made, out: Path) -> float:
    svdbank.stack([made.one, made.two], output=out)
    start, (one, two) = made.dense()
    return off(made.by_peft(out), made.with_weights({name: one[name] + two[name] - start[name] for name in one}))


def compare(made: Made, out: Path) -> float:
    report = svdbank.compare([made.one, made.two])
    start, whole = made.dense()
    flat = [torch.cat([(own[name] - start[name]).flatten() for name in start]) for own in whole]
    wanted = [float(own.norm()) for own in flat] + [float(torch.nn.functional.cosine_similarity(*flat, dim=0))]
    found = [size.norm for size in report.adapters] + [report.pairs[0].all.cosine]
    return max(abs(a - b) / max(abs(b), 1) for a, b in zip(found, wanted, strict=True))


def export_lora(made: Made, out: Path) -> float:
    svdbank.export(made.one, to="lora", output=out)
    return off(made.by_peft(out, torch.float32), made.expected())


def export_inference(made: Made, out: Path) -> float:
    svdbank.export(made.one, inference=True, output=out)
    return off(made.by_peft(out, torch.float32), made.expected())


def export_slim(made: Made, out: Path) -> float:
    svdbank.export(made.one, to="slim", output=out, bank=made.bank)
    again = out.with_name("again")
    svdbank.export(out, to="peft", output=again, bank=made.bank)
    names = sorted(path.name for path in made.one.iterdir())
    same = filecmp.cmpfiles(made.one, again, names, shallow=False)[0]
    return 0.0 if sorted(same) == names == sorted(path.name for path in again.iterdir()) else math.inf


def evaluate(made: Made, out: Path) -> float:
    report = svdbank.eval(made.base, data={"text": made.base / "text.txt"}, adapters={"one": made.one}, dtype="float32")
    scores = {score.adapter: score for score in report.scores}
    tokens = TOKENS[:, : scores["one"].tokens + 1]
    wanted = torch.nn.functional.cross_entropy(logits(made.models[0], TOKENS)[0, : tokens.shape[1] - 1], tokens[0, 1:])
    return abs(scores["one"].loss - float(wanted))


def load(made: Made, out: Path) -> float:
    import svdbank.peft

    return off(logits(svdbank.peft.load_adapter(made.fresh(), made.one, is_trainable=False).eval(), TOKENS), made.expected())


VERBS: dict[str, Callable[[Made, Path], float]] = {
    "fuse": fuse,
    "merge": merge,
    "stack": stack,
    "compare": compare,
    "export --to lora": export_lora,
    "export --for inference": export_inference,
    "export --to slim": export_slim,
    "eval": evaluate,
    "load_adapter": load,
}
