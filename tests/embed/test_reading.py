"""Worker processes: what they read comes back in order, and what kills one costs no more than itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from diffgap.data.media import MediaError, Source
from diffgap.data.store import EmbeddingStore
from diffgap.embed import embed_items, reading
from diffgap.embed.reading import MediaPool
from diffgap.embed.work import drawn_ahead
from tests.embed.fakes import BytesReader, encoders, make_items


class TensorReader(BytesReader):
    """Gives what the encoders of torch take."""

    def __call__(self, source: Source) -> Any:
        content = super().__call__(source)
        return torch.arange(len(content)), {"array": np.arange(len(content))}


class UnpicklableReader(BytesReader):
    def __call__(self, source: Source) -> Any:
        return lambda: None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder, found = tmp_path_factory.mktemp("files"), {}
    for name in ("sound", "crash", "broken", "fault", "package", "hang"):
        (folder / name).write_text(name)
        found[name] = Source(path=folder / name)
    return found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """More than a pipe holds."""
    file = tmp_path_factory.mktemp("large") / "large"
    file.write_bytes(b"x" * 3_000_000)
    return Source(path=file)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_readers_give_and_raise(files: dict[str, Source], large: Source, workers: int) -> None:
    with MediaPool({"audio": BytesReader(), "text": TensorReader()}, workers) as pool:
        good = [pool.submit("audio", files["sound"]) for _ in range(20)]
        assert [future.result() for future in good] == [b"sound"] * 20
        assert len(pool.submit("audio", large).result()) == 3_000_000
        assert pool.submit("audio", Source(text="a")).result() == b"a"
        tensor, rest = pool.submit("text", files["sound"]).result()
        assert tensor.tolist() == rest["array"].tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(MediaError, match="is broken") as broken:
            pool.submit("audio", files["broken"]).result()
        assert broken.value.reason == "undecodable"
        with pytest.raises(MediaError, match="fault cannot be read: KeyError: 'a fault in the reader'"):
            pool.submit("audio", files["fault"]).result()
        with pytest.raises(ModuleNotFoundError, match="run: pip install av"):
            pool.submit("audio", files["package"]).result()


def test_a_process_that_dies_costs_one_medium(files: dict[str, Source]) -> None:
    with MediaPool({"audio": BytesReader()}, 2) as pool:
        futures = [pool.submit("audio", files["crash" if n % 5 == 2 else "sound"]) for n in range(15)]
        for n, future in enumerate(futures):
            if n % 5 == 2:
                with pytest.raises(MediaError, match="crash: the process that read it ended with status 11") as died:
                    future.result()
                assert died.value.reason == "undecodable"
            else:
                assert future.result() == b"sound"


def test_a_decoder_that_hangs_is_ended(files: dict[str, Source], monkeypatch: pytest.MonkeyPatch) -> None:
    with MediaPool({"audio": BytesReader()}, 1) as pool:
        assert pool.submit("audio", files["sound"]).result() == b"sound"
        monkeypatch.setattr(reading, "READ_SECONDS", 0.2)
        with pytest.raises(MediaError, match=r"hang: it was not read in 0\.2 s"):
            pool.submit("audio", files["hang"]).result()
        monkeypatch.setattr(reading, "READ_SECONDS", 60.0)
        assert pool.submit("audio", files["sound"]).result() == b"sound"


def test_leaving_ends_processes_in_the_middle_of_their_work(files: dict[str, Source]) -> None:
    with MediaPool({"audio": BytesReader()}, 2) as pool:
        pool.submit("audio", files["sound"]).result()
        waiting = [pool.submit("audio", files["hang"]) for _ in range(6)]
    assert all(future.done() for future in waiting)
    assert all(not process._process.is_alive() for process in pool._processes)


def test_what_cannot_be_pickled(files: dict[str, Source]) -> None:
    with (
        MediaPool({"audio": UnpicklableReader()}, 1) as pool,
        pytest.raises(TypeError, match="the audio reader gives what cannot be pickled"),
    ):
        pool.submit("audio", files["sound"]).result()


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from tests.embed.fakes import *\nfrom diffgap.embed import embed_items\nfrom pathlib import Path\n"
        "embed_items(make_items(Path('m'), 4), encoders(), 'store', workers=1)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(root)}
    )
    assert "a process that reads media did not start" in done.stderr
    assert "needs its calls below `if __name__ == '__main__':`" in done.stderr


def test_a_crash_is_in_the_table_of_failures(tmp_path: Path) -> None:
    items = make_items(tmp_path / "m", 12, 2)
    (tmp_path / "m" / "00002.bin").write_text("crash")
    report = embed_items(items, encoders(), tmp_path / "store", workers=2, batch_size=2, chunk=5)
    assert report is not None and report.failures == {("audio", "undecodable"): 2}
    assert [n for n in range(12) if f"item-{n}" not in EmbeddingStore.open(tmp_path / "store").column("id")] == [4, 5]
    rows = pq.read_table(tmp_path / "store" / "failures.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["item-4", "item-5"]
    assert all("ended with status 11" in row["message"] for row in rows)


def test_a_missing_package_ends_the_run(tmp_path: Path) -> None:
    items = make_items(tmp_path / "m", 6)
    (tmp_path / "m" / "00002.bin").write_text("package")
    with pytest.raises(ModuleNotFoundError, match="package av is not installed; run: pip install av"):
        embed_items(items, encoders(), tmp_path / "store", workers=0)


def test_drawn_ahead() -> None:
    drawn: list[int] = []
    elements = drawn_ahead((drawn.append(n) or n for n in range(6)), 2)  # type: ignore[func-returns-value]
    assert next(elements) == 0 and drawn == [0, 1, 2]
    assert next(elements) == 1 and drawn == [0, 1, 2, 3]
    assert list(elements) == [2, 3, 4, 5]
    assert list(drawn_ahead(range(2), 5)) == [0, 1]
    assert list(drawn_ahead(range(3), 0)) == [0, 1, 2]
