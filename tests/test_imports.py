"""Imports run one way: _C -> kernels -> model -> objectives -> loop -> command line; data stands beside."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each part may import of ours; the first prefix that fits a file counts.
ALLOWED = {
    "kernels": ["kernels"],
    "data/files.py": [],
    "data": ["_C", "kernels.layout", "data"],
    "trainer/model": ["kernels", "trainer.model", "data.files"],
    "trainer/objectives": ["kernels", "data", "trainer.model", "trainer.config", "trainer.objectives"],
    "trainer/evaluate": ["kernels", "data", "trainer.model", "trainer.distributed", "trainer.evaluate"],
    "trainer/cli.py": ["data", "trainer", "bench"],
    "trainer/__main__.py": ["trainer.cli"],
    "trainer/config.py": ["trainer.model.config"],
    "trainer": ["kernels", "data", "trainer"],
    "bench": ["_C", "kernels", "data", "trainer", "bench"],
}
FILES = [p.relative_to(ROOT) for top in ("kernels", "data", "trainer", "bench") for p in (ROOT / top).rglob("*.py")]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_run_one_way(file):
    allowed = next(names for prefix, names in ALLOWED.items() if str(file).startswith(prefix))
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            ours = name.removeprefix("tokenmill.")
            assert ours == name or any(f"{ours}.".startswith(f"{a}.") for a in allowed), f"{file} imports {name}"


def test_only_the_command_line_imports_the_command_line():
    for file in FILES:
        if str(file) not in ("trainer/__main__.py", "trainer/cli.py"):
            assert "trainer.cli" not in (ROOT / file).read_text(), file
