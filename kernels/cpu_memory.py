"""Arrays at memory addresses, for Numba code: ``load_f16(address, index)`` and so on.

Addresses and indexes are int64 (the latter in elements), numbers come and go as float32, codes as int32.
Arenas are addressed by the byte because blocks of all formats lie in one arena; half and bfloat16 are types that Numba
lacks and LLVM has. Nothing needs alignment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from kernels.cpu_jit import intrinsic

F32, F16, BF16, INT8, INT4, INT2, FP8 = range(7)
"""How a block's numbers are kept: Format, with raw split up by the model's dtype."""

BYTE, SHORT, INT = ir.IntType(8), ir.IntType(16), ir.IntType(32)
HALF, FLOAT = ir.HalfType(), ir.FloatType()

Convert = Callable[[ir.IRBuilder, ir.Value], ir.Value]


def _element(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, element: ir.Type) -> ir.Value:
    """A pointer to one of an array's elements; LLVM sees that neighbours are adjacent, and can use vectors."""
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index], source_etype=element)


def _loader(stored: ir.Type, result: Any, convert: Convert) -> Any:
    @intrinsic
    def load(typing: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            return convert(builder, builder.load(_element(builder, args[0], args[1], stored), align=1))

        return result(types.int64, types.int64), generate

    return load


def _storer(stored: ir.Type, argument: Any, convert: Convert) -> Any:
    @intrinsic
    def store(typing: Any, address: Any, index: Any, number: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            builder.store(convert(builder, args[2]), _element(builder, args[0], args[1], stored), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, argument), generate

    return store


def _widen_bfloat(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    return builder.bitcast(builder.shl(builder.zext(bits, INT), ir.Constant(INT, 16)), FLOAT)


def _narrow_bfloat(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    """Rounds to nearest, ties to even, as torch does; NaN becomes torch's NaN (0x7FC0)."""
    bits = builder.bitcast(number, INT)
    odd = builder.and_(builder.lshr(bits, ir.Constant(INT, 16)), ir.Constant(INT, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, ir.Constant(INT, 0x7FFF))), ir.Constant(INT, 16))
    is_nan = builder.fcmp_unordered("uno", number, number)
    return builder.trunc(builder.select(is_nan, ir.Constant(INT, 0x7FC0), rounded), SHORT)


load_f32 = _loader(FLOAT, types.float32, lambda builder, x: x)
load_f16 = _loader(HALF, types.float32, lambda builder, x: builder.fpext(x, FLOAT))
load_bf16 = _loader(SHORT, types.float32, _widen_bfloat)
load_u8 = _loader(BYTE, types.int32, lambda builder, x: builder.zext(x, INT))
store_f32 = _storer(FLOAT, types.float32, lambda builder, x: x)
store_f16 = _storer(HALF, types.float32, lambda builder, x: builder.fptrunc(x, HALF))
store_bf16 = _storer(SHORT, types.float32, _narrow_bfloat)
store_u8 = _storer(BYTE, types.int32, lambda builder, x: builder.trunc(x, BYTE))


@intrinsic
def copy_bytes(typing: Any, into: Any, source: Any, count: Any) -> Any:
    """``copy_bytes(into, source, count)``: memcpy between addresses that do not overlap."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = BYTE.as_pointer()
        copy = builder.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, ir.IntType(64)])
        into, source = (builder.inttoptr(address, pointer) for address in args[:2])
        builder.call(copy, [into, source, args[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def half_of(typing: Any, number: Any) -> Any:
    """The bits of a float32 rounded to the nearest float16, as int32."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.zext(builder.bitcast(builder.fptrunc(args[0], HALF), SHORT), INT)

    return types.int32(types.float32), generate


@intrinsic
def float_of_half(typing: Any, bits: Any) -> Any:
    """The float32 equal to the float16 with these bits."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.fpext(builder.bitcast(builder.trunc(args[0], SHORT), HALF), FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def float_of(typing: Any, bits: Any) -> Any:
    """The float32 with the bits of an int32."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(args[0], FLOAT)


@intrinsic
def bits_of(typing: Any, number: Any) -> Any:
    """The bits of a float32, as int32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(args[0], INT)
