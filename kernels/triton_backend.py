"""The GPU backend: checks and host decisions in Python, everything else in Triton (``kernels.triton_*``).

With ``TRITON_INTERPRET=1`` set before these modules are imported, the same kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from kernels.api import I32, VOTE_DECAY, DecodePlan, Tables, TokenSource
from kernels.checks import check_arenas, check_attend, check_decode, check_plan, check_write
from kernels.layout import BLOCK_TOKENS, MEMORY_TIERS, UNIT_BYTES, BlockFormat, CacheShape, Format, Tier
from kernels.partials import LOG2_E, Partial, stack
from kernels.triton_attend import attend_splits, merge_splits
from kernels.triton_convert import COPY_WORDS, copy_blocks, encode_blocks, read_tokens, write_tokens
from kernels.triton_plan import UNREAD_KIND, Bucket, BucketKey, TritonPlan, Work, kinds

INTERPRETED = isinstance(attend_splits, InterpretedFunction)
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
INTEGERS = {4: (torch.int32, tl.int32), 2: (torch.int16, tl.int16)}
ASSUMED_MULTIPROCESSORS = 132  # in the interpreter: an H100's
ATTEND_WARPS = 4


class TritonBackend:
    """Triton kernels over a device arena on a GPU and a host arena in pinned memory, which they read in place.

    One caller at a time per backend, on one CUDA stream. A plan is good until the next one is made. What decode steps
    add to masses and votes stays on the GPU until :meth:`settle`.
    """

    def __init__(self, shape: CacheShape, arenas: tuple[torch.Tensor, ...], tables: Tables) -> None:
        check_arenas(shape, arenas)
        _check_reach(arenas)
        self.shape = shape
        self.arenas = arenas
        self.tables = tables
        self._device = arenas[0].device
        self._multiprocessors = (
            torch.cuda.get_device_properties(self._device).multi_processor_count
            if self._device.type == "cuda"
            else ASSUMED_MULTIPROCESSORS
        )
        self._dtype = DTYPES[shape.dtype]
        self._integer, self._bits = INTEGERS[shape.dtype.itemsize]
        self._width = max(16, triton.next_power_of_2(shape.head_dim))
        self._buckets: dict[BucketKey, Bucket] = {}
        self._received = torch.zeros(tables.mass.shape, dtype=torch.float32, device=self._device)
        self._voted = torch.zeros_like(self._received)
        self._steps = torch.zeros(tables.length.shape, dtype=torch.int32, device=self._device)
        self._counted = np.zeros_like(tables.length)  # [S, L, H] tokens that steps since the last settlement reached

    def warm_up(self) -> None:
        """Compiles all kernels for this model, or loads them from Triton's cache."""
        shape = CacheShape(1, self.shape.kv_heads, self.shape.query_heads, self.shape.head_dim, self.shape.dtype)
        size = max(shape.block_bytes(fmt) for fmt in Format) * shape.kv_heads
        arenas = tuple(torch.zeros(size, dtype=torch.uint8, device=arena.device) for arena in self.arenas)
        if self._device.type == "cuda":
            arenas = arenas[0], arenas[1].pin_memory() if arenas[1].device.type == "cpu" else arenas[1]
        backend = TritonBackend(shape, arenas, Tables.allocate(1, shape, 1))
        new = torch.zeros(1, shape.kv_heads, shape.head_dim, dtype=shape.dtype, device=self._device)
        q = torch.zeros(1, shape.query_heads, shape.head_dim, dtype=shape.dtype, device=self._device)
        backend.tables.address[..., 0] = np.arange(shape.kv_heads) * shape.block_units(Format.RAW)
        backend.tables.length[:] = 1
        backend.write(0, 0, 0, new.mT.reshape(shape.kv_heads, 1, -1), new.mT.reshape(shape.kv_heads, 1, -1))
        backend.decode(backend.plan(np.zeros(1, np.int32)), 0, q, new, new, 1.0)
        zeros = np.zeros((1, BLOCK_TOKENS), np.uint8)
        source = TokenSource(zeros.astype(np.int32), zeros, zeros, zeros)
        backend.read(source)
        for fmt in Format:
            backend.store(0, source.address[0, :1], backend.encode(source, fmt))
            backend.load(0, source.address[0, :1], fmt)

    def plan(
        self, slots: I32, tiers: Collection[Tier] = MEMORY_TIERS, *, appends: bool = True, changing: bool = False
    ) -> TritonPlan:
        """See ``kernels.api.Backend.plan``. Plans with equal ``plan.bucket.key`` share buffers and grids."""
        check_plan(self.tables, slots, tiers, appends)
        length = self.tables.length[slots].swapaxes(0, 1)  # [L, R, H]
        work = Work.of(length, self._multiprocessors)
        most = int(work.blocks.max(initial=0))
        kind = kinds(self.tables.format[slots, :, :, :most], self.tables.tier[slots, :, :, :most], tiers)
        real = np.arange(most) < work.blocks[..., None]  # [L, R, H, B']
        kind = kind.swapaxes(0, 1)[real]
        key = work.key(all_read=not changing and UNREAD_KIND not in kind)
        if key not in self._buckets:
            self._buckets[key] = Bucket(key, self.shape, self._device)
        bucket = self._buckets[key]
        bucket.upload(self.tables, slots, kind, real, work)
        if appends:
            self._counted[slots] = np.maximum(self._counted[slots], self.tables.length[slots])
        return TritonPlan(
            slots=np.ascontiguousarray(slots, np.int32),
            tiers=tuple(tiers),
            appends=appends,
            block_mass=np.zeros((*work.blocks.shape, most), np.float32),
            bucket=bucket,
            serial=bucket.serial,
            blocks=work.blocks,
        )

    def refresh(self, plan: DecodePlan, layer: int) -> None:
        """See ``kernels.api.Backend.refresh``."""
        bucket = self._bucket(plan)
        if bucket.key.all_read:
            raise ValueError("plan: made for tables that do not change, must be made as changing")
        assert isinstance(plan, TritonPlan)
        bucket.refresh(self.tables, plan.slots, plan.tiers, plan.blocks[layer], layer)

    def decode(
        self,
        plan: DecodePlan,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
        partials: Sequence[Partial] = (),
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``kernels.api.Backend.decode``. Only launches; q, k and v may have rows beyond the plan's, up to its
        bucket's, as a captured graph needs them: what they give is zeros, or what the partials say, which have as many.
        """
        check_decode(plan, q, partials)
        output = torch.empty(q.shape, dtype=q.dtype, device=self._device)
        new = _rows(k.to(self.shape.dtype)), _rows(v.to(self.shape.dtype))
        self._attend(plan, layer, q, new, scaling, partials, output, lse)
        return output

    def attend(self, plan: DecodePlan, layer: int, q: torch.Tensor, scaling: float) -> Partial:
        """See ``kernels.api.Backend.attend``. Only launches; q may have rows beyond the plan's, as for ``decode``."""
        check_attend(plan)
        output = torch.empty(q.shape, dtype=torch.float32, device=self._device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=self._device)
        self._attend(plan, layer, q, None, scaling, (), output, lse)
        return Partial(output, lse)

    def _attend(
        self,
        plan: DecodePlan,
        layer: int,
        q: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor] | None,
        scaling: float,
        partials: Sequence[Partial],
        output: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Fills output and lse; the plan's tables get the new K and V and their masses, if there are any."""
        bucket = self._bucket(plan)
        shape, key, group = self.shape, bucket.key, self.shape.queries_per_kv_head
        if not len(plan.slots) <= len(q) <= key.rows:
            raise ValueError(f"q: {len(q)} rows, must be {len(plan.slots)}, or more up to the bucket's {key.rows}")
        q = _rows(q)
        k, v = new or (None, None)
        outputs, lses = stack(partials, self._device) if partials else (None, None)
        half = shape.dtype is not torch.float32 and not INTERPRETED
        sizes = {
            "DTYPE": self._dtype,
            "H": shape.kv_heads,
            "G": group,
            "D": shape.head_dim,
            "W": self._width,
        }
        queries = triton.next_power_of_2(group)
        attend_splits[(key.items,)](
            q,
            k,
            v,
            q.stride(0),
            0 if k is None else k.stride(0),
            0 if v is None else v.stride(0),
            scaling * LOG2_E,
            *self.arenas,
            bucket.items[layer],
            bucket.length[layer],
            bucket.address[layer],
            bucket.kind[layer],
            bucket.scores,
            bucket.highest,
            bucket.total,
            bucket.sums,
            **sizes,
            DOT=self._dtype if half else tl.float32,
            M=max(16, queries) if half else queries,
            ALL=key.all_read,
            num_warps=ATTEND_WARPS,
        )
        item_programs = key.items if new else 0  # they add to the masses
        merge_splits[(item_programs + q.shape[0] * shape.query_heads,)](
            output,
            lse,
            outputs,
            lses,
            q.shape[0],
            bucket.block_mass[layer],
            self._received,
            self._voted,
            self._steps,
            VOTE_DECAY,
            layer,
            item_programs,
            bucket.slots,
            bucket.items[layer],
            bucket.spans[layer],
            bucket.length[layer],
            bucket.scores,
            bucket.highest,
            bucket.total,
            bucket.sums,
            **{**sizes, "DTYPE": DTYPES[output.dtype]},
            L=shape.layers,
            M=queries,
            T=self.tables.mass.shape[-1],
            P=len(partials),
        )

    def finish(self, plan: DecodePlan) -> None:
        """See ``kernels.api.Backend.finish``."""
        bucket = self._bucket(plan)
        assert isinstance(plan, TritonPlan)
        if not plan.appends:
            return
        layers, _, _, most = plan.block_mass.shape
        counts = plan.blocks.reshape(layers, -1).sum(1)  # [L]
        used = int(counts.max(initial=0))
        masses = _to_host(bucket.block_masses[:, :used])
        real = np.arange(most) < plan.blocks[..., None]
        plan.block_mass[real] = masses[np.arange(used) < counts[:, None]]

    def settle(self, slots: I32) -> None:
        """See ``kernels.api.Backend.settle``."""
        for slot in slots:
            counted = self._counted[slot]  # [L, H]
            reach = int(counted.max(initial=0))
            if not reach:
                continue
            steps = _to_host(self._steps[slot])[..., None]  # [L, H, 1]
            received, voted = (_to_host(added[slot, :, :, :reach]) for added in (self._received, self._voted))
            for added in (self._received, self._voted):
                added[slot, :, :, :reach] = 0
            self._steps[slot] = 0
            kept = np.arange(reach) < counted[..., None]
            self.tables.mass[slot, :, :, :reach] += received
            votes = self.tables.votes[slot, :, :, :reach]
            faded = votes.astype(np.float32) * np.float32(VOTE_DECAY) ** steps.astype(np.float32)
            votes[kept] = (faded + voted)[kept]
            self._counted[slot] = 0

    def write(self, slot: int, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """See ``kernels.api.Backend.write``."""
        heads, count, d = k.shape
        check_write(self.tables, slot, layer, start, count)
        if not count:
            return
        first, end = start // BLOCK_TOKENS, -(-(start + count) // BLOCK_TOKENS)
        address = self._upload(self.tables.address[slot, layer, :, first:end].T)
        numbers = (x.to(self._device, self.shape.dtype).contiguous().view(self._integer) for x in (k, v))
        write_tokens[(end - first, heads)](self.arenas[0], address, start, count, *numbers, heads, D=d, W=self._width)

    def read(self, source: TokenSource) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``kernels.api.Backend.read``."""
        size, blocks = (*source.address.shape, self.shape.head_dim), len(source.address)
        keys, values = (torch.empty(size, dtype=self._integer, device=self._device) for _ in range(2))
        if blocks:
            read_tokens[(blocks,)](
                self._upload_source(source), blocks, *self.arenas, keys, values, **self._conversion()
            )
        return keys.view(self.shape.dtype), values.view(self.shape.dtype)

    def encode(self, source: TokenSource, fmt: Format) -> torch.Tensor:
        """See ``kernels.api.Backend.encode``.

        A block whose tokens are one block of the wanted format, in order, is copied byte for byte.
        """
        size = len(source.address), self.shape.block_bytes(fmt)
        built = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._encode(source, fmt, built, None)
        return built

    def transcode(self, source: TokenSource, fmt: Format, tier: int, address: I32) -> None:
        """See ``kernels.api.Backend.transcode``."""
        self._encode(source, fmt, self.arenas[tier], self._upload(address))

    def _encode(self, source: TokenSource, fmt: Format, into: torch.Tensor, places: torch.Tensor | None) -> None:
        """Builds blocks one after the other from ``into`` on, or at unit offsets of it."""
        blocks = len(source.address)
        if blocks:
            encode_blocks[(blocks,)](
                self._upload_source(source),
                blocks,
                *self.arenas,
                into,
                places,
                FMT=int(fmt),
                PAYLOAD=self.shape.payload_bytes(fmt),
                UNITS=self.shape.block_units(fmt),
                **self._conversion(),
            )

    def store(self, tier: int, address: I32, blocks: torch.Tensor) -> None:
        """See ``kernels.api.Backend.store``."""
        self._copy(tier, address, blocks.to(self._device).contiguous(), load=False)

    def load(self, tier: int, address: I32, fmt: BlockFormat) -> torch.Tensor:
        """See ``kernels.api.Backend.load``. Blocks come to the device from either tier."""
        size = len(address), self.shape.block_bytes(fmt)
        blocks = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._copy(tier, address, blocks, load=True)
        return blocks

    def _copy(self, tier: int, address: I32, blocks: torch.Tensor, load: bool) -> None:
        """Copies between blocks uint8 [N, bytes] and their places."""
        if not len(address):
            return
        units = blocks.shape[1] // UNIT_BYTES
        parts = -(-blocks.shape[1] // (4 * COPY_WORDS.value))
        copy_blocks[(len(address), parts)](self.arenas[tier], self._upload(address), blocks, UNITS=units, LOAD=load)

    def _conversion(self) -> dict[str, object]:
        """What conversion kernels are compiled for."""
        return {"DTYPE": self._dtype, "BITS": self._bits, "D": self.shape.head_dim, "W": self._width}

    def _upload(self, numbers: npt.ArrayLike) -> torch.Tensor:
        """int32 on the device."""
        host = torch.from_numpy(np.array(numbers, np.int32, order="C"))
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)

    def _upload_source(self, source: TokenSource) -> torch.Tensor:
        """int32 [2, N, 32], as ``kernels.triton_convert`` reads it."""
        what = source.row.astype(np.int32) << 16 | source.tier.astype(np.int32) << 8 | source.format
        return self._upload(np.stack([source.address, what]))

    @staticmethod
    def _bucket(plan: DecodePlan) -> Bucket:
        """The plan's buffers, which must still hold it."""
        if not isinstance(plan, TritonPlan):
            raise TypeError(f"plan: got {type(plan).__name__}, must come from this backend's plan()")
        if plan.serial != plan.bucket.serial:
            raise ValueError("plan: a later one has taken its buffers; decode and finish a plan before making another")
        return plan.bucket


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x [R, heads, D] with the numbers of a row adjacent."""
    return x if x[0].is_contiguous() else x.contiguous()


def _to_host(x: torch.Tensor) -> npt.NDArray[np.float32]:
    """A tensor's numbers in RAM, once all kernels before have run."""
    if x.device.type == "cpu":
        return x.numpy().copy()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x.contiguous(), non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    copied.synchronize()
    return host.numpy()


def _check_reach(arenas: tuple[torch.Tensor, ...]) -> None:
    """Raises ValueError unless kernels on the device arena's device can read all arenas in place."""
    device, host = arenas
    if INTERPRETED:
        if device.device.type != "cpu" or host.device.type != "cpu":
            raise ValueError(f"arenas on {device.device} and {host.device}: Triton's interpreter reads RAM only")
        return
    if device.device.type != "cuda":
        raise ValueError(f"device arena on {device.device}: the triton backend needs a CUDA device")
    if host.device != device.device and host.numel() and not host.is_pinned():
        raise ValueError("host arena: must be pinned memory, which the GPU can read in place")
