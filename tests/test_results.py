"""What runs recorded is read back as it is, averaged over seeds and tabulated; anything else is refused."""

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from fake_runs import history, make_run, put

from rnorm.checkpoints import save
from rnorm.files import RnormError
from rnorm.measure import KEYS
from rnorm.results import (
    combine, not_complete, read_reference, read_runs, summary, table, table_rows, tidy_rows, to_csv,
)  # fmt: skip
from rnorm.runs import Member, Settings

REFERENCE = Path(__file__).parents[1] / "results" / "published_figure.csv"


def group_of(*paths, margin="published", **selection):
    (runs,) = read_runs(list(paths), **selection)
    return combine(runs, margin)


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def refusal(function, *arguments):
    with pytest.raises(RnormError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("results"))


@pytest.fixture
def studied(tmp_path):
    """A run with controls, in which the eLCN from 2 diverged and that from 4 has just begun, both at high accuracy."""
    run = make_run(tmp_path, conversions=("lc", "tied", "cnn"))
    settings = Settings(epochs=4, n_splits=3)
    put(run, Member(settings, "lc", 2), 2, diverged_at=2, test_acc=99)
    put(run, Member(settings, "lc", 4), 1, test_acc=98)
    return run


def test_members_are_the_cnn_and_whatever_was_converted(tmp_path):
    run = make_run(tmp_path, conversions=("lc", "tied", "lc5"))
    labels = [member.label for member in group_of(run).mean]
    assert labels == ["CNN", *(f"{name} from {split}" for name in ("eLCN", "lc5", "tied") for split in (1, 2, 4))]
    chosen = group_of(run, splits=[2, 4], conversions=["tied"])
    assert [member.label for member in chosen.mean] == ["CNN", "tied from 2", "tied from 4"]
    assert refusal(read_runs, [run], [3]) == "there is no split 3, but 1 2 4"
    assert refusal(read_runs, [run], None, ["fc"]) == "there is no conversion fc, but lc lc5 tied"


def test_seeds_become_mean_and_sample_deviation_as_far_as_all_have_come(tmp_path):
    runs = [make_run(tmp_path), make_run(tmp_path, seed=1, cnn_epochs=1, evaluations=2)]
    group = group_of(*runs)
    evaluations = {member.label: len(network["checkpoints"]) for member, network in group.mean.items()}
    assert evaluations == {"CNN": 2, "eLCN from 1": 2, "eLCN from 2": 5, "eLCN from 4": 5}
    assert list(group.seeds.values()) == [2, 2, 1, 1]
    assert group.mean[group.cnn]["test_acc"] == pytest.approx([49, 50])
    assert group.std[group.cnn]["test_acc"] == pytest.approx([math.sqrt(2)] * 2)


def test_a_directory_of_runs_stands_for_all_of_them_without_their_checkpoints(tmp_path):
    runs = [make_run(tmp_path / "published", seed=seed) for seed in (0, 1)]
    assert not list(tmp_path.rglob("*.pyT"))
    group = group_of(tmp_path / "published", *runs, runs[0] / ".." / runs[0].name)  # none twice
    assert group.seeds[group.cnn] == 2


def test_the_best_elcn_is_complete_and_the_others_are_named(studied):
    group = group_of(studied)
    assert group.best.label == "eLCN from 1"
    assert not_complete([group]) == [
        "eLCN from 2 (1 of 4 epochs, diverged in epoch 2)", "eLCN from 4 (0 of 4 epochs)"
    ]  # fmt: skip
    for text in (summary(group, "published"), table([group], "published", ".md")):
        assert all(name in text for name in not_complete([group]))


def test_a_network_is_complete_only_with_all_seeds_and_a_diverged_seed_is_named(tmp_path, studied):
    group = group_of(studied, make_run(tmp_path / "b", seed=3))
    assert not_complete([group])[0] == "eLCN from 2 (1 of 4 epochs, seed 0 diverged in epoch 2)"
    assert group.best.split == 1


def test_where_no_elcn_is_complete_the_furthest_is_marked(studied):
    group = group_of(studied, splits=[2, 4])
    assert group.best is None and group.shown.split == 4
    assert "No eLCN is complete; the furthest: split 4, 98.00 %" in summary(group, "published")
    row = next(row for row in table_rows([group], "published") if row["split_epoch"] == 4)
    assert (row["network"], row["state"]) == ("furthest eLCN (none is complete)", "0 of 4 epochs")
    assert "Best eLCN: none is complete" in summary(group_of(studied, splits=[2]), "published")  # it diverged


def test_controls_stand_beside_the_elcn_of_their_split(studied):
    group = group_of(studied, splits=[1, 2])
    networks = [(row["network"], row["split_epoch"]) for row in table_rows([group], "published")]
    assert networks == [
        ("CNN", ""), ("best eLCN (chosen on test data)", 1), ("cnn", 1), ("tied", 1),
        ("eLCN", 2), ("cnn", 2), ("tied", 2),
    ]  # fmt: skip
    assert "\ntied from 1: 53.00 % test and 64.00 % train accuracy" in summary(group, "published")


def test_a_run_is_summarised_in_four_lines(run):
    assert summary(group_of(run), "published").splitlines() == [
        "CNN: 52.00 % test and 64.00 % train accuracy, log normalized R1-norm 12.75, after 4 of 4 epochs "
        "(published margin)",
        "Best eLCN, chosen on test data: split 2, 54.00 % test and 64.00 % train accuracy, "
        "log normalized R1-norm 12.30, after 4 of 4 epochs",
        "What untying changed: +4.00 points of test accuracy and +2.70 in the norm since the split; +2.00 and -0.45 "
        "against the CNN's end",
        "How far it untied: 4 % of its filters' norm is not shared between positions",
    ]


def test_a_norm_without_a_positive_margin_is_undefined_everywhere(tmp_path):
    group = group_of(make_run(tmp_path, cnn_epochs=0))
    for text in (summary(group, "published"), table([group], "published", ".txt")):
        assert "undefined" in text and "nan" not in text
    assert "Best eLCN: none is complete" in summary(group, "published")


def test_the_margin_decides_the_normalized_norms(run):
    group = group_of(run, margin="multiclass")
    recorded = {key: np.array(values) for key, values in history(range(5)).items()}
    log_prod, norm = (group.mean[group.cnn][key] for key in ("log_prod_norm_normalized", "norm_margin_normalized"))
    assert math.isnan(log_prod[0]) and math.isnan(norm[0])  # the margin is negative there
    margin = recorded["multiclass_margin"][1:]
    assert log_prod[1:] == pytest.approx(recorded["log_prod_norm"][1:] - np.log(margin))
    assert norm[1:] == pytest.approx(recorded["norm"][1:] / margin)


def test_the_table_names_cnn_and_best_elcn_with_mean_and_deviation(tmp_path):
    paths = [make_run(tmp_path, cnn_lr=lr, seed=seed) for lr in (0.05, 0.1) for seed in (0, 1)]
    groups = [combine(runs, "published") for runs in read_runs(paths)]
    rows = rows_of(table(groups, "published", ".csv"))
    assert [row["cnn_lr"] for row in rows] == ["0.05", "0.05", "0.1", "0.1"]
    best = rows[1]
    assert best["network"] == "best eLCN (chosen on test data)" and best["split_epoch"] == "2" and best["seeds"] == "2"
    assert float(best["test_acc"]) == 55 and float(best["test_acc_std"]) == pytest.approx(math.sqrt(2))
    assert float(best["log_prod_norm_normalized"]) == pytest.approx(14 - math.log(5.5))
    assert float(rows[0]["norm_margin_normalized"]) == pytest.approx(104 / 3.5)
    lines = table(groups, "published", ".md").splitlines()
    assert len({line.count("|") for line in lines[:6]}) == 1 and set(lines[1]) == set("|- ")
    assert "55.00 ± 1.41" in lines[3] and "chosen on test data" in lines[-1]
    text = table(groups, "published", ".txt")
    assert "55.00 ± 1.41" in text and "|" not in text


def test_csv_holds_everything_recorded_one_row_per_evaluation(tmp_path):
    run = make_run(tmp_path, conversions=("lc", "tied", "cnn"))
    rows = rows_of(to_csv(tidy_rows(read_runs([run])[0])))
    assert len(rows) == 10 * 5
    first = ["run", "cnn_lr", "lc_lr", "seed", "network", "split_epoch", "checkpoints", "epoch"]
    assert list(rows[0]) == [*first, *KEYS[1:], "untied_1"]
    assert [rows[0][name] for name in first] == [run.name, "0.05", "0.01", "0", "cnn", "", "0", "0"]
    assert [rows[19][name] for name in first] == [run.name, "0.05", "0.01", "0", "elcn", "4", "4", "8"]
    assert {(row["network"], row["split_epoch"]) for row in rows[20:]} == {
        (name, split) for name in ("tied", "cnn") for split in "124"
    }  # fmt: skip
    assert all(float(rows[19][key]) == history(range(5), 4)[key][-1] for key in KEYS)  # to the last digit
    assert rows[0]["log_prod_norm_normalized"] == "nan"


def test_missing_empty_half_written_and_foreign_runs_are_refused(run, tmp_path):
    assert "no config.json" in refusal(read_runs, [tmp_path / "nowhere"])
    assert "no config.json" in refusal(read_runs, [tmp_path])
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_bytes((run / "config.json").read_bytes())
    assert "recorded nothing yet" in refusal(read_runs, [begun])
    recorded = begun / "evaluation-history.hist"
    recorded.write_bytes((run / recorded.name).read_bytes()[:700])
    assert "is damaged" in refusal(read_runs, [begun])
    for content in ({"checkpoints": [0], "loss": [1.0]}, history([0, 1, 3])):
        save(content, recorded)
        assert "not this network's history" in refusal(read_runs, [begun])
    save(history([0, 1]) | {"norm": [10**400, 1]}, recorded)
    assert "is damaged" in refusal(read_runs, [begun])
    (begun / "config.json").write_text("{")
    assert "config.json is damaged" in refusal(read_runs, [begun])
    (begun / "config.json").unlink()
    assert "config.json is missing" in refusal(read_runs, [begun])
    assert "the same run twice" in refusal(read_runs, [run, make_run(tmp_path)])


def test_published_points_are_read_without_the_norm_that_is_no_measurement():
    cnn, elcn = read_reference(REFERENCE, [28]).items()
    assert [cnn[0].label, elcn[0].label] == ["CNN", "eLCN from 28"]
    assert (cnn[1]["epoch"][0], cnn[1]["train_acc"][0]) == (1, 33.73)
    assert elcn[1]["epoch"][0] == 28 and math.isnan(elcn[1]["log_prod_norm_normalized"][0])
    assert elcn[1]["log_prod_norm_normalized"][1] == 12.184 and elcn[1]["test_acc"][0] == 71.52


def test_published_points_as_a_spreadsheet_saves_them_are_read(tmp_path):
    saved = tmp_path / "points.csv"
    saved.write_bytes(b"\xef\xbb\xbf" + REFERENCE.read_bytes().replace(b"cnn,", b"CNN,").replace(b"\n", b"\r\n"))
    for ours, theirs in zip(read_reference(saved).values(), read_reference(REFERENCE).values(), strict=True):
        assert all(np.array_equal(ours[key], theirs[key], equal_nan=True) for key in theirs)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "lacks the columns epoch"),
        (b"network,split_epoch,epoch,train_acc,test_acc\n", "lacks the columns log_normalized_r1_norm"),
        (b"network,split_epoch,epoch,log_normalized_r1_norm,train_acc,test_acc\n", "no published points"),
        (REFERENCE.read_bytes() + b"cnn,,151,twelve,1,2\n", "twelve"),
        (REFERENCE.read_bytes() + b"cnn,,151,1e308,1,2\n", "1e308"),
        (REFERENCE.read_bytes() + b"cnn,,nan,12,1,2\n", "no point"),
        (REFERENCE.read_bytes() + b"fc,9,151,12,1,2\n", "neither cnn nor elcn"),
        (REFERENCE.read_bytes() + b"elcn,,151,12,1,2\n", "cannot be read"),
        (REFERENCE.read_bytes() + b"cnn,,151", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (None, "points.csv cannot be read"),
    ],
)
def test_a_reference_that_is_no_table_of_points_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "points.csv").write_bytes(content)
    assert message in refusal(read_reference, tmp_path / "points.csv")
