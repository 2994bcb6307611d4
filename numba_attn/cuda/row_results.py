"""From what a row has gathered over its keys to its results."""

from __future__ import annotations

import math
from typing import Any

LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)
FAR = 2.0**28  # scores in base 2, see `make_unit`


def make_unit(cuda: Any, ops: Any) -> Any:
    """A function (score, unit, coarse, limit): what makes exponents of the products of a row whose largest that is.

    It is `unit`, by which they are scores in base 2, as long as the largest is below `FAR`.  Its exponent is rounded,
    which moves those of all keys alike: by up to 8 there, beyond by so much that weights would overflow, or be nothing.
    But products that differ are more than 16 apart there, and the largest alone have weights, whatever the unit: so it
    is `coarse`, the power of two above, with which nothing is rounded.  `limit` is `FAR` / `coarse`.
    """

    @cuda.jit(device=True, inline="always")
    def unit_of(score, unit, coarse, limit):
        return cuda.selp(ops.magnitude(score) < limit, unit, coarse)

    return unit_of


def make_finish(cuda: Any, ops: Any, general: bool) -> Any:
    """A function (top, total, spread, sink, scale, coarse) -> (factor, lse, largest, entropy).

    `top` is the largest score, in base 2, or as `make_unit` says, unless the scores are `general`; `total` the sum of
    exp(score - top); `spread` that of exp(score - top) * (score - top), in base 2; `sink` a logit, -inf if there is
    none.  `factor` is what the sum of exp(score - top) * value is to be multiplied by.
    """
    f32 = ops.f32

    @cuda.jit(device=True, inline="always")
    def finish(top, total, spread, sink, scale, coarse):
        largest = top
        if not general:
            far = ops.product(scale, ops.reciprocal(coarse))
            largest = ops.product(top, cuda.selp(ops.magnitude(top) < f32(FAR), f32(LN_2), far))
        high = ops.maximum(largest, sink)
        high = cuda.selp(high == f32(-math.inf), f32(0), high)
        # How far below the highest both are, in base 2; what is not there is -inf below, and adds nothing.
        below = ops.product(f32(largest - high), f32(LOG2_E))
        sink_below = ops.product(f32(sink - high), f32(LOG2_E))
        kept, sink_weight = ops.exp2(below), ops.exp2(sink_below)
        whole = ops.multiply_add(total, kept, sink_weight)
        nothing = whole == f32(0)
        inverse = cuda.selp(nothing, f32(0), ops.reciprocal(whole))
        bits = ops.log2(whole)
        lse = cuda.selp(nothing, f32(-math.inf), ops.multiply_add(bits, f32(LN_2), high))
        below = cuda.selp(kept == f32(0), f32(0), below)
        sink_below = cuda.selp(sink_weight == f32(0), f32(0), sink_below)
        moment = ops.product(kept, ops.multiply_add(total, below, spread))
        moment = ops.multiply_add(sink_weight, sink_below, moment)
        mean = ops.product(moment, inverse)
        entropy = cuda.selp(nothing, f32(0), ops.product(f32(bits - mean), f32(LN_2)))
        return ops.product(kept, inverse), lse, largest, entropy

    return finish
