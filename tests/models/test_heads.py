from __future__ import annotations

import numpy as np
import pytest
import torch

from diffgap.models.heads import ProjectionHead, shared_space


def test_projection_head_standardises() -> None:
    head = ProjectionHead(6, 4)
    x = 5 + 3 * torch.randn(200, 6)
    head.fit(x)
    standard = (x - head.mean) / head.std
    torch.testing.assert_close(standard.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(head(x).norm(dim=1), torch.ones(200))


def test_shared_space_of_two_views_is_cca() -> None:
    """Without a ridge the maps' columns correlate as the canonical correlations, an independent computation."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    views = [
        latent @ torch.randn(3, d, generator=generator, dtype=torch.float64)
        + 0.5 * torch.randn(400, d, generator=generator, dtype=torch.float64)
        for d in (5, 7)
    ]
    views = [view - view.mean(0) for view in views]
    maps = shared_space(views, 5, [0.0, 0.0])
    projected = [view @ weight for view, weight in zip(views, maps, strict=True)]
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(projected[0].T.numpy(), projected[1].T.numpy(), strict=True)]
    q = [np.linalg.qr(view.numpy())[0] for view in views]
    expected = np.linalg.svd(q[0].T @ q[1])[1]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("rows", "width"), [(50, 4), (6, 20)])
def test_shared_space_shapes(rows: int, width: int) -> None:
    views = [torch.randn(rows, d) for d in (5, 8, 9)]
    maps = shared_space([view - view.mean(0) for view in views], width, [0.5] * 3)
    assert [m.shape for m in maps] == [(5, width), (8, width), (9, width)]
    assert all(torch.isfinite(m).all() for m in maps)


def test_dropout_grows_where_embeddings_are_few() -> None:
    """One input left for every three distinct embeddings, never less than the least."""
    x = torch.randn(12, 16).repeat(20, 1)
    head = ProjectionHead(16, 4, dropout=0.25, embeddings_per_input=3.0)
    head.fit(x)
    assert head.dropout.p == pytest.approx(1 - 12 / (3 * 16))
    assert head.ridge == pytest.approx(0.5 * 0.75 / 0.25)
    head.fit(torch.randn(480, 16))
    assert head.dropout.p == 0.25
    fixed = ProjectionHead(16, 4, dropout=0.25)
    fixed.fit(x)
    assert fixed.dropout.p == 0.25


def test_ridge_is_the_penalty_of_dropout() -> None:
    """The least-squares solution under dropout, averaged over its masks, is that of a ridge p / (1 - p)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0)
    y = x @ torch.randn(5, 2, generator=generator, dtype=torch.float64)
    head = ProjectionHead(5, 4, dropout=0.6)
    dropped = torch.cat([torch.nn.functional.dropout(x, 0.6) for _ in range(200)])
    solved = torch.linalg.lstsq(dropped, y.repeat(200, 1)).solution
    gram = x.T @ x
    ridge = 2 * head.ridge * gram.diagonal().mean()
    expected = torch.linalg.solve(gram + ridge * torch.eye(5, dtype=gram.dtype), x.T @ y)
    torch.testing.assert_close(solved, expected, atol=0.02, rtol=0)
