"""The profiler: the kinds add up to the step, products are counted where they belong, and the run is left alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tokenmill.data.prefetch import Prefetch
from tokenmill.trainer.profile import KINDS, TOLERANCE, KindRow, Profile, profile, table
from tokenmill.trainer.trace import SCOPE, WINDOW, Gemm, account

STEPS, MICRO_BATCHES, LAYERS = 3, 2, 2  # the last two are the tiny recipe's


def test_profile_of_a_recipe(make_recipe, tmp_path):
    recipe = make_recipe()
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("an earlier run's\n")
    loading = Prefetch.__next__
    text = profile(recipe, tmp_path / "profile", steps=STEPS, warmup=1)

    assert [p.name for p in run.iterdir()] == ["metrics.jsonl"]
    assert (run / "metrics.jsonl").read_text() == "an earlier run's\n"
    assert Prefetch.__next__ is loading
    assert json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    found = json.loads((tmp_path / "profile" / "profile.json").read_text())
    times = {row["kind"]: row["ms"] for row in found["kinds"]}
    assert list(times) == list(KINDS)
    assert all(ms > 0 for kind, ms in times.items() if kind != "communication")
    assert sum(times.values()) == pytest.approx(found["step_ms"], rel=TOLERANCE)
    assert all(kind in text for kind in KINDS)
    assert "the rows miss something" not in text

    rows = [(Gemm(**row["gemm"]), row["calls"]) for row in found["gemms"]]
    # Of qkv, 32 -> 64: forward, the gradient of its input, the gradient of its weight.
    for fixed in [dict(n=64, k=32), dict(n=32, k=64), dict(m=64, n=32)]:
        calls = [c for g, c in rows if g.kind == "gemm" and fixed.items() <= vars(g).items()]
        assert sum(calls) == STEPS * MICRO_BATCHES * LAYERS, fixed
    # Only the head has 320 columns, only experts 48 or 96; backward, too, they are where they belong.
    assert {g.kind for g, _ in rows if 320 in (g.m, g.n, g.k)} == {"loss"}
    assert {g.kind for g, _ in rows if {48, 96} & {g.m, g.n, g.k} and 32 in (g.m, g.n, g.k)} >= {"experts"}
    assert sum(c for g, c in rows if g.kind == "loss") == STEPS * MICRO_BATCHES * 3
    for kind in ("attention", "experts", "loss"):
        assert sum(row["peak_mib"] for row in found["kinds"] if row["kind"] == kind) > 0


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_is_computed_again_counts_where_it_belongs(make_recipe, tmp_path, mode):
    """Recomputation ends in the midst of a module, by an exception, and runs under a mode that sees every operator."""
    text = profile(make_recipe(f"--train.recompute={mode}"), tmp_path / "profile", steps=2, warmup=1)
    found = json.loads((tmp_path / "profile" / "profile.json").read_text())
    times = {row["kind"]: row["ms"] for row in found["kinds"]}
    assert all(ms > 0 for kind, ms in times.items() if kind != "communication")
    assert sum(times.values()) == pytest.approx(found["step_ms"], rel=TOLERANCE)
    assert "do not trust" not in text
    rows = [(Gemm(**row["gemm"]), row["calls"]) for row in found["gemms"]]
    # Of qkv, 32 -> 64: forward, again if nothing of a block is kept, the gradient of its input.
    assert sum(c for g, c in rows if (g.n, g.k) == (64, 32)) == 2 * MICRO_BATCHES * LAYERS * (1 + (mode == "full"))
    assert {g.kind for g, _ in rows if (g.n, g.k) == (64, 32)} == {"gemm"}
    assert {g.kind for g, _ in rows if 320 in (g.m, g.n, g.k)} == {"loss"}
    assert times["optimizer"] < 0.5 * times["experts"]  # nothing lingers beyond the backward pass


def test_communication_of_a_sharded_model(make_recipe, tmp_path):
    """One process, but FSDP all the same: its copies and collectives, which a model that is not sharded lacks."""
    profile(make_recipe("--device=cpu"), tmp_path / "whole", steps=2, warmup=1)
    profile(make_recipe("--device=cpu", "--train.precision=bf16-mixed"), tmp_path / "sharded", steps=2, warmup=1)
    share = {}
    for name in ("whole", "sharded"):
        found = json.loads((tmp_path / name / "profile.json").read_text())
        times = {row["kind"]: row["ms"] for row in found["kinds"]}
        assert sum(times.values()) == pytest.approx(found["step_ms"], rel=TOLERANCE)
        share[name] = times["communication"] / found["step_ms"]
    assert share["whole"] < 0.02
    assert share["sharded"] > 10 * share["whole"]


@pytest.mark.slow
def test_two_processes(make_recipe, tmp_path):
    make_recipe()  # writes recipe.toml
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\n"
        "from tokenmill.trainer.config import load_recipe\n"
        "from tokenmill.trainer.profile import profile\n"
        "recipe = load_recipe(sys.argv[1], ['--device=cpu', '--output=' + sys.argv[2] + '/run'])\n"
        "print(profile(recipe, pathlib.Path(sys.argv[2]) / 'profile', steps=2, warmup=1))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path / "recipe.toml"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.count("profile of 2 steps on cpu, rank 0 of 2") == 1
    found = json.loads((tmp_path / "profile" / "profile.json").read_text())
    times = {row["kind"]: row["ms"] for row in found["kinds"]}
    assert sum(times.values()) == pytest.approx(found["step_ms"], rel=TOLERANCE)
    assert times["communication"] > 0.1 * found["step_ms"]
    assert sum(row["calls"] for row in found["gemms"] if row["gemm"]["kind"] == "loss") == 2 * 3  # of one micro-batch


def test_bad_input_is_named(make_recipe, tmp_path):
    with pytest.raises(ValueError, match="steps and warmup must be at least 1, got 0 and 2"):
        profile(make_recipe(), tmp_path / "profile", steps=0)
    with pytest.raises(ValueError, match="lies in the run's own folder"):
        profile(make_recipe(), tmp_path / "run" / "profile")
    with pytest.raises(ValueError, match="has no scope called tokenmill.profile"):
        account({"traceEvents": []}, "cpu")


def host(name, begin, end, thread=1, cat="cpu_op", args=None):
    return dict(ph="X", cat=cat, name=name, tid=thread, ts=begin, dur=end - begin, args=args or {})


def scope(kind, begin, end):
    return host(SCOPE + kind, begin, end, cat="user_annotation")


def differentiates(number, forward, backward, backward_thread=1):
    return [
        dict(ph="s", cat="fwdbwd", name="fwdbwd", id=number, tid=1, ts=forward),
        dict(ph="f", cat="fwdbwd", name="fwdbwd", id=number, tid=backward_thread, ts=backward),
    ]


PRODUCT = {"Input Dims": [[5, 3], [3, 4]]}


def test_account_of_a_cpu():
    events = [
        host(WINDOW, 0, 100, cat="user_annotation"),
        scope("attention", 10, 30),
        scope("gemm", 12, 22),
        host("aten::linear", 13, 21, args=PRODUCT),
        host("aten::mm", 14, 20, args=PRODUCT),
        host("aten::mul", 24, 26),  # attention's own
        scope("data", 30, 40),
        host("aten::add", 41, 42),  # in no scope
        host("autograd::engine::evaluate_function: MmBackward0", 50, 60),
        host("MmBackward0", 51, 58),
        host("aten::mm", 52, 57, args=PRODUCT),
        host("_SwiGLUBackward", 70, 72),
        host("aten::_grouped_mm", 90, 96, args={"Input Dims": [[5, 3], [2, 3, 4], [2]]}),
        host("aten::mm", 91, 93, args={"Input Dims": [[2, 3], [3, 4]]}),  # a part of it
        host("aten::mul", 80, 90, thread=2),  # another thread's time is not this one's
        host("aten::mul", 150, 190),
        *differentiates(1, 14, 51),
    ]
    found = account(dict(traceEvents=events), "cpu")
    assert found.times == dict(gemm=18_000, attention=2_000, data=10_000, other=7_000, swiglu=2_000, idle=61_000)
    assert found.gemm_times == {Gemm("gemm", 5, 4, 3): 11_000, Gemm("other", 5, 4, 3): 6_000}
    assert found.gemm_calls == {Gemm("gemm", 5, 4, 3): 2, Gemm("other", 5, 4, 3): 1}


def test_a_scope_that_outlives_the_operator_in_which_it_was_opened():
    events = [
        host(WINDOW, 0, 100, cat="user_annotation"),
        scope("experts", 10, 90),
        host("PythonDispatchMode", 20, 30),
        host("aten::add", 21, 24),
        scope("attention", 26, 60),
        host("aten::mul", 28, 29),
        host("aten::mul", 40, 50),
        host("aten::add", 70, 80),
    ]
    found = account(dict(traceEvents=events), "cpu")
    assert found.times == dict(experts=6_000 + 10_000, attention=11_000, idle=73_000)


def test_account_of_a_gpu():
    """Its kernels run after their launches, on two streams; a backward operator is launched by another thread."""

    def kernel(correlation, begin, end, cat="kernel"):
        return dict(ph="X", cat=cat, name="k", tid=7, ts=begin, dur=end - begin, args=dict(correlation=correlation))

    def launch(correlation, at, thread=1):
        return host("cudaLaunchKernel", at, at + 1, thread, "cuda_runtime", dict(correlation=correlation))

    events = [
        host(WINDOW, 0, 100, cat="user_annotation"),
        scope("gemm", 5, 15),
        host("aten::mm", 6, 14, args=PRODUCT),
        launch(1, 7),
        host("c10d::_allgather_base_", 16, 19),
        launch(2, 17),
        host("MmBackward0", 20, 29, thread=2),
        host("aten::bmm", 21, 28, thread=2, args={"Input Dims": [[2, 4, 6], [2, 6, 8]]}),
        launch(3, 22, thread=2),
        *differentiates(1, 6, 20, backward_thread=2),
        kernel(1, 10, 20),
        kernel(2, 15, 40),  # hidden behind a product until 20, and from 35 on
        kernel(3, 35, 50),
        kernel(99, 50, 53, cat="gpu_memcpy"),  # nobody knows who launched it
        kernel(98, 98, 120),  # ends after the window
    ]
    found = account(dict(traceEvents=events), "cuda")
    assert found.times == dict(gemm=25_000, communication=15_000, other=5_000, idle=55_000)
    assert found.gemm_times == {Gemm("gemm", 5, 4, 3): 10_000, Gemm("gemm", 4, 8, 6, batch=2): 15_000}
    assert Gemm("gemm", 4, 8, 6, batch=2).flops == 2 * 2 * 4 * 8 * 6


def test_a_table_with_less_than_nothing_says_so():
    rows = [KindRow(kind, -1.0 if kind == "experts" else 1.0, 0.0) for kind in KINDS]
    said = table(Profile("cpu", "2", 1, 1, 11.0, 11.0, 0.0, 11.0, rows, [], []))
    assert "less than nothing for experts: do not trust this table" in said


def test_peak_is_of_what_lives_together():
    def memory(at, size, address, device=0):
        args = {"Bytes": size, "Addr": address, "Device Type": device}
        return dict(ph="i", cat="cpu_instant_event", name="[memory]", tid=1, ts=at, args=args)

    events = [
        host(WINDOW, 0, 100, cat="user_annotation"),
        scope("loss", 10, 20),
        memory(11, 700, 1),
        memory(12, -700, 1),
        memory(13, 600, 2),
        memory(14, -50, 9),  # allocated before
        scope("norm", 20, 30),
        memory(21, 300, 3),
        memory(22, 5000, 4, device=1),
        memory(40, -600, 2),
        memory(41, 200, 5),
    ]
    assert account(dict(traceEvents=events), "cpu").peak_bytes == dict(loss=600, norm=300)
    assert account(dict(traceEvents=events), "cuda").peak_bytes == dict(norm=5000)


def test_scopes_end_with_the_profile(make_recipe, tmp_path):
    """What the profiler put around the step's functions is gone, also after an error."""
    clip = torch.nn.utils.clip_grad_norm_
    with pytest.raises(ValueError, match="vocabulary"):
        profile(make_recipe("--model.new.vocab_size=100"), tmp_path / "profile")
    profile(make_recipe(), tmp_path / "profile", steps=1, warmup=1)
    assert torch.nn.utils.clip_grad_norm_ is clip
