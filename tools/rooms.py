"""Draws docs/rooms.svg: the rooms of the package in their layers, as wide as they are long.

    python3 tools/rooms.py            draw
    python3 tools/rooms.py --check    fail if the picture names other rooms or layers

Layers come from the import contract in pyproject.toml, lines from the sources.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "rooms.svg"
WIDTH, ROW, GAP, LEFT = 860, 44, 8, 150
GROUPS = {
    "commands, wiring, studies": ("cli", "app", "study", "profiler", "startup", "config"),
    "shells: they touch the world, or simulate it": (
        "evaluate",
        "nodes",
        "gateway",
        "engines",
        "sim",
        "look",
        "wire",
    ),
    "execution and policy": ("switching", "control"),
    "decisions and facts: pure": (
        "plan",
        "forecast",
        "switch",
        "workload",
        "perf",
        "traces",
        "core",
    ),
}
COLOURS = ("#f6f1fa", "#fdf3ea", "#eef3fb", "#eff7f2")
EDGES = ("#76508c", "#d9772b", "#2166ac", "#3a8f5c")


def layers() -> list[list[str]]:
    """The rooms on each line of the import contract, highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    lines = next(item["layers"] for item in contracts if item["type"] == "layers")
    return [[room.strip() for room in line.split("|")] for line in lines]


def lines_of(room: str) -> int:
    """Lines of Python in a room."""
    files = (ROOT / "src" / "oserve" / room).rglob("*.py")
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def drawn(rows: list[list[str]]) -> str:
    """The picture."""
    sizes = {room: lines_of(room) for row in rows for room in row}
    widest = max(sum(sizes[room] for room in row) for row in rows)
    most = max(len(row) for row in rows)
    scale = (WIDTH - LEFT - 20 - GAP * (most - 1)) / widest
    height = len(rows) * ROW + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    labelled: set[str] = set()
    for index, row in enumerate(rows):
        top = 16 + index * ROW
        left = float(LEFT)
        for room in row:
            group = next(number for number, names in enumerate(GROUPS.values()) if room in names)
            label = list(GROUPS)[group]
            if label not in labelled:
                labelled.add(label)
                parts += caption(label, top)
            width = max(74.0, sizes[room] * scale)
            parts.append(
                f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{ROW - 10}" rx="5" '
                f'fill="{COLOURS[group]}" stroke="{EDGES[group]}"/>'
            )
            parts.append(
                f'<text x="{left + width / 2:.0f}" y="{top + 21}" '
                f'text-anchor="middle">{room}</text>'
            )
            left += width + GAP
    foot = "Each room imports only rooms on lower lines. A room is as wide as its source is long."
    parts.append(f'<text x="{LEFT}" y="{height - 12}" font-size="12" fill="#445">{foot}</text>')
    return "\n".join((*parts, "</svg>", ""))


def caption(label: str, top: int) -> list[str]:
    """The name of a group, in lines that fit beside its first row."""
    lines = [""]
    for word in label.split():
        if len(lines[-1]) + len(word) > 20:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [
        f'<text x="12" y="{top + 14 + 15 * number}" font-size="12" fill="#445">{line}</text>'
        for number, line in enumerate(lines)
    ]


def main() -> None:
    """Draw, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    wanted = parser.parse_args()
    rows = layers()
    if not wanted.check:
        PICTURE.write_text(drawn(rows), encoding="utf-8")
        return
    shown = re.findall(r'text-anchor="middle">(\w+)<', PICTURE.read_text(encoding="utf-8"))
    if shown != [room for row in rows for room in row]:
        sys.exit("docs/rooms.svg is out of date: run python3 tools/rooms.py")


if __name__ == "__main__":
    main()
