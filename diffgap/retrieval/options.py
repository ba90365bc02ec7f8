"""How runs are scored: by what, and with which sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

from diffgap.diffusion.solvers import SOLVERS, build_solver
from diffgap.models.bridge import DiffGAP
from diffgap.models.likelihood import LEVELS
from diffgap.models.scoring import CANDIDATES, Cost, Scoring, scoring_cost

#: Rows of the table that come from the bridge itself.
METHODS: dict[Scoring, str] = {
    "cosine": "heads (cosine)",
    "bridge": "bridge",
    "fusion": "bridge + cosine",
    "rerank": "re-ranked",
}


@dataclass(frozen=True)
class ScoringOptions:
    """How runs are scored. None stands for a run's own setting or, of a weight, for the best on validation data.

    Attributes:
        scorings: What to score by. Re-ranking is left out by default: with 32 candidates a query takes some 260
            denoiser calls instead of the one that bridges it.
        steps, num_samples, solver, guidance_scale: How embeddings are bridged.
        alpha: Weight of the bridged cosines.
        beta: Weight of the likelihood ratio.
        candidates: How many of each query's best items are re-ranked.
    """

    scorings: tuple[Scoring, ...] = ("cosine", "bridge", "fusion")
    steps: int | None = None
    num_samples: int | None = None
    solver: str | None = None
    guidance_scale: float | None = None
    alpha: float | None = None
    beta: float | None = None
    candidates: int = CANDIDATES

    def __post_init__(self) -> None:
        if not self.scorings:
            raise ValueError(f"scorings is empty; name one or more of {', '.join(get_args(Scoring))}")
        for scoring in self.scorings:
            if scoring not in METHODS:
                raise ValueError(f"scoring is {scoring!r}; use {', '.join(get_args(Scoring))}")
        for name in ("steps", "num_samples", "candidates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; use 1 or more")
        if self.solver is not None and self.solver not in SOLVERS:
            raise ValueError(f"solver {self.solver!r} does not exist; use one of {', '.join(SOLVERS)}")
        for name in ("guidance_scale", "alpha", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; use a finite number, 0 or more")
        for name, users in (("alpha", {"fusion", "rerank"}), ("beta", {"rerank"})):
            if getattr(self, name) is not None and not users & set(self.scorings):
                raise ValueError(
                    f"{name} is a weight of scoring {' and '.join(sorted(users))}; add it or leave {name} out"
                )

    def resolved(self, model: DiffGAP) -> dict[str, Any]:
        """How this bridge is to bridge, as keyword arguments of :meth:`DiffGAP.translate`."""
        own = model.settings
        return {
            "steps": self.steps or own.translate_steps,
            "num_samples": self.num_samples or own.num_samples,
            "solver": self.solver or own.solver,
            "guidance_scale": own.guidance_scale if self.guidance_scale is None else self.guidance_scale,
        }

    def cost(self, model: DiffGAP, scoring: Scoring, gallery_size: int) -> Cost:
        """Denoiser calls for a query and for a gallery item."""
        chosen = self.resolved(model)
        return scoring_cost(
            scoring,
            num_samples=chosen["num_samples"],
            evaluations=len(build_solver(chosen["solver"], model.diffusion.schedule, chosen["steps"])),
            guided=chosen["guidance_scale"] != 1,
            candidates=min(self.candidates, gallery_size),
            levels=LEVELS,
        )
