"""The processes of the libraries: one runs at a time, while the others are stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = "ours"


class PeerError(Exception):
    """A request that came to nothing: `kind` is "unsupported" or "failed"."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Worker:
    """A `Session` in a process of its own, which runs only while it has a request to answer."""

    def __init__(self, name: str, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("session.py")), name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **thread_environment(threads)},
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Let it run, and stop it when it has answered."""
        if self.ended:
            raise PeerError("failed", "its process has ended")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.kill(self._process.pid, signal.SIGCONT)
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError("failed", f"its process ended with status {self._process.wait()}")
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)
        answer = json.loads(line)
        if "value" in answer:
            return answer["value"]
        [(kind, reason)] = answer.items()
        raise PeerError(kind, reason)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def worker(name: str, threads: int) -> Iterator[Worker]:
    """A worker for a while."""
    one = Worker(name, threads)
    try:
        yield one
    finally:
        one.close()


def thread_environment(threads: int) -> dict[str, str]:
    """For everything that takes its number of threads from the environment."""
    names = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PJRT_NPROC")
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    # NumPy's threads would spin for a tenth of a second after a product, in the way of what comes next; as in README.
    idle = {"OPENBLAS_THREAD_TIMEOUT": "16"}
    return {**dict.fromkeys(names, str(threads)), **idle, "PYTHONPATH": path}


class Team:
    """The workers; one whose process has ended is started anew for the next case."""

    def __init__(self, names: Sequence[str], threads: int) -> None:
        self._threads = threads
        self.workers: dict[str, Worker] = {}
        self.versions: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        for name in names:
            self._enlist(name)

    def _enlist(self, name: str) -> None:
        self.workers[name] = Worker(name, self._threads)
        try:
            self.versions |= self.workers[name].ask("versions")
        except PeerError as error:
            self.workers.pop(name).close()
            if name == OURS:
                raise
            self.missing[name] = str(error)

    def ask(self, peer: str, do: str, **arguments: Any) -> Any:
        return self.workers[peer].ask(do, **arguments)

    def replace_ended(self) -> None:
        for name, one in list(self.workers.items()):
            if one.ended:
                one.close()
                self._enlist(name)

    def close(self) -> None:
        for one in self.workers.values():
            one.close()
