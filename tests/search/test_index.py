"""What an index is: bridged queries, fingerprints of store and run, and folders that appear whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.models.bridge import DiffGAP
from diffgap.retrieval.weights import ALPHAS
from diffgap.search.gallery import store_fingerprint
from diffgap.search.index import SearchIndex, build_index, choose_alpha
from diffgap.training.runs import load_run
from tests.helpers import run
from tests.search.conftest import Workshop
from tests.synthetic import TINY, make_config, make_store


def vectors_of(index: SearchIndex) -> torch.Tensor:
    return index.vectors._vectors  # type: ignore[attr-defined]


def test_one_index_gives_the_plain_and_the_bridged_scores(workshop: Workshop, tmp_path: Path) -> None:
    """<q, k> and <q + alpha q^, k> against the scores that the bridge itself gives."""
    alpha = 0.75
    store, bridge = EmbeddingStore.open(workshop.store), load_run(workshop.run)[0]
    embeddings = {name: store.embeddings(name) for name in ("audio", "text")}
    plain, fused = {}, {}
    for query, items in permutations(embeddings):
        build_index(workshop.run, tmp_path / items, modality=items, alpha=alpha)
        index = SearchIndex.open(tmp_path / items)
        queries = index.queries(query, embeddings[query])
        assert queries.fused is not None
        plain[query], fused[query] = queries.plain @ vectors_of(index).T, queries.fused @ vectors_of(index).T
    cosines = bridge.score(text=embeddings["text"], audio=embeddings["audio"], scoring="cosine")
    bridged = bridge.encode("text", embeddings["text"], "audio").bridged
    items = bridge.project("audio", embeddings["audio"])
    torch.testing.assert_close(plain["text"], cosines, rtol=0, atol=1e-6)
    torch.testing.assert_close(fused["text"], cosines + alpha * bridged @ items.T, rtol=0, atol=1e-6)
    # The bridge's "fusion" bridges queries and items: the mean of both directions' scores.
    both = bridge.score(text=embeddings["text"], audio=embeddings["audio"], scoring="fusion", alpha=alpha)
    torch.testing.assert_close((fused["text"] + fused["audio"].T) / 2, both, rtol=0, atol=1e-6)
    assert (plain["text"] - fused["text"]).abs().max() > 0.01


def test_search_after_bridging_ranks_by_the_fused_score(workshop: Workshop) -> None:
    index = workshop.open()
    queries = index.queries("text", index.store.embeddings("text", [0, 9, 30]))
    assert queries.fused is not None
    for vectors in queries:
        scores = vectors.double() @ vectors_of(index).double().T
        found = index.search(vectors, 10)
        torch.testing.assert_close(found.scores.double(), scores.topk(10).values, rtol=1e-5, atol=1e-6)
        assert torch.equal(scores.gather(1, found.rows).float(), scores.topk(10).values.float())


def test_queries_of_the_items_own_modality_are_not_bridged(workshop: Workshop) -> None:
    index = workshop.open()
    queries = index.queries("audio", index.store.embeddings("audio", [3, 8]))
    assert queries.fused is None
    assert index.search(queries.plain, 1).rows[:, 0].tolist() == [3, 8]


def test_directions_that_were_not_trained_are_not_bridged(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffgap.models.settings.BridgeSettings.trains", lambda _, s, t: (s, t) == ("image", "audio"))
    index = workshop.open()
    assert index.queries("text", index.store.embeddings("text", [0])).fused is None
    assert index.queries("image", index.store.embeddings("image", [0])).fused is not None


def test_sequences_are_bridged(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(24, 5, 12, generator=generator)
    lengths = torch.arange(24) % 5 + 1
    texts = torch.randn(24, 10, generator=generator)
    store = EmbeddingStore.from_arrays({"audio": frames, "text": texts}, lengths={"audio": lengths})
    write_store(tmp_path / "store", store)
    config = make_config(tmp_path / "store")
    bridge = DiffGAP({"audio": 12, "text": 10}, TINY, sequences=("audio",))
    bridge.save_pretrained(tmp_path / "run" / "model")
    config.save(tmp_path / "run" / "config.yaml")
    for items, query in (("audio", texts), ("text", frames)):
        build_index(tmp_path / "run", tmp_path / items, modality=items, alpha=1.0)
        index = SearchIndex.open(tmp_path / items)
        asked = "text" if items == "audio" else "audio"
        given = lengths if asked == "audio" else None
        queries = index.queries(asked, query, given)
        options = {"lengths": given, "frames": 3 if items == "audio" else None}  # the median of 1, 2, 3, 4, 5
        encoded = bridge.eval().encode(asked, query, items, **options)
        assert queries.fused is not None
        torch.testing.assert_close(queries.fused, encoded.own + encoded.bridged)
        z = bridge.project(items, frames if items == "audio" else texts)
        if items == "audio":
            z = torch.stack([one[:length].sum(0) for one, length in zip(z, lengths, strict=True)])
        own = torch.nn.functional.normalize(z.detach(), dim=-1)
        torch.testing.assert_close(vectors_of(index), own)


def test_alpha_is_the_best_on_validation_data(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffgap.models.scoring import Encoded
    from diffgap.retrieval import tasks

    bridge = load_run(workshop.run)[0]
    val = EmbeddingStore.open(workshop.store).split("val")

    def oracle(pair: tasks.EncodedPair) -> tasks.EncodedPair:
        """The text's bridged vector is the right item, the image's and the audio's own are noise."""
        if set(pair.sides) == {"audio", "text"}:
            noise = torch.randn(pair.encoded["text"].own.shape, generator=torch.Generator().manual_seed(5))
            pair.encoded["text"] = Encoded(torch.nn.functional.normalize(noise, dim=1), pair.encoded["audio"].own)
        return pair

    encode_pairs = tasks.encode_pairs
    monkeypatch.setattr(
        "diffgap.search.index.encode_pairs", lambda *a, **o: [oracle(one) for one in encode_pairs(*a, **o)]
    )
    only_text = lambda _, s, t: (s, t) == ("text", "audio")  # noqa: E731
    monkeypatch.setattr("diffgap.models.settings.BridgeSettings.trains", only_text)
    assert choose_alpha(bridge, val, "audio") > 0
    monkeypatch.setattr("diffgap.search.index.encode_pairs", encode_pairs)
    assert choose_alpha(bridge, val, "audio") in ALPHAS
    with pytest.raises(ValueError, match="bridge nothing to 'text'"):
        choose_alpha(bridge, val, "text")


def test_alpha_is_chosen_when_it_is_not_given(workshop: Workshop, tmp_path: Path) -> None:
    chosen = choose_alpha(load_run(workshop.run)[0], EmbeddingStore.open(workshop.store).split("val"), "audio")
    assert build_index(workshop.run, tmp_path / "index", modality="audio").alpha == chosen


def test_a_run_serves_another_store(workshop: Workshop, tmp_path: Path) -> None:
    write_store(tmp_path / "other", make_store(("audio",), seed=7))
    build_index(tmp_path / "other", tmp_path / "index", modality="audio", run=workshop.run, alpha=1.0)
    index = SearchIndex.open(tmp_path / "index")
    assert index.bridge is not None and index.meta.data.path == str(tmp_path / "other")
    queries = index.queries("audio", index.store.embeddings("audio", [4]))
    assert index.search(queries.plain, 1).rows.tolist() == [[4]]


def test_another_store_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    store = EmbeddingStore.open(workshop.store)
    shutil.copytree(workshop.store, tmp_path / "moved")
    assert SearchIndex.open(workshop.index, store=str(tmp_path / "moved")).meta.data.path == str(tmp_path / "moved")
    changed = store.embeddings("audio")
    changed[17, 3] += 1e-3
    others = {
        "embedding": store.with_embeddings("audio", changed),
        "order": store.select([*range(1, len(store)), 0]),
        "fewer": store.select(range(len(store) - 1)),
    }
    for name, other in others.items():
        write_store(tmp_path / name, other)
        with pytest.raises(ValueError, match="was not built from store"):
            SearchIndex.open(workshop.index, store=str(tmp_path / name))
    write_store(tmp_path / "without", make_store(("text",)))
    with pytest.raises(ValueError, match="was not built from store"):
        SearchIndex.open(workshop.index, store=str(tmp_path / "without"))
    with pytest.raises(FileNotFoundError, match="not an embedding store"):
        SearchIndex.open(workshop.index, store=str(tmp_path / "nowhere"))


def test_fingerprints_of_the_same_rows_are_equal(workshop: Workshop, tmp_path: Path) -> None:
    store = EmbeddingStore.open(workshop.store)
    copied = EmbeddingStore.open(write_store(tmp_path / "copy", store))
    assert store_fingerprint(store, "audio") == store_fingerprint(copied, "audio")
    assert store_fingerprint(store, "audio") != store_fingerprint(store, "text")


def test_another_run_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    make_config(workshop.store, steps=2, seed=5).save(tmp_path / "run.yaml")
    assert run("train", tmp_path / "run", "--config", tmp_path / "run.yaml") == 0
    with pytest.raises(ValueError, match="was not built with run"):
        SearchIndex.open(workshop.index, run=tmp_path / "run")
    shutil.copytree(workshop.run, tmp_path / "moved")
    assert SearchIndex.open(workshop.index, run=tmp_path / "moved").bridge is not None
    build_index(workshop.store, tmp_path / "plain", modality="audio")
    with pytest.raises(ValueError, match="was built without one"):
        SearchIndex.open(tmp_path / "plain", run=workshop.run)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("meta.json", b"{", "damaged"),
        ("meta.json", b"[]", "damaged"),
        ("meta.json", b'{"format_version": "1"}', "damaged"),
        ("meta.json", b'{"format_version": "9"}', "format version '9'"),
        ("rows.safetensors", b"", "damaged"),
        ("vectors.safetensors", b"junk", "not a readable safetensors"),
    ],
)
def test_damaged_files(workshop: Workshop, tmp_path: Path, file: str, content: bytes, said: str) -> None:
    shutil.copytree(workshop.index, tmp_path / "index")
    (tmp_path / "index" / file).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        SearchIndex.open(tmp_path / "index")


def test_files_that_do_not_belong_together(workshop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(workshop.index, tmp_path / "index")
    meta = json.loads((tmp_path / "index" / "meta.json").read_text())
    (tmp_path / "index" / "meta.json").write_text(json.dumps({**meta, "count": 71}))
    with pytest.raises(ValueError, match="72 vectors of 71 items"):
        SearchIndex.open(tmp_path / "index")


def test_damaged_faiss_file(workshop: Workshop, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    build_index(workshop.store, tmp_path / "index", modality="audio", kind="hnsw")
    file = tmp_path / "index" / "vectors.faiss"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        SearchIndex.open(tmp_path / "index")


def test_an_index_is_replaced_whole_or_not_at_all(workshop: Workshop, tmp_path: Path) -> None:
    target = tmp_path / "index"
    build_index(workshop.store, target, modality="audio")
    with pytest.raises(FileExistsError, match="exists; pass --overwrite"):
        build_index(workshop.store, target, modality="text")

    def break_off(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(workshop.store, target, modality="text", overwrite=True, progress=break_off)
    assert SearchIndex.open(target).meta.modality == "audio"
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    build_index(workshop.store, target, modality="text", overwrite=True)
    assert SearchIndex.open(target).meta.modality == "text"
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"'notes\.txt'"):
        build_index(workshop.store, target, modality="audio", overwrite=True)


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_a_kill_leaves_the_old_index(workshop: Workshop, tmp_path: Path, kind: str) -> None:
    if kind != "exact":
        pytest.importorskip("faiss")
    target = tmp_path / "index"
    build_index(workshop.store, target, modality="audio")
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom diffgap.search.index import build_index\n"
        "def kill(done, total): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"build_index(Path({str(workshop.store)!r}), Path({str(target)!r}), modality='text', kind={kind!r}, "
        "overwrite=True, progress=kill)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2  # it died while it wrote
    assert SearchIndex.open(target).meta.modality == "audio"
    build_index(workshop.store, target, modality="text", overwrite=True)
    assert SearchIndex.open(target).meta.modality == "text"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"modality": "smell"}, ValueError, "modality 'smell'"),
        ({"kind": "lsh"}, ValueError, "kind 'lsh' is unknown"),
        ({"alpha": -1.0}, ValueError, "alpha is -1"),
        ({"alpha": float("nan")}, ValueError, "alpha is nan"),
        ({"split": "dev"}, ValueError, "split 'dev' is unknown"),
        ({"media": Path("/nowhere")}, FileNotFoundError, "media folder /nowhere"),
        ({"run": Path("/nowhere")}, ValueError, "a run folder, and run /nowhere was given too"),
        ({"encoders": {"text": "tests.search.encoders:OtherWords"}}, ValueError, "text:2.*made by text:1"),
        ({"encoders": {"text": "tests.search.encoders:WideWords"}}, ValueError, "text of width 11; 10 is what"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    workshop: Workshop, tmp_path: Path, options: dict[str, object], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        build_index(workshop.run, tmp_path / "index", **{"modality": "audio", "alpha": 1.0, **options})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_bad_input_without_a_run(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="alpha is the weight of a bridge"):
        build_index(workshop.store, tmp_path / "index", modality="audio", alpha=1.0)
    alike = torch.randn(72, 10, generator=torch.Generator().manual_seed(0))
    write_store(tmp_path / "square", make_store(("audio", "text")).with_embeddings("audio", alike))
    words = {"text": "tests.search.encoders:Words"}
    with pytest.raises(ValueError, match="shares its space with no other"):
        build_index(tmp_path / "square", tmp_path / "index", modality="audio", encoders=words)
    build_index(workshop.store, tmp_path / "index", modality="audio")
    index = SearchIndex.open(tmp_path / "index")
    with pytest.raises(ValueError, match="text queries have width 10, the audio items 12"):
        index.queries("text", torch.ones(1, 10))
    with pytest.raises(ValueError, match="k is 0"):
        index.search(torch.ones(1, 12), 0)


def test_faiss_that_is_not_installed(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match="faiss-cpu is not installed; run: pip install"):
        build_index(workshop.store, tmp_path / "index", modality="audio", kind="ivf")
    assert not list(tmp_path.iterdir())
    assert build_index(workshop.store, tmp_path / "index", modality="audio").kind == "exact"
