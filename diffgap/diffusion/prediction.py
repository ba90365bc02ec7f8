"""What a denoiser predicts, and the linear maps between predictions.

At the noise level (alpha, sigma), ``x_t = alpha * x0 + sigma * epsilon``. A network predicts one of

    epsilon           the noise
    sample            the clean sample x0
    v_prediction      alpha * epsilon - sigma * x0    (Salimans & Ho 2022, arXiv 2202.00512, appendix D)
    flow_prediction   epsilon - x0                    (rectified flow, arXiv 2209.03003: d x_t / d sigma)

Together with ``x_t`` any of them gives all the others, each as a sum of two terms. The formulas hold for
every (alpha, sigma), variance preserving or not.
"""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

from torch import Tensor

Prediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
Number = TypeVar("Number", float, Tensor)


def check_prediction(name: str, value: str) -> None:
    """Raise :class:`ValueError` unless ``value`` is a prediction type."""
    if value not in get_args(Prediction):
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(get_args(Prediction))}")


def x0_coefficients(alpha: Number, sigma: Number, prediction: Prediction) -> tuple[Number, Number]:
    """``(a, b)`` such that ``x0 = a * x_t + b * output``. Infinite for "epsilon" where alpha is 0."""
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "sample":
        return 0 * alpha, 1 + 0 * alpha
    if prediction == "v_prediction":
        power = alpha**2 + sigma**2
        return alpha / power, -sigma / power
    return 1 / (alpha + sigma), -sigma / (alpha + sigma)


def epsilon_coefficients(alpha: Number, sigma: Number, prediction: Prediction) -> tuple[Number, Number]:
    """``(a, b)`` such that ``epsilon = a * x_t + b * output``. Infinite for "sample" where sigma is 0."""
    if prediction == "epsilon":
        return 0 * alpha, 1 + 0 * alpha
    if prediction == "sample":
        return 1 / sigma, -alpha / sigma
    if prediction == "v_prediction":
        power = alpha**2 + sigma**2
        return sigma / power, alpha / power
    return 1 / (alpha + sigma), alpha / (alpha + sigma)


def conversion_coefficients(
    alpha: Number, sigma: Number, source: Prediction, target: Prediction
) -> tuple[Number, Number]:
    """``(a, b)`` such that ``target = a * x_t + b * output``, the output being a ``source`` prediction."""
    x0_sample, x0_output = x0_coefficients(alpha, sigma, source)
    if target == source:
        return 0 * alpha, 1 + 0 * alpha
    if target == "sample":
        return x0_sample, x0_output
    epsilon_sample, epsilon_output = epsilon_coefficients(alpha, sigma, source)
    if target == "epsilon":
        return epsilon_sample, epsilon_output
    if target == "v_prediction":
        return alpha * epsilon_sample - sigma * x0_sample, alpha * epsilon_output - sigma * x0_output
    return epsilon_sample - x0_sample, epsilon_output - x0_output
