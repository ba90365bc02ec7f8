from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn.functional import normalize

from diffgap.retrieval._linear_maps import cca_candidates, procrustes_candidates, ridge_candidates
from diffgap.retrieval.baselines import BASELINES, MLPBaseline, make_baselines, validation_mrr

Pairs = tuple[torch.Tensor, torch.Tensor]


def planted(count: int, x_dim: int, y_dim: int, noise: float, seed: int) -> Pairs:
    """Pairs that share 16 latent factors through fixed linear maps, each with its own noise and offset."""
    maps = torch.Generator().manual_seed(99)
    to_x, to_y = torch.randn(16, x_dim, generator=maps), torch.randn(16, y_dim, generator=maps)
    offset_x, offset_y = torch.randn(x_dim, generator=maps) * 3, torch.randn(y_dim, generator=maps) * 3
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 16, generator=generator)
    x = z @ to_x + offset_x + noise * torch.randn(count, x_dim, generator=generator)
    return x, z @ to_y + offset_y + noise * torch.randn(count, y_dim, generator=generator)


@pytest.mark.parametrize("name", ["ridge", "cca", "mlp"])
@pytest.mark.parametrize("dims", [(48, 40), (40, 48)])
def test_baseline_recovers_a_planted_linear_map(name: str, dims: tuple[int, int]) -> None:
    train, val, test = (planted(n, *dims, 1.0, seed) for n, seed in ((600, 0), (80, 1), (150, 2)))
    baseline = BASELINES[name](0).fit(*train, *val)
    x, y = baseline.encode_x(test[0]), baseline.encode_y(test[1])
    assert x.dtype == torch.float32 and x.shape == y.shape
    torch.testing.assert_close(x.norm(dim=1), torch.ones(150))
    assert validation_mrr(x, y) > 0.8
    assert validation_mrr(x, y.roll(1, 0)) < 0.2


@pytest.mark.parametrize("dims", [(24, 24), (24, 16), (16, 24)])
def test_procrustes_recovers_a_rotation(dims: tuple[int, int]) -> None:
    width = max(dims)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0]
    z = torch.randn(400, min(dims), generator=torch.Generator().manual_seed(1))
    wide, narrow = torch.cat([z, torch.zeros(400, width - min(dims))], 1) @ rotation, z
    x, y = (wide, narrow) if dims[0] == width else (narrow, wide)
    baseline = BASELINES["procrustes"](0).fit(x[:200], y[:200], x[200:300], y[200:300])
    similarity = baseline.encode_x(x[300:]) @ baseline.encode_y(y[300:]).T
    assert similarity.diagonal().mean() > 0.97 and validation_mrr(
        baseline.encode_x(x[300:]), baseline.encode_y(y[300:])
    ) == pytest.approx(1)


def test_mean_shift_closes_a_constant_gap_and_raw_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 32, generator=generator)
    y = x + 0.3 * torch.randn(900, 32, generator=generator)
    x[:, 0] += 40
    y[:, 1] += 40
    scores = {}
    for name in ("raw", "mean_shift"):
        baseline = BASELINES[name](0).fit(x[:500], y[:500], x[500:600], y[500:600])
        scores[name] = validation_mrr(baseline.encode_x(x[600:]), baseline.encode_y(y[600:]))
    assert scores["mean_shift"] > 0.95 > scores["raw"] + 0.1
    raw = BASELINES["raw"](0).fit(x, y, x, y)
    torch.testing.assert_close(raw.encode_x(x), normalize(x, dim=1))


def test_ridge_candidates_equal_sklearn() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 50)), rng.normal(size=(30, 7))
    unit = np.square(x).sum() / 50
    for candidate in ridge_candidates(x, y):
        model = Ridge(alpha=candidate.choice["alpha"] * unit, fit_intercept=False).fit(x, y)
        assert candidate.y is None
        np.testing.assert_allclose(candidate.x, model.coef_.T, atol=1e-10)


def test_cca_candidates_whiten_and_correlate() -> None:
    """Weak regularisation is classical CCA: unit covariances, diagonal cross-covariance, falling."""
    x, y = (t.double().numpy() for t in planted(4000, 20, 18, 2.0, 0))
    x, y = x - x.mean(0), y - y.mean(0)
    first = next(c for c in cca_candidates(x, y) if c.choice["power"] == 0)
    a, b = x @ first.x, y @ first.y
    np.testing.assert_allclose(a.T @ a, np.eye(18), atol=0.15)
    cross = a.T @ b
    np.testing.assert_allclose(cross, np.diag(np.diag(cross)), atol=0.02)
    assert (np.diff(np.diag(cross)) < 0.01).all() and cross[0, 0] > 0.8 > 0.2 > cross[17, 17]


def test_procrustes_candidates_are_orthogonal() -> None:
    rng = np.random.default_rng(0)
    (candidate,) = procrustes_candidates(rng.normal(size=(50, 6)), rng.normal(size=(50, 9)))
    np.testing.assert_allclose(candidate.x @ candidate.x.T, np.eye(6), atol=1e-12)


@pytest.mark.parametrize("name", ["ridge", "cca"])
def test_hyper_parameters_follow_validation_and_its_groups(name: str) -> None:
    """With little data and much noise strong regularisation wins; with plenty and little noise a weak one."""
    noisy = BASELINES[name](0).fit(*planted(60, 64, 64, 6.0, 0), *planted(200, 64, 64, 6.0, 1))
    clean = BASELINES[name](0).fit(*planted(900, 64, 64, 0.5, 0), *planted(200, 64, 64, 0.5, 1))
    assert noisy.choice["alpha"] > clean.choice["alpha"]
    val = planted(100, 64, 64, 3.0, 1)
    one_group = BASELINES[name](0).fit(*planted(200, 64, 64, 3.0, 0), *val, val_ids=torch.zeros(100).long())
    assert one_group.choice["alpha"] == 0.01  # all right at every strength: the first is kept


@pytest.mark.parametrize("name", list(BASELINES))
def test_fit_is_deterministic_and_leaves_the_global_seed(name: str) -> None:
    train, val = planted(200, 24, 24, 1.0, 0), planted(50, 24, 24, 1.0, 1)
    state = torch.get_rng_state()
    first, second = (BASELINES[name](3).fit(*train, *val).encode_x(val[0]) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)


def test_mlp_keeps_the_best_epoch() -> None:
    train, val = planted(60, 32, 32, 4.0, 0), planted(60, 32, 32, 4.0, 1)
    early = MLPBaseline(0, max_epochs=1).fit(*train, *val)
    late = MLPBaseline(0, max_epochs=30).fit(*train, *val)
    scores = [validation_mrr(m.encode_x(val[0]), m.encode_y(val[1])) for m in (early, late)]
    assert scores[1] >= scores[0] and late.choice["epochs"] <= 30


def test_make_baselines_by_width() -> None:
    assert list(make_baselines(8, 8)) == ["raw", "mean_shift", "ridge", "procrustes", "cca", "mlp"]
    assert list(make_baselines(8, 9)) == ["ridge", "procrustes", "cca", "mlp"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"y_train": torch.randn(9, 4)},
            "x_train and y_train must be pairs, at least one; got 10 and 9 rows",
        ),
        ({"x_val": torch.randn(5, 3)}, r"x_val must be \(n, D\) pooled vectors of one width; got \(5, 3\)"),
        ({"x_train": torch.randn(10, 2, 4)}, r"x_train must be \(n, D\) pooled vectors"),
        ({"x_train": torch.full((10, 4), torch.inf)}, "x_train holds NaN or infinite values"),
        ({"val_ids": torch.arange(4)}, r"val_ids has shape \(4,\); expected \(5,\)"),
        (
            {"x_val": torch.randn(0, 4), "y_val": torch.randn(0, 4)},
            "x_val and y_val must be pairs, at least one",
        ),
    ],
)
@pytest.mark.parametrize("name", ["ridge", "mlp"])
def test_fit_bad_input(name: str, change: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"x_train": torch.randn(10, 4), "y_train": torch.randn(10, 4)}
    arguments |= {"x_val": torch.randn(5, 4), "y_val": torch.randn(5, 4)}
    with pytest.raises(ValueError, match=message):
        BASELINES[name](0).fit(**{**arguments, **change})


def test_widths_and_order_of_calls() -> None:
    with pytest.raises(ValueError, match="raw cosine and mean shift need equal widths; got 4 and 5"):
        BASELINES["raw"](0).fit(torch.randn(9, 4), torch.randn(9, 5), torch.randn(9, 4), torch.randn(9, 5))
    for name in ("ridge", "mlp"):
        with pytest.raises(RuntimeError, match="call fit first"):
            BASELINES[name](0).encode_x(torch.randn(1, 4))
