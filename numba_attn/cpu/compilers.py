"""Numba's compiler as kernels need it: many functions that are only ever parts of a few entry points.

Numba would optimise, link and make machine code of each function by itself, and then of each with all that it calls;
and give each an entry from Python.  Here that is done for kernels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, ClassVar

from llvmlite.binding import Linkage
from numba import types
from numba.core import compiler, typed_passes, untyped_passes
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_machinery import PassManager

# Those of Numba's passes that loops over numbers, tuples and pointers need; the others look for closures, `with`,
# arrays in expressions and the like, a twentieth of the time.
_PASSES = [
    untyped_passes.TranslateByteCode,
    untyped_passes.FixupArgs,
    untyped_passes.IRProcessing,
    untyped_passes.RewriteSemanticConstants,
    untyped_passes.DeadBranchPrune,
    untyped_passes.GenericRewrites,
    untyped_passes.ReconstructSSA,
    typed_passes.NopythonTypeInference,
    typed_passes.PreLowerStripPhis,
    typed_passes.IRLegalization,
    typed_passes.AnnotateTypes,
    typed_passes.NativeLowering,
    typed_passes.NoPythonBackend,
]


class _Own(JITCodeLibrary):
    """Code that is not optimised function by function, but with all that it calls."""

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _link(self, module: Any) -> None:
        """Link the libraries of all that it calls: each once, after one that calls it, or LLVM would leave it out."""
        linked, todo = set(), list(self._linking_libraries)
        for library in todo:  # which grows meanwhile
            if library in linked:
                continue
            linked.add(library)
            self._reload_init.update(library._reload_init)
            if isinstance(library, _Part):
                todo += library._linking_libraries
                module.link_in(library._final_module, preserve=True)
            else:
                module.link_in(library._get_module_for_linking(), preserve=True)


class _Part(_Own):
    """The code of a function that is only ever part of others: linked, optimised, and made machine code, with them."""

    _shared_module: Any

    def finalize(self) -> None:
        for function in self._final_module.functions:
            if function.linkage == Linkage.external and not function.is_declaration:
                function.linkage = "linkonce_odr"
        self._finalized = True

    def _get_module_for_linking(self) -> Any:
        """What other code of Numba's takes: with all that is called."""
        if self._shared_module is None:
            self._shared_module = self._final_module.clone()
            self._link(self._shared_module)
        return self._shared_module


class _Whole(_Own):
    """The code of a kernel: optimised once, where Numba does so twice, for counts of references that there are none of;
    and not verified again, as its parts are.
    """

    def finalize(self) -> None:
        self._link(self._final_module)
        passes, builder = self._codegen._module_pass_manager()
        passes.run(self._final_module, builder)
        self._finalize_final_module()


class _Typing:
    """A typing context that remembers what Python's own functions make of numbers.

    Each is asked for a hundred times in a kernel, and looked for among all that it may be of arrays.
    """

    _found: ClassVar[dict[tuple[Any, tuple[types.Type, ...]], Any]] = {}

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def resolve_function_type(self, function: Any, args: tuple[types.Type, ...], kws: dict[str, types.Type]) -> Any:
        module = getattr(getattr(function, "typing_key", None), "__module__", None)
        of_numbers = not kws and all(isinstance(x, (types.Number, types.Boolean)) for x in args)
        if module not in ("_operator", "builtins") or not of_numbers:
            return self._context.resolve_function_type(function, args, kws)
        key = function, tuple(args)
        if key not in self._found:
            self._found[key] = self._context.resolve_function_type(function, args, kws)
        return self._found[key]


class _OwnPasses(compiler.CompilerBase):
    """Numba's compiler, without the half of its passes that have nothing to do in loops over numbers and tuples."""

    def __init__(self, typing_context: Any, *others: Any) -> None:
        super().__init__(_Typing(typing_context), *others)

    def define_pipelines(self) -> list[PassManager]:
        passes = PassManager("numba_attn")
        for each in _PASSES:
            passes.add_pass(each, each._name)
        passes.finalize()
        return [passes]


class KernelCompiler(_OwnPasses):
    """Makes a `_Whole`."""

    def compile_extra(self, function: Callable[..., Any]) -> Any:
        self.state.library = _Whole(self.state.targetctx.codegen(), function.__qualname__)
        self.state.library.enable_object_caching()
        return super().compile_extra(function)


def _nothing() -> Generator[None]:
    yield


class PartCompiler(_OwnPasses):
    """Makes a `_Part`, without what is for calls from Python: a third of the time that a kernel takes to compile."""

    def compile_extra(self, function: Callable[..., Any]) -> Any:
        self.state.library = _Part(self.state.targetctx.codegen(), function.__qualname__)
        flags = self.state.flags
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        result = super().compile_extra(function)
        # Numba knows a function by its entry from Python: a builtin of its own, which raises if it is called.
        result = result._replace(entry_point=_nothing().throw)
        self.state.targetctx.insert_user_function(result.entry_point, result.fndesc, [result.library])
        return result


class CountingPartCompiler(PartCompiler):
    """The same with all of Numba's passes."""

    define_pipelines = compiler.Compiler.define_pipelines
