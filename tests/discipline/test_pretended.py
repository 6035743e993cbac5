"""The device itself: what it computes, and a saboteur for each of its rules."""

from __future__ import annotations

import importlib
import threading
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.discipline.allowed import ALLOWED
from tests.discipline.pretended import BroughtToHost, NoFloat64, OnDevice, PretendedDevice, TwoDevicesMet


def inside_svdbank(function: Callable[..., object]) -> Callable[..., object]:
    """The function as if it stood in a module ``svdbank.sabotage``."""
    return types.FunctionType(
        function.__code__, {**function.__globals__, "__name__": "svdbank.sabotage"}, closure=function.__closure__
    )


def test_results_are_the_cpus_and_say_cuda(pretended: PretendedDevice) -> None:
    values = torch.randn(20, 30, dtype=torch.float64)
    there = pretended.put(values)
    assert there.device == torch.device("cuda:0") and there.is_cuda and not there.is_meta
    product = there @ there.mT + torch.eye(20, dtype=torch.float64, device="cuda")
    assert isinstance(product, OnDevice)
    assert torch.equal(product.cpu(), values @ values.mT + torch.eye(20, dtype=torch.float64))
    assert torch.linalg.eigvalsh(product).cpu().shape == (20,)


def test_views_and_slices_write_through(pretended: PretendedDevice) -> None:
    there = torch.zeros(4, 6, device="cuda")
    there[1:3, ::2] = 5
    there[3] = pretended.put(torch.arange(6.0))
    there.diagonal().add_(1)
    there[:, 1:].mT.mul_(2)
    torch.mm(there[:2, :2], there[:2, 2:4], out=there[2:4, 4:])
    here = torch.zeros(4, 6)
    here[1:3, ::2] = 5
    here[3] = torch.arange(6.0)
    here.diagonal().add_(1)
    here[:, 1:].mT.mul_(2)
    torch.mm(here[:2, :2], here[:2, 2:4], out=here[2:4, 4:])
    assert torch.equal(there.cpu(), here)


def test_numbers_beside_tensors_keep_their_values(pretended: PretendedDevice) -> None:
    there = pretended.put(torch.tensor([-2.0, 3.0]))
    assert torch.where(there > 0, there, 7.0).tolist() == [7.0, 3.0]
    assert there.new_tensor([4.0]).tolist() == [4.0]
    there[0] = 9
    assert (there * 2 + 1).tolist() == [19.0, 7.0]
    there[[0, 1]] = there[[1, 0]]
    assert there.tolist() == [3.0, 9.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_there_leads_there(pretended: PretendedDevice, dtype: torch.dtype) -> None:
    here = torch.randn(3, 4)
    made = [
        here.to("cuda", dtype),
        here.to(device="cuda:0", dtype=dtype),
        here.cuda().to(dtype),
        here.to(pretended.put(here).to(dtype)),
        torch.empty_like(here, dtype=dtype, device="cuda").copy_(here),
        torch.tensor(here.tolist(), device="cuda").to(dtype),
        pretended.put(here).new_empty(3, 4, dtype=dtype).copy_(here),
    ]
    for there in made:
        assert there.device.type == "cuda" and there.dtype == dtype
        assert torch.equal(there.cpu(), here.to(dtype))


def test_a_model_trains_there_as_on_the_cpu(pretended: PretendedDevice) -> None:
    model, inputs = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(5, 8)
    twin = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    twin.load_state_dict(model.state_dict())
    pretended.put_model(twin)
    for net, batch in ((model, inputs), (twin, inputs.cuda())):
        optimizer = torch.optim.AdamW(net.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            net(batch).square().mean().backward()
            optimizer.step()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert isinstance(two.data, OnDevice)
        # The CPU steps all parameters in one call, the device one after another: sums may be ordered otherwise.
        assert torch.allclose(one, two.cpu(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "meeting",
    [
        lambda there, here: there + here,
        lambda there, here: here @ there,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: there.addmm_(here, there),
        lambda there, here: torch.where(there > 0, there, here),
        lambda there, here: torch.linalg.solve_triangular(there, here, upper=False),
    ],
)
def test_two_devices_do_not_meet(pretended: PretendedDevice, meeting: Callable[..., object]) -> None:
    here = torch.randn(3, 3)
    with pytest.raises(TwoDevicesMet):
        meeting(here.cuda(), here)


def test_a_number_of_the_cpu_may_meet_the_device(pretended: PretendedDevice) -> None:
    assert (torch.ones(2, device="cuda") * torch.tensor(3.0)).tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "look",
    [
        lambda there: there.cpu(),
        lambda there: there.to("cpu"),
        lambda there: there.tolist(),
        lambda there: there.sum().item(),
        lambda there: float(there.sum()),
        lambda there: bool((there > 0).all()),
        lambda there: torch.empty(3, 3).copy_(there),
        lambda there: there[there > 0],
        lambda there: torch.equal(there, there),
        lambda there: torch.linalg.eigh(there),
        lambda there: torch.linalg.cholesky(there),
        lambda there: torch.cuda.synchronize(),
    ],
)
def test_results_come_to_the_host_only_where_they_may(pretended: PretendedDevice, look: Callable[..., object]) -> None:
    there = torch.eye(3, device="cuda")
    look(there)  # a test may
    with pytest.raises(BroughtToHost, match=r"svdbank\.sabotage"):
        inside_svdbank(look)(there)


def test_an_array_is_refused_in_torchs_own_words(pretended: PretendedDevice) -> None:
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(2, device="cuda").numpy()


def test_float64_is_refused_where_there_is_none() -> None:
    with PretendedDevice({}, float64=False).present():
        single = torch.ones(3, device="cuda")
        with pytest.raises(NoFloat64):
            single.double()
        with pytest.raises(NoFloat64):
            torch.zeros(3, dtype=torch.float64, device="cuda")


def test_threads_keep_the_rules(pretended: PretendedDevice) -> None:
    made: list[object] = []

    def work() -> None:
        made.append(torch.zeros(3, device="cuda"))
        try:
            torch.ones(3, device="cuda") + torch.ones(3)
        except TwoDevicesMet as error:
            made.append(error)

    with pretended.counting() as counts:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert [type(one) for one in made] == [OnDevice, TwoDevicesMet]
    assert counts.launches == 2


def test_counts_are_those_of_the_work(pretended: PretendedDevice) -> None:
    left, right = torch.randn(4, 5).cuda(), torch.randn(5, 6).cuda()

    def work() -> float:
        product = (left @ right)[1:, :].mT  # one product; views cost nothing
        return float((product + 1).sum())  # two kernels and one wait

    pretended.strict = False
    with pretended.counting() as counts:
        inside_svdbank(work)()
    assert (counts.launches, counts.products, counts.flops) == (3, 1, 2 * 4 * 5 * 6)
    assert counts.syncs == {"svdbank.sabotage:test_counts_are_those_of_the_work": 1}
    with pretended.counting() as counts:
        torch.ones(10).cuda().cpu()
    assert (counts.to_device, counts.to_host) == (40, 40)


def test_every_place_that_may_exists_and_says_why() -> None:
    for place, reason in ALLOWED.items():
        module, _, function = place.partition(":")
        found = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
        assert callable(found) and len(reason) > 10, place
