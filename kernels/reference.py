"""The definition of every kernel, in plain torch: slow, short, and the same on any device.

Where this file and a faster backend disagree, the faster backend is wrong. Arithmetic is in float32 throughout.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from kernels.api import F32, I32, VOTE_DECAY, DecodePlan, Tables, TokenSource
from kernels.checks import check_arenas, check_attend, check_decode, check_plan, check_write
from kernels.layout import BLOCK_TOKENS, GROUP, MEMORY_TIERS, UNIT_BYTES, BlockFormat, CacheShape, Format, Tier
from kernels.partials import Partial, merge, stack, weights

Mask = npt.NDArray[np.bool_]

LEVELS = {Format.INT8: 255, Format.INT4: 15, Format.INT2: 3}
FP8_MAX = 448.0  # largest finite e4m3
HALF_MAX = 65504.0  # largest finite float16, the type of scales and zeros


class ReferenceBackend:
    """Torch kernels. Arenas may lie on the CPU or on a GPU; results are on the device tier's device."""

    def __init__(self, shape: CacheShape, arenas: tuple[torch.Tensor, ...], tables: Tables) -> None:
        check_arenas(shape, arenas)
        self.shape = shape
        self.arenas = arenas
        self.tables = tables
        self._device = arenas[0].device

    def warm_up(self) -> None:
        """Nothing to compile."""

    def plan(
        self, slots: I32, tiers: Collection[Tier] = MEMORY_TIERS, *, appends: bool = True, changing: bool = False
    ) -> DecodePlan:
        """See ``kernels.api.Backend.plan``."""
        check_plan(self.tables, slots, tiers, appends)
        length = self.tables.length[slots]  # [R, L, H]
        rows, layers, heads = length.shape
        blocks = -(-int(length.max(initial=0)) // BLOCK_TOKENS)
        return DecodePlan(slots, tuple(tiers), appends, np.zeros((layers, rows, heads, blocks), np.float32))

    def refresh(self, plan: DecodePlan, layer: int) -> None:
        """Nothing to do: the tables are read as they are."""

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
        """See ``kernels.api.Backend.decode``."""
        check_decode(plan, q, partials)
        tables, slots = self.tables, plan.slots
        for row, slot in enumerate(slots):
            for head in range(self.shape.kv_heads):
                last = int(tables.length[slot, layer, head]) - 1
                self._write_row(slot, layer, head, last, k[row, head, None], v[row, head, None])

        outputs = []
        for row, queries in enumerate(q):  # each alone, to be the same in any batch
            here, shares = self._attend(plan, layer, row, queries, scaling)
            parts = [here, *(Partial(part.output[row, None], part.lse[row, None]) for part in partials)]
            of_here = weights(stack(parts, q.device)[1])[0].view(self.shape.kv_heads, -1, 1)  # [H, G, 1]
            self._add_masses(plan, layer, row, (shares * of_here).sum(1).cpu().numpy())
            merged = merge(parts)
            outputs.append(merged.output)
            if lse is not None:
                lse[row] = merged.lse[0]
        return torch.cat(outputs).to(q.dtype)

    def attend(self, plan: DecodePlan, layer: int, q: torch.Tensor, scaling: float) -> Partial:
        """See ``kernels.api.Backend.attend``."""
        check_attend(plan)
        parts = [self._attend(plan, layer, row, queries, scaling)[0] for row, queries in enumerate(q)]
        return Partial(torch.cat([part.output for part in parts]), torch.cat([part.lse for part in parts]))

    def _attend(
        self, plan: DecodePlan, layer: int, row: int, q: torch.Tensor, scaling: float
    ) -> tuple[Partial, torch.Tensor]:
        """Attention of one row's q [query_heads, D] over what the plan reads, and each token's shares [H, G, T]."""
        slot = plan.slots[row]
        length = self.tables.length[slot, layer]  # [H]
        heads, group = len(length), self.shape.queries_per_kv_head
        blocks = -(-int(length.max()) // BLOCK_TOKENS)
        read = np.arange(blocks * BLOCK_TOKENS) < length[:, None]  # [H, T]
        here = np.isin(self.tables.tier[slot, layer, :, :blocks], plan.tiers)
        here &= self.tables.format[slot, layer, :, :blocks] < len(Format)
        read &= here.repeat(BLOCK_TOKENS, -1)
        keys, values = self._gather(self._whole_blocks(slot, layer, read), torch.float32)
        keys = keys.view(heads, blocks * BLOCK_TOKENS, self.shape.head_dim)  # [H, T, D]
        values = values.view_as(keys)

        queries = (q.to(torch.float32) * scaling).contiguous().view(heads, group, -1)  # [H, G, D]
        scores = queries @ keys.mT  # [H, G, T]
        unread = ~torch.from_numpy(read)[:, None].to(scores.device)
        scores.masked_fill_(unread, -torch.inf)
        shares = scores.softmax(-1).masked_fill_(unread, 0.0)  # where nothing is read, softmax makes NaN
        output, lse = (shares @ values).view(1, self.shape.query_heads, -1), scores.logsumexp(-1).view(1, -1)
        return Partial(output, lse), shares

    def _add_masses(self, plan: DecodePlan, layer: int, row: int, received: F32) -> None:
        """Adds what one row's tokens received, float32 [H, T] with zeros past the last, to block masses and tables."""
        slot, (heads, tokens) = plan.slots[row], received.shape
        of_blocks = received.reshape(heads, -1, BLOCK_TOKENS).sum(-1) / self.shape.queries_per_kv_head
        plan.block_mass[layer, row, :, : of_blocks.shape[1]] = of_blocks
        self.tables.mass[slot, layer, :, :tokens] += received
        kept = np.arange(tokens) < self.tables.length[slot, layer, :, None]
        votes = self.tables.votes[slot, layer, :, :tokens]
        votes[kept] = votes[kept].astype(np.float32) * np.float32(VOTE_DECAY) + received[kept]

    def finish(self, plan: DecodePlan) -> None:
        """Nothing to do: ``decode`` has filled the masses."""

    def settle(self, slots: I32) -> None:
        """Nothing to do: ``decode`` has added to the tables."""

    def write(self, slot: int, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """See ``kernels.api.Backend.write``."""
        check_write(self.tables, slot, layer, start, k.shape[1])
        for head in range(self.shape.kv_heads):
            self._write_row(slot, layer, head, start, k[head], v[head])

    def read(self, source: TokenSource) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``kernels.api.Backend.read``."""
        return self._gather(source, self.shape.dtype)

    def encode(self, source: TokenSource, fmt: Format) -> torch.Tensor:
        """See ``kernels.api.Backend.encode``.

        A block whose tokens are one block of the wanted format, in order, is copied byte for byte.
        """
        if fmt is Format.RAW:
            parts = list(self._gather(source, self.shape.dtype))
        else:
            keys, values = self._gather(source, torch.float32)
            parts = quantise_fp8(keys, values) if fmt is Format.FP8 else quantise(keys, values, fmt)
        payload = torch.cat([part.flatten(1).view(torch.uint8) for part in parts], 1)
        blocks = functional.pad(payload, (0, self.shape.block_bytes(fmt) - payload.shape[1]))

        first = source.address[:, :1]
        same = (source.address == first) & (source.tier == source.tier[:, :1]) & (source.format == fmt)
        same &= (source.row == np.arange(BLOCK_TOKENS)) & (first >= 0)
        for tier in range(len(self.arenas)):
            whole = same.all(1) & (source.tier[:, 0] == tier)
            blocks[torch.from_numpy(whole).to(self._device)] = self.load(tier, first[whole, 0], fmt).to(self._device)
        return blocks

    def transcode(self, source: TokenSource, fmt: Format, tier: int, address: I32) -> None:
        """See ``kernels.api.Backend.transcode``."""
        self.store(tier, address, self.encode(source, fmt))

    def store(self, tier: int, address: I32, blocks: torch.Tensor) -> None:
        """See ``kernels.api.Backend.store``."""
        arena = self.arenas[tier].view(-1, UNIT_BYTES)
        units = blocks.reshape(len(address), blocks.shape[1] // UNIT_BYTES, UNIT_BYTES).to(
            arena.device
        )  # [N, units, 256]
        arena[self._units(address, units.shape[1], arena.device)] = units

    def load(self, tier: int, address: I32, fmt: BlockFormat) -> torch.Tensor:
        """See ``kernels.api.Backend.load``."""
        arena = self.arenas[tier].view(-1, UNIT_BYTES)
        units = arena[self._units(address, self.shape.block_units(fmt), arena.device)]  # [N, units, 256]
        return units.flatten(1)

    @staticmethod
    def _units(address: I32, count: int, device: torch.device) -> torch.Tensor:
        first = torch.from_numpy(address.astype(np.int64)).to(device)
        return first[:, None] + torch.arange(count, device=device)  # [N, count]

    def _write_row(self, slot: int, layer: int, head: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes k, v [N, D] as kept tokens start.. of one table."""
        d, dtype = self.shape.head_dim, self.shape.dtype
        arena = self.arenas[0].view(dtype)
        token = torch.arange(start, start + len(k))
        table = torch.from_numpy(self.tables.address[slot, layer, head].astype(np.int64))
        base = table[token // BLOCK_TOKENS] * (UNIT_BYTES // dtype.itemsize) + token % BLOCK_TOKENS * d  # [N]
        index = (base[:, None] + torch.arange(d)).to(arena.device)  # [N, D]
        arena[index] = k.to(arena)
        arena[index + BLOCK_TOKENS * d] = v.to(arena)

    def _whole_blocks(self, slot: int, layer: int, kept: Mask) -> TokenSource:
        """These tokens [H, T] of a slot's tables of a layer, as T / 32 blocks a table."""
        kept = kept.reshape(-1, BLOCK_TOKENS)  # [N, 32]
        blocks = len(kept) // self.shape.kv_heads
        address = self.tables.address[slot, layer, :, :blocks].reshape(-1, 1)
        fmt = self.tables.format[slot, layer, :, :blocks].reshape(-1, 1)
        tier = self.tables.tier[slot, layer, :, :blocks].reshape(-1, 1)
        row = np.arange(BLOCK_TOKENS, dtype=np.uint8)
        return TokenSource(
            np.where(kept, address, np.int32(-1)),
            np.broadcast_to(fmt, kept.shape),
            np.broadcast_to(tier, kept.shape),
            np.broadcast_to(row, kept.shape),
        )

    def _gather(self, source: TokenSource, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [N, 32, D] of the named tokens in ``dtype``; zeros where the address is -1."""
        size = (*source.address.shape, self.shape.head_dim)
        keys = torch.zeros(size, dtype=dtype, device=self._device)
        values = torch.zeros(size, dtype=dtype, device=self._device)
        for fmt in Format:
            for tier, arena in enumerate(self.arenas):
                chosen = (source.address >= 0) & (source.format == fmt) & (source.tier == tier)
                if not chosen.any():
                    continue
                base = torch.from_numpy(source.address[chosen].astype(np.int64) * UNIT_BYTES).to(arena.device)
                row = torch.from_numpy(source.row[chosen].astype(np.int64)).to(arena.device)
                k, v = self._tokens(arena, fmt, base, row)
                into = torch.from_numpy(chosen).to(self._device)
                keys[into] = k.to(keys)
                values[into] = v.to(values)
        return keys, values

    def _tokens(
        self, arena: torch.Tensor, fmt: Format, base: torch.Tensor, row: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [n, D] of n tokens, each given by its block's first byte [n] and its row [n]; raw: as stored."""
        d, groups = self.shape.head_dim, self.shape.value_groups
        channel = torch.arange(d, device=arena.device)
        if fmt is Format.RAW:
            stored = arena.view(self.shape.dtype)
            index = (base // self.shape.dtype.itemsize + row * d)[:, None] + channel
            return stored[index], stored[index + BLOCK_TOKENS * d]

        row_bytes = self.shape.code_bytes(fmt)
        byte = (base + row * row_bytes)[:, None] + channel % row_bytes
        k_code, v_code = (arena[byte + part] for part in (0, BLOCK_TOKENS * row_bytes))
        half = arena.view(torch.float16)
        constants = (base + 2 * BLOCK_TOKENS * row_bytes)[:, None] // 2
        k_scale = constants + channel
        v_scale = constants + (2 * d if fmt.has_zeros else d) + row[:, None] * groups + channel // GROUP
        if fmt is Format.FP8:
            keys, values = (code.view(torch.float8_e4m3fn).float() for code in (k_code, v_code))
            return keys * half[k_scale].float(), values * half[v_scale].float()
        shift = channel // row_bytes * fmt.bits  # lowest bits first
        k_code, v_code = (code >> shift & LEVELS[fmt] for code in (k_code, v_code))
        keys = k_code.float() * half[k_scale].float() + half[k_scale + d].float()
        values = v_code.float() * half[v_scale].float() + half[v_scale + BLOCK_TOKENS * groups].float()
        return keys, values


def quantise(keys: torch.Tensor, values: torch.Tensor, fmt: Format) -> list[torch.Tensor]:
    """Codes, scales and zeros of blocks K, V float32 [N, 32, D], in the order of their bytes in a block."""
    of_channel = torch.arange(keys.shape[-1], device=values.device) // GROUP
    k_scale, k_zero = _scale_and_zero(_finite(keys).mT, fmt)  # [N, D]
    v_scale, v_zero = _scale_and_zero(_grouped(values), fmt)  # [N, 32, G]
    k_code = _codes(keys, k_scale[:, None], k_zero[:, None], fmt)
    v_code = _codes(values, v_scale[..., of_channel], v_zero[..., of_channel], fmt)
    return [k_code, v_code, k_scale, k_zero, v_scale, v_zero]


def quantise_fp8(keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """As :func:`quantise`, without zeros."""
    of_channel = torch.arange(keys.shape[-1], device=values.device) // GROUP
    k_scale, v_scale = _fp8_scale(_finite(keys).mT), _fp8_scale(_grouped(values))
    return [_fp8_codes(keys, k_scale[:, None]), _fp8_codes(values, v_scale[..., of_channel]), k_scale, v_scale]


def _fp8_scale(x: torch.Tensor) -> torch.Tensor:
    """float16 scale of groups [..., n], rounded up so that no number is above the greatest code."""
    exact = x.abs().amax(dim=-1) / FP8_MAX
    scale = exact.half()
    return torch.where(scale.float() < exact, _next_half(scale, up=True), scale)


def _fp8_codes(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    exact = _finite(x) / scale.float().masked_fill(scale == 0, 1.0)
    return exact.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def _grouped(values: torch.Tensor) -> torch.Tensor:
    """Values [N, 32, D] in their groups [N, 32, G, 32].

    The last group may be short: repeating its last channel changes neither its least nor its greatest value.
    """
    d = values.shape[-1]
    groups = -(-d // GROUP)
    channel = torch.arange(groups * GROUP, device=values.device).clamp(max=d - 1)
    return _finite(values)[..., channel].reshape(-1, BLOCK_TOKENS, groups, GROUP)


def _finite(x: torch.Tensor) -> torch.Tensor:
    """What quantised formats can hold: NaN and -0 count as 0, and float16 scales end at +-65504."""
    return x.nan_to_num(0.0, torch.inf, -torch.inf).clamp(-HALF_MAX, HALF_MAX) + 0.0


def _scale_and_zero(x: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 scale and zero of groups [..., n], rounded outwards so that codes 0..levels cover the whole group.

    x comes from ``_finite``: with a negative zero in it, which zero is the lower would be undefined.
    """
    low, high = x.aminmax(dim=-1)
    zero = low.half()
    zero = torch.where((zero.float() > low) & (high > low), _next_half(zero, up=False), zero)
    exact = (high - zero.float()) / LEVELS[fmt]
    scale = exact.half()
    scale = torch.where(scale.float() < exact, _next_half(scale, up=True), scale)
    return torch.where(high > low, scale, 0), zero


def _next_half(x: torch.Tensor, *, up: bool) -> torch.Tensor:
    """The neighbouring float16 (numpy has it, torch does not). ``x`` is never zero of the sign that is walked away."""
    with np.errstate(over="ignore"):
        neighbour = np.nextafter(x.cpu().numpy(), np.float16(np.inf if up else -np.inf))
    return torch.from_numpy(neighbour).to(x.device)


def _codes(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, fmt: Format) -> torch.Tensor:
    """uint8 codes of x [N, 32, D], packed as the format has them."""
    exact = (_finite(x) - zero.float()) / scale.float().masked_fill(scale == 0, 1.0)
    code = exact.masked_fill(scale == 0, 0.0).round().clamp(0, LEVELS[fmt]).to(torch.uint8)
    parts = 8 // fmt.bits
    width = -(-code.shape[-1] // parts)
    code = functional.pad(code, (0, parts * width - code.shape[-1]))
    packed = torch.zeros_like(code[..., :width])
    for part in range(parts):
        packed |= code[..., part * width : (part + 1) * width] << part * fmt.bits
    return packed
