"""What a check found, and whether that is as it should be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["good", "warn", "bad"]

#: From best to worst.
VERDICTS: tuple[Verdict, ...] = ("good", "warn", "bad")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: Name of the check.
        subject: What was checked: a modality, a pair "audio, text" or a direction "text -> audio".
        verdict: "good"; "warn", worth a look; "bad", results built on this cannot be trusted.
        values: The figures the verdict rests on, and others that help to read them.
        threshold: When the check warns and when it fails.
        reason: Why there.
        fix: What to try; empty where nothing is wrong.
        examples: Ids of the rows that look worst.
        curves: Series for the plots, by name.
    """

    check: str
    subject: str
    verdict: Verdict
    values: dict[str, float]
    threshold: str
    reason: str
    fix: str = ""
    examples: tuple[str, ...] = ()
    curves: dict[str, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """ "check/subject"."""
        return f"{self.check}/{self.subject}"


def judge(problems: Iterable[tuple[bool, Verdict, str]]) -> tuple[Verdict, str]:
    """The worst verdict among the (is it so, its verdict, its fix) that are so, and their fixes."""
    found = [(verdict, fix) for so, verdict, fix in problems if so]
    worst = max((VERDICTS.index(verdict) for verdict, _ in found), default=0)
    return VERDICTS[worst], "; ".join(fix for _, fix in found)
