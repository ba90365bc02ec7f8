"""How much is fuzzed: a fixed set of cases in every test run, or new ones for a given time.

    DIFFGAP_FUZZ_SECONDS=600 python -m pytest tests/fuzz

shares the seconds among the tests that were collected, draws new cases until they are over and prints their number.
With ``DIFFGAP_FUZZ_SEED`` the cases are the same in every run, as far as the time allows.
"""

from __future__ import annotations

import inspect
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, given, settings

#: Seconds for all tests together, or 0 for the fixed cases.
SECONDS = float(os.environ.get("DIFFGAP_FUZZ_SECONDS", "0"))

#: Where the new cases start; None is anywhere.
SEED = os.environ.get("DIFFGAP_FUZZ_SEED")

#: Cases run, by test.
cases: Counter[str] = Counter()

#: Seconds a test has, set when it is known how many there are.
share = 0.0

#: The tests that share the time.
drawn_tests: set[Callable[..., None]] = set()


def fuzzed(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the test with what the strategies draw: ``examples`` fixed cases, or new ones while there is time.

    The test's other arguments are fixtures.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        fixtures = [p for name, p in inspect.signature(test).parameters.items() if name not in strategies]

        def run(**fixed: Any) -> None:
            def one(**drawn: Any) -> None:
                cases[test.__name__] += 1
                test(**fixed, **drawn)

            def draw(**options: Any) -> Callable[[], None]:
                quiet = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)
                drawing: Callable[[], None] = quiet(given(**strategies)(one))
                return drawing

            if not SECONDS:
                draw(max_examples=examples, derandomize=True)()
                return
            seeds = random.Random(None if SEED is None else f"{SEED} {test.__name__}")
            end = time.monotonic() + share
            while time.monotonic() < end:  # again and again, because hypothesis knows no limit of time
                hypothesis.seed(seeds.getrandbits(64))(draw(max_examples=examples, print_blob=True))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        run.__signature__ = inspect.Signature(fixtures)  # type: ignore[attr-defined]
        drawn_tests.add(run)
        return run

    return decorate
