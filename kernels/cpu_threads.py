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
SHARES = 2  # a thread takes one part in this many of what each has left to do


@cache
def _runtime() -> int:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch uses; 0 if it has none (as on macOS)."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        start: Any = ctypes.CDLL(str(library)).GOMP_parallel  # dlsym also looks through what the library depends on
    except (OSError, AttributeError) as error:
        log.warning("CPU kernels run on one thread: torch has no OpenMP runtime that they can share", why=str(error))
        return 0
    return ctypes.cast(start, ctypes.c_void_p).value or 0


def team() -> tuple[int, int]:
    """What ``parallel_for`` runs on now: the runtime's address and the number of threads."""
    start = _runtime()
    return start, torch.get_num_threads() if start else 1


@intrinsic
def parallel_for(typing: Any, team: Any, work: Any, count: Any, arguments: Any) -> Any:
    """``parallel_for(team, work, count, arguments)``: ``work(i, *arguments)`` for i in 0 .. count - 1, in any order.

    A thread takes several adjacent indexes at once, fewer and fewer towards the end, so that it can reckon with
    what comes next, and uneven work is still shared evenly. ``work`` is a jitted function without a result. Its errors
    go unnoticed; code here raises none.
    """
    call = work.get_call_type(typing, (types.int64, *arguments.types), {})

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        team, _, count, arguments = args
        compiled = work.dispatcher.get_compile_result(call)
        context.active_code_library.add_linking_library(compiled.library)
        unpacked = _cgutils.unpack_tuple(builder, arguments)
        start, threads = _cgutils.unpack_tuple(builder, team)
        fields = [ir.Constant(LONG, 0), count, threads, *unpacked]  # the first is the next index
        shared = _cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in fields]))
        for field, value in enumerate(fields):
            builder.store(value, _field(builder, shared, field))
        body = _thread_body(context, builder.module, compiled.fndesc, call, shared.type)

        several = builder.and_(*(builder.icmp_signed(">", n, ir.Constant(LONG, 1)) for n in (threads, count)))
        with builder.if_else(several) as (together, alone):
            with together:
                run_type = ir.FunctionType(ir.VoidType(), [body.type, shared.type, INT, INT])
                run = builder.inttoptr(start, run_type.as_pointer())
                fewer = builder.select(builder.icmp_signed("<", threads, count), threads, count)
                builder.call(run, [body, shared, builder.trunc(fewer, INT), ir.Constant(INT, 0)])
            with alone:
                builder.call(body, [shared])
        return context.get_dummy_value()

    return types.void(team, work, types.int64, arguments), generate


def _field(builder: ir.IRBuilder, struct: ir.Value, index: int) -> ir.Value:
    return builder.gep(struct, [ir.Constant(INT, 0), ir.Constant(INT, index)], inbounds=True)


def _thread_body(context: Any, module: ir.Module, work: Any, call: Any, shared_type: ir.Type) -> ir.Function:
    """What each thread runs: takes indexes from the shared struct until there are none left."""
    name = module.get_unique_name(f"{work.mangled_name}.thread_body")
    body = ir.Function(module, ir.FunctionType(ir.VoidType(), [shared_type]), name)
    body.linkage = "internal"
    builder = ir.IRBuilder(body.append_basic_block("entry"))
    [shared] = body.args
    count, threads, *arguments = (
        builder.load(_field(builder, shared, field)) for field in range(1, len(shared_type.pointee.elements))
    )
    one, next_index = ir.Constant(LONG, 1), _field(builder, shared, 0)
    take, claim, run, end = (body.append_basic_block(label) for label in ("take", "claim", "run", "end"))
    builder.branch(take)

    builder.position_at_end(take)
    first = builder.load_atomic(next_index, "monotonic", 8)
    left = builder.sub(count, first)
    builder.cbranch(builder.icmp_signed(">", left, ir.Constant(LONG, 0)), claim, end)

    builder.position_at_end(claim)
    fair = builder.sdiv(left, builder.mul(threads, ir.Constant(LONG, SHARES)))
    stop = builder.add(first, builder.select(builder.icmp_signed(">", fair, one), fair, one))
    claimed = builder.cmpxchg(next_index, first, stop, "monotonic")
    builder.cbranch(builder.extract_value(claimed, 1), run, take)

    builder.position_at_end(run)
    index = builder.phi(LONG)
    index.add_incoming(first, claim)
    context.call_internal_no_propagate(builder, work, call, [index, *arguments])
    following = builder.add(index, one)
    index.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, stop), run, take)

    builder.position_at_end(end)
    builder.ret_void()
    return body
