from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from diffgap.diffusion import EmbeddingScaler


def embeddings(count: int = 300, dim: int = 16) -> Tensor:
    """Unit vectors in a cone, as contrastive encoders give them: a mean, and very unequal variances."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, dim, generator=generator) * torch.logspace(0, -2, dim) + 0.5
    return torch.nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("scaling", ["sqrt_dim", "whiten", "none"])
@pytest.mark.parametrize("shape", [(300, 16), (30, 10, 16), (0, 16)])
def test_embedding_scaler_inverts(scaling: Any, shape: tuple[int, ...]) -> None:
    scaler = EmbeddingScaler(16, scaling).fit(embeddings())
    x = embeddings()[: shape[0] * (shape[1] if len(shape) == 3 else 1)].reshape(shape)
    z = scaler.scale(x)
    assert z.shape == x.shape
    torch.testing.assert_close(scaler.unscale(z), x, rtol=1e-4, atol=1e-5)


def test_embedding_scaler_radius() -> None:
    x = embeddings()
    for scaling in ("sqrt_dim", "none"):
        scaler = EmbeddingScaler(16, scaling)
        torch.testing.assert_close(scaler.scale(x).norm(dim=-1), torch.full((300,), scaler.radius))
    assert EmbeddingScaler(16, "whiten").radius is None


def test_embedding_scaler_whitens() -> None:
    x = embeddings()
    z = EmbeddingScaler(16, "whiten").fit(x, shrinkage=1e-6).scale(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.T.cov(correction=0), torch.eye(16), atol=2e-2, rtol=0)


def test_embedding_scaler_shrinks_like_sklearn() -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    x = embeddings(count=40).double()
    expected = torch.from_numpy(covariance.LedoitWolf().fit(x.numpy()).covariance_)
    scaler = EmbeddingScaler(16, "whiten").double().fit(x)
    torch.testing.assert_close(scaler.colouring @ scaler.colouring, expected, rtol=1e-9, atol=1e-12)


def test_embedding_scaler_is_finite_with_fewer_embeddings_than_dimensions() -> None:
    x = embeddings(count=5)
    z = EmbeddingScaler(16, "whiten").fit(x).scale(embeddings())
    assert torch.isfinite(z).all()


def test_embedding_scaler_is_saved_with_its_model() -> None:
    fitted = EmbeddingScaler(16, "whiten").fit(embeddings())
    loaded = EmbeddingScaler(16, "whiten")
    assert loaded.scale(embeddings()).isnan().all()  # an unfitted one cannot be used unnoticed
    loaded.load_state_dict(copy.deepcopy(fitted.state_dict()))
    torch.testing.assert_close(loaded.scale(embeddings()), fitted.scale(embeddings()))
    assert not EmbeddingScaler(16).state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embedding_scaler_keeps_low_dtypes(dtype: torch.dtype) -> None:
    scaler = EmbeddingScaler(16, "whiten").fit(embeddings())
    z = scaler.scale(embeddings().to(dtype))
    assert z.dtype == dtype
    assert scaler.unscale(z).dtype == dtype


def test_embedding_scaler_refuses() -> None:
    scaler = EmbeddingScaler(16, "whiten")
    bad = embeddings()
    bad[3, 2] = torch.nan
    with pytest.raises(ValueError, match="dim is 0"):
        EmbeddingScaler(0)
    with pytest.raises(ValueError, match="scaling is 'unit'; use one of sqrt_dim"):
        EmbeddingScaler(16, "unit")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="last dimension 16"):
        scaler.fit(torch.ones(5, 8))
    with pytest.raises(ValueError, match="last dimension 16"):
        scaler.scale(torch.ones(5, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match="all finite"):
        scaler.fit(bad)
    with pytest.raises(ValueError, match="1 rows and must have 2"):
        scaler.fit(embeddings()[:1])
    with pytest.raises(ValueError, match="all equal"):
        scaler.fit(torch.ones(5, 16))
    with pytest.raises(ValueError, match="shrinkage is 2"):
        scaler.fit(embeddings(), shrinkage=2)
