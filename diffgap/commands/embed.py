"""``diffgap embed``: media into an embedding store."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from diffgap.commands.arguments import Device, Seed, Within
from diffgap.commands.console import open_console

if TYPE_CHECKING:
    from diffgap.embed.report import EmbedReport
    from diffgap.embed.work import Progress as Report

_LINE_SECONDS = 30.0


def embed(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    output: Annotated[Positional[Path], arg(metavar="OUTPUT")],
    audio: str | None = None,
    text: str | None = None,
    image: str | None = None,
    video: str | None = None,
    mel: str | None = None,
    format: Literal["folder", "manifest", "webdataset", "huggingface", "audiocaps", "clotho", "vggsound"] | None = None,
    media: Path | None = None,
    columns: dict[str, str] | None = None,
    whole: bool = False,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    split_seed: Seed = 0,
    batch_size: Annotated[int, Within(1, 1_000_000)] = 32,
    workers: Annotated[int | None, Within(0, 256)] = None,
    device: Device = "cpu",
    dtype: Literal["float32", "float16", "int8"] | None = None,
    limit: Annotated[int | None, Within(-math.inf, 2**62)] = None,
    overwrite: bool = False,
    keep_parts: bool = False,
) -> None:
    """Embed media into an embedding store. Run again to resume, at whatever moment it was interrupted.

    An encoder is `offline` (small, inside Python packages), `transformers:FOLDER`, `open-clip:MODEL:WEIGHTS`,
    `laion-clap:CHECKPOINT`, or your own as `package.module:Name`. What cannot be embedded is in failures.parquet, with
    the reason. Spectrograms beside the embeddings (`--mel`) are what `diffgap train-generator` learns from. Under
    `torchrun` or `accelerate launch` the processes share the work.

    Args:
        source: A folder; a .csv, .parquet or .jsonl manifest; a WebDataset; a folder of Hugging Face `datasets`; or
            "stamps", the media of the bundled data with their own encoders.
        output: Folder of the new store; parts are kept beside it, in OUTPUT.parts, until it is whole.
        audio: Encoder of recordings.
        text: Encoder of captions.
        image: Encoder of pictures.
        video: Encoder of videos.
        mel: Spectrograms of the recordings: `log-mel`, or `log-mel:vocos` for that vocoder's kind.
        format: What SOURCE is; recognised by itself, but for the files of the public data sets.
        media: Folder that the media are in, where it is not SOURCE; for "stamps", the extracted Debian package.
        columns: Columns of a manifest or of `datasets` that have names of their own: audio file text sentence ...
        whole: For AudioCaps and VGGSound: the media are whole videos, not yet the ten seconds.
        fractions: Shares of train, val and test, by a hash of the group, where SOURCE names no split.
        split_seed: Seed of that hash.
        batch_size: Media that an encoder takes at a time.
        workers: Processes that read media; the cores of this machine by default, at most 16.
        device: Where the encoders run: cpu, cuda, cuda:1 ... Of several processes each takes its own GPU.
        dtype: Number format of the store; float32 by default, and for "stamps" as bundled.
        limit: Embed the first items only.
        overwrite: Replace an existing output, and discard parts of a run with other settings.
        keep_parts: Leave the parts where they are.
    """
    from diffgap.data.items.limit import FirstItems
    from diffgap.embed.pipeline import embed_items

    given = {"audio": audio, "text": text, "image": image, "video": video, "mel": mel}
    specs = {modality: spec for modality, spec in given.items() if spec is not None}
    console = open_console(quiet=os.environ.get("RANK", "0") != "0")  # of a run's processes the first speaks
    with _shown(console) as progress:
        if source == "stamps":
            report = _embed_stamps(
                output, media, specs, dtype=dtype, limit=limit, batch_size=batch_size, workers=workers,
                overwrite=overwrite, keep_parts=keep_parts, progress=progress,
            )  # fmt: skip
        else:
            if not specs:
                raise ValueError(
                    "no encoder is given; name one for each modality, as in --audio offline --text offline"
                )
            from diffgap.data.items.heard import HeardItems
            from diffgap.data.items.listing import list_items
            from diffgap.data.items.shown import ShownItems
            from diffgap.encoders.registry import build_encoder, check_spaces

            listed = list_items(
                source, format=format, media=media, modalities=_listed(specs), columns=columns, whole=whole,
                split=fractions, split_seed=split_seed,
            )  # fmt: skip
            place = Path(source)
            shown = ShownItems(listed, media or (place if place.is_dir() else place.parent))
            items = HeardItems(shown) if mel is not None else shown
            encoders = {modality: build_encoder(modality, spec, _own(device)) for modality, spec in specs.items()}
            check_spaces(encoders)
            report = embed_items(
                items if limit is None else FirstItems(items, limit), encoders, output, batch_size=batch_size,
                workers=workers, dtype=dtype, overwrite=overwrite, keep_parts=keep_parts, progress=progress,
            )  # fmt: skip
    if report is not None:
        _summarize(report, console)


def _listed(specs: dict[str, str]) -> tuple[str, ...]:
    """The modalities of the media; a spectrogram is of a recording."""
    return tuple(dict.fromkeys("audio" if modality == "mel" else modality for modality in specs))


def _embed_stamps(
    output: Path, media: Path | None, specs: dict[str, str], *, dtype: str | None, **options: object
) -> EmbedReport | None:
    from diffgap.data.items.stamps import HOW_TO_GET
    from diffgap.embed.stamps import embed_stamps

    mel = specs.pop("mel", None)
    if specs or dtype is not None:
        raise ValueError(
            'SOURCE "stamps" has encoders and number formats of its own; leave --audio, --text, --image, --video and '
            "--dtype out, or give the folder of the media as SOURCE"
        )
    if media is None:
        raise ValueError(
            f"--media is not given, the folder of the extracted package; get it with: {HOW_TO_GET} (or `make media`)"
        )
    return embed_stamps(media, output, mel=mel, **options)  # type: ignore[arg-type]


def _own(device: str) -> str:
    """Of several processes on a machine each takes the GPU of its number."""
    local = os.environ.get("LOCAL_RANK")
    return device if device != "cuda" or local is None else f"cuda:{local}"


class _Rate(ProgressColumn):
    """Media a second since the run began, those of an earlier run not counted."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["rate"])


@contextmanager
def _shown(console: Console) -> Iterator[Report]:
    """What shows how far the work is: a bar on a terminal, else a line every half a minute."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[failed]}"), console=console, disable=not sys.stderr.isatty())
    first: int | None = None
    began = last = 0.0
    with bar:
        task = bar.add_task("embedding", total=None, rate="", failed="")

        def progress(done: int, total: int, failed: int) -> None:
            nonlocal first, began, last
            now = time.monotonic()
            if first is None:
                first, began, last = done, now, now
            rate = (done - first) / (now - began) if now > began else 0.0
            said, lost = f"{rate:.1f}/s", f"{failed} failed" if failed else ""
            bar.update(task, completed=done, total=total, rate=said, failed=lost)
            if bar.disable and now - last >= _LINE_SECONDS:
                last = now
                left = f", {(total - done) / rate:.0f} s left" if rate else ""
                console.print(f"{done}/{total} media, {said}{left}{', ' + lost if lost else ''}", highlight=False)

        yield progress


def _summarize(report: EmbedReport, console: Console) -> None:
    """Rows, rates, failures by reason, and what the item list has to say."""
    table = Table("modality", "embeddings", "encoded now", "media/s in the encoder")
    for modality, count in report.embeddings.items():
        encoded, seconds = report.encoded.get(modality, 0), report.encode_seconds.get(modality, 0.0)
        table.add_row(modality, str(count), str(encoded), f"{encoded / seconds:.1f}" if seconds else "")
    console.print(table)
    if report.failures:
        table = Table("modality", "failure", "items")
        for (modality, reason), count in sorted(report.failures.items(), key=lambda pair: -pair[1]):
            table.add_row(modality, reason, str(count))
        console.print(table)
        console.print(f"each with its message in {report.output / 'failures.parquet'}", markup=False, soft_wrap=True)
    for line in report.notes:
        console.print(f"- {line}", markup=False, soft_wrap=True)
    for line in report.warnings:
        console.print(Text(f"warning: {line}", style="bold red"), soft_wrap=True)
    media = sum(report.encoded.values())
    lost = f", {report.left_out} left out" if report.left_out else ""
    console.print(
        f"{report.rows} rows of {report.items} items{lost}; {media} media in {report.seconds:.1f} s, "
        f"{media / report.seconds:.1f}/s; store in {report.output}",
        markup=False,
        soft_wrap=True,
    )
