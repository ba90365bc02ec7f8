"""Diagnostics during training."""

from __future__ import annotations

from dataclasses import dataclass

from diffgap.data.store import EmbeddingStore
from diffgap.diagnose.checks import check_bridge
from diffgap.diagnose.finding import VERDICTS
from diffgap.models.bridge import DiffGAP

_LOGGED = {
    "spread": ("mean_cosine", "effective_rank"),
    "trajectory": ("final_cosine", "lead_over_strangers"),
    "condition": ("gain_over_shuffled", "gain_over_none"),
    "collapse": ("spread_of_real", "spread_of_truth"),
}


@dataclass(frozen=True)
class DiagnosticsCallback:
    """The cheap checks of a bridge after each validation, for ``Trainer(callbacks=...)``.

    Everything but the data and the gap, on fewer pairs and samples: ``diffgap diagnose`` has the rest. Logs
    "diagnose/<check>/<subject>/<value>", and how many verdicts were "warn" and "bad".
    """

    max_pairs: int = 64
    num_samples: int = 4
    seed: int = 0

    def __call__(self, model: DiffGAP, store: EmbeddingStore, step: int) -> dict[str, float]:
        """Values to log for the averaged ``model`` on validation rows."""
        findings = check_bridge(
            model, store, seed=self.seed, max_pairs=self.max_pairs, num_samples=self.num_samples, gap=False
        )
        logged = {
            f"diagnose/{finding.name}/{value}": finding.values[value]
            for finding in findings
            for value in _LOGGED.get(finding.check, ())
        }
        counts = {f"diagnose/{verdict}": float(sum(f.verdict == verdict for f in findings)) for verdict in VERDICTS[1:]}
        return counts | logged
