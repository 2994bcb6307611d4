"""The command line, called in this process on the reference backend wherever the kernels are not what is tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import numba_attn
from numba_attn import cli
from numba_attn.commands import bench, common, comparison, pieces, progress


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((2, 4, 5, 8), dtype=np.float32) for name in ("query", "key", "value")}


@pytest.fixture
def archive(tmp_path, arrays):
    path = tmp_path / "in.npz"
    np.savez(path, **arrays)
    return path


def run(*arguments):
    return cli.main([str(argument) for argument in ("run", *arguments, "--backend", "reference")])


def one_error_line(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("numba-attn: error: ") and captured.err.count("\n") == 1
    return captured.err


# run ------------------------------------------------------------------------------------------------------------------


CALLS = {
    "masks": (
        ["--causal", "--scale", "0.3", "--window", "3", "none", "--query-offset", "-1", "--lse"],
        {"attn_mask": np.random.default_rng(1).random((5, 5)) < 0.8, "kv_lengths": np.array([5, 3])},
        {"is_causal": True, "scale": 0.3, "window": (3, None), "query_offset": -1, "return_aux": ("lse",)},
    ),
    "variants": (
        ["--softcap", "2", "--dropout-p", "0.3", "--dropout-seed", "7", "--precision", "bfloat16",
         "--aux", "entropy", "--aux", "key_weight"],
        {"alibi_slopes": np.array([0.5, 0.25, 0, -1]), "sinks": np.linspace(-1, 2, 4)},
        {"softcap": 2.0, "dropout_p": 0.3, "dropout_seed": 7, "precision": "bfloat16",
         "return_aux": ("entropy", "key_weight")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_run_is_the_call(tmp_path, arrays, capsys, name):
    arguments, more, options = CALLS[name]
    # In the layout BLHD these are 2 sequences of 5 rows and 5 keys in 4 heads.
    arrays = {name: x.swapaxes(1, 2) for name, x in arrays.items()} | more
    np.savez(tmp_path / "in.npz", **arrays)
    assert run(tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--layout", "BLHD", *arguments) == 0
    out, aux = numba_attn.scaled_dot_product_attention(**arrays, **options, layout="BLHD", backend="reference")
    with np.load(tmp_path / "out.npz") as written:
        assert sorted(written) == sorted(["out", *options["return_aux"]])
        np.testing.assert_array_equal(written["out"], out)
        for name in options["return_aux"]:
            np.testing.assert_array_equal(written[name], getattr(aux, name))
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") == 1


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_run_on_16_bits(tmp_path, arrays, name):
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name) if name == "bfloat16" else name)
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    np.savez(tmp_path / "in.npz", **arrays)
    assert run(tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--causal") == 0
    out = numba_attn.scaled_dot_product_attention(**arrays, is_causal=True, backend="reference")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["out"].view(dtype), out)


def test_run_grouped_queries_and_bottom_right(tmp_path, arrays):
    arrays |= {"key": arrays["key"][:, :2], "value": arrays["value"][:, :2], "query": arrays["query"][:, :, :3]}
    np.savez(tmp_path / "in.npz", **arrays)
    arguments = ["--gqa", "--causal", "--query-offset", "bottom_right"]
    assert run(tmp_path / "in.npz", "-o", tmp_path / "out.npz", *arguments) == 0
    expected = numba_attn.scaled_dot_product_attention(
        **arrays, enable_gqa=True, is_causal=True, query_offset="bottom_right", backend="reference"
    )
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["out"], expected)


def test_run_does_not_replace_its_input(archive, capsys):
    before = archive.read_bytes()
    assert run(archive, "-o", archive) == 2
    assert "must not be the input" in capsys.readouterr().err and archive.read_bytes() == before


def test_inspect_does_not_replace_its_input(archive, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    before = archive.read_bytes()
    (tmp_path / "link.png").symlink_to(archive)
    assert cli.main(["inspect", str(archive), "-o", str(tmp_path / "link.png"), "--backend", "reference"]) == 2
    assert "must not be the input" in capsys.readouterr().err and archive.read_bytes() == before


def test_nobody_reads_what_is_printed():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "numba_attn", "info", "--json"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_run_json(archive, tmp_path, capsys):
    assert run(archive, "-o", tmp_path / "out.npz", "--json", "--causal") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["shapes"] == {name: [2, 4, 5, 8] for name in ("query", "key", "value", "out")}
    assert summary["dtype"] == "float32" and summary["backend"] == "reference" and summary["dropout_seed"] is None
    assert summary["flop"] == 2 * 2 * 4 * 15 * 8 * 2  # products, multiply and add, heads, pairs, head size, sequences
    assert summary["gflops"] == pytest.approx(summary["flop"] / summary["seconds"] / 1e9)


def test_run_on_nothing(tmp_path):
    np.savez(tmp_path / "in.npz", **dict.fromkeys(("query", "key", "value"), np.empty((0, 4, 8), np.float32)))
    assert run(tmp_path / "in.npz", "-o", tmp_path / "out.npz", "--json") == 0
    assert np.load(tmp_path / "out.npz")["out"].shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"value": None}, [], "has no value; it has query, key"),
        ({"mask": np.ones((5, 5), bool)}, [], "unknown mask"),
        ({"query_offset": np.array(1)}, ["--query-offset", "1"], "cannot be combined"),
        ({"query": np.ones((2, 4, 5, 8), np.int32)}, [], "query must be"),
        ({"key": np.ones((2, 2, 5, 8), np.float32), "value": np.ones((2, 2, 5, 8), np.float32)}, [], "enable_gqa"),
        ({}, ["--window", "-1", "0"], "window sides"),
        ({}, ["--scale", "nan"], "scale must be finite"),
        ({}, ["--scale", "wide"], "--scale"),
        ({}, ["--window", "1", "all"], "argument --window: must be an integer or none, got 'all'"),
        ({}, ["--query-offset", "top"], "argument --query-offset: must be an integer or bottom_right, got 'top'"),
        ({}, ["--layout", "LBHD"], "--layout"),
        ({}, ["--aux", "weights"], "--aux"),
        ({}, ["--softcap", "0"], "softcap must be positive"),
        ({}, ["--dropout-p", "1"], "dropout_p must be in"),
        ({"sinks": np.ones(3)}, [], "sinks must have shape (4,)"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, arrays, capsys, change, arguments, message):
    changed = {name: x for name, x in {**arrays, **change}.items() if x is not None}
    np.savez(tmp_path / "in.npz", **changed)
    assert run(tmp_path / "in.npz", "-o", tmp_path / "out.npz", *arguments) == 2
    assert message in one_error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


def test_files_that_are_not_there_or_not_archives(tmp_path, archive, capsys):
    assert run(tmp_path / "none.npz", "-o", tmp_path / "out.npz") == 2
    assert "none.npz: No such file" in one_error_line(capsys)
    np.save(tmp_path / "x.npy", np.ones(3))
    assert run(tmp_path / "x.npy", "-o", tmp_path / "out.npz") == 2
    assert "is not an .npz archive" in one_error_line(capsys)
    assert run(archive, "-o", tmp_path / "none" / "out.npz") == 2
    assert "out.npz: No such file" in one_error_line(capsys)
    assert run(archive, "-o", tmp_path) == 2
    assert "Is a directory" in one_error_line(capsys)


def test_an_absent_backend_says_so(tmp_path, archive, capsys, monkeypatch):
    def absent(backend):
        raise NotImplementedError(f"backend {backend!r} is not for today")

    monkeypatch.setattr("numba_attn.dispatch.forward", absent)
    assert cli.main(["run", str(archive), "-o", str(tmp_path / "out.npz"), "--backend", "cuda"]) == 2
    assert "backend 'cuda' is not for today" in one_error_line(capsys)


@pytest.mark.parametrize(("error", "status"), [(MemoryError("Unable to allocate"), 2), (KeyboardInterrupt(), 130)])
def test_output_is_complete_or_not_there(tmp_path, archive, monkeypatch, error, status):
    def fail(problem):
        raise error

    monkeypatch.setattr("numba_attn.dispatch.forward", lambda backend: fail)
    assert run(archive, "-o", tmp_path / "out.npz") == status
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


# Pieces ---------------------------------------------------------------------------------------------------------------


def test_a_run_in_pieces_is_the_run_in_one(tmp_path, archive, monkeypatch, capsys):
    arguments = [archive, "--causal", "--lse", "--query-offset", "2"]
    assert run(*arguments, "-o", tmp_path / "one.npz") == 0
    parts = []
    forward = numba_attn.dispatch.forward("reference")
    monkeypatch.setattr("numba_attn.dispatch.forward", lambda backend: lambda x: (parts.append(x), forward(x)))
    monkeypatch.setattr(pieces, "PIECE_FLOP", 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(*arguments, "-o", tmp_path / "pieces.npz") == 0
    assert len(parts) == 8
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "pieces.npz") as several:
        np.testing.assert_array_equal(several["out"], one["out"])
        np.testing.assert_array_equal(several["lse"], one["lse"])


SPLITS = {
    "batch axes": ((3, 2, 2), (3, 2, 2), {}),
    "groups": ((4,), (2,), {"enable_gqa": True}),
    "shared head": ((6,), (1,), {"enable_gqa": True}),
    "offsets": ((2, 1), (2, 1), {"query_offset": [3, -4], "window": (4, 1)}),
    "lengths": ((2, 1), (2, 1), {"query_lengths": [2, 17], "kv_lengths": [20, 9], "query_offset": "bottom_right"}),
    "one matrix": ((), (), {"is_causal": True}),
    "rows first": ((2, 2), (2, 2), {"layout": "BLHD", "is_causal": True}),
    "per head": ((2, 1, 6), (2, 1, 3), {"enable_gqa": True, "alibi_slopes": np.linspace(-0.5, 1, 12).reshape(2, 6),
                                        "sinks": np.linspace(-2, 3, 6), "query_offset": [2, -5], "softcap": 1.5}),
    "slopes of all": ((2, 4), (2, 1), {"enable_gqa": True, "alibi_slopes": np.array([1.0, 0.1, 0, 0.5])}),
}  # fmt: skip
STATISTICS = ("lse", "max_score", "entropy")


def problem_to_cut(name, dtype="float64"):
    """The problem, and the same with results of its own."""
    query_axes, key_axes, options = SPLITS[name]
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal((*axes, length, 8)).astype(dtype) for axes, length in zip(
        (query_axes, key_axes, key_axes), (18, 21, 21), strict=True)]  # fmt: skip
    mask = rng.random((*query_axes[:-1], 1, 18, 21)[-len(query_axes) - 2 :]) < 0.9
    if options.get("layout") == "BLHD":
        arrays = [x.swapaxes(-3, -2) for x in arrays]
        mask = mask[..., :1]
    calls = []

    def record(backend):
        return calls.append

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numba_attn.dispatch.forward", record)
        for _ in range(2):
            out, aux = numba_attn.scaled_dot_product_attention(*arrays, mask, return_aux=STATISTICS, **options)
            for x in (out, *aux[:3]):
                x.fill(np.nan)
    return calls


def compare_results(compare, got, expected):
    for x, y in zip((got.result, *got.aux[:3]), (expected.result, *expected.aux[:3]), strict=True):
        compare(x, y)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("name", SPLITS)
def test_pieces_write_the_results_of_the_whole(name, rows, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_FLOP", 1)
    monkeypatch.setattr(pieces, "ROW_UNIT", 4)
    whole, cut = problem_to_cut(name)
    forward = numba_attn.dispatch.forward("reference")
    forward(whole)
    parts = list(pieces.pieces_of(cut, rows))
    assert all(np.shares_memory(piece.out, cut.out) for piece in parts)
    assert sum(piece.out.size for piece in parts) == cut.out.size
    assert sum(map(pieces.flop_of, parts)) == pieces.flop_of(whole)
    cut_rows = rows and not whole.intervals.padded
    assert all(piece.query.shape[-2] < 8 or pieces.flop_of(piece) <= 1 for piece in parts) or not cut_rows
    for piece in parts:
        forward(piece)
    # NumPy's products of fewer rows may differ in the last bit; those of fewer heads do not.
    compare_results(np.testing.assert_allclose if rows else np.testing.assert_array_equal, cut, whole)


@pytest.mark.parametrize("name", SPLITS)
def test_pieces_give_the_bits_of_the_whole_in_the_kernels(name, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_FLOP", 1)
    monkeypatch.setattr(pieces, "ROW_UNIT", 9)
    whole, cut = problem_to_cut(name, "float32")
    forward = numba_attn.dispatch.forward("cpu")
    forward(whole)
    for piece in pieces.pieces_of(cut, rows=True):
        forward(piece)
    compare_results(np.testing.assert_array_equal, cut, whole)


@pytest.mark.parametrize("option", [{"dropout_p": 0.5}, {"return_aux": ("key_weight",)},
                                    {"score_mod": lambda score, b, h, i, j: score}])  # fmt: skip
def test_what_goes_by_number_or_sums_rows_is_not_cut(arrays, monkeypatch, option):
    monkeypatch.setattr(pieces, "PIECE_FLOP", 1)
    problems = []
    monkeypatch.setattr("numba_attn.dispatch.forward", lambda backend: problems.append)
    numba_attn.scaled_dot_product_attention(**arrays, **option)
    assert list(pieces.pieces_of(problems[0], rows=True)) == problems


# Progress -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_drawn_on_a_terminal_after_a_second(monkeypatch, capsys, terminal):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress.Progress("work") as bar:
        now[0] = 0.5
        bar(0.25)
        assert capsys.readouterr().err == ""
        now[0] = 2.0
        bar(0.5)
        assert capsys.readouterr().err == (f"\rwork [{'#' * 15:<30}]  50%, 2 s left" if terminal else "")
    assert capsys.readouterr().err.strip() == ""


# bench ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_bench(monkeypatch):
    """Peers in this process, with small cases and without kernels."""
    monkeypatch.setattr(comparison, "CASES", (comparison.Case(2, 6, 4), comparison.Case(2, 6, 4, True)))
    monkeypatch.setattr(comparison, "QUICK", comparison.CASES[:1])
    monkeypatch.setattr(comparison, "TURN", 1e-6)
    monkeypatch.setattr(comparison, "PAUSE", 0)
    monkeypatch.setattr(comparison, "Worker", comparison.Session)
    monkeypatch.setattr(comparison, "_NEEDS", {"torch": ("no_such_module",), "onnxruntime": ("no_such_module",)})

    def reference(query, key, value, causal):
        return lambda: numba_attn.scaled_dot_product_attention(query, key, value, is_causal=causal, backend="reference")

    monkeypatch.setitem(comparison.PEERS, "numba_attn", reference)


def test_bench_table(small_bench, capsys):
    assert cli.main(["bench"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[2].split() == ["heads", "x", "length", "x", "size", "numba_attn", "numpy", "/numpy"]
    assert lines[3].startswith("2 x 6 x 4 ") and lines[4].startswith("2 x 6 x 4 causal")
    assert "perf/run.py" in out


def test_bench_json(small_bench, capsys, monkeypatch):
    monkeypatch.setattr(bench, "environment", lambda: {"versions": {}})
    assert cli.main(["bench", "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (result,) = report["results"]
    assert result["flop"] == 4 * 2 * 36 * 4 and report["left_out"] == {}
    seconds = result["seconds"]
    assert result["speedup_over"]["numpy"] == pytest.approx(seconds["numpy"] / seconds["numba_attn"])
    assert result["gflops"]["numpy"] == pytest.approx(result["flop"] / seconds["numpy"] / 1e9)


def test_bench_leaves_out_who_is_wrong_or_fails(small_bench, capsys, monkeypatch):
    def wrong(query, key, value, causal):
        return lambda: np.zeros_like(query)

    class Refusing(comparison.Session):
        def prepare(self, case):
            if self._peer == "onnxruntime":
                raise comparison.PeerError("it will not")
            return super().prepare(case)

    monkeypatch.setattr(comparison, "Worker", Refusing)
    monkeypatch.setattr(comparison, "_NEEDS", {})
    monkeypatch.setitem(comparison.PEERS, "torch", wrong)
    assert cli.main(["bench"]) == 0
    out = capsys.readouterr().out
    assert "torch left out: its result for 2 x 6 x 4 is not NumPy's" in out
    assert "onnxruntime left out: it will not" in out
    monkeypatch.setitem(comparison.PEERS, "numba_attn", wrong)
    assert cli.main(["bench"]) == 2
    assert "numba_attn: its result for" in one_error_line(capsys)


def test_bench_worker_is_a_process(monkeypatch):
    case = comparison.Case(2, 6, 4, True)
    worker = comparison.Worker("numpy")
    try:
        out = worker.prepare(case)
        assert worker.time() > 0
        with pytest.raises(comparison.PeerError, match="TypeError"):
            worker._ask("time", "not an argument of it")
        worker._process.kill()
        with pytest.raises(comparison.PeerError, match="its process ended with exit code"):
            worker.time()
    finally:
        worker.close()
    np.testing.assert_array_equal(out, comparison.Session("numpy").prepare(case))


@pytest.mark.parametrize("peer", ["torch", "onnxruntime"])
def test_bench_peers_compute_attention(peer, monkeypatch):
    for module in comparison._NEEDS[peer]:
        pytest.importorskip(module)
    for causal in (False, True):
        query, key, value = np.random.default_rng(0).standard_normal((3, 2, 6, 8), dtype=np.float32)
        expected = comparison.PEERS["numpy"](query, key, value, causal)()
        np.testing.assert_allclose(comparison.PEERS[peer](query, key, value, causal)(), expected, rtol=0, atol=1e-5)


def test_bench_plot(small_bench, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["bench", "--plot", str(tmp_path / "chart.png")]) == 0
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_bench_plot_without_matplotlib(small_bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "--plot", str(tmp_path / "chart.png")]) == 2
    assert "--plot needs matplotlib" in one_error_line(capsys)


# info and warmup ------------------------------------------------------------------------------------------------------


def test_info_json_in_a_process(python):
    info = json.loads(python("import runpy; runpy.run_module('numba_attn', run_name='__main__')", "info", "--json"))
    assert info["versions"]["numba_attn"] == numba_attn.__version__
    assert info["versions"]["numpy"] == np.__version__
    assert {"ml_dtypes", "onnx"} <= set(info["versions"])
    assert info["kernels"]["vector_bytes"] in (16, 32, 64) and info["kernels"]["register_tiles"]
    assert info["threads"]["count"] >= 1
    assert set(info["backends"]) == {"cpu", "cuda", "reference"}
    assert info["backends"]["cpu"]["available"] and info["backends"]["reference"]["available"]
    absent = [backend for backend in info["backends"].values() if not backend["available"]]
    assert all(backend["reason"] and backend["needs"] for backend in absent)


def test_info_text(capsys, monkeypatch):
    from numba_attn.cpu import cache

    monkeypatch.setattr(cache, "directory", lambda: None)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "NUMBA_CACHE_DIR" in out and "threading layer" in out and "register tiles" in out
    assert "backend cpu       available" in out and "bfloat16 " in out


@pytest.mark.parametrize("writable", [True, False])
def test_warmup(tmp_path, capsys, monkeypatch, writable):
    from numba_attn.cpu import attention, cache, quantization, rotation

    monkeypatch.setattr(attention, "warmup", lambda: ["first kernel"])
    monkeypatch.setattr(rotation, "warmup", lambda: ["second kernel"])
    monkeypatch.setattr(quantization, "warmup", lambda: ["third kernel"])
    monkeypatch.setattr(cache, "directory", lambda: tmp_path if writable else None)
    assert cli.main(["warmup"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("first kernel\nsecond kernel\nthird kernel\n3 kernels")
    assert (str(tmp_path) if writable else "NUMBA_CACHE_DIR") in out
    assert cli.main(["warmup", "--json"]) == 0
    warmed = json.loads(capsys.readouterr().out)
    assert warmed["kernels"] == ["first kernel", "second kernel", "third kernel"] and warmed["seconds"] >= 0
    assert warmed["cache"] == (str(tmp_path) if writable else None)


# The command line -----------------------------------------------------------------------------------------------------


def test_version_and_help(capsys):
    for arguments in (["--version"], ["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        assert done.value.code == 0
    assert numba_attn.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run"], ["info", "--fast"]], ids=" ".join)
def test_usage_errors_are_one_line(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "--help" in one_error_line(capsys)


# inspect --------------------------------------------------------------------------------------------------------------


def look(*arguments):
    return cli.main([str(argument) for argument in ("inspect", *arguments, "--backend", "reference")])


def test_inspect_is_the_report(archive, arrays, capsys):
    expected = numba_attn.diagnose(**arrays, is_causal=True, scale=0.3, backend="reference")
    assert look(archive, "--causal", "--scale", "0.3") == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert look(archive, "--causal", "--scale", "0.3", "--key-weight", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["entropy"] == expected.entropy.tolist() and len(found["key_weight"]) == 4


def test_inspect_draws(archive, arrays, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    np.savez(archive, **arrays, tokens=np.array(list("abcde")))
    for name, head in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")):
        picture = tmp_path / name
        assert look(archive, "-o", picture, "--rows", "0", "-1", "--heads", "1", "--sequence", "1", "--dpi", "10") == 0
        assert picture.read_bytes().startswith(head)
    assert capsys.readouterr().out.count("\n") == 2 * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dpi", "9"], "--dpi must be between 10 and 1200, got 9"),
        (["--dpi", "1201"], "--dpi must be between 10 and 1200, got 1201"),
        (["-o", "a.png", "--heads", str(2**70)], f"heads must be between 0 and 3, got {2**70}"),
        (["-o", "a.png", "--rows", "0", str(-(2**70))], f"query_rows must be between -5 and 4, got {-(2**70)}"),
        (["-o", "a.txt"], "-o must end with one of .png, .pdf, .svg, got a.txt"),
        (["--window", "-1", "0"], "window sides"),
        (["-o", "a.png", "--heads", "9"], "heads must be between 0 and 3, got 9"),
        (["-o", "a.png", "--sequence", "2"], "sequence must be between 0 and 1, got 2"),
    ],
)
def test_inspect_refuses(archive, tmp_path, monkeypatch, capsys, arguments, message):
    if "a.png" in arguments:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert look(archive, *arguments) == 2
    assert message in one_error_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz"]


def test_inspect_of_files_that_cannot_be_read(archive, arrays, tmp_path, capsys):
    np.savez(archive, **{**arrays, "value": np.array([{}], object)})
    assert look(archive) == 2
    assert "in.npz: cannot read value.npy: Object arrays" in one_error_line(capsys)
    np.save(tmp_path / "x.npy", np.ones(3))
    assert look(tmp_path / "x.npy") == 2
    assert "x.npy is not an .npz archive" in one_error_line(capsys)


def test_inspect_takes_as_many_tokens_as_keys(archive, arrays, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    np.savez(archive, **arrays, tokens=np.array("abcde"))
    assert look(archive, "-o", tmp_path / "a.png") == 2
    assert "tokens must be 5 labels, got" in one_error_line(capsys)


def test_inspect_without_matplotlib(archive, monkeypatch, capsys):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    assert look(archive, "-o", "a.png") == 2
    assert "pip install 'numba_attn[plot]'" in one_error_line(capsys)
    assert look(archive) == 0
