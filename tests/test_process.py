"""What can end or hang a process: threads that call at once, forks, signals; each in an interpreter of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

# Says "missing" and stops where the layer wanted is not installed.
START = """
import os, sys, threading, time, warnings
import numpy as np, numba, numba_attn
from numba_attn import threads
try:
    chosen = threads.layer()
except ValueError:
    chosen = None
if chosen != os.environ["NUMBA_THREADING_LAYER"]:
    print("missing")
    raise SystemExit
warnings.simplefilter("ignore", DeprecationWarning)  # newer Python warns of any fork with threads
x = np.random.default_rng(0).standard_normal((4, 400, 32), dtype=np.float32)
attention = lambda x=x: numba_attn.scaled_dot_product_attention(x, x, x)
"""


@pytest.fixture
def on_layer(python: Callable[..., str]) -> Callable[..., str]:
    """Run a script, after `START`, on a threading layer."""

    def run(script: str, layer: str, **options: object) -> str:
        printed = python(START + script, timeout=120, NUMBA_THREADING_LAYER=layer, **options)
        if printed.strip() == "missing":
            pytest.skip(f"{layer} is not installed")
        return printed

    return run


@LAYERS
def test_threads_that_call_at_once(on_layer: Callable[..., str], layer: str) -> None:
    """The very first call included: the simplest layer ends the process where two threads launch at once."""
    on_layer(
        """
results = []
def call():
    for _ in range(50): results.append(attention())
callers = [threading.Thread(target=call) for _ in range(8)]
[c.start() for c in callers]; [c.join() for c in callers]
assert len(results) == 400 and all(np.array_equal(r, results[0]) for r in results)
assert numba.threading_layer() == chosen
""",
        layer,
    )


@FORKS
@LAYERS
def test_fork_after_use(on_layer: Callable[..., str], layer: str) -> None:
    """A child, and its child, of a process that has computed: the same bits, no hang, no signal."""
    on_layer(
        """
expected = attention()
def child(depth):
    pid = os.fork()
    if pid == 0:
        same = np.array_equal(attention(), expected)
        os._exit((0 if same else 1) or (child(depth - 1) if depth else 0))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert child(2) == 0
assert np.array_equal(attention(), expected)
""",
        layer,
    )


@FORKS
@LAYERS
def test_fork_before_use(on_layer: Callable[..., str], layer: str) -> None:
    """A server that loads the package and then forks its workers: they have threads of their own."""
    on_layer(
        """
from numba_attn.cpu import forward
pid = os.fork()
if pid == 0:
    result = attention()
    os._exit(0 if np.isfinite(result).all() and numba.threading_layer() == chosen else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
""",
        layer,
    )


@FORKS
@LAYERS
@pytest.mark.parametrize("use", ["few = x[:1, :2].copy(); attention(few)", "threads.count()"])
def test_fork_after_threads_have_started(on_layer: Callable[..., str], layer: str, use: str) -> None:
    """Though no kernel has run on them."""
    on_layer(
        f"""
{use}
pid = os.fork()
if pid == 0:
    os._exit(0 if np.isfinite(attention()).all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
""",
        layer,
    )


@FORKS
@LAYERS
def test_fork_while_another_thread_computes(on_layer: Callable[..., str], layer: str) -> None:
    on_layer(
        """
expected, stop = attention(), False
def work():
    while not stop: attention()
worker = threading.Thread(target=work)
worker.start()
codes = []
for _ in range(10):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if np.array_equal(attention(), expected) else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
stop = True
worker.join()
assert codes == [0] * 10, codes
""",
        layer,
    )


@FORKS
def test_fork_while_another_thread_compiles(python: Callable[..., str], tmp_path: Path) -> None:
    """The child needs the compiler, too: its lock must not be one that nobody holds any more."""
    script = """
import os, threading, time, warnings
import numpy as np, numba_attn
from numba_attn.cpu import rotation
from numba.core.compiler_lock import global_compiler_lock
warnings.simplefilter("ignore", DeprecationWarning)
arguments = np.ones((1, 5, 8), np.float32), *numba_attn.rotary_tables(5, 8)
compiler = threading.Thread(target=numba_attn.apply_rotary, args=arguments)
compiler.start()
while True:
    if not global_compiler_lock._lock.acquire(blocking=False): break
    global_compiler_lock._lock.release()
pid = os.fork()
if pid == 0:
    compiled = len(rotation.turn.overloads)
    numba_attn.apply_rotary(*(x.astype(np.float64) for x in arguments))
    assert len(rotation.turn.overloads) == compiled + 1
    os._exit(0)
compiler.join()
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    python(script, timeout=120, NUMBA_CACHE_DIR=str(tmp_path))


@FORKS
def test_fork_while_another_thread_gets_a_function_compiled(python: Callable[..., str]) -> None:
    script = """
import os, signal, threading, time, warnings
import numpy as np, numba_attn
from numba_attn.cpu import user_functions
warnings.simplefilter("ignore", DeprecationWarning)
x = np.ones((1, 5, 8), np.float32)
def attend(factor):
    numba_attn.scaled_dot_product_attention(x, x, x, score_mod=lambda score, b, h, i, j: factor * score)
attend(1.0)
compile_pass, begun = user_functions.compile_pass, threading.Event()
def slowly(*arguments):
    begun.set()
    time.sleep(0.3)
    return compile_pass(*arguments)
user_functions.compile_pass = slowly
compiler = threading.Thread(target=attend, args=(2.0,))
compiler.start()
begun.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    attend(3.0)
    os._exit(0)
compiler.join()
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    python(script, timeout=120)


POOL = """
import multiprocessing, sys
import numpy as np, numba_attn
def attention(seed):
    x = np.random.default_rng(seed).standard_normal((4, 400, 32), dtype=np.float32)
    return numba_attn.scaled_dot_product_attention(x, x, x)
if __name__ == "__main__":
    expected = [attention(i) for i in range(4)]
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        results = pool.map(attention, range(4))
    assert all(np.array_equal(r, e) for r, e in zip(results, expected))
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(tmp_path: Path, method: str) -> None:
    """Workers of a pool, of a parent that has computed."""
    import multiprocessing

    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    (tmp_path / "script.py").write_text(POOL, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "script.py"), method]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


WORKERS = {
    "joblib": """
import joblib
for kind in ("threading", "loky", "multiprocessing"):
    call = joblib.delayed(numba_attn.scaled_dot_product_attention)
    results = joblib.Parallel(4, kind)(call(x, x, x) for _ in range(16))
    assert all(np.array_equal(r, expected) for r in results), kind
""",
    "dask": """
import dask
for kind in ("threads", "sync"):
    results = dask.compute(*(dask.delayed(attention)() for _ in range(16)), scheduler=kind, num_workers=4)
    assert all(np.array_equal(r, expected) for r in results), kind
""",
}


@LAYERS
@pytest.mark.parametrize("library", WORKERS)
def test_workers_of_other_libraries(on_layer: Callable[..., str], library: str, layer: str) -> None:
    """Threads and processes of theirs, started after the first call of their parent."""
    pytest.importorskip(library)
    on_layer("expected = attention()\n" + WORKERS[library], layer)


LONG = """
q = np.random.default_rng(0).standard_normal((16, 16384, 64), dtype=np.float32)
long_call = lambda: numba_attn.scaled_dot_product_attention(q, q, q)
attention()
"""


@LAYERS
def test_other_threads_run_meanwhile(on_layer: Callable[..., str], layer: str) -> None:
    """The interpreter's lock is free during a call: a thread that ticks is never held up for long.

    With both processors busy the system itself may let it wait, hence one worker; and in one slice, between which the
    lock is free anyway.
    """
    gap = float(
        on_layer(
            LONG
            + """
from numba_attn.cpu import launch
launch.FIRST_SLICE = 1e30
q = q[:2]
gap, stop = 0.0, False
def tick():
    global gap
    last = time.perf_counter()
    while not stop:
        time.sleep(0.001)
        now = time.perf_counter()
        gap, last = max(gap, now - last), now
ticker = threading.Thread(target=tick)
ticker.start()
with threads.limit(1):
    start = time.perf_counter()
    long_call()
    took = time.perf_counter() - start
stop = True
ticker.join()
print(gap / took)
""",
            layer,
        )
    )
    assert gap < 0.5, "held up for as long as the call takes"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@LAYERS
@pytest.mark.parametrize("options", ["", ", return_aux=('key_weight',)"])
def test_interrupt(layer: str, options: str) -> None:
    """Ctrl-C in a call of half a minute: an exception within seconds, and the next call is right."""
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored\n"
        + START
        + LONG.replace("(q, q, q)", f"(q, q, q{options})").replace("(16, 16384", "(16, 60000")
        + """
expected, mask = attention(), numba.get_num_threads()
print("started", flush=True)
try:
    long_call()
except KeyboardInterrupt:
    print("interrupted", flush=True)
    assert np.array_equal(attention(), expected)
    assert numba.get_num_threads() == mask
    print("right", flush=True)
"""
    )
    environment = {**os.environ, "NUMBA_THREADING_LAYER": layer}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            first = process.stdout.readline().strip()
            if first == "missing":
                pytest.skip(f"{layer} is not installed")
            assert first == "started"
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            # The call itself would take much longer than this: the limit says that it was cut short, not how fast.
            printed, _ = process.communicate(timeout=15)
            assert printed.split() == ["interrupted", "right"]
            assert process.returncode == 0
        finally:
            process.kill()
