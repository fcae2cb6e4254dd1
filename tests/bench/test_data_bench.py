"""`bench data`: every case runs, its results are compared, and what one peer does costs no other side."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tokenmill.bench import data, data_peers, elastic, environments, turns
from tokenmill.bench.environments import NotMeasured, Peer, environment
from tokenmill.bench.turns import Bench, Case, Side
from tokenmill.data.packing import cut
from tokenmill.data.stream import TokenStream
from tokenmill.trainer.cli import main

GRAIN = """
def index_shuffle(i, *, max_index, seed, rounds):
    print("what a package prints is no answer")
    {body}
"""


def write_corpus(path: Path, rows: list[dict]) -> Path:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = np.random.default_rng(0)
    words = np.array(["fever", "of", "the", "knee,", "39.5", "patient.\n", "ache", "naïve", "日本", "and"])
    return [" ".join(draw.choice(words, 5 + 40 * i)) for i in range(30)]


def test_every_case_is_measured(tmp_path, texts, capsys):
    notes = write_corpus(tmp_path / "notes.jsonl.gz", [{"text": text} for text in texts])
    pages = write_corpus(tmp_path / "pages.jsonl.gz", [{"text": text} for text in texts[:5]])
    output = tmp_path / "out"
    command = ["bench", "data", "--rehearse", "--seconds", "0.01", str(notes), str(pages), "--output", str(output)]
    assert main(command) == 0
    assert (output / "data.png").read_bytes().startswith(b"\x89PNG")
    rows = [*csv.DictReader((output / "data.csv").read_text().splitlines())]
    found = {(row["case"], row["data"], row["what"]): row for row in rows}
    assert len(found) == len(rows)
    assert {(row["case"], row["data"]) for row in rows} == {
        *((case, name) for case in ("encoder", "prepare", "packing", "assembly") for name in ("notes", "pages")),
        ("permutation", "10^9"), ("packing", "2,000 log-normal lengths"), ("waiting", "notes"),
        ("resume", "50 samples"),
    }  # fmt: skip
    for row in rows:
        peer = row["what"] in {p.name for p in vars(environments).values() if isinstance(p, list) for p in p}
        assert (row["rate"] == "") == peer
        assert row["note"].startswith("not measured: name a folder") == peer
        assert row["date"] == rows[0]["date"]
        assert row["met"] == ""  # a rehearsal proves nothing
    for case in ("encoder", "prepare"):
        rival = found[case, "notes", "sentencepiece"]
        assert rival["note"] == "equal ids"
        assert float(rival["times"]) > 0
        assert rival["version"]
    assert found["prepare", "notes", "tokenmill prepare"]["note"] == "equal ids"
    assert found["packing", "notes", "tokenmill"]["note"] == "each document once"
    assert found["permutation", "10^9", "tokenmill"]["note"] == "each index once"
    assert found["permutation", "10^9", "tokenmill"]["target"] == ">= 40 M/s"
    assert "steps of" in found["waiting", "notes", "Prefetch"]["note"]
    assert "boundaries" in found["assembly", "notes", "tokenmill"]["note"]
    resumed = found["resume", "50 samples", "tokenmill"]
    assert (resumed["rate"], resumed["unit"], resumed["same"]) == ("9", "whole epochs of 9", "True")
    assert [resumed[key] for key in ("twice", "missed", "same steps", "same order")] == ["0", "0", "9", "9"]
    assert "assembly, pages, M tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "encode"], "--only encode: expected some of encoder, prepare, permutation"),
        (["--seconds", "0"], "--seconds 0: expected a positive number"),
        (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["a/notes.jsonl.gz", "b/notes.jsonl.gz"], "b/notes.jsonl.gz: another input is named 'notes' too"),
        (["chats.jsonl.gz"], "chats.jsonl.gz: holds conversations: expected plain documents"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_corpus(tmp_path / folder / "notes.jsonl.gz", [{"text": "a note"}])
    turn = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cold."}]
    write_corpus(tmp_path / "chats.jsonl.gz", [{"messages": turn}])
    assert main(["bench", "data", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tokenmill: error: {message}")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path / "work", tmp_path / "environments", seconds=0.01, small=True)


def install_grain(bench: Bench, body: str) -> None:
    """An environment that has a package grain 1.2, and numpy."""
    assert bench.environments is not None
    home = bench.environments / "grain"
    (home / "bin").mkdir(parents=True)
    (home / "grain").mkdir()
    (home / "grain-1.2.dist-info").mkdir()
    (home / "grain-1.2.dist-info" / "METADATA").write_text("Name: grain\nVersion: 1.2\n")
    (home / "grain" / "experimental.py").write_text(GRAIN.format(body=body))
    python = home / "bin" / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={home} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (home / "requirements.txt").write_text("".join(f"{line}\n" for line in environments.REQUIREMENTS["grain"]))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return max_index - i", "each index once"),
        ("return i // 2", "not an order: an index is missing"),
        ("raise RuntimeError('no such luck')", "not measured: RuntimeError: no such luck"),
        ("if i == 3 and max_index > 10**8: exit(3)", "not measured: its process ended with status 3: what a package"),
    ],
)
def test_a_peer_is_compared_and_costs_no_other(body, said, bench):
    install_grain(bench, body)
    ours, second, peer = data.permutation(bench)
    assert ours["rate"] > 0
    assert second["what"] == "tokenmill, of 10^12"
    assert peer["what"] == "grain"
    assert peer["note"].startswith(said)
    if "rate" in peer:
        assert peer["version"] == "1.2"
        assert peer["times"] == pytest.approx(ours["rate"] / peer["rate"])
        assert peer["times of the second"] == pytest.approx(second["rate"] / peer["rate"])


def test_a_peer_that_was_ended_between_turns_says_so(bench):
    install_grain(bench, "return i")
    (peer,) = environments.SHUFFLERS
    folder = bench.work / "grain"
    environments.write_facts(folder, {"indices": 9, "count": 9, "whole": 9})
    process = environments.Process(peer, bench.environments, folder)
    assert 0 < process() < 10
    process._process.kill()
    process._process.wait()
    with pytest.raises(NotMeasured, match="^its process ended with status -9: what a package prints"):
        process()
    process.close()


def test_a_peer_that_does_not_install_says_why(tmp_path, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, "pip" in command, "", "collecting\nERROR: No matching grain\n\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(NotMeasured, match="^does not install: ERROR: No matching grain$"):
        environment(tmp_path, "grain")
    assert not (tmp_path / "grain" / "requirements.txt").exists()  # so that it is tried again


def test_a_peer_that_is_lost_on_the_way_costs_no_other(bench):
    calls = []

    def lost() -> float:
        calls.append(1)
        if len(calls) == 7:
            raise NotMeasured("gone")
        return 0.01

    case = Case("case", "data", "M/s", [Side("tokenmill", lambda: 0.02, 3)], [Side("peer", lost, 1)])
    ours, peer = turns.measured(bench, case)
    assert ours["rate"] == 150
    assert ours["runs"] > 7
    assert peer["note"] == "not measured: gone"


def test_targets_are_judged_against_the_first_of_ours(tmp_path):
    ours = [Side("tokenmill", lambda: 0.2, 1), Side("tokenmill again", lambda: 0.1, 1)]
    rivals = [
        Side("slow", lambda: 1.0, 1),
        Side("quick", lambda: 0.9, 1),
        Side("wrong", lambda: 9.0, 1, {"same": False}),
    ]
    targets = {rival.name: turns.at_least(5) for rival in rivals}
    bench = Bench(tmp_path, None, seconds=0.01, small=False)
    case = Case("case", "data", "M/s", ours, rivals, [Peer("p", "grain", "grain", "grain")], tmp_path, targets=targets)
    rows = {row["what"]: row for row in turns.measured(bench, case)}
    assert (rows["slow"]["times"], rows["slow"]["times of the second"]) == (pytest.approx(5), pytest.approx(10))
    assert [rows[name].get("met") for name in ("tokenmill", "slow", "quick", "wrong")] == [None, True, False, False]
    text = turns.table([*rows.values()])
    assert "ours 5.0 (10.0) times as fast  target >= 5 times: met" in text
    assert "target >= 5 times: MISSED" in text


def test_without_matplotlib_the_table_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "data", "--rehearse", "--only", "resume", "--output", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"{tmp_path / 'data.csv'}; no data.png: ")
    assert last.endswith("(pip install matplotlib)")


def laid_out(*epochs: list[list[int]]) -> dict[str, np.ndarray]:
    """As a peer's process answers."""
    return data_peers.resumed(lambda *_: (epochs[0], None), {"plans": []}).result([*epochs])


def test_what_epochs_have_twice_or_not_at_all_is_said():
    alone = [[0, 2], [3, 1], [4]]
    found = elastic.judged(laid_out(alone, alone, [[2, 0], [1, 3], [4]], [[0, 2, 3], [1, 4]], [[0, 2], [0, 0], [4]]), 5)
    assert found == {"rate": 3, "same": False, "twice": 2, "missed": 2, "same steps": 2, "same order": 1}
    assert elastic.judged(laid_out(alone, alone, alone), 5)["same"]
    other = [[1, 0], [2, 3], [4]]  # each sample once, and yet not the run that was stopped
    assert not elastic.judged(laid_out(alone, other), 5)["same"]


def test_a_loader_of_another_project_over_the_matrix(tmp_path):
    pytest.importorskip("accelerate")
    plans = [[(1, None)], [(2, 2), (3, None)], [(3, 1), (2, 1), (1, None)]]
    facts = {"samples": 50, "step": 12, "plans": plans}
    for function, expected in ((data_peers.accelerate, (0, 20, 0, 2)), (data_peers.accelerate_uneven, (2, 0, 0, 2))):
        work = function(tmp_path, facts)
        found = elastic.judged(work.result(work.run()), 50)
        assert tuple(found[key] for key in ("rate", "twice", "missed", "same order")) == expected


def test_what_a_peer_gives_is_in_its_note(bench):
    install_grain(bench, "return i")
    (peer,) = environments.SHUFFLERS
    case = Case(
        "case", "data", "M/s", [Side("tokenmill", lambda: 0.02, 3)], (), [peer._replace(gives="half of it")],
        bench.work, lambda _: (1, {"note": "equal"}),
    )  # fmt: skip
    environments.write_facts(bench.work, {"indices": 9, "count": 9, "whole": 9})
    assert turns.measured(bench, case)[1]["note"] == "equal; half of it"


def test_a_wrong_packing_is_said():
    lengths = np.array([2000, 40, 8, 1024, 1024])
    good = np.array([2000, 40, 8, 1024, 1024])
    assert data._packs(lengths, good, np.array([3, 2])) == {
        "bins": 2, "padding": 0, "same": True, "note": "each document once",
    }  # fmt: skip
    for packed, counts in (
        (good, [2, 3]),
        (good[:3], [3]),
        ([2000, 40, 7, 1024, 1024], [3, 2]),
        (good, [5, 0]),
        (good, [3, 3]),
    ):
        said = data._packs(lengths, np.array(packed), np.array(counts))
        assert not said["same"]
        assert said["note"].startswith("not a packing")


def test_other_ids_are_said(tmp_path, texts):
    given = write_corpus(tmp_path / "notes.jsonl.gz", [{"text": text} for text in texts])
    corpus = data._corpus(str(given), data.Tokenizer.open("mistral-v1"), tmp_path)
    ids, lengths = corpus.ids
    assert data._same_ids(corpus, ids, lengths) == {"same": True, "note": "equal ids"}
    other = ids.copy()
    other[[0, 1, -1]] += 1
    assert data._same_ids(corpus, other, lengths) == {"same": False, "note": "other ids in 2 of 30 documents"}
    fewer = data._same_ids(corpus, ids[: lengths[:-1].sum()], lengths[:-1])
    assert fewer == {"same": False, "note": "29 documents of 30"}
    rows = data._predicted_once(corpus.stream)
    assert rows == int(cut(corpus.stream, data.SEQUENCE)[2].sum())


def test_a_loader_that_leaves_something_out_is_an_error(tmp_path, texts, monkeypatch):
    given = write_corpus(tmp_path / "notes.jsonl.gz", [{"text": text} for text in texts])
    corpus = data._corpus(str(given), data.Tokenizer.open("mistral-v1"), tmp_path)
    whole = data._loader
    monkeypatch.setattr(data, "_loader", lambda stream: [*whole(stream)][1:])
    with pytest.raises(ValueError, match="an epoch's targets are not the stream's tokens"):
        data._predicted_once(TokenStream.open(corpus.stream.folder))
