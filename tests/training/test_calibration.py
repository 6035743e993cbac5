"""The rate that a run finds follows the model, changes nothing else, and is found again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import svdbank
from svdbank.bank.reading import Bank
from svdbank.core.specs import Progress
from svdbank.training.best import FORWARDS, SHARE
from svdbank.training.calibration import A_STEP, HEAD, LARGEST, STEPS, TOKENS, blocks_of, choose
from svdbank.training.limits import MOST, NO_NUMBER, RISE, TRIES, WITHIN, find_limit, middle
from svdbank.training.options import read_config
from tests.lm.models import rewritten

RECIPE: dict[str, Any] = {
    "rank": 4,
    "length": 32,
    "batch_size": 2,
    "steps": 4,
    "log_steps": 1,
    "held_out_blocks": 4,
    "dtype": "float32",
}


def train(model: Path, output: Path, data: Path, **options: Any) -> Any:
    return svdbank.train(model, output=output, data=str(data), **{**RECIPE, **options})


@pytest.mark.parametrize("scale", [10.0**k for k in range(-7, 1)])
@pytest.mark.parametrize(("slope", "power"), [(1.0, 2), (0.1, 2), (0.0, 2), (1.0, 4), (0.0, 4), (-0.2, 2)])
def test_the_limit_is_found_whatever_its_scale_and_the_way_there(scale: float, slope: float, power: int) -> None:
    """The loss falls with some slope first, or rises at once, and reaches the limit at ``scale`` in the end."""

    def change(rate: float) -> float:
        return -slope * rate / scale + (RISE + slope) * (rate / scale) ** power

    limit, curve = find_limit(change)
    assert limit is not None and scale / WITHIN < limit < scale * WITHIN
    assert len(curve) <= TRIES and list(curve) == sorted(curve)


def test_a_loss_that_is_flat_below_and_no_number_above_still_has_a_limit() -> None:
    limit, _ = find_limit(lambda rate: NO_NUMBER if rate > 1e-4 else -1e-3)
    assert limit is not None and 1e-4 / WITHIN < limit < 1e-4 * WITHIN


def test_a_loss_that_falls_by_nats_has_its_limit_on_the_way_up_from_there() -> None:
    """Where the text costs a model far more than it could, what destroys it may still lie below the start."""

    def change(rate: float) -> float:
        return 5 * min(math.log10(rate / 1e-2) ** 2 - 1, -0.1)  # from −0.5 at 2e-3 to −5 at 1e-2, and never above −0.5 again

    limit, _ = find_limit(change)
    assert limit is not None and 1e-2 < limit < 5e-2


def test_a_search_goes_on_from_where_another_ended() -> None:
    """One block says about where, all of them where: few passes over all."""
    tried: list[float] = []

    def change(rate: float) -> float:
        tried.append(rate)
        return RISE * (rate / 1e-4) ** 2

    near, _ = find_limit(lambda rate: RISE * (rate / 1.5e-4) ** 2, within=4.0)
    assert near is not None
    limit, _ = find_limit(change, begin=near, step=2.0)
    assert limit == pytest.approx(1e-4, rel=WITHIN - 1) and len(tried) <= 3


@pytest.mark.parametrize("change", [0.0, NO_NUMBER])
def test_where_no_rate_does_harm_or_every_one_does_the_rate_is_small_and_says_so(change: float) -> None:
    limit, curve = find_limit(lambda rate: change)
    assert limit is None and max(rate for rate, _ in curve) <= MOST
    rate, why = choose("mica", limit, curve)
    assert rate < min(rate for rate, _ in curve) and "--learning-rate" in why


def test_a_block_that_is_another_s_twin_does_not_count() -> None:
    """Near copies of the blocks that gave the direction change ten times as much as any other."""
    assert middle([2.1, 2.2, 2.0, 9.0], [2.0] * 4) == pytest.approx(0.15)
    assert middle([2.1, math.nan, 2.3], [2.0] * 3) == pytest.approx(0.3)
    assert middle([math.inf, math.nan, 2.3], [2.0] * 3) == NO_NUMBER


def test_lora_s_rate_does_not_write_over_its_random_a() -> None:
    curve = ((1e-1, RISE),)
    assert choose("lora", 1e-1, curve, 1.0) == choose("lora", 1e-1, curve)
    rate, why = choose("lora", 1e-1, curve, 0.02)
    assert rate == pytest.approx(LARGEST * 0.02) and "A" in why and "write over" in why


@pytest.mark.parametrize("a_step", [1, 4, 64])
@pytest.mark.parametrize("length", [32, 128, 1024])
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_a_calibration_costs_the_same_whatever_the_run_and_each_process_its_share(
    a_step: int, length: int, processes: int
) -> None:
    aside, own = blocks_of(a_step, length, processes)
    head = min(length, HEAD)
    assert aside * head >= TOKENS > (aside - processes) * head and aside % processes == 0
    assert 1 <= own <= a_step and (own - 1) * head * processes < A_STEP
    assert own == a_step or own * head * processes >= A_STEP


def test_a_tenth_of_five_default_steps_pays_for_it() -> None:
    """As forward passes count it: some five over what is set aside, and two steps, of which each is two."""
    aside, own = blocks_of(4, 1024)
    assert 5 * aside * HEAD + STEPS * own * HEAD * FORWARDS <= SHARE * 5 * 4 * 1024 * FORWARDS


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("case", ["mica", "lora, accumulated", "milora, streamed", "on top", "4bit"])
def test_a_rate_found_and_the_same_rate_given_train_the_same_weights(
    case: str, small: Path, small_bank: Bank, legal: Path, tmp_path: Path, device: str
) -> None:
    """So finding it left the factors, the generators and the order of the blocks as they were."""
    stages: list[str] = []
    options: dict[str, Any] = {
        "mica": {},
        "lora, accumulated": {"method": "lora", "accumulation": 2},
        "milora, streamed": {"method": "milora", "streaming": True},
        "on top": {"on_top_of": str(tmp_path / "beneath")},
        "4bit": {"load_in": "4bit"},
    }[case]
    if case == "on top":
        train(small, tmp_path / "beneath", legal, learning_rate=1e-2, steps=1, keep="last")

    def listen(progress: Progress) -> None:
        stages.append(progress.stage)

    options |= {"dropout": 0.1, "keep": "last", "steps": 2, "held_out_blocks": 1}
    found = train(small, tmp_path / "found", legal, **options, progress=listen)
    given = train(small, tmp_path / "given", legal, **options, learning_rate=found.learning_rate)
    assert "finding a rate" in stages
    assert found.calibration is not None and found.calibration.rate == found.learning_rate
    assert given.calibration is None and given.calibration_share == 0 < found.calibration_share
    if device == "cpu":  # sums of a GPU may come in any order
        one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("found", "given"))
        assert one.read_bytes() == other.read_bytes()
    # Both are recorded: the options with the rate, so that the same run is made again without looking for it, and how it was found.
    assert read_config(tmp_path / "found" / "training.toml")["learning_rate"] == found.learning_rate
    recorded = json.loads((tmp_path / "found" / "training.json").read_bytes())
    assert recorded["calibration"]["why"] == found.calibration.why and len(recorded["calibration"]["curve"]) >= 1


@pytest.mark.usefixtures("device")
def test_a_step_of_accumulated_batches_has_the_rate_of_the_same_step_at_once(
    small: Path, small_bank: Bank, legal: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"steps": 1, "held_out": 0, "dropout": 0.0}
    at_once = train(small, tmp_path / "one", legal, batch_size=4, accumulation=1, **options)
    in_parts = train(small, tmp_path / "two", legal, batch_size=2, accumulation=2, **options)
    # The same blocks, added up in another order.
    assert in_parts.learning_rate == pytest.approx(at_once.learning_rate, rel=2e-2)


@pytest.mark.usefixtures("device")
def test_the_rate_follows_the_inputs_of_the_weights(small: Path, small_bank: Bank, legal: Path, tmp_path: Path) -> None:
    """The same function, norm gains times a factor and the next weights divided: MiCA's A works on inputs that much larger."""
    rates = {}
    for factor in (0.1, 1.0, 10.0):
        model = rewritten(small, tmp_path / f"x{factor:g}", factor)
        bank = svdbank.build(model, tmp_path / f"bank-{factor:g}", rank=8, device="cpu")
        after_norms = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        report = train(model, tmp_path / f"a{factor:g}", legal, bank=str(bank.path), targets=after_norms, steps=1, held_out=0)
        rates[factor] = report.learning_rate * factor
    # The search ends at another place for each, within a factor of the limit.
    assert max(rates.values()) < WITHIN**2 * min(rates.values())
