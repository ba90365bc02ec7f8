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
    maps = shared_space(views, 5, ridge=0.0)
    projected = [view @ weight for view, weight in zip(views, maps, strict=True)]
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(projected[0].T.numpy(), projected[1].T.numpy(), strict=True)]
    q = [np.linalg.qr(view.numpy())[0] for view in views]
    expected = np.linalg.svd(q[0].T @ q[1])[1]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("rows", "width"), [(50, 4), (6, 20)])
def test_shared_space_shapes(rows: int, width: int) -> None:
    views = [torch.randn(rows, d) for d in (5, 8, 9)]
    maps = shared_space([view - view.mean(0) for view in views], width)
    assert [m.shape for m in maps] == [(5, width), (8, width), (9, width)]
    assert all(torch.isfinite(m).all() for m in maps)
