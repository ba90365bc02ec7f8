"""``import diffgap`` is light, and works with less than is usually there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffgap

PACKAGE = Path(diffgap.__file__).parent
HEAVY = ("triton", "pyarrow", "sklearn", "scipy", "matplotlib", "accelerate", "huggingface_hub", "tyro")
USE_OPS = """
import torch
from diffgap import attention, backend, explain
from diffgap.ops import normal, q_sample
q = torch.randn(2, 3, 1, 4)
assert attention(q, q, q).shape == q.shape
assert normal(torch.zeros(2, dtype=torch.int64), (5,)).shape == (2, 5)
assert {choice.device for choice in explain()} >= {"cpu"}
"""


def python(code: str, path: Path = PACKAGE.parent) -> str:
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_nothing_heavy() -> None:
    # What torch itself imports is not ours to answer for.
    code = f"""
import sys, torch
before = set(sys.modules)
import diffgap, diffgap.ops
names = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(names & set({HEAVY!r})))
import diffgap.models.settings, diffgap.training.config
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("sklearn", "matplotlib", "accelerate")))
"""
    assert python(code).split("\n")[:2] == ["[]", "[]"]


def test_every_public_name_can_be_had() -> None:
    assert [name for name in diffgap.__all__ if getattr(diffgap, name, None) is None] == []
    assert set(dir(diffgap)) >= set(diffgap.__all__)


def test_works_without_triton() -> None:
    python("import sys; sys.modules['triton'] = None\n" + USE_OPS)


def test_works_without_the_extension(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "diffgap", ignore=shutil.ignore_patterns("*.so", "__pycache__", "stamps"))
    code = f"""
import diffgap
assert diffgap.__file__.startswith({str(tmp_path)!r}), diffgap.__file__
{USE_OPS}
# linear is torch's own oneDNN
assert {{choice.backend for choice in explain() if choice.device == "cpu" and choice.op != "linear"}} == {{"eager"}}
try:
    with backend("native"):
        normal(torch.zeros(2, dtype=torch.int64), (5,))
except RuntimeError as error:
    print(error)
from diffgap.cli import main
main(["doctor"])
"""
    said = " ".join(python(code, tmp_path).split())
    assert "backend 'native' was asked for, but _C_cpu is not built" in said
    assert "C++ CPU kernels missing" in said.replace("│", "")
