"""The page of a listening test, and its key.

``listen.html`` holds everything that a listener needs, sounds included, and opens without a server or a network.
``key.json`` says which system each sound is of; it stays with whoever runs the test.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from diffgap._files import atomic_folder, check_writable
from diffgap.generation.generated import REFERENCE, GeneratedSet
from diffgap.listening.design import FOIL, QUESTIONS, Plan, Settings, Stimulus, Trial, plan
from diffgap.listening.stimuli import Floats, level, low_pass, noisy, pcm16, read_wave

__all__ = ["ANSWERS_FORMAT", "KEY", "KEY_FORMAT", "PAGE", "write_test"]

PAGE, KEY = "listen.html", "key.json"
ANSWERS_FORMAT, KEY_FORMAT = "diffgap-listening-answers/1", "diffgap-listening-key/1"


def write_test(found: GeneratedSet, folder: Path, settings: Settings) -> Plan:
    """Makes ``folder`` with the page and the key of a test; the same settings and set give the same files.

    Raises:
        FileExistsError: ``folder`` exists: a new key would leave the answers to the old page without one.
        ValueError: The settings do not suit the set, sounds are damaged, or nothing can be written there.
    """
    check_writable(folder.parent, folder)
    if folder.exists():
        raise FileExistsError(
            f"{folder} exists; choose another folder: answers to a page are worthless without its key"
        )
    planned = plan(found, settings)
    page = _content(found, planned, settings.seed)
    with atomic_folder(folder) as temporary:
        (temporary / PAGE).write_text(_html(page), encoding="utf-8")
        key = json.dumps(_key(found, planned, page["digest"]), indent=1, ensure_ascii=False)
        (temporary / KEY).write_text(key, encoding="utf-8")
    return planned


def _content(found: GeneratedSet, planned: Plan, seed: int) -> dict[str, Any]:
    """All that the page shows and plays. Its digest tells answers to this page from answers to any other."""
    content = {
        "format": ANSWERS_FORMAT,
        "method": planned.method,
        "questions": [{"id": name, "text": QUESTIONS[name]} for name in planned.questions],
        "ties": planned.ties,
        "sample_rate": found.sample_rate,
        "blocks": [[_shown(trial) for trial in block] for block in planned.blocks],
        "sounds": _sounds(found, planned, seed),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"digest": digest, **content}


def _shown(trial: Trial) -> dict[str, Any]:
    return {
        "id": trial.id,
        "caption": trial.item.caption,
        "stimuli": [stimulus.id for stimulus in trial.stimuli],
        "reference": trial.reference.id if trial.reference else None,
    }


def _sounds(found: GeneratedSet, planned: Plan, seed: int) -> dict[str, str]:
    """Base64 of 16-bit samples of each stimulus, in the order of their opaque names, which says nothing."""
    sounds: dict[str, str] = {}
    for trial in planned.trials:
        stimuli = [*trial.stimuli, *([trial.reference] if trial.reference else [])]
        if stimuli[0].id in sounds:
            continue  # a repeat
        waves = level([_wave(found, stimulus, seed) for stimulus in stimuli], found.sample_rate)
        for stimulus, wave in zip(stimuli, waves, strict=True):
            sounds[stimulus.id] = base64.b64encode(pcm16(wave)).decode("ascii")
    return dict(sorted(sounds.items()))


def _wave(found: GeneratedSet, stimulus: Stimulus, seed: int) -> Floats:
    recorded = stimulus.cutoff is not None or stimulus.system == FOIL
    wave = read_wave(found.path(REFERENCE if recorded else stimulus.system, stimulus.item), found.sample_rate)
    if stimulus.system == FOIL:
        return noisy(wave, np.random.default_rng([seed, int(stimulus.id, 16)]))
    return wave if stimulus.cutoff is None else low_pass(wave, found.sample_rate, stimulus.cutoff)


def _key(found: GeneratedSet, planned: Plan, digest: str) -> dict[str, Any]:
    return {
        "format": KEY_FORMAT,
        "digest": digest,
        "method": planned.method,
        "systems": planned.systems,
        "questions": planned.questions,
        "ties": planned.ties,
        "source": found.source,
        "about": found.about,
        "trials": [
            {
                "id": trial.id,
                "item": trial.item.name,
                "caption": trial.item.caption,
                "catch": trial.catch,
                "stimuli": {stimulus.id: stimulus.system for stimulus in trial.stimuli},
                "reference": trial.reference.id if trial.reference else None,
            }
            for trial in planned.trials
        ],
    }


def _html(content: dict[str, Any]) -> str:
    """The page with its style, script and data inside, and a policy that lets nothing else run or be loaded."""
    template, style, script = (
        (files(__package__) / f"page.{ending}").read_text(encoding="utf-8") for ending in ("html", "css", "js")
    )
    # "</script>" and "<!--" in a caption would end or change the element that holds the data.
    data = json.dumps(content).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    parts = {"POLICY": html.escape(policy, quote=False), "STYLE": style, "DATA": data, "SCRIPT": script}
    return "".join(parts.get(piece, piece) for piece in template.split("%%"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
