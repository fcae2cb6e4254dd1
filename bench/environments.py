"""Other projects' data tools, each in a virtual environment and a process of its own: what `bench data` stands beside.

This makes the environments and speaks with the processes. What a process does is a function of bench/data_peers.py,
which takes a folder with the inputs of a case: `facts.json`, beside the files that the function names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

SCRIPT = Path(__file__).with_name("data_peers.py")
PATIENCE = 900  # seconds for one answer
# The packages of each environment. Where they want a torch, it is the one that tokenmill is tested with.
TORCH = "torch==2.13.0"
REQUIREMENTS = {
    "grain": ("grain==0.2.18",),
    "hf": ("transformers==5.23.0", "sentencepiece==0.2.3", "protobuf==7.36.2"),
    "litdata": ("litdata==0.2.76", TORCH),
    "loaders": ("accelerate==1.15.0", "torchdata==0.11.0", TORCH),
    "megatron": (
        "megatron-core==0.16.1; python_version < '3.12'",
        "megatron-core==0.19.2; python_version >= '3.12'",
        TORCH,
    ),
    "olmo": ("ai2-olmo-core==3.0.0", TORCH),
    "streaming": ("mosaicml-streaming==0.13.0", TORCH),
    "trl": ("trl==1.16.0", TORCH),
}


class Peer(NamedTuple):
    name: str
    environment: str
    function: str  # of data_peers.py
    package: str  # whose version is said
    gives: str = ""  # what is not as ours gives it


ENCODERS = [Peer("HF tokenizers", "hf", "hf_tokenizers", "tokenizers")]
SHUFFLERS = [Peer("grain", "grain", "grain", "grain")]
PACKERS = [Peer("OLMo-core", "olmo", "olmo", "ai2-olmo-core"), Peer("TRL", "trl", "trl", "trl")]
RESTARTING = Peer(
    "GPTDataset, positions restart", "megatron", "gpt_dataset", "megatron-core", "no boundaries: only its mask has them"
)
READERS = [
    RESTARTING,
    Peer(
        "GPTDataset, nothing restarts", "megatron", "gpt_dataset_plain", "megatron-core",
        "no boundaries, positions go on through documents",
    ),
    Peer(
        "GPTDataset, an attention mask", "megatron", "gpt_dataset_mask", "megatron-core", "boundaries as S x S booleans"
    ),
    Peer("mosaicml-streaming, tokens alone", "streaming", "mosaicml_streaming", "mosaicml-streaming"),
    Peer("litdata, tokens alone", "litdata", "litdata", "litdata"),
]  # fmt: skip
RESUMERS = [
    Peer(
        "mosaicml-streaming", "streaming", "mosaicml_resumed", "mosaicml-streaming",
        "fills the last step with samples given before",
    ),
    Peer("accelerate", "loaders", "accelerate", "accelerate", "fills the last step with samples given before"),
    Peer(
        "accelerate, even_batches=False", "loaders", "accelerate_uneven", "accelerate",
        "a rank may be left without a last step",
    ),
    Peer("torchdata", "loaders", "torchdata", "torchdata", "a state a rank: a rank more than before takes another's"),
]  # fmt: skip


class NotMeasured(Exception):
    """Why a peer does not run here, in a line."""


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """What a case tells its peers' processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "facts.json").write_text(json.dumps(facts))


def environment(folder: Path, name: str) -> Path:
    """The Python of an environment in `folder`, made by pip where it is not there yet. Raises NotMeasured."""
    home = folder / name
    python, made = home / "bin" / "python", home / "requirements.txt"
    wanted = "".join(f"{line}\n" for line in REQUIREMENTS[name])
    if made.is_file() and made.read_text() == wanted:
        return python
    print(f"{home}: installing {', '.join(REQUIREMENTS[name])}", file=sys.stderr)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS[name]]
    for command in ([sys.executable, "-m", "venv", "--clear", home], install):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NotMeasured(f"does not install: {_last_line(done.stderr or done.stdout)}")
    made.write_text(wanted)
    return python


class Process:
    """A peer at work: it has done a case's work once, and does it again each time it is called."""

    def __init__(self, peer: Peer, environments: Path, folder: Path) -> None:
        """Raises NotMeasured where it cannot be installed, imported or run. What it did is in `result`."""
        self._log = folder / f"{peer.function}.log"
        python = environment(environments, peer.environment)
        command = [python, "-P", SCRIPT, peer.function, peer.package, folder]  # -P: our modules are not on its path
        alone = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TMPDIR": str(folder)}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=os.environ | alone | quiet,
            )  # fmt: skip
        self.version = self._answer()
        self.result = folder / f"{peer.function}.npz"

    def __call__(self) -> float:
        """Seconds of the work, done once more."""
        with suppress(BrokenPipeError):  # what it died of is said below
            cast(IO[bytes], self._process.stdin).write(b"\n")
        return float(self._answer())

    def close(self) -> None:
        """End it, by itself where it can: it has its own temporary files to remove."""
        with self._process:
            cast(IO[bytes], self._process.stdin).close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _answer(self) -> str:
        limit = threading.Timer(PATIENCE, self._process.kill)
        limit.start()
        line = cast(IO[bytes], self._process.stdout).readline()
        limit.cancel()
        if line:
            return line.decode().strip()
        with self._process:
            status = self._process.wait()
        said = _last_line(self._log.read_text(errors="replace"))
        raise NotMeasured(said if status == 1 else f"its process ended with status {status}: {said}")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:300]
