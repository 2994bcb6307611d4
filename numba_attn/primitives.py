"""What a multi-head layer is made of beside attention, each with its adjoint: projection, normalisation, rotation.

Plain NumPy on arrays that have been checked.  Shape letters: L rows of any number of axes, m and n sizes of what comes
in and out, D head size.  A function f with derivative f' has as its adjoint the map from the gradient of a loss with
respect to f(x) to the one with respect to x, the product with f' transposed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from numba_attn.rotary import apply_rotary

# Projection -----------------------------------------------------------------------------------------------------------


def project(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, out: np.ndarray) -> None:
    """out = x W^T + b, for x (L, m), weight (n, m), bias (n,) and contiguous out (L, n): one product of BLAS."""
    with np.errstate(invalid="ignore"):  # of padding, in which there may be anything
        np.matmul(_rows(x), weight.T, out=_rows(out))
    if bias is not None:
        out += bias


def project_adjoint(
    grad: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray,
    grad_x: np.ndarray,
    grad_weight: np.ndarray,
    grad_bias: np.ndarray | None,
) -> None:
    """Add to grad_x (L, m), contiguous, and write grad_weight (n, m) and grad_bias (n,), for grad (L, n).

    Rows whose gradient is 0 have no part in those of weights, whatever they are.
    """
    grad, rows = _rows(grad), _rows(x)
    grad_rows = _rows(grad_x)
    grad_rows += grad @ weight
    with np.errstate(invalid="ignore"):
        np.matmul(grad.T, rows, out=grad_weight)
    if not np.isfinite(grad_weight).all():
        np.matmul(grad.T, _used(rows, grad), out=grad_weight)
    if grad_bias is not None:
        np.sum(grad, axis=0, out=grad_bias)


def _used(x: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """x, with zeros where all of a row's gradient is 0, as of padding, which may be NaN."""
    return np.where(grad.any(axis=-1, keepdims=True), x, x.dtype.type(0))


def _rows(x: np.ndarray) -> np.ndarray:
    """As a matrix, a view of contiguous arrays."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# Normalisation --------------------------------------------------------------------------------------------------------


def rms_normalize(x: np.ndarray, gain: np.ndarray, epsilon: float, out: np.ndarray) -> None:
    """out = x / sqrt(mean(x^2) + epsilon) * gain over the last axis, for x (L, D), which may be out, and gain (D,).

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        np.multiply(x, _inverse_rms(x, epsilon), out=out)
    out *= gain


def rms_normalize_adjoint(
    grad: np.ndarray, x: np.ndarray, gain: np.ndarray, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients with respect to x (L, D) and gain (D,).

    With r = 1 / sqrt(mean(x^2) + epsilon), n = r x and g the gradient times the gain, that of x is
    r (g - n mean(g n)).  Rows whose gradient is 0 have no part in either, whatever they are.
    """
    if not np.isfinite(x).all():
        x = _used(x, grad)
    inverse = _inverse_rms(x, epsilon)
    normalized = x * inverse
    grad_gain = (grad * normalized).reshape(-1, x.shape[-1]).sum(axis=0) if x.size else np.zeros_like(gain)
    grad = grad * gain
    along = np.mean(grad * normalized, axis=-1, keepdims=True) if x.size else np.zeros_like(inverse)
    return inverse * (grad - normalized * along), grad_gain


def _inverse_rms(x: np.ndarray, epsilon: float) -> np.ndarray:
    mean = np.einsum("...d,...d->...", x, x)[..., None] / x.dtype.type(max(x.shape[-1], 1))
    return 1 / np.sqrt(mean + x.dtype.type(epsilon))


# Rotation -------------------------------------------------------------------------------------------------------------


def rotate(
    x: np.ndarray, rotary: tuple[np.ndarray, np.ndarray], offset: Any, interleaved: bool, transposed: bool = False
) -> None:
    """`apply_rotary` in place, for x (B, L, H, D); `transposed` is its adjoint: turning back, by the same angles."""
    cos, sin = rotary
    sin = -sin if transposed else sin
    apply_rotary(x, cos, sin, position_offset=offset, interleaved=interleaved, layout="BLHD", out=x)
