"""Queries from what a person gives: a text, a sound, a picture, or rows that are embedded already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffgap.data.media import Source
from diffgap.data.store import EmbeddingStore
from diffgap.encoders import Encoder
from diffgap.encoders.registry import build_encoder
from diffgap.models.bridge import DiffGAP
from diffgap.search.media import SUFFIXES
from diffgap.training.runs import read_npy


class QueryEncoders:
    """The encoders of queries, each built and checked when it is first needed.

    Args:
        specs: Specs of :func:`build_encoder` by modality.
        store, bridge, items: What is searched: the store, the bridge if there is one, and the modality of the items.
    """

    def __init__(self, specs: Mapping[str, str], store: EmbeddingStore, bridge: DiffGAP | None, items: str) -> None:
        self.specs, self._store, self._bridge, self._items = dict(specs), store, bridge, items
        self._built: dict[str, Encoder] = {}

    def encode(self, modality: str, sources: Sequence[Source]) -> tuple[Tensor, Tensor | None]:
        """Reads and embeds media of one modality: (N, D) or (N, T, D) float32, and the lengths of the latter.

        Raises:
            MediaError: One of them cannot be read.
            ValueError: There is no encoder for them, or one whose embeddings cannot be compared with the items.
        """
        encoder = self.build(modality)
        encoded = encoder.encode([encoder.reader(source) for source in sources])
        embeddings, lengths = encoded if isinstance(encoded, tuple) else (encoded, None)
        vectors = torch.from_numpy(np.ascontiguousarray(embeddings))
        return vectors, None if lengths is None else torch.from_numpy(lengths)

    def build(self, modality: str) -> Encoder:
        """The encoder of a modality; errors as in :meth:`encode`."""
        if modality not in self._built:
            if modality not in self.specs:
                raise ValueError(f"no encoder of {modality} queries is known; name one by --{modality} SPEC")
            encoder = build_encoder(modality, self.specs[modality])
            self._check(encoder, modality)
            self._built[modality] = encoder
        return self._built[modality]

    def _check(self, encoder: Encoder, modality: str) -> None:
        spec, store, items = self.specs[modality], self._store, self._items
        known = store.encoder(modality) if modality in store.modalities else ""
        if known and known != encoder.fingerprint:
            raise ValueError(
                f"encoder {spec} has fingerprint {encoder.fingerprint}, but the store's {modality} embeddings were "
                f"made by {known}; name the encoder that made them"
            )
        if self._bridge is not None:
            self._bridge.inputs.known(modality)
        dim = store.dim(items) if self._bridge is None else self._bridge.inputs.dims[modality]
        if encoder.dim != dim:
            raise ValueError(f"encoder {spec} gives {modality} of width {encoder.dim}; {dim} is what is searched")
        if self._bridge is None and modality != items and not encoder.space:
            raise ValueError(
                f"encoder {spec} shares its space with no other, so that its {modality} embeddings cannot be compared "
                f"with {items}; build the index with a run that bridges them"
            )


def read_query(query: str) -> tuple[str, Source]:
    """The modality of a query on the command line, by the ending of its name, and the query for readers.

    Raises:
        FileNotFoundError: It ends like the name of a sound or a picture, and there is no such file.
        ValueError: It is empty.
    """
    modality = SUFFIXES.get(Path(query).suffix.lower())
    if modality is None:
        if not query.strip():
            raise ValueError("query is empty; give a few words, or a file")
        return "text", Source(text=query)
    if not Path(query).is_file():
        raise FileNotFoundError(f"query {query!r} ends like a file of {modality}, and there is no such file")
    return modality, Source(path=Path(query))


def read_rows(path: Path, modality: str) -> tuple[list[str], Tensor, Tensor | None]:
    """Names, embeddings and lengths of queries that are embedded already: a .npy file, or a store's distinct rows.

    Raises:
        FileNotFoundError: No such file or store.
        ValueError: Not an array of floats (N, D) or (N, T, D), or a store without the modality.
    """
    store = read_npy(path, modality) if path.suffix == ".npy" else EmbeddingStore.open(path)
    rows = store.unique_rows(modality)
    return list(store.column("id")[rows]), store.embeddings(modality, rows), store.lengths(modality, rows)
