"""Readers of a request's keys and values, layer by layer, wherever and however they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kernels.api import I32, U8, TokenSource
from kernels.layout import BLOCK_TOKENS
from workers.cache.arrangement import Blocks
from workers.cache.blocks import Owners
from workers.cache.recall import SelectiveReader
from workers.cache.sources import Sources


class CacheContext:
    """Keys and values that a request keeps, wherever and however its blocks are stored."""

    def __init__(
        self, sources: Sources, blocks: Blocks, position: I32, selective: SelectiveReader | None = None
    ) -> None:
        self._sources = sources
        self._blocks = blocks
        self.selective = selective
        self.position = position.copy()
        """[layers, kv_heads, tokens] original positions; not defined beyond ``length``."""
        self.tokens = int(blocks.length.max(initial=0))
        self.length = blocks.length
        """[layers, kv_heads] tokens kept."""

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each [kv_heads, tokens, head_dim], ``tokens`` being the longest table's; zeros behind
        what a head keeps, where its last block may hold anything."""
        blocks = self._blocks
        heads, count = blocks.address.shape[1:]
        spread = (heads * count, BLOCK_TOKENS)

        def repeat(values: Any) -> Any:
            return np.repeat(values[layer].reshape(-1), BLOCK_TOKENS).reshape(spread)

        row = np.broadcast_to(np.arange(BLOCK_TOKENS, dtype=np.uint8), spread).copy()
        kept = np.arange(count * BLOCK_TOKENS) < self.length[layer][:, None]
        address = np.where(kept.reshape(spread), repeat(blocks.address), np.int32(-1))
        source = TokenSource(address, repeat(blocks.format), repeat(blocks.tier), row)
        position = np.zeros((heads, count * BLOCK_TOKENS), np.int32)
        position[:, : self.tokens] = self.position[layer]
        owners = Owners(np.full(heads * count, layer), np.arange(heads).repeat(count), position.reshape(spread))
        k, v = self._sources.read(source, owners)  # [heads * count, 32, D]
        whole = (heads, count * BLOCK_TOKENS, -1)
        return k.reshape(whole)[:, : self.tokens], v.reshape(whole)[:, : self.tokens]


class TokenContext:
    """Keys and values of a request's tokens, each named by block and row: arrays [layers, kv_heads, whole blocks]."""

    def __init__(self, sources: Sources, address: I32, fmt: U8, tier: U8, row: U8, tokens: int) -> None:
        self._sources = sources
        self._places = (address, fmt, tier, row)
        self.selective: SelectiveReader | None = None
        self.tokens = tokens
        self.length = np.full(address.shape[:2], tokens, np.int32)
        self.position = np.broadcast_to(np.arange(tokens, dtype=np.int32), (*address.shape[:2], tokens))

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each [kv_heads, tokens, head_dim]."""
        heads, width = self._places[0].shape[1:]
        source = TokenSource(*(values[layer].reshape(-1, BLOCK_TOKENS) for values in self._places))
        position = np.broadcast_to(np.arange(width, dtype=np.int32), (heads, width)).reshape(-1, BLOCK_TOKENS)
        owners = Owners(np.full(len(position), layer), np.arange(heads).repeat(width // BLOCK_TOKENS), position)
        k, v = self._sources.read(source, owners)  # [heads * blocks, 32, D]
        whole = (heads, width, -1)
        return k.reshape(whole)[:, : self.tokens], v.reshape(whole)[:, : self.tokens]
