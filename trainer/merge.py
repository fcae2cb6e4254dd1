"""Models of one shape merged into one, tensor by tensor, so that a merge needs the memory of a few tensors only.

With models m_i, weights w_i, and d_i = m_i - base, what model i has learnt since all of them were the base:

    linear           sum w_i m_i / sum w_i
    slerp            (sin((1 - t) a) m_1 + sin(t a) m_2) / sin a, a the angle between them, t = w_2 / (w_1 + w_2)
    task_arithmetic  base + scale * sum w_i d_i
    ties             base + scale * sum' w_i trim(d_i) / sum' w_i
    dare_linear      base + scale * sum w_i drop(d_i)
    dare_ties        base + scale * sum' w_i drop(d_i)

trim keeps the share `density` of a tensor's elements (the paper: of the whole model's), those of the largest magnitude.
drop keeps each with that probability and divides it by it, so that its expectation stays. sum' is, at each element,
over the models whose sign is the elected one, that of the whole sum. dare_ties takes no mean, as ties does: it would
make up for what was dropped a second time.

A tensor is one of Hugging Face's: q, k and v apart, and each expert. Sources: Wortsman et al., "Model soups" (2022);
Shoemake, "Animating rotation with quaternion curves" (1985); Ilharco et al., "Editing models with task arithmetic"
(2023); Yadav et al., "TIES-Merging" (2023), algorithm 1; Yu et al., "Language Models are Super Mario" (2024), DARE.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tokenmill.data.files import replace_folder
from tokenmill.trainer import shards
from tokenmill.trainer.adapters import Base, read_adapter
from tokenmill.trainer.checkpoint import fill_model, read_config, resolve_model
from tokenmill.trainer.lineage import lineage, parent
from tokenmill.trainer.merge_methods import METHODS, SHARES
from tokenmill.trainer.model import ModelConfig, Transformer
from tokenmill.trainer.model.rows import local_rows
from tokenmill.trainer.model.weights import TOKENIZER_FILES, Rows, copy_tokenizer, layout_of, slices
from tokenmill.trainer.shards import FORMAT, MANIFEST, read_manifest, shard_name

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' names
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Merge:
    """How models are merged."""

    method: str = "linear"  # of METHODS
    weights: tuple[float, ...] = ()  # one a model; none: equal shares, or 1 each where they are no shares
    scale: float = 1.0  # of all that was learnt; the papers' lambda
    density: float = 0.5  # the share of what a model has learnt that ties and dare keep
    seed: int = 0  # of what dare drops

    def resolved(self, models: int, base: bool) -> Merge:
        """The same with a weight for each of so many models. Raises ValueError naming what does not fit."""
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}")
        changed = [f.name for f in dataclasses.fields(self)[2:] if getattr(self, f.name) != f.default]
        for name in ["base"] * base + changed:
            if name not in METHODS[self.method]:
                fitting = ", ".join(method for method, takes in METHODS.items() if name in takes)
                raise ValueError(f"method {self.method} takes no {name}; leave it out, or choose one of {fitting}")
        if "base" in METHODS[self.method] and not base:
            raise ValueError(f"method {self.method} needs a base, the model from which the others were tuned")
        fewest = 1 if base else 2
        if models < fewest or (self.method == "slerp" and models > 2):
            expected = f"{fewest} models" + " or more" * (self.method != "slerp")
            raise ValueError(f"method {self.method} merges {expected}, got {models}")
        weights = self.weights or (1 / models if self.method in SHARES else 1.0,) * models
        if len(weights) != models:
            raise ValueError(f"weights are {weights} for {models} models, expected one for each")
        if not np.isfinite(weights).all():
            raise ValueError(f"weights are {weights}, expected finite numbers")
        if self.method in SHARES and (min(weights) < 0 or not sum(weights)):
            raise ValueError(f"weights are {weights}; those of {self.method} are shares: 0 or more, and not all 0")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}, expected a finite number")
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}, expected a share above 0, at most 1")
        return dataclasses.replace(self, weights=tuple(weights))

    def tensor(self, name: str, tensors: Iterable[Tensor], base: Tensor | None) -> Tensor:
        """One tensor out of that of each model, all fp32 and of one shape, taken one after another and left as they
        are. What DARE drops of it is a function of seed, name, and the model's and the element's number.
        """
        if base is None:
            if self.method == "linear":
                return linear(tensors, self.weights)
            first, second = tensors
            return slerp(first, second, self.weights[1] / sum(self.weights))
        learnt = (tensor - base for tensor in tensors)
        if self.method == "ties":
            learnt = (trim(delta, self.density) for delta in learnt)
        elif self.method.startswith("dare"):
            learnt = (drop(delta, self.density, f"{self.seed}/{i}/{name}") for i, delta in enumerate(learnt))
        weighted = (delta.mul_(weight) for delta, weight in zip(learnt, self.weights, strict=True))
        if self.method.endswith("ties"):
            merged = elect(list(weighted), self.weights if self.method == "ties" else None)
        else:
            merged = functools.reduce(torch.add, weighted)
        return torch.add(base, merged, alpha=self.scale)

    def to_json(self) -> dict[str, object]:
        """Its settings, but those that the method does not take."""
        return {n: v for n, v in dataclasses.asdict(self).items() if n in ("method", "weights", *METHODS[self.method])}


def linear(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean by weights of 0 or more. A running one: of equal tensors it is that tensor bit by bit, as it is of one
    that has all the weight.
    """
    mean, total = None, 0.0
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight:
            total += weight
            mean = tensor if mean is None else torch.lerp(mean, tensor, weight / total)
    assert mean is not None
    return mean


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From `a` at t = 0 to `b` at t = 1 on the arc between their directions; on the line between them, where there is
    no one arc because they are parallel, opposite, or 0.
    """
    aa = ab = bb = 0.0
    for x, y in zip(a.flatten().split(_BLOCK), b.flatten().split(_BLOCK), strict=True):
        x, y = x.double(), y.double()
        aa, ab, bb = aa + float(x @ x), ab + float(x @ y), bb + float(y @ y)
    lengths = math.sqrt(aa) * math.sqrt(bb)
    angle = math.acos(max(-1.0, min(1.0, ab / lengths))) if lengths else 0.0
    if math.sin(angle) < 1e-6:  # what it would divide by is mostly rounding
        return torch.lerp(a, b, t)
    first, second = (math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
    return torch.add(a * first, b, alpha=second)


def trim(delta: Tensor, density: float) -> Tensor:
    """`delta` with only its largest elements by magnitude: a share of `density`, and what equals the least of them."""
    kept = max(1, int(density * delta.numel()))
    magnitudes = delta.abs().flatten().numpy()
    magnitudes.partition(-kept)  # in place: torch.kthvalue would need five times the memory
    return delta.masked_fill(delta.abs() < float(magnitudes[-kept]), 0)


def drop(delta: Tensor, density: float, key: str) -> Tensor:
    """`delta` / density where a random word is below density * 2^32, 0 elsewhere. The words are Philox4x64-10's, each
    output's low half before its high, under the first 128 bits of the key's SHA-256: element i's is a function of the
    key and i alone.
    """
    digest = hashlib.sha256(key.encode()).digest()
    random = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    words = random.random_raw(-(-delta.numel() // 2)).view(np.uint32)[: delta.numel()]
    dropped = torch.from_numpy(words >= density * 2.0**32).view(delta.shape)
    return (delta / density).masked_fill_(dropped, 0)


def elect(weighted: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    """The sum of those elements that have the sign of the sum of all; with `weights`, over the sum of theirs. 0 where
    that first sum is 0, and no sign is elected.
    """
    sign = functools.reduce(torch.add, weighted).sign()
    merged, total = torch.zeros_like(sign), torch.zeros_like(sign)
    for i, tensor in enumerate(weighted):
        agrees = (tensor.sign() == sign).float()
        merged.addcmul_(tensor, agrees)
        if weights is not None:
            total.add_(agrees, alpha=weights[i])
    return merged if weights is None else merged.div_(total.masked_fill_(total == 0, 1))


class Source:
    """The weights in a model's folder, by Hugging Face's names of them, each read when it is asked for.

    Raises ValueError where the folder is none, is damaged, or holds adapters.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = resolve_model(path)
        if read_adapter(self.folder) is not None:
            raise ValueError(
                f"{self.folder}: holds adapters, which are merged into their base first: "
                f"`tokenmill import {self.folder} OUTPUT`, then merge OUTPUT"
            )
        self.config = read_config(self.folder)
        with torch.device("meta"):
            model = Transformer(self.config, device="cpu")
        fill_model(model, self.folder)  # copies nothing, but checks names and shapes as it does for every model
        if model.balance_bias is not None:
            text = f"{self.folder}: the bias that balances its experts (loss.balance_bias) is left out"
            warnings.warn(f"{text}: without it, tokens are routed otherwise", stacklevel=3)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._where = layout_of(self.config)
        if (self.folder / MANIFEST).is_file():
            ranks = range(read_manifest(self.folder)["ranks"])
            files = [shards.open_shard(self.folder / shard_name("model", rank)) for rank in ranks]
            self._slices = {name: [file.get_slice(name) for file in files] for name in self.shapes}
        else:
            self._where = {name: Rows(name, 0, rows.shape) for name, rows in self._where.items()}
            self._slices = {name: [part] for _, name, part in slices(self.folder) if name in self._where}
        dtypes = {part[:0].dtype for parts in self._slices.values() for part in parts}
        self.dtype = functools.reduce(torch.promote_types, dtypes)

    def read(self, name: str) -> Tensor:
        """A tensor in fp32, which may be the mapped file itself: it is not to be written to."""
        holder, start, shape = self._where[name]
        parts, first = [], 0
        for part in self._slices[holder]:
            matrix, _ = local_rows(part[:])  # mapped: only the rows that are used are read
            if len(rows := matrix[max(0, start - first) : max(0, start + shape[0] - first)]):
                parts.append(rows)
            first += len(matrix)
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).view(shape).float()


def merge_models(
    models: Sequence[str | Path], output: str | Path, merge: Merge, *, base: str | Path | None = None,
    progress: bool = False,
) -> tuple[ModelConfig, torch.dtype]:  # fmt: skip
    """Merge models, each a run's output, a checkpoint or a Hugging Face folder, into a checkpoint without an optimizer,
    and return its shape and dtype. Computed in fp32, and rounded once, to the dtype that holds all of theirs.

    Raises FileExistsError where `output` is there, and ValueError naming what does not fit: a setting, a folder, a key
    of a shape, a token, a tensor. Nothing is left then.
    """
    output = Path(output)
    merge = merge.resolved(len(models), base is not None)
    with replace_folder(output, output.with_name(f".{output.name}.tmp")) as temporary:
        sources = [Source(path) for path in models]
        beneath = None if base is None else Source(base)
        everyone = [*sources, *([beneath] if beneath else [])]
        _check_shapes(everyone)
        _check_tokenizers(folders := [source.folder for source in everyone])
        dtype = functools.reduce(torch.promote_types, (source.dtype for source in everyone))
        if dtype not in _DTYPES:
            raise ValueError(
                f"{sources[0].folder}: weights in {dtype} are not merged; `tokenmill import` them in another"
            )
        config = sources[0].config

        def merged() -> Iterator[Tensor]:
            for name in tqdm(layout_of(config), unit="tensor", desc="merge", disable=not progress):
                under = beneath and beneath.read(name)
                tensor = merge.tensor(name, (source.read(name) for source in sources), under).to(dtype)
                if not tensor.isfinite().all():
                    odd = [source.folder for source in everyone if not source.read(name).isfinite().all()]
                    where = f"{odd[0]}: {name!r} holds" if odd else f"{output}: {name!r} would hold"
                    raise ValueError(f"{where} values that are not finite in {dtype}; nothing was merged")
                yield tensor

        shapes = {rows.ours: sources[0].shapes[rows.ours] for rows in layout_of(config).values()}
        file = temporary / shard_name("model", 0)
        facts = {file.name: write_tensors(file, shapes, dtype, merged())}
        copy_tokenizer(next((f for f in folders if any((f / n).is_file() for n in TOKENIZER_FILES)), None), temporary)
        for file in temporary.iterdir():
            if file.name not in facts:
                facts[file.name] = {"bytes": file.stat().st_size, "crc32": shards.crc32(file)}
        manifest = {
            "format": FORMAT,
            "ranks": 1,
            "model": dataclasses.asdict(config),
            "adapter": None,
            "base": None,
            "state": None,
            "recipe": None,
            "lineage": {**lineage([parent(Base.of(folder)) for folder in folders]), "merge": merge.to_json()},
            "files": facts,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return config, dtype


def write_tensors(
    file: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, tensors: Iterable[Tensor]
) -> dict[str, int]:
    """Write a safetensors file of tensors, or of rows of them, as they come, in the order of `shapes` and in `dtype`,
    and return its size and checksum.

    Raises OSError naming the file where it cannot be written.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    head = len(text).to_bytes(8, "little") + text
    crc = size = 0
    try:
        with file.open("wb") as stream:
            for data in itertools.chain([head], (_bytes(tensor.to(dtype)) for tensor in tensors)):
                stream.write(data)
                crc, size = zlib.crc32(data, crc), size + len(data)
    except OSError as error:
        raise OSError(f"{file}: cannot be written ({error})") from None
    assert size == len(head) + end
    return {"bytes": size, "crc32": crc}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _check_shapes(sources: Sequence[Source]) -> None:
    """Raises ValueError where two models' functions differ by more than their weights."""
    of_use = {"max_positions", "bos_id", "eos_id"}  # what a configuration says that no product depends on
    first = sources[0]
    for other in sources[1:]:
        for key in (field.name for field in dataclasses.fields(ModelConfig) if field.name not in of_use):
            theirs, ours = getattr(other.config, key), getattr(first.config, key)
            if theirs != ours:
                raise ValueError(
                    f"{other.folder}: its model has {key} = {theirs}, that in {first.folder} {ours}; only models of "
                    f"one shape can be merged"
                )


def _check_tokenizers(folders: Sequence[Path]) -> None:
    """Raises ValueError where two folders have another `tokenizer.model`, or other tokens in `tokenizer.json`."""
    models = [file for folder in folders if (file := folder / "tokenizer.model").is_file()]
    for other in models[1:]:
        if other.read_bytes() != models[0].read_bytes():
            raise ValueError(f"{other}: is another tokenizer than {models[0]}; only models of the same can be merged")
    tokens = [(file, _tokens(file)) for folder in folders if (file := folder / "tokenizer.json").is_file()]
    for file, ids in tokens[1:]:
        first, expected = tokens[0]
        if odd := ids.items() ^ expected.items():
            token, _ = min(odd, key=lambda item: (item[1], item[0]))
            raise ValueError(
                f"{file}: token {token!r} has id {ids.get(token)}, in {first} {expected.get(token)}; only models of "
                f"the same tokenizer can be merged"
            )


def _tokens(file: Path) -> dict[str, int]:
    """The ids of a `tokenizer.json`, which says more than them, by the version that wrote it."""
    try:
        raw = json.loads(file.read_text())
        vocab = raw["model"]["vocab"]
        ids = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
        return ids | {token["content"]: token["id"] for token in raw.get("added_tokens") or ()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a readable tokenizer ({error!r})") from None
