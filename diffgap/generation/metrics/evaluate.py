"""All metrics of a set of generated clips, with every figure's scale beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from diffgap.generation.metrics.backbone import Backbone, classes_of
from diffgap.generation.metrics.cache import FeatureCache
from diffgap.generation.metrics.clips import Audio, Clip, digest, list_clips, some, unpaired
from diffgap.generation.metrics.conditions import Conditions
from diffgap.generation.metrics.describing import Found, describe_sets
from diffgap.generation.metrics.measures import MEASURES, Evidence, Result
from diffgap.generation.metrics.report import AudioReport, Figure
from diffgap.generation.metrics.resampling import check_options

__all__ = ["evaluate_audio"]

_SETS = ("generated", "reference")


def evaluate_audio(
    generated: Audio,
    reference: Audio | None = None,
    *,
    backbones: Backbone | Sequence[Backbone],
    conditions: Conditions | None = None,
    labels: Mapping[str, str] | None = None,
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
        labels: The class that each generated clip should be of, by its name, for ``label_agreement`` on backbones that
            name their classes.
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
    plans, notes = _plan(networks, sets, conditions, labels, metrics, splits)
    store = FeatureCache(cache)
    described, broken = describe_sets(networks, dict(zip(_SETS, sets, strict=False)), store, skip_broken)
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
    about = Evidence((), (), paired=paired, splits=splits, confidence=confidence, resamples=resamples, seed=seed)
    figures: list[Figure] = []
    for network, found in zip(networks, described, strict=True):
        evidence = _evidence(about, network, found, sets, conditions, labels)
        for metric in plans[network.name]:
            against = _digest_against(metric, sets, conditions, labels)
            results = MEASURES[metric].compute(evidence)
            figures += [_figure(network, metric, result, evidence, against) for result in results]
    return AudioReport(
        tuple(figures), tuple(_names(sets[0])), tuple(broken), tuple(left_out), store.reused, store.computed, notes
    )


def _plan(
    networks: list[Backbone],
    sets: list[list[Clip]],
    conditions: Conditions | None,
    labels: Mapping[str, str] | None,
    metrics: Sequence[str] | None,
    splits: int,
) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """The metrics of each backbone, and a note on each that nobody asked for and that cannot be had."""
    if isinstance(metrics, str):
        raise TypeError("metrics must be a sequence of names, not a string")
    unknown = sorted(set(metrics or ()) - set(MEASURES))
    if unknown:
        raise ValueError(f"unknown metrics {', '.join(unknown)}; there are {', '.join(MEASURES)}")
    given = {"condition": None if conditions is None else conditions.vectors, "label": labels}
    for kind, of_clips in given.items():
        lacking = "" if of_clips is None else unpaired("generated", _names(sets[0]), f"{kind}s", list(of_clips))
        if lacking:
            raise ValueError(f"each clip needs its {kind}: {lacking}")
    # Sets that share no name were never meant as pairs; of some shared and some not, names are mistaken.
    shared = len(sets) > 1 and set(_names(sets[0])) & set(_names(sets[1]))
    wanted = {"kl_softmax", "kl_sigmoid"} & set(MEASURES if metrics is None else metrics)
    classified = any("logits" in network.outputs for network in networks)
    if shared and wanted and classified and (mismatch := _mismatch(sets)):
        raise ValueError(f"generated and reference are paired by name: {mismatch}; or leave out the kl metrics")
    plans: dict[str, list[str]] = {}
    reasons: dict[str, dict[str, str]] = {}
    for metric in dict.fromkeys(metrics or MEASURES):
        reasons[metric] = {
            network.name: _lacking(metric, network, sets, conditions, labels, splits) for network in networks
        }
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


def _lacking(
    metric: str,
    network: Backbone,
    sets: list[list[Clip]],
    conditions: Conditions | None,
    labels: Mapping[str, str] | None,
    splits: int,
) -> str:
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
    if measure.against == "labels":
        if labels is None:
            return "there are no labels"
        if not classes_of(network):
            return f"backbone {network.name} names no classes"
    return ""


def _digest_against(
    metric: str, sets: list[list[Clip]], conditions: Conditions | None, labels: Mapping[str, str] | None
) -> str:
    against = MEASURES[metric].against
    if against == "labels" and labels is not None:
        named = "\n".join(f"{name} {labels[name]}" for name in _names(sets[0]))
        return hashlib.sha256(named.encode()).hexdigest()
    if against == "conditions" and conditions is not None:
        return conditions.digest
    return digest(sets[1]) if against in ("reference", "pairs") else ""


def _names(clips: list[Clip]) -> list[str]:
    return [clip.name for clip in clips]


def _mismatch(sets: list[list[Clip]]) -> str:
    return unpaired("generated", _names(sets[0]), "reference", _names(sets[1]))


def _evidence(
    about: Evidence,
    network: Backbone,
    found: Found,
    sets: list[list[Clip]],
    conditions: Conditions | None,
    labels: Mapping[str, str] | None,
) -> Evidence:
    said = [[given[clip.name] for clip in clips] for given, clips in zip(found, sets, strict=True)]
    for output in sorted(network.outputs):
        widths = sorted({one[output].shape[-1] for clips in said for one in clips})
        if len(widths) > 1:
            raise ValueError(f"backbone {network.name} gave {output} of widths {', '.join(map(str, widths))}")
    first = said[0][0]
    features = [[np.asarray(one["features"], np.float64) for one in clips] for clips in said if "features" in first]
    logits, mel = (
        [np.stack([one[output] for one in clips]).astype(np.float64) for clips in said if output in first]
        for output in ("logits", "mel")
    )
    evidence = replace(about, features=features, logits=logits, mel=mel, classes=classes_of(network))
    if labels is not None:
        evidence = replace(evidence, labels=[labels[clip.name] for clip in sets[0]])
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
        generated=len(getattr(evidence, MEASURES[metric].output)[0]),
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
