from __future__ import annotations

import json
from typing import Any, get_args

import pytest
import torch

from diffgap.diffusion import NoiseSchedule
from diffgap.diffusion.prediction import Prediction
from diffgap.diffusion.schedule import ScheduleKind
from diffgap.ops.q_sample import q_sample

KINDS = get_args(ScheduleKind)
PREDICTIONS = get_args(Prediction)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_schedule_levels(kind: Any) -> None:
    schedule = NoiseSchedule(kind)
    assert schedule.table.shape == (1000, 2)
    assert schedule.table.dtype == torch.float64
    assert (schedule.snr.diff() < 0).all()
    power = schedule.alphas + schedule.sigmas if kind == "flow" else schedule.alphas**2 + schedule.sigmas**2
    torch.testing.assert_close(power, torch.ones(1000, dtype=torch.float64))
    torch.testing.assert_close(schedule.alphas_cumprod, schedule.alphas**2)


def test_noise_schedule_flow_shift_and_times() -> None:
    schedule = NoiseSchedule("flow", num_train_timesteps=4, shift=3.0)
    expected = torch.tensor([0.5, 0.75, 0.9, 1.0], dtype=torch.float64)  # 3 s / (1 + 2 s), s = 1/4 ... 1
    torch.testing.assert_close(schedule.sigmas, expected)
    torch.testing.assert_close(schedule.times, 4 * expected)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_schedule_marginals_through_q_sample(kind: Any) -> None:
    schedule = NoiseSchedule(kind, prediction_type="v_prediction")
    t = torch.tensor([0, 400, 999])
    x0 = torch.full((3, 40_000), 2.0)
    x_t, target = q_sample(x0, t, schedule.table, torch.tensor([1, 2, 3]), "v_prediction")
    alpha, sigma = schedule.table[t].float().T
    error = 5 * sigma / 200  # five standard errors of a mean of 40000
    assert ((x_t.mean(1) - 2 * alpha).abs() <= error + 1e-6).all()
    assert ((x_t.std(1) - sigma).abs() <= error + 1e-6).all()
    # The network's perfect output gives back x0, whatever the noise was.
    x0_again = schedule.convert(target.double(), x_t.double(), t, "sample")
    torch.testing.assert_close(x0_again.float(), x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_noise_schedule_convert(kind: Any, source: Any, target: Any) -> None:
    schedule = NoiseSchedule(kind, prediction_type=source)
    generator = torch.Generator().manual_seed(0)
    x0, epsilon = (torch.randn(4, 2, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.tensor([0, 17, 500, 990])
    alpha, sigma = (column[:, None, None] for column in schedule.table[t].T)
    kinds = {
        "epsilon": epsilon,
        "sample": x0,
        "v_prediction": alpha * epsilon - sigma * x0,
        "flow_prediction": epsilon - x0,
    }
    converted = schedule.convert(kinds[source], alpha * x0 + sigma * epsilon, t, target)
    torch.testing.assert_close(converted, kinds[target], rtol=1e-9, atol=1e-9)


def test_noise_schedule_convert_keeps_low_dtypes() -> None:
    schedule = NoiseSchedule(prediction_type="epsilon")
    output = torch.ones(2, 3, dtype=torch.bfloat16)
    assert schedule.convert(output, output, torch.tensor([3, 9]), "sample").dtype == torch.bfloat16


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_schedule_min_snr_weights(gamma: float, zero_snr: bool) -> None:
    def of(prediction: Any) -> NoiseSchedule:
        return NoiseSchedule("scaled_linear", prediction_type=prediction, zero_terminal_snr=zero_snr)

    snr = of("sample").snr
    clipped = snr.clamp(max=gamma)
    torch.testing.assert_close(of("sample").min_snr_weights(gamma), clipped)
    torch.testing.assert_close(of("v_prediction").min_snr_weights(gamma), clipped / (snr + 1))
    weights = of("epsilon").min_snr_weights(gamma)
    torch.testing.assert_close(weights[:-1], (clipped / snr)[:-1])
    assert weights[-1] == 1


def test_noise_schedule_min_snr_weights_of_a_flow() -> None:
    """An error of the flow prediction is an error sigma times as large of x0."""
    schedule = NoiseSchedule("flow", prediction_type="flow_prediction")
    expected = schedule.snr.clamp(max=5) * schedule.sigmas**2
    torch.testing.assert_close(schedule.min_snr_weights(), expected)


def test_noise_schedule_goes_through_json() -> None:
    schedule = NoiseSchedule("flow", 100, prediction_type="flow_prediction", shift=2.5, embedding_scaling="whiten")
    assert NoiseSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert hash(schedule) == hash(NoiseSchedule.from_dict(schedule.to_dict()))


@pytest.mark.parametrize(
    ("spacing", "options", "expected"),
    [
        ("leading", {}, [666, 333, 0]),
        ("leading", {"steps_offset": 1}, [667, 334, 1]),
        ("leading", {"reserve_last": True}, [750, 500, 250]),
        ("trailing", {}, [999, 666, 332]),
        ("trailing", {"reserve_last": True}, [999, 666, 332]),
        ("linspace", {}, [999, 500, 0]),
        ("linspace", {"reserve_last": True}, [999, 666, 333]),
    ],
)
def test_noise_schedule_timesteps(spacing: Any, options: dict[str, Any], expected: list[int]) -> None:
    assert NoiseSchedule().timesteps(3, spacing, **options).tolist() == expected


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 61, 457, 1000])
def test_noise_schedule_timesteps_are_distinct_rows(spacing: Any, steps: int) -> None:
    rows = NoiseSchedule().timesteps(steps, spacing)
    assert len(rows) == steps
    assert (rows.diff() < 0).all()
    assert rows.min() >= 0
    assert rows.max() < 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cosine"}, "kind is 'cosine'; use one of linear"),
        ({"prediction_type": "x0"}, "prediction_type is 'x0'; use one of epsilon"),
        ({"embedding_scaling": "unit"}, "embedding_scaling is 'unit'"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1"),
        ({"beta_start": 0.1, "beta_end": 0.01}, "beta_start 0.1 and beta_end 0.01"),
        ({"kind": "flow", "shift": 0.0}, "shift is 0.0"),
        ({"shift": 2.0}, "only kind 'flow' has one"),
        ({"kind": "flow", "zero_terminal_snr": True}, "zero_terminal_snr"),
    ],
)
def test_noise_schedule_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**options)


def test_noise_schedule_refuses_bad_calls() -> None:
    schedule = NoiseSchedule()
    with pytest.raises(ValueError, match="no field betas; its fields are kind"):
        NoiseSchedule.from_dict({"betas": 1})
    with pytest.raises(ValueError, match="num_steps is 1001; use 1 to 1000"):
        schedule.timesteps(1001, "leading")
    with pytest.raises(ValueError, match="spacing is 'even'"):
        schedule.timesteps(5, "even")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only spacing 'leading' has one"):
        schedule.timesteps(5, "trailing", steps_offset=1)
    with pytest.raises(ValueError, match=r"outside 0\.\.999"):
        schedule.timesteps(5, "leading", steps_offset=300)
    with pytest.raises(ValueError, match="gamma is 0"):
        schedule.min_snr_weights(0)
    with pytest.raises(ValueError, match="target is 'x0'"):
        schedule.convert(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0]), "x0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"t \(2,\) must be"):
        schedule.convert(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0, 1]), "sample")
