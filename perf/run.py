"""The benchmark driver, and the only judge of performance: this package and its peers, side by side.

    python perf/run.py                                         every case and the extra measurements, as text
    python perf/run.py -o perf/results.json                    the same, and all of it in JSON for report.py
    python perf/run.py --only "D 128" --repeats 5 --peers torch,onnx_mha
    python perf/run.py --tag variant --peers torch,flex        cap, ALiBi, functions, block masks; "narrow": 16 bits
    python perf/run.py --tag decode --peers torch,onnx_gqa     one token of a model; "cache": kinds of caches, batches
    python perf/run.py --backend cuda -o perf/cuda.json        on a GPU, beside PyTorch there

Each library runs in a process of its own, which is stopped (SIGSTOP) while another is timed: so each may let its idle
threads spin as it likes, and none takes the processors away from another.  The repeats are interleaved, one timing of
each library in turn, in an order that rotates: a machine that slows down does so for all of them.  The rate of
multiply-adds that the machine reaches is measured in the same turns, and so is the rate at which it reads the keys and
values of a case that is bound by that.  A case may have other forms, which some libraries are timed with too.  Linux
only.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import extras
import processes
from cases import PERF, Case
from peers import PEERS
from workers import OURS, PeerError, Team, Worker, thread_environment, worker

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-3  # on results of order 1: enough to tell that all compute the same thing
# In addition, of the largest result: four units in the last place of a type, and what integers may be off by, of which
# a cache has one step for a whole head or a few numbers.
ROUNDING = {"float16": 2**-8, "bfloat16": 2**-5, "int8": 2**-5, "int4": 2**-1}
MOST_SCORES = 4e7  # for which a float64 reference is computed
MOST_CALLS = 1e6  # of a user's function, in Python, for the same
QUICK_FLOP, QUICK_BYTES = 2.5e9, 1.5e8
UNDISTURBED = 0.85  # of the best peak, for a case to be taken seriously
FEATURES = (
    *("fma", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)

Result = dict[str, Any]


class Progress:
    """One line on a terminal: where the run is, and how long it may take."""

    def __init__(self, cases: Sequence[Case], repeats: int) -> None:
        # Peers that form all the scores take longest; each timing has a least duration.
        self._weights = [1e9 + c.B * c.Hq * c.Lq * c.Lk * (c.D + (c.Dv or c.D)) for c in cases]
        self._cases, self._repeats = cases, repeats
        self._start = time.monotonic()
        self._wanted = sys.stderr.isatty()

    def __call__(self, number: int, repeat: int) -> None:
        if not self._wanted:
            return
        done = (sum(self._weights[:number]) + self._weights[number] * repeat / self._repeats) / sum(self._weights)
        left = ""
        if done > 0.01:
            left = f", {(time.monotonic() - self._start) * (1 - done) / done / 60:.1f} minutes left"
        name = self._cases[number].name
        self._show(f"case {number + 1} of {len(self._cases)}, {name}: repeat {repeat} of {self._repeats}{left}")

    def note(self, text: str) -> None:
        if self._wanted:
            self._show(text)

    def clear(self) -> None:
        self.note("")

    def _show(self, text: str) -> None:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def measure_all(team: Team, cases: Sequence[Case], repeats: int, progress: Progress, table: TextIO) -> list[Result]:
    """Every case, each with a line of text when it is done."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            team.replace_ended()
            result = measure(team, case, repeats, Path(folder), functools.partial(progress, number))
            results.append(result)
            progress.clear()
            print(text_line(result), file=table, flush=True)
    return results


def measure(team: Team, case: Case, repeats: int, folder: Path, progress: Callable[[int], None]) -> Result:
    """One case: everyone's result compared, then everyone's time, in turns."""
    progress(0)
    peers = prepare_all(team, case, folder)
    peaks: list[float] = []
    reads: list[float] = []
    for repeat in range(repeats):
        progress(repeat)
        able = [name for name, peer in peers.items() if "calls" in peer]
        shift = repeat % len(able)
        for name in able[shift:] + able[:shift]:
            if name == OURS:
                peaks.append(team.ask(OURS, "peak", dtype=case.dtype))
                if "bytes" in peers[OURS]:
                    reads.append(team.ask(OURS, "read"))
            peer, form = split(name)
            try:
                peers[name]["seconds"].append(team.ask(peer, "time", form=form))
            except PeerError as error:
                if name == OURS:
                    raise
                peers[name] = {error.kind: str(error)}
    return summary(case, peers, peaks, reads)


def split(name: str) -> tuple[str, str]:
    """Peer and form, "" the plain one.

    >>> split("ours int8"), split("torch")
    (('ours', 'int8'), ('torch', ''))
    """
    peer, _, form = name.partition(" ")
    return peer, form


def prepare_all(team: Team, case: Case, folder: Path) -> dict[str, Result]:
    """What each peer can say of a case, and of its forms, before the timings; our own failure is everyone's."""
    reference = None
    if case.B * case.Hq * case.Lq * case.Lk <= (MOST_CALLS if "score_mod" in case.options else MOST_SCORES):
        team.ask(OURS, "reference", case=case.name, output=str(folder / "reference.npy"))
        reference = np.load(folder / "reference.npy")
    peers: dict[str, Result] = {}
    ours = np.empty(0)
    forms = [f"{name} {form}" for form in case.forms for name in team.workers if form in PEERS[name].forms]
    for name in (*team.workers, *forms):
        output = folder / f"{name}.npy"
        peer, form = split(name)
        try:
            prepared = team.ask(peer, "prepare", case=case.name, form=form, output=str(output))
        except PeerError as error:
            if name == OURS:
                raise
            peers[name] = {error.kind: str(error)}
            continue
        out = np.load(output)
        ours = out if name == OURS else ours
        peers[name] = {**prepared, "seconds": [], "difference": float(np.abs(out - ours).max(initial=0))}
        peers[name]["largest"] = float(np.abs(out).max(initial=0))
        if reference is not None:
            error_of_out = out - reference
            peers[name]["error"] = {
                "max": float(np.abs(error_of_out).max(initial=0)),
                "rms": float(np.sqrt(np.mean(error_of_out**2))),
            }
    return peers


def summary(case: Case, peers: dict[str, Result], peaks: list[float], reads: list[float]) -> Result:
    """The numbers that follow from the timings."""
    peak = statistics.median(peaks)
    for peer in peers.values():
        if "seconds" in peer:
            peer["median"] = statistics.median(peer["seconds"])
            peer["gflops"] = case.flop / peer["median"] / 1e9
    for peer in peers.values():
        if "median" in peer:
            peer["ratio"] = peer["median"] / peers[OURS]["median"]
    return {
        "name": case.name,
        "tags": sorted(case.tags),
        "shape": {name: getattr(case, name) for name in ("B", "Hq", "Hkv", "Lq", "Lk", "D", "Dv")},
        "dtype": case.dtype,
        "mask": case.mask,
        "options": described_options(case),
        "flop": case.flop,
        "peaks_gflops": peaks,
        "peak_gflops": peak,
        "fraction_of_peak": peers[OURS]["gflops"] / peak,
        **(reading(peers, reads) if reads else {}),
        "peers": peers,
    }


def reading(peers: dict[str, Result], reads: list[float]) -> Result:
    """Numbers of a case that is bound by reading; a peer that does not say what it reads does what we do."""
    size, read = peers[OURS]["bytes"], statistics.median(reads)
    for peer in peers.values():
        if "median" in peer:
            peer["gb_per_s"] = peer.setdefault("bytes", size) / peer["median"] / 1e9
    return {
        "bytes": size,
        "reads_gb_per_s": reads,
        "read_gb_per_s": read,
        "fraction_of_read": peers[OURS]["gb_per_s"] / read,
    }


def described_options(case: Case) -> Result:
    """As JSON can hold them."""
    found = {name: x.__name__ if callable(x) else np.asarray(x).tolist() for name, x in case.options.items()}
    return {**found, **({"documents": case.documents} if case.documents else {})}


def text_line(result: Result) -> str:
    """Our time and speed, and how many times as long the others take."""
    ours = result["peers"][OURS]
    speed, fraction = f"{ours['gflops']:8.1f} GFLOP/s", result["fraction_of_peak"]
    if "read_gb_per_s" in result:
        speed, fraction = f"{ours['gb_per_s']:8.1f} GB/s   ", result["fraction_of_read"]
    words = [f"{result['name']:<50}{1e3 * ours['median']:10.3f} ms{speed}{100 * fraction:5.0f} %"]
    for name, peer in result["peers"].items():
        if name != OURS:
            words.append(f"{name} {peer['ratio']:5.2f}" if "ratio" in peer else f"{name}     -")
    return "   ".join(words)


def disturbed(results: list[Result]) -> list[str]:
    """Cases during which the machine could do much less than during others: something else was running on it."""
    found = []
    for result in results:
        for name, unit, alike in (
            ("peak_gflops", "GFLOP/s", [other for other in results if other["dtype"] == result["dtype"]]),
            ("read_gb_per_s", "GB/s of reading", results),
        ):
            best = max((other[name] for other in alike if name in other), default=0.0)
            if name in result and result[name] < UNDISTURBED * best:
                reached = f"the machine reached {result[name]:.0f} {unit} only, {best:.0f} in another case"
                found.append(f"{result['name']}: {reached}")
    return found


def peak_of(team: Team, dtype: str, results: list[Result], repeats: int) -> float:
    """Median rate of multiply-adds in GFLOP/s, over the whole run and a few moments more."""
    during = [peak for result in results if result["dtype"] == dtype for peak in result["peaks_gflops"]]
    return float(statistics.median(during + [team.ask(OURS, "peak", dtype=dtype) for _ in range(repeats)]))


def problems(results: list[Result]) -> list[str]:
    """Peers that failed, and results that are not ours."""
    found = []
    for result in results:
        for name, peer in result["peers"].items():
            rounding = max(ROUNDING.get(numbers, 0) for numbers in (result["dtype"], *split(name)[1].split()))
            allowed = TOLERANCE + rounding * result["peers"][OURS]["largest"]
            if "failed" in peer:
                found.append(f"{result['name']}: {name} failed: {peer['failed']}")
            elif "difference" in peer and not peer["difference"] < allowed:
                found.append(f"{result['name']}: {name} differs from ours by {peer['difference']:.2g}")
    return found


# Beside the cases -----------------------------------------------------------------------------------------------------


def measure_extras(names: Sequence[str], threads: int, progress: Progress) -> Result:
    """Fixed cost, start of a process and working memory, each in fresh processes."""
    progress.note("fixed cost of a call")
    with worker(OURS, threads) as ours:
        fixed = ours.ask("fixed_cost")
        progress.note("making of a block mask")
        block_mask = ours.ask("block_mask_cost")
    progress.note("start of a process")
    start = extras.start_times(thread_environment(threads))
    progress.note("threads at once, Ctrl-C")
    in_process = processes.citizenship(thread_environment(threads))
    memory: dict[str, Result] = {}
    for case, peers in ((extras.MODERATE, names), (extras.LONG, [OURS])):
        memory[case.name] = {}
        for name in peers:
            progress.note(f"memory of {name} for {case.name}")
            with worker(name, threads) as fresh:
                memory[case.name][name] = _value_or_reason(fresh, "memory", case=case.name)
    progress.clear()
    return {
        "fixed_cost_us": fixed,
        "start_seconds": start,
        "memory_bytes": memory,
        "block_mask_seconds": block_mask,
        "in_process": in_process,
    }


def _value_or_reason(one: Worker, do: str, **arguments: Any) -> Any:
    try:
        return one.ask(do, **arguments)
    except PeerError as error:
        return {error.kind: str(error)}


def environment() -> Result:
    """What else decides the numbers."""
    cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpu.splitlines())}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    changed = git(
        "status", "--porcelain", "--", "numba_attn", "tests/cases.py", "tests/mods.py", *(f"perf/{f}" for f in SOURCES)
    )
    return {
        "cpu": fields.get("model name") or platform.machine(),
        "family": " ".join(fields[key] for key in ("vendor_id", "cpu family", "model") if key in fields),
        "features": [name for name in FEATURES if name in flags],
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load": os.getloadavg(),
    }


SOURCES = (
    "run.py",
    "session.py",
    "workers.py",
    "peer.py",
    "peers.py",
    "forms.py",
    "torch_peers.py",
    "onnx_peers.py",
    "peak.py",
    "extras.py",
    "processes.py",
)


def git(*arguments: str) -> str | None:
    """None outside of a checkout, or without git."""
    try:
        finished = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return finished.stdout.strip()


# The command ----------------------------------------------------------------------------------------------------------


def select(only: Sequence[str], tag: str | None, quick: bool) -> list[Case]:
    """The cases of the table that all given conditions leave."""
    return [
        case
        for case in PERF
        if (not only or any(part in case.name for part in only))
        and (tag is None or tag in case.tags)
        and (not quick or (case.flop <= QUICK_FLOP and case.kv_bytes <= QUICK_BYTES))
    ]


def parser() -> argparse.ArgumentParser:
    one = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    one.add_argument("-o", "--output", type=Path, help="where to write the JSON")
    one.add_argument(
        "--backend", choices=("cpu", "cuda"), default="cpu", help="cuda: on a GPU, beside PyTorch there, see gpu.py"
    )
    one.add_argument("--only", nargs="+", default=[], metavar="SUBSTRING", help="cases with one of these in their name")
    one.add_argument("--tag", help="cases with this tag")
    one.add_argument("--repeats", type=int, help="timings of each (11; 3 if --quick)")
    one.add_argument("--threads", type=int, default=2, help="for every library (2)")
    one.add_argument("--peers", default=",".join(PEERS), help=f"some of {','.join(PEERS)} (all); ours is always there")
    one.add_argument(
        "--quick",
        action="store_true",
        help=f"3 repeats of the cases up to {QUICK_FLOP / 1e9} GFLOP and {QUICK_BYTES / 1e6:.0f} MB of keys and values",
    )
    one.add_argument(
        "--extras",
        action=argparse.BooleanOptionalAction,
        help="fixed cost, start-up and memory too (by default when all cases are measured)",
    )
    return one


def main() -> int:
    options = parser().parse_args()
    if options.backend == "cuda":
        return main_on_gpu(options)
    names = [OURS, *(name for name in options.peers.split(",") if name != OURS)]
    if unknown := set(names) - PEERS.keys():
        parser().error(f"unknown peers {', '.join(sorted(unknown))}; known are {', '.join(PEERS)}")
    cases = select(options.only, options.tag, options.quick)
    if not cases:
        parser().error("no case is left")
    repeats = options.repeats or (3 if options.quick else 11)
    with_extras = len(cases) == len(PERF) if options.extras is None else options.extras

    results = run(names, cases, repeats, options.threads, with_extras)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    found = problems(results["cases"])
    for line in (*found, *disturbed(results["cases"])):
        print(line, file=sys.stderr)
    return 1 if found else 0


def main_on_gpu(options: argparse.Namespace) -> int:
    """Threads, tags and the choice of peers are of the CPU's measurements alone."""
    from gpu import run as run_on_gpu
    from gpu import unavailable

    if (reason := unavailable()) is not None:
        parser().error(f"no GPU can be measured: {reason}")
    with_extras = not options.only if options.extras is None else options.extras
    results = run_on_gpu(options.only, options.repeats or 5, with_extras, git("rev-parse", "HEAD"))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def run(names: Sequence[str], cases: Sequence[Case], repeats: int, threads: int, with_extras: bool) -> Result:
    """All measurements, as they are written to JSON."""
    before = environment()
    progress = Progress(cases, repeats)
    progress.note("starting")
    team = Team(names, threads)
    try:
        for name, reason in team.missing.items():
            progress.clear()
            print(f"{name} is left out: {reason}", file=sys.stderr)
        measured = measure_all(team, cases, repeats, progress, sys.stdout)
        peak = {dtype: peak_of(team, dtype, measured, repeats) for dtype in ("float32", "float64", "bfloat16")}
        bandwidth = team.ask(OURS, "bandwidth")
        machine = team.ask(OURS, "machine")
    finally:
        team.close()
    return {
        "environment": {**before, **machine, "versions": team.versions, "missing": team.missing},
        "settings": {"repeats": repeats, "threads": threads, "peers": list(team.workers)},
        "peak": {"gflops": peak, "read_gb_per_s": bandwidth},
        "cases": measured,
        "extras": measure_extras(list(team.workers), threads, progress) if with_extras else None,
    }


if __name__ == "__main__":
    raise SystemExit(main())
