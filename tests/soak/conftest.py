"""Says at the end what the soak tests found."""

from __future__ import annotations

import pytest

from tests.soak import length


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if length.LONG:
        terminalreporter.section("soak")
        for line in length.found:
            terminalreporter.write_line(line)
