"""Recordings, a store with their spectrograms, a bridge and a generator trained on it: all small, all real files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffgap.data.media.text import TextReader
from diffgap.generation.mel import MelSettings
from diffgap.generation.trainer import GeneratorData, GeneratorRunConfig, GeneratorSettings
from diffgap.training.config import TrainConfig
from tests.helpers import run
from tests.search.conftest import write_tone
from tests.search.encoders import Words
from tests.synthetic import make_config

MEL = MelSettings(sample_rate=8000, n_fft=256, hop=80, bands=8, high=4000)
MEL_SPEC = "log-mel?sample_rate=8000&n_fft=256&hop=80&bands=8&high=4000"
WORDS, TONES = "tests.generation.studio:Captions", "tests.search.encoders:Tones"


class Captions(Words):
    """Texts, in files too."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = TextReader()


@dataclass(frozen=True)
class Studio:
    """Folders: media, the store, a bridge's run and a generator's."""

    media: Path
    store: Path
    bridge: Path
    generator: Path


def make_studio(folder: Path) -> Studio:
    """Tones of 0.1 to 0.3 s with captions: 16 to train on, 8 to validate on, 8 to test."""
    made = Studio(folder / "media", folder / "store", folder / "bridge", folder / "generator")
    for number, split in enumerate(["train"] * 16 + ["val"] * 8 + ["test"] * 8):
        place = made.media / split / f"{number:02}"
        write_tone(place.with_suffix(".wav"), 300 + 40 * number, 0.1 + 0.025 * (number % 9))
        place.with_suffix(".txt").write_text(f"a tone, number {number}")
    spoken = ["--audio", TONES, "--text", WORDS, "--mel", MEL_SPEC, "--workers", "0"]
    assert run("embed", made.media, made.store, *spoken) == 0
    make_config(made.store, steps=2).save(folder / "bridge.yaml")
    only = ["--data.modalities", "audio", "text"]
    assert run("train", made.bridge, "--config", folder / "bridge.yaml", *only) == 0
    GeneratorRunConfig(
        data=GeneratorData(str(made.store), bridge=str(made.bridge)),
        generator=GeneratorSettings(sampling_steps=2),
        train=TrainConfig(steps=2, batch_size=8, warmup_steps=1, eval_every=2, checkpoint_every=2),
    ).save(folder / "generator.yaml")
    assert run("train-generator", made.generator, "--config", folder / "generator.yaml") == 0
    return made
