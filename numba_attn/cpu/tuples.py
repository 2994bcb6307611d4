"""Named tuples by their address, in compiled code.

Numba passes a tuple as all that it is made of, and an array as a dozen numbers: the arrays of a call are two hundred
arguments, which each function that gets them puts together, and takes apart again.  That was a quarter of the code of a
kernel, and of what LLVM has to do for it.  By its address a tuple is one argument, whose fields are read where they are
used, as they are of the tuple itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model

from numba_attn.cpu.simd import Value


class Addressed(types.Type):
    """A named tuple that stays where it is, and as it is, as long as its address is used."""

    def __init__(self, of: types.BaseNamedTuple) -> None:
        self.of = of
        super().__init__(name=f"address of {of}")

    @property
    def key(self) -> types.Type:
        return self.of  # another one with as many fields may have the same name


def by_address(kind: types.Type) -> types.Type:
    """How an argument of some kind is passed, if not as Numba would."""
    return Addressed(kind) if isinstance(kind, types.BaseNamedTuple) else kind


@intrinsic
def addressed(context: Any, x: types.BaseNamedTuple) -> Any:
    """A named tuple by its address, until the function returns that asks for it, or comes by here again."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Value]) -> Value:
        place = cgutils.alloca_once(builder, values[0].type)
        builder.store(values[0], place)
        return place

    return Addressed(x)(x), codegen


@register_model(Addressed)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Addressed) -> None:
        super().__init__(manager, kind, manager.lookup(kind.of).get_value_type().as_pointer())


@infer_getattr
class _Fields(AttributeTemplate):
    key = Addressed

    def generic_resolve(self, kind: Addressed, name: str) -> types.Type | None:
        return kind.of.types[kind.of.fields.index(name)] if name in kind.of.fields else None


@lower_getattr_generic(Addressed)
def _field(context: Any, builder: ir.IRBuilder, kind: Addressed, address: Value, name: str) -> Value:
    return builder.load(cgutils.gep_inbounds(builder, address, 0, kind.of.fields.index(name)))
