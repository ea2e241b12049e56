"""What ships in results/: the tables and curves are those of the shipped histories."""

import sys
from pathlib import Path

import numpy as np
import pytest

RESULTS = Path(__file__).parents[1] / "results"
sys.path.insert(0, str(RESULTS))

import plot
import tables
from fake_runs import make_run, put

from rnorm.runs import Settings


def rows_of(capsys, title: str, *runs: Path) -> list[dict[str, str]]:
    """A table that tables.py prints, by its title."""
    assert tables.main([str(run) for run in runs]) == 0
    part = capsys.readouterr().out.partition(f"## {title}\n")[2].partition("\n## ")[0]
    columns, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in part.splitlines() if "|" in line]
    return [dict(zip(columns, row)) for row in rows]


def test_the_shipped_tables_and_curves_are_those_of_the_shipped_histories(tmp_path, capsys):
    tables.main(["--out", str(tmp_path / "tables.md")])
    assert (tmp_path / "tables.md").read_text() == (RESULTS / "tables.md").read_text()
    (seed_0,) = (RESULTS / "published").glob("*lc_lr=0.01*.npz")
    slow = sorted((RESULTS / "published").glob("*lc_lr=0.01*"))
    for inputs, flag, name in (([seed_0], "--table", "reproduction.md"), (slow, "--csv", "reproduction.csv")):
        out = ["--out", str(tmp_path / "figure.png")]
        assert plot.main([*map(str, inputs), flag, str(tmp_path / name), *out]) == 0
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()


def test_the_readmes_table_is_part_of_the_shipped_one():
    """Each of its cells stands in the row of tables.md of that network and that train loss."""
    readme = (RESULTS.parent / "README.md").read_text()
    shipped = [line for line in (RESULTS / "tables.md").read_text().splitlines() if line.startswith("| ")]
    part = readme.partition("## Results")[2].partition("\n## ")[0]
    _, _, *rows = [line[1:-1].split("|") for line in part.splitlines() if line.startswith("| ")]
    assert 4 <= len(rows) <= 6
    for row in rows:
        cells = [cell.strip() for cell in row if cell.strip()]
        assert any(all(f"| {cell} |" in line for cell in cells) for line in shipped), row


@pytest.fixture
def runs(tmp_path):
    """Two seeds of a CNN, of the eLCN and of its slowed control from 2; each has its own fall of the train loss."""
    for seed in (0, 1):
        settings = Settings(epochs=10, splits=(2,), seed=seed)
        run = make_run(tmp_path, cnn_epochs=10, conversions=(), epochs=10, splits=(2,), seed=seed)
        epochs = np.arange(10)
        put(run, settings, "", 0, 11, train_loss=np.exp(-np.arange(11) / 4), test_acc=60 + np.arange(11))
        put(run, settings, "lc", 2, 10, train_loss=np.exp(-epochs.astype(float)), test_acc=60 + 2 * epochs + seed)
        put(run, settings, "cnn", 2, 10, train_loss=np.exp(-epochs / 2), test_acc=60 + epochs)
    return tmp_path


def test_networks_are_compared_seed_by_seed_where_their_train_loss_first_falls_to_a_level(runs, capsys):
    """ln 0.35 = -1.05: the eLCN after 1.05 epochs, the CNN after 4.2, the slowed CNN after 2.1."""
    rows = {row["network"]: row for row in rows_of(capsys, "At equal train loss", runs) if row["train loss"] == "0.35"}
    # 95 % of a mean of two that differ by 1: 12.71 / 2; and 1.96 * 0.40 points of the test images
    assert rows["eLCN from 2"]["test accuracy minus the CNN's"] == "-1.60 ± 6.40"
    assert rows["eLCN from 2"]["test accuracy minus the slowed CNN's"] == "+0.50 ± 6.40"
    assert rows["eLCN from 2"]["seeds"] == "2" and rows["cnn from 2"]["norm minus the slowed CNN's"] == ""


def test_a_first_epoch_is_compared_with_the_mean_of_the_cnns_around_the_split(runs, capsys, monkeypatch):
    monkeypatch.setattr(tables, "AROUND", 1)
    row = rows_of(capsys, "The first epoch after the split", runs)[0]
    assert row["network"] == "eLCN from 2" and row["test accuracy"] == "+0.50 ± 6.40"  # 62 + seed, minus 62
    assert row["test accuracy: CNN at the split; its range"] == "+0.00; 2.00"


def test_growth_is_counted_from_the_split_layer_by_layer(runs, capsys):
    """ln 0.15 = -1.897: the eLCN after 1.897 epochs, where its margin has risen from 1.5 to 3.397."""
    settings, own = Settings(epochs=10, splits=(2,)), np.arange(10.0)
    losses, layers = {"train_loss": np.exp(-own)}, {"log_frobenius_1": own / 2, "log_frobenius_3": 0 * own}
    put(runs / settings.run_name, settings, "lc", 2, 10, **losses, **layers)
    assert rows_of(capsys, "Which layers grow", runs) == [{
        "network": "eLCN from 2", "seeds": "1", "layer 1": "+0.949", "layer 3": "+0.000",
        "all layers: ln of the product": "+1.897", "the same of operator norms": "+0.190",
        "ln of the published margin": "+0.817",
    }]  # fmt: skip


def test_shuffled_runs_have_tables_of_their_own(tmp_path, capsys):
    """The paper's figure is compared with runs of its settings alone, which keep one order of the images."""
    fixed = make_run(tmp_path / "a", cnn_epochs=9, epochs=150, splits=(9,))
    shuffled = make_run(tmp_path / "b", cnn_epochs=9, epochs=150, splits=(9,), shuffle=True)
    assert tables.main([str(fixed), str(shuffled)]) == 0
    *before, first, last = capsys.readouterr().out.split("\n# ")
    assert first.startswith(fixed.name) and last.startswith(shuffled.name) and "## At equal epochs" in last
    assert "## Paper against here" in before[0] and "## Paper against here" not in first + last
    assert tables.main([str(shuffled)]) == 0
    assert "## Paper against here" not in capsys.readouterr().out


def test_a_norm_that_was_not_recorded_is_called_so(capsys):
    rows = rows_of(capsys, "Other norms and other margins")
    assert any(row["spectral"] == "not recorded" for row in rows)
    assert tables.interval([], 2) == "" and tables.interval([1.0], 2) == "1.00"
    assert tables.interval([1.0], 2, error=0.5) == "1.00 ± 0.98" and tables.interval([np.nan, 1.0], 2) == "undefined"
