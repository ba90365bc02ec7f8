"""What the answers of a listening test say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from diffgap.generation.generated import REFERENCE, SYSTEMS
from diffgap.listening.answers import TIE, Answered, Key, Session
from diffgap.listening.statistics import SignTest, crossed_bootstrap, preference_interval, sign_test
from diffgap.retrieval.bootstrap import Interval

__all__ = ["MOST_FAILED", "Comparison", "Listener", "Preference", "Rating", "Scores", "score"]

Floats = npt.NDArray[np.float64]
Matrix = Callable[[Callable[[Answered], float]], Floats]

MOST_FAILED = 0.15
"""Share of failed checks above which a listener is not counted: ITU-R BS.1534-3, 4.1.2, for its hidden reference."""

_REFERENCE_LEAST = 90.0


@dataclass(frozen=True)
class Listener:
    """How one participant worked.

    Attributes:
        participant: The code that they typed.
        minutes: On all trials together.
        plays: How often they turned to a sound.
        checks: "ab": answers to trials with a right answer; "mushra": ratings of the hidden reference.
        failed: Wrong answers; hidden references rated below 90.
        excluded: Whether more than :data:`MOST_FAILED` of the checks failed.
        repeats: Answers or ratings that were asked for twice.
        agreement: "ab": the share of them that agree; "mushra": the mean difference, in points. None without repeats.
    """

    participant: str
    minutes: float
    plays: int
    checks: int
    failed: int
    excluded: bool
    repeats: int
    agreement: float | None


@dataclass(frozen=True)
class Preference:
    """Answers to one question of an A/B test: ``share`` is for the second system; a tie counts half.

    ``answers`` takes all answers as independent; ``participants`` and ``items`` count each listener and each item once,
    by the side that most of its answers take.
    """

    question: str
    systems: tuple[str, str]
    share: Interval
    answers: SignTest
    participants: SignTest
    items: SignTest
    first_side: float


@dataclass(frozen=True)
class Rating:
    """Scores of one system of a MUSHRA test."""

    system: str
    mean: Interval
    median: float


@dataclass(frozen=True)
class Comparison:
    """Scores of one system less those of another, by the same listener for the same item; sign tests as above."""

    systems: tuple[str, str]
    difference: Interval
    answers: SignTest
    participants: SignTest
    items: SignTest


@dataclass(frozen=True)
class Scores:
    """The result. ``participants`` and ``trials`` are those that count: without excluded ones, checks and repeats."""

    method: str
    digest: str
    participants: int
    items: int
    trials: int
    listeners: tuple[Listener, ...]
    preferences: tuple[Preference, ...]
    ratings: tuple[Rating, ...]
    comparisons: tuple[Comparison, ...]


def score(key: Key, sessions: Sequence[Session]) -> Scores:
    """Counts the answers.

    The first of two presentations of a trial counts; the second only says how consistent the listener is.

    Raises:
        ValueError: No sessions, or none that is not excluded.
    """
    if not sessions:
        raise ValueError("there are no answers to score; give the files that the page saved after --score")
    listeners = tuple(_listener(key, session) for session in sessions)
    counted = [session for session, one in zip(sessions, listeners, strict=True) if not one.excluded]
    if not counted:
        names = ", ".join(one.participant for one in listeners)
        raise ValueError(
            f"no participant is left: {names} failed more than {MOST_FAILED:.0%} of their checks; "
            "ask more listeners, and see that they can hear the sounds well"
        )
    first = [_presentations(session)[0] for session in counted]
    items = sorted({trial.item for trial in key.trials.values() if not trial.catch})
    size = len(counted), len(items)

    def matrix(value: Callable[[Answered], float]) -> Floats:
        """(participants, items) of a value of each trial."""
        return np.array([[value(answers[item]) for item in items] for answers in first])

    preferences = tuple(_preference(key, question, matrix) for question in key.questions)
    ratings, comparisons = _ratings(key, matrix) if key.method == "mushra" else ((), ())
    return Scores(key.method, key.digest, *size, size[0] * size[1], listeners, preferences, ratings, comparisons)


def _presentations(session: Session) -> tuple[dict[str, Answered], dict[str, Answered]]:
    """First and second answers by item, without catch trials."""
    first: dict[str, Answered] = {}
    second: dict[str, Answered] = {}
    for answered in session.answers:
        if not answered.trial.catch:
            (second if answered.trial.item in first else first)[answered.trial.item] = answered
    return first, second


def _listener(key: Key, session: Session) -> Listener:
    first, second = _presentations(session)
    pairs = [(first[item], again) for item, again in second.items()]
    if key.method == "ab":
        caught = [one for one in session.answers if one.trial.catch]
        passed = [_chosen(one, question) == REFERENCE for one in caught for question in key.questions]
        alike = [float(_chosen(a, name) == _chosen(b, name)) for a, b in pairs for name in key.questions]
    else:
        passed = [_score_of(REFERENCE)(one) >= _REFERENCE_LEAST for one in session.answers]
        alike = [abs(a.scores[name] - b.scores[name]) for a, b in pairs for name in a.scores]
    failed = passed.count(False)
    return Listener(
        session.participant, sum(one.seconds for one in session.answers) / 60,
        sum(one.plays for one in session.answers),
        len(passed), failed, failed > MOST_FAILED * len(passed), len(alike), float(np.mean(alike)) if alike else None,
    )  # fmt: skip


def _chosen(answered: Answered, question: str) -> str:
    choice = answered.choices[question]
    return TIE if choice == TIE else answered.trial.systems[choice]


def _score_of(system: str) -> Callable[[Answered], float]:
    return lambda one: next(value for name, value in one.scores.items() if one.trial.systems[name] == system)


def _preference(key: Key, question: str, matrix: Matrix) -> Preference:
    a, b = key.systems
    second = matrix(lambda one: {a: 0.0, TIE: 0.5, b: 1.0}[_chosen(one, question)])
    side = matrix(lambda one: {one.order[0]: 1.0, TIE: 0.5}.get(one.choices[question], 0.0))
    return Preference(question, (a, b), preference_interval(second), *_sign_tests(second - 0.5), float(side.mean()))


def _ratings(key: Key, matrix: Matrix) -> tuple[tuple[Rating, ...], tuple[Comparison, ...]]:
    scores = {system: matrix(_score_of(system)) for system in key.systems}
    ratings = (Rating(name, crossed_bootstrap(one), float(np.median(one))) for name, one in scores.items())
    compared = [name for name in key.systems if name in SYSTEMS]
    differences = {(a, b): scores[a] - scores[b] for a, b in combinations(compared, 2)}
    comparisons = (Comparison(pair, crossed_bootstrap(one), *_sign_tests(one)) for pair, one in differences.items())
    return tuple(ratings), tuple(comparisons)


def _sign_tests(values: Floats) -> tuple[SignTest, SignTest, SignTest]:
    """Of all answers, of the participants' means, and of the items'."""
    return sign_test(values), sign_test(values.mean(1).round(9)), sign_test(values.mean(0).round(9))
