"""The linear classifier: against scikit-learn, saved and loaded, and as a backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffgap.generation.metrics import ClassifierBackbone, LinearClassifier, evaluate_audio
from tests.generation.toy_backbone import RATE, Spectral, bands, tones


def clusters(classes: int, *, per: int = 30, width: int = 6, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width)) * 3
    labels = [f"kind{number}" for number in range(classes) for _ in range(per)]
    return np.repeat(centres, per, axis=0) + rng.normal(size=(classes * per, width)), labels


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_gives_the_probabilities_of_scikit_learn(classes: int) -> None:
    from scipy.special import softmax
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = clusters(classes)
    classifier = LinearClassifier.fit(features, labels, fingerprint="toy:v1", regularisation=0.5)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=2000)).fit(features, labels)
    fresh = clusters(classes, seed=0)[0] * 1.1
    assert softmax(classifier.logits(fresh), axis=1) == pytest.approx(model.predict_proba(fresh), abs=1e-9)
    assert classifier.classes == tuple(model.classes_)
    assert classifier.logits(fresh).sum(1) == pytest.approx(np.zeros(len(fresh)), abs=1e-6)
    assert classifier.fitted_to == 30 * classes


def test_a_constant_feature_and_the_order_of_rows_do_no_harm() -> None:
    features, labels = clusters(3)
    features[:, 2] = 7.0
    classifier = LinearClassifier.fit(features, labels, fingerprint="toy:v1")
    order = np.random.default_rng(0).permutation(len(features))
    again = LinearClassifier.fit(features[order], [labels[i] for i in order], fingerprint="toy:v1")
    assert np.isfinite(classifier.logits(features)).all()
    assert again.logits(features) == pytest.approx(classifier.logits(features), abs=1e-2)


def test_is_saved_whole(tmp_path: Path) -> None:
    features, labels = clusters(3)
    classifier = LinearClassifier.fit(features, labels, fingerprint="toy:v1")
    classifier.save(tmp_path / "classifier.safetensors")
    loaded = LinearClassifier.load(tmp_path / "classifier.safetensors")
    assert (loaded.logits(features) == classifier.logits(features)).all()
    assert loaded.fingerprint == classifier.fingerprint
    assert (loaded.classes, loaded.features, loaded.fitted_to, loaded.regularisation) == (
        ("kind0", "kind1", "kind2"), "toy:v1", 90, 1.0,
    )  # fmt: skip
    others = [
        LinearClassifier.fit(features, labels, fingerprint="toy:v2"),
        LinearClassifier.fit(features, labels, fingerprint="toy:v1", regularisation=2.0),
        LinearClassifier.fit(features, [label + "x" for label in labels], fingerprint="toy:v1"),
    ]
    assert len({classifier.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"weight": np.ones(3)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("other", "text"):
        with pytest.raises(ValueError, match="holds no linear classifier"):
            LinearClassifier.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError):
        LinearClassifier.load(tmp_path / "absent.safetensors")


def test_bad_input() -> None:
    features, labels = clusters(2)
    for arguments, message in (
        ((features, labels[:-1]), "labels must be one a row of features; got 59 for 60"),
        ((features, ["one"] * 60), "at least two classes; got 1"),
        ((features * np.nan, labels), "rows hold NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            LinearClassifier.fit(*arguments, fingerprint="toy:v1")
    with pytest.raises(ValueError, match="regularisation must be above 0"):
        LinearClassifier.fit(features, labels, fingerprint="toy:v1", regularisation=0.0)
    with pytest.raises(ValueError, match="must be 6 wide, as fitted; got 5"):
        LinearClassifier.fit(features, labels, fingerprint="toy:v1").logits(features[:, :5])


def test_as_a_backbone_it_tells_kinds_of_sound_apart() -> None:
    kinds = {"low": (300.0, 900.0), "high": (2500.0, 3500.0)}
    training = {kind: tones(30, seed=1, low=low, high=high) for kind, (low, high) in kinds.items()}
    features = np.stack([bands(wave, 8) for clips in training.values() for wave in clips.values()])
    labels = [kind for kind, clips in training.items() for _ in clips]
    bare = Spectral(outputs=["features"], frames=2)
    backbone = ClassifierBackbone(bare, LinearClassifier.fit(features, labels, fingerprint=bare.fingerprint))
    assert backbone.fingerprint.startswith("toy:v1 linear:")
    low, high = (tones(20, seed=2, low=a, high=b) for a, b in kinds.values())
    mixed = {name: (low if number % 2 else high)[name] for number, name in enumerate(low)}

    def score(generated, metric: str) -> float:
        options = {"backbones": backbone, "sample_rate": RATE, "splits": 1, "resamples": 20}
        return evaluate_audio(generated, low, metrics=[metric], **options).figures[0].estimate

    assert score(low, "kl_softmax") < 0.2 < score(mixed, "kl_softmax") < score(high, "kl_softmax")
    assert score(low, "inception_score") < 1.1 and score(mixed, "inception_score") > 1.5
    with pytest.raises(ValueError, match="the classifier reads features of toy:v1, not of toy:v2"):
        ClassifierBackbone(Spectral(version="v2"), backbone.classifier)
