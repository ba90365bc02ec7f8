"""What a run of ``embed_items`` did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from diffgap.data._modality import read_modality

#: Of an item that is left out because it lists too few modalities; nothing failed.
NOT_LISTED = "not listed"


@dataclass(frozen=True)
class EmbedReport:
    """Counts of a store and of the run that finished it.

    Attributes:
        output: The store.
        items: Number of items listed.
        rows: Rows of the store; the other items are left out, see ``<output>/failures.parquet``.
        embeddings: Number of embeddings by modality.
        failures: Number of items without a medium of a modality that they list, by (modality, reason).
        listed: Number of items that list the modality.
        encoded: Media that this process encoded, by modality; not those of an earlier run or of other ranks.
        encode_seconds: Time that took in the encoders, by modality.
        seconds: Time of this run, from listing to the store.
        notes: The item list's own lines on what it does not list.
    """

    output: Path
    items: int
    rows: int
    embeddings: Mapping[str, int]
    failures: Mapping[tuple[str, str], int]
    listed: Mapping[str, int]
    encoded: Mapping[str, int]
    encode_seconds: Mapping[str, float]
    seconds: float
    notes: Sequence[str]

    @classmethod
    def of_store(cls, output: Path, **counts: Any) -> EmbedReport:
        """With the counts that the store itself holds."""
        index = pq.read_metadata(output / "index.parquet")
        failures = pq.read_table(output / "failures.parquet", columns=["modality", "reason"]).to_pydict()
        embeddings = {file.stem: len(read_modality(file).data) for file in sorted(output.glob("*.safetensors"))}
        found = Counter(zip(failures["modality"], failures["reason"], strict=True))
        return cls(output, rows=index.num_rows, embeddings=embeddings, failures=found, **counts)

    @property
    def left_out(self) -> int:
        """Items that are no row of the store."""
        return self.items - self.rows

    @property
    def warnings(self) -> list[str]:
        """A line for every modality of which more than half failed, and one if more than half of the items did."""
        found = []
        for modality, count in self.listed.items():
            reasons = {why: n for (name, why), n in self.failures.items() if name == modality and why != NOT_LISTED}
            failed = sum(reasons.values())
            if 2 * failed > count:
                often = max(reasons, key=reasons.__getitem__)
                found.append(f"{failed} of {count} {modality} items failed, {reasons[often]} of them as {often!r}")
        if 2 * self.left_out > self.items:
            found.append(f"{self.left_out} of {self.items} items are left out")
        return found
