"""Rules of the package as a whole: what imports what, what an import costs, what the README says."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import numba_attn
from numba_attn import cli, problem

PACKAGE = Path(numba_attn.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
USERS = [path for folder in ("perf", "examples") for path in sorted((PACKAGE.parent / folder).glob("*.py"))]

# Module -> what of this package it may import.  What is not named here may import nothing.
MAY_IMPORT = {
    # For type checkers; at run time on first use.
    "__init__": {
        *(
            "api",
            "block_mask",
            "gradient_problem",
            "gradients",
            "kv_attention",
            "kv_cache",
            "merge",
            "onnx",
            "paged_kv_cache",
            "problem",
            "rotary",
        ),
        *("diagnostics", "multihead", "plot", "row_weights", "threads", "varlen"),
    },
    "__main__": {"cli"},
    "block_mask": {"checks", "cpu.tile_states", "masks"},  # the latter when a mask is made
    "libraries": {"device_array", "dlpack"},
    "arrays": {"device_array", "libraries"},
    "checks": {"arrays", "device_array", "libraries"},
    "problem": {"block_mask", "checks", "kept", "masks", "storage"},
    "reference": {"block_mask", "gradient_problem", "problem", "random"},
    "repeats": {"arrays", "storage"},
    "dispatch": {"arrays", "gradient_problem", "problem", "repeats"},
    "api": {"arrays", "dispatch", "problem"},
    "merge": {"arrays", "checks"},
    "rotary": {"arrays", "checks", "cpu.rotation"},  # the latter when something is rotated
    "varlen": {"arrays", "dispatch", "problem"},
    "gradient_problem": {"checks", "problem"},
    "gradients": {"api", "arrays", "checks", "dispatch", "gradient_problem", "problem", "varlen"},
    "kv_pools": {"checks", "cpu.quantization", "memory", "storage"},  # the second when tokens are quantised
    "kv_cache": {"checks", "kv_pools", "storage"},
    "page_pool": {"checks", "kv_pools"},
    "paged_batch": {"kv_pools", "page_pool", "storage"},
    "paged_kv_cache": {"checks", "kv_pools", "page_pool", "paged_batch"},
    # Rotary when it is asked for.
    "kv_attention": {"api", "arrays", "checks", "kv_cache", "kv_pools", "paged_batch", "problem", "rotary"},
    "calls": {"api", "dispatch", "problem"},
    "padding": {"block_mask", "checks"},
    "parameters": {"checks"},
    "primitives": {"rotary"},
    "heads": {"checks", "parameters", "primitives"},
    "multihead": {
        *("arrays", "calls", "checks", "heads", "padding", "parameters", "primitives", "problem"),
        *("gradients", "kv_attention", "kv_cache", "paged_batch"),  # when they are asked for
    },
    "row_weights": {"arrays", "block_mask", "calls", "checks", "problem"},
    "moments": {"problem", "row_weights"},
    "diagnostics": {"block_mask", "calls", "checks", "moments", "problem"},
    "plot": {"calls", "checks", "diagnostics", "moments", "row_weights"},
    "onnx": {"api", "checks", "masks", "problem", "rotary"},
    # The commands, when they run.
    "cli": {f"commands.{name}" for name in ("bench", "common", "info", "inspect", "run", "warmup")},
    "commands.comparison": {"api"},
    "commands.bench": {"commands.common", "commands.comparison", "commands.info", "commands.progress"},
    "commands.info": {"commands.common", "cpu.cache", "cpu.plan", "cpu.target", "dispatch", "threads"},
    "commands.inspect": {"commands.common", "commands.npz", "diagnostics", "plot"},
    "commands.pieces": {"commands.common", "problem"},
    "commands.run": {
        *("commands.common", "commands.npz", "commands.pieces", "commands.progress"),
        *("api", "dispatch", "problem"),
    },
    "commands.warmup": {
        *("commands.common", "cpu.attention", "cpu.cache", "cpu.gradients", "cpu.quantization", "cpu.rotation"),
    },
    "cpu.plan": {"cpu.target"},
    "cpu.simd": {"cpu.target"},
    "cpu.elementary": {"cpu.blocks", "cpu.simd"},
    "cpu.emits": {"cpu.simd", "cpu.target"},
    "cpu.walk": {"cpu.blocks", "cpu.simd", "cpu.target"},
    "cpu.blocks": {"cpu.plan", "cpu.simd", "cpu.target"},
    "cpu.softmax": {"cpu.blocks", "cpu.elementary", "cpu.emits", "cpu.simd"},
    "cpu.dots": {
        *("cpu.blocks", "cpu.emits", "cpu.factors", "cpu.narrow", "cpu.simd", "cpu.target", "cpu.walk", "storage"),
    },
    "cpu.reading": {"cpu.jit", "cpu.pointers", "cpu.stored", "cpu.target", "cpu.walk"},
    "cpu.short": {
        *("cpu.blocks", "cpu.emits", "cpu.narrow", "cpu.products", "cpu.simd", "cpu.softmax", "cpu.target"),
    },
    "cpu.pointers": {"cpu.simd", "cpu.target"},
    "cpu.cache": {"cpu.target"},
    "cpu.compilers": set(),
    "cpu.jit": {"cpu.cache", "cpu.compilers"},
    "cpu.tuples": {"cpu.simd"},
    "cpu.workers": {"cpu.jit", "cpu.tuples"},
    "cpu.amx": {"cpu.emits", "cpu.simd"},
    "cpu.fours": {"cpu.simd", "storage"},
    "cpu.narrow": {"checks", "cpu.fours", "cpu.simd", "cpu.target", "storage"},
    "cpu.stored": {"cpu.jit", "cpu.pack", "cpu.pointers", "cpu.visible"},
    "cpu.products": {"cpu.blocks", "cpu.plan", "cpu.simd", "cpu.target"},
    "cpu.tiles": {
        *("cpu.amx", "cpu.blocks", "cpu.elementary", "cpu.emits", "cpu.plan", "cpu.products", "cpu.simd"),
        *("cpu.softmax", "cpu.target"),
    },
    "cpu.mask_tiles": {"cpu.blocks", "cpu.emits", "cpu.narrow", "cpu.simd", "block_mask"},
    "cpu.pack": {"cpu.blocks", "cpu.emits", "cpu.narrow", "cpu.simd", "cpu.softmax", "cpu.target"},
    "cpu.dropout": {"cpu.blocks", "cpu.emits", "cpu.simd", "random"},
    "cpu.conversions": {"cpu.target"},
    "cpu.captures": {"checks", "cpu.conversions", "cpu.jit"},
    "cpu.user_functions": {"cpu.captures", "cpu.jit", "cpu.pointers", "cpu.simd"},
    "cpu.launch": {"cpu.jit", "cpu.pointers", "cpu.workers", "kept", "memory", "threads"},
    "cpu.quantization": {
        *("cpu.emits", "cpu.factors", "cpu.jit", "cpu.launch", "cpu.narrow", "cpu.pack", "cpu.pointers", "cpu.simd"),
        *("cpu.workers", "storage", "threads"),
    },
    "cpu.rotation": {
        *("cpu.emits", "cpu.jit", "cpu.launch", "cpu.narrow", "cpu.pointers", "cpu.simd", "cpu.workers", "threads"),
    },
    "cpu.tile_states": {
        *("cpu.jit", "cpu.launch", "cpu.pointers", "cpu.user_functions", "cpu.workers", "block_mask", "threads"),
    },
    "cpu.visible": {"cpu.jit", "cpu.mask_tiles", "cpu.narrow", "cpu.pointers", "cpu.simd", "block_mask"},
    "cpu.score": {
        *("cpu.amx", "cpu.blocks", "cpu.jit", "cpu.mask_tiles", "cpu.narrow", "cpu.pointers", "cpu.softmax"),
        *("cpu.stored", "cpu.target", "cpu.tiles", "cpu.user_functions", "cpu.visible", "block_mask"),
    },
    "cpu.key_weight": {
        *("cpu.amx", "cpu.gradient_tiles", "cpu.jit", "cpu.launch", "cpu.narrow", "cpu.pack", "cpu.plan"),
        *("cpu.pointers", "cpu.results", "cpu.score", "cpu.shares", "cpu.softmax", "cpu.stored", "cpu.target"),
        *("cpu.tuples", "cpu.workers", "block_mask"),
    },
    "cpu.factors": {"cpu.emits", "cpu.narrow", "cpu.products", "cpu.simd", "cpu.tiles", "cpu.walk"},
    "cpu.as_read": {"cpu.factors", "cpu.narrow", "cpu.simd", "cpu.walk"},
    "cpu.mixing": {
        *("cpu.as_read", "cpu.blocks", "cpu.emits", "cpu.factors", "cpu.narrow", "cpu.products", "cpu.simd"),
        *("cpu.target", "cpu.walk"),
    },
    "cpu.rows": {"cpu.blocks", "cpu.elementary", "cpu.emits", "cpu.factors", "cpu.simd", "cpu.softmax"},
    "cpu.results": {"cpu.softmax", "cpu.jit", "cpu.pack", "cpu.pointers", "cpu.score"},
    "cpu.edges": {"cpu.jit", "cpu.pack", "cpu.pointers", "cpu.score", "cpu.softmax", "cpu.tiles"},
    "cpu.row_block": {
        *("cpu.dropout", "cpu.edges", "cpu.jit", "cpu.pack", "cpu.plan", "cpu.pointers", "cpu.score", "cpu.softmax"),
        *("cpu.stored", "cpu.target", "cpu.tiles", "cpu.visible", "block_mask"),
    },
    "cpu.shares": {
        *("cpu.jit", "cpu.pack", "cpu.plan", "cpu.pointers", "cpu.results", "cpu.row_block", "cpu.score"),
        *("cpu.softmax", "cpu.tuples"),
    },
    "cpu.forward": {
        *("cpu.amx", "cpu.edges", "cpu.jit", "cpu.launch", "cpu.narrow", "cpu.pack", "cpu.plan", "cpu.pointers"),
        *("cpu.results", "cpu.row_block", "cpu.score", "cpu.shares", "cpu.short", "cpu.stored", "cpu.target"),
        *("cpu.tiles", "cpu.tuples", "cpu.visible", "cpu.workers", "block_mask"),
    },
    "cpu.splits": {"cpu.jit", "cpu.pointers", "cpu.reading", "cpu.score"},
    "cpu.decode": {
        *("cpu.dots", "cpu.dropout", "cpu.factors", "cpu.jit", "cpu.launch", "cpu.mixing", "cpu.narrow", "cpu.pack"),
        *("cpu.pointers", "cpu.reading", "cpu.results", "cpu.rows", "cpu.score", "cpu.simd", "cpu.softmax"),
        *("cpu.splits", "cpu.stored", "cpu.target", "cpu.tuples", "cpu.workers", "block_mask", "storage"),
    },
    "cpu.decode_weight": {
        *("cpu.decode", "cpu.dots", "cpu.jit", "cpu.launch", "cpu.narrow", "cpu.pack", "cpu.pointers", "cpu.reading"),
        *("cpu.results", "cpu.rows", "cpu.score", "cpu.simd", "cpu.softmax", "cpu.splits", "cpu.stored", "cpu.target"),
        *("cpu.tuples", "cpu.workers", "block_mask"),
    },
    "cpu.call": {
        "cpu.blocks",
        "cpu.launch",
        "cpu.narrow",
        "cpu.score",
        "cpu.user_functions",
        "kept",
        "problem",
        "random",
    },
    "cpu.attention": {
        *("cpu.call", "cpu.decode", "cpu.decode_weight", "cpu.forward", "cpu.key_weight", "cpu.narrow", "cpu.plan"),
        *("cpu.score", "cpu.target", "cpu.workers", "checks", "problem", "repeats", "storage", "threads"),
    },
    "cpu.gradient_tiles": {
        *("cpu.blocks", "cpu.elementary", "cpu.emits", "cpu.plan", "cpu.products", "cpu.simd", "cpu.softmax"),
        "cpu.tiles",
    },
    "cpu.score_gradients": {
        *("cpu.blocks", "cpu.dropout", "cpu.edges", "cpu.gradient_tiles", "cpu.jit", "cpu.narrow", "cpu.pack"),
        *("cpu.pointers", "cpu.score", "cpu.tiles", "cpu.user_functions", "cpu.visible", "block_mask"),
    },
    "cpu.gradient_tasks": {"cpu.plan", "cpu.score", "cpu.target"},
    "cpu.bias_gradient": {
        *("cpu.gradient_tasks", "cpu.gradient_tiles", "cpu.jit", "cpu.pointers", "cpu.score", "cpu.visible"),
    },
    "cpu.backward": {
        *("cpu.bias_gradient", "cpu.edges", "cpu.gradient_tasks", "cpu.gradient_tiles", "cpu.jit", "cpu.launch"),
        *("cpu.narrow", "cpu.pack", "cpu.pointers", "cpu.results", "cpu.score", "cpu.score_gradients", "cpu.simd"),
        *("cpu.stored", "cpu.target", "cpu.tuples", "cpu.visible", "cpu.workers", "block_mask"),
    },
    "cpu.gradients": {
        *("cpu.attention", "cpu.backward", "cpu.bias_gradient", "cpu.blocks", "cpu.call", "cpu.gradient_tasks"),
        *("cpu.launch", "cpu.narrow"),
        *("cpu.score_gradients", "gradient_problem", "problem", "threads"),
    },
    "cpu.inside": {
        *("cpu.blocks", "cpu.decode", "cpu.forward", "cpu.jit", "cpu.narrow", "cpu.plan", "cpu.score", "cpu.splits"),
        "cpu.target",
    },
    "overloads": {"api", "cpu.inside", "cpu.jit", "masks"},  # the kernels when it is called in compiled code
    "cuda.elements": {"cuda.arguments", "storage"},
    "cuda.philox": {"cuda.elements", "random"},
    "cuda.scores": {"block_mask", "cuda.arguments", "cuda.elements"},
    "cuda.simt": {"cuda.arguments", "cuda.elements", "cuda.philox", "cuda.scores"},
    "cuda.key_weight": {"cuda.arguments", "cuda.scores"},
    "cuda.simulator": {"cuda.arguments"},
    "cuda.placed": {"checks", "cuda.arguments"},
    "cuda.user_functions": {"checks", "cuda.launch"},  # the latter for memory, when an array is captured
    "cuda.launch": {"cuda.arguments", "cuda.compile", "cuda.devices", "cuda.user_functions"},
    "cuda.replay": {"cuda.devices", "cuda.launch"},
    "cuda.portable": {
        *("cuda.arguments", "cuda.key_weight", "cuda.placed", "cuda.scores", "cuda.simt", "checks", "problem"),
        "random",
    },
    "cuda.attention": {
        *("cuda.devices", "cuda.launch", "cuda.placed", "cuda.portable", "cuda.replay", "cuda.simulator"),
        *("cuda.tensorcore", "device_array", "problem", "repeats"),
    },
    # These load no Numba: kernels get what they are written in, and `cuda.compile` looks that up.
    "cuda.products": {"cuda.shared_tiles"},
    "cuda.tile_scores": {"cuda.row_results", "random"},
    "cuda.flash_results": {"cuda.row_results", "cuda.shared_tiles"},
    "cuda.flash": {
        *("cuda.flash_results", "cuda.products", "cuda.row_results", "cuda.tile_scores", "cuda.sequences"),
        "cuda.shared_tiles",
    },
    "cuda.combine": {"cuda.flash_results", "cuda.row_results", "cuda.sequences"},
    "cuda.tensorcore": {
        *("cuda.combine", "cuda.flash", "cuda.flash_results", "cuda.row_results", "cuda.sequences"),
        *("checks", "problem", "random"),
    },
}
WITHOUT_NUMBA = {
    name for name in MODULES if not name.startswith("cpu") and name not in ("cuda.ptx", "overloads", "threads")
}


def imports(path: Path, everywhere: bool) -> set[str]:
    """Modules that a file imports when it is loaded, or anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else iter(_loaded(tree.body))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _loaded(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements that run when a module is loaded, without those for type checkers."""
    found = []
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found.append(node)
        if isinstance(node, ast.If | ast.Try | ast.With):
            found += _loaded(node.body)
    return found


def test_import_direction() -> None:
    assert set(MAY_IMPORT) <= set(MODULES)
    for name, path in MODULES.items():
        ours = {
            module.removeprefix("numba_attn.")
            for module in imports(path, everywhere=True)
            if module.startswith("numba_attn.")
        } & set(MODULES) - {"commands", "cpu", "cuda"}  # empty packages
        assert ours <= MAY_IMPORT.get(name, set()), f"{name} must not import {ours - MAY_IMPORT.get(name, set())}"


def test_semantics_know_nothing_of_numba() -> None:
    for name in WITHOUT_NUMBA:
        loaded = imports(MODULES[name], everywhere=False)
        assert not any(module.split(".")[0] in ("numba", "llvmlite") for module in loaded), name


def test_import_is_light(python: Callable[..., str]) -> None:
    """The package, and the reference, load neither Numba nor anything optional."""
    loaded = python(
        "import sys, numba_attn, numpy as np\n"
        "before = set(sys.modules)\n"
        "x = np.ones((2, 3))\n"
        "numba_attn.scaled_dot_product_attention(x, x, x, backend='reference')\n"
        "numba_attn.and_masks(numba_attn.block_mask.causal), numba_attn.onnx, numba_attn.rotary\n"
        "numba_attn.merge_attention([x], [x[:, 0]])\n"
        "layer = numba_attn.MultiHeadAttention.init(np.random.default_rng(0), 4, 2)\n"
        "layer(np.ones((2, 4), np.float32), backend='reference')\n"
        "numba_attn.plot, numba_attn.diagnose(x, x, x, backend='reference')\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    ).split()
    optional = {"torch", "jax", "cupy", "onnx", "onnxruntime", "dask", "matplotlib", "ml_dtypes"}
    assert not {"numba", "llvmlite", *optional} & set(loaded)


def test_import_time(python: Callable[..., str]) -> None:
    """Modules that importing the package adds to NumPy's: the time of each is negligible if they are its own."""
    added = python(
        "import sys, numpy; before = set(sys.modules); import numba_attn; print(*(set(sys.modules) - before))"
    ).split()
    assert set(added) <= {"__future__", "numba_attn"}


def test_public_names() -> None:
    """What is public comes on first use, and nothing else does."""
    assert all(getattr(numba_attn, name).__module__.startswith("numba_attn.") for name in numba_attn.__all__)
    modules = {"block_mask", "diagnostics", "onnx", "plot", "rotary", "threads"}
    assert {*numba_attn.__all__, *modules} <= set(dir(numba_attn))
    with pytest.raises(AttributeError, match="no attribute 'attention'"):
        _ = numba_attn.attention


def test_importing_the_command_line_is_cheap(python: Callable[..., str]) -> None:
    loaded = python("import sys, numba_attn.cli; print({'numpy', 'numba'} & set(sys.modules))")
    assert loaded.strip() == "set()"


def test_without_the_compiler(python: Callable[..., str]) -> None:
    script = """
import numpy as np, numba_attn
x = np.ones((2, 3))
numba_attn.scaled_dot_product_attention(x, x, x, backend="reference")
try:
    numba_attn.scaled_dot_product_attention(x, x, x)
except NotImplementedError as error:
    print(error)
"""
    assert "NUMBA_DISABLE_JIT" in python(script, NUMBA_DISABLE_JIT="1")


def test_info_without_numba(python: Callable[..., str]) -> None:
    code = "import sys; sys.modules['numba'] = None; from numba_attn.cli import main; main(['info', '--json'])"
    info = json.loads(python(code))
    assert info["kernels"] is None
    assert not info["backends"]["cpu"]["available"] and "numba" in info["backends"]["cpu"]["reason"]
    assert info["backends"]["reference"]["available"]


def test_names_of_the_command_line_are_those_of_the_interface() -> None:
    call = inspect.signature(numba_attn.scaled_dot_product_attention).parameters
    assert set(cli.ARRAYS) <= set(call)
    assert cli.AUX_NAMES == problem.AUX_NAMES == problem.Aux._fields


def test_examples_of_the_readme(python: Callable[..., str]) -> None:
    """They run one after the other, and print what is said."""
    for package in ("ml_dtypes", "onnx"):
        pytest.importorskip(package)
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    printed = python("".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)))
    assert f"```text\n{printed}```" in text


@pytest.mark.parametrize("path", USERS, ids=lambda path: path.name)
def test_what_benchmarks_and_examples_import_is_there(path: Path) -> None:
    """Most benchmarks are not run by tests: they need other libraries, or a GPU."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numba_attn":
            exec(ast.unparse(node), {})


def test_no_prints() -> None:
    for name, path in MODULES.items():
        if name != "cli" and not name.startswith("commands."):
            calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
            assert not any(isinstance(n.func, ast.Name) and n.func.id == "print" for n in calls), name
