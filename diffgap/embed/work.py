"""The chunks of one process: their media read ahead, encoded in batches, and kept as parts."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from diffgap.data._modality import DTYPES
from diffgap.data.items import Item, ItemList
from diffgap.data.media import MediaError, Source
from diffgap.embed.folder import PartsFolder, Plan
from diffgap.embed.parts import FloatArray, Part
from diffgap.embed.reading import MediaPool
from diffgap.embed.survey import Survey
from diffgap.encoders import Encoded, Encoder

Progress = Callable[[int, int, int], None]
T = TypeVar("T")


class _Request(NamedTuple):
    modality: str
    item: int
    source: Source
    content: Future[Any]


class _Chunk(NamedTuple):
    """Comes after the requests of its items."""

    number: int
    items: Sequence[Item]


class Work:
    """Embeds the chunks of a plan that are this rank's and are not parts yet.

    Attributes:
        missing: Their numbers.
        sizes: (modalities, parts) int64: number of media to embed, of all chunks.
        encoded: Media embedded so far, by modality.
        seconds: Time in the encoders, by modality.
    """

    def __init__(
        self,
        items: ItemList,
        encoders: Mapping[str, Encoder],
        listed: Survey,
        folder: PartsFolder,
        plan: Plan,
        progress: Progress | None,
    ) -> None:
        self._items, self._encoders, self._folder, self._plan = items, encoders, folder, plan
        self._dtypes = {name: DTYPES[kind] for name, kind in plan.dtype.items()}
        self._wanted = {name: listed.distinct(name) for name in encoders}
        own = [number for number in range(plan.parts) if folder.ranks.owns(number)]
        self.missing = [number for number in own if not folder.part(number).is_dir()]
        self.encoded: dict[str, int] = defaultdict(int)
        self.seconds: dict[str, float] = defaultdict(float)
        starts = np.arange(0, plan.count, plan.chunk)
        self.sizes = np.stack([np.add.reduceat(w.astype(np.int64), starts) for w in self._wanted.values()])
        self._total, self._failed = int(self.sizes[:, own].sum()), 0
        self._done = self._total - int(self.sizes[:, self.missing].sum())
        self._progress = progress

    def run(self, workers: int) -> None:
        """Writes the missing parts. Raises OSError where they cannot be written."""
        if not self.missing:
            return
        self._report()
        readers = {name: encoder.reader for name, encoder in self._encoders.items()}
        with MediaPool(readers, workers) as pool:
            part = Part()
            batch: list[tuple[_Request, Any]] = []
            # While a batch is encoded, the media of the next are read.
            for step in drawn_ahead(self._steps(pool), self._plan.batch_size + 2 * workers if workers else 0):
                if batch and (isinstance(step, _Chunk) or step.modality != batch[0][0].modality):
                    self._encode(batch, part)
                    batch = []
                if isinstance(step, _Chunk):
                    with self._folder.explained():
                        part.write(self._folder.part(step.number), step.items, self._dtypes)
                    part = Part()
                    continue
                try:
                    batch.append((step, step.content.result()))
                except MediaError as error:
                    self._fail(step, error, part)
                if len(batch) == self._plan.batch_size:
                    self._encode(batch, part)
                    batch = []

    def _steps(self, pool: MediaPool) -> Iterator[_Request | _Chunk]:
        """What there is to do, in order; media are asked for as it is drawn."""
        items, size, missing = iter(self._items), self._plan.chunk, set(self.missing)
        for number in range(max(missing) + 1):
            chunk = list(islice(items, size))
            if number not in missing:
                continue
            for modality, wanted in self._wanted.items():
                for item in np.flatnonzero(wanted[number * size : (number + 1) * size]).tolist():
                    source = chunk[item].media[modality]
                    yield _Request(modality, number * size + item, source, pool.submit(modality, source))
            yield _Chunk(number, chunk)

    def _encode(self, batch: Sequence[tuple[_Request, Any]], part: Part) -> None:
        """Adds a batch of one modality to the part."""
        modality = batch[0][0].modality
        encoder, began = self._encoders[modality], time.monotonic()
        try:
            encoded = encoder.encode([content for _, content in batch])
        except MediaError as error:
            if len(batch) == 1:
                self._fail(batch[0][0], error, part)
                return
            for one in batch:  # the batch does not say which of them it was
                self._encode([one], part)
            return
        rows = _rows(encoded, encoder, len(batch))
        self.seconds[modality] += time.monotonic() - began
        self.encoded[modality] += len(batch)
        for (request, _), row in zip(batch, rows, strict=True):
            part.add(modality, request.item, request.source, row)
        self._done += len(batch)
        self._report()

    def _fail(self, request: _Request, error: MediaError, part: Part) -> None:
        part.fail(request.modality, request.item, request.source, error)
        self._failed += 1
        self._done += 1
        self._report()

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, self._failed)


def drawn_ahead(elements: Iterable[T], count: int) -> Iterator[T]:
    """The same elements; each is drawn ``count`` elements before it is given, so that what it began has had time."""
    iterator = iter(elements)
    held = deque(islice(iterator, count))
    for element in iterator:
        held.append(element)
        yield held.popleft()
    yield from held


def _rows(encoded: Encoded, encoder: Encoder, count: int) -> list[FloatArray]:
    """Vectors (D,) or sequences (length, D), one for each of ``count`` media, in memory of their own.

    Raises:
        TypeError: The encoder does not give what its members say; a fault in the encoder.
    """
    values, lengths = encoded if isinstance(encoded, tuple) else (encoded, None)
    got = f"{values.dtype} {values.shape}" + ("" if lengths is None else f" with lengths {lengths.shape}")
    expected = f"({count}, T, {encoder.dim}) with lengths" if encoder.sequence else f"({count}, {encoder.dim})"
    frames = values.shape[1:2] if encoder.sequence else ()
    sound = values.shape == (count, *frames, encoder.dim) and values.dtype == np.float32
    if not sound or (lengths is None) == encoder.sequence or (lengths is not None and lengths.shape != (count,)):
        raise TypeError(f"encoder {encoder.fingerprint!r} gave {got}; its encode must give float32 {expected}")
    if lengths is None:
        return list(values.copy())
    if ((lengths < 1) | (lengths > values.shape[1])).any():
        raise TypeError(f"encoder {encoder.fingerprint!r} gave lengths outside 1..{values.shape[1]}")
    return [row[:length].copy() for row, length in zip(values, lengths.tolist(), strict=True)]
