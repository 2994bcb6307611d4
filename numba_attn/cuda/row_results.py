"""From what a row has gathered over its keys to its results."""

from __future__ import annotations

import math
from typing import Any

LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)


def make_finish(cuda: Any, ops: Any, general: bool) -> Any:
    """A function (top, total, spread, sink) -> (factor, lse, largest, entropy).

    `top` is the largest score, in base 2 unless the scores are `general`; `total` the sum of exp(score - top); `spread`
    that of exp(score - top) * (score - top), in base 2; `sink` a logit, -inf if there is none.  `factor` is what the
    sum of exp(score - top) * value is to be multiplied by.
    """
    f32 = ops.f32
    natural = 1.0 if general else LN_2

    @cuda.jit(device=True, inline="always")
    def finish(top, total, spread, sink):
        largest = ops.product(top, f32(natural))
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
