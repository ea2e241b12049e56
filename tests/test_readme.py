"""The README's commands and snippets do what it says, as they stand there.

Those that only draw use the published histories. Those that train or need images use the small network and tiny data.
"""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import plot
import pytest
import small_study
import torch
import torch.nn.functional as F
from conftest import SMALL

import interpolate
from rnorm.data import load_data
from rnorm.store import from_file, load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PUBLISHED = ROOT / re.search(r"RUN=(results/published/\S+)", README)[1]


def block(containing: str) -> str:
    """The README's block of Python with these words."""
    (found,) = [text for text in re.findall(r"```python\n(.*?)```", README, re.S) if containing in text]
    return found


def commands(section: str) -> list[list[str]]:
    """The words of a section's Python commands, as a shell reads them."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = "\n".join(re.findall(r"^    ((?:python|for|RUN=).*)$", text, re.M))
    script = f"python() {{ printf '%q ' \"$@\"; echo; }}\n{lines}"
    printed = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout
    return [shlex.split(line) for line in printed.splitlines()]


def small(text: str, run: Path) -> str:
    """A word or a snippet with a small run and its checkpoints in the place of skinnyprime's."""
    text = text.replace("skinnyprime_28", "small_1").replace("skinnyprime_150", "small_3")
    return re.sub(r"results/(published/)?epochs=[^\s/\"]*", str(run), text)


def run_python(code: str) -> str:
    """What code prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def edit_a_clone(name: str, edits: dict[str, str]) -> None:
    """Copy the scripts and the package here, and replace texts of the file `name` in the copy."""
    shutil.copytree(ROOT / "rnorm", "rnorm", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "tests/small_study.py"):
        shutil.copy(path, Path(path.name))
    text = Path(name).read_text()
    for old, new in edits.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    Path(name).write_text(text)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A directory to be in, with those results that the README's commands name."""
    (tmp_path / "results").mkdir()
    for name in ("published", "published_figure.csv"):
        (tmp_path / "results" / name).symlink_to(ROOT / "results" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_study_train_a_run_for_each_seed_and_plot_one(place, data):
    for script, *words in commands("Run it"):
        if script == "experiments.py":
            assert small_study.run(script, *words, "--epochs", 1, "--batch_size", 20, "--dataset", data) == 0
            runs = sorted(place.glob("results/epochs=1-n_splits=10-*"))
            assert bool(runs) != ("--exec" in words)
        else:
            assert script == "plot.py" and plot.main([small(word, runs[0]) for word in words]) == 0
    assert [run.name.partition("-seed=")[2] for run in runs] == ["", "1", "2"] and Path("figure.png").exists()


def test_the_commands_for_a_run_draw_the_published_one_and_read_checkpoints(undisturbed):
    for script, *words in commands("Work with a run"):
        if "--margins" in words or script == "interpolate.py":  # they need images
            words = [small(word, undisturbed) for word in words] + ["--device", "cpu"]
        assert {"plot.py": plot, "interpolate.py": interpolate}[script].main(words) == 0
    for name in ("from_28.png", "panels.png", "margins.png", "path/*.png", "seeds.png", "table.md", "all.csv"):
        assert next(Path().glob(name)).stat().st_size > 500


def test_load_network_on_images_normalised_as_shown_has_the_recorded_accuracy(undisturbed, data, monkeypatch):
    with np.load(data) as arrays:
        images = types.SimpleNamespace(data=arrays["x_test"], targets=arrays["y_test"].tolist())
    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda *_, **__: images)
    exec(small(block("load_network(run"), undisturbed), names := {})
    assert 100 * names["accuracy"].item() == pytest.approx(names["history"]["test_acc"][-1])


def test_pandas_gives_mean_and_spread_over_seeds():
    pytest.importorskip("pandas")
    assert plot.main(["results/published", "--csv", "all.csv", "--out", "seeds.png"]) == 0
    exec(block("pandas").replace("print", "table ="), names := {})
    runs = [PUBLISHED, *PUBLISHED.parent.glob(f"{PUBLISHED.name}-seed=?")]
    best = [max(load(run / "skinnyprime_lc_version_28/evaluation-history.hist")["test_acc"]) for run in runs]
    found = names["table"].loc[(0.05, 0.01, 28)]["max"].tolist()
    assert found == pytest.approx([np.mean(best), np.std(best, ddof=1), len(runs)])


def test_a_new_quantity_is_added_to_a_finished_run_and_drawn(copy):
    lines, end = block("test_entropy"), "    return values | weight_norms\n"
    before = {path: load(path) for path in copy.rglob("*.hist")}
    edit_a_clone("rnorm/measure.py", {end: lines + end})
    code = "import small_study, plot; small_study.run('convert.py', {0!r}, '--evaluate')"
    run_python((code + "; plot.main([{0!r}, '--panels', 'test_entropy'])").format(str(copy)))
    assert (copy / "figure.png").exists() and len(before) == 3
    for path, history in before.items():
        after = load(path)
        assert all(0 < value < math.log(3) for value in after.pop("test_entropy"))
        assert repr(after) == repr(history)  # repr: NaN equals NaN


def test_label_smoothing_and_a_schedule_train_as_plain_torch_does(place, undisturbed, data):
    loss, schedule = (re.search(rf"`({start}.*?)`", README)[1] for start in ("loss = F", "training.sgd.factor"))
    top = "    order = epoch_order(len(x), training.member.settings, training.epoch)\n"
    edits = {"loss = F.cross_entropy(net(x), y)": loss, top: f"    {schedule.replace('100', '1')}\n{top}"}
    edit_a_clone("train.py", edits)
    words = [*map(str, SMALL[4:]), "--cnn_only", "--dataset", str(data)]
    run_python(f"import small_study; small_study.run('experiments.py', *{words})")
    net, images = small_study.small_cnn(3), load_data(str(data), Path(), 0, torch.device("cpu"))
    net.load_state_dict(from_file(load(undisturbed / "small_0.pyT")))
    for lr in (0.05, 0.005, 0.005):
        for x, y in zip(images.x_train.split(10), images.y_train.split(10)):
            net.zero_grad()
            F.cross_entropy(net(x), y, label_smoothing=0.1).backward()
            torch.optim.SGD(net.parameters(), lr).step()
    (trained,) = place.glob("results/epochs=*/small_3.pyT")
    for key, value in from_file(load(trained)).items():
        torch.testing.assert_close(value, net.state_dict()[key], rtol=1e-4, atol=1e-6)


def test_another_project_with_a_models_of_its_own_uses_the_layer_and_load_network():
    Path("models.py").write_text("mine = 1")
    Path("rnorm").symlink_to(ROOT / "rnorm")  # as `pip install` has it
    code = block("runpy").replace("/path/to/Rnorm", str(ROOT)).replace("/path/to", str(PUBLISHED))
    code += (
        "import models; x = torch.zeros(2, 3, 32, 32)\nprint(models.mine, untied(x[..., :28, :28]).shape, net(x).shape)"
    )
    assert run_python(code) == "1 torch.Size([2, 8, 28, 28]) torch.Size([2, 10])\n"


def test_docs_define_every_key_of_a_runs_files(undisturbed):
    checkpoint, config = load(undisturbed / "small_3.pyT"), json.loads((undisturbed / "config.json").read_text())
    keys = {*checkpoint, *checkpoint["identity"], *checkpoint["history"], *config}
    defined = re.findall(r"`(\w+)`", (ROOT / "docs/files.md").read_text())
    assert {key for key in keys if not re.fullmatch(r"(untied|log_frobenius)_\d+", key)} - {*defined} == set()
