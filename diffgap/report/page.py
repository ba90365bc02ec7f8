"""The page: its sections in their order, and the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from diffgap._files import atomic_file, check_output_file, check_writable
from diffgap.generation.generated import GeneratedSet
from diffgap.generation.trainer import GeneratorRunConfig
from diffgap.report.audio_metrics import audio_metrics
from diffgap.report.bridge import gap, observe, trajectories
from diffgap.report.diagnosis import diagnosis
from diffgap.report.html import Section, element, joined, paragraph
from diffgap.report.overview import load_config, overview
from diffgap.report.retrieval import retrieval
from diffgap.report.sounds import sounds
from diffgap.report.training import training
from diffgap.training.config import RunConfig
from diffgap.training.runs import load_data, load_run

__all__ = ["ReportOptions", "check_output", "write_report"]

#: By this a page is known for one that may be replaced.
_MARK = '<meta name="generator" content="diffgap report">'


@dataclass(frozen=True)
class ReportOptions:
    """What is computed and shown.

    Attributes:
        split: Rows for the gap and the trajectories.
        pairs: At most so many for each direction.
        items: Generated sounds shown, at most.
        systems: Those of the set that are shown; all if empty.
        megabytes: Of sound and spectrograms in the page, at most.
        seed: Of samples, and of the items that are drawn.
    """

    split: str = "test"
    pairs: int = 256
    items: int = 12
    systems: tuple[str, ...] = ()
    megabytes: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("pairs", 2), ("items", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; use {least} or more")
        if not self.megabytes > 0:
            raise ValueError(f"megabytes is {self.megabytes}; use a positive number")


def check_output(file: Path, *, overwrite: bool = False) -> None:
    """Whether the page may be written to ``file``: nothing is there, or an earlier page.

    Raises:
        FileExistsError: Something else is there, and ``overwrite`` is false; or a folder or a device.
        ValueError: Nothing can be written there.
    """
    check_writable(file.parent, file)
    if file.is_dir():
        raise FileExistsError(f"{file} is a folder; name a file for the page, e.g. {file / 'report.html'}")
    check_output_file(file)
    if file.exists() and not overwrite:
        with file.open("rb") as content:
            head = content.read(1000)
        if _MARK.encode() not in head:
            raise FileExistsError(f"{file} exists and is no page of this command; choose another, or pass --overwrite")


def write_report(
    run: Path,
    file: Path,
    *,
    generated: Path | None = None,
    options: ReportOptions | None = None,
    overwrite: bool = False,
) -> list[Section]:
    """Make the page of a run folder, whole or not at all.

    Args:
        run: Run folder of ``diffgap train`` or ``diffgap train-generator``.
        file: The page.
        generated: Folder of a :class:`GeneratedSet`.
        options: What is computed and shown.
        overwrite: Replace ``file`` whatever it is.

    Returns:
        Its sections.

    Raises:
        FileNotFoundError: Not a run folder, or no set.
        FileExistsError: See :func:`check_output`.
        ValueError: A file of the run or the set is damaged, or an option does not suit them.
        ModuleNotFoundError: A package that shows sounds is missing.
    """
    check_output(file, overwrite=overwrite)
    config = load_config(run)
    sounding = None if generated is None else GeneratedSet.open(generated)
    found = list(_sections(run, config, sounding, options or ReportOptions()))
    with atomic_file(file) as temporary:
        temporary.write_text(_page(run.resolve().name, found), encoding="utf-8")
    return found


def _sections(
    run: Path, config: RunConfig | GeneratorRunConfig, generated: GeneratedSet | None, options: ReportOptions
) -> Iterator[Section]:
    yield overview(run, config)
    if isinstance(config, RunConfig):
        yield training(run, "bridge")
        yield retrieval(run)
        yield from _bridged(run, options)
        yield diagnosis(run)
    else:
        yield training(run, "generator")
    if generated is None:
        generator = "GENERATOR" if isinstance(config, RunConfig) else run
        body = paragraph(
            f"None were named. Make some with `diffgap generate-set --generator {generator} -o SET` and give "
            "`--generated SET`."
        )
        yield Section("sounds", "Sounds", body)
        return
    yield sounds(
        generated, count=options.items, systems=options.systems, megabytes=options.megabytes, seed=options.seed
    )
    yield audio_metrics(generated.folder)


def _bridged(run: Path, options: ReportOptions) -> Iterator[Section]:
    """What the model itself shows; where it or its data are not there any more, the reason."""
    titles = {"gap": "The gap", "trajectories": "Sampling trajectories"}
    try:
        bridge, config = load_run(run)
        store = load_data(config.data)
    except FileNotFoundError as error:
        for name, title in titles.items():
            yield Section(name, title, element("p", f"Not computed: {error}."))
        return
    observed = observe(bridge, store.split(options.split), count=options.pairs, seed=options.seed)
    yield gap(observed, options.split, seed=options.seed)
    yield trajectories(observed, options.split, bridge.settings.solver)


def _page(name: str, sections: list[Section]) -> str:
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    links = (element("li", element("a", section.title, href=f"#{section.name}")) for section in sections)
    bodies = (
        element("section", element("h2", section.title, id=f"{section.name}-title"), section.body,
                id=section.name, aria_labelledby=f"{section.name}-title")
        for section in sections
    )  # fmt: skip
    return template.substitute(
        mark=_MARK, title=escape(f"{name}: diffgap report"), links=joined(links), body=joined(bodies)
    )
