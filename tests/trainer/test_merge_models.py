"""Merged models against each method's formula in NumPy and fp64; and the files, which stream and appear whole."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from tokenmill.data.batch import Batch
from tokenmill.trainer.adapters import Base
from tokenmill.trainer.checkpoint import load_model, save_checkpoint
from tokenmill.trainer.cli import main
from tokenmill.trainer.lineage import read_lineage
from tokenmill.trainer.merge import Merge, Source, drop, linear, merge_models, slerp, trim, write_tensors
from tokenmill.trainer.model import ModelConfig, MoEConfig, Transformer, lora
from tokenmill.trainer.model.config import AdapterConfig
from tokenmill.trainer.model.rows import shard_bounds
from tokenmill.trainer.model.weights import layout_of, save_hf
from tokenmill.trainer.shards import MANIFEST, crc32, verify
from tokenmill.trainer.state import TrainState

DENSE = ModelConfig(18, 2, 3, 1, 6, 29, 53, sliding_window=4)
SPARSE = replace(DENSE, n_layers=1, moe=MoEConfig(3, 2))
USED = ModelConfig(16, 1, 2, 1, 8, 24, 320, moe=MoEConfig(3, 2))  # sizes that transformers' products accept


def tuned(config, n, dtype=torch.float32):
    """A base and `n` models tuned from it. All weights are small multiples of a power of 2, so that differences are
    exact, and equal and opposite ones are there.
    """
    models = []
    for i in range(n + 1):
        model = Transformer(config, dtype=dtype)
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randint(-64, 65, parameter.shape) / 256)
        torch.manual_seed(i)
        for parameter in model.parameters():
            parameter.data += torch.randint(-5, 6, parameter.shape) / 256 * bool(i)
        models.append(model)
    return models


def two_ranks(folder, config):
    """Of a checkpoint, what two ranks would have written."""
    file = folder / "model-00000.safetensors"
    tensors, manifest = load_file(file), json.loads((folder / MANIFEST).read_text())
    manifest["ranks"] = 2
    for rank in range(2):
        file = folder / f"model-0000{rank}.safetensors"
        save_file({n: t[slice(*shard_bounds(len(t), rank, 2))].clone() for n, t in tensors.items()}, file)
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "crc32": crc32(file)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def folders(tmp_path):
    """A function that writes models to folders of all kinds, and their tensors by Hugging Face's names, in fp64."""

    def write(config, n, dtype=torch.float32):
        paths, tensors = [], []
        for i, model in enumerate(tuned(config, n, dtype)):
            paths.append(tmp_path / f"model{i}")
            save_hf(model, tmp_path / f"hf{i}")
            if i % 3 == 0:
                shutil.copytree(tmp_path / f"hf{i}", paths[-1])
            else:
                save_checkpoint(paths[-1], model)
                if i % 3 == 2:
                    two_ranks(paths[-1], config)
            tensors.append(hugging_face(tmp_path / f"hf{i}"))
        return paths, tensors

    return write


def hugging_face(folder):
    return {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def exported(folder):
    model = load_model(folder, dtype=None)
    save_hf(model, folder.with_name(f"{folder.name}_hf"))
    return model.embed.weight.dtype, hugging_face(folder.with_name(f"{folder.name}_hf"))


def philox(counter, key):
    """One output of Philox4x64-10 (Salmon et al., 2011), in Python's own integers: four words of 64 bits."""
    a, b, c, d = counter & (1 << 64) - 1, counter >> 64, 0, 0
    low, high = key & (1 << 64) - 1, key >> 64
    for _ in range(10):
        even, odd = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = odd >> 64 ^ b ^ low, odd & (1 << 64) - 1, even >> 64 ^ d ^ high, even & (1 << 64) - 1
        low, high = low + 0x9E3779B97F4A7C15 & (1 << 64) - 1, high + 0xBB67AE8584CAA73B & (1 << 64) - 1
    return a, b, c, d


def words(key, count):
    """The first random words of 32 bits under a key."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    wide = [word for i in range(-(-count // 8)) for word in philox(i + 1, number)]
    return np.array([half for word in wide for half in (word & 0xFFFFFFFF, word >> 32)][:count])


def stated(method, weights, scale, density, seed, name, models, base):
    """The formula of one method for one tensor, element by element."""
    flat = [model.reshape(-1) for model in models]
    if method == "linear":
        return np.average(models, axis=0, weights=weights)
    if method == "slerp":
        a, b = flat
        t = weights[1] / sum(weights)
        angle = np.arccos(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))
        merged = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
        return merged.reshape(models[0].shape)
    deltas = [m - base.reshape(-1) for m in flat]
    for i, delta in enumerate(deltas):
        if method == "ties":
            least = sorted(abs(delta))[-max(1, int(density * len(delta)))]
            deltas[i] = np.where(abs(delta) >= least, delta, 0)
        elif method != "task_arithmetic":
            kept = words(f"{seed}/{i}/{name}", len(delta)) < density * 2**32
            deltas[i] = np.where(kept, delta / density, 0)
    merged = np.zeros(len(flat[0]))
    for p in range(len(merged)):
        learnt = [w * d[p] for w, d in zip(weights, deltas, strict=True)]
        if method.endswith("ties"):
            elected = [i for i, x in enumerate(learnt) if x * sum(learnt) > 0]
            merged[p] = sum(learnt[i] for i in elected)
            if method == "ties" and elected:
                merged[p] /= sum(weights[i] for i in elected)
        else:
            merged[p] = sum(learnt)
    return base + scale * merged.reshape(base.shape)


METHODS = {
    "linear": Merge("linear", (0.5, 3.0, 1.0)),
    "slerp": Merge("slerp", (0.75, 0.5)),
    "task_arithmetic": Merge("task_arithmetic", (0.5, -0.25, 1.0), scale=0.75),
    "ties": Merge("ties", (0.5, 1.0, 0.25), scale=1.25, density=0.3),
    "dare_linear": Merge("dare_linear", (0.5, 1.0, 0.25), density=0.7, seed=3),
    "dare_ties": Merge("dare_ties", (0.5, 1.0, 0.25), scale=0.5, density=0.4, seed=2**70),
}


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_its_formula(folders, tmp_path, method, config):
    merge = METHODS[method]
    paths, tensors = folders(config, len(merge.weights))
    base = None if method in ("linear", "slerp") else paths[0]
    assert merge_models(paths[1:], tmp_path / "merged", merge, base=base) == (config, torch.float32)
    verify(tmp_path / "merged")
    dtype, merged = exported(tmp_path / "merged")
    assert dtype == torch.float32
    assert merged.keys() == tensors[0].keys()
    settings = (method, merge.weights, merge.scale, merge.density, merge.seed)
    for name, got in merged.items():
        expected = stated(*settings, name, [t[name] for t in tensors[1:]], tensors[0][name])
        assert np.linalg.norm(got - expected) <= 2e-7 * np.linalg.norm(expected), name


def test_half_precision_is_rounded_once(folders, tmp_path):
    paths, tensors = folders(DENSE, 2, torch.bfloat16)
    assert merge_models(paths[1:], tmp_path / "merged", Merge(weights=(0.3, 0.7)))[1] == torch.bfloat16
    dtype, merged = exported(tmp_path / "merged")
    assert dtype == torch.bfloat16
    for name, got in merged.items():
        expected = 0.3 * tensors[1][name] + 0.7 * tensors[2][name]
        half = np.exp2(np.floor(np.log2(np.maximum(abs(expected), 1e-9))) - 8)  # of the last of bfloat16's 8 bits
        assert (abs(got - expected) <= half + 1e-7).all(), name
    save_checkpoint(tmp_path / "wide", tuned(DENSE, 1)[1])
    assert merge_models([paths[1], tmp_path / "wide"], tmp_path / "mixed", Merge())[1] == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_equal_models_merge_to_themselves(folders, tmp_path, method):
    path = folders(DENSE, 1)[0][1]
    base = None if method in ("linear", "slerp") else path
    weights = (0.1, 0.2, 0.3)[: len(METHODS[method].weights)]  # shares that no float holds
    merge_models([path] * len(weights), tmp_path / "merged", replace(METHODS[method], weights=weights), base=base)
    before, after = (load_file(folder / "model-00000.safetensors") for folder in (path, tmp_path / "merged"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_all_the_weight_is_that_model_bit_by_bit(method):
    a, b = torch.randn(2, 7, 11)
    for weights, expected in [((1.0, 0.0), a), ((0.0, 0.3), b)]:
        merged = Merge(method, weights).resolved(2, False).tensor("x", iter((a, b)), None)
        assert torch.equal(merged.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(linear(iter((a, b, a)), (0, 0, 1)), a)


@pytest.mark.parametrize("method", METHODS)
def test_without_weights_shares_are_equal_and_the_others_1(folders, tmp_path, method):
    """As in the papers of task arithmetic and DARE: what was learnt is added up."""
    count = len(METHODS[method].weights)
    share = 1 / count if method in ("linear", "slerp", "ties") else 1.0
    paths, _ = folders(DENSE, count)
    base = None if method in ("linear", "slerp") else paths[0]
    for name, weights in (("without", ()), ("with", (share,) * count)):
        merge_models(paths[1:], tmp_path / name, replace(METHODS[method], weights=weights), base=base)
    without, given = (load_file(tmp_path / name / "model-00000.safetensors") for name in ("without", "with"))
    assert all(torch.equal(without[name], given[name]) for name in given)


def test_slerp_where_there_is_no_arc():
    a = torch.randn(5, 9)
    assert torch.allclose(slerp(a, 3 * a, 0.25), 1.5 * a, rtol=1e-6)
    assert torch.allclose(slerp(a, -a, 0.25), 0.5 * a, rtol=1e-6)
    assert torch.equal(slerp(torch.zeros(5), torch.ones(5), 0.25), torch.full((5,), 0.25))
    assert torch.equal(slerp(torch.zeros(5), torch.zeros(5), 0.25), torch.zeros(5))


@pytest.mark.parametrize("angle", [1e-5, 0.02, 1.0, 3.1])
def test_slerp_keeps_the_length_at_every_angle(angle):
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([angle], dtype=torch.float64)
    b = torch.cat([b.cos(), b.sin()]).float()
    expected = torch.tensor([0.3 * angle], dtype=torch.float64)
    expected = torch.cat([expected.cos(), expected.sin()])
    assert float((slerp(a, b, 0.3) - expected).norm()) <= 1e-6


def test_trim_keeps_what_equals_the_least():
    delta = torch.tensor([[1.0, -3.0, 2.0], [-2.0, 0.0, 0.5]])
    assert trim(delta, 0.5).tolist() == [[0, -3, 2], [-2, 0, 0]]
    assert trim(delta, 0.34).tolist() == [[0, -3, 2], [-2, 0, 0]]  # two of six, of which one is there twice
    assert trim(delta, 1e-9).tolist() == [[0, -3, 0], [0, 0, 0]]
    assert torch.equal(trim(delta, 1.0), delta)


def test_what_dare_drops_depends_on_nothing_but_its_key():
    ones = torch.ones(40_000)
    dropped = drop(ones, 0.3, "0/1/x")
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.3)}
    assert float(dropped.mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(drop(torch.ones(1001), 0.3, "0/1/x"), dropped[:1001])
    for key in ("1/1/x", "0/2/x", "0/1/y"):
        assert abs(float(torch.stack([dropped, drop(ones, 0.3, key)]).corrcoef()[0, 1])) < 0.02
    assert torch.equal(drop(ones, 1.0, "x"), ones)


class Peak(TorchDispatchMode):
    """The most bytes that tensors hold at once, without the mapped files: those are of `mapped` sizes."""

    def __init__(self, mapped):
        super().__init__()
        self.mapped = mapped
        self.sizes, self.holders, self.peak = {}, Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
                self.sizes[key] = 0 if size in self.mapped else size
                self.holders[key] += 1
                weakref.finalize(tensor, self.drop, key)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result

    def drop(self, key):
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.sizes[key]


@pytest.mark.parametrize("method", METHODS)
def test_memory_holds_a_few_tensors_at_a_time(tmp_path, method):
    paths = []
    n = len(METHODS[method].weights)
    config = replace(SPARSE, n_layers=4)
    for i, model in enumerate(tuned(config, n, torch.bfloat16)):
        paths.append(tmp_path / str(i))
        save_checkpoint(paths[-1], model)
    base = None if method in ("linear", "slerp") else paths[0]
    with Peak({(path / "model-00000.safetensors").stat().st_size for path in paths}) as measured:
        merge_models(paths[1:], tmp_path / "merged", METHODS[method], base=base)
    largest = max(np.prod(rows.shape) for rows in layout_of(config).values()) * 4
    assert largest <= measured.peak <= (n + 7) * largest
    assert measured.peak < 4 * config.parameters() / 2


def test_the_file_is_safetensors_own(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(2, 3, 4)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = [*tensors["a"].split(2), tensors["b"], *tensors["c"]]
        facts = write_tensors(tmp_path / "x", {n: t.shape for n, t in tensors.items()}, dtype, rows)
        assert facts == {"bytes": (tmp_path / "x").stat().st_size, "crc32": crc32(tmp_path / "x")}
        assert int.from_bytes((tmp_path / "x").read_bytes()[:8], "little") % 8 == 0  # of the header, as the format asks
        with safe_open(tmp_path / "x", "pt") as file:
            assert set(file.keys()) == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(file.get_tensor(name), tensor.to(dtype))
    with pytest.raises(OSError, match="^/dev/full: cannot be written .*No space left"):
        write_tensors(tmp_path.joinpath("/dev/full"), {"a": (3, 5)}, torch.float32, [tensors["a"]])


KILLED = """
import os, signal, sys
from tokenmill.trainer.merge import Merge, Source, merge_models
read, names = Source.read, []
def killed(self, name):
    names.append(name)
    if len(names) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, name)
Source.read = killed
merge_models(sys.argv[1:3], sys.argv[3], Merge())
"""


def test_a_kill_leaves_no_model(folders, tmp_path, monkeypatch):
    paths = folders(DENSE, 2)[0][1:]
    shutil.rmtree(tmp_path / "hf0")
    output = tmp_path / "merged"
    command = [sys.executable, "-c", KILLED, *map(str, paths), str(output)]
    assert subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
    assert not output.exists()
    assert (tmp_path / ".merged.tmp").is_dir()
    merge_models(paths, output, Merge())
    verify(output)
    assert not (tmp_path / ".merged.tmp").exists()
    with pytest.raises(FileExistsError, match="merged already exists"):
        merge_models(paths, output, Merge())

    def interrupted(self, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(Source, "read", interrupted)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        merge_models(paths, tmp_path / "other", Merge())
    assert sorted(tmp_path.iterdir()) == before


def test_what_was_merged_is_on_record(folders, tmp_path):
    paths = folders(DENSE, 3)[0]
    merge_models(paths[1:], tmp_path / "merged", METHODS["ties"], base=paths[0])
    found = read_lineage(tmp_path / "merged")
    assert [p["fingerprint"] for p in found["parents"]] == [Base.of(p).fingerprint for p in [*paths[1:], paths[0]]]
    assert found["merge"] == {"method": "ties", "weights": [0.5, 1.0, 0.25], "scale": 1.25, "density": 0.3}
    merge_models(paths[1:3], tmp_path / "again", Merge())
    assert read_lineage(tmp_path / "again")["merge"] == {"method": "linear", "weights": [0.5, 0.5]}


@pytest.fixture
def runs(streams, tmp_path):
    """A folder with checkpoints and their tokenizer: base, and a and b, which were tuned from it."""
    for name, model in zip(("base", "a", "b"), tuned(USED, 2), strict=True):
        save_checkpoint(tmp_path / name, model, tokenizer_from=streams)
    return tmp_path


def test_the_command_makes_a_model_that_is_used_like_any(runs, capsys):
    questions = [{"question": "what?", "options": {"A": "fever", "B": "iron"}, "answer": "A"}] * 3
    (runs / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    for name, options in [
        ("mean", ["--weights=1,3"]),
        ("ties", ["--method=ties", f"--base={runs}/base", "--density=0.2", "--scale=0.9"]),
        ("dare", ["--method=dare_linear", f"--base={runs}/base", "--weights=-0.5,1", "--seed=7"]),
    ]:
        assert main(["merge-models", f"{runs}/a", f"{runs}/b", f"--output={runs}/{name}", *options]) == 0
        assert f"{name}: {load_model(runs / name).config.parameters():,} parameters" in capsys.readouterr().out
        assert (runs / name / "tokenizer.model").read_bytes() == (runs / "a" / "tokenizer.model").read_bytes()
        assert main(["eval", f"{runs}/{name}", f"{runs}/q.jsonl"]) == 0
        assert main(["export", f"{runs}/{name}", f"{runs}/{name}_hf"]) == 0
        ours, theirs = load_model(runs / name), AutoModelForCausalLM.from_pretrained(runs / f"{name}_hf")
        ids = torch.randint(0, 320, (1, 17))
        with torch.no_grad():
            logits, expected = ours.logits(Batch.from_documents([ids[0].tolist()])), theirs(ids).logits[0]
        assert float((logits - expected).norm() / expected.norm()) <= 1e-5
    assert main(["merge-models", f"{runs}/mean_hf", f"{runs}/mean", f"--output={runs}/same"]) == 0
    mean, same = (load_file(runs / name / "model-00000.safetensors") for name in ("mean", "same"))
    assert all(torch.equal(mean[name], same[name]) for name in mean)


def shape(runs, **changes):
    save_checkpoint(runs / "c", tuned(replace(USED, **changes), 0)[0])


def adapters(runs):
    model = load_model(runs / "base")
    lora.attach(model, AdapterConfig(rank=2))
    lora.initialise(model, 0)
    save_checkpoint(runs / "c", model, base=Base.of(runs / "base"))


def tokens(runs, **changed):
    for i, name in enumerate(("a", "b")):
        save_hf(load_model(runs / name), runs / f"{name}_hf", tokenizer_from=runs / name)
        vocab = {"<s>": 1, "</s>": 2, "fever": 3} | (changed if i else {})
        added = [{"content": "<s>", "id": 1, "special": bool(i)}]
        text = json.dumps({"model": {"vocab": vocab}, "added_tokens": added}, indent=i)
        (runs / f"{name}_hf" / "tokenizer.json").write_text(text)


def not_finite(runs):
    model = load_model(runs / "a")
    model.get_parameter("blocks.0.feed_forward.w_down").data[1, 2, 3] = float("nan")
    save_checkpoint(runs / "c", model)


def too_large(runs):
    model = load_model(runs / "a", torch.float16)
    save_checkpoint(runs / "c", model)
    model.norm.weight.data.fill_(60000)
    save_checkpoint(runs / "d", model)


def foreign_tokenizer(runs):
    save_hf(load_model(runs / "a"), runs / "c")
    (runs / "c" / "tokenizer.model").write_bytes(b"another")


def damaged(runs):
    file = runs / "b" / "model-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")


def odd_dtype(runs):
    for name in ("c", "d"):
        save_checkpoint(runs / name, load_model(runs / "a", torch.float64))


WRONG = {
    "one model": (None, "a", "method linear merges 2 models or more, got 1"),
    "slerp of three": (None, "a b a --method slerp", "method slerp merges 2 models, got 3"),
    "weights": (None, "a b --weights 1,2,3", "weights are (1.0, 2.0, 3.0) for 2 models, expected one for each"),
    "no share": (None, "a b --weights 0,0", "those of linear are shares: 0 or more, and not all 0"),
    "negative share": (None, "a b --method ties --base base --weights=-1,2", "those of ties are shares"),
    "infinite": (None, "a b --method task_arithmetic --base base --weights 1,inf", "expected finite numbers"),
    "no base": (None, "a b --method ties", "method ties needs a base, the model from which"),
    "a base": (None, "a b --base base", "method linear takes no base; leave it out, or choose one of task_arithmetic"),
    "a density": (None, "a b --density 0.2", "takes no density; leave it out, or choose one of ties, dare_linear"),
    "a seed": (None, "a b --method ties --base base --seed 1", "takes no seed; leave it out, or choose one of dare_"),
    "density": (None, "a --method ties --base base --density 0", "density is 0.0, expected a share above 0, at most 1"),
    "scale": (None, "a --method ties --base base --scale nan", "scale is nan, expected a finite number"),
    "no model": (None, "a nowhere", "nowhere: expected a checkpoint"),
    "output there": (lambda runs: (runs / "x").write_text(""), "a b", "x already exists"),
    "damaged": (damaged, "a b", "b/model-00000.safetensors: damaged"),
    "layers": (lambda runs: shape(runs, n_layers=2), "a b c", "c: its model has n_layers = 2, that in"),
    "experts": (lambda runs: shape(runs, moe=None), "a c", "c: its model has moe = None, that in"),
    "theta": (lambda runs: shape(runs, rope_theta=1e6), "a --method ties --base c", "rope_theta = 1000000.0, that in"),
    "tokenizer": (foreign_tokenizer, "a c", "c/tokenizer.model: is another tokenizer than"),
    "token": (lambda runs: tokens(runs, fever=5), "a_hf b_hf", "b_hf/tokenizer.json: token 'fever' has id 5, in"),
    "adapters": (adapters, "a c", "c: holds adapters, which are merged into their base first: `tokenmill import"),
    "not finite": (not_finite, "a c", "c: 'model.layers.0.block_sparse_moe.experts.1.w2.weight' holds values that are"),
    "too large": (too_large, "d --method task_arithmetic --base c --scale 2", "x: 'model.norm.weight' would hold"),
    "odd dtype": (odd_dtype, "c d", "c: weights in torch.float64 are not merged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(runs, capsys, monkeypatch, kind):
    spoil, command, message = WRONG[kind]
    if spoil:
        spoil(runs)
    monkeypatch.chdir(runs)
    before = sorted(runs.iterdir())
    assert main(["merge-models", *command.split(), "--output=x"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tokenmill: error: ")
    assert message in line
    assert sorted(runs.iterdir()) == before


def test_what_is_no_difference(runs):
    """How a `tokenizer.json` was written, and what a configuration says of lengths and ids, but not of products."""
    tokens(runs)
    merge_models([runs / "a_hf", runs / "b_hf"], runs / "x", Merge())
    assert (runs / "x" / "tokenizer.json").read_bytes() == (runs / "a_hf" / "tokenizer.json").read_bytes()
    shape(runs, max_positions=99, eos_id=None)
    assert merge_models([runs / "a", runs / "c"], runs / "y", Merge())[0].max_positions == 32768


def test_a_balancing_bias_is_not_left_out_in_silence(runs):
    save_checkpoint(runs / "c", load_model(runs / "a"), state=TrainState(balance_bias=torch.ones(1, 3)))
    with pytest.warns(UserWarning, match="c: the bias that balances its experts"):
        merge_models([runs / "c", runs / "b"], runs / "x", Merge())


def test_merged_adapters_are_weights(runs):
    adapters(runs)
    assert main(["import", f"{runs}/c", f"{runs}/whole"]) == 0
    assert main(["merge-models", f"{runs}/whole", f"{runs}/base", f"--output={runs}/x"]) == 0
    merged, base = (load_file(runs / name / "model-00000.safetensors") for name in ("x", "base"))
    assert all(torch.equal(merged[name], base[name]) for name in base)  # adapters that have learnt nothing yet
