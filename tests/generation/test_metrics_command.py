"""``diffgap metrics``: sets and folders, what it writes, classifiers that never hear what is evaluated, bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.generation.generated import GeneratedItem, GeneratedSet
from diffgap.generation.metrics import AudioReport, LinearClassifier, evaluate_audio
from diffgap.generation.metrics.fitting import with_classifier
from diffgap.retrieval.bootstrap import paired_bootstrap
from tests.generation.toy_backbone import RATE, Spectral, bands, tones, write
from tests.helpers import run

pytest.importorskip("librosa")
pytest.importorskip("soundfile")

KINDS = {"low": (300.0, 900.0), "high": (2800.0, 3500.0)}
FEATURES = "tests.generation.test_metrics_command:Features"
LABELS = {f"clip{number:03d}": list(KINDS)[number % 2] for number in range(12)}


class Features(Spectral):
    """A backbone of features alone."""

    def __init__(self, frames: str = "1") -> None:
        super().__init__(outputs=["features"], frames=int(frames))


class Captions:
    """A text tower in the space of :class:`Heard`: where the caption says the sound's energy is."""

    modality, dim, sequence, normalized, fingerprint, space = "text", 8, False, False, "captions:v1", "toy:1"
    reader = Spectral().reader

    def encode(self, batch):
        return np.array([[1.0, 0.1, 0, 0, 0, 0, 0, 0] if "low" in x else [0] * 6 + [0.1, 1.0] for x in batch])


class Heard(Spectral):
    """A backbone that shares its space with the captions."""

    def __init__(self) -> None:
        super().__init__("heard", space="toy:1")


def of_kinds(*, seed: int, swapped: int = 0) -> dict[str, np.ndarray]:
    """The twelve clips, each of its label; the first ``swapped`` of the other."""
    kinds = {kind: tones(12, seed=seed, low=low, high=high) for kind, (low, high) in KINDS.items()}
    names = list(KINDS)
    return {name: kinds[names[(number + (number < swapped)) % 2]][name] for number, name in enumerate(kinds["low"])}


def make_set(folder: Path, *, column: str | None = None) -> Path:
    """Bridged: all of the right kind. Raw: half of them. None: whatever it is."""
    systems = {
        "reference": of_kinds(seed=1),
        "bridged": of_kinds(seed=2),
        "raw": of_kinds(seed=3, swapped=6),
        "none": tones(12, seed=4),
    }
    for name, clips in systems.items():
        write(folder / name, clips)
    items = tuple(GeneratedItem(n, f"id-{n}", f"a {LABELS[n]} tone", LABELS[n], 0.1) for n in LABELS)
    order = ("reference", "bridged", "raw", "none")
    GeneratedSet(folder, RATE, "text", order, items, {"label": column} if column else {}).write()
    return folder


def recordings(folder: Path, *, seed: int = 9, also: Path | None = None) -> Path:
    """labels.csv of thirty recordings of each kind, and of those in the folder ``also`` with labels that are wrong."""
    lines = []
    for kind, (low, high) in KINDS.items():
        write(folder / kind, tones(30, seed=seed, low=low, high=high))
        lines += [(f"{kind}/{file.name}", kind) for file in sorted((folder / kind).iterdir())]
    if also is not None:
        lines += [(str(file), "wrong") for file in sorted(also.iterdir())]
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *lines, ("absent.wav", "")])
    return folder / "labels.csv"


def written(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_a_set_is_measured_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_set(tmp_path / "set")
    csv_file = recordings(tmp_path / "others", also=made / "reference")
    status = run(
        "metrics", made, "--backbone", "mel", FEATURES, "--classifier", csv_file, "--splits", 2, "--resamples", 50
    )
    assert status == 0, capsys.readouterr().err
    content = written(made)
    assert content["format"] == "diffgap-metrics/1"
    assert list(content["systems"]) == ["reference", "bridged", "raw", "none"]
    reports = {name: AudioReport.parse(report) for name, report in content["systems"].items()}
    for name in ("bridged", "raw", "none"):
        assert {f.metric for f in reports[name].figures} == {
            "mel_distance", "inception_score", "kl_softmax", "kl_sigmoid", "frechet_distance", "kernel_distance",
            "recording_cosine", "recording_R@1", "recording_R@5", "recording_R@10", "recording_MRR", "label_agreement",
        }  # fmt: skip
        assert all(
            (f.generated, bool(f.fingerprint), f.low is not None) == (12, True, True) for f in reports[name].figures
        )
    assert {f.metric for f in reports["reference"].figures} == {"inception_score", "label_agreement"}
    agreement = {name: report.figure("label_agreement") for name, report in reports.items()}
    assert (agreement["reference"].estimate, agreement["bridged"].estimate, agreement["raw"].estimate) == (1, 1, 0.5)
    assert agreement["raw"].values == (0.0,) * 6 + (1.0,) * 6
    assert agreement["raw"].details["chance"] == "0.5, by always saying 'high'"
    distance = {name: report.figure("mel_distance") for name, report in reports.items() if name != "reference"}
    assert distance["bridged"].estimate < min(distance["raw"].estimate, distance["none"].estimate)
    # Paired differences are those of the pairs' own values.
    found = {(d["first"], d["second"], d["metric"]): d for d in content["differences"]}
    assert {key[:2] for key in found} == {("raw", "bridged"), ("none", "bridged")}
    for metric, figures in (("label_agreement", agreement), ("mel_distance", distance)):
        values = [np.asarray(figures[name].values) for name in ("bridged", "raw")]
        one = found["raw", "bridged", metric]
        expected = paired_bootstrap(*values, resamples=50)
        assert (one["estimate"], one["low"], one["high"]) == pytest.approx(tuple(expected))
    assert found["raw", "bridged", "frechet_distance"]["low"] is None
    page = (made / "metrics.md").read_text()
    assert "| metric | better | reference | bridged | raw | none | N | against | backbone | fingerprint | Hz |" in page
    assert "| label_agreement | higher | 1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] | 0.5000 [" in page
    assert "| bridged - raw | label_agreement | toy+linear | higher | 0.5000 |" in page
    assert "chance 0.5, by always saying 'high'" in page
    assert "classifier: label of labels.csv" in page
    shown = capsys.readouterr().out
    assert "mel_distance" in shown and "bridged - raw" in shown and str(RATE) in shown


def test_the_classifier_does_not_learn_from_what_is_evaluated(tmp_path: Path) -> None:
    """Same files under other names and labels in the .csv, same ids in the store."""
    made = make_set(tmp_path / "set")
    files = sorted((made / "reference").iterdir())
    backbone = Features()
    (ours,) = with_classifier(
        [backbone], recordings(tmp_path / "a", also=made / "reference"), "label", recordings=files
    )
    (plain,) = with_classifier([backbone], recordings(tmp_path / "b"), "label")
    assert ours.fingerprint == plain.fingerprint
    assert ours.classes == ("high", "low")  # type: ignore[attr-defined]
    features = [
        bands(wave, 8) for low, high in KINDS.values() for wave in tones(30, seed=9, low=low, high=high).values()
    ]
    names = [kind for kind in KINDS for _ in range(30)]
    expected = LinearClassifier.fit(np.stack(features), names, fingerprint=backbone.fingerprint)
    order = np.random.default_rng(0).normal(size=(5, 8))
    assert ours.classifier.logits(order) == pytest.approx(expected.logits(order), abs=1e-6)  # type: ignore[attr-defined]
    # By id, where the bytes are others.
    (left,) = with_classifier([backbone], recordings(tmp_path / "c"), "label", ids=["low/clip000.wav"])
    assert left.classifier.fitted_to == 59 and ours.classifier.fitted_to == 60  # type: ignore[attr-defined]
    listed = recordings(tmp_path / "d")
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join([f"{lines[0]},id", *(f"{line},r{n}" for n, line in enumerate(lines[1:]))]))
    (left,) = with_classifier([backbone], listed, "label", ids=["r0", "r1", "low/clip009.wav"])
    assert left.classifier.fitted_to == 58  # type: ignore[attr-defined]
    # A store: train rows alone, and none of the evaluated ids.
    rows = np.stack([*features, *features[:4]])
    index = {
        "id": [f"r{n}" for n in range(60)] + ["id-clip000", "t1", "t2", "t3"],
        "split": ["train"] * 61 + ["test", "val", "test"],
        "kind": [*names, *["wrong"] * 4],
    }
    store = EmbeddingStore.from_arrays({"audio": rows}, index, encoders={"audio": backbone.fingerprint})
    write_store(tmp_path / "store", store)
    (stored,) = with_classifier([backbone], tmp_path / "store", "kind", ids=["id-clip000"])
    assert stored.classifier.logits(order) == pytest.approx(expected.logits(order), abs=1e-6)  # type: ignore[attr-defined]


def test_a_store_of_sequences_is_averaged(tmp_path: Path) -> None:
    backbone = Features("4")
    clips = [
        (kind, wave) for kind, (low, high) in KINDS.items() for wave in tones(9, low=low, high=high, seed=1).values()
    ]
    x = np.stack([np.stack([bands(part, 8) for part in np.array_split(wave, 4)]) for _, wave in clips])
    lengths = np.tile([4, 2, 3], 6)
    x[np.arange(4) >= lengths[:, None]] = 0
    store = EmbeddingStore.from_arrays(
        {"audio": x}, {"label": [kind for kind, _ in clips]}, lengths={"audio": lengths},
        encoders={"audio": backbone.fingerprint},
    )  # fmt: skip
    write_store(tmp_path / "store", store)
    (made,) = with_classifier([backbone], tmp_path / "store", "label")
    means = np.stack([rows[:length].mean(0) for rows, length in zip(x, lengths, strict=True)])
    expected = LinearClassifier.fit(means, [kind for kind, _ in clips], fingerprint=backbone.fingerprint)
    assert made.classifier.logits(means) == pytest.approx(expected.logits(means), abs=1e-5)  # type: ignore[attr-defined]


def test_captions_by_a_text_tower(tmp_path: Path) -> None:
    made = make_set(tmp_path / "set")
    here = "tests.generation.test_metrics_command"
    assert run("metrics", made, "--backbone", f"{here}:Heard", "--text", f"{here}:Captions", "--resamples", 20) == 0
    reports = {name: AudioReport.parse(report) for name, report in written(made)["systems"].items()}
    scores = {name: report.figure("clap_score").estimate for name, report in reports.items()}
    tower = Captions()
    for name, clips in (("bridged", of_kinds(seed=2)), ("raw", of_kinds(seed=3, swapped=6))):
        x = np.stack([bands(clips[item], 8) for item in LABELS])
        y = tower.encode([f"a {label} tone" for label in LABELS.values()])
        cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        assert scores[name] == pytest.approx(cosines.mean(), rel=1e-6)
    assert reports["bridged"].figure("R@1").estimate > reports["raw"].figure("R@1").estimate


def test_a_folder_against_a_folder(tmp_path: Path) -> None:
    made, real = of_kinds(seed=2), of_kinds(seed=1)
    write(tmp_path / "made", made)
    write(tmp_path / "real", real)
    here = "tests.generation.toy_backbone:Spectral"
    status = run(
        "metrics", tmp_path / "made", "--reference", tmp_path / "real", "--backbone", "mel", here, "--output",
        tmp_path / "out", "--splits", 2, "--resamples", 20,
    )  # fmt: skip
    assert status == 0
    content = written(tmp_path / "out")
    assert list(content["systems"]) == ["reference", "generated"] and not content["differences"]
    report = AudioReport.parse(content["systems"]["generated"])
    direct = evaluate_audio(tmp_path / "made", tmp_path / "real", backbones=Spectral(), splits=2, resamples=20, seed=0)
    assert [f.estimate for f in report.figures if f.backbone == "toy"] == [f.estimate for f in direct.figures]
    assert not (tmp_path / "made" / "metrics.json").exists()


def test_an_item_with_a_broken_clip_is_left_out_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_set(tmp_path / "set")
    write(made / "raw", {"clip003": np.zeros(800, dtype=np.float32)})
    arguments = ("metrics", made, "--backbone", "mel", "--resamples", 20)
    assert run(*arguments) == 2
    assert "raw: 1 clips cannot be evaluated: generated/clip003 (silent)" in capsys.readouterr().err
    assert not (made / "metrics.json").exists()
    assert run(*arguments, "--skip-broken") == 0
    content = written(made)
    assert content["left_out"] == ["clip003"]
    for report in content["systems"].values():
        assert "clip003" not in report["names"] and len(report["names"]) == 11
    assert "1 items left out, as a clip is broken: clip003" in (made / "metrics.md").read_text()


def test_results_are_replaced_and_nothing_else_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_set(tmp_path / "set")
    arguments = ("metrics", made, "--backbone", "mel", "--resamples", 20)
    assert run(*arguments) == 0
    first = written(made)
    assert run(*arguments) == 0
    assert written(made) == first
    (made / "metrics.json").write_text('{"accuracy": 1}')
    assert run(*arguments) == 2
    assert "exists and is not of `diffgap metrics`" in capsys.readouterr().err
    assert (made / "metrics.json").read_text() == '{"accuracy": 1}'


def test_labels_that_the_classifier_lacks_count_as_wrong() -> None:
    clips = of_kinds(seed=2)
    backbone = Spectral()
    backbone.classes = ("low", "none", "high")  # type: ignore[attr-defined]
    labels = {**LABELS, "clip000": "other"}
    report = evaluate_audio(
        clips, backbones=backbone, labels=labels, metrics=["label_agreement"], sample_rate=RATE, resamples=20
    )
    figure = report.figure("label_agreement")
    assert figure.values == (0.0,) + (1.0,) * 11
    assert figure.against == 3 and figure.details["unknown"].startswith("1 clips")
    del labels["clip001"]
    with pytest.raises(ValueError, match=r"each clip needs its label: 1 of generated .*clip001"):
        evaluate_audio(clips, backbones=backbone, labels=labels, sample_rate=RATE, splits=1)
    with pytest.raises(ValueError, match="backbone toy names no classes"):
        evaluate_audio(clips, backbones=Spectral(), labels=LABELS, metrics=["label_agreement"], sample_rate=RATE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "ears"], "backbone 'ears' does not exist; use mel, offline, transformers:FOLDER,"),
        (["--backbone", "panns"], "backbone 'panns' must name its checkpoint"),
        (["--backbone", "offline:other"], "unknown encoder 'offline:other'"),
        (["--backbone", f"{FEATURES}?frames"], "must read name=value&name=value"),
        (["--backbone"], "backbone is empty"),
        (["--confidence", "2"], "confidence must lie between 0 and 1"),
        (["--reference", "elsewhere"], "is a set with recordings of its own; leave --reference out"),
        (["--backbone", "mel", "--classifier", "labels.csv"], "a classifier needs the features of a backbone"),
        (["--backbone", FEATURES, "--classifier", "absent"], "absent is not an embedding store"),
        (["--backbone", FEATURES, "--text", "tests.generation.test_metrics_command:Captions"], "with no backbone"),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    made = make_set(tmp_path / "set")
    assert run("metrics", made, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (made / "metrics.json").exists()


def test_bad_classifiers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, listed = make_set(tmp_path / "set", column="kind"), recordings(tmp_path / "others")
    arguments = ("metrics", made, "--backbone", FEATURES, "--classifier")
    # The set says which column its labels are of.
    assert run(*arguments, listed) == 2
    assert "has no column 'kind'; it has file, label" in capsys.readouterr().err
    store = EmbeddingStore.from_arrays({"audio": np.eye(8)}, {"label": list("abababab")}, encoders={"audio": "other:1"})
    write_store(tmp_path / "store", store)
    assert run(*arguments, tmp_path / "store", "--column", "label") == 2
    assert "holds embeddings of other:1, none of the backbones' toy:v1" in capsys.readouterr().err
    listed.write_text("file,label\nabsent.wav,a\n")
    assert run(*arguments, listed, "--column", "label") == 2
    assert "labels.csv/absent.wav (missing)" in capsys.readouterr().err


def test_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("metrics", tmp_path / "absent") == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run("metrics", tmp_path / "empty") == 2
    assert "holds no set of `diffgap generate-set` and no sounds" in capsys.readouterr().err
    made = make_set(tmp_path / "set")
    items = (made / "items.jsonl").read_text().replace('"label": "low"', '"label": ""', 1)
    (made / "items.jsonl").write_text(items)
    assert run("metrics", made, "--backbone", "mel") == 2
    assert "1 of 12 items" in capsys.readouterr().err
