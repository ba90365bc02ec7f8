"""Checks of a store: each finds its own fault, and nothing in sound data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.diagnose import Finding, check_store
from diffgap.diagnose.statistics import effective_rank, permutation_p_value
from tests.diagnose.bridges import as_store, gapped_arrays


def findings(store: EmbeddingStore) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_store(store)}


def wrong(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.verdict for name, finding in found.items() if finding.verdict != "good"}


def test_nothing_is_wrong_with_sound_data() -> None:
    found = findings(as_store(gapped_arrays()))
    assert wrong(found) == {}
    assert set(found) == {
        "groups/audio, text", "pairing/audio, text",
        *(f"{check}/{name}" for check in ("rows", "duplicates", "spread") for name in ("audio", "text")),
    }  # fmt: skip
    assert all(finding.threshold and finding.reason and not finding.fix for finding in found.values())


def test_shuffled_pairs() -> None:
    arrays = gapped_arrays()
    arrays["text"] = arrays["text"][torch.randperm(240, generator=torch.Generator().manual_seed(1))]
    found = findings(as_store(arrays))
    assert wrong(found) == {"pairing/audio, text": "bad"}
    pairing = found["pairing/audio, text"]
    assert pairing.values["p_value"] > 0.05 and pairing.fix
    assert 0.35 < pairing.values["below_shuffled_median"] < 0.65


def test_some_wrong_pairs_are_named() -> None:
    arrays = gapped_arrays()
    swapped = torch.arange(0, 240, 2)[:60]
    arrays["text"][swapped] = arrays["text"][swapped.roll(1)]
    names = [f"clip{i}" for i in range(240)]
    pairing = findings(as_store(arrays, id=names))["pairing/audio, text"]
    assert pairing.values["p_value"] < 0.01
    assert len(pairing.examples) == 10
    assert {int(name.removeprefix("clip")) for name in pairing.examples} <= set(swapped.tolist())
    # A quarter of the pairs is wrong, and half of those lie below the median of shuffled ones.
    assert 0.06 < pairing.values["below_shuffled_median"] < 0.2


def test_pairs_that_are_hard_to_tell_from_shuffled_ones_are_a_warning() -> None:
    arrays = gapped_arrays()
    swapped = torch.arange(160)
    arrays["text"][swapped] = arrays["text"][swapped.roll(7)]
    assert wrong(findings(as_store(arrays))) == {"pairing/audio, text": "warn"}


def test_pairing_is_judged_on_groups_that_the_map_has_not_seen() -> None:
    """With more coordinates than groups, a map that saw its own groups would find random rows alike."""
    generator = torch.Generator().manual_seed(0)
    arrays = {name: torch.randn(60, 200, generator=generator) for name in ("audio", "text")}
    assert findings(as_store(arrays))["pairing/audio, text"].verdict == "bad"


def test_several_rows_of_a_group_are_all_its_positives() -> None:
    arrays = gapped_arrays(60)
    captions = arrays["text"].repeat_interleave(3, 0) + 0.1 * torch.randn(180, 16)
    groups = [f"g{i}" for i in range(60) for _ in range(3)]
    store = EmbeddingStore.from_arrays(
        {"audio": arrays["audio"], "text": captions}, {"group": groups, "row_audio": [i // 3 for i in range(180)]}
    )
    found = findings(store)
    assert wrong(found) == {}
    assert found["pairing/audio, text"].values["groups"] == 60
    assert found["groups/audio, text"].values["of_one_row"] == 0
    assert found["rows/audio"].values["rows"] == 60


def test_too_few_groups_are_not_judged() -> None:
    found = findings(as_store(gapped_arrays(7)))
    assert found["pairing/audio, text"].verdict == "warn"
    assert "fewer than 8 groups" in found["pairing/audio, text"].threshold


@pytest.mark.parametrize(("copies", "verdict"), [(0, "good"), (2, "warn"), (60, "bad")])
def test_copies_in_other_groups(copies: int, verdict: str) -> None:
    arrays = gapped_arrays()
    arrays["text"][1 : 1 + copies] = 2.5 * arrays["text"][0] * (1 + 1e-4 * torch.randn(copies, 16))
    found = findings(as_store(arrays))["duplicates/text"]
    assert found.verdict == verdict
    assert found.values["share"] == pytest.approx((copies + 1) / 240 if copies else 0)
    assert found.examples[:2] == (("0", "1") if copies else ())


def test_copies_in_the_same_group_are_no_fault() -> None:
    arrays = gapped_arrays()
    doubled = {name: x.repeat_interleave(2, 0) for name, x in arrays.items()}
    groups = [f"g{i // 2}" for i in range(480)]
    splits = [("train", "val")[i // 2 % 2] for i in range(480)]
    assert wrong(findings(EmbeddingStore.from_arrays(doubled, {"group": groups, "split": splits}))) == {}


@pytest.mark.parametrize(("deviation", "verdict"), [(0.05, "bad"), (0.2, "warn"), (1.0, "good")])
def test_an_encoder_that_gives_nearly_one_vector(deviation: float, verdict: str) -> None:
    arrays = gapped_arrays()
    arrays["text"] = torch.ones(16) + deviation * torch.randn(240, 16, generator=torch.Generator().manual_seed(3))
    assert findings(as_store(arrays))["spread/text"].verdict == verdict


def test_an_encoder_with_few_directions_or_dead_coordinates() -> None:
    arrays = gapped_arrays()
    line = torch.linspace(-1, 1, 240)[:, None] * torch.ones(1, 16)
    arrays["text"] = line + 0.01 * gapped_arrays()["text"]
    found = findings(as_store(arrays))["spread/text"]
    assert found.verdict == "warn" and found.values["effective_rank"] < found.values["needed_rank"]
    arrays = gapped_arrays()
    arrays["text"][:, 7:] = 0.3
    found = findings(as_store(arrays))["spread/text"]
    assert found.verdict == "warn" and found.values["constant_coordinates"] == pytest.approx(9 / 16)


def test_broken_rows_are_findings_and_nothing_else_falls_over_them(tmp_path: Path) -> None:
    write_store(tmp_path / "store", as_store(gapped_arrays()))
    text = gapped_arrays()["text"]
    text[3, 2], text[9], text[17, 0] = torch.nan, 0.0, torch.inf
    save_file({"embeddings": text}, tmp_path / "store" / "text.safetensors", {"format_version": "1"})
    found = findings(EmbeddingStore.open(tmp_path / "store", check=False))
    assert wrong(found) == {"rows/text": "bad"}
    assert found["rows/text"].values == {"rows": 240, "not_finite": 2, "zero": 1}
    assert found["rows/text"].examples == ("3", "9", "17")
    assert found["pairing/audio, text"].values["groups"] == 237


def test_groups_that_are_no_groups() -> None:
    arrays = gapped_arrays()
    same = EmbeddingStore.from_arrays(arrays, {"group": ["all"] * 239 + ["other"]})
    assert findings(same)["groups/audio, text"].verdict == "bad"
    half = [f"g{i // 2}" for i in range(240)]  # a group's two rows are in two splits
    leaking = findings(as_store(arrays, group=half, split=["train", "test"] * 120))["groups/audio, text"]
    assert leaking.verdict == "bad" and leaking.values["in_several_splits"] == 120
    apart = EmbeddingStore.from_arrays(
        arrays, {"row_audio": [i if i < 150 else -1 for i in range(240)], "row_text": [-1] * 100 + [*range(100, 240)]}
    )
    found = findings(apart)
    assert found["groups/audio, text"].verdict == "warn"
    assert found["groups/audio, text"].values["without_pair"] == pytest.approx(190 / 240)
    assert found["pairing/audio, text"].values["groups"] == 50


def test_a_store_of_one_group() -> None:
    store = EmbeddingStore.from_arrays(gapped_arrays(20), {"group": ["all"] * 20})
    assert wrong(findings(store)) == {"groups/audio, text": "bad", "pairing/audio, text": "warn"}


def test_frames_beyond_a_sequences_length_do_not_count() -> None:
    generator = torch.Generator().manual_seed(0)
    frames, lengths = torch.randn(40, 5, 6, generator=generator), torch.arange(40) % 5 + 1
    text = frames[:, 0] + 0.1 * torch.randn(40, 6, generator=generator)
    padded = frames.clone()
    padded[torch.arange(5) >= lengths[:, None]] = 1e4

    def values(sequences: torch.Tensor) -> dict[str, dict[str, float]]:
        arrays = {"audio": sequences, "text": text}
        return {
            name: f.values
            for name, f in findings(EmbeddingStore.from_arrays(arrays, lengths={"audio": lengths})).items()
        }

    assert values(padded) == values(frames)


def test_effective_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64)).Q
    centred = basis - basis.mean(0)
    rows = torch.linalg.svd(centred, full_matrices=False)
    equal = rows.U[:, :5] @ rows.Vh[:5]  # five equal singular values, centred
    assert effective_rank(equal + 3.0) == pytest.approx(5.0)
    weighted = rows.U[:, :3] @ torch.diag(torch.tensor([4.0, 2.0, 2.0], dtype=torch.float64)) @ rows.Vh[:3]
    assert effective_rank(weighted) == pytest.approx(2**1.5)  # entropy of (1/2, 1/4, 1/4)
    assert effective_rank(torch.ones(9, 4)) == 0.0
    assert effective_rank(torch.arange(9.0)[:, None] * torch.ones(1, 4)) == pytest.approx(1.0, abs=1e-5)


def test_permutation_p_value() -> None:
    generator = np.random.default_rng(0)
    noise = torch.from_numpy(generator.normal(size=(20, 20)))
    assert permutation_p_value([noise + 3 * torch.eye(20)] * 2, 99, seed=0) == 0.01
    assert permutation_p_value([noise - 3 * torch.eye(20)], 99, seed=0) == 1.0
    p = [permutation_p_value([torch.from_numpy(generator.normal(size=(20, 20)))], 39, seed=seed) for seed in range(100)]
    assert 0.4 < np.mean(p) < 0.6 and 1 <= sum(value <= 0.05 for value in p) <= 12  # uniform under the null
