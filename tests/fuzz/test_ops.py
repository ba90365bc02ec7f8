"""Every public op on any shape, dtype, layout, ids and options that it takes, forwards and backwards."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from diffgap import ops
from diffgap.losses import ClipLoss, SigLipLoss
from diffgap.ops.q_sample import TARGETS
from diffgap.ops.solver_step import COLUMNS
from tests.fuzz.budget import fuzzed
from tests.fuzz.tensors import (
    DTYPES,
    MAGNITUDES,
    SIZES,
    WIDTHS,
    compare,
    contrastive,
    id_tensors,
    softmax_terms,
    tensors,
)

DATA = st.data()
SEEDS = st.sampled_from((0, 1, -1, 2**63 - 1, -(2**63), 6364136223846793005))


@fuzzed(60, data=DATA, dtype=DTYPES, shape=st.tuples(st.integers(0, 5), st.integers(0, 9), WIDTHS))
def test_adaln(data: Any, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    modulation = data.draw(st.sampled_from((shape, (shape[0], shape[2]))))
    given = {name: data.draw(tensors(modulation, dtype, 1.0)) for name in ("shift", "scale")}
    given["x"] = data.draw(tensors(shape, dtype, 1.0))
    if data.draw(st.booleans()):
        given |= {"branch": data.draw(tensors(shape, dtype)), "gate": data.draw(tensors(modulation, dtype))}
    else:
        given |= {"branch": None, "gate": None}
    compare(ops.adaln, given)


LOSS = {
    "data": DATA,
    "dtype": DTYPES,
    "rows": SIZES,
    "more": st.integers(0, 20),
    "width": st.sampled_from((2, 3, 8, 17, 32, 64)),
    "logit_scale": st.sampled_from((0.0, 1.0, 14.3, 100.0)),
    "reduction": st.sampled_from(("mean", "sum", "none")),
    "memory_budget": st.sampled_from((None, 1, 10_000, 2**30)),
}


@fuzzed(80, **LOSS, one_sided=st.booleans())
def test_clip_loss(
    data: Any, dtype: torch.dtype, rows: int, more: int, width: int, logit_scale: float, one_sided: bool, **options: Any
) -> None:
    given = data.draw(contrastive(dtype, rows, rows + more, width))
    options["one_sided"] = one_sided or (more > 0 and ("ids_a" not in given or options["reduction"] == "none"))
    if options["one_sided"] and "ids_a" not in given:
        options["label_offset"] = data.draw(st.integers(0, more))
    ids = (given["ids_a"], given["ids_b"]) if "ids_a" in given else None
    terms = softmax_terms(logit_scale, rows, rows + more, ids, ("a", "b"))
    if options["reduction"] != "mean":
        terms = {name: rows * size for name, size in terms.items()}
    compare(ops.clip_loss, {**given, "logit_scale": torch.tensor(logit_scale)}, options, terms=terms)


@fuzzed(80, **LOSS, logit_bias=st.sampled_from((0.0, -10.0, 50.0)))
def test_siglip_loss(
    data: Any,
    dtype: torch.dtype,
    rows: int,
    more: int,
    width: int,
    logit_scale: float,
    logit_bias: float,
    **options: Any,
) -> None:
    given = data.draw(contrastive(dtype, rows, rows + more, width))
    if "ids_a" not in given:
        options["label_offset"] = data.draw(st.one_of(st.none(), st.integers(0, more)))
    scalars = {"logit_scale": torch.tensor(logit_scale), "logit_bias": torch.tensor(logit_bias)}
    size = 2.0 * (rows if options["reduction"] != "mean" else 1)  # of a row, as no similarity is above 1
    compare(ops.siglip_loss, {**given, **scalars}, options, terms=dict.fromkeys((*scalars, "output"), size))


@fuzzed(30, data=DATA, dtypes=st.tuples(DTYPES, DTYPES), rows=SIZES, width=WIDTHS, chunk_size=st.integers(0, 40))
def test_losses_of_open_clips_form(
    data: Any, dtypes: tuple[torch.dtype, torch.dtype], rows: int, width: int, chunk_size: int
) -> None:
    pair = data.draw(contrastive(torch.float32, rows, rows, max(width, 2)))
    given = {
        "image_features": pair["a"].to(dtypes[0]),
        "text_features": pair["b"].to(dtypes[1]),
        "logit_scale": torch.tensor(100.0),
    }
    compare(ClipLoss(), given, terms=softmax_terms(100.0, rows, rows, None, ("image_features", "text_features")))
    scalars = dict.fromkeys(("logit_scale", "logit_bias", "output"), 2.0)
    compare(SigLipLoss(chunk_size=chunk_size), {**given, "logit_bias": torch.tensor(-10.0)}, terms=scalars)


@fuzzed(30, data=DATA, rows=SIZES, inner=WIDTHS, outer=WIDTHS, large=st.booleans(), bias=st.booleans())
def test_linear(data: Any, rows: int, inner: int, outer: int, large: bool, bias: bool) -> None:
    if large:  # enough for oneDNN's product
        rows, inner, outer = rows + 128, inner + 128, outer + 128
    given = {"x": data.draw(tensors((rows, inner), torch.float32, 1.0))}
    given["weight"] = data.draw(tensors((2 * outer, inner), torch.float32, inner**-0.5))
    given["bias"] = data.draw(tensors((2 * outer,), torch.float32, 1.0)) if bias else None
    compare(ops.linear, given)
    if bias:
        compare(ops.swiglu, given)
        compare(ops.swiglu, given, backward=False)


@fuzzed(30, data=DATA, dtype=st.sampled_from((torch.float16, torch.bfloat16)), rows=SIZES, inner=WIDTHS, outer=WIDTHS)
def test_linear_in_half_precision_is_torch(data: Any, dtype: torch.dtype, rows: int, inner: int, outer: int) -> None:
    x, weight = (data.draw(tensors((n, inner), dtype, 1.0)) for n in (rows, 2 * outer))
    leaves = [y.detach().requires_grad_() for y in (x, weight, data.draw(tensors((2 * outer,), dtype, 1.0)))]
    for mine, theirs in (
        (ops.linear(*leaves), F.linear(*leaves)),
        (ops.swiglu(*leaves), ops.silu_mul(F.linear(*leaves))),
    ):
        assert torch.equal(mine, theirs)
        for one, other in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (mine, theirs)), strict=True):
            assert torch.equal(one, other)


@fuzzed(60, data=DATA, dtype=DTYPES, shape=st.lists(SIZES, max_size=2), hidden=SIZES, magnitude=MAGNITUDES)
def test_silu_mul(data: Any, dtype: torch.dtype, shape: list[int], hidden: int, magnitude: float) -> None:
    compare(ops.silu_mul, {"pair": data.draw(tensors((*shape, 2 * hidden), dtype, magnitude))})


@fuzzed(60, data=DATA, batch=SIZES, shape=st.lists(SIZES, max_size=2), stream=st.integers(0, 2))
def test_normal(data: Any, batch: int, shape: list[int], stream: int) -> None:
    seed = torch.tensor([data.draw(SEEDS) for _ in range(batch)], dtype=torch.int64)
    step = data.draw(st.one_of(st.integers(0, 2**31), st.just(torch.arange(batch) * 977)))
    arguments = {"seed": seed, "shape": shape, "step": step, "stream": stream}
    mine = ops.normal(**arguments)  # type: ignore[arg-type]
    with ops.backend("eager"):
        expected = ops.normal(**arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(mine, expected, rtol=3e-7, atol=1e-7)


@fuzzed(30, seed=st.integers(-(2**63), 2**64 - 1), count=SIZES, more=SIZES)
def test_sample_seeds(seed: int, count: int, more: int) -> None:
    """Each is its own, and the same however many there are; the generator moves on by one draw."""
    generators = [torch.Generator().manual_seed(seed) for _ in range(3)]
    few, many = ops.sample_seeds(count, generators[0]), ops.sample_seeds(count + more, generators[1])
    assert few.dtype == torch.int64
    assert torch.equal(few, many[:count])
    assert len(many.unique()) == count + more
    torch.empty((), dtype=torch.int64).random_(generator=generators[2])
    assert all(torch.equal(generator.get_state(), generators[2].get_state()) for generator in generators)


@fuzzed(60, data=DATA, dtype=DTYPES, batch=SIZES, shape=st.lists(SIZES, max_size=2), target=st.sampled_from(TARGETS))
def test_q_sample(data: Any, dtype: torch.dtype, batch: int, shape: list[int], target: str) -> None:
    x0 = data.draw(tensors((batch, *shape), dtype))
    if x0.numel() and data.draw(st.booleans()):
        x0 = x0.clone(memory_format=torch.contiguous_format)
        x0.view(-1)[0] = data.draw(st.sampled_from((torch.inf, -torch.inf, torch.nan)))
    table = data.draw(tensors((9, 2), torch.float64, 1.0))
    t = torch.tensor([data.draw(st.integers(0, 8)) for _ in range(batch)], dtype=torch.int64)
    seed = torch.tensor([data.draw(SEEDS) for _ in range(batch)], dtype=torch.int64)
    options = {"t": t, "table": table, "seed": seed, "target": target, "return_noise": data.draw(st.booleans())}
    compare(ops.q_sample, {"x0": x0}, options, backward=bool(x0.isfinite().all()))


@fuzzed(80, data=DATA, dtype=DTYPES, batch=st.integers(0, 9), shape=st.lists(WIDTHS, min_size=1, max_size=2))
def test_solver_step(data: Any, dtype: torch.dtype, batch: int, shape: list[int]) -> None:
    size = (batch, *shape)
    given: dict[str, Any] = {name: data.draw(tensors(size, dtype, 1.0)) for name in ("sample", "output")}
    options: dict[str, Any] = {"history": [data.draw(tensors(size, dtype, 1.0)) for _ in range(3)]}
    for name in ("unconditional", "last_sample"):
        if data.draw(st.booleans()):
            given[name] = data.draw(tensors(size, dtype, 1.0))
    table = data.draw(tensors((5, len(COLUMNS)), torch.float64, 1.0)).clone()
    if "last_sample" not in given:
        table[:, [name.startswith("corr") for name in COLUMNS]] = 0.0
    options["table"] = table
    each = torch.tensor([data.draw(st.integers(0, 4)) for _ in range(batch)], dtype=torch.int64)
    options["step"] = data.draw(st.one_of(st.integers(0, 4), st.just(each)))
    options["seed"] = torch.tensor([data.draw(SEEDS) for _ in range(batch)], dtype=torch.int64)
    options["guidance_scale"] = data.draw(st.sampled_from((0.0, 1.0, 7.5)))
    options["guidance_form"] = data.draw(st.sampled_from(("standard", "offset")))
    bound = data.draw(st.sampled_from((None, "x0_clamp", "x0_norm")))
    if bound:
        options[bound] = data.draw(st.sampled_from((0.1, 1.0, 8.0)))
    if torch.Size(shape).numel() > 1:
        options["guidance_rescale"] = data.draw(st.sampled_from((0.0, 0.7, 1.0)))

    def step(**arguments: Any) -> Any:
        history = [x.to(arguments["sample"].dtype) for x in arguments.pop("history")]
        return tuple(ops.solver_step(**arguments, history=history))

    with torch.no_grad():
        compare(step, given, options, backward=False)
        returned = ops.solver_step(**given, **options)
        size = torch.Size(size)
        out = tuple(torch.full(size, torch.nan, dtype=dtype) if data.draw(st.booleans()) else None for _ in range(2))
        kept = (torch.full(size, torch.nan, dtype=dtype), out[0], out[1] if "last_sample" in given else None)
        assert ops.solver_step(**given, **options, out=kept) is kept
    for mine, expected in zip(kept, returned, strict=True):
        assert mine is None or torch.equal(mine, expected)


@fuzzed(60, data=DATA, dtype=DTYPES, rows=SIZES, gallery=WIDTHS, width=SIZES, alike=st.booleans(), broken=st.booleans())
def test_similarity(
    data: Any, dtype: torch.dtype, rows: int, gallery: int, width: int, alike: bool, broken: bool
) -> None:
    # Whole numbers, so that every route has the same scores: what ties in one ties in all.
    q, g = (data.draw(tensors((count, width), torch.float64, 3.0)).round().to(dtype) for count in (rows, gallery))
    if alike:
        g = g[:1].expand(g.shape)
    if broken and width:
        g = g.clone()
        g[data.draw(st.integers(0, gallery - 1)), 0] = data.draw(st.sampled_from((torch.nan, torch.inf)))
    ids_g = data.draw(id_tensors(gallery))
    options: list[tuple[Any, dict[str, Any]]] = [(ops.similarity_topk, {"k": data.draw(st.integers(1, gallery))})]
    positives = torch.tensor([data.draw(st.integers(0, gallery - 1)) for _ in range(rows)], dtype=torch.int64)
    for ties in ("strict", "average"):
        options += [
            (ops.similarity_ranks, {"positives": p, "ties": ties}) for p in (positives, (ids_g[positives], ids_g))
        ]
    for op, chosen in options:
        results = []
        for route in ("auto", "eager"):
            with ops.backend(route):  # type: ignore[arg-type]
                found = op(q, g, **chosen)
            results.append(found if isinstance(found, tuple) else (found,))
        for mine, expected in zip(*results, strict=True):
            assert torch.equal(mine, expected)
