"""What the demo shows at its end: one table, and three plots of the stages' metrics."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]  # of one stage, as its metrics.jsonl holds them
SOURCE_COLOURS = ("#d1495b", "#00798c", "#edae49", "#6a4c93")
TRAINING_COLOUR = "#5c677d"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table whose columns are also aligned as plain text, a row a stage.

    A row holds `stage`, `losses` (nats a token, by validation stream, the same streams in each row), `score` (the
    fields of an `evaluate.score.Score`) and `tokens_per_second`.
    """
    streams = list(rows[0]["losses"])
    head = ["stage", *(f"{_source(s)} loss" for s in streams), "accuracy (95 % interval)", "chance", "tokens/s"]
    cells = [head]
    for row in rows:
        score = row["score"]
        accuracy = f"{score['accuracy']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
        losses = ["-" if (loss := row["losses"][s]) is None else f"{loss:.3f}" for s in streams]
        cells.append([row["stage"], *losses, accuracy, f"{score['chance']:.3f}", f"{row['tokens_per_second']:,.0f}"])
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        numbers = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        return f"| {' | '.join([row[0].ljust(widths[0]), *numbers])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
    return "\n".join([line(cells[0]), f"|{rule}|", *map(line, cells[1:])])


def plots(records_by_stage: Mapping[str, Records], folder: Path) -> list[Path]:
    """Draw loss.png, throughput.png and, where there are experts, expert_load.png into `folder`; return their paths.

    A panel a stage, in the order given; stages may branch, so each counts its own tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"loss.png": _loss(records_by_stage), "throughput.png": _throughput(records_by_stage)}
    if any(record.get("expert_load") for records in records_by_stage.values() for record in records):
        figures["expert_load.png"] = _expert_load(records_by_stage)
    for name, figure in figures.items():
        FigureCanvasAgg(figure).print_figure(folder / name, dpi=120)
    return [folder / name for name in figures]


def _source(stream: str) -> str:
    """`clinical_heldout` -> `clinical`: who reads "validation" or a column of the table knows that it is held out."""
    return stream.removesuffix("_heldout")


def _column(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Thousands of tokens seen, and the values of `key`, over the records that have it."""
    having = [record for record in records if record.get(key) is not None]
    return np.array([r["tokens"] for r in having]) / 1e3, np.array([r[key] for r in having], dtype=float)


def _panels(stages: Mapping[str, Records], title: str, ylabel: str) -> tuple[Figure, list[Axes]]:
    """One panel a stage, side by side, with a common y axis."""
    figure = Figure(figsize=(1.2 + 2.9 * len(stages), 4.0), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(stages), sharey=True, squeeze=False)[0])
    figure.suptitle(title, fontweight="bold")
    for panel, stage in zip(axes, stages, strict=True):
        panel.set_title(stage, fontsize=10)
        panel.set_xlabel("tokens seen (thousands)")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(ylabel)
    return figure, axes


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over about a tenth of the stage, narrower at both ends."""
    width = max(1, len(values) // 20)
    return np.array([values[max(0, i - width) : i + width + 1].mean() for i in range(len(values))])


def _loss(stages: Mapping[str, Records]) -> Figure:
    figure, axes = _panels(stages, "Loss: training, and validation by source", "loss (nats a token)")
    sources = sorted({s for records in stages.values() for record in records for s in record.get("validation", ())})
    for panel, records in zip(axes, stages.values(), strict=True):
        tokens, loss = _column(records, "loss")
        panel.plot(tokens, loss, color=TRAINING_COLOUR, alpha=0.3, linewidth=0.8)
        panel.plot(tokens, _smooth(loss), color=TRAINING_COLOUR, linewidth=1.8, label="training (running mean)")
        for source, colour in zip(sources, cycle(SOURCE_COLOURS), strict=False):
            measured = [r for r in records if source in r.get("validation", ())]
            x = [r["tokens"] / 1e3 for r in measured]
            y = [r["validation"][source] for r in measured]
            label = f"validation: {_source(source)}"
            panel.plot(x, y, marker="o", markersize=4, color=colour, linewidth=1.4, label=label)
    _legend(figure, axes)
    return figure


def _throughput(stages: Mapping[str, Records]) -> Figure:
    figure, axes = _panels(stages, "Throughput of training", "tokens a second (thousands)")
    for panel, records in zip(axes, stages.values(), strict=True):
        tokens, speed = _column(records, "tokens_per_second")
        panel.plot(tokens, speed / 1e3, color="#00798c", linewidth=1.0, label="each step")
        if len(speed):
            middle = statistics.median(speed)
            panel.axhline(middle / 1e3, color="#d1495b", linestyle="--", linewidth=1.4, label="median of the stage")
            panel.set_title(f"{panel.get_title()}\nmedian {middle:,.0f}", fontsize=10)
    axes[0].set_ylim(bottom=0)
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for panel in axes:
        handles, labels = panel.get_legend_handles_labels()
        entries |= zip(labels, handles, strict=True)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries), frameon=False)


def _expert_load(stages: Mapping[str, Records]) -> Figure:
    """A row a layer, a column a stage: each expert's share of the assignments, relative to an equal share."""
    routed = {stage: [r for r in records if r.get("expert_load")] for stage, records in stages.items()}
    routed = {stage: records for stage, records in routed.items() if records}
    loads = [np.array([r["expert_load"] for r in records]) for records in routed.values()]  # (steps, layers, experts)
    layers, experts = loads[0].shape[1:]
    size = (1.6 + 2.7 * len(routed), 1.2 + max(1.0, 0.14 * experts + 0.5) * layers)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(layers, len(routed), sharex="col", sharey=True, squeeze=False)
    figure.suptitle("Expert load: share of choices, relative to an equal share", fontweight="bold")
    figure.supxlabel("tokens seen in the stage (thousands)", fontsize=10)
    colours = ScalarMappable(Normalize(0, 2), "RdBu_r")
    for column, (stage, records) in enumerate(routed.items()):
        axes[0, column].set_title(stage, fontsize=10)
        extent = (0, records[-1]["tokens"] / 1e3, -0.5, experts - 0.5)
        for panel, shares in zip(axes[:, column], np.moveaxis(loads[column], 0, 2), strict=True):  # (experts, steps)
            picture = colours.to_rgba(shares * experts)
            panel.imshow(picture, aspect="auto", origin="lower", interpolation="nearest", extent=extent)
    for layer in range(layers):
        axes[layer, 0].set_ylabel(f"layer {layer}\nexpert", fontsize=9)
        axes[layer, 0].set_yticks(range(experts) if experts <= 8 else [0, experts // 2, experts - 1])
    bar = figure.colorbar(colours, ax=axes, extend="max", aspect=40, pad=0.01, ticks=[0, 0.5, 1, 1.5, 2])
    bar.set_ticklabels(["idle", "0.5", "1 = equal", "1.5", "2 or more"])
    return figure
