"""Sides that do the same work in turn on one core, as rows, a table, a CSV file and a plot: how `bench data` measures.

A row says a side's rate, which is of its median time; beside a peer's stands how many times as fast ours is.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.bench.environments import NotMeasured, Peer, Process
from tokenmill.data.files import replace_file

Row = dict[str, Any]
Arrays = Mapping[str, NDArray[Any]]

COLUMNS = (
    "date", "cpu", "load", "python", "case", "data", "what", "version", "rate", "unit", "seconds", "spread", "runs",
    "times", "times of the second", "bins", "padding", "twice", "missed", "same steps", "same order", "same", "target",
    "met", "note",
)  # fmt: skip
OURS = "tokenmill"
MET = {True: ": met", False: ": MISSED", None: ""}


@dataclass(frozen=True)
class Bench:
    """Where and how long to measure."""

    work: Path  # for what the sides write
    environments: Path | None  # of peers; None: none of them is measured
    seconds: float  # of turns, for a case
    small: bool  # a rehearsal: tiny sizes, and no target is judged


class Target(NamedTuple):
    text: str
    met: Callable[[Row], bool]


def at_least(times: float) -> Target:
    return Target(f">= {times:g} times", lambda row: row["times"] >= times)


@dataclass(frozen=True)
class Side:
    """One way to do a case's work."""

    name: str
    run: Callable[[], float]  # does it once; the seconds that it took
    work: float  # millions of the case's unit
    said: Row = field(default_factory=dict)  # what else its row holds; "same": whether its result is as it has to be


@dataclass(frozen=True)
class Case:
    """One piece of work, and who does it."""

    name: str
    data: str
    unit: str  # a million of which a second is a rate of 1
    ours: Sequence[Side]  # the first is what targets are of
    beside: Sequence[Side]  # peers in this process
    peers: Sequence[Peer] = ()
    folder: Path = Path()  # with the inputs of the peers' processes
    check: Callable[[Arrays], tuple[float, Row]] = lambda _: (0, {})  # a peer's result: its work, what its row says
    targets: Mapping[str, Target] = field(default_factory=dict)  # by a side's name


def clock(function: Callable[[], Any]) -> float:
    """Seconds of a call; what it returns is given back after that."""
    begin = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - begin
    del result
    return seconds


@contextmanager
def one_core() -> Iterator[None]:
    """This process and those that it starts share one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def in_turn(sides: Sequence[Side], seconds: float, least: int) -> dict[str, list[float] | NotMeasured]:
    """Seconds of each side's runs, of which a quick one has several in its turn."""
    times: dict[str, list[float] | NotMeasured] = {side.name: [] for side in sides}
    begin = time.perf_counter()
    turns = 0
    while turns < least or (time.perf_counter() - begin < seconds and turns < 30):
        turns += 1
        for side in sides:
            mine = times[side.name]
            try:
                for _ in range(5):
                    if isinstance(mine, NotMeasured):
                        break
                    mine.append(side.run())
                    if mine[-1] > 0.1:
                        break
            except NotMeasured as error:
                times[side.name] = error
    return times


def start(bench: Bench, peer: Peer, folder: Path) -> Process:
    """A peer at work on what is in a folder. Raises NotMeasured."""
    if bench.environments is None:
        raise NotMeasured("name a folder for its environment (--peers)")
    return Process(peer, bench.environments, folder)


def measured(bench: Bench, case: Case) -> list[Row]:
    """A row for each side: its rate, and how many times as fast ours is."""
    sides = [*case.ours, *case.beside]
    lost: dict[str, NotMeasured] = {}
    with one_core(), ExitStack() as stack:
        for peer in case.peers:
            try:
                process = start(bench, peer, case.folder)
                stack.callback(process.close)
                with np.load(process.result) as result:
                    work, said = case.check(result)
            except NotMeasured as error:
                lost[peer.name] = error
                continue
            note = "; ".join(text for text in (said.get("note"), peer.gives) if text)
            sides.append(Side(peer.name, process, work, {"version": process.version, **said, "note": note}))
        times = in_turn(sides, bench.seconds, 2 if bench.small else 3)
    rows = []
    about = {"case": case.name, "data": case.data, "unit": case.unit}
    for side in sides:
        mine = times[side.name]
        if isinstance(mine, NotMeasured):
            lost[side.name] = mine
            continue
        low, middle, high = quantiles(mine, n=4)
        row = {**about, "what": side.name, "rate": side.work / middle, "seconds": middle}
        rows.append(row | {"spread": (high - low) / middle, "runs": len(mine), **side.said})
    own, others = rows[: len(case.ours)], rows[len(case.ours) :]
    for row in others:
        for key, mine in zip(("times", "times of the second"), own, strict=False):
            row[key] = mine["rate"] / row["rate"]
    for row in rows:
        if target := case.targets.get(row["what"]):
            row |= {"target": target.text}
            if not bench.small:
                row["met"] = row.get("same", True) and target.met(row)
    rows += [{**about, "what": name, "note": f"not measured: {error}"} for name, error in lost.items()]
    return rows


def table(rows: Sequence[Row]) -> str:
    """A case's rows, aligned."""
    lines = [f"{rows[0]['case']}, {rows[0]['data']}, {rows[0]['unit']}"]
    for row in rows:
        cells = [f"  {row['what']:<34}", f"{row['rate']:10,.4g}" if "rate" in row else " " * 10]
        if "times" in row:
            second = f" ({row['times of the second']:.1f})" if "times of the second" in row else ""
            cells.append(f"ours {row['times']:.1f}{second} times as fast")
        if "bins" in row:
            cells.append(f"{row['bins']:,} bins, {row['padding']:.3%} padding")
        if "twice" in row:
            cells.append(
                f"{row['twice']:,} samples twice, {row['missed']:,} missed; {row['same steps']} with the same steps, "
                f"{row['same order']} in the same order"
            )
        cells += [row["note"]] if row.get("note") else []
        if "target" in row:
            cells.append(f"target {row['target']}" + MET[row.get("met")])
        lines.append("  ".join(cells))
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a side."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue())


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of rates, a panel a case. Raises ImportError where matplotlib is missing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if "rate" in row:
            panels.setdefault((row["case"], row["data"], row["unit"]), []).append(row)
    counts = [len(mine) for mine in panels.values()]
    figure = Figure(figsize=(9, 0.26 * sum(counts) + 0.75 * len(panels) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[n + 1 for n in counts])[:, 0]
    for ((case, data, unit), mine), axis in zip(panels.items(), axes, strict=True):
        colours = ["#4878a8" if row["what"].startswith((OURS, "Prefetch")) else "#b0b0b0" for row in mine]
        bars = axis.barh([row["what"] for row in mine], [row["rate"] for row in mine], color=colours)
        said = [f" {row['rate']:.3g}" + (f"  (ours {row['times']:.1f} x)" if "times" in row else "") for row in mine]
        axis.bar_label(bars, said, fontsize=7)
        axis.set_title(f"{case}, {data}, {unit}", loc="left", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.2)
    figure.suptitle(f"{rows[0]['cpu']}, one core, {rows[0]['date'][:10]}", fontsize=9)
    figure.savefig(path, dpi=120)
