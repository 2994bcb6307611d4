"""The vocabulary of the tensor-core kernels: instructions of PTX as functions that Numba compiles in line.

Kernels take this module as `ops`; the tests put a model of each instruction in NumPy in its place.  Integers are signed
throughout, as Numba makes floating-point numbers of signed and unsigned ones together; addresses in shared memory have
32 bits, all others 64.  Fragments and accumulators are one-dimensional arrays that a thread has for itself, in which an
instruction reads and writes consecutive elements: once loops over them are unrolled, they are registers.

NVIDIA, "Parallel Thread Execution ISA".
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

i16, i32, i64, u8 = types.int16, types.int32, types.int64, types.uint8
f32, f64 = types.float32, types.float64

Types = tuple[Any, ...]
_CONSTRAINTS = {i16: "h", i32: "r", i64: "l", f32: "f", f64: "d"}
_LLVM = {i16: ir.IntType(16), i32: ir.IntType(32), i64: ir.IntType(64), f32: ir.FloatType(), f64: ir.DoubleType()}


def _assemble(
    builder: Any, asm: str, outputs: Types, inputs: Types, values: list[Any], memory: bool, warp: bool
) -> list[Any]:
    """Call `asm`, whose operands are numbered outputs first; returns the values of its outputs."""
    constraints = [*("=" + _CONSTRAINTS[t] for t in outputs), *(_CONSTRAINTS[t] for t in inputs)]
    if memory:
        constraints.append("~{memory}")
    results = [_LLVM[t] for t in outputs]
    result = {0: ir.VoidType(), 1: results[0] if results else None}.get(len(results)) or ir.LiteralStructType(results)
    kind = ir.FunctionType(result, [_LLVM[t] for t in inputs])
    code = ir.InlineAsm(kind, asm, ",".join(constraints), side_effect=memory or not outputs)
    # Convergent: all lanes of the warp execute it together, so it must not move into a branch.  Arithmetic that nobody
    # uses is left out; that of addresses is done again in every turn of a loop, which takes fewer registers.
    attributes = {"convergent"} if warp else set()
    if not memory and f32 in outputs:
        attributes |= {"readnone", "nounwind"}
    called = builder.call(code, values, attrs=attributes)
    if len(results) < 2:
        return [called] if results else []
    return [builder.extract_value(called, n) for n in range(len(results))]


def instruction(asm: str, outputs: Types, inputs: Types, memory: bool = False, warp: bool = False) -> Any:
    """A function of scalars, cast to the types of `inputs`, that gives one scalar or nothing.

    `memory`: reads or writes memory, or has to stay where it is for another reason; `warp`: of all lanes together.
    """
    result = outputs[0] if outputs else types.void

    def codegen(context: Any, builder: Any, signature: Any, arguments: Types) -> Any:
        values = _assemble(builder, asm, outputs, inputs, list(arguments), memory, warp)
        return values[0] if values else context.get_dummy_value()

    names = ", ".join(f"x{n}" for n in range(len(inputs)))
    scope: dict[str, Any] = {"signature": result(*inputs), "codegen": codegen}
    # Numba reads the number of arguments off the function.
    exec(f"def typed(context, {names}):\n    return signature, codegen\n", scope)
    return intrinsic(scope["typed"])


def _elements(context: Any, builder: Any, kind: Any, array: Any, first: Any, count: int) -> list[Any]:
    """Pointers to consecutive elements of a thread's own array."""
    data = context.make_array(kind)(context, builder, array).data
    index = ir.IntType(64)
    return [builder.gep(data, [builder.add(first, ir.Constant(index, n))]) for n in range(count)]


def _list(first: int, count: int) -> str:
    return "{" + ", ".join(f"${n}" for n in range(first, first + count)) + "}"


# Shared memory --------------------------------------------------------------------------------------------------------


@intrinsic
def shared_address(context, array):
    """Where an array in shared memory begins, in its own address space."""

    def codegen(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(builder.addrspacecast(data, data.type.pointee.as_pointer(3)), ir.IntType(32))

    return i32(array), codegen


# Sixteen bytes from global memory to shared memory, without waiting: the first so many of them, zeros for the rest.
copy_16 = instruction(
    "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p cp.async.cg.shared.global [$1], [$2], 16, $3; }",
    (), (i32, i32, i64, i32), memory=True,
)  # fmt: skip
commit_copies = instruction("cp.async.commit_group;", (), (), memory=True)
wait_for_all_copies = instruction("cp.async.wait_group 0;", (), (), memory=True)
wait_for_all_but_last = instruction("cp.async.wait_group 1;", (), (), memory=True)

store_shared_i32 = instruction(
    "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p st.shared.b32 [$1], $2; }", (), (i32, i32, i32), memory=True
)  # if the first is true
store_shared_i64 = instruction(
    "{ .reg .pred p; setp.ne.s32 p, $0, 0; @p st.shared.b64 [$1], $2; }", (), (i32, i32, i64), memory=True
)  # likewise
store_shared_f32 = instruction("st.shared.f32 [$0], $1;", (), (i32, f32), memory=True)
store_shared_f32x2 = instruction("st.shared.v2.f32 [$0], {$1, $2};", (), (i32, f32, f32), memory=True)
load_shared_i32 = instruction("ld.shared.b32 $0, [$1];", (i32,), (i32,), memory=True)
load_shared_i64 = instruction("ld.shared.b64 $0, [$1];", (i64,), (i32,), memory=True)
load_alike_i32, load_alike_i64 = load_shared_i32, load_shared_i64  # from one place for all threads of a block
load_shared_f32 = instruction("ld.shared.f32 $0, [$1];", (f32,), (i32,), memory=True)


def _load_4(asm: str) -> Any:
    """A procedure (fragment, first, address) that loads four registers, by all lanes together."""

    @intrinsic
    def load(context, fragment, first, address):
        def codegen(context, builder, signature, arguments):
            places = _elements(context, builder, signature.args[0], arguments[0], arguments[1], 4)
            for place, value in zip(
                places, _assemble(builder, asm, (i32,) * 4, (i32,), [arguments[2]], True, True), strict=True
            ):
                builder.store(value, place)
            return context.get_dummy_value()

        return types.void(fragment, i64, i32), codegen

    return load


@intrinsic
def load_shared_16(context, fragment, first, condition, address):
    """Four registers, or zeros."""
    asm = (
        "{ .reg .pred p; setp.ne.s32 p, $4, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
        "@p ld.shared.v4.b32 {$0, $1, $2, $3}, [$5]; }"
    )

    def codegen(context, builder, signature, arguments):
        places = _elements(context, builder, signature.args[0], arguments[0], arguments[1], 4)
        values = _assemble(builder, asm, (i32,) * 4, (i32, i32), list(arguments[2:]), True, False)
        for place, value in zip(places, values, strict=True):
            builder.store(value, place)
        return context.get_dummy_value()

    return types.void(fragment, i64, i32, i32), codegen


# Four matrices of 8 x 8 elements of 16 bits; lane 8 m + r says where row r of matrix m is.
load_matrices = _load_4("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];")
load_transposed = _load_4("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];")


# Products -------------------------------------------------------------------------------------------------------------


def _multiply(kind: str) -> Any:
    """A function (c, first_c, a, first_a, b0, b1) for c += a b: 16 x 8 by 16 x 16 and 16 x 8, spread over a warp."""
    asm = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        f"{_list(0, 4)}, {_list(4, 4)}, {_list(8, 2)}, {_list(10, 4)};"
    )

    @intrinsic
    def multiply(context, c, first_c, a, first_a, b0, b1):
        def codegen(context, builder, signature, arguments):
            sums = _elements(context, builder, signature.args[0], arguments[0], arguments[1], 4)
            left = _elements(context, builder, signature.args[2], arguments[2], arguments[3], 4)
            operands = [*map(builder.load, left), *arguments[4:], *map(builder.load, sums)]
            inputs = (i32,) * 6 + (f32,) * 4
            for place, value in zip(
                sums, _assemble(builder, asm, (f32,) * 4, inputs, operands, False, True), strict=True
            ):
                builder.store(value, place)
            return context.get_dummy_value()

        return types.void(c, i64, a, i64, i32, i32), codegen

    return multiply


multiply_bfloat16 = _multiply("bf16")
multiply_float16 = _multiply("f16")

# Two numbers rounded to 16 bits in one register, the first in its lower half.
pack_bfloat16 = instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", (i32,), (f32, f32))
pack_float16 = instruction("cvt.rn.f16x2.f32 $0, $2, $1;", (i32,), (f32, f32))

# And back.
lower_bfloat16 = instruction("{ .reg .b32 x; shl.b32 x, $1, 16; mov.b32 $0, x; }", (f32,), (i32,))
upper_bfloat16 = instruction("{ .reg .b32 x; and.b32 x, $1, 0xffff0000; mov.b32 $0, x; }", (f32,), (i32,))
lower_float16 = instruction("{ .reg .b16 x, y; mov.b32 {x, y}, $1; cvt.f32.f16 $0, x; }", (f32,), (i32,))
upper_float16 = instruction("{ .reg .b16 x, y; mov.b32 {x, y}, $1; cvt.f32.f16 $0, y; }", (f32,), (i32,))

# Numbers --------------------------------------------------------------------------------------------------------------

exp2 = instruction("ex2.approx.ftz.f32 $0, $1;", (f32,), (f32,))
log2 = instruction("lg2.approx.ftz.f32 $0, $1;", (f32,), (f32,))
reciprocal = instruction("rcp.approx.ftz.f32 $0, $1;", (f32,), (f32,))
maximum = instruction("max.NaN.f32 $0, $1, $2;", (f32,), (f32, f32))  # NaN if either is
larger = instruction("max.f32 $0, $1, $2;", (f32,), (f32, f32))  # the number if one of them is NaN
# One rounding, or one each: the same in whatever kernel it is used, whatever a compiler would join.
multiply_add = instruction("fma.rn.f32 $0, $1, $2, $3;", (f32,), (f32, f32, f32))
product = instruction("mul.rn.f32 $0, $1, $2;", (f32,), (f32, f32))
magnitude = instruction("abs.f32 $0, $1;", (f32,), (f32,))
float_of = instruction("cvt.rn.f32.s32 $0, $1;", (f32,), (i32,))

least = instruction("min.s64 $0, $1, $2;", (i64,), (i64, i64))
most = instruction("max.s64 $0, $1, $2;", (i64,), (i64, i64))
quotient = instruction("div.u32 $0, $1, $2;", (i32,), (i32, i32))
# An address so many steps of so many bytes behind another: in one instruction, of which no part is kept for later.
behind = instruction("mad.wide.s32 $0, $2, $3, $1;", (i64,), (i64, i32, i32))
product_low = instruction("mul.lo.u32 $0, $1, $2;", (i32,), (i32, i32))
product_high = instruction("mul.hi.u32 $0, $1, $2;", (i32,), (i32, i32))

# Between lanes of a warp: the value that the lane has whose number differs in these bits; that of a given lane.
exchange_f32 = instruction("shfl.sync.bfly.b32 $0, $1, $2, 31, -1;", (f32,), (f32, i32), warp=True, memory=True)
exchange_i32 = instruction("shfl.sync.bfly.b32 $0, $1, $2, 31, -1;", (i32,), (i32, i32), warp=True, memory=True)
value_of_lane = instruction("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", (f32,), (f32, i32), warp=True, memory=True)
bits_of_lane = instruction("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", (i32,), (i32, i32), warp=True, memory=True)
sync_warp = instruction("bar.warp.sync -1;", (), (), warp=True, memory=True)

# Global memory --------------------------------------------------------------------------------------------------------

load_i64 = instruction("ld.global.b64 $0, [$1];", (i64,), (i64,), memory=True)


def _load_if(load: str, kind: str, convert: str = "$0, x") -> Any:
    """A function (condition, address, otherwise) that gives a float32 number."""
    return instruction(
        f"{{ .reg .pred p; .reg .{kind} x; setp.ne.s32 p, $1, 0; mov.f32 $0, $3; "
        f"@p ld.global.{load} x, [$2]; @p {convert}; }}",
        (f32,), (i32, i64, f32), memory=True,
    )  # fmt: skip


load_f32 = _load_if("f32", "f32", "mov.f32 $0, x")
load_float32 = load_f32
load_float64 = _load_if("f64", "f64", "cvt.rn.f32.f64 $0, x")
load_float16 = _load_if("b16", "b16", "cvt.f32.f16 $0, x")
load_bfloat16 = _load_if("u16", "u32", "shl.b32 x, x, 16; @p mov.b32 $0, x")
load_bool = _load_if("u8", "u32", "cvt.rn.f32.u32 $0, x")


def _store_if(store: str, *values: Any) -> Any:
    """A procedure (condition, address, values)."""
    given = "$2" if len(values) == 1 else _list(2, len(values))
    return instruction(
        f"{{ .reg .pred p; setp.ne.s32 p, $0, 0; @p st.global.{store} [$1], {given}; }}",
        (), (i32, i64, *values), memory=True,
    )  # fmt: skip


store_f32 = _store_if("f32", f32)
store_f32x2 = _store_if("v2.f32", f32, f32)
store_16 = _store_if("v4.b32", i32, i32, i32, i32)
store_i16 = _store_if("b16", i16)
