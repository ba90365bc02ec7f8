"""``diffgap`` in a process that sends itself a signal before one of its training steps, if it is of one rank.

python -m tests.training.lossy_worker SIGNAL RANK STEP train ...
"""

from __future__ import annotations

import os
import signal
import sys

from diffgap.cli import main
from diffgap.training.trainer import Trainer

if __name__ == "__main__":
    name, rank, last, *command = sys.argv[1:]
    step = Trainer._step

    def lossy(self: Trainer, number: int) -> dict[str, float]:
        if number == int(last) and os.environ["RANK"] == rank:
            os.kill(os.getpid(), signal.Signals[name])
        return step(self, number)

    Trainer._step = lossy  # type: ignore[method-assign, assignment]
    main(command)
