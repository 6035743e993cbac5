"""What Transformers itself says of a model: its modules, from the class on the meta device, and what stored tensors each is made of.

No weight is read and no code of a repository runs: only classes of the installed Transformers are made, from a configuration without
the keys that name code, kernels or other models. Stored tensors become parameters as Transformers' own loader does it, with
:mod:`~svdbank.checkpoint.naming.symbolic` tensors in place of values.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from svdbank.checkpoint.configuration import ModelFacts
from svdbank.checkpoint.naming.symbolic import (
    Arrangement,
    NotTracedError,
    Traced,
    View,
    stored,
    swapped,
)
from svdbank.core.specs import TensorSource, WeightKind

#: Keys of a configuration that are not passed on: they name code, kernels, other repositories or how weights are stored.
_NOT_PASSED = re.compile(
    r"auto_map|_?attn_implementation.*|_?experts_implementation.*|quantization_config|_name_or_path|transformers_version|(torch_)?dtype"
    r"|use_pretrained_backbone|compile_config|device_map"
)

#: Classes with a head, by name.
_WITH_HEAD = re.compile(r"For[A-Z]|LMHead")

#: What routers are called.
_ROUTERS = ("gate", "router")

#: Largest number that a configuration may give for layers, experts and the like: each is a module to make.
_MOST_MODULES = 1 << 14
_COUNTS = re.compile(
    r"(?!.*(ctx|position|vocab|label|size|dim|token|length|window|emb))(.*(layer|expert|block|depth|stage|head).*|n_.*|num_.*)"
)


class UnknownModelError(Exception):
    """Transformers has no class for this configuration, or cannot make it; the message says which and why."""


@dataclass(frozen=True)
class TreeWeight:
    """A matrix of the loaded model, or a stack of them, one an expert. ``transposed``: the parameter is (…, in, out).

    ``kind`` is what PEFT's ``all-linear`` makes of it: a ``linear`` module or expert, a ``router``, the output ``head``, an
    ``embedding``; or a ``grouped`` one, see :func:`multiplies`.
    """

    module: str
    kind: WeightKind
    shape: tuple[int, ...]
    transposed: bool


@dataclass
class Made:
    """What stored tensors become: ``places`` by parameter, by tensor the parameter it goes into, and why others go into none."""

    places: dict[str, Arrangement] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


class ModuleTree:
    """The modules of one model class, made on the meta device.

    Attributes
    ----------
    version
        Transformers' version.
    name, prefix
        The class, and its ``base_model_prefix``.
    weights
        By the parameter's name: every 2-D and 3-D one that a bank can hold.
    tied
        By name: the other parameters that are the same tensor.
    """

    def __init__(self, config: Mapping[str, Any], about: ModelFacts) -> None:
        """Raises :class:`UnknownModelError`."""
        import transformers

        self.version: str = transformers.__version__
        self._model = _made(config, about)
        self.name = type(self._model).__name__
        self.prefix = str(self._model.base_model_prefix or "")
        self.weights: dict[str, TreeWeight] = {}
        self.tied: defaultdict[str, set[str]] = defaultdict(set)
        self._walk()

    def _walk(self) -> None:
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        head = self._model.get_output_embeddings()
        modules = dict(self._model.named_modules())
        named: dict[int, set[str]] = defaultdict(set)
        for path, module in modules.items():
            for own, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{own}" if path else own
                named[id(parameter)].add(name)
                parent, _, last = path.rpartition(".")
                shape = tuple(parameter.shape)
                if len(shape) == 2 and own == "weight" and isinstance(module, nn.Linear):
                    kind: WeightKind = "head" if module is head else "linear"
                    if kind == "linear" and not multiplies(module):
                        kind = "router" if last in _ROUTERS else "grouped"
                    self.weights[name] = TreeWeight(path, kind, shape, False)
                elif own == "weight" and isinstance(module, Conv1D):
                    self.weights[name] = TreeWeight(path, "linear", shape, True)
                elif own == "weight" and isinstance(module, nn.Embedding):
                    self.weights[name] = TreeWeight(path, "embedding", shape, True)
                elif len(shape) == 3 and last == "experts":
                    self.weights[name] = TreeWeight(name, "linear", shape, _is_in_out(module))
                elif own == "weight" and len(shape) == 2 and _is_router(parent, last, modules):
                    self.weights[name] = TreeWeight(path, "router", shape, False)

        pairs = ({name, of} for name, of in getattr(self._model, "all_tied_weights_keys", {}).items())
        for same in (*named.values(), *pairs):
            for name in same if len(same) > 1 else ():
                self.tied[name] |= same - {name}

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Every parameter and buffer that can be stored, with its shape."""
        return {name: tuple(value.shape) for name, value in self._model.state_dict().items()}

    def stored(self) -> dict[str, tuple[int, ...]]:
        """:meth:`parameters` without those that are another one too: of a tied pair, the embedding is left."""
        left: dict[str, tuple[int, ...]] = {}
        heads = [name for name, weight in self.weights.items() if weight.kind == "head"]
        shapes = self.parameters()
        for name in sorted(shapes, key=lambda name: name in heads):
            if not self.tied.get(name, set()) & left.keys():
                left[name] = shapes[name]
        return {name: shape for name, shape in shapes.items() if name in left}

    def as_loaded(self, tensors: Mapping[str, TensorSource]) -> Made:
        """As :meth:`made_from` of tensors that are the parameters themselves."""
        places: dict[str, Arrangement] = {name: stored(name, source.shape) for name, source in tensors.items()}
        return Made(places, {name: name for name in tensors})

    def renamed(self, names: Sequence[str]) -> dict[str, tuple[str, int | None, int, int]]:
        """Of names of parameters in older versions those that are in this model: (parameter, expert, part, parts) as Transformers loads
        them, the last three where experts stored one by one are stacked."""
        model = self._model
        there = model.state_dict()
        return renamed(model, names, there)

    def made_from(self, tensors: Mapping[str, TensorSource]) -> Made:
        """Where the entries of each parameter lie in ``tensors``."""
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        model = self._model
        there = model.state_dict()
        renamings, converters, by_pattern = _conversion(model)
        made = Made()
        grouped: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name in sorted(tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, there)
            if target not in there and name in there:
                target, pattern = rename_source_key(name, [], [], model.base_model_prefix, there)
            if target in there:
                grouped[target][pattern].append(name)
                made.names[name] = target
            else:
                made.reasons[name] = f"no parameter of {self.name}"
        for target, patterns in grouped.items():
            sources = [name for names in patterns.values() for name in names]
            try:
                self._convert(target, patterns, by_pattern, tensors, made)
            except NotTracedError as cause:
                made.reasons.update(
                    dict.fromkeys(sources, f"made into {target} by an operation that is not understood: {cause}")
                )
            except Exception as cause:
                made.reasons.update(
                    dict.fromkeys(sources, f"Transformers cannot make {target} of it: {type(cause).__name__}: {cause}")
                )
        return made

    def _convert(
        self,
        target: str,
        patterns: Mapping[str | None, list[str]],
        by_pattern: Mapping[str, Any],
        tensors: Mapping[str, TensorSource],
        made: Made,
    ) -> None:
        plain = patterns.get(None)
        if plain is not None:
            if len(plain) > 1 or len(patterns) > 1:
                raise NotTracedError(f"{len(plain)} tensors of one name")
            made.places[target] = stored(plain[0], tensors[plain[0]].shape)
            return
        first = next(iter(patterns))
        assert first is not None
        converter = by_pattern[first]
        collected: dict[str, Any] = {
            pattern: [Traced.of(stored(name, tensors[name].shape)) for name in names]
            for pattern, names in patterns.items()
            if pattern is not None
        }
        for operation in converter.operations:
            collected = operation.convert(
                collected,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=target,
                model=self._model,
                config=self._model.config,
                missing_keys=None,
            )
        # Operations answer by the ends of names; what stands around them is the same for all, and a wildcard counts from 0.
        full = target.replace("*.", "0.")
        around = next((full.partition(own) for own in collected if own in full), None)
        for own, value in collected.items():
            value = value[0] if isinstance(value, list) else value
            name = f"{around[0]}{own}{around[2]}" if around is not None else own
            made.places[name] = value.places


def renamed(model: Any, names: Iterable[str], there: Collection[str]) -> dict[str, tuple[str, int | None, int, int]]:
    """:meth:`ModuleTree.renamed` for any model of Transformers, of which ``there`` are the parameters."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, rename_source_key

    renamings, converters, by_pattern = _conversion(model)
    found: dict[str, tuple[str, int | None, int, int]] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, there)
        if target not in there:
            if name in there:
                found[name] = (name, None, 0, 1)
            continue
        if pattern is None:
            found[name] = (target, None, 0, 1)
            continue
        converter, number = by_pattern[pattern], re.search(r"\.experts\.(\d+)\.", name)
        if number is not None and all(isinstance(each, MergeModulelist | Concatenate) for each in converter.operations):
            parts = converter.source_patterns
            found[name] = (target, int(number[1]), parts.index(pattern), len(parts))
    return found


def _conversion(model: Any) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Transformers' renames and conversions of a model's stored tensors, and the conversion of each pattern."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    return renamings, converters, {pattern: converter for converter in converters for pattern in converter.source_patterns}


def multiplies(module: Any) -> bool:
    """False for a module of a class of linear ones in Transformers that makes something else of its input than one product.

    PEFT puts a layer around it all the same, which then fails: DeepSeek-V4's ``o_a_proj`` has a block for each group of inputs, the
    routers of Llama-4 and Phi-MoE return scores.
    """
    import torch
    from torch import nn

    kind = type(module)
    if kind.forward is nn.Linear.forward or not kind.__module__.startswith("transformers.models."):
        return True
    own = {name: torch.empty_like(value, device="meta") for name, value in module.named_parameters()}
    try:
        with torch.no_grad():
            made = torch.func.functional_call(module, own, (torch.empty(2, 3, module.in_features, device="meta"),))
    except Exception:  # whatever it is, it takes no rows
        return False
    return isinstance(made, torch.Tensor) and made.shape == (2, 3, module.out_features)


def _is_router(parent: str, own: str, modules: Mapping[str, Any]) -> bool:
    """True for a bare ``weight`` of a ``gate`` or ``router`` beside ``experts``: what was a linear module in older Transformers."""
    return own in _ROUTERS and f"{parent}.experts" in modules


def _is_in_out(experts: Any) -> bool:
    """True where the stacked parameters of ``experts`` are (experts, in, out): said by the module, else seen from their shapes."""
    said = getattr(experts, "is_transposed", None)
    if said is not None:
        return bool(said)
    shapes = {name: tuple(value.shape) for name, value in experts.named_parameters(recurse=False) if value.dim() == 3}
    up, down = shapes.get("gate_up_proj"), shapes.get("down_proj")
    if up is None or down is None:
        return False
    hidden, inner = up[1], down[1]
    return bool(up[2] == 2 * inner and down[2] == hidden)


def _made(config: Mapping[str, Any], about: ModelFacts) -> Any:
    """The model on the meta device."""
    import torch
    import transformers
    from transformers import CONFIG_MAPPING

    if about.model_type not in CONFIG_MAPPING:
        its_own = "; the model's own code (auto_map) is not run" if "auto_map" in config else ""
        what = f"knows no model type {about.model_type!r}" if about.model_type else "is told no model type by config.json"
        raise UnknownModelError(f"Transformers {transformers.__version__} {what}{its_own}")
    _refuse_absurd(config)
    kept = _passed(config)
    with _silent(), torch.device("meta"):
        try:
            expected = CONFIG_MAPPING[about.model_type]
            decode = getattr(expected, "_decode_special_floats", None)  # JSON has no infinity: it is written as an object
            settings = expected.from_dict(decode(kept) if decode is not None else kept)
            kind = _class_of(about, settings)
            settings._attn_implementation = "eager"
            model = kind(settings)
            model.tie_weights()
        except UnknownModelError:
            raise
        except Exception as cause:
            raise UnknownModelError(
                f"Transformers {transformers.__version__} cannot make {about.model_type!r} from config.json: "
                f"{type(cause).__name__}: {str(cause).splitlines()[0][:200] if str(cause) else ''}"
            ) from cause
    return model


def _class_of(about: ModelFacts, settings: Any) -> Any:
    import transformers

    for name in about.architectures:
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    automatic = (
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModelForSeq2SeqLM",
        "AutoModelForMaskedLM",
        "AutoModelForSpeechSeq2Seq",
        "AutoModel",
    )
    # A class of the repository's own code is Transformers' own of the type, with a head where its name says so.
    bare = bool(about.architectures) and not any(_WITH_HEAD.search(name) for name in about.architectures)
    for name in ("AutoModel",) if bare else automatic:
        mapping = getattr(transformers, name)._model_mapping
        if type(settings) in mapping:
            found = mapping[type(settings)]
            kind = found[0] if isinstance(found, tuple) else found
            # The language part of a multimodal model has a configuration of its own.
            if kind.config_class is None or isinstance(settings, kind.config_class):
                return kind
    raise UnknownModelError(
        f"Transformers {transformers.__version__} has no class {' or '.join(about.architectures) or 'for it'}"
    )


def _passed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _passed(item) for key, item in value.items() if not _NOT_PASSED.fullmatch(str(key))}
    if isinstance(value, list):
        return [_passed(item) for item in value]
    return value


def _refuse_absurd(value: Any, key: str = "") -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            _refuse_absurd(item, str(name))
    elif isinstance(value, list):
        for item in value:
            _refuse_absurd(item, key)
    elif isinstance(value, int) and not isinstance(value, bool) and value > _MOST_MODULES and _COUNTS.fullmatch(key):
        raise UnknownModelError(f"config.json says {key} = {value:,}: no model has so many")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Transformers' notes about a configuration are for who loads the model."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class Matrix:
    """One (out, in) matrix as its stored pieces: their rows under each other. ``transposed``: the piece is stored (in, out)."""

    sources: tuple[TensorSource, ...]
    transposed: bool


def matrix_of(places: Arrangement, tensors: Mapping[str, TensorSource], *, transposed: bool) -> Matrix:
    """The stored pieces of a matrix whose parameter has its entries at ``places``, (in, out) where ``transposed``.

    Raises :class:`NotTracedError` where they are no rows of stored tensors.
    """
    oriented = swapped(places, 0, 1) if transposed else places
    parts = _rows(oriented)
    read = [_piece(part, tensors[part.source]) for part in parts]
    if len(read) == 1:
        return Matrix((read[0][0],), read[0][1])
    if any(turned for _, turned in read):
        raise NotTracedError("columns of several tensors as rows")
    return Matrix(tuple(source for source, _ in read), False)


def is_whole(places: Arrangement, tensors: Mapping[str, TensorSource]) -> bool:
    """True where the entries are those of one stored tensor as it is."""
    return isinstance(places, View) and places == stored(places.source, tensors[places.source].shape)


def _rows(places: Arrangement) -> list[View]:
    if isinstance(places, View):
        return [places]
    if places.axis != 0:
        raise NotTracedError("columns of several tensors side by side")
    return [view for part in places.parts for view in _rows(part)]


def _piece(view: View, whole: TensorSource) -> tuple[TensorSource, bool]:
    """(piece, whether it is stored (in, out)) for one view of rows."""
    rows, columns = view.shape
    across = view.axes[1] or ((1, 1),)
    down = view.axes[0] or ((1, columns),)
    if across == ((columns, 1),):
        if down == ((rows, columns),) or rows == 1:
            return _run(whole, view.offset, (rows, columns)), False
        if all(stride % columns == 0 for _, stride in down):
            order = tuple((size, stride // columns) for size, stride in down)
            if _is_permutation(order, rows):
                piece = _run(whole, view.offset, (rows, columns))
                return piece.in_order(order), False
    if down == ((rows, 1),) and (across == ((columns, rows),) or columns == 1):
        return _run(whole, view.offset, (columns, rows)), True
    raise NotTracedError(f"entries of {whole.name} that are no run of rows")


def _is_permutation(order: tuple[tuple[int, int], ...], rows: int) -> bool:
    step = 1
    for size, stride in sorted(order, key=lambda factor: factor[1]):
        if stride != step:
            return False
        step *= size
    return step == rows


def _run(whole: TensorSource, offset: int, shape: tuple[int, int]) -> TensorSource:
    count = shape[0] * shape[1]
    if shape == whole.shape and offset == 0:
        return whole
    if whole.shape[1:] == shape and offset % count == 0:
        return whole.part(offset // count)
    try:
        return whole.run(offset, shape)
    except ValueError as cause:
        raise NotTracedError(str(cause)) from cause
