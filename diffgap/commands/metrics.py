"""``diffgap metrics``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from diffgap.commands.arguments import Device, Seed, Within
from diffgap.commands.console import open_console

if TYPE_CHECKING:
    from diffgap.generation.generated import GeneratedItem

__all__ = ["metrics"]


def metrics(
    generated: Annotated[Positional[Path], arg(metavar="SET|FOLDER")],
    backbone: tuple[str, ...] = ("mel", "offline"),
    reference: Path | None = None,
    text: str | None = None,
    classifier: Path | None = None,
    column: str | None = None,
    regularisation: Annotated[float, Within(1e-12)] = 1.0,
    output: Path | None = None,
    splits: Annotated[int, Within(1)] = 10,
    skip_broken: bool = False,
    cache: Path | None = None,
    confidence: float = 0.95,
    resamples: Annotated[int, Within(2, 1_000_000)] = 500,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Measure generated sounds: each system of `diffgap generate-set`, or a folder, against the real recordings.

    Distances of the sets (Frechet, kernel) and of each sound from its own recording (mel distance in dB, cosine and
    recall of the recording by a backbone's features), with a classifier Inception score, KL divergence and agreement
    with the labels, with a text tower CLAP score and recall of the caption. Each figure with backbone, number of
    sounds and sample rate, with an interval; bridged against raw and against unconditional sounds with paired
    differences. Writes metrics.json and metrics.md.

    Args:
        generated: Set of `diffgap generate-set`, or a folder of sounds.
        backbone: Networks that listen: `mel` (spectra, no network), `offline`, `offline:aisfx`, `transformers:FOLDER`,
            `laion-clap:CHECKPOINT`, `panns:CHECKPOINT`, `vggish:CHECKPOINT`, or your own as `package.module:Name`.
        reference: Folder of the recordings, for a folder of sounds; what has the same name is a pair.
        text: Text encoder that shares its space with a backbone, for a set's captions: CLAP score and recall.
        classifier: What a linear classifier on the backbones' features learns from: an embedding store made by the same
            encoder (its train rows), or a .csv with columns "file" and "id" (that of the store; by default the file).
            Recordings of the set are left out, by their ids.
        column: Its column of labels; by default the set's own, or "label".
        regularisation: Of the classifier: inverse strength of the L2 penalty.
        output: Folder for metrics.json and metrics.md; the set's own by default.
        splits: Of the Inception score.
        skip_broken: Leave out items of which a sound is silent or cannot be read, instead of stopping.
        cache: Folder that keeps what backbones say of a sound, by its content, from one call to the next.
        confidence: Of the intervals.
        resamples: Replicates for the intervals.
        seed: Of the replicates.
        device: Where the backbones run, but the offline ones.
    """
    from diffgap.generation.metrics.backbone import build_backbone
    from diffgap.generation.metrics.conditions import Conditions
    from diffgap.generation.metrics.fitting import with_classifier
    from diffgap.generation.metrics.resampling import check_options
    from diffgap.generation.metrics.systems import check_output, evaluate_systems

    if not backbone:
        raise ValueError("backbone is empty; name at least one, as in --backbone mel offline")
    if column is not None and classifier is None:
        raise ValueError("column is one of --classifier; name the store or the .csv, or leave --column out")
    check_options(confidence, resamples)
    folder = output or generated
    check_output(folder)
    items, systems, recordings, about = _opened(generated, reference)
    if text is not None and (without := sum(not item.caption for item in items) or not items):
        raise ValueError(f"--text needs captions: {without if items else 'all'} sounds of {generated} have none")
    backbones = [build_backbone(spec, device) for spec in backbone]
    conditions = None
    if text is not None:
        from diffgap.encoders.registry import build_encoder

        tower = build_encoder("text", text, device)
        if not any(tower.space and tower.space == one.space for one in backbones):
            raise ValueError(f"--text {text} shares its space with no backbone; name the audio tower of its checkpoint")
        conditions = Conditions.encode({item.name: item.caption for item in items}, tower)
    labels = {item.name: item.label for item in items if item.label} or None
    if labels is not None and len(labels) < len(items):
        raise ValueError(f"{len(items) - len(labels)} of {len(items)} items of {generated} have no label, others have")
    if classifier is not None:
        column = column or str(about.get("label") or "label")
        backbones = with_classifier(
            backbones, classifier, column, recordings=recordings or (), ids=[item.id for item in items],
            regularisation=regularisation, cache=cache,
        )  # fmt: skip
    report = evaluate_systems(
        systems, recordings, backbones=backbones, conditions=conditions, labels=labels, splits=splits,
        skip_broken=skip_broken, cache=cache, confidence=confidence, resamples=resamples, seed=seed,
        about={
            "generated": generated.resolve().name, "backbones": ", ".join(backbone),
            **({} if classifier is None else {"classifier": f"{column} of {classifier.resolve().name}"}),
            **({} if text is None else {"captions by": text}),
        },
    )  # fmt: skip
    report.write(folder)
    console = open_console()
    for table in report.tables():
        console.print(table)
    console.print(f"intervals and notes in {folder / 'metrics.md'}", markup=False, soft_wrap=True)


def _opened(
    generated: Path, reference: Path | None
) -> tuple[tuple[GeneratedItem, ...], dict[str, list[Path]], list[Path] | None, dict[str, Any]]:
    """Items, files by system, recordings and what made them, of a set or a folder."""
    from diffgap.generation.generated import REFERENCE, GeneratedSet
    from diffgap.generation.metrics.clips import AUDIO_SUFFIXES

    def sounds(folder: Path, name: str) -> list[Path]:
        if not folder.is_dir():
            raise FileNotFoundError(f"{name}: folder {folder} does not exist")
        return sorted(file for file in folder.iterdir() if file.suffix.lower() in AUDIO_SUFFIXES)

    if not (generated / "set.json").is_file():
        found = sounds(generated, "generated")
        if not found:
            raise ValueError(f"{generated} holds no set of `diffgap generate-set` and no sounds")
        return (), {"generated": found}, None if reference is None else sounds(reference, "reference"), {}
    if reference is not None:
        raise ValueError(f"{generated} is a set with recordings of its own; leave --reference out")
    opened = GeneratedSet.open(generated)
    if not opened.items:
        raise ValueError(f"{generated} holds no items; generate it again")
    files = {name: [opened.path(name, item) for item in opened.items] for name in opened.systems}
    recordings = files.pop(REFERENCE, None)
    if not files:
        raise ValueError(f"{generated} holds recordings only; generate it with --how bridged raw none")
    return opened.items, files, recordings, opened.about
