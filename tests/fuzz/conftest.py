"""Shares the time of fuzzing among the tests, and says how many cases there were."""

from __future__ import annotations

import pytest

from tests.fuzz import budget


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    drawn = [item for item in items if getattr(item, "function", None) in budget.drawn_tests]
    budget.share = budget.SECONDS / max(len(drawn), 1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if budget.SECONDS:
        terminalreporter.section("fuzzing")
        for name, count in sorted(budget.cases.items()):
            terminalreporter.write_line(f"{count:9,d}  {name}")
        terminalreporter.write_line(f"{budget.cases.total():9,d}  cases in all")
