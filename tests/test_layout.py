"""Two storeys: the scripts, and below them the package, which knows nothing of the scripts."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = ("files", "signals", "cli", "runs", "devices", "layers", "data", "conversions", "flags", "fast", "measure",
         "checkpoints", "results")  # fmt: skip
"""The modules of the package: each imports only those before it."""

USES = {
    "models": set(), "train": {"models"}, "convert": {"models", "train"}, "experiments": {"models", "train", "convert"},
    "interpolate": {"models", "train"}, "plot": {"models", "train"},
}  # fmt: skip
"""The scripts, and which others each may import. Of convert.py that is what the study does, no plumbing."""


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


def test_each_script_imports_only_the_scripts_that_it_may():
    assert USES.keys() == {path.stem for path in ROOT.glob("*.py")}
    for script, others in USES.items():
        used = imports(ROOT / f"{script}.py")
        scripts = {name.split(".")[0] for name in used} & USES.keys()
        assert scripts <= others, f"{script}.py imports {scripts - others}"
        of_convert = {name.split(".")[1] for name in used if name.startswith("convert.")}
        assert of_convert <= {"convert_run", "members_to_train"}


def test_each_module_of_the_package_imports_no_script_and_only_the_modules_before_it():
    for path in (ROOT / "rnorm").glob("[!_]*.py"):
        used = imports(path)
        assert not {name.split(".")[0] for name in used} & USES.keys(), path
        own = {name.split(".")[1] for name in used if name.startswith("rnorm.")}
        assert own <= {*ORDER[: ORDER.index(path.stem)]}, f"{path} imports {own}"


def test_the_readme_lists_the_modules_in_their_order():
    text = (ROOT / "README.md").read_text()
    names = re.findall(r"`(\w+)`", text[text.index("each module needs only those before it") :])
    assert [name for name in names if name in ORDER] == [*ORDER]


def test_what_a_script_needs_to_note_signals_loads_neither_torch_nor_numpy():
    code = "import sys, rnorm, rnorm.cli, rnorm.files; sys.exit(bool({'torch', 'numpy'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
