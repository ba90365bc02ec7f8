"""What backbones say of sets of clips, each clip once, broken ones found first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffgap.data.media import MediaError
from diffgap.generation.metrics.backbone import Backbone, describe
from diffgap.generation.metrics.cache import FeatureCache
from diffgap.generation.metrics.clips import Broken, Clip, read_clip, some

__all__ = ["Found", "describe_sets"]

#: For each set, what a backbone said of each of its clips.
Found: TypeAlias = list[dict[str, dict[str, npt.NDArray[np.float32]]]]

_BATCH = 16


def describe_sets(
    networks: Sequence[Backbone], sets: Mapping[str, list[Clip]], store: FeatureCache, skip_broken: bool
) -> tuple[list[Found], list[Broken]]:
    """What each backbone says of each set (by what messages call it), and the clips of which it cannot say anything.

    Once a clip is found broken and not to be skipped the others are only read, so that the error names them all.
    """
    broken: dict[tuple[str, str], Broken] = {}
    everything: list[Found] = []
    for network in networks:
        everything.append([])
        for label, clips in sets.items():
            found: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
            for start in range(0, len(clips), _BATCH):
                new: list[tuple[Clip, npt.NDArray[np.float32]]] = []
                for clip in clips[start : start + _BATCH]:
                    kept = store.get(clip, network)
                    if kept is not None:
                        found[clip.name] = kept
                        continue
                    try:
                        new.append((clip, read_clip(clip, network.reader)))
                    except MediaError as error:
                        broken.setdefault((label, clip.name), Broken(label, clip.name, error.reason, str(error)))
                if new and (skip_broken or not broken):
                    said = describe(network, [wave for _, wave in new], [clip.name for clip, _ in new])
                    for (clip, _), values in zip(new, said, strict=True):
                        store.put(clip, network, values)
                        found[clip.name] = values
            everything[-1].append(found)
        if broken and not skip_broken:
            lines = [f"{one.set}/{one.name} ({one.reason})" for one in broken.values()]
            raise ValueError(
                f"{len(lines)} clips cannot be evaluated: {some(lines)}; mend them, or pass skip_broken=True"
            )
    return everything, list(broken.values())
