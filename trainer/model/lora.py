"""Adapters: what is trained in place of the weights, which stay frozen, in 4 bits if need be.

    LoRA    y = W x + s B A x                         A (r, inputs), B (outputs, r), s = alpha / r or alpha / sqrt(r)
    DoRA    y = m / |W + s B A| * (W x + s B A x)     m (outputs), |.| the length of each row, taken as a constant

Sources: Hu et al., "LoRA" (2021); Kalajdzievski, "A Rank Stabilization Scaling Factor" (2023); Liu et al., "DoRA"
(2024), sections 3 and 4.3. A starts uniform and B at 0, so that at first nothing is changed.

An adapter belongs to a *projection*: q, k, v, gate, up and so on are adapted each for itself, as everywhere else,
though q, k and v are one weight here. The adapters of one weight run together: their A stacked, their B on a block
diagonal.
Those of the experts have factors an expert, (E, r, inputs) and (E, outputs, r), and run as grouped products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenmill.trainer.model.config import AdapterConfig, ModelConfig
from tokenmill.trainer.model.moe import MoELayer
from tokenmill.trainer.model.quantise import NF4Weight, dense, dequantise, quantise
from tokenmill.trainer.model.rows import local_part, local_rows
from tokenmill.trainer.model.transformer import Transformer, TransformerBlock
from tokenmill.trainer.model.weights import Filled, layout_of

# Ours of Hugging Face's names of the projections.
_NAMES = {
    "q_proj": "attention.q", "k_proj": "attention.k", "v_proj": "attention.v", "o_proj": "attention.out",
    "gate_proj": "feed_forward.gate", "up_proj": "feed_forward.up", "down_proj": "feed_forward.down",
    "gate": "feed_forward.router",
    "w1": "feed_forward.experts.gate", "w3": "feed_forward.experts.up", "w2": "feed_forward.experts.down",
}  # fmt: skip


class Projection(NamedTuple):
    """What one adapter adapts: `rows` of one of our weights from `start` on; of experts, of each one's."""

    weight: str  # our name of it: blocks.0.attention.qkv.weight
    part: str  # the last of the projection's own name: q
    start: int
    rows: int
    theirs: tuple[str, ...]  # Hugging Face's names of it: one, or one an expert

    def factor(self, kind: str) -> str:
        """The name of its parameter a, b or magnitude: blocks.0.attention.qkv.adapters.weight.q.a."""
        owner, _, attribute = self.weight.rpartition(".")
        return f"{owner}.adapters.{attribute}.{self.part}.{kind}"


def projections(config: ModelConfig) -> dict[str, Projection]:
    """Every projection that can have an adapter, by its name: `blocks.0.attention.q`."""
    found: dict[str, Projection] = {}
    for theirs, (weight, start, shape) in layout_of(config).items():
        path = theirs.split(".")
        if path[-2] not in _NAMES:
            continue  # embedding, norms, head
        name = f"blocks.{path[2]}.{_NAMES[path[-2]]}"
        if name in found:  # another expert's
            found[name] = found[name]._replace(theirs=(*found[name].theirs, theirs))
        else:
            found[name] = Projection(weight, name.rpartition(".")[2], start, shape[0], (theirs,))
    return found


def select(config: ModelConfig, patterns: Sequence[str]) -> dict[str, Projection]:
    """The projections that patterns name: whole, or from a dot to a dot. Raises ValueError where one names none."""
    known = projections(config)
    chosen: set[str] = set()
    for pattern in patterns:
        forms = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
        hits = {name for name in known if any(fnmatchcase(name, form) for form in forms)}
        if not hits:
            there = ", ".join(dict.fromkeys(name.split(".", 2)[2] for name in known))
            raise ValueError(
                f"adapter.targets: {pattern!r} names no projection of this model; it has, each with blocks.N. before "
                f"it for one block alone: {there}"
            )
        chosen |= hits
    return {name: projection for name, projection in known.items() if name in chosen}


class Factors(nn.Module):
    """The adapter of one projection."""

    def __init__(self, experts: Sequence[int], outputs: int, inputs: int, config: AdapterConfig) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(*experts, config.rank, inputs))
        self.b = nn.Parameter(torch.empty(*experts, outputs, config.rank))
        self.magnitude = nn.Parameter(torch.empty(*experts, outputs)) if config.kind == "dora" else None


class Adapter(nn.ModuleDict):
    """The adapters of one weight (outputs, inputs) or (E, outputs, inputs), by their projections' parts."""

    def __init__(self, shape: torch.Size, parts: Sequence[Projection], config: AdapterConfig) -> None:
        *experts, self.outputs, inputs = shape
        super().__init__({p.part: Factors(experts, p.rows, inputs, config) for p in parts})
        self.starts = [p.start for p in parts]
        self.scale = config.scale

    def parts(self) -> Iterator[tuple[int, Factors]]:
        """The first row and the factors of each."""
        for start, factors in zip(self.starts, self.values(), strict=True):
            assert isinstance(factors, Factors)
            yield start, factors

    def stacked(self) -> tuple[Tensor, Tensor]:
        """A (..., R, inputs) and s B (..., outputs, R) of all parts: R is the sum of their ranks; 0 where a row is no
        part's.
        """
        a = torch.cat([factors.a for _, factors in self.parts()], dim=-2)
        total, column, row, b = a.shape[-2], 0, 0, []
        for start, factors in self.parts():
            rank = factors.b.shape[-1]
            block = F.pad(factors.b, (column, total - column - rank))
            b += [block.new_zeros(*block.shape[:-2], start - row, total), block]
            row, column = start + block.shape[-2], column + rank
        b.append(b[-1].new_zeros(*b[-1].shape[:-2], self.outputs - row, total))
        return a, self.scale * torch.cat(b, dim=-2)

    def forward(
        self, x: Tensor, y: Tensor, weight: Tensor, linear: Callable[[Tensor, Tensor], Tensor], offsets: Tensor | None
    ) -> Tensor:
        """y (M, outputs), the product of x (M, inputs) and weight, adapted. `linear` is that product, of rows sorted by
        expert if there are `offsets` (E,), the ends of each one's.
        """
        a, b = self.stacked()
        y = y + linear(linear(x, a), b)
        if (lengths := self._relative_lengths(weight, a, b)) is None:
            return y
        if offsets is not None:
            rows = torch.arange(len(x), dtype=offsets.dtype, device=x.device)
            lengths = lengths[torch.searchsorted(offsets, rows, right=True)]
        return y * lengths.to(y.dtype)

    def _relative_lengths(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
        """DoRA's m / |W + s B A| (..., outputs), 1 where a row is no part's; None for LoRA."""
        if next(iter(self.parts()))[1].magnitude is None:
            return None
        lengths = row_lengths(weight, a.detach(), b.detach())
        pieces, row = [], 0
        for start, factors in self.parts():
            assert factors.magnitude is not None
            pieces += [lengths[..., row:start], factors.magnitude]
            row = start + factors.magnitude.shape[-1]
        return torch.cat([*pieces, lengths[..., row:]], dim=-1) / lengths


def row_lengths(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """|W + B A| of each row, (..., outputs) in float32, without making the sum:
    |w|^2 + 2 b (A w) + b (A A^T) b, which is |w|^2, bit by bit, where B is 0.
    """
    squares = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).square()
    crossed = 2 * (b * (weight @ a.mT)).sum(-1, dtype=torch.float32)
    a, b = a.float(), b.float()
    return (squares + crossed + ((b @ (a @ a.mT)) * b).sum(-1)).clamp(min=0).sqrt()


def attach(model: Transformer, config: AdapterConfig, dtype: torch.dtype | None = None) -> None:
    """Freeze the model, put its weights into 4 bits if `config` says so, and add adapters, in `dtype` (None: the
    model's), on torch's default device. All of it is still empty: fill the weights, then call `initialise`.

    Raises ValueError where a target is unknown, or the experts' backend cannot be adapted.
    """
    chosen = select(model.config, config.targets)
    dtype = dtype or model.embed.weight.dtype
    model.requires_grad_(False)
    model.adapter = config
    parts: dict[str, list[Projection]] = {}
    for projection in chosen.values():
        parts.setdefault(projection.weight, []).append(projection)
    for weight, of_weight in parts.items():
        owner, attribute = _owner(model, weight)
        if isinstance(owner, MoELayer) and owner.backend is not None and owner.backend.linear is None:
            raise ValueError(
                f'adapter.targets: moe = "{owner.backend.name}" has no product to adapt the experts in; choose '
                f'"triton", "grouped_mm" or "reference", or targets without experts'
            )
        owner.adapters[attribute] = Adapter(getattr(owner, attribute).shape, of_weight, config).to(dtype)  # type: ignore[index]
    _quantise(model, config)


def _quantise(model: Transformer, config: AdapterConfig) -> None:
    rows: dict[str, list[int]] = {}
    for weight, _, shape in layout_of(model.config).values():
        rows.setdefault(weight, []).append(shape[0])
    for weight in quantised_weights(model.config, config):
        owner, attribute = _owner(model, weight)
        shape = getattr(owner, attribute).shape
        delattr(owner, attribute)
        setattr(owner, attribute, NF4Weight(shape, rows[weight]))
    for block in model.blocks:
        assert isinstance(block, TransformerBlock)
        block.quantised = config.quantise == "nf4"


def quantised_weights(model: ModelConfig, config: AdapterConfig) -> set[str]:
    """The names of the weights that are in 4 bits under `config`: those that could have an adapter."""
    left_out = [".w_"] * (not config.quantise_experts) + [".router."] * (not config.quantise_router)
    names = {projection.weight for projection in projections(model).values()} if config.quantise == "nf4" else set()
    return {name for name in names if not any(text in name for text in left_out)}


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """A as PEFT's, uniform within 1 / sqrt(inputs), the same at any number of ranks; B 0; magnitudes the lengths of the
    weight's rows.
    """
    generator = torch.Generator().manual_seed(seed)
    for owner in model.modules():
        adapters = getattr(owner, "adapters", None)
        for attribute, adapter in adapters.items() if isinstance(adapters, nn.ModuleDict) else ():
            assert isinstance(adapter, Adapter)
            for start, factors in adapter.parts():
                bound = factors.a.shape[-1] ** -0.5
                whole = torch.empty(factors.a.shape).uniform_(-bound, bound, generator=generator)
                _put(factors.a, whole)
                _put(factors.b, torch.zeros(factors.b.shape))
                if factors.magnitude is not None:
                    weight = dense(getattr(owner, attribute), factors.a.dtype)
                    lengths = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).square().sqrt()
                    if isinstance(lengths, DTensor):
                        lengths = lengths.full_tensor()
                    _put(factors.magnitude, lengths[..., start : start + factors.magnitude.shape[-1]])


def _put(parameter: Tensor, whole: Tensor) -> None:
    local, first = local_part(parameter)
    local.copy_(whole[first : first + local.shape[0]])


def merging(
    targets: Mapping[str, Tensor | Filled], model: ModelConfig, config: AdapterConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor | Filled]:
    """`targets`, a model's weights that a base is to be read into, with adapters between: whole tensors by their names.
    Each is added to what training had beneath it, made from the base's own numbers, in float32, and rounded once.
    """
    where, packed = layout_of(model), quantised_weights(model, config)
    adapters: dict[str, dict[int, list[Tensor | None]]] = {name: {} for name in packed}
    for projection in select(model, config.targets).values():
        of_weight = adapters.setdefault(projection.weight, {})
        for e, theirs in enumerate(projection.theirs):
            of_weight[where[theirs].start] = [
                None if (t := tensors.get(projection.factor(kind))) is None else t[e] if t.dim() > dim else t
                for kind, dim in (("a", 2), ("b", 2), ("magnitude", 1))
            ]
    return {
        name: _Merged(target, name in packed, config.scale, adapters[name]) if name in adapters else target
        for name, target in targets.items()
    }


class _Merged:
    """A weight that is read through adapters, each by the first row of the part that it adapts."""

    def __init__(
        self,
        target: Tensor | Filled,
        quantised: bool,
        scale: float,
        adapters: Mapping[int, Sequence[Tensor | None]],
    ) -> None:
        self.target, self.shape = target, target.shape
        self.quantised, self.scale, self.adapters = quantised, scale, adapters

    @torch.no_grad()
    def fill(self, start: int, weight: Tensor) -> None:
        """Hand on `weight`, the part whose first row is `start`, merged; of a sharded target the rows that are here."""
        target, here = self.target, slice(0, len(weight))
        if isinstance(target, Tensor):
            local, first = local_rows(target)
            here = slice(max(0, first - start), min(len(weight), first + len(local) - start))
            if here.start >= here.stop:
                return
            weight, target = weight.to(local.device), local[start + here.start - first : start + here.stop - first]
        whole = dequantise(quantise(weight), weight.shape, torch.float32) if self.quantised else weight.float()
        merged = whole[here]
        if start in self.adapters:
            a, b, magnitude = (t if t is None else t.to(weight.device).float() for t in self.adapters[start])
            assert a is not None
            assert b is not None
            merged = merged + self.scale * (b[here] @ a)
            if magnitude is not None:
                merged *= (magnitude[here] / torch.linalg.vector_norm(merged, dim=-1))[:, None]
        if isinstance(target, Tensor):
            target.copy_(merged)
        else:
            target.fill(start, merged)
