"""The key of a listening test, and the answers of its listeners: read, and refused where they do not belong."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffgap.listening.design import Method
from diffgap.listening.page import ANSWERS_FORMAT, KEY, KEY_FORMAT

__all__ = ["TIE", "Answered", "Key", "KeyTrial", "Session", "read_key", "read_sessions"]

TIE = "tie"
"""The answer "no difference", beside the opaque names of the sounds."""

_PARTICIPANT = re.compile(r"[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True)
class KeyTrial:
    """What a trial compared: ``systems`` by the opaque names of their sounds."""

    item: str
    catch: bool
    systems: dict[str, str]
    reference: str | None


@dataclass(frozen=True)
class Key:
    """An opened key.json."""

    digest: str
    method: Method
    systems: tuple[str, ...]
    questions: tuple[str, ...]
    ties: bool
    trials: dict[str, KeyTrial]


@dataclass(frozen=True)
class Answered:
    """One trial of one listener.

    Attributes:
        trial: Of the key.
        order: Opaque names in the order in which they were shown.
        choices: "ab": the chosen sound's name or :data:`TIE`, by question.
        scores: "mushra": 0 to 100, by the sound's name.
        plays: How often the listener turned to any of its sounds.
        seconds: That the trial was on the screen.
    """

    trial: KeyTrial
    order: tuple[str, ...]
    choices: dict[str, str]
    scores: dict[str, float]
    plays: int
    seconds: float


@dataclass(frozen=True)
class Session:
    """All answers of one listener, in the order in which they were given."""

    participant: str
    answers: tuple[Answered, ...]


def read_key(path: Path) -> Key:
    """The key in a file, or in the folder of the page.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged or of another version.
    """
    file = path / KEY if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; --key takes the {KEY} that `diffgap listen SET -o` wrote")
    content = _json(file, KEY_FORMAT, f"give the {KEY} that belongs to the page")
    try:
        trials = {
            one["id"]: KeyTrial(one["item"], bool(one["catch"]), dict(one["stimuli"]), one["reference"])
            for one in content["trials"]
        }
        systems, questions = tuple(content["systems"]), tuple(content["questions"])
        return Key(content["digest"], content["method"], systems, questions, bool(content["ties"]), trials)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a whole key ({error!r}); give the {KEY} that belongs to the page") from error


def read_sessions(files: Sequence[Path], key: Key) -> list[Session]:
    """The answers in the files, one a listener, sorted by participant.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is damaged, incomplete, of another page, or the second of one participant.
    """
    sessions: dict[str, Session] = {}
    sources: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; --score takes the files that the page saved")
        session = _session(file, key)
        name = session.participant
        if name in sessions:
            raise ValueError(f"{file} and {sources[name]} are both of participant {name}; give one of them")
        sessions[name], sources[name] = session, file
    return [sessions[name] for name in sorted(sessions)]


def _json(file: Path, expected: str, fix: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}); {fix}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != expected:
        raise ValueError(f"{file} is of format {found!r}, not {expected!r}; {fix}")
    return dict(content)


def _session(file: Path, key: Key) -> Session:
    content = _json(file, ANSWERS_FORMAT, "give a file that the page saved")
    if content.get("digest") != key.digest:
        raise ValueError(f"{file} answers another page than the key's; leave it out or give the key of its page")
    try:
        participant, trials = content["participant"], content["trials"]
        if not _PARTICIPANT.fullmatch(participant):
            raise ValueError(f"participant {participant!r}")
        names = [one["trial"] for one in trials]
        if sorted(names) != sorted(key.trials):
            raise ValueError(f"{len(names)} trials, and not each of the page's {len(key.trials)} once")
        return Session(participant, tuple(_answered(one, key) for one in trials))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} does not hold whole answers ({error!r}); ask the listener to save them again"
        ) from error


def _answered(one: dict[str, Any], key: Key) -> Answered:
    trial, answers = key.trials[one["trial"]], one["answers"]
    order, stimuli = tuple(one["order"]), sorted(trial.systems)
    if sorted(order) != stimuli:
        raise ValueError(f"trial {one['trial']} showed other sounds")
    heard = [*stimuli, *([trial.reference] if trial.reference else [])]
    if any(one["plays"].get(name, 0) < 1 for name in heard):
        raise ValueError(f"trial {one['trial']} was answered before each sound was heard")
    plays, seconds = sum(map(int, one["plays"].values())), float(one["seconds"])
    if key.method == "mushra":
        scores = {name: answers[name] for name in stimuli}
        if not all(type(score) in (int, float) and 0 <= score <= 100 for score in scores.values()):
            raise ValueError(f"trial {one['trial']} has scores outside of 0 to 100")
        return Answered(trial, order, {}, {name: float(score) for name, score in scores.items()}, plays, seconds)
    choices = {question: answers[question] for question in key.questions}
    allowed = {*stimuli, *([TIE] if key.ties else [])}
    if not allowed.issuperset(choices.values()):
        raise ValueError(f"trial {one['trial']} has an answer that the page does not offer")
    return Answered(trial, order, choices, {}, plays, seconds)
