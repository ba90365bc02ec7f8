from __future__ import annotations

import io
import sys
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from diffgap import doctor, ops
from diffgap.ops import _dispatch, _native


def shown() -> str:
    console = Console(file=io.StringIO(), width=200)
    doctor.show(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_show_names_every_op_and_device() -> None:
    text = shown()
    for name in {choice.op for choice in ops.explain()} | {"cpu", "torch", "diffgap", "C++ CPU kernels"}:
        assert name in text


def test_what_is_missing_is_said_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": ("peer", "pip install 'diffgap[bench]'")})
    text = shown()
    assert "no-such-package" in text
    assert "peer; pip install 'diffgap[bench]'" in text  # square brackets are no markup


def test_a_missing_extension_is_explained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the C++ extension is not built (a long story); rebuild with: pip install ."
    monkeypatch.setattr(_native, "CPU_MISSING", reason)
    kernel = _dispatch.Native("C++", (), missing=reason)
    monkeypatch.setitem(_dispatch._ops, "attention", {"cpu": kernel})
    rows = doctor.diagnose()
    assert [row.note for row in rows["extensions"] if row.what == "C++ CPU kernels"] == [reason]
    notes = {row.note for row in rows["ops"] if row.what == "attention" and row.state.startswith("cpu")}
    assert notes == {"C++ CPU kernels missing, see above"}


@pytest.mark.parametrize("why", ["the CUDA kernels need nvcc (set CUDA_HOME)", None])
def test_doctor_without_a_gpu_says_what_the_build_lacked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str | None
) -> None:
    obstacle = "no CUDA device is visible"
    monkeypatch.setattr(_native, "CUDA_MISSING", obstacle)
    monkeypatch.setattr(_native, "left_out", lambda stem, package=None: why)
    monkeypatch.setattr(_native, "not_built", partial(_native.not_built, package=tmp_path))
    (note,) = (row.note for row in doctor.diagnose()["extensions"] if row.what == "CUDA kernels")
    if why is None:
        assert note == obstacle
    else:
        assert note.startswith(f"{obstacle}; _C_cuda is not built: {why}; ") and "run: pip install" in note


def test_pyarrow_that_refuses_this_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (row,) = (row for row in doctor.diagnose()["versions"] if row.what == "pyarrow")
    assert row.state == "does not load"
    assert row.note.endswith("; run: pip install 'pyarrow<26', or 'numpy>=2'")
