"""Gradients of attention: the forward functions, with what takes a gradient of their results to one of their inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from numba_attn import api, arrays, checks, dispatch, varlen
from numba_attn.gradient_problem import GradientProblem, Gradients
from numba_attn.problem import Problem

_PARAMETER = inspect.Parameter("score_mod_grad", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Any")


class VJP:
    """The vector-Jacobian product of one call.

    It holds on to the inputs and the output, which must not have changed when it is called, any number of times.
    """

    def __init__(
        self,
        problem: Problem,
        backward: Callable[[GradientProblem], None],
        inputs: dict[str, Any],
        caller: arrays.Caller,
    ) -> None:
        self._problem, self._backward, self._caller = problem, backward, caller
        self._like = {name: (np.shape(x), x.dtype) for name, x in inputs.items() if x is not None}

    def __call__(self, grad_out: Any, grad_lse: Any = None, wanted: Any = None) -> Gradients:
        """The gradient of sum(grad_out * out) + sum(grad_lse * lse).

        Parameters
        ----------
        grad_out : array of the shape and dtype of the output, and of its library
        grad_lse : array of the shape and dtype of the lse, optional
        wanted : tuple of names of `Gradients`, optional
            All that there are, if None.  Those of query, key and value always come; those of attn_mask and alibi_slopes
            take another pass over the scores.

        Raises
        ------
        ValueError, TypeError
            Shapes, dtypes or names that do not fit; nothing has been computed then.
        """
        given = {"grad_out": grad_out, "grad_lse": grad_lse}
        if arrays.adopt(given, tuple(given)).library is not self._caller.library:
            raise TypeError(f"grad_out must be an array of query's library, got {checks.type_name(grad_out)}")
        gradient, problem = GradientProblem.from_call(self._problem, **given, wanted=wanted), self._problem
        self._backward(gradient)

        def like_input(name: str, x: np.ndarray | None) -> np.ndarray | None:
            shape, dtype = self._like.get(name, (None, None))
            return None if x is None else x.reshape(shape).astype(dtype, copy=False)

        gradients = Gradients(
            query=problem.as_given(gradient.query),
            key=problem.as_given(gradient.key),
            value=problem.as_given(gradient.value),
            attn_mask=like_input("attn_mask", gradient.mask),
            sinks=like_input("sinks", gradient.sinks),
            alibi_slopes=like_input("alibi_slopes", gradient.slopes),
        )
        return self._caller.give(gradients)  # type: ignore[no-any-return]


def _with_score_mod_grad(forward: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a function the signature of another, with one more keyword."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(forward)
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), _PARAMETER], return_annotation="tuple[Any, VJP]"
        )
        return function

    return decorate


@_with_score_mod_grad(api.scaled_dot_product_attention)
def scaled_dot_product_attention_vjp(*args: Any, score_mod_grad: Any = None, **options: Any) -> tuple[Any, VJP]:
    """`scaled_dot_product_attention`, with the same arguments, and its vector-Jacobian product.

    Parameters
    ----------
    score_mod_grad : function (score, b, h, i, j) -> float, optional
        The derivative of score_mod with respect to the score; must be there if score_mod is.
    others
        As in `scaled_dot_product_attention`; precision must be None.

    Returns
    -------
    result, vjp
        What `scaled_dot_product_attention` returns, and the function vjp(grad_out, grad_lse=None, wanted=None) ->
        Gradients, see `VJP`: the gradients of query, key, value, of an additive attn_mask, of sinks and alibi_slopes.

    Raises
    ------
    ValueError, TypeError, NotImplementedError
        As in `scaled_dot_product_attention`; ValueError for a score_mod without its derivative.

    Notes
    -----
    Probabilities are computed again from sums of rows, one tile at a time: beside the results, memory grows with the
    lengths, not with their product.  Rows that attend to nothing, and what is masked, have gradients of 0.  The same
    bits come out for any number of threads.  For bfloat16 arrays, probabilities and gradients of scores are rounded to
    bfloat16 for their products where the processor does these faster.

    Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness" (2022), appendix B.2.

    Examples
    --------
    >>> import numpy as np
    >>> query = key = np.eye(2)
    >>> value = np.array([[1.0], [3.0]])
    >>> out, vjp = scaled_dot_product_attention_vjp(query, key, value, scale=0.0)
    >>> vjp(np.ones_like(out)).value
    array([[1.],
           [1.]])
    """
    return _vjp(api.scaled_dot_product_attention, args, options, score_mod_grad)


@_with_score_mod_grad(varlen.varlen_attention)
def varlen_attention_vjp(*args: Any, score_mod_grad: Any = None, **options: Any) -> tuple[Any, VJP]:
    """`varlen_attention`, with the same arguments, and its vector-Jacobian product.

    See `scaled_dot_product_attention_vjp` for score_mod_grad, what is returned and what is raised.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.zeros((5, 1, 4))  # a sequence of two tokens and one of three
    >>> out, vjp = varlen_attention_vjp(x, x, np.ones((5, 1, 1)), [0, 2, 5], [0, 2, 5], is_causal=True)
    >>> vjp(np.ones_like(out)).value[:, 0, 0].round(3)
    array([1.5  , 0.5  , 1.833, 0.833, 0.333])
    """
    return _vjp(varlen.varlen_attention, args, options, score_mod_grad)


def _vjp(
    forward: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], score_mod_grad: Any
) -> tuple[Any, VJP]:
    bound = inspect.signature(forward).bind(*args, **options)
    bound.apply_defaults()
    arguments = bound.arguments
    caller, backend = dispatch.adopt(arguments.pop("backend"), arguments)
    run, backward = dispatch.forward(backend), dispatch.backward(backend)
    if "cu_seqlens_q" in arguments:
        arguments["cu_seqlens"] = arguments.pop("cu_seqlens_q"), arguments.pop("cu_seqlens_k")
        arguments |= varlen.FIXED
    problem = Problem.from_call(**arguments, differentiable=True, score_mod_grad=score_mod_grad)
    run(problem)
    result = problem.result if problem.aux is None else (problem.result, problem.aux)
    inputs = {name: checks.on_host(name, arguments[name]) for name in ("attn_mask", "sinks", "alibi_slopes")}
    return caller.give(result), VJP(problem, backward, inputs, caller)
