"""Measurements as a table and a plot: what `tokenmill bench ops` and `tokenmill bench gpu` leave beside their JSON."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from tokenmill.bench.gpu import PACKAGES

# The columns of the table, of those that a row may have; after them one for each ratio, "of the copy" and the like.
COLUMNS = (
    "ms", "spread", "runs", "GB/s", "TFLOP/s", "backward TFLOP/s", "peak MiB", "saved MiB", "difference", "note",
    "target", "of ceiling",
)  # fmt: skip
ABOUT = ("date", "device", "torch", "triton", "cuda", "packages", "part", "what")
UNITS = {"GB/s": "copy", "TFLOP/s": "product"}  # the ceiling that a rate is a share of


def measurements(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A flat row for each timing of a visit's report, with the date, the device and the versions."""
    (machine,) = report["machine"]["rows"]
    about = {"date": report["date"]} | {key: machine.get(key) for key in ("device", "torch", "triton", "cuda")}
    about["packages"] = " ".join(f"{name}-{machine[name]}" for name in PACKAGES if machine.get(name))
    timings = {
        name.rpartition(":")[2]: [row for row in part.get("rows", []) if isinstance(row.get("ms"), float)]
        for name, part in report["parts"].items()
    }
    ceilings = {
        unit: row[unit]
        for unit, name in UNITS.items()
        for row in timings.get("ceilings", [])
        if row["what"].startswith(name)
    }
    result = []
    for part, rows in timings.items():
        for row in rows:
            flat = {**about, "part": part, "what": row["what"]}
            flat |= {key: value for key, value in row.items() if key in COLUMNS or key.startswith("of ")}
            for unit in UNITS:
                if unit in row and unit in ceilings:
                    flat["of ceiling"] = row[unit] / ceilings[unit]
            result.append(flat)
    return result


def write_csv(report: dict[str, Any], path: Path) -> None:
    """One line a timing."""
    rows = measurements(report)
    with path.open("w", newline="") as file:
        columns = dict.fromkeys([*ABOUT, *COLUMNS, *(key for row in rows for key in row)])
        writer = csv.DictWriter(file, [*columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of milliseconds, a panel a part. Raises ImportError where matplotlib is missing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = measurements(report)
    parts = list(dict.fromkeys(row["part"] for row in rows))
    counts = [sum(row["part"] == part for row in rows) for part in parts]
    figure = Figure(figsize=(9, 0.26 * sum(counts) + 0.9 * len(parts)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=[n + 1 for n in counts])[:, 0]
    for part, axis in zip(parts, axes, strict=True):
        mine = [row for row in rows if row["part"] == part]
        bars = axis.barh([row["what"] for row in mine], [row["ms"] for row in mine], color="#4878a8")
        axis.bar_label(bars, [f" {row['ms']:.3g}" for row in mine], fontsize=7)
        axis.set_title(part, loc="left", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.12)
    axes[-1].set_xlabel("ms, median")
    device = rows[0]["device"] if rows else ""
    figure.suptitle(f"{device}, torch {report['machine']['rows'][0]['torch']}, {report['date'][:10]}", fontsize=9)
    figure.savefig(path, dpi=120)
