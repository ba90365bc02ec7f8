"""Files that are damaged, and a watch over what reading them does."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

_DANGEROUS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")
#: Events that change the file system: how many paths each names, and where it has the folders that these start from.
_CHANGES = {"os.rename": (2, 2), "os.remove": (1, 1), "os.mkdir": (1, 2), "os.rmdir": (1, 1), "os.symlink": (2, 2)}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_watched: list[str] = []
_active = False
_output: Path | None = None


def _hook(event: str, details: tuple[Any, ...]) -> None:
    if not _active or "__pycache__" in str(details[:1]):  # of a module that is imported now
        return
    if event in _DANGEROUS:
        _watched.append(f"{event} {details[:2]}")
    elif event == "open" and isinstance(details[2], int) and details[2] & _WRITING:
        _watch(event, [os.fspath(details[0])])
    elif event in _CHANGES:
        count, folders = _CHANGES[event]
        starts = [*details[folders:], -1, -1]
        _watch(event, [_place(os.fspath(details[i]), starts[i]) for i in range(count)])


def _place(name: Any, folder: int) -> Any:
    """A path that may begin at an open folder."""
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name) if folder >= 0 else name


def _watch(event: str, paths: list[Any]) -> None:
    """Note a change, unless it is in the folder where output goes."""
    if _output is None or not all(Path(os.path.normpath(path)).is_relative_to(_output) for path in paths):
        _watched.append(f"{event} {paths}")


sys.addaudithook(_hook)


#: Bytes of address space that reading a few kilobytes may take: enough for threads' stacks.
_ROOM = 2 << 30


@contextmanager
def harmless(output: Path | None = None) -> Iterator[None]:
    """No process, connection, unpickling or large allocation happens within, nor a change of the file system.

    Args:
        output: A folder in which files may be made.
    """
    global _active, _output
    limits = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _ROOM, limits[1]))
    _watched.clear()
    _active, _output = True, output
    try:
        yield
    finally:
        _active = False
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not _watched, _watched


def contents(folder: Path, output: Path | None = None) -> dict[Path, tuple[int, int]]:
    """Size and time of everything below ``folder`` but what is in ``output``, whoever wrote it: C++ makes no events."""
    return {
        path: (0, 0) if path.is_dir() else (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if output is None or output not in path.parents
    }


DAMAGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("replace"), st.just(0.0), st.one_of(st.binary(max_size=40), st.just(b"null"))),
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, damages: list[Any], bend: bool) -> bytes:
    """The content with bytes changed, cut off, inserted or replaced; ``bend`` towards its beginning."""
    for kind, place, value in damages:
        at = int((place**4 if bend else place) * max(len(content) - 1, 0))
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ value]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + value + content[at:]
        elif kind == "replace":
            content = value
    return content


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("../../x"), st.just("..")
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


def altered(content: Any, draw: Callable[..., Any]) -> Any:
    """What JSON or YAML holds with one value, at any depth, replaced by another or left out."""
    content = json.loads(json.dumps(content))
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return content
        key = draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and node[key] and draw(st.booleans()):
            node = node[key]
            continue
        if draw(st.booleans()):
            node[key] = draw(VALUES)
        else:
            del node[key]
        return content
