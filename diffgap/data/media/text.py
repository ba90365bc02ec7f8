"""Text: captions as they are, or from files."""

from __future__ import annotations

from dataclasses import dataclass

from diffgap.data.media.source import MediaError, Source

__all__ = ["TextReader"]

_MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class TextReader:
    """A text, or the whole content of a UTF-8 file (a byte order mark is dropped), without white space at its ends.

    Raises:
        MediaError: "missing", "empty" (no bytes), "no text" (blank), "undecodable" (not UTF-8, or zero bytes in it),
            "too large" (above 1 MB).
    """

    @property
    def description(self) -> str:
        """What changes the text that comes out."""
        return "utf-8 stripped"

    def __call__(self, source: Source) -> str:
        """See the class."""
        if source.text is not None:
            text = source.text
        else:
            with source.open() as file:
                content = file.read(_MAX_BYTES + 1)
            if len(content) > _MAX_BYTES:
                raise MediaError("too large", f"{source} is a text of more than {_MAX_BYTES} bytes")
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise MediaError("undecodable", f"{source} is not UTF-8: {error}") from error
            if "\0" in text:
                raise MediaError("undecodable", f"{source} holds zero bytes; it is no text")
        if not text.strip():
            raise MediaError("no text", f"{source} is blank")
        return text.strip()
