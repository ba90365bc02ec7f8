"""Runs that are killed, run again, shared by ranks, or run out of disk: the store is the same, bit by bit."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffgap.data.store import EmbeddingStore
from diffgap.embed import embed_items
from tests.embed.apart import Apart, embed
from tests.embed.fakes import BytesReader, HashEncoder, digest, encoders, make_items

PARTS = 3  # 20 items in chunks of 7


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    found = Apart()
    yield found
    found.close()


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The media, some of them broken, of ``whole``."""
    folder = tmp_path_factory.mktemp("media")
    make_items(folder, 20, 2)
    return folder


@pytest.fixture(scope="module")
def whole(media: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the store of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "store"
    embed(str(media), str(output))
    assert len(EmbeddingStore.open(output)) == 20
    return digest(output)


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_rename(apart: Apart, media: Path, whole: dict[str, str], tmp_path: Path, after: bool) -> None:
    """Killed at the first rename, that of the plan, and run again; killed at the second ... until none is left."""
    for call in range(1, 10):
        output = tmp_path / str(call)
        if apart.wait(apart.start(media, output, kill=("replace", call, after))) == 0:
            break
        assert apart.wait(apart.start(media, output)) == 0
        assert digest(output) == whole
        assert len(list(tmp_path.iterdir())) == call
    assert call == 1 + 1 + PARTS + 1  # the plan, the parts, the store, and a run that was not killed


def test_killed_at_random_moments(apart: Apart, media: Path, whole: dict[str, str], tmp_path: Path) -> None:
    moments, killed = random.Random(0), 0
    output = tmp_path / "store"
    for _ in range(40):
        # Reading alone takes 24 x 0.05 s, so that no run ends before it is killed unless others began it.
        process = apart.start(media, output, seconds=0.05)
        time.sleep(moments.uniform(0.0, 0.6))
        os.kill(process, signal.SIGKILL)  # a child that has ended is there until it is waited for
        killed += apart.wait(process) == -signal.SIGKILL
        if output.exists() and not Path(f"{output}.parts").exists():
            break
    else:
        assert apart.wait(apart.start(media, output)) == 0
    assert killed
    assert digest(output) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_parts_that_are_there_are_not_made_again(media: Path, whole: dict[str, str], tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Stopping(HashEncoder):
        def encode(self, batch):  # type: ignore[no-untyped-def]
            if sum(self.batches) >= 6:
                raise Stop
            return super().encode(batch)

    items, options = make_items(media, 20, 2), {"workers": 0, "batch_size": 4, "chunk": 7}
    first, second = encoders(), encoders()
    first["text"] = Stopping("text", fingerprint="hash-text:1")
    with pytest.raises(Stop):
        embed_items(items, first, tmp_path / "store", **options)  # type: ignore[arg-type]
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store.parts").glob("part-*")}
    assert 1 <= len(done) < PARTS
    seen: list[tuple[int, int, int]] = []
    report = embed_items(
        items, second, tmp_path / "store", keep_parts=True, progress=lambda *now: seen.append(now), **options
    )  # type: ignore[arg-type]
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store.parts").glob("part-*")}
    assert {name: again[name] for name in done} == done
    assert digest(tmp_path / "store") == whole
    assert report is not None
    left, total = sum(report.encoded.values()), sum(report.embeddings.values())
    assert left < total
    assert seen[0] == (total - left, total, 0) and seen[-1] == (total, total, 0)


def test_ranks_make_the_same_store(apart: Apart, media: Path, whole: dict[str, str], tmp_path: Path) -> None:
    environments = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    processes = [apart.start(media, tmp_path / "store", environment=one, seconds=0.002) for one in environments]
    assert [apart.wait(process) for process in processes] == [0, 0]
    assert digest(tmp_path / "store") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_the_folder_stays_until_the_other_ranks_have_left_it(apart: Apart, media: Path, tmp_path: Path) -> None:
    """A rank that is stopped right after the rename of its last part still has that folder when it goes on."""
    said, environment = tmp_path / "said", {"RANK": "1", "WORLD_SIZE": "2"}
    slow = apart.start(media, tmp_path / "store", environment=environment, stop=("replace", 1), said=said)
    first = apart.start(media, tmp_path / "store", environment=environment | {"RANK": "0"})
    while not (tmp_path / "store" / "index.parquet").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    assert (tmp_path / "store.parts" / "part-000001").exists()
    os.kill(slow, signal.SIGCONT)
    assert [apart.wait(slow), apart.wait(first)] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_each_rank_embeds_its_own_chunks(
    media: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = {"workers": 0, "batch_size": 4, "chunk": 7, "wait_seconds": 0.3}
    items = make_items(media, 20, 2)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match=r"rank 0 has not begun on .*store\.parts with the settings of rank 1"):
        embed_items(items, encoders(), tmp_path / "store", **options)  # type: ignore[arg-type]
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match=r"1 of 3 parts are still missing after 0\.3 s .* of rank 1; see"):
        embed_items(items, encoders(), tmp_path / "store", **options)  # type: ignore[arg-type]
    names = sorted(path.name for path in (tmp_path / "store.parts").glob("part-*"))
    assert names == ["part-000000", "part-000002"]
    monkeypatch.setenv("RANK", "1")
    assert embed_items(items, encoders(), tmp_path / "store", **options) is None  # type: ignore[arg-type]
    monkeypatch.setenv("RANK", "0")
    assert embed_items(items, encoders(), tmp_path / "store", **options) is not None  # type: ignore[arg-type]
    assert digest(tmp_path / "store") == whole
    # A rank that comes late, when the store is whole, has nothing to do and leaves nothing behind.
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "store.parts").mkdir()
    assert embed_items(items, encoders(), tmp_path / "store", **options) is None  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("-1", "2")])
def test_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, world: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match="are no rank; unset them"):
        embed_items(make_items(tmp_path / "m", 4), encoders(), tmp_path / "store")


def test_two_runs_on_one_output(apart: Apart, media: Path, whole: dict[str, str], tmp_path: Path) -> None:
    said = tmp_path / "said"
    slow = apart.start(media, tmp_path / "store", seconds=0.05)
    while not list(tmp_path.glob("store.parts/part-*")):
        time.sleep(0.01)
    assert apart.wait(apart.start(media, tmp_path / "store", said=said)) == 1
    assert "store.parts is in use: another diffgap embed writes the same output; wait for it" in said.read_text()
    environment = {"RANK": "1", "WORLD_SIZE": "2"}
    assert apart.wait(apart.start(media, tmp_path / "store", said=said, environment=environment)) == 1
    assert "is in use" in said.read_text()
    assert apart.wait(slow) == 0
    assert digest(tmp_path / "store") == whole


def test_another_plan_is_refused(media: Path, whole: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "store"
    items, options = make_items(media, 20, 2), {"workers": 0, "batch_size": 4, "chunk": 7}
    embed_items(items, encoders(), output, keep_parts=True, **options)  # type: ignore[arg-type]
    (output / "index.parquet").unlink()
    for file in output.iterdir():
        file.unlink()
    output.rmdir()
    other = {**encoders(), "text": HashEncoder("text", fingerprint="hash-text:2")}
    less = type(items)(items.items[:19])
    renamed = type(items)(items.items, description="another list")
    moved = type(items)([items.items[1], items.items[0], *items.items[2:]])
    for case, expected in (
        ((items, encoders(), options | {"batch_size": 5}), "batch_size was 4 and is 5"),
        ((items, encoders(), options | {"chunk": 8}), "chunk was 7 and is 8"),
        ((items, encoders(), options | {"dtype": "int8"}), "dtype was .*'float32'.* and is .*'int8'"),
        ((items, other, options), "encoders was .*hash-text:1.* and is .*hash-text:2"),
        ((less, encoders(), options), "count was 20 and is 19"),
        ((renamed, encoders(), options), "items was a list and is another list"),
        ((moved, encoders(), options), "the items' ids, sources or columns have changed"),
    ):
        with pytest.raises(ValueError, match=f"holds parts of another run: .*{expected}.*overwrite=True"):
            embed_items(case[0], case[1], output, **case[2])  # type: ignore[arg-type]
    assert not output.exists()
    embed_items(items, encoders(), output, **options)  # type: ignore[arg-type]
    assert digest(output) == whole


def test_overwrite_discards_parts_of_another_plan(media: Path, whole: dict[str, str], tmp_path: Path) -> None:
    output, items = tmp_path / "store", make_items(media, 20, 2)
    embed_items(items, encoders(), output, workers=0, batch_size=3, chunk=5, dtype="int8", keep_parts=True)
    old = digest(output)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        embed_items(items, encoders(), output, workers=0, batch_size=4, chunk=7)
    assert digest(output) == old
    embed_items(items, encoders(), output, workers=0, batch_size=4, chunk=7, overwrite=True)
    assert digest(output) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_folder_that_is_no_store_is_not_replaced(media: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"also holds 'thesis\.tex'"):
        embed_items(make_items(media, 20, 2), encoders(), tmp_path / "store", workers=0, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_parts_folder_of_someone_else_is_left_alone(media: Path, tmp_path: Path) -> None:
    (tmp_path / "store.parts").mkdir()
    (tmp_path / "store.parts" / "wheel.stl").touch()
    with pytest.raises(FileExistsError, match=r"store\.parts holds 'wheel\.stl', not part of a run; choose another"):
        embed_items(make_items(media, 20, 2), encoders(), tmp_path / "store", workers=0, overwrite=True)
    assert [path.name for path in (tmp_path / "store.parts").iterdir()] == ["wheel.stl"]


@pytest.mark.parametrize("most", [300, 1200])
def test_a_full_disk(apart: Apart, media: Path, whole: dict[str, str], tmp_path: Path, most: int) -> None:
    """No file may grow beyond ``most`` bytes: the plan or a part cannot be written."""
    said = tmp_path / "said"
    assert apart.wait(apart.start(media, tmp_path / "store", most_bytes=most, said=said)) == 1
    assert "store.parts cannot be written: " in said.read_text()
    assert "File too large; 0 parts are kept. Make room or give access, and run the same command" in said.read_text()
    assert not (tmp_path / "store").exists()
    assert apart.wait(apart.start(media, tmp_path / "store")) == 0
    assert digest(tmp_path / "store") == whole


@pytest.mark.parametrize("writer", ["write_modality", "write_index"])
def test_a_disk_that_is_full_for_the_store_keeps_the_parts(
    media: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"diffgap.embed.merge.{writer}", full)
    with pytest.raises(OSError, match="No space left on device; 3 parts are kept"):
        embed(str(media), str(tmp_path / "store"))
    assert [path.name for path in tmp_path.iterdir()] == ["store.parts"]
    monkeypatch.undo()
    embed(str(media), str(tmp_path / "store"))
    assert digest(tmp_path / "store") == whole


def test_too_little_room_is_said_before_work(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    found = encoders()
    with pytest.raises(OSError, match=r"about 0\.0 GB are needed for parts and store, and 0\.0 GB are free; make room"):
        embed_items(make_items(media, 20, 2), found, tmp_path / "store", workers=0)
    assert found["audio"].batches == []


def test_an_output_that_cannot_be_made(media: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written"):
        embed_items(make_items(media, 20, 2), encoders(), tmp_path / "file" / "store", workers=0)


def test_a_broken_plan_is_another_plan(media: Path, tmp_path: Path) -> None:
    (tmp_path / "store.parts").mkdir()
    (tmp_path / "store.parts" / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="holds parts of another run"):
        embed_items(make_items(media, 20, 2), encoders(), tmp_path / "store", workers=0)
    report = embed_items(
        make_items(media, 20, 2), encoders(), tmp_path / "store", workers=0, overwrite=True, keep_parts=True
    )
    assert report is not None and report.rows == 20
    assert json.loads((tmp_path / "store.parts" / "plan.json").read_text())["count"] == 20


def test_workers_end_with_a_run_that_is_killed(apart: Apart, tmp_path: Path) -> None:
    make_items(tmp_path / "m", 20, 2)
    process = apart.start(tmp_path / "m", tmp_path / "store", workers=2, seconds=0.2)
    while not list(tmp_path.glob("store.parts/part-*")):
        time.sleep(0.05)
    workers = _descendants(process)
    assert len(workers) >= 2
    os.kill(process, signal.SIGKILL)
    assert apart.wait(process) == -signal.SIGKILL
    limit = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < limit
        time.sleep(0.05)


def _descendants(process: int) -> list[int]:
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def test_reading_apart_makes_the_same_store(media: Path, whole: dict[str, str], tmp_path: Path) -> None:
    embed_items(
        make_items(media, 20, 2), encoders(reader=BytesReader()), tmp_path / "store", workers=2, batch_size=4, chunk=7
    )
    assert digest(tmp_path / "store") == whole
