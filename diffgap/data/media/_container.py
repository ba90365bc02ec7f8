"""Containers that PyAV opens (mp4, m4a, aac, webm, mkv ...): their sound, and the packets of any of their streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from diffgap.data.media._decoding import decoding
from diffgap.data.media.source import MediaError, Source
from diffgap.encoders._packages import require

if TYPE_CHECKING:
    from av.container import InputContainer

_MICROSECOND = Fraction(1, 1_000_000)
#: Formats that store their length and where each packet is; others guess both from the bit rate.
_INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
#: Seconds by which a container's length may exceed that of its packets.
_SLACK = 0.5
#: Seconds decoded before a part of a sound track: overlapping transforms need their past.
_PREROLL = 0.5


@contextmanager
def opened(file: BinaryIO, source: Source) -> Iterator[InputContainer]:
    """The container in ``file``; what goes wrong with it inside is a MediaError."""
    require("av", "av")
    import av

    file.seek(0)
    # A playlist may name other files and addresses: no protocol is allowed to open them.
    options = {"protocol_whitelist": "none"}
    with decoding(source), av.open(file, options=options, metadata_errors="replace") as container:
        yield container


def origin(container: InputContainer) -> Fraction:
    """Time stamp of the container's beginning, in seconds: the zero of a part's ``start`` and ``stop``."""
    return (container.start_time or 0) * _MICROSECOND


def seek(container: InputContainer, stream: Any, seconds: float) -> None:
    """Goes to a place from which ``stream`` decodes whole frames at or before ``seconds`` of the recording."""
    if seconds > 0 and container.format.name in _INDEXED:
        at = Fraction(seconds) + origin(container)
        container.seek(int(at / stream.time_base), stream=stream)


def frames(container: InputContainer, stream: Any, source: Source) -> Iterator[Any]:
    """Decoded frames of ``stream``, one thread, from where the container stands to its end.

    Raises MediaError("undecodable") at the end if the packets of all streams stop before the length in the header.
    """
    stream.codec_context.thread_count = 1
    end = Fraction(0)
    for packet in container.demux():
        if packet.pts is not None:
            end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
        if packet.stream.index == stream.index:
            yield from packet.decode()
    length = (container.duration or 0) * _MICROSECOND
    if container.format.name in _INDEXED and end - origin(container) < length - _SLACK:
        raise MediaError("undecodable", f"{source} is cut off: it ends before the {float(length):.1f} s of its header")


def sound_blocks(file: BinaryIO, source: Source) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Sample rate and mono float32 samples of the source's part of the first sound track, block by block."""
    with opened(file, source) as container:
        import av

        if not container.streams.audio:
            raise MediaError("no audio", f"{source} holds no sound ({container.format.long_name})")
        stream = container.streams.audio[0]
        start, stop = source.start or 0.0, source.stop
        seek(container, stream, start - _PREROLL)
        planar = av.AudioResampler(format="fltp")
        position = None
        for frame in frames(container, stream, source):
            rate = frame.sample_rate
            if position is None:
                # Later frames follow without a gap: time stamps of matroska are rounded to milliseconds.
                time = Fraction(0) if frame.pts is None else frame.pts * frame.time_base - origin(container)
                position = round(time * rate)
            for part in planar.resample(frame):
                block = part.to_ndarray().mean(axis=0)
                first = max(round(start * rate) - position, 0)
                last = len(block) if stop is None else max(round(stop * rate) - position, 0)
                position += len(block)
                yield rate, block[first:last]
            if stop is not None and position >= stop * rate:
                return
