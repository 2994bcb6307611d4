"""A short comparison with whatever else is installed; each peer runs in a process of its own.

Repeats are interleaved, one of every peer in turn, so that a machine that slows down does so for all of them.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TURN = 0.02  # seconds that a timing takes at least
# Seconds before a turn.  The idle threads of the peer before spin for a while, 200 ms in LLVM's OpenMP by default,
# and take the processor away from whoever is timed meanwhile: 20 ms halved the speeds on two cores.
PAUSE = 0.25
TOLERANCE = 1e-3  # absolute, on results of order 1: enough to tell that peers compute the same thing


class Case(NamedTuple):
    """float32 self-attention of one sequence."""

    heads: int
    length: int
    size: int
    causal: bool = False

    def __str__(self) -> str:
        return f"{self.heads} x {self.length} x {self.size}{' causal' if self.causal else ''}"

    @property
    def flop(self) -> int:
        """Of the two products, counting only pairs of query and key that are attended to."""
        pairs = self.length * (self.length + 1) // 2 if self.causal else self.length**2
        return 4 * self.heads * pairs * self.size


CASES = (Case(12, 128, 64), Case(8, 512, 64), Case(8, 2048, 64), Case(8, 2048, 64, True), Case(8, 2048, 128))
QUICK = CASES[:2]


class PeerError(Exception):
    """A peer cannot do what was asked of it."""


# Peers: functions of query, key and value (H, L, D) that return the call to be timed ----------------------------------

Call = Callable[[], np.ndarray]


def _numba_attn(query: np.ndarray, key: np.ndarray, value: np.ndarray, causal: bool) -> Call:
    from numba_attn.api import scaled_dot_product_attention

    return lambda: np.asarray(scaled_dot_product_attention(query, key, value, is_causal=causal))


def _numpy(query: np.ndarray, key: np.ndarray, value: np.ndarray, causal: bool) -> Call:
    length, size = query.shape[-2:]
    hidden = np.triu(np.ones((length, length), bool), 1)

    def call() -> np.ndarray:
        score = query @ key.swapaxes(-1, -2) / np.float32(math.sqrt(size))
        if causal:
            score[:, hidden] = -np.inf
        weight = np.exp(score - score.max(axis=-1, keepdims=True))
        weight /= weight.sum(axis=-1, keepdims=True)
        return np.asarray(weight @ value)

    return call


def _torch(query: np.ndarray, key: np.ndarray, value: np.ndarray, causal: bool) -> Call:
    import torch

    # Without a batch axis, torch does not choose its fast kernel.
    q, k, v = (torch.from_numpy(x)[None] for x in (query, key, value))

    def call() -> np.ndarray:
        with torch.inference_mode():
            result = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return np.asarray(result.numpy()[0])

    return call


def _onnxruntime(query: np.ndarray, key: np.ndarray, value: np.ndarray, causal: bool) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper

    heads, length, size = query.shape
    # The operator wants its own layout, (batch, length, heads * size): made here, outside what is timed.
    feeds = {
        name: np.ascontiguousarray(x.swapaxes(0, 1)).reshape(1, length, heads * size)
        for name, x in (("query", query), ("key", key), ("value", value))
    }

    def tensor(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, length, heads * size))

    node = helper.make_node(
        "MultiHeadAttention", list(feeds), ["out"], domain="com.microsoft", num_heads=heads, unidirectional=int(causal)
    )
    model = helper.make_model(
        helper.make_graph([node], "attention", [tensor(name) for name in feeds], [tensor("out")]),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        ir_version=8,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda: np.asarray(session.run(None, feeds)[0]).reshape(length, heads, size).swapaxes(0, 1)


OURS = "numba_attn"
PEERS = {OURS: _numba_attn, "numpy": _numpy, "torch": _torch, "onnxruntime": _onnxruntime}
_NEEDS: dict[str, tuple[str, ...]] = {"torch": ("torch",), "onnxruntime": ("onnxruntime", "onnx")}


def installed() -> list[str]:
    """The peers that this environment can run, ours first."""
    return [peer for peer in PEERS if all(importlib.util.find_spec(name) for name in _NEEDS.get(peer, ()))]


# Processes ------------------------------------------------------------------------------------------------------------


class Session:
    """One peer and the case that it is at."""

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def prepare(self, case: Case) -> np.ndarray:
        """Make the inputs, compile what there is to compile, choose how many calls make a turn; returns the result."""
        shape = (3, case.heads, case.length, case.size)
        query, key, value = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        self._call = PEERS[self._peer](query, key, value, case.causal)
        out = self._call()
        self._calls = 1
        self._calls = math.ceil(TURN / self.time())
        return out

    def time(self) -> float:
        """Seconds of one call, a mean over a turn."""
        if self._calls > 1:
            self._call()  # threads that fell asleep since the last turn would count in a short one
        start = time.perf_counter()
        for _ in range(self._calls):
            self._call()
        return (time.perf_counter() - start) / self._calls

    def close(self) -> None:
        """Nothing to release."""


class Worker:
    """A `Session` in a process of its own, whose threads nobody else has to share."""

    def __init__(self, peer: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, peer), daemon=True)
        self._process.start()
        theirs.close()

    def prepare(self, case: Case) -> np.ndarray:
        return np.asarray(self._ask("prepare", case))

    def time(self) -> float:
        return float(self._ask("time"))

    def _ask(self, *request: Any) -> Any:
        try:
            self._connection.send(request)
            answer, error = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise PeerError(f"its process ended with exit code {self._process.exitcode}") from None
        if error is not None:
            raise PeerError(error)
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()


def _serve(connection: Any, peer: str) -> None:
    os.dup2(2, 1)  # stdout is the parent's, for its table or JSON
    session = Session(peer)
    try:
        while True:
            method, *arguments = connection.recv()
            try:
                answer: tuple[Any, str | None] = getattr(session, method)(*arguments), None
            except Exception as error:
                answer = None, f"{type(error).__name__}: {error}"
            connection.send(answer)
    except (EOFError, KeyboardInterrupt):
        return


# The comparison -------------------------------------------------------------------------------------------------------


def compare(cases: Sequence[Case], rounds: int, progress: Callable[[float], None]) -> dict[str, Any]:
    """Time every installed peer on every case: medians of `rounds` interleaved turns.

    A peer that fails or disagrees is left out from there on, and named with the reason; without ours or NumPy, which is
    what the others are checked against, there is no comparison: PeerError.
    """
    workers = {peer: Worker(peer) for peer in installed()}
    left_out: dict[str, str] = {}

    def ask(peer: str, method: str, *arguments: Any) -> Any:
        try:
            return getattr(workers[peer], method)(*arguments)
        except PeerError as error:
            leave_out(peer, str(error))
        return None

    def leave_out(peer: str, reason: str) -> None:
        if peer in (OURS, "numpy"):
            raise PeerError(f"{peer}: {reason}")
        left_out[peer] = reason
        workers.pop(peer).close()

    results = []
    try:
        for number, case in enumerate(cases):
            outs = {peer: ask(peer, "prepare", case) for peer in list(workers)}
            for peer in list(workers):
                if not np.allclose(outs[peer], outs["numpy"], rtol=0, atol=TOLERANCE):
                    leave_out(peer, f"its result for {case} is not NumPy's")
            turns: dict[str, list[float]] = {peer: [] for peer in workers}
            for turn in range(rounds):
                progress((number + turn / rounds) / len(cases))
                for peer in list(workers):
                    time.sleep(PAUSE)
                    turns[peer].append(ask(peer, "time"))
            results.append(_result(case, {peer: statistics.median(turns[peer]) for peer in workers}))
    finally:
        for worker in workers.values():
            worker.close()
    return {"dtype": "float32", "rounds": rounds, "results": results, "left_out": left_out}


def _result(case: Case, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        "case": str(case),
        **case._asdict(),
        "flop": case.flop,
        "seconds": seconds,
        "gflops": {peer: case.flop / s / 1e9 for peer, s in seconds.items()},
        "speedup_over": {peer: s / seconds[OURS] for peer, s in seconds.items() if peer != OURS},
    }


def table(report: dict[str, Any]) -> str:
    """The report as text: GFLOP/s of everyone, and by how much ours is faster."""
    peers = list(report["results"][0]["seconds"])
    head = ["heads x length x size", *peers, *(f"/{peer}" for peer in peers[1:])]
    lines = [head]
    for result in report["results"]:
        speeds = [f"{result['gflops'][peer]:.1f}" if peer in result["gflops"] else "-" for peer in peers]
        ratios = [f"{result['speedup_over'][p]:.2f}" if p in result["speedup_over"] else "-" for p in peers[1:]]
        lines.append([result["case"], *speeds, *ratios])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    notes = [f"{peer} left out: {reason}" for peer, reason in report["left_out"].items()]
    return "\n".join(["float32, GFLOP/s; /peer: how many times faster numba_attn is", "", *text, *notes])


def plot(report: dict[str, Any], path: Path) -> None:
    """The report as a bar chart, in a PNG file."""
    from matplotlib.figure import Figure

    results = report["results"]
    peers = list(results[0]["seconds"])
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, peer in enumerate(peers):
        at = np.arange(len(results)) + (i - (len(peers) - 1) / 2) * 0.8 / len(peers)
        axes.bar(at, [result["gflops"].get(peer, 0) for result in results], 0.8 / len(peers), label=peer)
    axes.set_xticks(range(len(results)), [result["case"] for result in results])
    axes.set_ylabel("GFLOP/s, more is better")
    axes.set_title("Attention, float32: heads x length x head size")
    axes.legend()
    figure.savefig(path, format="png", dpi=150)
