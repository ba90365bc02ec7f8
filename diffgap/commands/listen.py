"""``diffgap listen``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from diffgap.commands.arguments import Seed, Within
from diffgap.commands.console import open_console


def listen(
    generated: Annotated[Positional[Path | None], arg(metavar="SET")] = None,
    output: Annotated[Path | None, arg(aliases=["-o"])] = None,
    method: Literal["ab", "mushra"] = "ab",
    systems: tuple[str, ...] | None = None,
    trials: Annotated[int, Within(1, 10_000)] = 20,
    repeats: Annotated[int | None, Within(0, 10_000)] = None,
    seed: Seed = 0,
    questions: tuple[str, ...] | None = None,
    ties: bool = False,
    catch: Annotated[int | None, Within(0, 1_000)] = None,
    anchors: tuple[float, ...] | None = None,
    score: tuple[Path, ...] = (),
    key: Path | None = None,
) -> None:
    """Make a blind listening test of generated sounds, one page without a server; or score the answers to one.

    `diffgap listen SET -o page/` writes listen.html, for the listeners, and key.json, which says what they heard:
    keep it to yourself. `diffgap listen --score answers/*.json --key page/` counts what they sent back.

    Args:
        generated: Folder of `diffgap generate-set`.
        output: New folder of the test; with --score, folder of report.md and report.json.
        method: "ab" compares two systems side by side, with a forced choice (ISO 5495). "mushra" rates all systems from
            0 to 100 beside a hidden reference and low-passed anchors (after ITU-R BS.1534-3).
        systems: Systems that are compared; raw and bridged by default, with mushra all.
        trials: Items that are drawn; all if the set has fewer.
        repeats: Trials that come twice, to see how consistent listeners are; 2 by default.
        seed: Of the draw and the opaque names.
        questions: ab: fit (to the caption), quality; both by default.
        ties: ab: offer "no difference".
        catch: ab: trials with a right answer, which find listeners who guess; 2 by default.
        anchors: mushra: cut-off frequencies in Hz; 3500 and 7000 by default.
        score: Files of answers.
        key: key.json of the page that was answered, or its folder.
    """
    console = open_console()
    if bool(generated) == bool(score):
        raise ValueError("give a SET and -o FOLDER to make a page, or --score FILES and --key to score answers")
    if score:
        _score(console, score, key, output)
        return
    if generated is None or output is None or key is not None:
        raise ValueError("a page needs the folder that is to be made, -o FOLDER, and no --key")
    from diffgap.generation.generated import GeneratedSet
    from diffgap.listening.design import Settings
    from diffgap.listening.page import KEY, PAGE, write_test

    found = GeneratedSet.open(generated)
    again = min(2, trials, len(found.items)) if repeats is None else repeats
    settings = Settings(method, systems, trials, again, seed, questions, ties, catch, anchors)
    planned = write_test(found, output, settings)
    size = (output / PAGE).stat().st_size / 1e6
    made = f"{output / PAGE}: {len(list(planned.trials))} trials of {', '.join(planned.systems)}; {size:.1f} MB"
    console.print(made, markup=False, soft_wrap=True)
    said = f"send listeners that file alone; {output / KEY} tells the systems and is needed to score"
    console.print(said, markup=False, soft_wrap=True)


def _score(console: Console, files: tuple[Path, ...], key: Path | None, output: Path | None) -> None:
    from diffgap.listening import report
    from diffgap.listening.answers import read_key, read_sessions
    from diffgap.listening.score import score
    from diffgap.retrieval.report import check_output

    if key is None:
        raise ValueError("--score needs --key: the key.json that was written beside the page, or its folder")
    if output is not None:
        check_output(output)
    opened = read_key(key)
    scores = score(opened, read_sessions(files, opened))
    console.print(report.summary(scores), markup=False, soft_wrap=True)
    for table in report.tables(scores):
        console.print(table)
    if output is not None:
        report.write_scores(scores, output)
        console.print(f"written to {output}", markup=False, soft_wrap=True)
