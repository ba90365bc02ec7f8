"""Published retrieval numbers, to stand beside measured ones where protocol and number of clips are the same.

Only numbers whose source was read, and for whose number of clips there is a source too. Numbers on another number of
clips are not comparable: a smaller gallery is easier. AudioCaps alone is published on 975, 957 and 816 clips, and for
LAION-CLAP's numbers on it no number of clips is known, so they are not here.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED", "Published", "published"]


@dataclass(frozen=True)
class Published:
    """Somebody else's numbers.

    Attributes:
        system: What was measured.
        direction: "query -> gallery".
        clips: N.
        recalls: R@1, R@5 and R@10 in percent.
        source: Where they were read.
    """

    system: str
    direction: str
    clips: int
    recalls: tuple[float, float, float]
    source: str


#: Table 9 of the same paper gives the numbers of clips of its own tests: 816 of AudioCaps, 1,045 of Clotho (v2), whose
#: evaluation set has no other size. WavCaps' own evaluation of AudioCaps is on its list of 957 clips with five captions
#: each, retrieval/data/AudioCaps/json_files/test.json.
_VAST = "https://arxiv.org/abs/2305.18500, table 15"
_WAVCAPS = f"{_VAST}; N: https://github.com/XinhaoMei/WavCaps"
_TO_AUDIO = "text -> audio"

#: By protocol.
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "audiocaps": (
        Published("WavCaps CNN14-BERT", _TO_AUDIO, 957, (35.1, 70.0, 82.1), _WAVCAPS),
        Published("WavCaps HTSAT-BERT", _TO_AUDIO, 957, (42.2, 76.5, 87.1), _WAVCAPS),
        Published("VAST", _TO_AUDIO, 816, (52.0, 76.8, 82.9), _VAST),
    ),
    "clotho": (
        Published("LAION-CLAP", _TO_AUDIO, 1045, (16.1, 38.3, 51.1), _VAST),
        Published("WavCaps CNN14-BERT", _TO_AUDIO, 1045, (21.5, 47.9, 61.9), _VAST),
        Published("WavCaps HTSAT-BERT", _TO_AUDIO, 1045, (19.7, 45.7, 59.4), _VAST),
        Published("ONE-PEACE", _TO_AUDIO, 1045, (22.4, 49.0, 62.7), _VAST),
        Published("VAST", _TO_AUDIO, 1045, (26.9, 53.2, 66.1), _VAST),
    ),
}


def published(protocol: str, clips: int) -> tuple[Published, ...]:
    """The published numbers of a protocol on this many clips; none for most."""
    return tuple(row for row in PUBLISHED.get(protocol, ()) if row.clips == clips)
