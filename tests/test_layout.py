"""Two storeys: the scripts, and below them the package, which knows nothing of the scripts."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
ORDER = ("files", "cli", "devices", "layers", "fast", "conversions", "data", "runs", "flags", "measure", "checkpoints",
         "results", "grid")  # fmt: skip
"""The modules of the package: each imports only those before it."""


def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_package_imports_no_script():
    for path in (ROOT / "rnorm").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & SCRIPTS, path


def test_each_module_of_the_package_imports_only_those_before_it():
    for path in (ROOT / "rnorm").glob("*.py"):
        used = {name.split(".")[1] for name in imports(path) if name.startswith("rnorm.")}
        before = ORDER[: ORDER.index(path.stem)] if path.stem != "__init__" else ()
        assert used <= {*before}, f"{path} imports {used - {*before}}"


def test_what_a_script_needs_to_note_signals_loads_neither_torch_nor_numpy():
    code = "import sys, rnorm, rnorm.cli, rnorm.files, rnorm.runs; sys.exit(bool({'torch', 'numpy'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
