"""Run folders and the data they name, as the commands use them."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffgap.data.importers import NPY_DAMAGES
from diffgap.data.store import EmbeddingStore
from diffgap.models.bridge import DiffGAP
from diffgap.training.config import BUNDLED, DataConfig, RunConfig


def load_data(config: DataConfig) -> EmbeddingStore:
    """The embedding store a configuration names, with its split.

    Raises:
        FileNotFoundError: No store at ``config.path``.
        ValueError: The store is damaged, or lacks one of ``config.modalities``.
    """
    if config.path in BUNDLED:
        module, _, function = BUNDLED[config.path].partition(":")
        store: EmbeddingStore = getattr(import_module(module), function)(split=config.split, seed=config.split_seed)
    else:
        store = EmbeddingStore.open(config.path)
    for name in config.modalities:
        if name not in store.modalities:
            raise ValueError(
                f"data.modalities names {name!r}, which {config.path} does not hold; "
                f"it has {', '.join(store.modalities)}"
            )
    return store


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run folder of ``diffgap train``."""
    return (path / "config.yaml").is_file()


def load_run(folder: Path) -> tuple[DiffGAP, RunConfig]:
    """The trained bridge and the configuration of a run folder of ``diffgap train``.

    Raises:
        FileNotFoundError: Not a run folder, or its training has not reached a validation yet.
    """
    if not is_run(folder):
        raise FileNotFoundError(f"{folder} is no run folder (no config.yaml); train one with `diffgap train {folder}`")
    if not (folder / "model").is_dir():
        raise FileNotFoundError(f"{folder} holds no model yet; finish it with `diffgap train {folder}`")
    return DiffGAP.from_pretrained(folder / "model").eval(), RunConfig.load(folder / "config.yaml")


def load_bridge(path: Path) -> DiffGAP:
    """The bridge of a run folder, or of a folder of :meth:`DiffGAP.save_pretrained`; errors as :func:`load_run`."""
    saved_alone = (path / "config.json").is_file()
    return DiffGAP.from_pretrained(path).eval() if saved_alone else load_run(path)[0]


def data_to_bridge(run: Path, data: str = "") -> DataConfig:
    """The store or bundled set ``data``, or the run's own data for "".

    Raises ValueError for "" and a folder of :meth:`DiffGAP.save_pretrained`, which names no data.
    """
    saved_alone = (run / "config.json").is_file()
    own_data = DataConfig(path="") if saved_alone else RunConfig.load(run / "config.yaml").data
    named = replace(own_data, path=data, modalities=()) if data else own_data
    if not named.path:
        raise ValueError(f"data is not given, and {run} is a saved model, not a run; name a store or a .npy file")
    return named


def bridge_embeddings(
    run: Path,
    source: str,
    target: str,
    *,
    data: str = "",
    split: str = "test",
    num_samples: int = 1,
    seed: int = 0,
    frames: int | None = None,
    steps: int | None = None,
    solver: str | None = None,
    guidance_scale: float | None = None,
) -> EmbeddingStore:
    """Sample ``target`` embeddings for every ``source`` embedding; see ``diffgap sample --help``.

    Args:
        run: Run folder, or a folder of :meth:`DiffGAP.save_pretrained`.
        data: Store folder, a bundled set ("stamps", "stamps-frames", "sound-effects"), or a ``.npy`` file of shape
            (N, D) or (N, T, D); "" for the run's own data.
        split: Rows of a store: "train", "val", "test" or "all". A ``.npy`` file is always taken whole.
        frames: Frames to sample of a sequence modality, and of no other; by default those of the sample's source.

    Returns:
        A store in memory with one modality, ``target``; row ``i * num_samples + k`` is sample k of input i and keeps
        the input's group, caption and split.
    """
    model = load_bridge(run)
    for role, name in (("source", source), ("target", target)):
        if name not in model.modalities:
            raise ValueError(f"{role} {name!r} is unknown to the bridge in {run}; it has {', '.join(model.modalities)}")
    if frames is not None and target not in model.sequences:
        raise ValueError(f"frames is {frames}, but {target!r} is one vector in the bridge in {run}; leave frames out")
    if data.endswith(".npy"):
        inputs = read_npy(Path(data), source)
    else:
        inputs = load_data(data_to_bridge(run, data))
        inputs = inputs if split == "all" else inputs.split(split)
    if source not in inputs.modalities:
        raise ValueError(f"source {source!r} is not in the data; it has {', '.join(inputs.modalities)}")
    rows = inputs.unique_rows(source)
    source_lengths = inputs.lengths(source, rows)
    options: dict[str, Any] = {source: inputs.embeddings(source, rows), "lengths": source_lengths}
    samples = model.sample(
        target, num_samples=num_samples, seed=seed, frames=frames,
        steps=steps, solver=solver, guidance_scale=guidance_scale, **options,
    )  # fmt: skip
    index: dict[str, list[str]] = {}
    for name in ("group", "split", "caption"):
        if name in inputs.index.column_names:
            index[name] = [value for value in inputs.column(name)[rows] for _ in range(num_samples)]
    index["id"] = [f"{name}#{k}" for name in inputs.column("id")[rows] for k in range(num_samples)]
    index["source"] = [f"{source} -> {target}"] * len(index["id"])
    lengths = {}
    if target in model.sequences and frames is None and source_lengths is not None:
        lengths[target] = source_lengths.repeat_interleave(num_samples)
    return EmbeddingStore.from_arrays({target: samples.flatten(0, 1).float().cpu()}, index, lengths=lengths)


def read_npy(path: Path, modality: str) -> EmbeddingStore:
    """A .npy file of embeddings (N, D) or (N, T, D) as a store in memory.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not an array of floats of these shapes, or embeddings that are not finite or all alike.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    try:
        array = np.load(path, allow_pickle=False)
    except NPY_DAMAGES as error:
        raise ValueError(f"{path} is not a .npy array of numbers ({' '.join(str(error).split())[:100]})") from error
    if array.ndim not in (2, 3) or not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}; give floats (N, D) or (N, T, D)")
    try:
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused with its rows
            return EmbeddingStore.from_arrays({modality: torch.from_numpy(array.astype(np.float32))})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
