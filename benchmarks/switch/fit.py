"""Constants of what switches cost (``SwitchCosts``), fitted to switches that were measured.

    .venv/bin/python benchmarks/switch/engines.py --only moved --json > moved.json
    .venv/bin/python benchmarks/switch/engines.py --row 20 > row.json
    .venv/bin/python benchmarks/switch/fit.py moved.json row.json --output costs.yaml

``oserve simulate --switch-costs costs.yaml`` and the scripts under ``experiments/`` then simulate
switches that take as long. Shown are the constants, what they say of each switch beside what was
measured, and how wrong constants are that were fitted without that switch.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from oserve.switch.fit import (
    PHASES,
    MeasuredSwitch,
    costs_document,
    fit_costs,
    left_out_errors,
    predicted_s,
)


def read(paths: list[Path]) -> list[tuple[str, MeasuredSwitch]]:
    """Switches of one wave by which weights were moved unthrottled, with a name for each."""
    found = []
    for path in paths:
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if row.get("way") == "moved, throttled":
                continue
            if row["method"] == "transfer" and row["state"] == "done" and row["waves"] == 1:
                found.append((f"{path.stem} to {row['to']}", measured(row)))
    return found


def measured(row: dict[str, Any]) -> MeasuredSwitch:
    phases = {f"{phase}_s": row["phases_s"][phase] for phase in PHASES}
    return MeasuredSwitch(
        engines=row["engines"],
        busy_s=row["links_busy_s"],
        given_bytes=row["largest_bytes"],
        **phases,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", type=Path, help="what engines.py --json wrote")
    parser.add_argument("--output", type=Path, help="write the constants as YAML")
    arguments = parser.parse_args()
    found = read(arguments.rows)
    switches = [one for _, one in found]
    costs = fit_costs(switches)
    for name, one in found:
        told = predicted_s(costs, one)
        print(
            f"{name:<24}",
            "  ".join(
                f"{phase} {told[phase]:5.2f} / {getattr(one, phase + '_s'):5.2f} s"
                for phase in ("prepare", "transfer", "verify")
            ),
        )
    errors = [abs(error) for error in left_out_errors(switches)]
    if errors:
        print(
            f"until it serves, by constants fitted to the others: wrong by "
            f"{statistics.median(errors):.0%} (median), {max(errors):.0%} (at most)"
        )
    text = yaml.safe_dump(costs_document(costs), sort_keys=False)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
