"""What ships in results/: histories, the tables and curves made of them, and how a run gets there."""

import sys
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parents[1] / "results"
sys.path.insert(0, str(RESULTS))

import plot
import tables
from fake_runs import make_run, put

from rnorm.runs import Settings


def printed_by(capsys, *runs) -> list[list[str]]:
    """The tables that tables.py prints, each a list of lines."""
    assert tables.main([str(run) for run in runs]) == 0
    return [block.splitlines() for block in capsys.readouterr().out.split("\n\n") if block.startswith("| ")]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_shipped_curves_and_table_are_those_of_the_shipped_histories(tmp_path):
    (seed_0,) = (RESULTS / "published").glob("*.npz")
    for inputs, flag, name in ((seed_0, "--table", "reproduction.md"), (seed_0.parent, "--csv", "reproduction.csv")):
        assert plot.main([str(inputs), flag, str(tmp_path / name), "--out", str(tmp_path / "a.png")]) == 0
        assert (tmp_path / name).read_text() == (RESULTS / name).read_text()


def test_the_tables_in_the_texts_come_from_the_shipped_histories(capsys):
    printed = {titles: rows for titles, *rows in printed_by(capsys)}
    texts = [path.read_text() for path in (RESULTS.parent / "README.md", RESULTS / "README.md")]
    shown = [block.splitlines() for text in texts for block in text.split("\n\n") if block.split("\n")[0] in printed]
    for titles, *rows in shown:
        assert set(rows) <= set(printed[titles])
    _, *paper = next(rows for titles, *rows in shown if "paper" in titles)
    assert [cells(row)[0] for row in paper] == ["CNN", *(f"eLCN from {split}" for split in (1, 9, 28, 85))]


def test_a_run_without_epochs_of_the_published_figure_has_no_row_against_it(tmp_path, capsys):
    assert not any("paper" in titles for titles, *_ in printed_by(capsys, make_run(tmp_path, cnn_epochs=0)))


def test_controls_are_compared_seed_by_seed_at_equal_epochs_and_at_equal_train_loss(tmp_path, capsys):
    """The eLCN has its control's loss of epoch 10 after 2 epochs, between evaluations whose logarithms it halves."""
    for seed in (0, 1):
        settings = Settings(epochs=10, splits=(2,), seed=seed)
        run = make_run(tmp_path, cnn_epochs=10, conversions=(), epochs=10, splits=(2,), seed=seed)
        put(run, settings, "lc", 2, 10, train_loss=np.exp(-np.arange(10.0)), test_acc=60 + 2 * np.arange(10) + seed)
        put(run, settings, "tied", 2, 10, train_loss=np.exp(-np.arange(10) / 4), test_acc=60 + np.arange(10))
    comparison, first = printed_by(capsys, tmp_path)[-2:]
    rows = {cells(row)[3]: dict(zip(cells(comparison[0]), cells(row))) for row in comparison[2:]}
    assert rows["epochs"]["test accuracy"] == "69.00, 78.50, +9.50 ± 0.71"
    assert rows["train loss"]["test accuracy"] == "69.00, 65.00, -4.00 ± 0.71"  # 2.25 epochs: 60 + 4.5 + seed
    assert rows["train loss"]["untied's, or nearest"] == "2, 2" and rows["train loss"]["seeds"] == "2"
    assert [[row[1], row[5]] for row in map(cells, first[2:])] == [
        ["eLCN", "+2.00 ± 0.00"], ["`tied`", "+1.00 ± 0.00 (50 ± 0 %)"], ["CNN at its own rate", "+1.00 ± 0.00"]
    ]  # fmt: skip
