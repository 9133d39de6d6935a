"""The picture of ``kvpilot inspect``, as PNG. Colours are Okabe and Ito's, as in :mod:`models.plots`."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cli.inspect_run import Inspection
from kernels.layout import BlockFormat, Format, Tier

COLOURS: dict[BlockFormat, str] = {
    Format.RAW: "#0072B2",
    Format.INT8: "#E69F00",
    Format.INT4: "#009E73",
    Format.INT2: "#CC79A7",
    Format.FP8: "#56B4E9",
}
OWN_FORMAT = "#F0E442"
"""Of blocks in codecs' own formats."""
GREY, RED = "#666666", "#D55E00"
HOST_BRIGHTNESS = 0.5
BRIGHTNESS = {Tier.DEVICE: 1.0, Tier.HOST: HOST_BRIGHTNESS, Tier.DISK: 0.25}
"""Blocks on the host have their format's colour, darkened to this; white is what is evicted."""
_LABELLED_LAYERS = 30


def draw(found: Inspection) -> bytes:
    """A row for each KV head of each layer, a column for each position. Tokens narrower than a pixel blend."""
    layers, heads = found.shape.layers, found.shape.kv_heads
    height = float(np.clip(2.2 + 0.07 * layers * heads, 4.0, 14.0))
    figure = Figure(figsize=(12, height), dpi=120, layout="constrained")  # no pyplot: no window, no global state
    axes = figure.add_subplot()
    extent = (0.0, float(found.seen), float(layers * heads), 0.0)
    axes.imshow(image(found), aspect="auto", extent=extent, interpolation="antialiased", interpolation_stage="rgba")
    axes.hlines(np.arange(1, layers) * heads, 0, found.seen, color=GREY, linewidth=0.3)
    step = -(-layers // _LABELLED_LAYERS)
    shown = np.arange(0, layers, step)
    axes.set_yticks((shown + 0.5) * heads, [str(layer) for layer in shown])
    axes.set_ylabel(f"layer, {heads} KV head{'s' if heads > 1 else ''} each")
    axes.set_xlabel("position in the text, tokens")
    marks: list[Artist] = [
        Patch(color=colour(kind.format, kind.tier), label=f"{kind.format.name.lower()}, {kind.tier.name.lower()}")
        for kind in found.kinds
    ]
    marks.append(Patch(facecolor="white", edgecolor=GREY, label="evicted"))
    if found.seen > found.prompt_tokens:
        marks.append(axes.axvline(found.prompt_tokens, color=RED, linewidth=1, label="end of the prompt"))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize="small")
    share = found.use.device_bytes / found.use.full_bytes
    said = f"{found.model}, {found.seen:,} tokens, on the device {share:.0%} of the full cache's bytes"
    axes.set_title(f"{found.pipeline}\n{said}", fontsize="medium")
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": "kvpilot"})
    return out.getvalue()


def image(found: Inspection) -> npt.NDArray[np.float64]:
    """[heads, seen, 3] the colour of every token of every head."""
    pixels = np.ones((len(found.heads), found.seen, 3))
    for row, head in enumerate(found.heads):
        for block in head.blocks:
            pixels[row, block.position] = colour(block.format, block.tier)
    return pixels


def colour(fmt: BlockFormat, tier: Tier) -> tuple[float, float, float]:
    """Red, green and blue from 0 to 1: the hue says the format, the shade the tier."""
    brightness = BRIGHTNESS[tier]
    red, green, blue = to_rgb(COLOURS.get(fmt, OWN_FORMAT))
    return brightness * red, brightness * green, brightness * blue
