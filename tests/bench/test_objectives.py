"""Ways of training side by side: the same tokens and weights, the same losses as TRL's where it is there."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from tokenmill.bench import objectives, step
from tokenmill.bench.objectives import WAYS, Plan, compare, draw_pairs, table
from tokenmill.bench.step import OURS
from tokenmill.trainer.cli import main
from tokenmill.trainer.config import OptimizerSection
from tokenmill.trainer.model import ModelConfig, MoEConfig, Transformer

TRL = all(importlib.util.find_spec(name) for name in ("trl", "peft"))
SLOW = OptimizerSection(1e-3)


def tiny(experts: int | None) -> Transformer:
    moe = MoEConfig(experts) if experts else None
    model = Transformer(ModelConfig(32, 1, 4, 2, 8, 48, 61, sliding_window=6, moe=moe))
    model.initialise(0)
    return model


@pytest.mark.filterwarnings("ignore")  # what transformers and TRL warn of is their own
@pytest.mark.parametrize(
    ("experts", "precision", "names", "apart"),
    [(None, "fp32", WAYS, 1e-5), (3, "fp32", ("cpt", "dpo"), 1e-5), (3, "fp32", ("lora",), 2e-4),
     (None, "bf16-mixed", ("dpo",), 0.02)],
)  # fmt: skip
def test_all_sides_take_the_same_steps(experts, precision, names, apart):
    ways = [way for name in names for way in WAYS[name]]
    rows = compare(tiny(experts), draw_pairs(3, 2, 61, (5, 9), (2, 8)), ways, SLOW, 1, precision=precision, warmup=1)
    of = {(row["what"], row["side"]): row for row in rows}
    assert [what for what, side in of if side == OURS] == [way.name for way in ways]
    ours = {what: row for (what, side), row in of.items() if side == OURS}
    if "dpo" in names:
        assert ours["dpo"]["losses"][0] == pytest.approx(math.log(2), abs=1e-3)
    if "qlora" in names:  # adapters begin at nothing, and noise does not
        assert ours["lora"]["losses"][0] == pytest.approx(ours["sft"]["losses"][0], abs=1e-6)
        assert ours["sft, NEFTune"]["losses"][0] != pytest.approx(ours["sft"]["losses"][0], abs=1e-6)
        assert ours["lora"]["losses"][-1] != pytest.approx(ours["sft"]["losses"][-1], abs=1e-4)
        assert ours["qlora"]["MiB"] < ours["lora"]["MiB"]
    for row in ours.values():
        for other in {"cpt", "sft"} & {*ours}:
            assert row[f"x {other}"] == pytest.approx(row["tokens/s"] / ours[other]["tokens/s"])
            assert row[f"MiB x {other}"] == pytest.approx(row["MiB"] / ours[other]["MiB"])
    theirs = [row for row in rows if row["side"] != OURS]
    if not TRL:
        assert all("is not installed (pip install" in row["note"] for row in theirs if row["what"] != "qlora")
        return
    assert {(row["what"], row["side"]) for row in theirs if "note" not in row} == {
        (way.name, f"TRL, {packing}")
        for way in ways
        for packing in ("padded", "packed")
        if way.name != "qlora" and (way.name, packing) != ("dpo", "packed")
    }
    for row in theirs:
        if "note" not in row and row["what"] != "sft, NEFTune":
            assert row["apart"] < apart, row


def test_every_way_has_the_same_rows(tmp_path):
    pairs = draw_pairs(2, 5, 61, (1, 9), (1, 8))
    plan = Plan(tmp_path, pairs, SLOW, "none", "cpu", "fp32")
    plain, masked = objectives._documents(plan, masked=False), objectives._documents(plan, masked=True)
    for (cpt, _), (sft, weight), (dpo, number), of_step in zip(
        plain, masked, objectives._preferences(plan), pairs, strict=True
    ):
        assert torch.equal(cpt.tokens, sft.tokens)
        assert len(cpt.tokens) == len(dpo.tokens) == sum(len(p) - 1 + len(c) + len(r) for p, c, r in of_step)
        answers = sum(len(c) + len(r) - (len(p) == 1) for p, c, r in of_step)  # a document's first token is no target
        assert weight == len(sft.target_rows) == answers
        assert len(dpo.target_rows) == sum(len(c) + len(r) for _, c, r in of_step)
        assert number == 5
    ids = [batch.layout.document_ids[::3].tolist() for batch, _ in objectives._preferences(plan)]
    assert ids == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_peak_counts_the_model_and_what_lives_at_once():
    model = torch.nn.Linear(1000, 10, bias=False)

    def run() -> step.Steps:
        a = torch.empty(1000, 250)
        b = a + 1
        del a
        c = torch.empty(1000, 100)
        return [(float(b.shape[0]), float(c.shape[0]))]

    steps, peak = objectives._peak_on_cpu(run, model)
    assert steps == [(1000.0, 1000.0)]
    assert peak == pytest.approx(4 * (10_000 + 2 * 250_000), abs=1000)


def test_targets_are_judged():
    def row(what, rate, mebibytes):
        return {"what": what, "side": OURS, "tokens/s": rate, "spread": 0.1, "MiB": mebibytes, "losses": [1.0]}

    rows = [row("cpt", 100.0, 50.0), row("sft", 110.0, 40.0), row("sft, NEFTune", 96.0, 40.0), row("dpo", 100.0, 43.0)]
    rows.append(row("dpo", 25.0, 90.0) | {"side": "TRL, padded", "losses": [1.5]})
    text = table(objectives._related(rows))
    assert "sft, NEFTune 0.96 of cpt, target 0.95: met" in text
    assert "dpo 0.91 of sft, target 0.85: met; stretch 0.90 at 1.1 of its memory, here 1.07: met" in text
    assert "ours 4.00 times as fast, losses within 5.0e-01" in text
    text = table(objectives._related([row("sft", 100.0, 40.0), row("dpo", 95.0, 46.0)]))
    assert "target 0.85: met; stretch 0.90 at 1.1 of its memory, here 1.15: not reached" in text
    rows = [row("sft", 100.0, 40.0), row("dpo", 84.0, 43.0), {"what": "dpo", "side": "TRL", "note": "not measured: no"}]
    text = table(objectives._related(rows[:2]) + rows[2:])
    assert "dpo 0.84 of sft, target 0.85: MISSED; stretch 0.90 at 1.1 of its memory, here 1.07: not reached" in text
    assert "TRL             not measured: no" in text


def test_an_unknown_objective_is_named(capsys):
    for wrong, named in (("fpo", "fpo"), ("cpt,", ""), ("", "")):
        assert main(["bench", "step", "--objective", wrong]) == 1
        expected = f"--objective: '{named}' is unknown; expected some of cpt,sft,dpo,lora,qlora"
        assert capsys.readouterr().err == f"tokenmill: error: {expected}\n"
