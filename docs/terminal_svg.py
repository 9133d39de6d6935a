"""Turns a command's coloured output into an SVG picture.

``FORCE_COLOR=1 kvpilot top --once | python docs/terminal_svg.py docs/top.svg "kvpilot top"``
"""

from __future__ import annotations

import io
import sys

from rich.console import Console
from rich.text import Text


def main() -> None:
    """Reads text with ANSI colours from stdin and writes the picture."""
    target, title = sys.argv[1:]
    text = Text.from_ansi(sys.stdin.read().rstrip())
    width = max(line.cell_len for line in text.split())
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(text)
    console.save_svg(target, title=title)


if __name__ == "__main__":
    main()
