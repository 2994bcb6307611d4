"""What a call costs the rest of its process, on each threading layer: many threads at once, the interpreter, Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys

LAYERS = ("omp", "tbb", "workqueue")

# Runs in a fresh process.  Seconds: of 8 threads that make 50 calls each, over those of the same calls one after the
# other; the longest that a thread that ticks was held up during a call; from Ctrl-C during a call to the exception.
SCRIPT = """
import json, os, signal, statistics, threading, time
import numpy as np
from numba_attn import scaled_dot_product_attention, threads
THREADS, CALLS = 8, 50
try:
    missing = threads.layer() != os.environ["NUMBA_THREADING_LAYER"]
except ValueError:
    missing = True
if missing:
    print("null")
    raise SystemExit
x = np.random.default_rng(0).standard_normal((8, 512, 64), dtype=np.float32)
long = np.random.default_rng(0).standard_normal((16, 16384, 64), dtype=np.float32)

def calls(n):
    for _ in range(n):
        scaled_dot_product_attention(x, x, x)

def timed(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start

def at_once():
    callers = [threading.Thread(target=calls, args=(CALLS,)) for _ in range(THREADS)]
    for caller in callers: caller.start()
    for caller in callers: caller.join()

calls(10)
ratio = statistics.median(timed(at_once) / timed(calls, THREADS * CALLS) for _ in range(5))

gap, stop = 0.0, threading.Event()
def tick():
    global gap
    last = time.perf_counter()
    while not stop.is_set():
        time.sleep(0.001)
        now = time.perf_counter()
        gap, last = max(gap, now - last), now
ticker = threading.Thread(target=tick)
ticker.start()
scaled_dot_product_attention(long, long, long)
stop.set()
ticker.join()

def interrupt():
    global sent
    time.sleep(1)
    sent = time.perf_counter()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has the jobs of its background ignore it
try:
    while True:
        scaled_dot_product_attention(long, long, long)
except KeyboardInterrupt:
    waited = time.perf_counter() - sent
print(json.dumps({"at_once": ratio, "gap": gap, "interrupt": waited}))
"""


def citizenship(environment: dict[str, str]) -> dict[str, dict[str, float]]:
    """What `SCRIPT` finds on each threading layer that is installed."""
    found = {}
    for layer in LAYERS:
        finished = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, **environment, "NUMBA_THREADING_LAYER": layer},
            check=True,
            capture_output=True,
            text=True,
        )
        if (measured := json.loads(finished.stdout)) is not None:
            found[layer] = measured
    return found
