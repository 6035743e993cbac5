"""One rank of the FSDP2 tests, run in a process of its own: ``python -m tests.peft.sharded RANK WORLD PORT FOLDER``.

FOLDER holds ``model`` and ``bank``. Everything asserted here is asserted on every rank.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh

from svdbank.core.errors import OptionError
from svdbank.peft import UnverifiedBaseWarning, attachment, get_peft_model
from tests.peft.models import factors, lora_layers, mica, quiet, without_svd

STEPS = 3


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def shard(model: Any, mesh: Any) -> None:
    """As trainers do: a group for every block, and the root for the rest."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for block in base.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(model: nn.Module, tokens: Tensor) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def whole(parameter: Any) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def collected(model: nn.Module) -> dict[str, Tensor]:
    """Every A and B, put together from all ranks."""
    return {
        f"{module}.{side}": whole(factor.detach()).clone()
        for module, layer in lora_layers(model).items()
        for side, factor in zip("AB", factors(layer), strict=True)
    }


def gathers_during(call: Any) -> tuple[Any, int]:
    """Result of ``call`` and how many collectives it ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        result = call()
    return result, sum(event.count for event in seen.key_averages() if event.key.startswith(("c10d::", "gloo:", "_c10d")))


def main(rank: int, world: int, folder: Path) -> None:
    import svdbank

    bank = svdbank.open(folder / "bank")
    mesh = init_device_mesh("cpu", (world,))
    tokens = torch.arange(1, 33).reshape(2, 16)
    mine = tokens[rank : rank + 1]

    # The same training in one piece: the mean of the ranks' gradients is the gradient of the mean of their losses.
    alone = get_peft_model(load(folder), mica(5, task_type="CAUSAL_LM"), bank=bank)
    train(alone, tokens)
    expected = collected(alone)

    for order in ("before", "after"):
        model = load(folder)
        config = mica(5, task_type="CAUSAL_LM")
        if order == "before":
            with without_svd():
                model = get_peft_model(model, config, bank=bank)
            shard(model, mesh)
        else:
            shard(model, mesh)
            with without_svd(), pytest.warns(UnverifiedBaseWarning):
                model, collectives = gathers_during(lambda m=model, c=config: get_peft_model(m, c, bank=bank))
            assert collectives == 0, collectives
            assert gathers_during(lambda m=model: m(input_ids=mine))[1] > 0  # a step does gather: the count is not blind
            assert attachment(model).state == "unverified"
        for module, layer in lora_layers(model).items():
            A, B = factors(layer)
            assert isinstance(A, DTensor) and isinstance(B, DTensor)
            assert A.requires_grad and not B.requires_grad
            rows = B.to_local().shape[0]
            own = bank[f"{module}.weight"].left(5)
            begin = rank * -(-own.shape[0] // world)
            assert rows < own.shape[0] and torch.equal(B.to_local(), own[begin : begin + rows])
        losses = train(model, mine)
        assert losses[-1] < losses[0]
        for name, value in collected(model).items():
            if name.endswith(".B"):
                assert torch.equal(value, bank[f"{name[:-2]}.weight"].left(5)), name
            # Two float32 gradients averaged instead of one over both rows: another order of the same sums.
            assert torch.allclose(value, expected[name], rtol=0, atol=1e-5 * float(value.abs().max())), (order, name)

    # MiLoRA takes its part out of each rank's own slice.
    sharded = load(folder)
    shard(sharded, mesh)
    with without_svd(), pytest.warns(UnverifiedBaseWarning):
        sharded = get_peft_model(sharded, mica(5, init_lora_weights="milora"), bank=bank)
    single = get_peft_model(load(folder), mica(5, init_lora_weights="milora"), bank=bank)
    for module, layer in lora_layers(sharded).items():
        rest = lora_layers(single)[module].get_base_layer().weight
        # The same arithmetic on fewer rows: BLAS may sum in another order.
        assert torch.allclose(whole(layer.get_base_layer().weight.detach()), rest, rtol=0, atol=1e-6)

    # What has run keeps its parameters; and an embedding's adapter has no forward of its own to gather it in.
    ran = load(folder)
    shard(ran, mesh)
    ran(input_ids=mine)
    with pytest.raises(OptionError, match="has run already"):
        get_peft_model(ran, mica(5), bank=bank)
    fresh = load(folder)
    shard(fresh, mesh)
    with pytest.raises(OptionError, match="sharded already"):
        get_peft_model(fresh, mica(5, target_modules=["embed_tokens"]), bank=bank)


if __name__ == "__main__":
    number, size, port, place = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ.update(RANK=number, WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo")
    main(int(number), int(size), Path(place))
    dist.barrier()
    dist.destroy_process_group()
    print("sound")
