"""What a result must be for its time to count."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import check


def test_mismatch_accepts_the_oracle_and_refuses_what_differs() -> None:
    exact = torch.randn(100, generator=torch.Generator().manual_seed(0)).double()
    single, half = exact.float(), exact.bfloat16()
    assert check.mismatch((single,), (exact,), (single,)) is None
    assert check.mismatch((half,), (exact,), (half,)) is None
    assert "output 0" in check.mismatch((single * 1.0001,), (exact,), (single,))
    assert "output 0" in check.mismatch((half * 1.05,), (exact,), (half,))
    assert "output 0" in check.mismatch((single[:50],), (exact,), (single,))
    assert "output 0" in check.mismatch((single.clone().fill_(float("nan")),), (exact,), (single,))
    assert "2 outputs" in check.mismatch((single, single), (exact,), (single,))
    assert "0 outputs" in check.mismatch((), (exact,), (single,))


def test_mismatch_gives_peers_ten_times_the_room() -> None:
    exact = torch.ones(100).double()
    near = exact.float() * (1 + 5e-5)
    assert check.mismatch((near,), (exact,), None) is None
    assert check.mismatch((near,), (exact,), (exact.float(),)) is not None


def test_mismatch_lets_a_peer_return_float32_of_a_low_precision_computation() -> None:
    exact = torch.ones(100).double()
    near = exact.float() * (1 + 5e-3)
    assert check.mismatch((near,), (exact,), None, torch.bfloat16) is None
    assert check.mismatch((near,), (exact,), None, torch.float32) is not None
    assert check.mismatch((near,), (exact,), (exact.float(),), torch.bfloat16) is not None
    assert check.mismatch((exact.float() * 1.05,), (exact,), None, torch.bfloat16) is not None


def retrieval_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, gallery, positives and exact scores; gallery rows 2i and 2i + 1 differ by less than float32 can tell."""
    generator = torch.Generator().manual_seed(0)
    q, g = (torch.nn.functional.normalize(torch.randn(n, 32, generator=generator), dim=1) for n in (20, 100))
    g = g.repeat_interleave(2, dim=0)
    g[1::2] *= 1 + 2**-20
    return q, g, torch.randperm(200, generator=generator)[:20], q.double() @ g.double().T


def test_ranks_gate_accepts_what_rounding_allows_and_nothing_else() -> None:
    q, g, positives, scores = retrieval_inputs()
    target = scores.gather(1, positives[:, None])
    ranks = (scores > target).sum(dim=1) + 1
    gate = check.ranks_gate(q, g, positives)
    assert gate((ranks,)) is None
    # The positive's twin may stand on either side of it.
    twin = scores.gather(1, (positives ^ 1)[:, None])
    swapped = torch.where((twin > target)[:, 0], ranks - 1, ranks + 1)
    assert gate((swapped,)) is None
    for wrong in (torch.where((twin > target)[:, 0], ranks + 1, ranks - 1), swapped - 2, swapped + 2):
        assert "rank of query" in (gate((wrong,)) or "")
    assert "shape" in (gate((ranks[:5],)) or "")


def test_topk_gate_accepts_ties_in_either_order_and_nothing_else() -> None:
    q, g, _, scores = retrieval_inputs()
    values, indices = scores.topk(6, dim=1)
    gate = check.topk_gate(q, g, 6)
    assert gate((values.float(), indices)) is None
    assert gate((values.float(), indices ^ 1)) is None
    changed = indices.clone()
    changed[3, 2] = changed[3, 3]
    assert gate((values.float(), changed)) == "repeated index of query 3 is wrong, as of 1 in 20 queries"
    seventh = scores.topk(8, dim=1)
    changed = torch.cat([indices[:, :4], seventh.indices[:, 6:]], dim=1)
    skipped = torch.cat([values[:, :4], seventh.values[:, 6:]], dim=1).float()
    assert "index of query 0" in (gate((skipped, changed)) or "")
    assert "value of query 0" in (gate((values.float() + 1e-3, indices)) or "")
    assert "value of query 0" in (gate((values.float() * float("nan"), indices)) or "")
    assert "outside" in (gate((values.float(), indices + 200)) or "")
    assert "shapes" in (gate((values[:, :5].float(), indices[:, :5])) or "")
