"""The protocols against the code that published numbers come from, written again here, and run itself where it is."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.retrieval.protocol_evaluate import RAW, evaluate_protocol, raw_scores
from diffgap.retrieval.protocols import PROTOCOLS, protocol_task
from diffgap.retrieval.published import PUBLISHED
from diffgap.retrieval.tasks import Items
from tests.synthetic import make_store

TO_AUDIO, TO_TEXT = "text -> audio", "audio -> text"
METRICS = ("R@1", "R@5", "R@10", "mAP@10")
Metrics = dict[str, dict[str, float]]


def clip_store(captions: list[int], *, noise: float = 1.5, seed: int = 0, **columns: Any) -> EmbeddingStore:
    """Clips with these numbers of captions, in the test split: audio is shared by the rows of a clip."""
    generator = torch.Generator().manual_seed(seed)
    clip = np.repeat(np.arange(len(captions)), captions)
    audio = torch.randn(len(captions), 12, generator=generator)
    text = audio[clip] + noise * torch.randn(len(clip), 12, generator=generator)
    index = {"group": [f"c{i}" for i in clip], "split": ["test"] * len(clip), "row_audio": clip, **columns}
    return EmbeddingStore.from_arrays({"audio": audio, "text": text}, index)


def found(store: EmbeddingStore, folder: Path, protocol: Any = "audiocaps") -> Metrics:
    """Estimates by direction and metric, from a store on disk."""
    write_store(folder / "store", store)
    report = evaluate_protocol(protocol, [folder / "store"], replicates=2)
    return {
        direction: {metric: cell[metric].estimate for metric in METRICS}
        for direction, cell in report.metrics[RAW].items()
    }


def argsorted(
    audio: np.ndarray, text: np.ndarray, clip: np.ndarray, sort: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Metrics:
    """WavCaps' t2a and a2t from the definitions: ranks by sorting every row of scores; ``sort`` gives the order, best
    first, of scores and of whether each is right."""
    audio, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (audio, text))
    scores = text @ audio.T
    to_audio = []
    for caption, row in enumerate(scores):
        right = np.arange(len(audio)) == clip[caption]
        to_audio.append([int(np.flatnonzero(sort(row, right) == clip[caption])[0])])
    to_text = []
    for number, row in enumerate(scores.T):
        own = np.flatnonzero(clip == number)
        order = sort(row, clip == number)
        to_text.append(sorted(int(np.flatnonzero(order == caption)[0]) for caption in own))
    result = {}
    for direction, ranks in ((TO_AUDIO, to_audio), (TO_TEXT, to_text)):
        values = {f"R@{k}": float(np.mean([own[0] < k for own in ranks])) for k in (1, 5, 10)}
        values["mAP@10"] = float(
            np.mean([sum(j / (r + 1) for j, r in enumerate(own, 1) if r < 10) / min(len(own), 10) for own in ranks])
        )
        result[direction] = values
    return result


def any_order(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.argsort(scores)[::-1]


def worst_order(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.lexsort((right, -scores))


def best_order(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.lexsort((~right, -scores))


def arrays(store: EmbeddingStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Audio by clip, captions, and the clip of each caption, in float64."""
    clip = store.rows("audio")
    audio = store.embeddings("audio", np.unique(clip, return_index=True)[1])
    return audio.double().numpy(), store.embeddings("text").double().numpy(), clip


def assert_same(actual: Metrics, expected: Metrics) -> None:
    for direction in (TO_AUDIO, TO_TEXT):
        assert actual[direction] == pytest.approx(expected[direction], abs=1e-12), direction


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("protocol", ["audiocaps", "clotho"])
def test_random_scores_agree_with_argsort(protocol: str, seed: int, tmp_path: Path) -> None:
    store = clip_store([5] * 37, seed=seed)
    expected = argsorted(*arrays(store), any_order)
    assert 0.05 < expected[TO_TEXT]["R@1"] < 0.95 and 0.05 < expected[TO_AUDIO]["mAP@10"] < 0.95
    assert_same(found(store, tmp_path, protocol), expected)


def laion() -> Callable[..., dict[str, dict[str, float]]]:
    """``evaluate_clotho_audiocaps`` as installed, without importing the package, which loads tokenizers."""
    spec = importlib.util.find_spec("laion_clap")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("laion-clap is not installed")
    file = Path(spec.submodule_search_locations[0]) / "training" / "train.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "evaluate_clotho_audiocaps"]
    names: dict[str, Any] = {"torch": torch, "np": np, "F": F, "logging": logging}
    exec(compile(tree, str(file), "exec"), names)
    return names["evaluate_clotho_audiocaps"]  # type: ignore[no-any-return]


def run_laion(audio: torch.Tensor, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Metrics:
    """What LAION's function makes of clips and captions, five to a clip in order."""
    evaluate = laion()
    monkeypatch.setitem(sys.modules, "clap_module", types.SimpleNamespace(tokenize=lambda rows: rows))  # type: ignore[arg-type]
    rows = torch.arange(len(text)).view(-1, 5)
    batch = {"full_text": list(rows), "__url__": ["sets/clips/test/0.tar"] * len(audio)}

    def model(audios: object, texts: torch.Tensor | None, device: object) -> Any:
        if texts is not None:
            return text[texts]
        return audio if audios is not None else (torch.tensor(1.0), torch.tensor(1.0))

    args = types.SimpleNamespace(tmodel="transformer")
    data = {"val": types.SimpleNamespace(dataloader=[batch])}
    metrics = evaluate(model, data, 0, args, contextlib.nullcontext, "cpu")["clips-test"]
    return {
        direction: {metric: float(metrics[f"clips-test/{name}_{metric}"]) for metric in METRICS}
        for direction, name in ((TO_AUDIO, "text_to_audio"), (TO_TEXT, "audio_to_text"))
    }


@pytest.mark.parametrize("seed", range(3))
def test_random_scores_agree_with_laion(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All eight where a clip's captions come in the order of their scores; else all but the one it does not sort."""
    store = clip_store([5] * 41, seed=seed)
    audio = store.embeddings("audio", np.arange(0, len(store), 5))
    text = store.embeddings("text")
    actual = found(store, tmp_path)
    own = F.cosine_similarity(text.view(-1, 5, 12), audio[:, None], dim=2).argsort(dim=1, descending=True)
    ordered = text.view(-1, 5, 12).gather(1, own[..., None].expand(-1, -1, 12)).flatten(0, 1)
    assert_same(actual, run_laion(audio, ordered, monkeypatch))
    unsorted = run_laion(audio, text, monkeypatch)
    assert unsorted[TO_TEXT].pop("mAP@10") > actual[TO_TEXT].pop("mAP@10")
    assert_same(actual, unsorted)


def test_laions_map_can_exceed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions in ascending order of score, all right: 1, the definition says, and LAION's code 1.74."""
    audio = torch.eye(2)
    heights = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9])
    text = torch.cat((torch.stack((heights, 0.1 * heights**0), 1), torch.stack((0.1 * heights**0, heights), 1)))
    expected = sum(j / r for j, r in zip(range(1, 6), range(5, 0, -1), strict=True)) / 5
    assert run_laion(audio, text, monkeypatch)[TO_TEXT]["mAP@10"] == pytest.approx(expected)
    sides = {
        "audio": Items(audio, np.array(["a", "b"])),
        "text": Items(text, np.repeat(["a", "b"], 5)),
    }
    scores = raw_scores(sides)
    assert scores is not None and scores[TO_TEXT].values["mAP@10"].tolist() == [1, 1]


@pytest.mark.parametrize("seed", range(4))
def test_tied_scores_are_the_worst_that_sorting_may_give(seed: int, tmp_path: Path) -> None:
    """Captions and clips that repeat: argsort gives anything between the worst order and the best."""
    rng = np.random.default_rng(seed)
    store = clip_store([5] * 30, seed=seed)
    text = store.embeddings("text")[rng.integers(0, 60, len(store))]
    audio = store.embeddings("audio", np.arange(0, len(store), 5))[rng.integers(0, 20, 30)]
    index = {"group": store.column("group").tolist(), "split": ["test"] * len(store), "row_audio": store.rows("audio")}
    tied = EmbeddingStore.from_arrays({"audio": audio, "text": text}, index)
    actual = found(tied, tmp_path)
    assert_same(actual, argsorted(*arrays(tied), worst_order))
    best, chance = argsorted(*arrays(tied), best_order), argsorted(*arrays(tied), any_order)
    for direction in (TO_AUDIO, TO_TEXT):
        assert actual[direction]["mAP@10"] < best[direction]["mAP@10"]
        for metric in METRICS:
            assert actual[direction][metric] <= chance[direction][metric] <= best[direction][metric]


def test_number_of_ties_is_said() -> None:
    """Two captions are those of other clips, one repeats in its own clip, which does no harm."""
    store = clip_store([5] * 6)
    text = store.embeddings("text")
    text[0], text[12], text[21] = text[7], text[7], text[20]
    task = protocol_task(store.with_embeddings("text", text), "audiocaps", (), "test")
    assert [note for note in task.notes if "tie" in note] == [
        "3 of 30 text embeddings are those of another group too: they tie, and a tie counts against the method, where "
        "argsort decides by chance"
    ]


@pytest.mark.parametrize("clips", [12, 200])
def test_collapsed_embeddings_score_no_better_than_chance(clips: int) -> None:
    groups = np.array([f"c{i}" for i in range(clips)])
    sides = {
        "audio": Items(torch.ones(clips, 7), groups),
        "text": Items(torch.ones(5 * clips, 7), np.repeat(groups, 5)),
    }
    scores = raw_scores(sides)
    assert scores is not None
    for one in scores.values():
        for k in (1, 5, 10):
            assert float(one.values[f"R@{k}"].mean()) <= k / clips
        assert float(one.values["mAP@10"].mean()) <= 1 / clips


def test_unequal_numbers_of_captions(tmp_path: Path) -> None:
    store = clip_store([5, 1, 7, 5, 3, 5, 12, 2] * 4)
    assert_same(found(store, tmp_path), argsorted(*arrays(store), any_order))


def test_more_captions_than_ten_have_a_perfect_score_of_one(tmp_path: Path) -> None:
    values = found(clip_store([12, 12, 12], noise=0.01), tmp_path)
    assert values[TO_TEXT] == dict.fromkeys(METRICS, 1.0)


def test_shared_repeated_and_interleaved_rows_are_the_same(tmp_path: Path) -> None:
    """A clip's audio once, as WavCaps keeps it (once a caption), and in any order of rows."""
    store = clip_store([5] * 23)
    shared = found(store, tmp_path / "shared")
    index = {"group": store.column("group").tolist(), "split": ["test"] * len(store)}
    repeated = EmbeddingStore.from_arrays({"audio": store.embeddings("audio"), "text": store.embeddings("text")}, index)
    assert_same(found(repeated, tmp_path / "repeated"), shared)
    mixed = store.select(np.random.default_rng(0).permutation(len(store)))
    assert_same(found(mixed, tmp_path / "mixed"), shared)


def test_captions_that_share_an_embedding_are_all_queries_and_all_in_the_gallery(tmp_path: Path) -> None:
    """A sentence that was said of two clips, and twice of one, is embedded once; it stays four captions."""
    full = clip_store([5] * 21)
    rows = np.arange(len(full))
    rows[[5, 9, 16]] = 2
    index = {
        "group": full.column("group").tolist(),
        "split": ["test"] * len(full),
        "row_audio": full.rows("audio"),
        "row_text": rows,
    }
    audio = full.embeddings("audio", np.arange(0, len(full), 5))
    store = EmbeddingStore.from_arrays({"audio": audio, "text": full.embeddings("text")}, index)
    task = protocol_task(store, "audiocaps", (), "test")
    assert [len(side.groups) for side in task.sides.values()] == [21, 105]
    assert_same(found(store, tmp_path), argsorted(*arrays(store), worst_order))


def test_groups_without_one_of_the_two_are_left_out_and_counted(tmp_path: Path) -> None:
    full = clip_store([5] * 20)
    audio, text = full.rows("audio"), np.arange(len(full))
    audio[:10] = -1  # two clips without audio
    text[10:15] = -1  # one clip without captions
    text[15] = -1  # one clip with four
    index = {"group": full.column("group").tolist(), "split": ["test"] * len(full)}
    embeddings = {"audio": full.embeddings("audio", np.arange(0, len(full), 5)), "text": full.embeddings("text")}
    store = EmbeddingStore.from_arrays(embeddings, {**index, "row_audio": audio, "row_text": text})
    task = protocol_task(store, "audiocaps", (), "test")
    assert task.clips == 17 and [len(side.groups) for side in task.sides.values()] == [17, 84]
    assert not task.comparable
    assert task.notes[1:] == [
        "1 of 17 clips do not have 5 captions, but 4 to 5: not comparable with published numbers",
        "1 groups have audio but no text: left out",
        "2 groups have text but no audio: left out",
    ]
    kept = full.select(np.arange(16, len(full)))
    clip = np.repeat(np.arange(17), [4, *[5] * 16])
    expected = argsorted(arrays(full)[0][3:], kept.embeddings("text").double().numpy(), clip, any_order)
    assert_same(found(store, tmp_path), expected)


def with_clips(clips: int, *, captions: int = 5, split: str = "test") -> EmbeddingStore:
    return clip_store([captions] * clips, split=[split] * (clips * captions))


@pytest.mark.parametrize(
    ("protocol", "clips", "note"),
    [
        ("audiocaps", 975, "N = 975: as many as the official test set"),
        ("audiocaps", 957, "N = 957: as many as WavCaps' list"),
        ("audiocaps", 816, "N = 816: as many as the retrieval split of Oncescu et al."),
        ("audiocaps", 940, "N = 940 of 975: not comparable with published numbers on the official test set"),
        ("audiocaps", 1045, "N = 1,045 instead of 975: not comparable with published numbers"),
        ("clotho", 1045, "N = 1,045: as many as the official evaluation set"),
        ("clotho", 957, "N = 957 of 1,045: not comparable with published numbers"),
    ],
)
def test_published_rows_stand_beside_the_same_protocol_and_n_alone(
    protocol: Any, clips: int, note: str, tmp_path: Path
) -> None:
    write_store(tmp_path / "store", with_clips(clips))
    report = evaluate_protocol(protocol, [tmp_path / "store"], replicates=2)
    assert report.notes[0].startswith(note)
    assert report.clips == clips and report.items == {"audio": clips, "text": 5 * clips}
    expected = [row.system for row in PUBLISHED[protocol] if row.clips == clips]
    assert [row.system for row in report.published] == expected
    assert bool(expected) == ((protocol, clips) in {("audiocaps", 957), ("audiocaps", 816), ("clotho", 1045)})


@pytest.mark.parametrize(("captions", "split"), [(4, "test"), (5, "val")])
def test_published_rows_need_five_captions_and_the_test_split(captions: int, split: str, tmp_path: Path) -> None:
    """Clotho's validation split has as many clips as its test split."""
    write_store(tmp_path / "store", with_clips(1045, captions=captions, split=split))
    report = evaluate_protocol("clotho", [tmp_path / "store"], split=split, replicates=2)
    assert not report.published and any("not comparable with published numbers" in note for note in report.notes)


def test_published_numbers_are_percentages_with_a_source() -> None:
    for name, rows in PUBLISHED.items():
        for row in rows:
            assert 0 < row.recalls[0] <= row.recalls[1] <= row.recalls[2] < 100
            assert row.source.startswith("https://") and row.direction == TO_AUDIO
            assert row.clips in PROTOCOLS[name].sets  # type: ignore[index]


def video_store(groups: list[str]) -> EmbeddingStore:
    generator = torch.Generator().manual_seed(0)
    audio = torch.randn(len(groups), 8, generator=generator)
    video = audio + torch.randn(audio.shape, generator=generator)
    return EmbeddingStore.from_arrays(
        {"audio": audio, "video": video}, {"group": groups, "split": ["test"] * len(groups)}
    )


def test_vggsound_is_retrieval_of_the_same_clip_both_ways(tmp_path: Path) -> None:
    store = video_store([f"v{i}" for i in range(60)])
    write_store(tmp_path / "store", store)
    report = evaluate_protocol("vggsound", [tmp_path / "store"], replicates=2)
    audio, video = (F.normalize(store.embeddings(name), dim=1).double().numpy() for name in ("audio", "video"))
    for direction, scores in (("audio -> video", audio @ video.T), ("video -> audio", video @ audio.T)):
        ranks = np.argmax(np.argsort(-scores, axis=1) == np.arange(60)[:, None], axis=1)
        for k in (1, 5, 10):
            assert report.metrics[RAW][direction][f"R@{k}"].estimate == pytest.approx(np.mean(ranks < k))
        mean = np.where(ranks < 10, 1 / (ranks + 1), 0).mean()
        assert report.metrics[RAW][direction]["mAP@10"].estimate == pytest.approx(mean)
    assert report.notes[0].startswith("There is no standard") and report.notes[1].startswith("N = 60 of 15,446")
    assert not report.published


def test_vggsound_refuses_groups_of_several_clips() -> None:
    with pytest.raises(ValueError, match="group 'dog' has several different audio embeddings; protocol 'vggsound'"):
        protocol_task(video_store(["dog", "dog", "cat"]), "vggsound", (), "test")


def test_pairs_are_what_the_plain_evaluation_scores() -> None:
    """Several embeddings a group on both sides: any of the group is right."""
    store = make_store(groups=24, per_group=3, splits=("test",))
    task = protocol_task(store, "pairs", ("text", "audio"), "test")
    assert list(task.sides) == ["text", "audio"] and task.clips == 24
    assert all(len(side.groups) == 72 for side in task.sides.values())


def test_intervals_resample_clips(tmp_path: Path) -> None:
    """Captions of a clip that succeed and fail together are one observation, not five."""
    generator = torch.Generator().manual_seed(0)
    clip = np.repeat(np.arange(40), 5)
    audio = torch.randn(40, 16, generator=generator)
    far = audio.roll(1, 0)
    text = torch.where((torch.arange(40) % 2 == 0)[:, None], audio, far)[clip]
    text = text + 0.01 * torch.randn(text.shape, generator=generator)
    index = {"group": [f"c{i}" for i in clip], "split": ["test"] * 200, "row_audio": clip}
    write_store(tmp_path / "store", EmbeddingStore.from_arrays({"audio": audio, "text": text}, index))
    report = evaluate_protocol("audiocaps", [tmp_path / "store"], replicates=4000)
    low, high = report.metrics[RAW][TO_AUDIO]["R@1"][1:]
    assert report.metrics[RAW][TO_AUDIO]["R@1"].estimate == 0.5
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.25 / 40), rel=0.1)
