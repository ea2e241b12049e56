"""What ships in results/: histories, the tables and curves made of them, and how a run gets there."""

import sys
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
sys.path.insert(0, str(RESULTS))

import plot
import publish
import tables
from fake_runs import make_run

from rnorm.results import read_run, tidy_rows, to_csv


def test_the_shipped_curves_and_table_are_those_of_the_shipped_histories(tmp_path):
    outputs = {"--out": tmp_path / "a.png", "--table": tmp_path / "a.md", "--csv": tmp_path / "a.csv"}
    assert plot.main([str(RESULTS / "published"), *(str(word) for pair in outputs.items() for word in pair)]) == 0
    for name in ("md", "csv"):
        assert (tmp_path / f"a.{name}").read_text() == (RESULTS / f"reproduction.{name}").read_text()


def test_the_readmes_tables_come_from_the_shipped_histories(capsys):
    assert tables.main([]) == 0
    readme = (RESULTS.parent / "README.md").read_text().split("\n\n")
    printed = [block.splitlines() for block in capsys.readouterr().out.split("\n\n") if block.startswith("| ")]
    assert printed
    for titles, *rows in printed:
        (shown,) = (block for block in readme if block.startswith(titles))
        assert set(shown.splitlines()[1:]) <= set(rows)
    for network in ("CNN", "eLCN from 9", "eLCN from 28"):
        (row,) = (row for _, *rows in printed for row in rows if row.startswith(f"| {network} | ") and " to " in row)
        assert any(row in block.splitlines() for block in readme)


def test_a_run_without_epochs_of_the_published_figure_has_no_row_against_it(tmp_path, capsys):
    assert tables.main([str(make_run(tmp_path, cnn_epochs=0))]) == 0
    assert "| CNN |" not in capsys.readouterr().out


def test_a_published_run_holds_all_histories_and_nothing_of_the_machine_it_ran_on(tmp_path, monkeypatch):
    run = make_run(tmp_path, conversions=("lc", "tied"))
    monkeypatch.setattr(publish, "PUBLISHED", tmp_path / "published")
    publish.publish(run)
    published = tmp_path / "published" / run.name
    ours, theirs = (to_csv(tidy_rows([read_run(path)])) for path in (run, published))
    assert ours == theirs
    for name in ("config.json", "status.json"):
        assert str(tmp_path) not in (published / name).read_text()
