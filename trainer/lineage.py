"""Where a model comes from: what each checkpoint's manifest says of its data, of the code, and of the models before it.

This is a record for people: nothing in it is ever executed, or read again but to be handed on and shown. It holds no
environment variables and no host or user names; of paths, what lies in the user's home begins with `~`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from tokenmill.data.stream import TokenStream
from tokenmill.trainer.adapters import Base, read_adapter
from tokenmill.trainer.checkpoint import read_config
from tokenmill.trainer.shards import MANIFEST, read_manifest

PATIENCE = 5.0  # seconds for git, which may stand on a slow disk


def lineage(parents: Sequence[dict[str, Any]], streams: Iterable[TokenStream] = ()) -> dict[str, Any]:
    """For a manifest, beside its recipe: the time, the code, the streams that are trained on, and the models that the
    weights were made from, each as `parent` describes it.
    """
    return {
        "date": now(),
        "versions": {name: _version(name) for name in ("tokenmill", "torch", "triton")},
        "code": _code(),
        "data": [{"path": _shown(stream.folder), "fingerprint": stream.fingerprint} for stream in streams],
        "parents": list(parents),
    }


def parent(base: Base, gave: Literal["weights", "adapters", "moments"] = "weights") -> dict[str, Any]:
    """A model that another begins from: its path and fingerprint, and what it gave; of a checkpoint also step, tokens,
    recipe and its own lineage, whose parents are those before it.
    """
    folder = Path(base.path)
    named = {"path": _shown(folder), "fingerprint": base.fingerprint, "gave": gave}
    if not (folder / MANIFEST).is_file():
        return named
    manifest = read_manifest(folder)
    state = manifest.get("state") or {}
    return {
        **named,
        "step": state.get("step"),
        "tokens": state.get("tokens"),
        "recipe": manifest.get("recipe"),
        **read_lineage(folder),
    }


def read_lineage(folder: Path) -> dict[str, Any]:
    """A checkpoint's; empty where it has none. Raises ValueError naming the file."""
    found = read_manifest(folder).get("lineage") or {}
    if not isinstance(found, dict) or not isinstance(found.get("parents", []), list):
        raise ValueError(f"{folder / MANIFEST}: lineage: expected a section with a list of parents")
    return found


def total_tokens(folder: Path) -> int:
    """Tokens that a checkpoint was trained on, those of the checkpoints before it included: of each once, also where
    several that were merged come from it. Moments alone bring none.
    """
    counted = set()

    def below(model: dict[str, Any]) -> int:
        tokens = model.get("tokens") or 0
        for before in model.get("parents") or []:
            if before.get("gave") != "moments" and before["fingerprint"] not in counted:
                counted.add(before["fingerprint"])
                tokens += below(before)
        return tokens

    state = read_manifest(folder).get("state") or {}
    return below({"tokens": state.get("tokens"), **read_lineage(folder)})


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def inspect(folder: Path) -> str:
    """What a checkpoint is and where it comes from, as text to print; its files are not read."""
    manifest = read_manifest(folder)
    state = manifest.get("state") or {}
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    config = read_config(folder)
    active = f" ({config.parameters(active=True):,} active)" if config.moe else ""
    lines = [
        f"checkpoint    {folder}",
        f"files         {len(manifest['files'])}, {size:,} bytes",
        f"model         {config.parameters():,} parameters{active}, {config.n_layers} layers of {config.dim}, "
        f"vocabulary {config.vocab_size:,}",
    ]
    if (adapted := read_adapter(folder)) is not None:
        adapter, base = adapted
        lines.append(f"adapters      {adapter.kind} of rank {adapter.rank} on {_shown(Path(base.path))}")
    model = {"step": state.get("step"), "tokens": state.get("tokens"), "recipe": manifest.get("recipe")}
    try:
        return "\n".join([*lines, *_told({**model, **read_lineage(folder)}, "")])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST}: lineage: cannot be understood ({error!r})") from None


def _told(model: dict[str, Any], indent: str) -> list[str]:
    """What is known of a model and, further in, of those before it."""
    lines = []
    if model.get("step"):
        objective = (model.get("recipe") or {}).get("objective")
        lines.append(f"trained       {objective}, {model['step']:,} steps, {model['tokens']:,} tokens")
    if merge := model.get("merge"):
        settings = [f"{key} {value}" for key, value in merge.items() if value is not None]
        lines.append(f"merged        {', '.join(settings)}")
    lines += [f"data          {stream['path']} ({stream['fingerprint'][:12]})" for stream in model.get("data") or []]
    if versions := model.get("versions"):
        written = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
        code = model.get("code")
        commit = f", commit {code['commit'][:12]}{' with changes' if code['dirty'] else ''}" if code else ""
        lines.append(f"written       {model.get('date')} by {written}{commit}")
    for before in model.get("parents") or []:
        gave = before.get("gave", "weights")  # which checkpoints did not tell at first
        alone = "" if gave == "weights" else f", {gave} alone"
        lines.append(f"from          {before['path']} ({before['fingerprint'][:12]}){alone}")
        lines += _told(before, "  ")
    return [indent + line for line in lines]


def _shown(path: Path) -> str:
    """As seen from where the command runs, if it lies below."""
    path, home = path.resolve(), Path(os.path.expanduser("~")).resolve()
    if path.is_relative_to(here := Path.cwd()):
        return str(path.relative_to(here))
    if path.is_relative_to(home) and home != Path("/"):
        return f"~/{path.relative_to(home)}"
    return str(path)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its folder, without having been installed
        return None


@cache  # the code of this process is what was there when it began
def _code() -> dict[str, Any] | None:
    """The commit of the checkout that this file belongs to, and whether files of it were changed; None where there is
    no checkout, or no git.
    """
    here = Path(__file__).resolve()
    # The variables of a hook that this runs in would name another repository.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    git = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(here.parent)]

    def ask(*question: str) -> str:
        done = subprocess.run(
            [*git, *question], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        return done.stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", here.name)  # an installed package may lie in another project's checkout
        commit = ask("describe", "--always", "--exclude=*", "--abbrev=40", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")}
