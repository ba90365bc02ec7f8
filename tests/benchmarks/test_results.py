"""Every document in benchmarks/results is what the JSON beside it says, as today's code renders it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import attention_model, comparison, kernel_times, model, proof, report, ring_model, scaling_model
from benchmarks.comparison import Comparison
from benchmarks.gpus import OF_CHIP, Gpu
from benchmarks.runner import Result, Row, Skipped
from benchmarks.sass import LoopCounts
from diffgap.retrieval import ablation_report
from diffgap.retrieval import report as retrieval_report
from diffgap.retrieval.ablation import Ablation, Cell, Variant
from diffgap.retrieval.report import Interval
from tests.benchmarks.test_kernel_times import measured_in

RESULTS = Path(report.__file__).parent / "results"
#: Written before reports had paired differences, without which none can be read.
OLD = RESULTS / "stamps-concept-2026-11-25"
DOCUMENTS = sorted(
    {*RESULTS.glob("*.md"), *RESULTS.glob("*/report.md"), *RESULTS.glob("*/ablation.md")} - {OLD / "report.md"}
)


def result_of(content: dict[str, Any]) -> Result:
    rows, skipped = [Row(**row) for row in content["rows"]], [Skipped(**entry) for entry in content["skipped"]]
    return Result(rows, content.get("failures", []), content.get("missing", {}), skipped)


def ablation_of(content: dict[str, Any]) -> Ablation:
    def interval(values: Any) -> Any:
        return values if values is None else Interval(*values)

    variants = [
        {
            **one,
            "cells": {
                scoring: {
                    metric: Cell(**{name: interval(values) for name, values in cell.items()})
                    for metric, cell in cells.items()
                }
                for scoring, cells in one["cells"].items()
            },
        }
        for one in content["variants"]
    ]
    return Ablation(**{**content, "variants": [Variant(**one) for one in variants]})


def gpus_of(content: dict[str, Any]) -> list[Gpu]:
    by_name = {gpu.name: gpu for gpu in OF_CHIP.values()}
    return [by_name[name] for name in dict.fromkeys(row["device"] for row in content["rows"])]


def counts_of(kernels: dict[str, Any]) -> dict[str, model.Counts]:
    return {
        name: model.Counts(**{part: LoopCounts(**numbers) for part, numbers in counts.items()})
        for name, counts in kernels.items()
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_a_document_is_what_its_json_says(document: Path) -> None:
    text, data = document.read_text(encoding="utf-8"), document.with_suffix(".json")
    content = json.loads(data.read_text(encoding="utf-8"))
    if document.name == "ablation.md":
        assert text == ablation_report.markdown(ablation_of(content))
    elif document.name == "report.md":
        assert text == retrieval_report.markdown(retrieval_report.from_json(data))
    elif document.name.endswith("-models.md"):
        assert text == comparison.to_markdown(content["header"], [Comparison(**row) for row in content["rows"]])
    elif document.name.endswith("-kernels.md"):
        assert text == kernel_times.to_markdown(content["header"], measured_in(content), content["failures"])
    elif document.name.startswith("proof-"):
        rows = [proof.Row(**{**row, "faults": tuple(row["faults"])}) for row in content["rows"]]
        assert text == proof.to_markdown(content["header"], rows)
    elif document.name.startswith("modelled-scaling-"):
        works = {name: scaling_model.Work(**work) for name, work in content["header"]["counted"].items()}
        rows = [row for gpu in scaling_model.GPUS for row in scaling_model.rows_of(gpu, works)]
        assert result_of(content).rows == rows
        assert text == scaling_model.to_markdown(content["header"])
    elif document.name.startswith("modelled-ring-"):
        assert result_of(content) == ring_model.result()
        assert text == ring_model.to_markdown(content["header"])
    elif document.name.startswith("modelled-attention-"):
        of_gpus = {gpu: attention_model.model(gpu) for gpu in gpus_of(content)}
        assert result_of(content).rows == [row for of_gpu in of_gpus.values() for row in of_gpu]
        assert text == attention_model.to_markdown(content["header"], of_gpus)
    elif document.name.startswith("modelled-clip-loss-"):
        losses = {gpu: model.model(gpu, counts_of(content["header"]["gpus"][gpu.name])) for gpu in gpus_of(content)}
        assert result_of(content).rows == [row for of_gpu in losses.values() for row in of_gpu.result.rows]
        assert text == model.to_markdown(content["header"], losses)
    elif document.name.startswith("modelled-"):  # a model that runs what it counts: the tables of times alone
        assert content["header"]["date"] in text and content["header"]["command"] in text
        assert text.count("(modelled)") == len(tables := modelled_tables(result_of(content)))
        assert all(table in text for table in tables)
    else:
        assert text == report.to_markdown(content["header"], result_of(content))


def modelled_tables(result: Result) -> list[str]:
    """The table of each operation on each GPU, as the modelled documents have them."""
    tables = []
    for device in dict.fromkeys(row.device for row in result.rows):
        of_device = [row for row in result.rows if row.device == device]
        for op in report.operations(of_device):
            rows = [row for row in of_device if report.operation(row) == op]
            tables.append("\n".join(report.section(f"{op} on {device} (modelled)", rows, result.skipped)))
    return tables
