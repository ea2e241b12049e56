"""Two storeys: the scripts, and below them the package, which knows nothing of the scripts."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Imports(ast.NodeVisitor):
    """The modules that a file imports anywhere, within functions too, but for what only type checkers read."""

    def __init__(self, path: Path):
        self.found = set()
        self.visit(ast.parse(path.read_text()))

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node):
        assert node.level == 0, "a relative import"
        self.found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}

    def visit_If(self, node):
        if getattr(node.test, "id", "") != "TYPE_CHECKING":
            self.generic_visit(node)


def test_the_package_imports_no_script_and_its_modules_do_not_import_each_other_in_a_circle():
    scripts, modules = ({path.stem for path in ROOT.glob(pattern)} for pattern in ("*.py", "rnorm/*.py"))
    needs = {module: Imports(ROOT / f"rnorm/{module}.py").found for module in modules}
    assert {module: names & scripts for module, names in needs.items() if names & scripts} == {}
    own = {module: {name for name in modules if f"rnorm.{name}" in names} for module, names in needs.items()}
    graphlib.TopologicalSorter(own).prepare()  # raises CycleError


def test_what_a_script_needs_to_note_signals_loads_neither_torch_nor_numpy():
    code = "import sys, rnorm.cli, rnorm.files, rnorm.signals; sys.exit(bool({'torch', 'numpy'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
