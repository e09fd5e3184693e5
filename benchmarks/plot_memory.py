"""Draws results of `octavo bench memory` as an SVG: `python benchmarks/plot_memory.py RESULT.txt... > memory.svg`.

A row of panels for each file, titled by its --lengths. The PNG beside the SVG is librsvg's:
`rsvg-convert -z 2 memory.svg -o memory.png`.
"""

import json
import re
import sys
from pathlib import Path

NAMES = {
    "octavo": ("Octavo", "#2f6f4f"),
    "oracle": ("true length", "#9aa5b1"),
    "contiguous_pow2": ("power of two", "#7b8794"),
    "contiguous_max": ("maximum", "#52606d"),
}
PANELS = {
    "waste_percent": "reserved and empty, % of held memory",
    "max_batch": "largest batch, requests",
    "requests_per_s": "requests a second",
}
WIDTH, HEIGHT, LEFT, BAR, GAP = 300, 190, 100, 22, 10
FONT = 'font-family="DejaVu Sans, Helvetica, Arial, sans-serif"'


def text(x: float, y: float, words: str, size: int = 12, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="#1f2933" {FONT} {more}>{words}</text>'


def panel(x: float, y: float, metric: str, result: dict[str, dict[str, float]]) -> list[str]:
    """Bars of one metric, each with its number."""
    most = max(result[name][metric] for name in NAMES)
    lines = [text(x + LEFT, y, PANELS[metric])]
    for i, (name, (label, colour)) in enumerate(NAMES.items()):
        value, top = result[name][metric], y + 14 + i * (BAR + GAP)
        length = max(1.0, value / most * (WIDTH - LEFT - 60))
        lines += [
            text(x + LEFT - 8, top + 15, label, 12, 'text-anchor="end"'),
            f'<rect x="{x + LEFT:g}" y="{top:g}" width="{length:.1f}" height="{BAR}" fill="{colour}"/>',
            text(x + LEFT + length + 6, top + 15, f"{value:.3g}"),
        ]
    return lines


def main() -> None:
    lines = []
    for row, path in enumerate(sys.argv[1:]):
        raw = Path(path).read_text()
        found = re.search(r"--lengths (\w+)", raw)
        result = json.loads(raw.strip().splitlines()[-1])
        y = row * HEIGHT
        lengths = {"sharegpt": "ShareGPT", "alpaca": "Alpaca"}[found[1] if found else "sharegpt"]
        lines.append(text(16, y + 26, f"Lengths like {lengths}'s: 1000 requests, memory for 15,700 tokens", 14))
        for i, metric in enumerate(PANELS):
            lines += panel(i * WIDTH, y + 52, metric, result)
    width, height = 3 * WIDTH + 16, HEIGHT * (len(sys.argv) - 1)
    print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">')
    print('<rect width="100%" height="100%" fill="#ffffff"/>', *lines, "</svg>", sep="\n")


if __name__ == "__main__":
    main()
