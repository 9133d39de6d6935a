"""Parallel loops of Numba code on torch's own threads.

Torch's OpenMP threads wait for work by spinning, and a second pool (Numba's ``prange`` on any of its layers) has to win
the cores back from them after every matrix product; its own threads, if they spin too, then hold up the next one. So
the loops here are run by the OpenMP runtime that torch itself is linked with, through its GCC entry point. That also
makes ``torch.set_num_threads`` hold for them, needs no lock between callers, and starts a loop in a few microseconds.
Three matrix products and one attention, in turn, on two busy cores with OMP_WAIT_POLICY=passive: 1.9 ms, against 1.9 to
2.7 ms with Numba's ``omp`` layer and 2.3 to 3.3 ms with ``workqueue``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import structlog
import torch
from llvmlite import ir
from numba.core import cgutils, types

from kernels.cpu_jit import intrinsic

log = structlog.get_logger(__name__)
_cgutils: Any = cgutils
LONG, INT = ir.IntType(64), ir.IntType(32)
SHARES = 4  # a thread takes one part in so many of what is left of a range
LINE_BYTES = 64  # counters are this far apart: two threads that count in one cache line would wait for each other


@cache
def _runtime() -> tuple[int, int]:
    """Addresses of ``GOMP_parallel`` and ``omp_get_thread_num`` in the OpenMP runtime that torch uses; zeros if it has
    none (as on macOS)."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        runtime = ctypes.CDLL(str(library))  # dlsym also looks through what the library depends on
        functions: Any = runtime.GOMP_parallel, runtime.omp_get_thread_num
    except (OSError, AttributeError) as error:
        log.warning("CPU kernels run on one thread: torch has no OpenMP runtime that they can share", why=str(error))
        return 0, 0
    start, number = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return start, number


def team() -> tuple[int, int, int]:
    """What ``parallel_for`` runs on now: the runtime's two functions and the number of threads."""
    start, number = _runtime()
    return start, number, torch.get_num_threads() if start else 1


@intrinsic
def parallel_for(typing: Any, team: Any, work: Any, count: Any, arguments: Any) -> Any:
    """``parallel_for(team, work, count, arguments)``: ``work(i, *arguments)`` for i in 0 .. count - 1, in any order.

    Each thread has a range of its own, of equal size and always the same, so that in the next loop it finds in its
    cache what it left there in the last: cores far apart read each other's caches slower than memory. It takes several
    adjacent indexes at once, fewer and fewer, and when it is through, some of what others have left. ``work`` is a
    jitted function without a result. Its errors go unnoticed; code here raises none.
    """
    call = work.get_call_type(typing, (types.int64, *arguments.types), {})

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        team, _, count, arguments = args
        compiled = work.dispatcher.get_compile_result(call)
        context.active_code_library.add_linking_library(compiled.library)
        unpacked = [
            _borrowed(context, builder, kind, value)
            for kind, value in zip(signature.args[3].types, _cgutils.unpack_tuple(builder, arguments), strict=True)
        ]
        start, number, most_threads = _cgutils.unpack_tuple(builder, team)
        useful = builder.select(builder.icmp_signed("<", most_threads, count), most_threads, count)
        one = ir.Constant(LONG, 1)
        threads = builder.select(builder.icmp_signed(">", useful, one), useful, one)
        counters = builder.alloca(ir.ArrayType(LONG, LINE_BYTES // 8), threads)
        fields = [counters, count, threads, number, *unpacked]
        shared = _cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in fields]))
        for field, value in enumerate(fields):
            builder.store(value, _field(builder, shared, field))
        with _cgutils.for_range(builder, threads) as each:
            builder.store(_range_start(builder, each.index, count, threads), _field(builder, counters, 0, each.index))
        body = _thread_body(context, builder.module, compiled.fndesc, call, shared.type)

        with builder.if_else(builder.icmp_signed(">", threads, one)) as (together, alone):
            with together:
                run_type = ir.FunctionType(ir.VoidType(), [body.type, shared.type, INT, INT])
                run = builder.inttoptr(start, run_type.as_pointer())
                builder.call(run, [body, shared, builder.trunc(threads, INT), ir.Constant(INT, 0)])
            with alone:
                builder.call(body, [shared])
        return context.get_dummy_value()

    return types.void(team, work, types.int64, arguments), generate


def _borrowed(context: Any, builder: ir.IRBuilder, kind: Any, value: ir.Value) -> Any:
    """An argument with its arrays, at any depth of tuples, no longer counted: the caller holds them.

    Numba counts references at every slice of an array, atomically; threads that share an array would do so in turn.
    """
    if isinstance(kind, types.Tuple | types.UniTuple):
        parts = zip(tuple(kind), _cgutils.unpack_tuple(builder, value), strict=True)
        return context.make_tuple(builder, kind, [_borrowed(context, builder, *part) for part in parts])
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = ir.Constant(array.meminfo.type, None)
        array.parent = ir.Constant(array.parent.type, None)
        return array._getvalue()
    return value


def _field(builder: ir.IRBuilder, base: ir.Value, index: int, element: ir.Value | None = None) -> ir.Value:
    return builder.gep(base, [element or ir.Constant(LONG, 0), ir.Constant(INT, index)], inbounds=True)


def _range_start(builder: ir.IRBuilder, thread: ir.Value, count: ir.Value, threads: ir.Value) -> ir.Value:
    return builder.sdiv(builder.mul(count, thread), threads)


def _thread_body(context: Any, module: ir.Module, work: Any, call: Any, shared_type: ir.Type) -> ir.Function:
    """What each thread runs: takes indexes from its own range, then from the others', until there are none left."""
    name = module.get_unique_name(f"{work.mangled_name}.thread_body")
    body = ir.Function(module, ir.FunctionType(ir.VoidType(), [shared_type]), name)
    body.linkage = "internal"
    builder = ir.IRBuilder(body.append_basic_block("entry"))
    [shared] = body.args
    counters, count, threads, number, *arguments = (
        builder.load(_field(builder, shared, field)) for field in range(len(shared_type.pointee.elements))
    )
    zero, one = ir.Constant(LONG, 0), ir.Constant(LONG, 1)
    visit, take, claim, run, leave, end = (
        body.append_basic_block(label) for label in ("visit", "take", "claim", "run", "leave", "end")
    )
    own = _cgutils.alloca_once_value(builder, zero)
    with builder.if_then(builder.icmp_signed(">", threads, one)):
        call_number = builder.inttoptr(number, ir.FunctionType(INT, []).as_pointer())
        builder.store(builder.zext(builder.call(call_number, []), LONG), own)
    mine, entered = builder.load(own), builder.block
    builder.branch(visit)

    builder.position_at_end(visit)
    visited = builder.phi(LONG)
    visited.add_incoming(zero, entered)
    owner = builder.srem(builder.add(mine, visited), threads)
    counter = _field(builder, counters, 0, owner)
    range_end = _range_start(builder, builder.add(owner, one), count, threads)
    builder.branch(take)

    builder.position_at_end(take)
    first = builder.load_atomic(counter, "monotonic", 8)
    left = builder.sub(range_end, first)
    builder.cbranch(builder.icmp_signed(">", left, zero), claim, leave)

    builder.position_at_end(claim)
    some = builder.sdiv(left, ir.Constant(LONG, SHARES))
    stop = builder.add(first, builder.select(builder.icmp_signed(">", some, one), some, one))
    claimed = builder.cmpxchg(counter, first, stop, "monotonic")
    builder.cbranch(builder.extract_value(claimed, 1), run, take)

    builder.position_at_end(run)
    index = builder.phi(LONG)
    index.add_incoming(first, claim)
    context.call_internal_no_propagate(builder, work, call, [index, *arguments])
    following = builder.add(index, one)
    index.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, stop), run, take)

    builder.position_at_end(leave)
    so_far = builder.add(visited, one)
    visited.add_incoming(so_far, leave)
    builder.cbranch(builder.icmp_signed("<", so_far, threads), visit, end)

    builder.position_at_end(end)
    builder.ret_void()
    return body
