"""An exported model's chat, by transformers: the ids of data/chat.py, and where generation ends."""

from __future__ import annotations

import gzip
import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from tokenmill.data.chat import prompt, render, resolve
from tokenmill.data.documents import content
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.trainer.chat_export import write_chat_files
from tokenmill.trainer.checkpoint import save_checkpoint
from tokenmill.trainer.cli import main
from tokenmill.trainer.model import ModelConfig, Transformer

PIECES = ["<|im_start|>", "<|im_end|>"]
KINDS = {"mistral-v1": "mistral-v1", "mistral-v2": "mistral-v3", "mistral-v3": "mistral-v3", "chatml": "chatml"}


def chat(*texts: str, system: str = "") -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}] * bool(system) + turns


CONVERSATIONS = {
    "one turn": chat("What is a fever?", "A high temperature."),
    "several turns": chat("Hi", "Hello", "Now?", "Yes", "And\n\nthen?", "- one\n- two"),
    "system": chat("Hi", "Hello.", "Why?", "So.", system="Be brief.\nAnd kind."),
    "spaces": chat("  Hi \n", "  Hello.  ", "\n b", "a   b "),
    "unicode": chat("naïve 日本語 ☃?", "µg → 3.5 ℃ e\u0301"),
    "hardly anything": chat(".", "\u200b", "\u00a0x", "1"),
}


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory) -> tuple[Tokenizer, Path, str]:
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("output")
    tokenizer = Tokenizer.open("mistral-v1" if request.param == "chatml" else request.param)
    model = tokenizer.with_control_pieces(PIECES) if request.param == "chatml" else tokenizer.model
    (source / "tokenizer.model").write_bytes(model)
    write_chat_files(source, output)
    (output / "config.json").write_text('{"model_type": "mistral"}')  # of which transformers takes the kind
    return Tokenizer.open(source), output, KINDS[request.param]


@pytest.fixture(scope="module", params=[AutoTokenizer, SentencePieceBackend])
def pair(request, exported):
    tokenizer, folder, name = exported
    return tokenizer, request.param.from_pretrained(folder), name


def check(tokenizer, theirs, messages) -> None:
    line = tokenizer.encode("\n") if resolve(tokenizer) == "chatml" else []  # theirs goes on after the last answer
    assert [*render(messages, tokenizer)[0], *line] == theirs.apply_chat_template(messages, return_dict=False)
    asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert prompt(messages[:-1], tokenizer) == asked


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_theirs_gives_the_ids_of_ours(pair, name):
    tokenizer, theirs, template = pair
    assert resolve(tokenizer) == template
    check(tokenizer, theirs, CONVERSATIONS[name])


def test_real_text(pair):
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.exists():
        pytest.skip("the shared data is not here")
    for name in ("mts_dialog_messages", "medquad_alpaca"):
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in islice(file, 0, 600, 30):
                messages = content(json.loads(line), "text")
                assert isinstance(messages, list)
                check(pair[0], pair[1], [{k: m[k] for k in ("role", "content")} for m in messages])


def test_text_and_back(exported):
    tokenizer, folder, _ = exported
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in ("A  fever of 39.5 ℃.", " x", "日本"):
        ids = theirs.encode(text)
        assert ids == [tokenizer.bos_id, *tokenizer.encode(text)]
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids) == text


def test_messages_that_do_not_alternate_are_refused(pair):
    _, theirs, _ = pair
    for messages in (chat("a", "b")[1:], [*chat("a"), *chat("b")], [*chat("a"), *chat(system="b")]):
        with pytest.raises(TemplateError, match="then user and assistant by turns"):
            theirs.apply_chat_template(messages, return_dict=False)


@pytest.fixture
def model(streams, tmp_path) -> Path:
    """A tiny model with the tokenizer of the streams."""
    model = Transformer(ModelConfig(16, 1, 2, 1, 8, 24, 320))
    model.initialise(0)
    save_checkpoint(tmp_path / "model", model, tokenizer_from=streams)
    return tmp_path / "model"


def test_a_chatml_model_is_exported_as_one(model, tmp_path):
    assert main(["import", str(model), f"{tmp_path}/chat", "--add-tokens", *PIECES]) == 0
    assert main(["export", f"{tmp_path}/chat", f"{tmp_path}/hf"]) == 0
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == [2, 321]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id == [2, 321]
    check(Tokenizer.open(tmp_path / "chat"), AutoTokenizer.from_pretrained(tmp_path / "hf"), CONVERSATIONS["system"])
    assert main(["export", str(model), f"{tmp_path}/plain"]) == 0
    assert json.loads((tmp_path / "plain" / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize("place", ["config", "file"])
def test_what_the_folder_brought_is_kept(model, tmp_path, place):
    """But for EOS ids, and a template that is older than the tokenizer's control pieces."""
    hf, template = tmp_path / "hf", "{{ 'mine: ' + messages[0].content }}"
    assert main(["export", str(model), str(hf)]) == 0
    config = json.loads((hf / "tokenizer_config.json").read_text())
    if place == "config":
        config |= {"chat_template": template, "model_max_length": 99}
        (hf / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        (hf / "chat_template.jinja").write_text(template)
    (hf / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.6}')
    assert main(["import", str(hf), f"{tmp_path}/ours"]) == 0
    assert main(["export", f"{tmp_path}/ours", f"{tmp_path}/again"]) == 0
    kept = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert kept == json.loads((hf / "tokenizer_config.json").read_text())
    assert (tmp_path / "again" / "chat_template.jinja").is_file() == (place == "file")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs.apply_chat_template(chat("Hi"), tokenize=False) == "mine: Hi"
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 7], "temperature": 0.6, "bos_token_id": 1}

    assert main(["import", str(hf), f"{tmp_path}/chat", "--add-tokens", *PIECES]) == 0
    assert main(["export", f"{tmp_path}/chat", f"{tmp_path}/chat_hf"]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "chat_hf")
    check(Tokenizer.open(tmp_path / "chat"), theirs, CONVERSATIONS["several turns"])
    assert GenerationConfig.from_pretrained(tmp_path / "chat_hf").eos_token_id == [2, 7, 321]


def test_damaged_files_are_named(model, tmp_path, capsys):
    for name, text in (("tokenizer_config.json", "{"), ("generation_config.json", "[]")):
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        assert main(["export", str(model), f"{tmp_path}/hf"]) == 0
        (tmp_path / "hf" / name).write_text(text)
        capsys.readouterr()
        assert main(["export", f"{tmp_path}/hf", f"{tmp_path}/x"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"hf/{name}: " in line
        assert not (tmp_path / "x").exists()
