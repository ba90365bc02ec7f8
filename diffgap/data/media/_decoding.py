"""What the decoders of sound, pictures and video share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffgap.data.media.source import MediaError, Source

#: Most pixels of one picture; Pillow's own bound.
MAX_PIXELS = 89_478_485


@contextmanager
def decoding(source: Source) -> Iterator[None]:
    """Turns what a decoder raises inside into MediaError("undecodable"); an absent package stays its own error."""
    try:
        yield
    except (MediaError, ImportError):
        raise
    except Exception as error:  # for broken bytes decoders raise nearly anything: OSError, SyntaxError, struct.error...
        raise MediaError("undecodable", f"{source} cannot be decoded: {type(error).__name__}: {error}") from error


def check_part(source: Source) -> None:
    """Raises MediaError("outside") for a part that no recording has."""
    start, stop = source.start or 0.0, source.stop
    if start < 0 or (stop is not None and stop <= start):
        raise MediaError("outside", f"{source}: a part needs 0 <= start < stop")
