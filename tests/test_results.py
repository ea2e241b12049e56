"""What runs recorded is read back as it is, averaged over seeds and tabulated; anything else is refused."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_runs import history, make_run, put

from rnorm.checkpoints import save
from rnorm.files import RnormError
from rnorm.measure import KEYS
from rnorm.results import average, read_curves, read_reference, table, tidy
from rnorm.runs import Settings

REFERENCE = Path(__file__).parents[1] / "results" / "published_figure.csv"
SETTINGS = Settings(epochs=4, n_splits=3)
NORM = "log_prod_norm_normalized"


def read(*paths, splits=None, conversions=None):
    return read_curves(list(paths), splits, conversions)


def group_of(*paths, margin="published", **selection):
    (group,) = average(read(*paths, **selection), margin)
    return {curve.member.label: curve for curve in group}


def refusal(function, *arguments):
    with pytest.raises(RnormError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("results"))


def test_curves_are_the_cnn_and_whatever_was_converted(tmp_path):
    run = make_run(tmp_path, conversions=("lc", "tied", "lc5"))
    by_split = [f"{name} from {split}" for split in (1, 2, 4) for name in ("eLCN", "lc5", "tied")]
    assert list(group_of(run)) == ["CNN", *by_split]
    assert list(group_of(run, splits=[2, 4], conversions=["tied"])) == ["CNN", "tied from 2", "tied from 4"]
    assert refusal(read_curves, [run], [3], None) == "no network has the split 3; there are 1 2 4"
    assert refusal(read_curves, [run], None, ["fc"]) == "no network has the conversion fc; there are lc lc5 tied"


def test_seeds_become_mean_and_sample_deviation_as_far_as_all_have_come(tmp_path):
    runs = make_run(tmp_path), make_run(tmp_path, seed=1, cnn_epochs=1, evaluations=2)
    curves = group_of(tmp_path, *runs, runs[0] / ".." / runs[0].name)  # a directory of runs stands for all, none twice
    lengths = {label: len(curve.own_epochs) for label, curve in curves.items()}
    assert lengths == {"CNN": 2, "eLCN from 1": 2, "eLCN from 2": 5, "eLCN from 4": 5}
    assert [curve.seeds for curve in curves.values()] == [2, 2, 1, 1]
    assert curves["CNN"].mean["test_acc"] == pytest.approx([49, 50])
    assert curves["CNN"].std["test_acc"] == pytest.approx([math.sqrt(2)] * 2)


def test_a_diverged_seed_counts_up_to_its_divergence_and_is_named(tmp_path):
    run = make_run(tmp_path)
    put(run, SETTINGS, "lc", 2, 2, diverged_at=2, test_acc=99)
    put(run, SETTINGS, "lc", 1, 0, diverged_at=0)
    curve = group_of(run, make_run(tmp_path / "b", seed=3))["eLCN from 2"]
    assert curve.mean["test_acc"] == pytest.approx([(99 + 56) / 2, (99 + 57) / 2])
    assert np.isfinite(curve.mean["train_loss"]).all()
    assert (curve.epochs_done, curve.diverged) == (1, ("seed 0 diverged in epoch 2",))
    text = table(average(read(run), "published"), "published")
    assert "| eLCN    | 1    | 0 of 4, seed 0 diverged in epoch 0 |" in text and "nan" not in text


def test_a_quantity_that_was_not_recorded_from_the_start_is_nan_before(tmp_path):
    run = make_run(tmp_path)
    save(history(range(5)) | {"new": [math.nan, math.nan, 1.0, 2.0, 3.0]}, run / "evaluation-history.hist")
    curves = group_of(run)
    np.testing.assert_equal(curves["CNN"].mean["new"], [math.nan, math.nan, 1, 2, 3])
    assert "new" not in curves["eLCN from 1"].mean


def test_the_margin_decides_the_normalized_norms_which_are_undefined_without_a_positive_one(run, tmp_path):
    cnn = group_of(run, margin="multiclass")["CNN"].mean
    recorded = {key: np.array(values) for key, values in history(range(5)).items()}
    assert math.isnan(cnn[NORM][0]) and math.isnan(cnn["norm_margin_normalized"][0])  # the margin is negative there
    margin = recorded["multiclass_margin"][1:]
    assert cnn[NORM][1:] == pytest.approx(recorded["log_prod_norm"][1:] - np.log(margin))
    assert cnn["norm_margin_normalized"][1:] == pytest.approx(recorded["norm"][1:] / margin)
    text = table(average(read(make_run(tmp_path, cnn_epochs=0)), "published"), "published")
    assert "undefined" in text and "nan" not in text


def test_the_table_has_mean_and_deviation_and_what_differs_between_runs(tmp_path):
    runs = [make_run(tmp_path, cnn_lr=lr, seed=seed) for lr in (0.05, 0.1) for seed in (0, 1)]
    lines = table(average(read(*runs), "published"), "published").splitlines()
    assert len({len(line) for line in lines[:10]}) == 1 and set(lines[1]) == set("|- ")
    elcn = [cell.strip() for cell in lines[4].split("|")]
    assert elcn[1:8] == ["cnn_lr=0.05", "eLCN", "2", "4 of 4", "2", "55.00 ± 1.41", "64.00 ± 0.00"]
    assert elcn[8] == f"{14 - math.log(5.5):.3f} ± 0.000"


def test_csv_holds_all_settings_and_everything_recorded_and_reads_back_as_it_was(tmp_path):
    run = make_run(tmp_path, conversions=("lc", "tied", "cnn"), splits=(1, 2), shuffle=True)
    put(run, Settings(epochs=4, splits=(1, 2), shuffle=True), "tied", 2, 2, diverged_at=2)
    rows = list(csv.DictReader(io.StringIO(tidy(read(run)))))
    assert len(rows) == 7 * 5 - 2
    assert {*vars(SETTINGS), *KEYS, "untied_1", "data_sha256", "epoch"} <= set(rows[0])
    assert (rows[0]["network"], rows[0]["data_sha256"], rows[0][NORM]) == ("skinnyprime", "0" * 64, "nan")
    networks = {(row["conversion"], row["split_epoch"]) for row in rows}
    assert networks == {("none", "0"), *((name, split) for name in ("lc", "tied", "cnn") for split in "12")}
    (tmp_path / "all.csv").write_text(tidy(read(run)))
    back = read(tmp_path / "all.csv")
    for ours, theirs in zip(back, read(run), strict=True):
        assert ours.member.settings == theirs.member.settings and ours.member.label == theirs.member.label
        for key in theirs.mean:
            np.testing.assert_array_equal(ours.mean[key], theirs.mean[key])
    assert tidy(back) == (tmp_path / "all.csv").read_text()


def test_runs_of_other_data_are_other_runs_and_tell_so(tmp_path):
    """Two .npz files of one stem give runs of one name."""
    runs = [make_run(tmp_path / name) for name in "ab"]
    config = json.loads((runs[1] / "config.json").read_text())
    del config["crc32"]
    (runs[1] / "config.json").write_text(json.dumps(config | {"data_sha256": "1" * 64}))
    assert len(average(read(*runs), "published")) == 2
    assert {row["data_sha256"][0] for row in csv.DictReader(io.StringIO(tidy(read(*runs))))} == {"0", "1"}
    assert "data_sha256=11111111" in table(average(read(*runs), "published"), "published")


def test_missing_empty_half_written_and_foreign_runs_are_refused(run, tmp_path):
    def refused(*paths):
        return refusal(read_curves, list(paths), None, None)

    assert "no config.json" in refused(tmp_path / "nowhere") and "no config.json" in refused(tmp_path)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_bytes((run / "config.json").read_bytes())
    assert "recorded nothing yet" in refused(begun)
    recorded = begun / "evaluation-history.hist"
    recorded.write_bytes((run / recorded.name).read_bytes()[:700])
    assert "is damaged" in refused(begun)
    for content in ({"checkpoints": [0], "loss": [1.0]}, history([0, 1, 3]), history([0, 1]) | {"norm": [10**400, 1]}):
        save(content, recorded)
        assert "is damaged" in refused(begun)
    (begun / "config.json").write_text("{")
    assert "config.json is damaged" in refused(begun)
    assert "the same run" in refused(run, make_run(tmp_path))
    good = tidy(read(run))
    changed = good.replace(",lc,", ",lc,,"), good.replace(",8,4,", ",9,5,"), good[: len(good) // 2]
    for content in ("", "a,b\n1,2\n", *changed):
        assert content != good
        (tmp_path / "all.csv").write_text(content)
        assert "all.csv cannot be read" in refused(tmp_path / "all.csv")


def test_published_points_are_read_without_the_norm_that_is_no_measurement(tmp_path):
    saved = tmp_path / "as_a_spreadsheet_saves_them.csv"
    saved.write_bytes(b"\xef\xbb\xbf" + REFERENCE.read_bytes().replace(b"cnn,", b"CNN,").replace(b"\n", b"\r\n"))
    for path in (REFERENCE, saved):
        cnn, _, _, elcn, _ = read_reference(path)
        assert [cnn.member.label, elcn.member.label] == ["CNN", "eLCN from 28"]
        assert (cnn.own_epochs[0], cnn.mean["train_acc"][0]) == (1, 33.73)
        assert elcn.own_epochs[0] == 0 and math.isnan(elcn.mean[NORM][0])
        assert elcn.mean[NORM][1] == 12.184 and elcn.mean["test_acc"][0] == 71.52


@pytest.mark.parametrize(
    "row, message",
    [("cnn,,151,twelve,1,2", "twelve"), ("cnn,,nan,12,1,2", "nan"), ("fc,9,151,12,1,2", "fc"),
     ("elcn,9,8,12,1,2", "epoch 8"), ("cnn,,151", "points.csv cannot be read"), ("\0", "cannot be read")],
)  # fmt: skip
def test_a_reference_that_is_no_table_of_points_is_refused(tmp_path, row, message):
    points = tmp_path / "points.csv"
    assert "points.csv cannot be read" in refusal(read_reference, points)
    points.write_text(REFERENCE.read_text() + row)
    assert message in refusal(read_reference, points)
    for content in (b"", REFERENCE.read_bytes().splitlines()[0], b"network,split_epoch,epoch\ncnn,,1\n", b"\xff\xfe"):
        points.write_bytes(content)
        assert "cannot be read" in refusal(read_reference, points)
