"""Which sounds a listening test compares, in which trials: planned here, where the systems are known.

The page only sees opaque names. It shuffles trials, and turns or shuffles the sounds of each, by the participant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffgap.generation.generated import REFERENCE, SYSTEMS, GeneratedItem, GeneratedSet

__all__ = ["FOIL", "QUESTIONS", "Method", "Plan", "Settings", "Stimulus", "Trial", "anchor", "plan"]

Method = Literal["ab", "mushra"]

QUESTIONS = {
    "fit": "Which sound fits the caption better?",
    "quality": "Which sounds better: clearer, more natural, fewer artefacts? Whatever the caption says.",
}
FOIL = "foil"
"""The wrong sound of a catch trial."""


def anchor(cutoff: float) -> str:
    """Name of the reference without what is above ``cutoff`` Hz."""
    return f"anchor {cutoff / 1000:g} kHz"


@dataclass(frozen=True)
class Settings:
    """What a test asks.

    Attributes:
        method: "ab": two systems, side by side (the paired comparison of ISO 5495:2005). "mushra": all systems on one
            scale, with a hidden reference and anchors (after ITU-R BS.1534-3).
        systems: Systems of the set that are compared; for "ab" two. None: raw and bridged, or all for "mushra".
        trials: Items that are drawn; all if the set has fewer.
        repeats: Trials that come twice, with the sides swapped, to see how consistent a listener is.
        seed: Of the draw and of the opaque names.
        questions: "ab": names of :data:`QUESTIONS`. None: all.
        ties: "ab": "no difference" may be answered; the standard's choice is forced.
        catch: "ab": trials with a right answer: an item's recording against another item's with noise. None: 2.
        anchors: "mushra": cut-off frequencies of the anchors, Hz. None: 3500 and 7000.
    """

    method: Method = "ab"
    systems: tuple[str, ...] | None = None
    trials: int = 20
    repeats: int = 2
    seed: int = 0
    questions: tuple[str, ...] | None = None
    ties: bool = False
    catch: int | None = None
    anchors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Stimulus:
    """One sound of one trial: ``id`` is all that a listener gets to see.

    Attributes:
        id: Opaque.
        system: Of the set, or an :func:`anchor`, or :data:`FOIL`.
        item: Whose sound it is.
        cutoff: Hz from which it is filtered; None for not at all.
    """

    id: str
    system: str
    item: GeneratedItem
    cutoff: float | None = None


@dataclass(frozen=True)
class Trial:
    """One screen of the page: the sounds to judge, and the reference that is named as such, if there is one."""

    id: str
    item: GeneratedItem
    stimuli: tuple[Stimulus, ...]
    reference: Stimulus | None = None
    catch: bool = False


@dataclass(frozen=True)
class Plan:
    """All trials of a test.

    Attributes:
        method: See :class:`Settings`, and so the next three.
        systems: All that are compared, in the set's order ("ab": as they were named), then the anchors.
        questions: Of each trial; none for "mushra".
        ties: Whether "no difference" is an answer.
        blocks: Trials in which a listener's sides are turned together: a trial and its repeat, or two trials, with the
            systems on opposite sides. So every listener hears each system as often first as second, whatever is drawn.
    """

    method: Method
    systems: tuple[str, ...]
    questions: tuple[str, ...]
    ties: bool
    blocks: tuple[tuple[Trial, ...], ...]

    @property
    def trials(self) -> Iterator[Trial]:
        """All, block by block."""
        return (trial for block in self.blocks for trial in block)


class _Names:
    """Opaque names, none twice."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator, self._taken = generator, set[str]()

    def __call__(self) -> str:
        name = self._generator.bytes(6).hex()
        if name in self._taken:
            return self()
        self._taken.add(name)
        return name


def plan(found: GeneratedSet, settings: Settings) -> Plan:
    """The trials of a test on a set.

    Raises:
        ValueError: The settings do not suit each other or the set.
    """
    _check(found, settings)
    generator = np.random.default_rng(settings.seed)
    names = _Names(generator)
    order = [found.items[number] for number in generator.permutation(len(found.items))]
    items = order[: settings.trials]
    if settings.method == "mushra":
        return _mushra(found, settings, items, generator, names)
    systems = settings.systems or ("raw", "bridged")
    questions = tuple(settings.questions or QUESTIONS)
    uncaptioned = [item.name for item in order if not item.caption]
    if "fit" in questions and uncaptioned:
        raise ValueError(f"item {uncaptioned[0]} has no caption that a sound could fit; pass --questions quality")
    pairs = [Trial(names(), item, tuple(Stimulus(names(), system, item) for system in systems)) for item in items]
    repeated, single = pairs[: settings.repeats], pairs[settings.repeats :]
    catch = 2 if settings.catch is None else settings.catch
    # Items that are not compared come first, so that no trial gives its recording away.
    taken = [order[(len(items) + number) % len(order)] for number in range(catch)]
    caught = [_catch(item, found.items, generator, names) for item in taken]
    blocks: list[tuple[Trial, ...]] = [(trial, _turned(trial, names())) for trial in repeated]
    for row in (single, caught):
        first = int(generator.integers(2))
        turned = [_turned(one, one.id) if (number + first) % 2 else one for number, one in enumerate(row)]
        blocks += [tuple(turned[start : start + 2]) for start in range(0, len(turned), 2)]
    shuffled = tuple(blocks[number] for number in generator.permutation(len(blocks)))
    return Plan("ab", systems, questions, settings.ties, shuffled)


def _mushra(
    found: GeneratedSet, settings: Settings, items: list[GeneratedItem], generator: np.random.Generator, names: _Names
) -> Plan:
    compared = settings.systems or found.systems
    systems = (REFERENCE, *(name for name in found.systems if name in compared and name != REFERENCE))
    cutoffs = _anchors(settings)
    blocks = []
    for number, item in enumerate(items):
        stimuli = [Stimulus(names(), system, item) for system in systems]
        stimuli += [Stimulus(names(), anchor(cutoff), item, cutoff) for cutoff in cutoffs]
        shuffled = tuple(stimuli[place] for place in generator.permutation(len(stimuli)))
        # The open reference is a copy under a name of its own, so that the hidden one cannot be told by it.
        trial = Trial(names(), item, shuffled, reference=Stimulus(names(), REFERENCE, item))
        blocks.append((trial, _turned(trial, names())) if number < settings.repeats else (trial,))
    return Plan("mushra", (*systems, *map(anchor, cutoffs)), (), False, tuple(blocks))


def _turned(trial: Trial, name: str) -> Trial:
    return Trial(name, trial.item, trial.stimuli[::-1], trial.reference, trial.catch)


def _catch(
    item: GeneratedItem, items: tuple[GeneratedItem, ...], generator: np.random.Generator, names: _Names
) -> Trial:
    """The item's recording against another item's with noise: worse to any ear, and of another thing."""
    others = [
        other for other in items if other.caption != item.caption and (not item.label or other.label != item.label)
    ]
    if not others:
        raise ValueError(f"no item is unlike {item.name}, so that nothing could be caught by it; pass --catch 0")
    other = others[generator.integers(len(others))]
    return Trial(names(), item, (Stimulus(names(), REFERENCE, item), Stimulus(names(), FOIL, other)), catch=True)


def _anchors(settings: Settings) -> tuple[float, ...]:
    return (3500.0, 7000.0) if settings.anchors is None else settings.anchors


def _check(found: GeneratedSet, settings: Settings) -> None:
    if settings.method not in ("ab", "mushra"):
        raise ValueError(f"method is {settings.method!r}; choose ab or mushra")
    strange = {"ab": ("anchors",), "mushra": ("questions", "ties", "catch")}[settings.method]
    for name in strange:
        if getattr(settings, name) not in (None, False):
            raise ValueError(f"--{name} has no meaning with --method {settings.method}; leave it out")
    if settings.trials < 1:
        raise ValueError(f"trials is {settings.trials}; use 1 or more")
    if not found.items:
        raise ValueError(f"{found.folder} holds no items; generate a set of some")
    if not 0 <= settings.repeats <= min(settings.trials, len(found.items)):
        raise ValueError(f"repeats is {settings.repeats}; use 0 to the number of trials, {settings.trials} or less")
    if settings.seed < 0:
        raise ValueError(f"seed is {settings.seed}; use 0 or more")
    systems = settings.systems if settings.systems is not None else ("raw", "bridged")
    if settings.method == "ab" and (len(systems) != 2 or systems[0] == systems[1]):
        raise ValueError(f"systems are {' '.join(systems) or 'none'}; --method ab compares two different ones")
    asked = systems if settings.method == "ab" or settings.systems is not None else ()
    needed = (*asked, REFERENCE) if settings.method == "mushra" or settings.catch != 0 else asked
    for name in needed:
        if name not in SYSTEMS:
            raise ValueError(f"unknown system {name!r}; choose from {', '.join(SYSTEMS)}")
        if name not in found.systems:
            why = "" if name in asked else " (for the trials with a right answer: or pass --catch 0)"
            why = " (MUSHRA compares with it)" if why and settings.method == "mushra" else why
            raise ValueError(f"{found.folder} holds no system {name}{why}; it has {', '.join(found.systems)}")
    if settings.questions is not None:
        unknown = set(settings.questions) - set(QUESTIONS)
        if unknown or not settings.questions or len(set(settings.questions)) != len(settings.questions):
            raise ValueError(
                f"questions are {' '.join(settings.questions)}; choose from {', '.join(QUESTIONS)}, each once"
            )
    if settings.catch is not None and settings.catch < 0:
        raise ValueError(f"catch is {settings.catch}; use 0 or more")
    if settings.method == "mushra":
        for cutoff in _anchors(settings):
            if not 100 <= cutoff < found.sample_rate / 2:
                limit = f"half the sample rate, {found.sample_rate / 2:g} Hz"
                raise ValueError(f"anchors: {cutoff:g} Hz is not between 100 Hz and {limit}; pass other ones")
        if len(set(_anchors(settings))) != len(_anchors(settings)):
            raise ValueError("anchors hold one frequency twice; name each once")
