"""What Hugging Face's loaders need to chat with an exported model, made from its `tokenizer.model`: the tokenizer as
transformers has it, a chat template in Jinja, and the ids at which generation ends.

The templates give the ids of data/chat.py, but where a text spells a special token, which transformers makes one of;
and of messages that do not alternate, which data/chat.py joins, they give none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from tokenmill.data.chat import CONTROL_PIECES, end_id, resolve
from tokenmill.data.tokenizer import MODEL_FILE, SPACE, Tokenizer
from tokenmill.trainer.model.weights import copy_tokenizer
from tokenmill.trainer.vocabulary import SPECIAL

_BEGIN = """\
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- set system = messages[0].content if has_system else '' -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- for turn in turns -%}
    {%- if turn.role != ['user', 'assistant'][loop.index0 % 2] -%}
        {{- raise_exception('expected a system message or none, then user and assistant by turns') -}}
    {%- endif -%}
{%- endfor -%}
{{- bos_token -}}
"""
TEMPLATES = {  # by the names of data/chat.py
    "mistral-v1": _BEGIN
    + """\
{%- for turn in turns -%}
    {%- if turn.role == 'user' -%}
        {{- '[INST] ' + (system + '\\n\\n' if system and loop.first else '') + turn.content + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + turn.content + eos_token -}}
    {%- endif -%}
{%- endfor -%}
""",
    "mistral-v3": _BEGIN
    + """\
{%- set last = (turns | length - 1) // 2 * 2 -%}
{%- for turn in turns -%}
    {%- if turn.role == 'user' -%}
        {{- '[INST]' + (system + '\\n\\n' if system and loop.index0 == last else '') + turn.content + '[/INST]' -}}
    {%- else -%}
        {{- turn.content.rstrip(' ') + eos_token -}}
    {%- endif -%}
{%- endfor -%}
""",
    "chatml": _BEGIN
    + """\
{%- if system -%}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for turn in turns -%}
    {{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""",
}


def write_chat_files(folder: Path, output: Path) -> None:
    """Write the tokenizer of a model folder to another, which exists, with what transformers needs beside it.

    What the folder has of it is kept; but EOS ids are added, and a chat template gives way that places none of the
    control pieces of the tokenizer's own template (`chat.resolve`): it is older than they are. Without a
    `tokenizer.model` nothing is made.

    Raises ValueError where one of the tokenizer's files cannot be read.
    """
    copy_tokenizer(folder, output)
    if not (folder / MODEL_FILE).is_file():
        return
    tokenizer = Tokenizer.open(folder)
    config = _read(output / "tokenizer_config.json", folder)
    if not config:
        config = tokenizer_config(tokenizer)
        if not (output / "tokenizer.json").is_file() and tokenizer.is_plain_bpe:
            _write(output / "tokenizer.json", tokenizer_json(tokenizer))
    name = resolve(tokenizer)
    file = output / "chat_template.jinja"
    template = file.read_text() if file.is_file() else config.get("chat_template")
    if not template or not all(piece in json.dumps(template) for piece in CONTROL_PIECES.get(name, ())):
        file.unlink(missing_ok=True)
        config["chat_template"] = TEMPLATES[name]
    _write(output / "tokenizer_config.json", config)
    generation = _read(output / "generation_config.json", folder)
    before = generation.get("eos_token_id") or []
    ends = [*(before if isinstance(before, list) else [before]), tokenizer.eos_id, end_id(tokenizer)]
    ends = list(dict.fromkeys(ends))
    generation |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    _write(output / "generation_config.json", generation)


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """`tokenizer_config.json` but for the chat template."""
    model = SentencePieceProcessor(model_proto=tokenizer.model)
    special = _special(model)
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,  # each text that follows a special token is encoded by itself, as data/chat.py does
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": special[tokenizer.bos_id],
        "eos_token": special[tokenizer.eos_id],
        "unk_token": special[model.unk_id()],
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): {"content": piece, **SPECIAL} for i, piece in special.items()},
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """`tokenizer.json`, in the form of Mistral's own, of a model that `is_plain_bpe`. What transformers would make of
    the `tokenizer.model` by itself encodes a text differently after a special token.
    """
    model = SentencePieceProcessor(model_proto=tokenizer.model)
    pieces: list[str] = model.id_to_piece(list(range(tokenizer.vocab_size)))
    special = _special(model)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    text = {piece: i for piece, i in vocab.items() if i not in special and not model.is_byte(i)}
    merges = sorted(
        (-model.get_score(i), text[piece[:cut]], text[piece[cut:]])
        for piece, i in text.items()
        for cut in range(1, len(piece))
        if piece[:cut] in text and piece[cut:] in text
    )
    adds_space = tokenizer.encode("a") != tokenizer.encode("a", continues=True)
    bos = special[tokenizer.bos_id]
    first, second = (
        [{"SpecialToken": {"id": bos, "type_id": i}}, {"Sequence": {"id": "AB"[i], "type_id": i}}] for i in (0, 1)
    )
    prepend, strip = {"type": "Prepend", "prepend": SPACE}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": piece, **SPECIAL} for i, piece in special.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [prepend] * adds_space + [_replace(" ", SPACE)],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}] + [strip] * adds_space,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": special[model.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(model.is_byte(list(range(tokenizer.vocab_size)))),
            "vocab": vocab,
            "merges": [f"{pieces[a]} {pieces[b]}" for _, a, b in merges],
        },
    }


def _special(model: SentencePieceProcessor) -> dict[int, str]:
    """The pieces that are placed by id, never made from text."""
    ids = range(model.vocab_size())
    return {i: model.id_to_piece(i) for i in ids if model.is_control(i) or model.is_unknown(i)}


def _replace(text: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


def _read(file: Path, folder: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file; `folder` is where it was copied from."""
    try:
        raw = json.loads(file.read_text()) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / file.name}: not valid JSON ({error}); remove it") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{folder / file.name}: expected an object, found {type(raw).__name__}; remove it")
    return raw


def _write(file: Path, raw: dict[str, Any]) -> None:
    file.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
