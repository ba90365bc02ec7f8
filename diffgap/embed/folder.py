"""The folder of a run's parts: whose it is, who works in it, and what is there already."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

from diffgap._files import atomic_file, beside, remove_leftovers
from diffgap.embed.ranks import Ranks

_POLL_SECONDS = 0.2
_OWN = re.compile(r"plan\.json|lock(-\d+)?|part-\d{6,}|\..*\.tmp.*")


@dataclass(frozen=True)
class Plan:
    """Everything that the parts depend on.

    Attributes:
        items: Where the items come from, by the list's own description.
        count: Number of items.
        digest: Of all ids, sources and columns (:class:`~diffgap.embed.survey.Survey`).
        encoders: Fingerprints by modality.
        dtype: Number formats by modality.
        chunk: Items of a part.
        batch_size: Media of a batch.
    """

    items: str
    count: int
    digest: str
    encoders: Mapping[str, str]
    dtype: Mapping[str, str]
    chunk: int
    batch_size: int

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.count // self.chunk)

    def key(self) -> str:
        """Equal for equal plans."""
        return blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=16).hexdigest()

    def differences(self, other: Mapping[str, object]) -> list[str]:
        """What is not as in ``other``, in words: "batch_size was 16 and is 32"."""
        own = asdict(self)
        digest = own.pop("digest")
        changed = [
            f"{name} was {other.get(name)} and is {value}" for name, value in own.items() if other.get(name) != value
        ]
        return changed or ["the items' ids, sources or columns have changed"] * (other.get("digest") != digest)


class PartsFolder:
    """``<output>.parts``, beside the store to be: ``plan.json``, lock files, and a folder for every part that is whole.

    With ranks, several processes work in it at once, each in parts of its own.
    """

    def __init__(self, output: Path, ranks: Ranks) -> None:
        self.path = beside(output, ".parts")
        self.ranks = ranks
        self._descriptors: list[int] = []

    def part(self, number: int) -> Path:
        """Where a part is, or will be once it is whole."""
        return self.path / f"part-{number:06d}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and holds it: alone, or as one of several ranks. Frees it with the process, however it ends.

        Raises:
            FileExistsError: It holds what no run has put there.
            RuntimeError: Another process, or another one of this rank, is at work in it.
            OSError: The folder cannot be made, or its file system has no locks.
        """
        foreign = sorted(f.name for f in self.path.glob("*") if not _OWN.fullmatch(f.name))
        if foreign:
            raise FileExistsError(f"{self.path} holds {foreign[0]!r}, not part of a run; choose another output")
        alone = self.ranks.world == 1
        try:
            with self.explained():
                self._descriptors.append(self._lock("lock", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
                if alone:
                    remove_leftovers(self.path)
                else:
                    self._descriptors.append(self._lock(f"lock-{self.ranks.rank}", fcntl.LOCK_EX))
            yield
        finally:
            while self._descriptors:
                os.close(self._descriptors.pop())

    def _lock(self, name: str, kind: int) -> int:
        path = self.path / name
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # the process that held the folder removes it
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise RuntimeError(
                    f"{self.path} is in use: another diffgap embed writes the same output; wait for it, or choose "
                    "another output"
                ) from None
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)  # of a folder that was removed

    def begin(self, plan: Plan, *, overwrite: bool, finished: Callable[[], bool], wait_seconds: float) -> bool:
        """Takes up the parts of an earlier run of the same plan, or begins anew.

        False if rank 0 has ``finished`` without this rank, because all parts were there.

        Raises:
            ValueError: The folder holds parts of another plan, and not ``overwrite``.
            RuntimeError: Another rank than 0 has waited too long for rank 0 to begin.
        """
        file = self.path / "plan.json"
        limit = time.monotonic() + wait_seconds
        while self.ranks.rank and self._read_plan() != asdict(plan):
            if finished():
                self.remove()
                return False
            if time.monotonic() > limit:
                raise RuntimeError(f"rank 0 has not begun on {self.path} with the settings of rank {self.ranks.rank}")
            time.sleep(_POLL_SECONDS)
        found = self._read_plan()
        if found == asdict(plan):
            return True
        if found is not None and not overwrite:
            raise ValueError(
                f"{self.path} holds parts of another run: {'; '.join(plan.differences(found))}. Run with the settings "
                "it was begun with, or pass overwrite=True (--overwrite) to discard those parts"
            )
        with self.explained():
            file.unlink(missing_ok=True)
            for part in self.path.glob("part-*"):
                shutil.rmtree(part)
            with atomic_file(file) as temporary:
                temporary.write_text(json.dumps(asdict(plan), indent=1))
        return True

    def _read_plan(self) -> dict[str, object] | None:
        try:
            found = json.loads((self.path / "plan.json").read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def wait_for(self, parts: int, wait_seconds: float) -> None:
        """Returns when all parts are there.

        Raises:
            RuntimeError: For ``wait_seconds`` none has been added; the ranks that owe parts are named.
        """
        missing = list(range(parts))
        limit = time.monotonic() + wait_seconds
        while True:
            left = [number for number in missing if not self.part(number).is_dir()]
            if not left:
                return
            if len(left) < len(missing):
                missing, limit = left, time.monotonic() + wait_seconds
            if time.monotonic() > limit:
                owing = ", ".join(str(rank) for rank in sorted({number % self.ranks.world for number in left}))
                raise RuntimeError(
                    f"{len(left)} of {parts} parts are still missing after {wait_seconds:g} s without a new one, those "
                    f"of rank {owing}; see what it said, and run the same command again to go on"
                )
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An error of the file system says what is kept, and what to do."""
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            kept = len(list(self.path.glob("part-*"))) if self.path.is_dir() else 0
            raise OSError(
                f"{self.path} cannot be written: {error.strerror or error}; {kept} parts are kept. Make room or give "
                "access, and run the same command again to go on, or choose another output"
            ) from error

    def check_room(self, needed: int) -> None:
        """Raises OSError if the disk has less than ``needed`` bytes free."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise OSError(
                f"{self.path}: about {needed / 1e9:.1f} GB are needed for parts and store, and {free / 1e9:.1f} GB are "
                "free; make room, choose another output, or a smaller dtype (--dtype float16)"
            )

    def remove(self) -> None:
        """Deletes the folder, once no other rank is at work in it: the last part is seen before its writer is done."""
        fcntl.flock(self._descriptors[0], fcntl.LOCK_EX)
        shutil.rmtree(self.path, ignore_errors=True)
