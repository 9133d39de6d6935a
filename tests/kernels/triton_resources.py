"""What the Triton kernels cost once compiled: registers, spills and shared memory of each variant, without a GPU.

    python tests/kernels/triton_resources.py            compares with triton_resources.json; non-zero status if it rose
    python tests/kernels/triton_resources.py --write    rewrites triton_resources.json after a change that is meant

Must run without TRITON_INTERPRET. Needs the wheel's ``cuobjdump``. Figures of another version of Triton than the file's
do not compare: then it says so, and only checks that everything compiles and fits.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels.triton_attend as attend
import kernels.triton_convert as convert
from kernels.layout import BLOCK_TOKENS, CacheShape, Format
from kernels.triton_backend import ATTEND_WARPS, DTYPES, INTEGERS

FILE = Path(__file__).with_suffix(".json")
SHARED_LIMIT = {90: 232_448, 80: 166_912}  # bytes a program may have; the compiler does not enforce it
FIGURES = ("registers", "spill_bytes", "shared_bytes")
SHAPES = [  # kv heads, query heads, head_dim, dtype
    CacheShape(1, 8, 32, 128, next(d for d in DTYPES if DTYPES[d] is tl.bfloat16)),
    CacheShape(1, 2, 14, 64, next(d for d in DTYPES if DTYPES[d] is tl.float16)),
    CacheShape(1, 3, 9, 64, next(d for d in DTYPES if DTYPES[d] is tl.float32)),
]

INTS = {"slots", "places", "items", "spans", "length", "address", "source", "steps"}
FLOATS = {"scores", "highest", "total", "sums", "block_mass", "received", "voted", "lse", "outputs", "lses"}
BYTES = {"device", "host", "arena", "kind", "into", "blocks"}
COUNTS = {"q_row", "k_row", "v_row", "layer", "item_programs", "rows", "start", "count", "heads"}


def variants() -> Iterator[tuple[str, object, dict[str, object], dict[str, str], int]]:
    """Name, kernel, constants, types of further arguments, and warps."""
    for shape in SHAPES:
        dtype, d = DTYPES[shape.dtype], shape.head_dim
        bits = INTEGERS[shape.dtype.itemsize][1]
        label, width = f"{dtype.name}-{d}", max(16, triton.next_power_of_2(d))
        numbers = {name: f"*{_short(dtype)}" for name in ("q", "k", "v", "output")}
        integers = {name: f"*{_short(bits)}" for name in ("keys", "values", "k", "v")} | {"blocks": "i32"}
        group, queries = shape.queries_per_kv_head, triton.next_power_of_2(shape.queries_per_kv_head)
        sizes = {"DTYPE": dtype, "H": shape.kv_heads, "G": group, "D": d, "W": width}
        rows = queries if dtype is tl.float32 else max(16, queries)
        split = sizes | {"DOT": dtype, "M": rows, "ALL": True}
        yield f"attend_splits {label}", attend.attend_splits, split, numbers, ATTEND_WARPS
        yield f"attend_splits one tier {label}", attend.attend_splits, split | {"ALL": False}, numbers, ATTEND_WARPS
        no_token = split | {"ALL": False, "k": None, "v": None}
        yield f"attend_splits no token {label}", attend.attend_splits, no_token, numbers, ATTEND_WARPS
        merge = sizes | {"L": 32, "M": queries, "T": 1024 * BLOCK_TOKENS, "P": 0}
        no_partials = {"lse": None, "outputs": None, "lses": None}
        yield f"merge_splits {label}", attend.merge_splits, merge | no_partials, numbers, 4
        yield f"merge_splits a partial {label}", attend.merge_splits, merge | {"lse": None, "P": 1}, numbers, 4
        to_partial = merge | {"DTYPE": tl.float32, "outputs": None, "lses": None}
        yield f"merge_splits to a partial {label}", attend.merge_splits, to_partial, numbers | {"output": "*fp32"}, 4
        conversion = {"DTYPE": dtype, "BITS": bits, "D": d, "W": width}
        yield f"read_tokens {label}", convert.read_tokens, conversion, integers, 4
        for fmt in Format:
            block = {"FMT": int(fmt), "PAYLOAD": shape.payload_bytes(fmt), "UNITS": shape.block_units(fmt)}
            name = f"encode_blocks {fmt.name.lower()} {label}"
            yield name, convert.encode_blocks, conversion | block | {"places": None}, integers, 4
            if fmt is Format.INT4:
                yield f"{name} in place", convert.encode_blocks, conversion | block, integers, 4
        yield f"write_tokens {label}", convert.write_tokens, {"D": d, "W": width}, integers, 4
    for load in (True, False):
        name = f"copy_blocks {'load' if load else 'store'}"
        yield name, convert.copy_blocks, {"UNITS": 64, "LOAD": load}, {}, 4


def _short(dtype: tl.dtype) -> str:
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int16": "i16"}
    return names.get(dtype.name, dtype.name)


def compile_for(capability: int, kernel, constants, types, warps):
    """The compiled kernel for arguments as a backend gives them: 16-byte aligned unless the kernel says otherwise."""
    signature, aligned = {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name in COUNTS:
            signature[name] = "i32"
        elif name in ("scaling", "decay"):
            signature[name] = "fp32"
        else:
            signature[name] = "*i32" if name in INTS else "*fp32" if name in FLOATS else "*u8" if name in BYTES else ""
        if signature[name].startswith("*") and not parameter.do_not_specialize_on_alignment:
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def figures(compiled) -> dict[str, int]:
    """Registers a thread, bytes a thread spills to its stack, bytes of shared memory a program takes."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report.stdout))
    spilled = int(usage["STACK"]) + int(usage["LOCAL"])
    return dict(zip(FIGURES, (int(usage["REG"]), spilled, compiled.metadata.shared), strict=True))


def measure() -> dict[str, dict[str, int]]:
    """Figures of all variants, by name and architecture."""
    measured = {}
    for capability, (name, *variant) in itertools.product(SHARED_LIMIT, variants()):
        measured[f"{name} sm_{capability}"] = figures(compile_for(capability, *variant))
    return measured


def complaints(measured: dict[str, dict[str, int]]) -> list[str]:
    """What no GPU has."""
    return [
        f"{name}: {now['shared_bytes']} bytes of shared memory, the GPU has {limit}"
        for name, now in measured.items()
        if now["shared_bytes"] > (limit := SHARED_LIMIT[int(name.rpartition("_")[2])])
    ]


def rises(measured: dict[str, dict[str, int]], known: dict[str, dict[str, int]]) -> list[str]:
    """What is worse than it was, or not listed."""
    found = [f"{name}: no longer compiled, but listed in {FILE.name}" for name in known.keys() - measured.keys()]
    found += [f"{name}: not listed in {FILE.name}" for name in measured.keys() - known.keys()]
    for name in measured.keys() & known.keys():
        found += [
            f"{name}: {figure} rose from {known[name][figure]} to {measured[name][figure]}"
            for figure in FIGURES
            if measured[name][figure] > known[name][figure]
        ]
    return sorted(found)


def main() -> int:
    """Compares or writes; the number of complaints is the status."""
    measured = measure()
    found = complaints(measured)
    if "--write" in sys.argv[1:]:
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(now)}" for name, now in sorted(measured.items()))
        FILE.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "variants": {{\n{lines}\n  }}\n}}\n')
    written = json.loads(FILE.read_text())
    if written["triton"] == triton.__version__:
        found += rises(measured, written["variants"])
    else:
        print(f"figures of Triton {triton.__version__} do not compare with those of {written['triton']}")
    print("\n".join(found) if found else f"{len(measured)} variants compiled, nothing to complain about")
    return min(len(found), 100)


if __name__ == "__main__":
    sys.exit(main())
