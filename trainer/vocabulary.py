"""Tokens added to a model: control pieces of its tokenizer, and rows of its embedding and head.

A new row is the mean of the old ones. The logit of a mean is the mean logit, which is at most the logarithm of the mean
of the exponentials: of n old tokens, each keeps at least n / (n + 1) of its probability beside one new token. Source:
Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenmill.data.chat import CONTROL_PIECES
from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import MODEL_FILE, Tokenizer
from tokenmill.trainer.distributed import World
from tokenmill.trainer.model.rows import local_part
from tokenmill.trainer.model.transformer import Transformer
from tokenmill.trainer.model.weights import copy_tokenizer

# How Hugging Face's files describe a token that is placed by id, never made from the parts of a text.
SPECIAL = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


class Added(NamedTuple):
    folder: Path  # of the model
    pieces: int  # how many the tokenizer had
    ids: range  # of the tokens
    old: set[int]  # those of them that the model may know already


def add_tokens(folder: Path, tokens: Sequence[str], output: Path) -> Added:
    """Write the tokenizer of a model folder to another, which exists, with `tokens` behind its pieces.

    A fine-tuned model of Hugging Face's may know tokens that its `tokenizer.model` lacks and other files name. Such a
    one, given at its place, is an old one.

    Raises ValueError where there is no `tokenizer.model`, a token cannot be added, or its id is another's.
    """
    tokenizer = Tokenizer.open(folder)
    model = tokenizer.with_control_pieces(tokens)
    ids = dict(enumerate(tokens, tokenizer.vocab_size))
    copy_tokenizer(folder, output)
    (output / MODEL_FILE).write_bytes(model)
    named: dict[int, str] = {}
    for name, add in (("tokenizer.json", _added_tokens), ("tokenizer_config.json", _added_tokens_decoder)):
        if (file := output / name).is_file():
            try:
                raw = json.loads(file.read_bytes())
                named |= add(raw, ids)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{folder / name}: not as Hugging Face writes it ({error!r}); remove it") from None
            file.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    for token, text in ids.items():
        if named.get(token, text) != text:
            first = " ".join(repr(named[i]) for i in sorted(named) if i in ids)
            raise ValueError(f"{folder}: token {token} is {named[token]!r} already: begin --add-tokens with {first}")
    return Added(
        folder, tokenizer.vocab_size, range(tokenizer.vocab_size, tokenizer.vocab_size + len(tokens)), set(named)
    )


def add_rows(model: Transformer, added: Added) -> None:
    """Give the embedding and the head of `model` rows for added tokens, each the mean of those of the tokenizer's old
    pieces: behind these, a model may have rows that stand for nothing and only fill a round number.

    Raises ValueError where the model has fewer rows than the tokenizer had pieces.
    """
    rows = model.config.vocab_size
    if rows < added.pieces:
        raise ValueError(f"{added.folder}: its tokenizer has {added.pieces} pieces, its vocabulary only {rows}")
    size = max(rows, added.ids.stop)
    new = [token for token in added.ids if token >= rows or token not in added.old]
    for module in (model.embed, model.head):
        old = module.weight.data
        mean = old[: added.pieces].mean(0, dtype=torch.promote_types(old.dtype, torch.float32))
        weight = torch.cat([old, old.new_zeros(size - rows, old.shape[1])])
        weight[new] = mean.to(old.dtype)
        module.weight = nn.Parameter(weight)
    model.config = replace(model.config, vocab_size=size)


def check_rows(model: Transformer, streams: Iterable[TokenStream], world: World) -> None:
    """Warn of a stream of chats whose control pieces have rows as `add_rows` makes them, one like the other: beneath
    adapters, which leave embedding and head alone, they stay so. Every rank calls this.
    """
    for stream in streams:
        template = (stream.manifest.get("chat") or {}).get("template", "")
        tokenizer = stream.tokenizer()
        pieces = {piece: tokenizer.control_id(piece) for piece in CONTROL_PIECES.get(template, ())}
        ids = [token for token in pieces.values() if token is not None]
        if len(ids) > 1 and all(_are_equal(module.weight, ids, world) for module in (model.embed, model.head)):
            if world.rank == 0:
                warnings.warn(
                    f"{stream.folder}: template {template!r} places {' and '.join(pieces)}, whose rows in embedding "
                    "and head are new and equal, and adapters cannot train them: the model will not learn to end an "
                    "answer; train all weights first (without [adapter]), or use a template without added tokens",
                    stacklevel=2,
                )
            return


def _are_equal(weight: Tensor, ids: Sequence[int], world: World) -> bool:
    """Whether rows are the same, bit by bit, of a weight that may be sharded."""
    local, first = local_part(weight.data)
    rows = torch.zeros(len(ids), weight.shape[1], dtype=weight.dtype, device=world.device)
    for row, token in zip(rows, ids, strict=True):
        if first <= token < first + len(local):
            row.copy_(local[token - first])
    rows = world.sum(rows)
    return bool((rows == rows[0]).all())


def _added_tokens(raw: dict[str, Any], ids: dict[int, str]) -> dict[int, str]:
    """Add tokens to what `tokenizer.json` holds; returns those it had."""
    there = {entry["id"]: entry["content"] for entry in raw["added_tokens"]}
    raw["added_tokens"] += [{"id": i, "content": text, **SPECIAL} for i, text in ids.items() if i not in there]
    return there


def _added_tokens_decoder(raw: dict[str, Any], ids: dict[int, str]) -> dict[int, str]:
    """The same for `tokenizer_config.json`, where it lists them."""
    entries = raw.get("added_tokens_decoder")
    if entries is None:
        return {}
    there = {int(i): entry["content"] for i, entry in entries.items()}
    entries |= {str(i): {"content": text, **SPECIAL} for i, text in ids.items() if i not in there}
    return there
