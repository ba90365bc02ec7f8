"""What the tests of benchmarks share: a clock, and a budget that takes the fewest samples there can be."""

from benchmarks import timing

CLOCK = timing.CpuClock(threads=2)
QUICK = timing.Budget(seconds=0.0, min_rounds=2, max_rounds=3, sample_seconds=1e-5, turn_seconds=0.0)
