"""A classifier of one's own where none can be had: linear, on an audio encoder's embeddings.

Multinomial logistic regression on standardised features, x -> W (x - m) / s + b. Inception score and KL of its logits
are on a scale of their own, that of its classes and of the recordings it was fitted to; they say nothing beside figures
of PANNs. The sigmoid form of the KL divergence suits it badly: its logits compete, each class does not stand by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffgap._files import atomic_file
from diffgap.generation.metrics._rows import Floats, Values, as_rows
from diffgap.generation.metrics.backbone import Backbone, Described, FloatArray, Output

__all__ = ["ClassifierBackbone", "LinearClassifier"]

_ARRAYS = ("weight", "bias", "mean", "scale")


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """Linear map from features (N, D) to the logits (N, C) of ``classes``.

    Attributes:
        weight: (C, D). bias: (C,). mean, scale: (D,), of the features it was fitted to. All float64.
        classes: Names, in the order of the logits.
        features: Fingerprint of the backbone whose features it reads.
        fitted_to: Number of recordings.
        regularisation: The inverse strength C of the L2 penalty.
    """

    weight: Floats
    bias: Floats
    mean: Floats
    scale: Floats
    classes: tuple[str, ...]
    features: str
    fitted_to: int
    regularisation: float

    @classmethod
    def fit(
        cls, features: Values, labels: Sequence[str], *, fingerprint: str, regularisation: float = 1.0
    ) -> LinearClassifier:
        """Fits to ``features`` (N, D) of real recordings and their ``labels`` (N,).

        Deterministic. ``fingerprint`` is the backbone's. Raises ValueError for fewer than two classes, labels that are
        not one a row, features that are not finite, and a fit that does not converge.
        """
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        rows = as_rows("features", features, least=2)
        if len(labels) != len(rows):
            raise ValueError(f"labels must be one a row of features; got {len(labels)} for {len(rows)}")
        if not regularisation > 0:
            raise ValueError(f"regularisation must be above 0; got {regularisation}")
        classes = sorted({str(label) for label in labels})
        if len(classes) < 2:
            raise ValueError(f"labels must be of at least two classes; got {len(classes)}")
        mean, scale = rows.mean(0), rows.std(0)
        scale[scale == 0] = 1.0
        model = LogisticRegression(C=regularisation, max_iter=2000)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                model.fit((rows - mean) / scale, [classes.index(str(label)) for label in labels])
            except ConvergenceWarning:
                raise ValueError("the classifier did not converge; lower regularisation") from None
        weight, bias = model.coef_, model.intercept_
        if len(classes) == 2:
            # One row for two classes: the logit of the second over the first, shared between them.
            weight, bias = np.stack([-weight[0], weight[0]]) / 2, np.stack([-bias[0], bias[0]]) / 2
        return cls(weight, bias, mean, scale, tuple(classes), fingerprint, len(rows), float(regularisation))

    def logits(self, features: Values) -> Floats:
        """(N, C) of ``features`` (N, D). Raises ValueError for another width and values that are not finite."""
        rows = as_rows("features", features)
        if rows.shape[1] != len(self.mean):
            raise ValueError(f"features must be {len(self.mean)} wide, as fitted; got {rows.shape[1]}")
        return np.asarray((rows - self.mean) / self.scale @ self.weight.T + self.bias)

    @property
    def fingerprint(self) -> str:
        """``linear:digest`` of the weights, the classes and the features they read."""
        digest = hashlib.sha256(json.dumps([self.classes, self.features]).encode())
        for name in _ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return f"linear:{digest.hexdigest()[:32]}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file."""
        from safetensors.numpy import save_file

        about = {name: getattr(self, name) for name in ("classes", "features", "fitted_to", "regularisation")}
        with atomic_file(path) as temporary:
            arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
            save_file(arrays, temporary, metadata={"linear_classifier": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LinearClassifier:
        """Reads what :meth:`save` wrote. Raises FileNotFoundError, or ValueError for any other file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                about = json.loads((file.metadata() or {})["linear_classifier"])
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} holds no linear classifier: {error}") from error
        about["classes"] = tuple(about["classes"])
        return cls(**arrays, **about)


class ClassifierBackbone:
    """The features of ``backbone``, and the logits of a linear classifier on them (on their mean over frames).

    Raises ValueError if the classifier was fitted to features of another fingerprint.
    """

    outputs: frozenset[Output] = frozenset({"features", "logits"})

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the logits."""
        return self.classifier.classes

    def __init__(self, backbone: Backbone, classifier: LinearClassifier) -> None:
        if classifier.features != backbone.fingerprint:
            raise ValueError(
                f"the classifier reads features of {classifier.features}, not of {backbone.fingerprint}; fit it anew"
            )
        self.backbone, self.classifier = backbone, classifier
        self.name, self.sample_rate, self.reader = f"{backbone.name}+linear", backbone.sample_rate, backbone.reader
        self.space = backbone.space
        self.fingerprint = f"{backbone.fingerprint} {classifier.fingerprint}"

    def __call__(self, waveforms: Sequence[FloatArray]) -> list[Described]:
        described: list[Described] = []
        for given in self.backbone(waveforms):
            pooled = np.atleast_2d(given["features"]).mean(0, keepdims=True)
            logits = self.classifier.logits(pooled)[0].astype(np.float32)
            described.append({"features": given["features"], "logits": logits})
        return described
