from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffgap.data.store import write_store
from diffgap.retrieval import few_steps
from diffgap.retrieval.bootstrap import Interval
from diffgap.retrieval.evaluate import evaluate_runs, validation_scores
from diffgap.retrieval.few_steps import compare_steps
from diffgap.retrieval.options import ScoringOptions
from diffgap.retrieval.summary import ALL_DIRECTIONS
from diffgap.training.trainer import Trainer
from tests.synthetic import make_config, make_store


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    store = make_store()
    write_store(folder / "store", store)
    Trainer(make_config(folder / "store"), store, folder / "run", validate=validation_scores).train()
    return folder / "run"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_steps, "STEPS", (1, 3))
    monkeypatch.setattr(few_steps, "SAMPLES", (1, 4))


@pytest.mark.parametrize("options", [ScoringOptions(solver="ddim"), ScoringOptions(guidance_scale=1.5, alpha=0.7)])
@pytest.mark.usefixtures("settings")
def test_each_row_is_what_the_evaluation_at_its_setting_says(run: Path, options: ScoringOptions) -> None:
    found = compare_steps([run], options=options, replicates=20)
    assert [(one.num_samples, one.steps) for one in found] == [(1, 1), (1, 3), (4, 1), (4, 3)]
    for one in found:
        chosen = replace(options, steps=one.steps, num_samples=one.num_samples)
        report = evaluate_runs([run], options=chosen, with_baselines=False, replicates=20)
        assert one.metrics == {name: report.metrics[name] for name in ("bridge", "bridge + cosine")}
        assert one.metrics["bridge"][ALL_DIRECTIONS].keys() >= {"R@5", "MRR"}
        for measure, value in one.gap.items():
            assert value == pytest.approx(np.mean([getattr(after, measure) for _, after in report.gaps.values()]))
        assert one.gap.keys() == {"paired_cosine", "centroid_distance", "linear_separability"}
        assert one.calls == report.costs["bridge"].query_calls and one.milliseconds > 0
        assert one.solver == report.settings["solver"]


@pytest.mark.usefixtures("settings")
def test_weights_that_only_re_ranking_uses_do_not_stop_it(run: Path) -> None:
    options = ScoringOptions(("fusion", "rerank"), alpha=0.5, beta=2.0)
    found = compare_steps([run], split="val", options=options, replicates=5)
    assert all(isinstance(one.metrics["bridge"]["audio -> text"]["R@5"], Interval) for one in found)
