"""Microseconds that the host spends on a decode step of so many rows, by part: a table, and an SVG of it.

    python benchmarks/host_time.py --svg host-time.svg          # one GPU, Qwen3-0.6B's shape, random weights

The same rows decode step after step. Medians of 100 steps, of five rounds the one that took the host least, since other
work on its processor disturbs it; "usual" is the middle one's. "wait" is for the device, beside which the rest happens.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from gpu import MODELS, HostClock, fixed

from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.request import Request
from octavo.sampling_params import SamplingParams

PARTS = {"schedule": "#2f6f4f", "submit": "#7fb069", "update": "#e6aa68"}
GOAL = 150.0
STEPS, ROUNDS = 100, 5
ADMITTED = 150  # tokens that a row draws before it is measured, at most
BAR, GAP, LEFT, WIDTH = 24, 12, 90, 520
FONT = 'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" fill="#1f2933"'


def idle_loop() -> float:
    """Microseconds of a thousand turns of nothing."""
    began = time.perf_counter()
    for _ in range(1000):
        pass
    return 1e6 * (time.perf_counter() - began)


def measure(engine: Engine, rows: int) -> dict[str, float]:
    for i, prompt in enumerate(fixed(rows, 300, 1)[0]):
        params = SamplingParams(temperature=0.8, ignore_eos=True, max_tokens=ADMITTED + STEPS * ROUNDS)
        engine.add(Request(f"{rows}-{i}", prompt, params))
    while engine.stats().waiting:
        engine.step()
    for _ in range(60):
        engine.step()
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        loops = []
        with HostClock(engine) as clock:
            for _ in range(STEPS):
                engine.step()
                loops.append(idle_loop())
        found = clock.medians()
        host = sum(found[part] for part in PARTS)
        step = 1e6 * (time.perf_counter() - began) / STEPS
        rounds.append({"rows": rows, **found, "host": host, "step": step, "loop": median(loops)})
    for i in range(rows):
        engine.abort(f"{rows}-{i}")
    while engine.has_work():
        engine.step()
    return min(rounds, key=lambda each: each["host"]) | {"usual": median(each["host"] for each in rounds)}


def drawing(results: list[dict[str, float]]) -> str:
    """A bar for each number of rows, its parts one behind the other, and the goal as a line."""
    scale = (WIDTH - LEFT - 70) / max(GOAL, *(row["host"] for row in results))
    lines, bottom = [], 40 + len(results) * (BAR + GAP)
    for i, row in enumerate(results):
        x, y = float(LEFT), 40 + i * (BAR + GAP)
        label = f"{row['rows']:.0f} rows"
        lines.append(f'<text x="{LEFT - 8}" y="{y + 17}" font-size="12" text-anchor="end" {FONT}>{label}</text>')
        for part, colour in PARTS.items():
            width = row[part] * scale
            lines.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>')
            x += width
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 17}" font-size="12" {FONT}>{row["host"]:.0f} us</text>')
    goal = LEFT + GOAL * scale
    lines.append(f'<path d="M{goal:.1f} 32V{bottom}" stroke="#9b2226" stroke-dasharray="4 3"/>')
    for i, (part, colour) in enumerate(PARTS.items()):
        lines.append(f'<rect x="{LEFT + 110 * i}" y="10" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{LEFT + 110 * i + 18}" y="20" font-size="12" {FONT}>{part}</text>')
    size = f'width="{WIDTH}" height="{bottom + 10}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([svg, '<rect width="100%" height="100%" fill="#ffffff"/>', *lines, "</svg>"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,32,64,128,256,512")
    parser.add_argument("--model", default="qwen3-0.6b", choices=list(MODELS))
    parser.add_argument("--svg", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODELS[given.model]))
        options = {"load_format": "dummy", "device": "cuda", "max_model_len": 8192, "max_num_seqs": 512}
        engine = Engine.build(EngineOptions(model=folder, **options))
    results = []
    print(f"the loop alone: {median(idle_loop() for _ in range(1000)):.0f} us")
    columns = ("rows", *PARTS, "host", "usual", "wait", "step", "loop")
    print("".join(f"{name:>10}" for name in columns))
    for rows in map(int, given.rows.split(",")):
        results.append(measure(engine, rows))
        print("".join(f"{results[-1][name]:>10.0f}" for name in columns), flush=True)
    if given.svg:
        given.svg.write_text(drawing(results))


if __name__ == "__main__":
    main()
