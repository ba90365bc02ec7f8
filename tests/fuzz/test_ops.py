"""Every public op on any shape, dtype, layout, ids and options that it takes, forwards and backwards."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

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


@fuzzed(60, data=DATA, dtype=DTYPES, batch=st.integers(0, 4), queries=SIZES, keys=SIZES, heads=st.integers(0, 3))
def test_attention(data: Any, dtype: torch.dtype, batch: int, queries: int, keys: int, heads: int) -> None:
    width = data.draw(st.sampled_from((1, 3, 8, 16, 24, 32, 64, 65)))
    given = {"q": data.draw(tensors((batch, queries, heads, width), dtype, 1.0))}
    given |= {name: data.draw(tensors((batch, keys, heads, width), dtype, 1.0)) for name in ("k", "v")}
    for name in ("q_weight", "k_weight"):
        given[name] = data.draw(st.one_of(st.none(), tensors((width,), dtype, 1.0)))
    options: dict[str, Any] = {
        "causal": data.draw(st.booleans()),
        "scale": data.draw(st.sampled_from((None, 0.0, -1.0))),
    }
    if data.draw(st.booleans()):
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
        options["key_mask"] = torch.rand(batch, keys, generator=generator) < data.draw(st.sampled_from((0.0, 0.5, 1.0)))
        hidden = ~options["key_mask"][:, :, None, None]
        given |= {name: given[name].masked_fill(hidden, torch.nan) for name in ("k", "v")}
    # A single number is its own norm: the gradient of x / |x| is nothing but rounding.
    normed = given["q_weight"] is not None or given["k_weight"] is not None
    compare(ops.attention, given, options, backward=width > 1 or not normed)


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
