"""The C++ core without Python, under AddressSanitizer and UBSan: hostile arguments are refused or harmless, everything
else is what a naive statement of it says (csrc/fuzz.cpp). And faults of the kinds that are looked for are found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++20", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror", *SANITIZERS]


def build(source: Path, headers: Path, target: Path, optimise: str = "-O0") -> Path:
    command = [os.environ.get("CXX", "c++"), *FLAGS, optimise, f"-I{headers}", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=200)


def fuzz(folder: Path, seconds: int, first: int, optimise: str) -> None:
    done = run(build(CSRC / "fuzz.cpp", CSRC, folder / "fuzz", optimise), seconds, first)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 20 * seconds


def test_fuzzed_for_a_few_seconds(tmp_path):
    fuzz(tmp_path, 4, 0, "-O0")


@pytest.mark.slow
def test_fuzzed_for_a_minute(tmp_path):
    fuzz(tmp_path, 60, 1_000_000, "-O1")


BROKEN = """
#include <cstdlib>
#include <limits>

#include "assemble.hpp"
#include "piece_cache.hpp"

int main(int, char** arguments) {
  using namespace tokenmill;
  std::vector<std::uint16_t> tokens(10);
  std::vector<std::int32_t> ids(20), positions(20), taught(20), cu_seqlens(2);
  std::vector<std::int64_t> targets(20);
  std::vector<float> weights(20);
  const Rows rows{ids, targets, weights, positions, taught, cu_seqlens};
  const int broken = std::atoi(arguments[1]);
  if (broken == 0) fill_part<std::uint16_t>(tokens, {}, 5, 5, rows, 0);  // right
  if (broken == 1) fill_part<std::uint16_t>(tokens, {}, 5, 6, rows, 0);  // reads beyond the shard
  if (broken == 2) fill_part<std::uint16_t>(tokens, {}, 0, 10, rows, 11);  // writes beyond the rows
  if (broken == 3) cu_seqlens[0] = std::numeric_limits<std::int32_t>::max() + std::atoi(arguments[2]);
  if (broken == 4) ids[0] = 1 << std::atoi(arguments[2]);
  if (broken == 5) std::vector<int>().swap(ids), ids[0] = 1;
  return cu_seqlens[0] + ids[0] == 1;  // used
}
"""


def test_faults_are_seen(tmp_path):
    """What the sanitizers are there for: each of these would go on in a plain build."""
    (tmp_path / "broken.cpp").write_text(BROKEN)
    broken = build(tmp_path / "broken.cpp", CSRC, tmp_path / "broken")
    assert run(broken, 0).returncode == 0
    for number, argument, message in (
        (1, 0, "AddressSanitizer: heap-buffer-overflow"),
        (2, 0, "AddressSanitizer: heap-buffer-overflow"),
        (3, 1, "signed integer overflow"),
        (4, 40, "shift exponent 40 is too large"),
        (5, 0, "null pointer"),
    ):
        done = run(broken, number, argument)
        assert done.returncode != 0
        assert message in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("header", "right", "wrong"),
    [
        ("assemble.hpp", "|| length > size - start)", ")"),
        ("assemble.hpp", "|| length > size - start)", "|| start + length > size)"),  # which overflows
        ("assemble.hpp", "shard >= static_cast<std::int64_t>(shards.size())", "shard > std::ssize(shards)"),
        ("assemble.hpp", 'check_size("positions"', 'if (total > 9) check_size("positions"'),
        ("assemble.hpp", "max(silent[2 * low], start + 1)", "max(silent[2 * low], start)"),
        ("assemble.hpp", "boundary(thread + 1))", "boundary(thread + 1) - 1)"),
        ("checksum.hpp", "end - 1) / block + 1", "end - 1) / block"),
        ("checksum.hpp", "sums[s].checked.size() != blocks", "false"),
        ("checksum.hpp", "size / block + (size % block != 0)", "(size + block - 1) / block"),
        ("mixture.hpp", "+ 1), kNever - 1)", "), kNever)"),
        ("mixture.hpp", "end_ - start)", "end_)"),
        ("mixture.hpp", "counts.size() == m_ && position <= end_", "position <= end_"),
        ("packing.hpp", "|| lengths[i] > capacity", ""),
        ("packing.hpp", "value = value / 64 + 1;", "value = value / 64;"),
        ("permutation.hpp", "if (index >= n_)", "if (index > n_)"),
        ("permutation.hpp", "left += out[place] >= n_", "left += out[place] > n_"),
        ("piece_cache.hpp", "if (ids.size() != found.missing.size())", "if (ids.empty())"),
        ("piece_cache.hpp", "if (full_ || unfilled_) clear();", "if (full_) clear();"),
        ("piece_cache.hpp", "text_of(words_[slots_[slot].word]) == text", "text.size()"),
    ],
)
def test_a_fault_in_a_header_is_found(tmp_path, header, right, wrong):
    """The fuzz target knows wrong from right: within seconds it finds each of these."""
    headers = tmp_path / "csrc"
    shutil.copytree(CSRC, headers)
    text = (headers / header).read_text()
    assert text.count(right) == 1
    (headers / header).write_text(text.replace(right, wrong))
    done = run(build(headers / "fuzz.cpp", headers, tmp_path / "fuzz"), 60)
    assert done.returncode != 0
    assert "at input" in done.stderr or "runtime error" in done.stderr  # UBSan ends the process at once
