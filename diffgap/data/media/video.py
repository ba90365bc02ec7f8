"""Video: uniform frames of its pictures. Its sound is read by :class:`~diffgap.data.media.audio.AudioReader`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, BinaryIO

from diffgap.data.media import _container
from diffgap.data.media._decoding import MAX_PIXELS, check_part
from diffgap.data.media.source import MediaError, Source
from diffgap.encoders._packages import require

if TYPE_CHECKING:
    from av.container import InputContainer
    from PIL.Image import Image

__all__ = ["FrameReader"]

#: Pixels of all frames of one video together: 3 GB of RGB.
_MAX_TOTAL = 1 << 30
#: Seconds; a frame that begins at the very time asked for is the one shown.
_TICK = 1e-6


@dataclass(frozen=True)
class FrameReader:
    """Decodes frames of a video, uniform in time, to PIL images in RGB, upright (rotation of the container applied).

    Of a part of L seconds (``start`` to ``stop`` of the source, or all of it) it gives the n frames shown at::

        n = max(1, min(ceil(L * fps - 1/2), max_frames))
        t_i = start + (i + 1/2) / fps     if all of these i = 0 .. n-1 fit and are all that fit
        t_i = start + (i + 1/2) * L / n   otherwise: too short for one, or more than ``max_frames``

    A frame is shown from its own time stamp to that of the next, so a variable rate is right; the last one to the end,
    and the first one from the beginning. A picture or a moving gif is a video too. Decoded from the key frame before
    ``start`` where the container has an index.

    Args:
        fps: Frames a second.
        max_frames: Most frames of one video, spread over the whole part; None is no bound.

    Raises:
        MediaError: "missing", "empty", "undecodable" (cut off counts), "no picture" (only sound, a cover is none), "too
            large" (one frame of more than :data:`MAX_PIXELS`, or more than 2**30 pixels in all), "outside".
        ModuleNotFoundError: av or Pillow is not installed.
    """

    fps: float
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"fps must be a positive number of frames a second; got {self.fps}")
        if self.max_frames is not None and self.max_frames < 1:
            raise ValueError(f"max_frames must be at least 1; got {self.max_frames}")

    @property
    def description(self) -> str:
        """What changes the frames that come out."""
        most = "" if self.max_frames is None else f" max{self.max_frames}"
        return f"frames {self.fps:g}fps midpoints{most}"

    def __call__(self, source: Source) -> list[Image]:
        """See the class."""
        require("PIL", "pillow")
        check_part(source)
        with source.open() as file:
            end = self._end(file, source)
            start = source.start or 0.0
            if start >= end:
                raise MediaError("outside", f"{source}: the video ends at {end:.3f} s, before that part")
            times = self._times(start, end if source.stop is None else min(source.stop, end))
            with _container.opened(file, source) as container:
                stream = _pictures(container, source)
                width, height = stream.codec_context.width, stream.codec_context.height
                if width * height > MAX_PIXELS or width * height * len(times) > _MAX_TOTAL:
                    raise MediaError(
                        "too large",
                        f"{source}: {len(times)} frames of {width} x {height} pixels; give max_frames or a lower fps",
                    )
                _container.seek(container, stream, start)
                images = list(_shown(container, stream, times, source))
        if not images:
            raise MediaError("no picture", f"{source} holds a video track without frames")
        return images

    def _end(self, file: BinaryIO, source: Source) -> float:
        """Seconds from the container's beginning to the end of the pictures."""
        with _container.opened(file, source) as container:
            stream = _pictures(container, source)
            first = _container.origin(container)
            if stream.duration:
                return float(((stream.start_time or 0) + stream.duration) * stream.time_base - first)
            if container.duration:
                return container.duration / 1e6
            packets = [packet for packet in container.demux(stream) if packet.pts is not None]
            return max((float((p.pts + (p.duration or 1)) * p.time_base - first) for p in packets), default=_TICK)

    def _times(self, start: float, stop: float) -> list[float]:
        length = stop - start
        fitting = ceil(length * self.fps - 0.5 - _TICK)
        number = max(1, fitting if self.max_frames is None else min(fitting, self.max_frames))
        step = 1 / self.fps if number == fitting else length / number
        return [start + (i + 0.5) * step for i in range(number)]


def _pictures(container: InputContainer, source: Source) -> Any:
    """The first video stream that is not the cover of a recording."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    raise MediaError("no picture", f"{source} holds no pictures ({container.format.long_name})")


def _shown(container: InputContainer, stream: Any, times: list[float], source: Source) -> Iterator[Image]:
    """The picture shown at each of the ascending ``times``, in seconds of the recording."""
    zero, number, shown = _container.origin(container), 0, None
    for frame in _container.frames(container, stream, source):
        if frame.pts is not None:
            at = float(frame.pts * frame.time_base - zero)
            while shown is not None and number < len(times) and times[number] < at - _TICK:
                yield _upright(shown)
                number += 1
            if number == len(times):
                return
        shown = frame
    if shown is not None:
        for _ in times[number:]:
            yield _upright(shown)


def _upright(frame: Any) -> Image:
    image: Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
