"""A folder of generated sounds: several ways to condition one generator on the same items, beside the real recordings.

::

    set.json                     what made it
    items.jsonl                  one line an item, see :class:`GeneratedItem`
    <system>/<name>.wav          one folder a system, one file an item
    conditions/<system>.npy      (items, D) float32, what each was generated from; none for a system without conditions

Files of equal name belong to one item, so that the folders pair in :func:`diffgap.generation.metrics.evaluate_audio`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffgap._files import check_writable

__all__ = ["FORMAT", "REFERENCE", "SYSTEMS", "GeneratedItem", "GeneratedSet", "check_set_folder"]

FORMAT = "diffgap-generated/1"
REFERENCE = "reference"
SYSTEMS = {
    REFERENCE: "the real recording",
    "vocoder": "the real recording's spectrogram through the vocoder: the best that the generator could do",
    "audio": "from the real recording's own embedding",
    "bridged": "from the query's embedding, translated by the bridge",
    "sampled": "from one sample of the bridge given the query",
    "raw": "from the query's embedding as it is, in the contrastive space",
    "none": "from no condition",
}
"""All systems, the reference first."""


@dataclass(frozen=True)
class GeneratedItem:
    """One item: a query, and how long its sounds are.

    Attributes:
        name: Of its files, without suffix; safe in paths and unique.
        id: The row's own in the store.
        caption: The query as a person reads it; "" where it has none.
        label: Class that classifiers are asked for, by the column that was named; "" for none.
        seconds: Length of the sounds.
    """

    name: str
    id: str
    caption: str
    label: str
    seconds: float


@dataclass(frozen=True)
class GeneratedSet:
    """An opened folder.

    Attributes:
        folder: Where it is.
        sample_rate: Hz.
        source: Modality of the queries ("text", "image", ...).
        systems: Names of :data:`SYSTEMS` that it holds, in their order.
        items: One for each file of a system.
        about: Everything that made it: generator, bridge, seed, steps, guidance ... for people to read.
    """

    folder: Path
    sample_rate: int
    source: str
    systems: tuple[str, ...]
    items: tuple[GeneratedItem, ...]
    about: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> GeneratedSet:
        """Opens and checks a folder.

        Raises:
            FileNotFoundError: No such set, or files of it are missing.
            ValueError: set.json or items.jsonl are damaged, or of another format.
        """
        described = folder / "set.json"
        if not described.is_file():
            raise FileNotFoundError(f"{folder} holds no set.json; make it with `diffgap generate-set`")
        try:
            content = json.loads(described.read_text(encoding="utf-8"))
            lines = (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()
            known = [field.name for field in fields(GeneratedItem)]
            items = tuple(GeneratedItem(**{name: item[name] for name in known}) for item in map(json.loads, lines))
            systems = tuple(name for name in SYSTEMS if name in content["systems"])
            found = cls(folder, int(content["sample_rate"]), content["source"], systems, items, content["about"])
            _check_types(found)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{folder} is not a whole set of generated sounds ({error}); generate it again") from error
        if content.get("format") != FORMAT:
            raise ValueError(f"{described} is of format {content.get('format')!r}; this version reads {FORMAT}")
        if any(Path(item.name).name != item.name or item.name in ("", "..") for item in items):
            raise ValueError(f"{folder / 'items.jsonl'} names files outside of its folder")
        for system in systems:
            for item in items:
                if not found.path(system, item).is_file():
                    raise FileNotFoundError(f"{found.path(system, item)} is missing; generate the set again")
        return found

    def write(self) -> None:
        """Write set.json and items.jsonl."""
        described = {
            "format": FORMAT, "sample_rate": self.sample_rate, "source": self.source, "systems": self.systems,
            "about": self.about,
        }  # fmt: skip
        lines = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in self.items)
        (self.folder / "items.jsonl").write_text(lines, encoding="utf-8")
        (self.folder / "set.json").write_text(json.dumps(described, indent=1, ensure_ascii=False), encoding="utf-8")

    def path(self, system: str, item: GeneratedItem) -> Path:
        """The sound of one system and item."""
        return self.folder / system / f"{item.name}.wav"

    def conditions(self, system: str) -> npt.NDArray[np.float32] | None:
        """(items, D) what the sounds of a system were generated from; None if from nothing."""
        file = self.folder / "conditions" / f"{system}.npy"
        return np.load(file, allow_pickle=False) if file.is_file() else None


def _check_types(found: GeneratedSet) -> None:
    """Raise TypeError for a value of another type than its field's."""
    for where, holder in (("set.json", found), *((f"item {item.name!r}", item) for item in found.items)):
        for name, kind in _KINDS[type(holder)].items():
            value = getattr(holder, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{name} of {where} is {value!r}")


_KINDS: dict[type, dict[str, type | tuple[type, ...]]] = {
    GeneratedSet: {"sample_rate": int, "source": str, "about": dict},
    GeneratedItem: {"name": str, "id": str, "caption": str, "label": str, "seconds": (int, float)},
}


def check_set_folder(folder: Path, *, overwrite: bool) -> None:
    """Raises FileExistsError if writing a set to ``folder`` would remove anything but (``overwrite``) a set.

    Raises ValueError if nothing can be written there.
    """
    check_writable(folder.parent, folder)
    if not folder.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists; choose another path, or give --overwrite")
    if not (folder / "set.json").is_file():
        raise FileExistsError(f"{folder} exists and is not a set of generated sounds; choose another path")
