"""All metrics of a set of generated clips, with every figure's scale beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffgap.data.media import MediaError
from diffgap.generation.metrics.backbone import Backbone, describe
from diffgap.generation.metrics.cache import FeatureCache
from diffgap.generation.metrics.clips import Audio, Broken, Clip, digest, list_clips, read_clip, some, unpaired
from diffgap.generation.metrics.conditions import Conditions
from diffgap.generation.metrics.measures import MEASURES, Evidence, Result
from diffgap.generation.metrics.report import AudioReport, Figure
from diffgap.generation.metrics.resampling import check_options

__all__ = ["evaluate_audio"]

#: For each set, what a backbone said of each of its clips.
_Found: TypeAlias = list[dict[str, dict[str, npt.NDArray[np.float32]]]]

_SETS = ("generated", "reference")
_BATCH = 16


def evaluate_audio(
    generated: Audio,
    reference: Audio | None = None,
    *,
    backbones: Backbone | Sequence[Backbone],
    conditions: Conditions | None = None,
    metrics: Sequence[str] | None = None,
    sample_rate: int | None = None,
    splits: int = 10,
    skip_broken: bool = False,
    cache: str | os.PathLike[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
) -> AudioReport:
    """Metrics of ``generated`` clips, against ``reference`` recordings and ``conditions``, on each backbone.

    Clips are told apart and paired by name: the file's path inside the folder, or a listed file's own name, without
    suffix. ``kl_softmax`` and ``kl_sigmoid`` need every generated clip to have its recording; if both sets hold the
    same names, distances resample pairs together.

    Args:
        generated, reference: A folder (sound files at any depth), a list of files, or waveforms (samples,) by name.
        backbones: One or more; see :mod:`diffgap.generation.metrics.backbone`.
        conditions: A vector for each generated clip, for ``clap_score`` and ``recall``.
        metrics: Of ``MEASURES``; by default all that the backbone's outputs and the given sets allow, with a note on
            those they do not.
        sample_rate: Of waveforms, in Hz.
        splits: Of the Inception score.
        skip_broken: Evaluate what is left when clips are silent or cannot be read, pairs being left out as a whole, and
            list them in the report; by default they are an error that names them.
        cache: Folder for features from one call to the next, by content, fingerprint and preparation; None keeps none.
        confidence, resamples, seed: Of the intervals.

    Raises:
        ValueError: nothing to evaluate, unknown metrics or metrics that lack what they need, unpaired names, broken
            clips without ``skip_broken``, backbones of one name, conditions in another space.
        FileNotFoundError: a folder does not exist.
    """
    check_options(confidence, resamples)
    if splits < 1:
        raise ValueError(f"splits must be at least 1; got {splits}")
    networks = list(backbones) if isinstance(backbones, Sequence) else [backbones]
    names = [network.name for network in networks]
    if not networks or len(set(names)) != len(names):
        raise ValueError(f"backbones must be at least one, each of its own name; got {', '.join(names) or 'none'}")
    sets = [list_clips("generated", generated, sample_rate)]
    if reference is not None:
        sets.append(list_clips("reference", reference, sample_rate))
    plans, notes = _plan(networks, sets, conditions, metrics, splits)
    store = FeatureCache(cache)
    described, broken = _describe(networks, sets, store, skip_broken)
    bad = [{one.name for one in broken if one.set == label} for label in _SETS]
    paired = len(sets) > 1 and not _mismatch(sets)
    left_out = []
    if paired:
        left_out = [f"{_SETS[number]}/{name}" for number in (0, 1) for name in sorted(bad[1 - number] - bad[number])]
        bad = [bad[0] | bad[1]] * 2
    sets = [[clip for clip in clips if clip.name not in gone] for clips, gone in zip(sets, bad, strict=False)]
    for label, clips in zip(_SETS, sets, strict=False):
        if not clips:
            raise ValueError(f"no clip of the {label} set can be evaluated: {some([one.message for one in broken], 3)}")
    about = Evidence((), (), paired, splits=splits, confidence=confidence, resamples=resamples, seed=seed)
    figures: list[Figure] = []
    for network, found in zip(networks, described, strict=True):
        evidence = _evidence(about, network, found, sets, conditions)
        for metric in plans[network.name]:
            against = _digest_against(metric, sets, conditions)
            results = MEASURES[metric].compute(evidence)
            figures += [_figure(network, metric, result, evidence, against) for result in results]
    return AudioReport(
        tuple(figures), tuple(_names(sets[0])), tuple(broken), tuple(left_out), store.reused, store.computed, notes
    )


def _plan(
    networks: list[Backbone],
    sets: list[list[Clip]],
    conditions: Conditions | None,
    metrics: Sequence[str] | None,
    splits: int,
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """The metrics of each backbone, and a note on each that nobody asked for and that cannot be had."""
    if isinstance(metrics, str):
        raise TypeError("metrics must be a sequence of names, not a string")
    unknown = sorted(set(metrics or ()) - set(MEASURES))
    if unknown:
        raise ValueError(f"unknown metrics {', '.join(unknown)}; there are {', '.join(MEASURES)}")
    if conditions is not None:
        lacking = unpaired("generated", _names(sets[0]), "conditions", list(conditions.vectors))
        if lacking:
            raise ValueError(f"each clip needs its condition: {lacking}")
    # Sets that share no name were never meant as pairs; of some shared and some not, names are mistaken.
    shared = len(sets) > 1 and set(_names(sets[0])) & set(_names(sets[1]))
    wanted = {"kl_softmax", "kl_sigmoid"} & set(MEASURES if metrics is None else metrics)
    classified = any("logits" in network.outputs for network in networks)
    if shared and wanted and classified and (mismatch := _mismatch(sets)):
        raise ValueError(f"generated and reference are paired by name: {mismatch}; or leave out the kl metrics")
    plans: dict[str, list[str]] = {}
    reasons: dict[str, dict[str, str]] = {}
    for metric in dict.fromkeys(metrics or MEASURES):
        reasons[metric] = {network.name: _lacking(metric, network, sets, conditions, splits) for network in networks}
        able = [network.name for network in networks if not reasons[metric][network.name]]
        if metrics is not None and not able:
            raise ValueError(f"{metric} cannot be computed: {'; '.join(dict.fromkeys(reasons[metric].values()))}")
        for name in able:
            plans.setdefault(name, []).append(metric)
    if not plans:
        raise ValueError("nothing can be computed: give a reference or conditions, or a backbone with logits")
    notes = tuple(
        f"{metric} was not computed: {reason}."
        for metric, why in reasons.items()
        for reason in dict.fromkeys(why.values())
        if reason
    )
    return {network.name: plans.get(network.name, []) for network in networks}, notes


def _lacking(metric: str, network: Backbone, sets: list[list[Clip]], conditions: Conditions | None, splits: int) -> str:
    """Why ``network`` cannot give that metric; "" if it can."""
    measure = MEASURES[metric]
    if measure.output not in network.outputs:
        return f"backbone {network.name} gives no {measure.output}"
    if metric == "inception_score" and len(sets[0]) < splits:
        return f"{len(sets[0])} clips are fewer than the {splits} splits"
    if measure.against in ("reference", "pairs") and len(sets) < 2:
        return "there is no reference"
    if measure.against == "pairs" and (mismatch := _mismatch(sets)):
        return f"generated and reference are not paired by name: {mismatch}"
    if measure.against == "conditions":
        if conditions is None:
            return "there are no conditions"
        if conditions.space != network.space:
            return f"conditions are in space {conditions.space}, backbone {network.name} in {network.space or 'none'}"
    return ""


def _digest_against(metric: str, sets: list[list[Clip]], conditions: Conditions | None) -> str:
    against = MEASURES[metric].against
    if against == "conditions" and conditions is not None:
        return conditions.digest
    return digest(sets[1]) if against in ("reference", "pairs") else ""


def _names(clips: list[Clip]) -> list[str]:
    return [clip.name for clip in clips]


def _mismatch(sets: list[list[Clip]]) -> str:
    return unpaired("generated", _names(sets[0]), "reference", _names(sets[1]))


def _describe(
    networks: list[Backbone], sets: list[list[Clip]], store: FeatureCache, skip_broken: bool
) -> tuple[list[_Found], list[Broken]]:
    """What each backbone says of each set, and the clips of which it cannot say anything.

    Once a clip is found broken and not to be skipped the others are only read, so that the error names them all.
    """
    broken: dict[tuple[str, str], Broken] = {}
    everything: list[_Found] = []
    for network in networks:
        everything.append([])
        for label, clips in zip(_SETS, sets, strict=False):
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


def _evidence(
    about: Evidence, network: Backbone, found: _Found, sets: list[list[Clip]], conditions: Conditions | None
) -> Evidence:
    said = [[given[clip.name] for clip in clips] for given, clips in zip(found, sets, strict=True)]
    for output in sorted(network.outputs):
        widths = sorted({one[output].shape[-1] for clips in said for one in clips})
        if len(widths) > 1:
            raise ValueError(f"backbone {network.name} gave {output} of widths {', '.join(map(str, widths))}")
    first = said[0][0]
    features = [[np.asarray(one["features"], np.float64) for one in clips] for clips in said if "features" in first]
    logits = [np.stack([one["logits"] for one in clips]).astype(np.float64) for clips in said if "logits" in first]
    evidence = replace(about, features=features, logits=logits)
    if conditions is None:
        return evidence
    row = {name: number for number, name in enumerate(sorted(conditions.vectors))}
    gallery = np.stack([np.asarray(conditions.vectors[name], np.float64) for name in row])
    own = np.array([row[clip.name] for clip in sets[0]])
    return replace(evidence, conditions=gallery, own=own)


def _figure(network: Backbone, metric: str, result: Result, evidence: Evidence, reference: str) -> Figure:
    interval = result.interval
    return Figure(
        metric=result.metric,
        backbone=network.name,
        fingerprint=network.fingerprint,
        preparation=network.reader.description,
        sample_rate=network.sample_rate,
        generated=len(evidence.logits[0] if MEASURES[metric].output == "logits" else evidence.features[0]),
        against=result.against,
        reference=reference,
        settings=result.settings,
        estimate=result.estimate,
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
        confidence=evidence.confidence,
        resamples=evidence.resamples,
        resampling=result.resampling,
        bias=result.bias,
        better=MEASURES[metric].better,
        details=result.details,
        values=result.values,
    )
