"""Where one medium is, what reads it, and what is said when it cannot be read."""

from __future__ import annotations

import errno
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias

Reason: TypeAlias = Literal[
    "missing", "empty", "undecodable", "no audio", "no picture", "no text", "too short", "too large", "silent",
    "not finite", "outside",
]  # fmt: skip


class MediaError(ValueError):
    """A medium that cannot be embedded, for a ``reason`` that a table can count; the message says which and why."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self))  # it crosses from worker processes


@dataclass(frozen=True)
class Source:
    """One medium: a text, a file, a run of bytes of a file (a member of a tar), or bytes; perhaps a part of its time.

    Attributes:
        path: The file, or the archive around it.
        text: The text itself; then nothing else is given.
        data: The bytes themselves, where there is no file.
        offset, size: Bytes of ``path`` that are the medium; to the end of the file if ``size`` is None.
        suffix: What the medium's own name ends in (".ogg"), lower case; of ``path`` if not given. Decoders go by the
            content and use it only where that says nothing (svg).
        start, stop: Seconds of the recording that count; None is its beginning and its end.
    """

    path: Path | None = None
    text: str | None = None
    data: bytes | None = None
    offset: int = 0
    size: int | None = None
    suffix: str = ""
    start: float | None = None
    stop: float | None = None

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.path, self.text, self.data)) != 1:
            raise ValueError("Source takes one of path, text and data")
        if not self.suffix and self.path is not None:
            object.__setattr__(self, "suffix", self.path.suffix.lower())

    def open(self) -> BinaryIO:
        """The medium's bytes, seekable. Raises MediaError if the file is missing or empty."""
        if self.data is not None:
            content = self.data
        elif self.path is None:
            raise TypeError("this source is a text; it has no bytes")
        else:
            try:
                file = _open_file(self.path)
            except (FileNotFoundError, ValueError):  # ValueError: a zero byte in the name
                raise MediaError("missing", f"{self} does not exist") from None
            except OSError as error:
                raise MediaError("undecodable", f"{self} cannot be opened: {error.strerror}") from error
            if self.offset == 0 and self.size is None:
                if not file.seek(0, io.SEEK_END):
                    file.close()
                    raise MediaError("empty", f"{self} is empty")
                file.seek(0)
                return file
            with file:
                file.seek(self.offset)
                content = file.read(-1 if self.size is None else self.size)
        if not content:
            raise MediaError("empty", f"{self} is empty")
        return io.BytesIO(content)

    def __str__(self) -> str:
        if self.text is not None:
            return f"text {self.text[:40]!r}"
        name = "bytes" if self.path is None else str(self.path)
        inside = f" at byte {self.offset}" if self.offset or self.size is not None else ""
        part = f" ({self.start or 0:g} s to {'the end' if self.stop is None else f'{self.stop:g} s'})"
        return name + inside + (part if self.start is not None or self.stop is not None else "")


def _open_file(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file")  # a named pipe would wait for its writer for ever
    return open(path, "rb")


class Reader(Protocol):
    """Decodes one medium into what an encoder takes. Small, picklable, deterministic: it runs in worker processes.

    ``description`` names everything that changes what comes out; encoders put it into their fingerprint.
    """

    @property
    def description(self) -> str: ...

    def __call__(self, source: Source) -> Any:
        """Raises MediaError for whatever is wrong with the medium, and nothing else."""
        ...
