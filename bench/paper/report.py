"""What the experiment shows: report.md with its tables, three figures, and results.json with every number in them.

Nothing in them depends on time or place, so the same experiment twice gives the same files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tokenmill.bench.paper.expectations import NEAR, Expectation, expectations
from tokenmill.bench.paper.experiment import ARMS
from tokenmill.bench.paper.intervals import Draws
from tokenmill.data.files import replace_file
from tokenmill.trainer.evaluate.metrics import Estimate
from tokenmill.trainer.evaluate.strategies import STRATEGIES

CHANCE = 0.25
ZERO_SHOT = "zero-shot"
COLOURS = ("#5c677d", "#00798c", "#edae49", "#d1495b", "#6a4c93", "#3a7d44")


class Results:
    """What all seeds found, and how sure it is."""

    def __init__(self, by_seed: Mapping[int, Any]) -> None:
        """`by_seed` holds `experiment.results` of each seed."""
        self.seeds = list(by_seed)
        self.runs = list(by_seed.values())
        self.hops = np.array(self.runs[0]["hops"])
        self.arms = list(self.runs[0]["arms"])
        self._draws = Draws(len(self.seeds), self.hops)
        self._people = Draws(len(self.seeds), np.zeros(len(self.runs[0]["arms"]["base"]["people"])))

    def correct(self, arm: str, strategy: str) -> NDArray[np.float64]:
        """(seeds, questions)"""
        return np.array([run["arms"][arm]["correct"][strategy] for run in self.runs], np.float64)

    def accuracy(self, arm: str, strategy: str = ZERO_SHOT, hops: Sequence[int] = (1, 2)) -> Estimate:
        return self._draws.mean(self.correct(arm, strategy), np.isin(self.hops, hops))

    def difference(self, expectation: Expectation) -> Estimate:
        values = self.correct(*expectation.arm) - self.correct(*expectation.than)
        return self._draws.mean(values, np.isin(self.hops, expectation.hops))

    def people(self, arm: str) -> Estimate:
        return self._people.mean([run["arms"][arm]["people"] for run in self.runs])

    def loss(self, arm: str, half: str) -> float:
        return float(np.mean([run["arms"][arm]["losses"][half] for run in self.runs]))

    def tokens(self, arm: str) -> float:
        return float(np.mean([run["arms"][arm]["cpt_tokens"] for run in self.runs]))

    @property
    def chains(self) -> list[str]:
        """The strategies whose answers are chains of thought."""
        return list(self.runs[0]["arms"]["base"]["concluded"])

    def concluded(self, arm: str, strategy: str = "chain-of-thought") -> NDArray[np.float64]:
        """(seeds, questions): the share of a question's chains that came to one of the options by themselves."""
        return np.array([run["arms"][arm]["concluded"][strategy] for run in self.runs], np.float64)

    def shots(self, arm: str, strategy: str) -> float:
        return float(np.mean([run["arms"][arm]["shots"][strategy] for run in self.runs]))

    def noise(self, of: str) -> float:
        return float(np.mean([run["noise"][of] for run in self.runs]))

    @property
    def curve(self) -> tuple[list[str], list[str]]:
        """The arms at growing CPT tokens, not tuned and tuned; the first of each has none."""
        of = [arm for arm in self.arms if self.runs[0]["arms"][arm]["cpt_tokens"] is not None]
        ordered = sorted(of, key=self.tokens)
        tuned = [arm for arm in ordered if "tuned" in arm]
        return [arm for arm in ordered if arm not in tuned], tuned

    @property
    def expectations(self) -> list[tuple[Expectation, Estimate]]:
        untuned, tuned = self.curve
        return [(e, self.difference(e)) for e in expectations(untuned[1], tuned[1])]


def write(folder: Path, by_seed: Mapping[int, Any], about: str) -> str:
    """Write report.md, results.json and the figures into `folder`; returns the report. `about` says what was run."""
    found = Results(by_seed)
    figures = {
        "accuracy_by_tokens.png": _by_tokens(found),
        "losses.png": _losses(found),
        "strategies.png": _strategies(found),
    }
    for name, figure in figures.items():
        FigureCanvasAgg(figure).print_figure(folder / name, dpi=120)
    text = page(found, about)
    replace_file(folder / "report.md", text)
    replace_file(folder / "results.json", json.dumps(_numbers(found), indent=1) + "\n")
    return text


def page(found: Results, about: str) -> str:
    counts = {hops: int((found.hops == hops).sum()) for hops in (1, 2)}
    seeds, others = "one seed", "questions\n(a bootstrap over them), which say nothing of other seeds"
    if len(found.seeds) > 1:
        seeds = f"{len(found.seeds)} seeds"
        others = "seeds and other\nquestions (a bootstrap over both); with few seeds they are somewhat too narrow"
    return f"""# What continued pre-training adds to tuning: a closed world

{about}

Accuracies are means over {seeds}, with {counts[1]} questions of one hop and {counts[2]} of two each, about
diseases that no tuning question is about; chance is {CHANCE}. In brackets are 95 % intervals for other {others}.

## Expected, and what came of it

Expectations were written down before these seeds were run (`bench/paper/expectations.py`); "near" is within {NEAR} of
accuracy, "clearly" more than {NEAR}. One has come where the interval lies within what was expected, has not where it
lies outside, and is open where it reaches both.

{_markdown(["expected", "difference", "measured", "outcome"], [_expected(*pair) for pair in found.expectations])}

## The arms, zero-shot

{_markdown(["arm", "one hop", "two hops", "people not asked about", "clinical loss", "general loss"], _arms(found))}

"People not asked about" are of the general half of the world: what remains of what the base knew. Losses are nats a
token on documents not trained on. `base` and `cpt` are asked in plain text, as the general text asks; the tuned arms by
the template that they were tuned with. NEFTune's noise in `cpt-neftune` has a root mean square of
{found.noise("noise"):.3f}, the embeddings that it is added to one of {found.noise("embeddings"):.3f}.

## Strategies

Questions of one hop:

{_markdown(["arm", *STRATEGIES], _by_strategy(found, 1))}

Questions of two hops:

{_markdown(["arm", *STRATEGIES], _by_strategy(found, 2))}

A chain of thought may come to a value that is none of the options, or to nothing. Then the likeliest letter is taken,
which is a guess: the texts of this world answer in words, never by a letter. So by arm, of the single chains of
`chain-of-thought`: the share that came to an option by themselves, how many of these were right, how many of the same
questions zero-shot was right on, and how many of the guesses were right; and how many shots MedPrompt had in the mean,
for which the model's own chains must be right.

{_markdown(CHAINS, _chains(found))}

![strategies](strategies.png)

## Accuracy by tokens of continued pre-training

Zero-shot, questions of one hop and of two:

{_markdown(["CPT tokens", "not tuned", "tuned"], _curve(found))}

![accuracy by tokens](accuracy_by_tokens.png)

## Loss on general and clinical text

![losses](losses.png)
"""


def _expected(expectation: Expectation, difference: Estimate) -> list[str]:
    names = [f"{arm} {strategy}" for arm, strategy in (expectation.arm, expectation.than)]
    return [expectation.text, " - ".join(names), str(difference), expectation.outcome(difference)]


def _arms(found: Results) -> list[list[str]]:
    return [
        [
            arm,
            *(str(found.accuracy(arm, hops=[hops])) for hops in (1, 2)),
            str(found.people(arm)),
            *(f"{found.loss(arm, half):.3f}" for half in ("clinical", "general")),
        ]
        for arm in ARMS
    ]


def _by_strategy(found: Results, hops: int) -> list[list[str]]:
    return [[arm, *(str(found.accuracy(arm, strategy, [hops])) for strategy in STRATEGIES)] for arm in ARMS]


CHAINS = ["arm", "came to an option", "of these right", "zero-shot on the same", "guesses right", "MedPrompt's shots"]


def _chains(found: Results) -> list[list[str]]:
    def share(right: NDArray[np.float64]) -> str:
        return f"{right.mean():.3f}" if right.size else "-"

    rows = []
    for arm in ARMS:
        came, right = found.concluded(arm) == 1, found.correct(arm, "chain-of-thought")
        shares = [came.astype(float), right[came], found.correct(arm, ZERO_SHOT)[came], right[~came]]
        rows.append([arm, *map(share, shares), f"{found.shots(arm, 'medprompt'):.2f}"])
    return rows


def _curve(found: Results) -> list[list[str]]:
    return [
        [f"{found.tokens(untuned):,.0f}", str(found.accuracy(untuned)), str(found.accuracy(tuned))]
        for untuned, tuned in zip(*found.curve, strict=True)
    ]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are also aligned as plain text."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))} |"

    return "\n".join([line(head), f"|{'|'.join('-' * (width + 2) for width in widths)}|", *map(line, rows)])


def _numbers(found: Results) -> dict[str, Any]:
    arms: dict[str, Any] = {}
    for arm in found.arms:
        strategies = found.runs[0]["arms"][arm]["correct"]
        accuracy = {
            strategy: {
                name: asdict(found.accuracy(arm, strategy, hops))
                for name, hops in {"all": (1, 2), "one hop": (1,), "two hops": (2,)}.items()
            }
            | {"seeds": found.correct(arm, strategy).mean(1).tolist()}
            for strategy in strategies
        }
        arms[arm] = {
            "cpt_tokens": [run["arms"][arm]["cpt_tokens"] for run in found.runs],
            "losses": {half: [run["arms"][arm]["losses"][half] for run in found.runs] for half in HALVES},
            "people": asdict(found.people(arm)),
            "accuracy": accuracy,
            "concluded": {s: float(found.concluded(arm, s).mean()) for s in found.chains if s in strategies},
        }
    expected = [
        {"expected": e.text, "difference": asdict(difference), "outcome": e.outcome(difference)}
        for e, difference in found.expectations
    ]
    return {"seeds": found.seeds, "chance": CHANCE, "expectations": expected, "arms": arms}


HALVES = ("clinical", "general")


def _axes(figure: Figure, panels: int) -> list[Axes]:
    axes: list[Axes] = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return axes


def _by_tokens(found: Results) -> Figure:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    (panel,) = _axes(figure, 1)
    for arms, label, colour in zip(found.curve, ("not tuned", "tuned"), ("#5c677d", "#d1495b"), strict=True):
        estimates = [found.accuracy(arm) for arm in arms]
        tokens = [found.tokens(arm) / 1e6 for arm in arms]
        panel.plot(tokens, [e.value for e in estimates], marker="o", color=colour, label=label)
        panel.fill_between(tokens, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.15)
    panel.axhline(CHANCE, color="black", linewidth=0.8, linestyle=":", label="chance")
    panel.set_xlabel("tokens of continued pre-training (millions)")
    panel.set_ylabel("zero-shot accuracy (95 % interval)")
    panel.set_title("Accuracy by tokens of continued pre-training", fontweight="bold")
    panel.legend(frameon=False)
    return figure


def _losses(found: Results) -> Figure:
    """Of the general base's training and the continued one after it, a line a seed."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    figure.suptitle("Loss on held-out text of both halves (a line a seed)", fontweight="bold")
    for panel, stage in zip(_axes(figure, 2), ("base", "cpt"), strict=True):
        for half, colour in zip(HALVES, ("#d1495b", "#00798c"), strict=True):
            for i, run in enumerate(found.runs):
                points = run["validation"][stage]
                x, y = [p["tokens"] / 1e6 for p in points], [p[half] for p in points]
                panel.plot(x, y, marker="o", markersize=3, color=colour, alpha=0.7, label=half if i == 0 else None)
        panel.set_title({"base": "general base", "cpt": "continued pre-training"}[stage], fontsize=10)
        panel.set_xlabel("tokens of the stage (millions)")
        panel.set_yscale("log")
        panel.set_ylabel("loss (nats a token)")
        panel.legend(frameon=False)
    return figure


def _strategies(found: Results) -> Figure:
    figure = Figure(figsize=(11.0, 7.0), layout="constrained")
    figure.suptitle("Accuracy by arm and strategy (95 % intervals)", fontweight="bold")
    rows = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(ARMS)
    for panel, hops in zip(rows, (1, 2), strict=True):
        for i, (arm, colour) in enumerate(zip(ARMS, COLOURS, strict=True)):
            estimates = [found.accuracy(arm, strategy, [hops]) for strategy in STRATEGIES]
            values = np.array([e.value for e in estimates])
            errors = np.abs(np.array([[e.low for e in estimates], [e.high for e in estimates]]) - values)
            places = np.arange(len(STRATEGIES)) + (i - (len(ARMS) - 1) / 2) * width
            panel.bar(places, values, width * 0.9, color=colour, yerr=errors, error_kw={"linewidth": 0.8}, label=arm)
        panel.axhline(CHANCE, color="black", linewidth=0.8, linestyle=":")
        panel.set_ylim(0, 1)
        panel.set_ylabel("one hop" if hops == 1 else "two hops")
        panel.spines[["top", "right"]].set_visible(False)
    rows[-1].set_xticks(range(len(STRATEGIES)), STRATEGIES)
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS), frameon=False)
    return figure
