"""``diffgap sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from rich.markup import escape
from tyro.conf import Positional, arg

from diffgap.commands.arguments import Guidance, Output, Run, Samples, Seed, Solver, Steps
from diffgap.commands.console import open_console

__all__ = ["sample"]


def sample(
    run: Run,
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    target: Annotated[Positional[str], arg(metavar="TARGET")],
    output: Output,
    data: str = "",
    split: Literal["train", "val", "test", "all"] = "test",
    num_samples: Samples = 1,
    frames: Steps = None,
    steps: Steps = None,
    solver: Solver = None,
    guidance_scale: Guidance = None,
    seed: Seed = 0,
    overwrite: bool = False,
) -> None:
    """Bridge embeddings from one modality to another and write the samples as an embedding store.

    Args:
        run: Run folder, or a folder saved by `save_pretrained`.
        source: Modality to start from.
        target: Modality to sample, in the bridge's contrastive space (unit vectors).
        output: Folder of the new store; row i holds sample k of an input, its id "<id>#k".
        data: Embedding store, a bundled set ("stamps", "stamps-frames", "sound-effects"), or a .npy file of shape
            (N, D) or (N, T, D); the run's own data by default.
        split: Rows of the store to bridge; a .npy file is taken whole.
        num_samples: Samples per embedding.
        frames: Frames to sample of a sequence modality; those of each source sequence if not given.
        steps: Sampling steps; the model's default if not given.
        solver: Solver; the model's default if not given.
        guidance_scale: Guidance, 1 is none; the model's default if not given.
        seed: Seed of the noise.
        overwrite: Replace an existing output.
    """
    from diffgap.data.store import check_replaceable, write_store
    from diffgap.training.runs import bridge_embeddings, data_to_bridge

    check_replaceable(output, overwrite=overwrite)
    if output.exists() and output.resolve() == Path(data_to_bridge(run, data).path).resolve():
        raise ValueError(f"output {output} is the store that is bridged; choose another path")
    store = bridge_embeddings(
        run, source, target, data=data, split=split, num_samples=num_samples, seed=seed,
        frames=frames, steps=steps, solver=solver, guidance_scale=guidance_scale,
    )  # fmt: skip
    write_store(output, store, overwrite=overwrite)
    open_console().print(f"{len(store)} {target} embeddings in {escape(str(output))}")
