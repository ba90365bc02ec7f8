"""Code blocks of Markdown documents: found, and run or, where a comment says why not, at least checked.

Every fenced block counts, and every indented one, which here are shell commands. Comments that no reader sees, right
before a block, may say

    <!-- not run: REASON -->                 the whole block is checked only
    <!-- not run `COMMAND`: REASON -->       the lines that begin so are
    <!-- with `COMMAND`: OPTIONS -->         run with these options added, which make it small enough

A loop of the shell has its first two rounds. A file of the repository that a reason names exists, and what "CI runs" is
in `.ci/run`.

and at any place

    <!-- python                              code that runs like a block: what stands in for the reader's own data
    ... -->
    <!-- needs: PACKAGE, PACKAGE -->         modules without which the document is skipped
"""

from __future__ import annotations

import ast
import glob
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffgap import cli

ROOT = Path(__file__).parents[2]
_SHELL, _PLAIN = ("bash", "sh"), ("text", "bibtex")
_MARKER = re.compile(r"(not run|with)(?: `([^`]+)`)?: (\S.*)")
_OPERATORS = {"&&", "||", ";", "|", "&"}


@dataclass(frozen=True)
class Marker:
    """``not run`` or ``with``, for lines that begin with ``command``; ``text`` is the reason, or the options."""

    kind: str
    command: str
    text: str


@dataclass(frozen=True)
class Block:
    """Code in a document; ``line`` is that of the first line of code, from 1."""

    language: str
    code: str
    line: int
    markers: tuple[Marker, ...] = ()


@dataclass
class Document:
    """The blocks of a document, in order, and the modules it needs."""

    blocks: list[Block] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)


def read_blocks(text: str) -> Document:
    """Find the blocks of a document.

    Raises:
        ValueError: A fence or comment that is not closed, a marker that cannot be read or has no block.
    """
    lines, document, markers, at = text.split("\n"), Document(), [], 0
    while at < len(lines):
        line, start = lines[at], at
        if line.startswith("<!--"):
            while "-->" not in lines[at]:
                at = _next(lines, at, "comment", start)
            comment = "\n".join(lines[start : at + 1]).removeprefix("<!--").partition("-->")[0]
            head, _, rest = comment.strip(" ").partition("\n")
            if head in ("python", *_SHELL):
                document.blocks.append(Block(head, rest, start + 2))
            elif head.startswith("needs: "):
                document.needs += [name.strip() for name in head.removeprefix("needs: ").split(",")]
            elif found := _MARKER.fullmatch(head):
                markers.append(Marker(found[1], found[2] or "", found[3].strip()))
            elif head.startswith(("not run", "with")):
                raise ValueError(f"line {start + 1}: cannot read <!--{comment}-->; write 'not run `COMMAND`: REASON'")
        elif fence := re.match(r" {0,3}(```+|~~~+)\s*(\w*)", line):
            at = _next(lines, at, "block", start)
            while not lines[at].strip().startswith(fence[1]):
                at = _next(lines, at, "block", start)
            document.blocks.append(Block(fence[2], "\n".join(lines[start + 1 : at]), start + 2, tuple(markers)))
            markers = []
        elif line.startswith("    ") and not lines[at - 1].strip():
            while at + 1 < len(lines) and (lines[at + 1].startswith("    ") or _continues(lines, at + 1)):
                at += 1
            code = "\n".join(each[4:] for each in lines[start : at + 1])
            document.blocks.append(Block("bash", code, start + 1, tuple(markers)))
            markers = []
        elif line.strip() and markers:
            raise ValueError(f"line {start + 1}: {markers} stands before no block")
        at += 1
    return document


def _next(lines: list[str], at: int, what: str, start: int) -> int:
    if at + 1 == len(lines):
        raise ValueError(f"line {start + 1}: this {what} does not end")
    return at + 1


def _continues(lines: list[str], at: int) -> bool:
    """Whether an empty line is inside of an indented block."""
    return not lines[at].strip() and at + 1 < len(lines) and lines[at + 1].startswith("    ")


class Session:
    """The blocks of one document run one after another, in one folder and one namespace.

    Args:
        name: Of the document, for error messages.
        folder: Where shell commands run: the current folder while the session lasts.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.namespace: dict[str, Any] = {"__name__": "__main__"}

    def run(self, block: Block) -> None:
        """Run a block, or check the parts of it that a marker excludes.

        Raises:
            AssertionError: It fails; the message has the document and line.
        """
        whole = any(marker.kind == "not run" and not marker.command for marker in block.markers)
        if block.language == "python":
            self._python(block, whole)
        elif block.language in _SHELL:
            self._shell(block, whole)
        elif block.language in _READERS:
            _READERS[block.language](block.code)
        else:
            assert block.language in _PLAIN, (
                f"{self._place(block)}: a block of {block.language or 'no language'!r} is neither run nor read; "
                f"use python, bash, {', '.join(_READERS)} or {' or '.join(_PLAIN)}"
            )

    def _python(self, block: Block, check_only: bool) -> None:
        tree = ast.parse(block.code, self._place(block))
        if check_only:
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        ast.increment_lineno(tree, block.line - 1)
        exec(compile(tree, self.name, "exec"), self.namespace)

    def _shell(self, block: Block, check_only: bool) -> None:
        lines = [line.strip() for line in block.code.replace("\\\n", " ").split("\n")]
        lines = [each for line in lines if line and not line.startswith("#") for each in unroll(line)]
        for marker in block.markers:
            used = not marker.command or any(line.startswith(marker.command) for line in lines)
            assert used, f"{self._place(block)}: {marker} fits no line of the block"
        for line in lines:
            applying = [marker for marker in block.markers if line.startswith(marker.command)]
            reasons = [marker.text for marker in applying if marker.kind == "not run"]
            if check_only or reasons:
                check(line, " ".join(reasons))
                continue
            commands, operators = split(line)
            options = [option for marker in applying for option in shlex.split(marker.text)]
            if all(command[0] == "diffgap" for command in commands) and set(operators) <= {"&&"}:
                for command in commands:
                    self._diffgap(block, [*command[1:], *options])
            else:
                assert not options, f"{self._place(block)}: options can be added to diffgap's own commands alone"
                self._bash(block, line)

    def _diffgap(self, block: Block, arguments: list[str]) -> None:
        """In this process: half of a small command's time is the import of torch."""
        status: object = 0
        try:
            cli.main([name for word in arguments for name in sorted(glob.glob(word)) or [word]])
        except SystemExit as stop:
            status = stop.code
        assert not status, f"{self._place(block)}: diffgap {shlex.join(arguments)}: exit status {status}"

    def _bash(self, block: Block, line: str) -> None:
        # What the environment installed first, and this checkout's modules.
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        shell = ["bash", "-euo", "pipefail", "-c", line]
        done = subprocess.run(shell, cwd=self.folder, env=os.environ | path, capture_output=True, text=True)
        assert done.returncode == 0, f"{self._place(block)}: {line}: exit status {done.returncode}: {done.stderr}"

    def _place(self, block: Block) -> str:
        return f"{self.name}:{block.line}"


_READERS: dict[str, Callable[[str], Any]] = {"json": json.loads, "yaml": yaml.safe_load}


def split(line: str) -> tuple[list[list[str]], list[str]]:
    """The commands of a line of shell, word by word, and the operators between them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    operators = []
    for word in lexer:
        if word in _OPERATORS:
            operators.append(word)
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command], operators


def unroll(line: str) -> list[str]:
    """The first two rounds of a loop of the shell; any other line as it is."""
    loop = re.fullmatch(r"for (\w+) in ([^;]+); do (.+); done", line)
    return [loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()[:2]] if loop else [line]


def check(line: str, reason: str = "") -> None:
    """Check a line of shell that is not run: diffgap's arguments are parsed, names of targets and modules looked up."""
    for name in re.findall(r"\b(?:tests|docs|scripts)/[\w./]+\b", reason):
        assert (ROOT / name).exists(), f"there is no {name}, where {line!r} is said to run"
    for command in split(line)[0]:
        if command[0] == "make":
            in_ci = command[1] in re.findall(r"[\w-]+", (ROOT / ".ci/run").read_text())
            assert in_ci or "CI runs" not in reason, f".ci/run has no {shlex.join(command)}"
            subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
        elif command[0] == "pip":
            for extra in re.findall(r"(?:diffgap|\.)\[([\w,-]+)\]", " ".join(command)):
                assert set(extra.split(",")) <= _extras(), f"pyproject.toml has no extra {extra}"
        elif command[0] in ("python", "torchrun", "accelerate") and "-m" in command:
            module, *arguments = command[command.index("-m") + 1 :]
            assert importlib.util.find_spec(module), f"there is no module {module}"
            if module == "diffgap":
                cli._parse(arguments)
        elif command[0] == "diffgap":
            cli._parse(command[1:])


def _extras() -> set[str]:
    project = (ROOT / "pyproject.toml").read_text()
    extras = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", extras, re.MULTILINE))
