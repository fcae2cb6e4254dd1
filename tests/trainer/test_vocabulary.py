"""Tokens added to a model: their rows, their pieces, and the way to Hugging Face and back."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from tokenmill.data.batch import Batch
from tokenmill.data.chat import render
from tokenmill.data.prepare import prepare
from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.checkpoint import load_model
from tokenmill.trainer.cli import main
from tokenmill.trainer.distributed import World
from tokenmill.trainer.vocabulary import check_rows

START, END = "<|im_start|>", "<|im_end|>"
ADD = ["--add-tokens", START, END]
SHAPE: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
SHAPE |= dict(num_hidden_layers=1, initializer_range=0.2)
NOTES = [{"role": "user", "content": "Is it a fever?"}, {"role": "assistant", "content": "It is: 39 degrees."}]


def hugging_face(folder: Path, streams: Path, rows: int = 320, dtype: torch.dtype = torch.float32) -> Path:
    """A Mistral folder with the tokenizer of the streams, which has 320 pieces."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(vocab_size=rows, **SHAPE))
    torch.nn.Module.to(model, dtype=dtype)
    model.save_pretrained(folder)
    shutil.copyfile(streams / "tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [320, 321, 384])
def test_new_rows_are_the_mean(streams, tmp_path, capsys, rows, dtype):
    before = load_model(hugging_face(tmp_path / "hf", streams, rows, dtype), None)
    assert main(["import", f"{tmp_path}/hf", f"{tmp_path}/more", *ADD]) == 0
    assert f"token 320: {START}\ntoken 321: {END}\n" in capsys.readouterr().out
    after = load_model(tmp_path / "more", None)
    assert after.config.vocab_size == max(rows, 322)  # rows that fill a round number take them in
    old = [i for i in range(rows) if i not in (320, 321)]
    for (name, ours), theirs in zip(after.named_parameters(), before.parameters(), strict=True):
        if name not in ("embed.weight", "head.weight"):
            assert torch.equal(ours, theirs), name
            continue
        assert ours.dtype == dtype
        assert torch.equal(ours[old], theirs[old])
        mean = theirs[:320].double().mean(0).to(dtype).expand(2, -1)
        torch.testing.assert_close(ours[320:322], mean, rtol=torch.finfo(dtype).eps, atol=1e-8)
    tokenizer = Tokenizer.open(tmp_path / "more")
    assert [tokenizer.control_id(piece) for piece in (START, END)] == [320, 321]


def test_little_is_taken_from_the_old_tokens(streams, tmp_path):
    """Hewitt's bound: n old tokens keep n / (n + 1) of their probability beside each new one."""
    before = load_model(hugging_face(tmp_path / "hf", streams))
    assert main(["import", f"{tmp_path}/hf", f"{tmp_path}/more", "--add-tokens", START]) == 0
    batch = Batch.from_documents([list(range(1, 40))])
    old = before.logits(batch).double()
    new = load_model(tmp_path / "more").logits(batch).double()
    torch.testing.assert_close(new[:, :320], old, rtol=0, atol=1e-6)
    torch.testing.assert_close(new[:, 320], old.mean(1), rtol=0, atol=1e-6)
    kept = (new.log_softmax(1)[:, :320] - old.log_softmax(1)).exp()
    assert kept.min() >= 320 / 321 - 1e-6


def test_exported_and_imported_again(streams, tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=320, num_local_experts=3, num_experts_per_tok=2, **SHAPE)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "hf")
    shutil.copyfile(streams / "tokenizer.model", tmp_path / "hf" / "tokenizer.model")
    steps = [["import", "hf", "ours", *ADD], ["export", "ours", "hf2"], ["import", "hf2", "ours2"]]
    for command, source, output, *rest in [*steps, ["export", "ours2", "hf3"]]:
        assert main([command, f"{tmp_path}/{source}", f"{tmp_path}/{output}", *rest]) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (tmp_path / "hf2" / name).read_bytes() == (tmp_path / "hf3" / name).read_bytes(), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf2")
    ours = load_model(tmp_path / "ours")
    ids, _ = render(NOTES, Tokenizer.open(tmp_path / "ours"), "chatml")
    expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours.logits(Batch.from_documents([ids])), expected, rtol=0, atol=1e-5)
    assert ours.embed.weight.shape == (322, 16)
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path / "hf2", legacy=True)
    assert (
        tokenizer.encode(f"<s>{START}user\nIs it a fever?{END}", add_special_tokens=False) == ids[: ids.index(321) + 1]
    )


def with_json(folder: Path, *tokens: str, decoder: bool = True) -> None:
    """Give a folder what transformers saves of a tokenizer, with tokens that its tokenizer.model lacks. `decoder`: as
    before version 5, which lists them in one file alone."""
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)
    if not decoder:
        return
    config = json.loads((folder / "tokenizer_config.json").read_text())
    entries = {
        str(i): {"content": token.content, "special": True} for i, token in tokenizer.added_tokens_decoder.items()
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": entries}))


@pytest.mark.parametrize("decoder", [True, False])
def test_transformers_files_are_extended(streams, tmp_path, decoder):
    with_json(hugging_face(tmp_path / "hf", streams), decoder=decoder)
    for command, source, output, *rest in (["import", "hf", "ours", *ADD], ["export", "ours", "out"]):
        assert main([command, f"{tmp_path}/{source}", f"{tmp_path}/{output}", *rest]) == 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids([START, END]) == [320, 321]
    assert tokenizer.encode(f"{START}{END}", add_special_tokens=False) == [320, 321]
    added = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert [(entry["id"], entry["content"]) for entry in added[-3:]] == [(2, "</s>"), (320, START), (321, END)]
    entries = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()).get("added_tokens_decoder", {})
    assert [entry["content"] for entry in entries.values()] == (["<unk>", "<s>", "</s>", START, END] if decoder else [])


def test_a_token_that_the_model_knows_keeps_its_row(streams, tmp_path, capsys):
    with_json(hugging_face(tmp_path / "hf", streams, 321), END)
    trained = load_model(tmp_path / "hf").head.weight.data
    assert main(["import", f"{tmp_path}/hf", f"{tmp_path}/x", *ADD]) == 1
    assert f"hf: token 320 is {END!r} already: begin --add-tokens with {END!r}" in capsys.readouterr().err
    assert main(["import", f"{tmp_path}/hf", f"{tmp_path}/ours", "--add-tokens", END, START]) == 0
    weight = load_model(tmp_path / "ours").head.weight.data
    assert torch.equal(weight[320], trained[320])
    torch.testing.assert_close(weight[321], trained[:320].mean(0))
    # Named, but the model has no row for it.
    with_json(hugging_face(tmp_path / "hf2", streams), END)
    assert main(["import", f"{tmp_path}/hf2", f"{tmp_path}/ours2", "--add-tokens", END]) == 0
    weight = load_model(tmp_path / "ours2").head.weight.data
    torch.testing.assert_close(weight[320], weight[:320].mean(0))


def test_a_chat_is_prepared_and_learnt(streams, tmp_path):
    hugging_face(tmp_path / "hf", streams)
    assert main(["import", f"{tmp_path}/hf", f"{tmp_path}/ours", *ADD]) == 0
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": NOTES})] * 20))
    for command in (
        ["prepare", "{}/chat.jsonl", "--tokenizer={}/ours", "--output={}/stream", "--template=chatml", "--workers=1"],
        ["train", "{}/recipe.toml"],
    ):
        if command[0] == "train":
            (tmp_path / "recipe.toml").write_text(
                f"""
objective = "sft"
output = "{tmp_path}/run"
model.path = "{tmp_path}/ours"
data = {{ sequence_length = 128, packs_per_step = 2, sources = [{{ stream = "{tmp_path}/stream" }}] }}
train = {{ steps = 30 }}
optimizer = {{ learning_rate = 3e-2 }}
"""
            )
        assert main([part.format(tmp_path) for part in command]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 < math.log(322) - 1 < losses[0]
    stream, tokenizer = TokenStream.open(tmp_path / "stream"), Tokenizer.open(tmp_path / "ours")
    assert stream.document(0).tolist() == render(NOTES, tokenizer)[0]
    assert Tokenizer.open(next((tmp_path / "run" / "checkpoints").iterdir())).sha256 == tokenizer.sha256


def test_rows_that_adapters_leave_equal_are_told(streams, tmp_path):
    """A model that was imported with ChatML's tokens; and one whose rows were trained since, or a plain stream."""
    hugging_face(tmp_path / "hf", streams)
    assert main(["import", f"{tmp_path}/hf", f"{tmp_path}/ours", *ADD]) == 0
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": NOTES}))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "It is a fever."}))
    for name in ("chat", "text"):
        prepare([tmp_path / f"{name}.jsonl"], tmp_path / "ours", tmp_path / name, progress=False)
    chat, text = (TokenStream.open(tmp_path / name) for name in ("chat", "text"))
    model = load_model(tmp_path / "ours")
    check_rows(model, [text], World())
    with pytest.warns(UserWarning, match=r"chat: template 'chatml' places <\|im_start\|> and <\|im_end\|>, whose rows"):
        check_rows(model, [text, chat], World())
    model.head.weight.data[321, 3] += 1e-3
    check_rows(model, [text, chat], World())


def test_wrong_input_is_one_line_and_leaves_nothing(streams, tmp_path, capsys):
    hugging_face(tmp_path / "hf", streams)
    hugging_face(tmp_path / "small", streams, 300)
    hugging_face(tmp_path / "none", streams)
    (tmp_path / "none" / "tokenizer.model").unlink()
    hugging_face(tmp_path / "odd", streams)
    (tmp_path / "odd" / "tokenizer.json").write_text("[]")
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    for source, tokens, message in (
        ("hf", ["</s>"], "'</s>' is a piece of tokenizer 'hf' already"),
        ("hf", [START, START], f"{START!r} is a piece"),
        ("hf", ["x"], "'x' cannot be a token"),
        ("small", [START], "small: its tokenizer has 320 pieces, its vocabulary only 300"),
        ("none", [START], "none/tokenizer.model: cannot read the tokenizer"),
        ("odd", [START], "odd/tokenizer.json: not as Hugging Face writes it"),
    ):
        assert main(["import", f"{tmp_path}/{source}", f"{tmp_path}/x", "--add-tokens", *tokens]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("tokenmill: error: ")
        assert message in line
        assert sorted(tmp_path.iterdir()) == before
