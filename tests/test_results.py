"""What runs recorded is read back as it is, averaged over seeds and tabulated; anything else is refused."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_runs import history, make_run, put

from rnorm.store import save
from rnorm.files import RnormError
from rnorm.measure import KEYS
from rnorm.results import best, grouped, read_curves, read_reference, table, tidy
from rnorm.runs import Settings

REFERENCE = Path(__file__).parents[1] / "results" / "published_figure.csv"
SETTINGS = Settings(epochs=4, n_splits=3)
NORM = "log_prod_norm_normalized"


def read(*paths, splits=None, conversions=None):
    return read_curves(list(paths), splits, conversions)


def group_of(*paths, margin="published", **selection):
    (group,) = grouped(read(*paths, **selection), margin)
    return {curve.member.label: curve for curve in group}


def cells(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


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


def test_a_directory_of_runs_stands_for_all_of_them_and_none_counts_twice(tmp_path):
    runs = make_run(tmp_path), make_run(tmp_path, seed=1)
    (group,) = grouped(read(tmp_path, *runs, runs[0] / ".." / runs[0].name), "published")
    assert [(curve.member.label, curve.member.settings.seed) for curve in group[:4]] == [
        ("CNN", 0), ("CNN", 1), ("eLCN from 1", 0), ("eLCN from 1", 1)
    ]  # fmt: skip


def test_the_table_averages_seeds_where_all_have_come(tmp_path):
    runs = make_run(tmp_path), make_run(tmp_path, seed=1, cnn_epochs=1, evaluations=2)
    rows = cells(table(grouped(read(*runs), "published"), "published"))[2:]
    assert [row[:5] for row in rows] == [
        ["CNN", "", "1 of 4", "2", "50.00 ± 1.41"], ["eLCN", "1", "1 of 4", "2", "51.00 ± 1.41"],
        ["eLCN", "2", "4 of 4", "1", "54.00"], ["eLCN", "4", "4 of 4", "1", "52.00"],
    ]  # fmt: skip


def test_a_diverged_seed_counts_up_to_its_divergence_and_is_named(tmp_path):
    run = make_run(tmp_path)
    put(run, SETTINGS, "lc", 2, 2, diverged_at=2, test_acc=99)
    put(run, SETTINGS, "lc", 1, 0, diverged_at=0)
    curve = group_of(run)["eLCN from 2"]
    assert curve.values["test_acc"] == pytest.approx([99, 99]) and np.isfinite(curve.values["train_loss"]).all()
    assert (curve.epochs_done, curve.diverged_in) == (1, 2)
    groups = grouped(read(run, make_run(tmp_path / "b", seed=3)), "published")
    text = table(groups, "published")
    assert ["eLCN", "2", "1 of 4, seed 0 diverged in epoch 2", "2", "78.00 ± 29.70"] in [row[:5] for row in cells(text)]
    assert "| 0 of 4, seed 0 diverged in epoch 0 |" in text and "nan" not in text + best(groups)


def test_the_highest_accuracy_is_chosen_seed_by_seed_and_stands_beside_the_last(tmp_path):
    """Seed 1 is best after epoch 2 from 4, seed 0 at the end from 2."""
    runs = [make_run(tmp_path, seed=seed) for seed in (0, 1)]
    put(runs[1], Settings(epochs=4, n_splits=3, seed=1), "lc", 4, 5, test_acc=np.array([1, 2, 90, 3, 4]))
    _, _, cnn, elcn = cells(best(grouped(read(*runs), "published")))
    assert cnn == ["CNN", "2", "53.00 ± 1.41", "4, 4", "53.00 ± 1.41"]
    assert elcn[:2] == ["eLCN", "2"] and sorted(elcn[3].split(", ")) == ["2 from 4", "4 from 2"]
    assert elcn[2] == "72.00 ± 25.46" and elcn[4] == "29.00 ± 35.36"  # of 54 and 90, of 54 and 4


def test_a_quantity_that_was_not_recorded_from_the_start_is_nan_before(tmp_path):
    run = make_run(tmp_path)
    save(history(range(5)) | {"new": [math.nan, math.nan, 1.0, 2.0, 3.0]}, run / "evaluation-history.hist")
    curves = group_of(run)
    np.testing.assert_equal(curves["CNN"].values["new"], [math.nan, math.nan, 1, 2, 3])
    assert "new" not in curves["eLCN from 1"].values


@pytest.mark.parametrize("margin, key", [("multiclass", "multiclass_margin"), ("my_margin", "my_margin")])
def test_any_margin_divides_any_norm_which_is_undefined_where_it_is_not_positive(tmp_path, margin, key):
    run = make_run(tmp_path)
    recorded = history(range(5), my_margin=np.arange(5) - 1.0, log_mine=np.arange(5) ** 2)
    save(recorded, run / "evaluation-history.hist")
    cnn = group_of(run, margin=margin)["CNN"].values
    positive = np.array(recorded[key]) > 0
    assert 2 < positive.sum() < 5
    divisor = np.array(recorded[key])[positive]
    for norm in ("log_prod_norm", "log_prod_spectral", "log_path1", "log_path2", "log_mine"):
        expected = np.array(recorded[norm])[positive] - np.log(divisor)
        assert cnn[f"{norm}_normalized"][positive] == pytest.approx(expected)
        assert np.isnan(cnn[f"{norm}_normalized"][~positive]).all()
    assert cnn["norm_margin_normalized"][positive] == pytest.approx(np.array(recorded["norm"])[positive] / divisor)
    assert not any(key.endswith("_normalized_normalized") for key in cnn)


def test_a_norm_without_a_margin_is_undefined_in_the_table(tmp_path):
    text = table(grouped(read(make_run(tmp_path, cnn_epochs=0)), "published"), "published")
    assert "undefined" in text and "nan" not in text


def test_only_cifar_10_with_the_published_settings_is_the_published_study(tmp_path):
    def published(name, sha256="0" * 64, **settings):
        run = make_run(tmp_path / name, **settings)
        config = json.loads((run / "config.json").read_text())
        del config["crc32"]
        (run / "config.json").write_text(json.dumps(config | {"data_sha256": sha256}))
        return read(run)[0].is_published

    shipped = json.loads(next(REFERENCE.parent.glob("published/*/config.json")).read_text())["data_sha256"]
    assert published("a") and published("b", seed=3, precision="float64", splits=(1,))
    assert published("c", shipped, dataset="cifar10.npz") and not published("d", dataset="cifar10.npz")
    others = {"dataset": "cifar100", "network": "alexnetprime", "batch_size": 100, "cnn_lr": 0.1, "lc_lr": 0.05,
              "shuffle": True, "momentum": 0.9, "weight_decay": 0.1, "data_size": 9}  # fmt: skip
    for name, value in others.items():
        assert not published(name, **{name: value})


def test_the_table_has_mean_and_deviation_and_what_differs_between_runs(tmp_path):
    runs = [make_run(tmp_path, cnn_lr=lr, seed=seed) for lr in (0.05, 0.1) for seed in (0, 1)]
    lines = table(grouped(read(*runs), "published"), "published").splitlines()
    assert len({len(line) for line in lines[:10]}) == 1 and set(lines[1]) == set("|- ")
    elcn = [cell.strip() for cell in lines[4].split("|")]
    assert elcn[1:8] == ["cnn_lr=0.05", "eLCN", "2", "4 of 4", "2", "55.00 ± 1.41", "64.00 ± 0.00"]
    assert elcn[8] == f"{14 - math.log(5.5):.3f} ± 0.000" and "± is the standard deviation over seeds" in lines[-1]
    assert "±" not in table(grouped(read(runs[0]), "published"), "published")


def test_csv_holds_all_settings_and_everything_recorded(tmp_path):
    run = make_run(tmp_path, conversions=("lc", "tied", "cnn"), splits=(1, 2), shuffle=True)
    put(run, Settings(epochs=4, splits=(1, 2), shuffle=True), "tied", 2, 2, diverged_at=2)
    rows = list(csv.DictReader(io.StringIO(tidy(read(run)))))
    assert len(rows) == 7 * 5 - 2
    assert {*vars(SETTINGS), *KEYS, "untied_1", "data_sha256", "epoch"} <= set(rows[0])
    assert (rows[0]["network"], rows[0]["data_sha256"], rows[0][NORM]) == ("skinnyprime", "0" * 64, "nan")
    networks = {(row["conversion"], row["split_epoch"]) for row in rows}
    assert networks == {("none", "0"), *((name, split) for name in ("lc", "tied", "cnn") for split in "12")}


def test_runs_of_other_data_are_other_runs_and_tell_so(tmp_path):
    """Two .npz files of one stem give runs of one name."""
    runs = [make_run(tmp_path / name) for name in "ab"]
    config = json.loads((runs[1] / "config.json").read_text())
    del config["crc32"]
    (runs[1] / "config.json").write_text(json.dumps(config | {"data_sha256": "1" * 64}))
    assert len(grouped(read(*runs), "published")) == 2
    assert {row["data_sha256"][0] for row in csv.DictReader(io.StringIO(tidy(read(*runs))))} == {"0", "1"}
    assert "data_sha256=11111111" in table(grouped(read(*runs), "published"), "published")


def test_half_written_and_damaged_runs_are_refused(run, tmp_path):
    def refused(*paths):
        return refusal(read_curves, list(paths), None, None)

    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_bytes((run / "config.json").read_bytes())
    recorded = begun / "evaluation-history.hist"
    recorded.write_bytes((run / recorded.name).read_bytes()[:700])
    assert "is damaged" in refused(begun)
    for content in ({"checkpoints": [0], "loss": [1.0]}, history([0, 1, 9]), history([0, 1]) | {"norm": [10**400, 1]}):
        save(content, recorded)
        assert "is damaged" in refused(begun)
    (begun / "config.json").write_text("{")
    assert "config.json is damaged" in refused(begun)
    assert "the same run" in refused(run, make_run(tmp_path))


def test_a_run_just_begun_is_left_out_with_a_line(tmp_path, capsys):
    runs = [make_run(tmp_path, seed=seed) for seed in (0, 1)]
    (runs[1] / "evaluation-history.hist").unlink()
    assert {curve.member.settings.seed for curve in read(tmp_path)} == {0}
    assert capsys.readouterr().err == f"{runs[1]} is left out: it has recorded nothing yet\n"
    assert "nothing is recorded yet" in refusal(read_curves, [runs[1]], None, None)


def test_a_directory_that_is_no_run_is_named_with_what_reads_the_released_codes_results(tmp_path):
    released = tmp_path / "skinnyprime-exec=1"
    for path in (tmp_path / "nowhere", tmp_path, released):
        said = refusal(read_curves, [path], None, None)
        assert f"results/import_released.py {path} OUT" in said and "no config.json" in said
        assert not any(word in said for word in ("delete", "fresh", "start over"))
        released.mkdir(exist_ok=True)
        (released / "skinnyprime_1.pyT").touch()


def test_published_points_are_read_without_the_norm_that_is_no_measurement(tmp_path):
    saved = tmp_path / "as_a_spreadsheet_saves_them.csv"
    saved.write_bytes(b"\xef\xbb\xbf" + REFERENCE.read_bytes().replace(b"cnn,", b"CNN,").replace(b"\n", b"\r\n"))
    for path in (REFERENCE, saved):
        cnn, _, _, elcn, _ = read_reference(path)
        assert [cnn.member.label, elcn.member.label] == ["CNN", "eLCN from 28"]
        assert (cnn.own_epochs[0], cnn.values["train_acc"][0]) == (1, 33.73)
        assert elcn.own_epochs[0] == 0 and math.isnan(elcn.values[NORM][0])
        assert elcn.values[NORM][1] == 12.184 and elcn.values["test_acc"][0] == 71.52


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
