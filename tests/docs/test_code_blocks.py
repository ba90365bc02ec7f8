"""Every code block of the README and the documentation does what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.docs.blocks import ROOT, Session, check, read_blocks

_DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
_DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """A session in an empty folder; one thread, since two of a busy machine wait for one another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield Session("page.md", tmp_path)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_blocks_run(document: Path, session: Session) -> None:
    found = read_blocks(document.read_text(encoding="utf-8"))
    for module in found.needs:
        pytest.importorskip(module)
    session.name = str(document.relative_to(ROOT))
    for block in found.blocks:
        session.run(block)


def run(session: Session, text: str) -> None:
    for block in read_blocks(text).blocks:
        session.run(block)


def test_blocks_share_names_and_a_folder(session: Session) -> None:
    run(session, "<!-- python\na = 2\n-->\n```python\nb = a + 1\nopen('made', 'w').close()\n```\n\n    test -e made\n")
    assert session.namespace["b"] == 3


@pytest.mark.parametrize(
    "text",
    [
        "```python\nassert False\n```",
        "```python\n1 +\n```",
        "```bash\nfalse\n```",
        "text\n\n    false && true\n",
        "```\nno language\n```",
        "```json\n{\n```",
        "    diffgap doctor --no-such-flag\n",
    ],
)
def test_a_block_that_fails_is_an_error(session: Session, text: str) -> None:
    with pytest.raises((AssertionError, SyntaxError, ValueError)):
        run(session, text)


def test_what_is_not_run_is_checked(session: Session) -> None:
    run(session, "<!-- not run: takes hours -->\n```python\nimport diffgap\nassert False\n```")
    run(session, "<!-- not run `false`: fails -->\n\n    true\n    false --option  # comment\n")
    run(session, "<!-- not run: hours -->\n\n    for x in 1 2; do diffgap train runs/$x --data.split-seed $x; done\n")
    run(session, "<!-- not run: CI runs this; tests/docs too -->\n\n    make lint\n")
    with pytest.raises(ImportError):
        run(session, "<!-- not run: takes hours -->\n```python\nfrom diffgap import NoSuchName\n```")
    for line in (
        "diffgap train run --data.no-such-setting 1",
        "diffgap trian run",
        "torchrun --nproc-per-node 2 -m diffgap train run --no-such-flag",
        "pip install 'diffgap[no-such-extra]'",
        "python -m no_such_module",
    ):
        with pytest.raises((AssertionError, ValueError)):
            check(line)
    for reason in ("CI runs this", "tests/no_such_file.py has a short form"):
        with pytest.raises(AssertionError):
            check("make soak", reason)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- not run: -->\n```bash\nfalse\n```", "cannot read"),
        ("<!-- not run `true` -->\n```bash\ntrue\n```", "cannot read"),
        ("<!-- not run: why -->\ntext", "before no block"),
        ("<!-- not run `make`: why -->\n```bash\ntrue\n```", "fits no line"),
        ("```bash\ntrue", "does not end"),
        ("<!-- python\n", "does not end"),
    ],
)
def test_markers_that_mean_nothing_are_errors(session: Session, text: str, message: str) -> None:
    with pytest.raises((AssertionError, ValueError), match=message):
        run(session, text)


def test_a_loop_has_two_rounds_and_patterns_name_files(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    session.folder.joinpath("README.md").touch()
    run(session, "    for x in 1 2 3; do touch made$x; done\n")
    assert sorted(path.name for path in session.folder.iterdir()) == ["README.md", "made1", "made2"]
    with pytest.raises(AssertionError):
        run(session, "    diffgap READ*\n")
    assert "options: README.md" in capsys.readouterr().err


def test_options_are_added_to_a_command(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    run(session, "<!-- with `diffgap doctor`: --help -->\n\n    diffgap doctor\n")
    assert "usage: diffgap doctor" in capsys.readouterr().out
