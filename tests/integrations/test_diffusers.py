"""Drop-in schedulers against diffusers' own: every step, compiled, and without waiting for a GPU."""

from __future__ import annotations

import copy
import inspect
import pickle
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.helpers import FLOAT32_RTOL, assert_close_to_oracle, relative_l2

diffusers = pytest.importorskip("diffusers", reason="diffusers is the peer: pip install diffusers")
from diffgap.integrations import diffusers as ours  # noqa: E402
from diffgap.integrations.diffusers import ancestral  # noqa: E402
from tests.integrations.scheduler_cases import (  # noqa: E402
    DDIM,
    DDPM,
    DPM,
    FLOW,
    FLOWING,
    ONE_OF_EACH,
    SDE,
    SHAPE,
    STEPS,
    UNIPC,
    Calls,
    case,
    cases,
    exact,
    outputs,
    pair,
    plain_noise,
    trajectory,
    worst,
)


def tabled(scheduler: Any) -> bool:
    return scheduler._table is not None


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("name", "config", "options"), cases())
def test_step_equals_diffusers(name: str, config: dict[str, Any], options: dict[str, Any], steps: int) -> None:
    mine, theirs = pair(name, config, steps)
    assert tabled(mine)
    with plain_noise():
        actual, single = trajectory(mine, **options), trajectory(theirs, **options)
        oracle = exact(name, config, steps, **options)
    assert worst(actual, oracle) <= FLOAT32_RTOL
    # Order 3 divides by differences of close float32 numbers in diffusers, up to 2e-4 wrong; all else is 1e-5.
    slack = worst(single, oracle) if config.get("solver_order") == 3 else 0.0
    assert worst(actual, single) <= FLOAT32_RTOL + slack


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_step_in_low_precision(name: str, dtype: torch.dtype) -> None:
    scheduler, config, options = case(name)
    mine, theirs = pair(scheduler, config, 5)
    with plain_noise():
        actual, eager = trajectory(mine, dtype, **options), trajectory(theirs, dtype, **options)
        oracle = exact(scheduler, config, 5, **options)
    assert actual.dtype == dtype
    for step in zip(actual, oracle, eager, strict=True):
        assert_close_to_oracle(*step)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_step_gives_the_dtype_of_diffusers(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    scheduler, config, options = case(name)
    mine, theirs = pair(scheduler, config, 5)
    sample, output = (x.to(dtype) for x, dtype in zip(outputs(1), dtypes, strict=True))
    results = []
    for each in (mine, theirs):
        torch.manual_seed(0)
        results.append(each.step(output, each.timesteps[0], sample, **options).prev_sample)
    assert results[0].dtype == results[1].dtype
    assert relative_l2(*results) <= 2**-7  # two roundings to bfloat16


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_seeds_agree_and_x0_is_that_of_diffusers(name: str) -> None:
    """The same generator and the same global seed give the same noise, and x0 and tuples come back alike."""
    scheduler, config, options = case(name)
    mine, theirs = pair(scheduler, config, 5)
    assert worst(trajectory(mine, **options), trajectory(theirs, **options)) <= 2 * FLOAT32_RTOL
    results = []
    for each in pair(scheduler, config, 5):
        torch.manual_seed(1)
        results.append(each.step(outputs(1)[1], each.timesteps[0], outputs(1)[0], return_dict=False, **options))
    assert len(results[0]) == len(results[1])
    assert all(relative_l2(a, b) <= FLOAT32_RTOL for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["ddim", "ddim_eta", "ddpm", "sde_2", "flow_stochastic"])
def test_generator_is_left_where_diffusers_leaves_it(name: str) -> None:
    scheduler, config, options = case(name)
    states = []
    for each in pair(scheduler, config, 5):
        generator = torch.Generator().manual_seed(2)
        for t in each.timesteps:
            each.step(outputs(1)[1], t, outputs(1)[0], generator=generator, **options)
        states.append(generator.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", ["ddim_eta", "sde_2"])
def test_given_noise_is_used(name: str) -> None:
    scheduler, config, options = case(name)
    x, output, noise = outputs(2)
    results = [
        s.step(output, s.timesteps[0], x, variance_noise=noise, **options).prev_sample
        for s in pair(scheduler, config, 5)
    ]
    assert relative_l2(*results) <= FLOAT32_RTOL


@pytest.mark.parametrize("name", [n for n in ONE_OF_EACH if not n.startswith("dd")])
@pytest.mark.parametrize("told", [True, False])
def test_sampling_starts_where_told(name: str, told: bool) -> None:
    """As image-to-image does: from the fourth timestep on, by ``set_begin_index`` or by the timestep itself."""
    scheduler, config, options = case(name)
    schedulers = pair(scheduler, config, 10)
    if told:
        for each in schedulers:
            each.set_begin_index(3)
    paths = [trajectory(each, times=each.timesteps[3:], **options) for each in schedulers]
    assert worst(*paths) <= FLOAT32_RTOL
    assert schedulers[0].step_index == schedulers[1].step_index == 10


@pytest.mark.parametrize("name", ["dpm_2", "unipc_2", "flow"])
def test_begin_index_is_without_effect_once_sampling_runs(name: str) -> None:
    scheduler, config, _ = case(name)
    paths = []
    for each in pair(scheduler, config, 6):
        first = trajectory(each, times=each.timesteps[:2])
        each.set_begin_index(4)
        paths.append(torch.cat((first, trajectory(each, times=each.timesteps[2:]))))
    assert worst(*paths) <= FLOAT32_RTOL


@pytest.mark.parametrize("name", [DPM, UNIPC])
def test_of_repeated_timesteps_the_second_is_meant(name: str) -> None:
    schedulers = pair(name, {"use_exponential_sigmas": True}, 200)
    times = schedulers[0].timesteps.tolist()
    twice = next(t for t, following in pairwise(times) if t == following)
    paths = [trajectory(each, times=[twice]) for each in schedulers]
    assert schedulers[0].step_index == schedulers[1].step_index == times.index(twice) + 2
    assert worst(*paths) <= FLOAT32_RTOL


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_set_timesteps_starts_again(name: str) -> None:
    scheduler, config, options = case(name)
    mine, _ = pair(scheduler, config, 6)
    if hasattr(mine, "set_begin_index"):
        mine.set_begin_index(2)
    trajectory(mine, times=mine.timesteps[2:], **options)
    mine.set_timesteps(4)
    assert torch.equal(trajectory(mine, **options), trajectory(pair(scheduler, config, 4)[0], **options))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_copies_go_on_where_the_original_stood(name: str, duplicate: Any) -> None:
    scheduler, config, options = case(name)
    mine, _ = pair(scheduler, config, 6)
    trajectory(mine, times=mine.timesteps[:3], **options)
    other = duplicate(mine)
    assert type(other) is type(mine) and tabled(other)
    rest = [trajectory(each, times=each.timesteps[3:], **options) for each in (mine, other)]
    assert torch.equal(*rest)


@pytest.mark.parametrize("name", [DDIM, DDPM, DPM, UNIPC, FLOW])
def test_class_is_that_of_diffusers_to_a_caller(name: str, tmp_path: Path) -> None:
    mine, peer = getattr(ours, name), getattr(diffusers, name)
    assert issubclass(mine, peer) and mine.__name__ == peer.__name__
    for method in ("step", "set_timesteps"):
        signatures = [inspect.signature(getattr(each, method)).parameters for each in (mine, peer)]
        assert list(signatures[0]) == list(signatures[1])
        assert [p.default for p in signatures[0].values()] == [p.default for p in signatures[1].values()]
    scheduler = mine.from_config(peer(num_train_timesteps=777).config)
    assert scheduler.config.num_train_timesteps == 777
    scheduler.save_pretrained(tmp_path)
    assert peer.from_pretrained(tmp_path).config == mine.from_pretrained(tmp_path).config
    assert {c.__name__ for c in scheduler.compatibles} == {c.__name__ for c in peer().compatibles}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_native_call_a_step(name: str) -> None:
    scheduler, config, options = case(name)
    mine, _ = pair(scheduler, config, 5)
    trajectory(mine, times=mine.timesteps[:1], **options)  # builds the table of this eta
    with Calls() as calls:
        trajectory(mine, times=mine.timesteps[1:], **options)
    assert calls.names.count("diffgap::solver_step") == 4
    arithmetic = {"aten::add", "aten::mul", "aten::sub", "aten::div", "aten::pow", "aten::neg", "aten::sqrt"}
    assert not arithmetic & {name.split(".")[0] for name in calls.names}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_step_never_asks_the_device(name: str) -> None:
    """Meta tensors have no values: whatever a GPU would have to be waited for raises on them."""
    scheduler, config, options = case(name)
    mine, _ = pair(scheduler, config, 5)
    mine.timesteps = mine.timesteps.to("meta")
    x = torch.empty(SHAPE, device="meta")
    for t in mine.timesteps:
        x = mine.step(torch.empty_like(x), t, x, **options).prev_sample
    assert x.device.type == "meta" and x.shape == SHAPE
    assert getattr(mine, "step_index", 5) == 5


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_timestep_known_to_the_device_only_is_the_row(name: str) -> None:
    mine, theirs = pair(*case(name)[:2], 5)
    with mock.patch.object(ancestral._ByTime, "_host_value", return_value=None):
        x = trajectory(mine)
    assert worst(x, trajectory(theirs)) <= FLOAT32_RTOL


ONE_OF_EACH_CLASS = ("ddim_eta", "ddpm", "sde_2", "unipc_3", "flow_stochastic")
COMPILED = [*product(ONE_OF_EACH, ["aot_eager"], [True, False]), *product(ONE_OF_EACH_CLASS, ["inductor"], [True])]


@pytest.mark.parametrize(("name", "backend", "return_dict"), COMPILED)
@torch._inductor.config.patch(fallback_random=True)  # draws eager's noise instead of inductor's own
def test_step_compiles_whole(name: str, backend: str, return_dict: bool) -> None:
    scheduler, config, options = case(name)
    torch._dynamo.reset()
    mine, eager = (pair(scheduler, config, 8)[0] for _ in range(2))
    for each in (mine, eager):
        if hasattr(each, "set_begin_index"):
            each.set_begin_index(0)
    compiled = torch.compile(mine.step, fullgraph=True, backend=backend)
    x, *predicted = outputs(8)
    y = x
    for i, (t, output) in enumerate(zip(mine.timesteps, predicted, strict=True)):
        torch.manual_seed(i)
        x = compiled(output, t, x, return_dict=return_dict, **options)[0 if not return_dict else "prev_sample"]
        torch.manual_seed(i)
        y = eager.step(output, t, y, return_dict=False, **options)[0]
        assert relative_l2(x, y) <= FLOAT32_RTOL


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_step_compiles_whole_with_numbers_for_timesteps(name: str) -> None:
    torch._dynamo.reset()
    mine, theirs = pair(*case(name)[:2], 12)
    compiled = torch.compile(mine.step, fullgraph=True, backend="aot_eager")
    x, *predicted = outputs(12)
    y = x
    for i, (t, output) in enumerate(zip(mine.timesteps.tolist(), predicted, strict=True)):
        torch.manual_seed(i)
        x = compiled(output, t, x).prev_sample
        torch.manual_seed(i)
        y = theirs.step(output, t, y).prev_sample
        assert relative_l2(x, y) <= FLOAT32_RTOL


FALLBACKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddim_threshold": (DDIM, {"thresholding": True}, {}),
    "ddim_extra_row": (DDIM, {"timestep_spacing": "trailing"}, {}),
    "ddpm_threshold": (DDPM, {"thresholding": True}, {}),
    "ddpm_learned": (DDPM, {"variance_type": "learned_range"}, {}),
    "dpm_noise": (DPM, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
    "sde_3": (DPM, {"solver_order": 3} | SDE, {}),
    "dpm_threshold": (DPM, {"thresholding": True}, {}),
    "dpm_flow_prediction": (DPM, {"prediction_type": "flow_prediction"}, {}),
    "dpm_flow_v": (DPM, FLOWING | {"prediction_type": "v_prediction"}, {}),
    "unipc_noise": (UNIPC, {"predict_x0": False, "final_sigmas_type": "sigma_min"}, {}),
    "unipc_to_zero": (UNIPC, {"lower_order_final": False}, {}),
    "unipc_threshold": (UNIPC, {"thresholding": True}, {}),
    "flow_tokens": (FLOW, {}, {"per_token_timesteps": torch.full((2, 4), 500.0)}),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_no_table_expresses_is_left_to_diffusers(name: str) -> None:
    scheduler, config, options = FALLBACKS[name]
    steps = 61 if name == "ddim_extra_row" else 5
    mine, theirs = pair(scheduler, config, steps)
    channels = 2 if config.get("variance_type") == "learned_range" else 1
    x = torch.randn(2, 4, 3 if name == "flow_tokens" else 8, generator=torch.Generator().manual_seed(0))
    output = torch.cat([x.cos()] * channels, dim=1)
    if "generator" in inspect.signature(mine.step).parameters:
        draws = [{"generator": torch.Generator().manual_seed(0)} for _ in range(2)]
    else:
        draws = [{}, {}]
    peer = getattr(diffusers, scheduler)
    with mock.patch.object(peer, "step", autospec=True, side_effect=peer.step) as original:
        result = mine.step(output, mine.timesteps[0], x, **options, **draws[0])
    assert original.call_count == 1
    expected = theirs.step(output, theirs.timesteps[0], x, **options, **draws[1])
    assert torch.equal(result.prev_sample, expected.prev_sample)


def test_sigmas_put_in_by_hand_are_respected() -> None:
    schedulers = pair(FLOW, {}, 5)
    for each in schedulers:
        each.sigmas = each.sigmas**2
    assert torch.equal(*(trajectory(each) for each in schedulers))


@pytest.mark.parametrize("name", ["dpm_2", "unipc_2", "flow"])
def test_steps_out_of_order_are_refused(name: str) -> None:
    scheduler, _ = pair(*case(name)[:2], 3)
    x = outputs(1)[0]
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="step 1 is that of timestep"):
        scheduler.step(x, scheduler.timesteps[2], x)
    for t in scheduler.timesteps[1:]:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="all 3 steps are taken"):
        scheduler.step(x, scheduler.timesteps[2], x)


def test_wrong_arguments_are_refused() -> None:
    x = outputs(1)[0]
    ddpm, ddim, flow_match = (pair(name, {}, 3)[0] for name in (DDPM, DDIM, FLOW))
    with pytest.raises(ValueError, match="not one of the scheduler's timesteps"):
        ddpm.step(x, 5, x)
    with pytest.raises(ValueError, match="generator and variance_noise"):
        ddim.step(x, ddim.timesteps[0], x, eta=1.0, generator=torch.Generator(), variance_noise=x)
    with pytest.raises(ValueError, match="integer indices"):
        flow_match.step(x, 0, x)
    with pytest.raises(ValueError, match="set_timesteps"):
        ours.DDIMScheduler().step(x, 5, x)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_step_passes_gradients(name: str) -> None:
    scheduler, config, options = case(name)
    gradients = []
    for each in pair(scheduler, config, 5):
        x, output = (value.clone().requires_grad_() for value in outputs(1))
        torch.manual_seed(0)
        following = each.step(output, each.timesteps[0], x, **options).prev_sample
        gradients.append(torch.stack(torch.autograd.grad(following.square().sum(), (x, output))))
    assert relative_l2(*gradients) <= FLOAT32_RTOL


def test_bh1_ends_finite() -> None:
    mine, theirs = pair(UNIPC, {"solver_type": "bh1"}, 5)
    assert torch.isfinite(trajectory(mine)).all()
    assert not torch.isfinite(trajectory(theirs)).all()
