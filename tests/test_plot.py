"""plot.py draws, tabulates and summarises what runs recorded, and refuses anything else with one line."""

import csv
import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.image import imread
from small_study import run as script
from small_study import small_cnn

import plot
from checkpoints import save
from measure import KEYS
from cli import Interrupt, Stop
from runs import HISTORY, Settings, network_directory, write_config

REFERENCE = Path(__file__).parents[1] / "results" / "published_figure.csv"


def history(own_epochs, split, seed=0, **changes):
    """A history with made-up but regular values; the margins are negative at epoch 0 of the CNN."""
    n, first = len(own_epochs), split or 0
    own = np.array(own_epochs, float)
    values = {key: 1 + first + own / 10 + seed for key in KEYS}
    values |= {"test_acc": 50 + own - abs(first - 2) + 2 * seed, "train_acc": 60 + own}
    values |= {"untied": own * bool(first) / 100}
    values |= {"margin": own + first - 0.5, "multiclass_margin": (own + first - 0.5) / 2, "log_prod_norm": 10 + own}
    values |= {"untied_1": values["untied"], "norm": 100 + own}
    with np.errstate(invalid="ignore"):
        values["log_prod_norm_normalized"] = values["log_prod_norm"] - np.log(values["margin"])
    values |= changes | {"checkpoints": own}
    lists = {key: [float(v) for v in np.broadcast_to(value, n)] for key, value in values.items()}
    return lists | {"checkpoints": [int(e) for e in own_epochs]}


def make_run(directory, cnn_epochs=4, elcn_evaluations=9, **settings):
    """A run of 4 epochs with splits 1, 2 and 4, in progress if fewer epochs or evaluations are asked for."""
    settings = Settings(**({"epochs": 4, "n_splits": 3} | settings))
    run = directory / settings.run_name
    run.mkdir(parents=True)
    write_config(run, settings, "0", None, {})
    save(history(range(cnn_epochs + 1), None, settings.seed), run / HISTORY)
    for split in (s for s in settings.split_epochs if s <= cnn_epochs):
        network_directory(run, split).mkdir()
        own = settings.elcn_evaluations[:elcn_evaluations]
        save(history(own, split, settings.seed), network_directory(run, split) / HISTORY)
    return run


def main(*arguments):
    return plot.main([str(a) for a in arguments], Interrupt(), small_cnn)


def figure(*runs, margin="published", panels=plot.PANELS, splits=None, **kwargs):
    """The figure of runs, as `main` draws it, with its layout done."""
    groups = [plot.combine(group, margin) for group in plot.read_runs(list(runs), splits)]
    fig = plot.draw(groups, panels, margin, **kwargs)
    fig.draw_without_rendering()
    return fig


def panels_of(fig):
    return [ax for ax in fig.axes if ax.get_label() != "<colorbar>"]


def bar_of(fig):
    return next(ax for ax in fig.axes if ax.get_label() == "<colorbar>")


def lines_of(ax):
    return {line.get_label(): line for line in ax.lines}


def texts_of(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def stop(*arguments):
    """The message with which bad input is refused."""
    with pytest.raises(Stop) as caught:
        main(*arguments)
    assert caught.value.status == 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was really trained, on 60 images, and the directory of its data."""
    from conftest import make_arrays

    directory = tmp_path_factory.mktemp("trained")
    np.savez(directory / "tiny.npz", **make_arrays())
    script("experiments.py", "--dataset", directory / "tiny.npz", "--epochs", 2, "--splits", 1,
           "--batch_size", 20, "--results_dir", directory)  # fmt: skip
    return next(directory.glob("epochs=*"))


def test_the_figure_has_the_three_published_panels(run):
    fig = figure(run)
    labels = [ax.get_ylabel() for ax in panels_of(fig)]
    assert labels == ["log normalized $R_1$-norm", "train accuracy (%)", "test accuracy (%)"]
    assert all(ax.get_xlabel() == "epochs" for ax in panels_of(fig))
    assert fig.get_suptitle() == "cifar10, published margin"
    for ax in panels_of(fig):
        assert list(lines_of(ax)) == ["CNN", "eLCN from 1", "eLCN from 2", "eLCN from 4"]
    assert texts_of(fig) == ["CNN", "eLCN"]


def test_lines_show_what_was_recorded_on_the_axis_of_the_cnn(run):
    for ax, key in zip(panels_of(figure(run)), plot.PANELS):
        for split, name in ((None, "CNN"), (1, "eLCN from 1"), (2, "eLCN from 2"), (4, "eLCN from 4")):
            recorded = history([0, 1, 2, 3, 4], split)
            line = lines_of(ax)[name]
            assert line.get_xdata() == pytest.approx([(split or 0) + e for e in range(5)])
            assert line.get_ydata() == pytest.approx(recorded[key], nan_ok=True)
            assert np.isfinite(line.get_ydata()[1:]).all()


def test_the_cnn_is_black_and_elcns_are_coloured_by_split_on_a_log_scale(run):
    fig = figure(run)
    for ax in panels_of(fig):
        colours = [to_hex(line.get_color()) for line in ax.lines]
        assert colours[0] == "#000000" and len(set(colours)) == 4
        # 2 lies half way between 1 and 4
        assert colours[1:] == [to_hex(plot.COLOURS(x)) for x in (0.0, 0.5, 1.0)]
    bar = bar_of(fig)
    assert bar.get_ylabel() == "eLCN: split epoch" and bar.get_yscale() == "log"
    assert [label.get_text() for label in reversed(bar.get_yticklabels())] == ["1", "2", "4"]


def test_no_colour_is_as_pale_as_yellow_or_as_dark_as_the_cnn():
    luminance = np.array([to_rgb(plot.COLOURS(i)) for i in range(256)]) @ (0.2126, 0.7152, 0.0722)
    assert luminance.min() > 0.1 and luminance.max() < 0.8
    assert (np.diff(luminance) >= 0).all()  # in grey, too, the order can be read


@pytest.mark.parametrize("splits", [(0,), (7,), (0, 1, 150), Settings().split_epochs])
def test_any_splits_can_be_coloured_and_labelled_without_overlap(splits, tmp_path):
    fig = figure(make_run(tmp_path, cnn_epochs=150, epochs=150, splits=tuple(splits)))
    assert len(panels_of(fig)[0].lines) == 1 + len(splits)
    boxes = sorted(t.get_window_extent().bounds[1::2] for t in bar_of(fig).get_yticklabels() if t.get_text())
    assert all(low + height <= high for (low, height), (high, _) in zip(boxes, boxes[1:]))


@pytest.mark.parametrize("rows, panels", [(1, ["test_acc"]), (1, plot.PANELS), (2, plot.PANELS)])
def test_no_text_lies_on_another(tmp_path, rows, panels):
    runs = [make_run(tmp_path, cnn_lr=lr, seed=seed) for lr in (0.05, 0.1)[:rows] for seed in (0, 1)]
    fig = figure(*runs, panels=panels, reference=plot.read_reference(REFERENCE, None), title="A title of some length")
    texts = [fig._suptitle, *fig.legends[0].get_texts(), bar_of(fig).yaxis.label]
    for ax in panels_of(fig):
        texts += [ax.xaxis.label, ax.yaxis.label, ax._left_title]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = axis.get_view_interval()
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    assert len(boxes) > 10
    for i, one in enumerate(boxes):
        assert fig.bbox.x0 <= one.x0 and one.x1 <= fig.bbox.x1 and fig.bbox.y0 <= one.y0 and one.y1 <= fig.bbox.y1
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])


def test_only_the_asked_for_splits_are_drawn(run):
    assert list(lines_of(panels_of(figure(run, splits=[2]))[0])) == ["CNN", "eLCN from 2"]


def test_every_recorded_quantity_can_be_a_panel(run):
    keys = [*KEYS[1:], "untied_1"]
    fig = figure(run, panels=keys)
    assert len({ax.get_ylabel() for ax in panels_of(fig)}) == len(keys)
    assert lines_of(panels_of(fig)[keys.index("untied")])["eLCN from 2"].get_ydata()[-1] == pytest.approx(0.04)


def test_the_margin_decides_the_normalized_norms_and_is_named(run):
    fig = figure(run, margin="multiclass", panels=list(plot.NORMALIZED), title="Mine")
    recorded = {key: np.array(values) for key, values in history(range(5), None).items()}
    log_prod, norm = (lines_of(ax)["CNN"].get_ydata() for ax in panels_of(fig))
    assert math.isnan(log_prod[0]) and math.isnan(norm[0])  # the margin is negative there
    margin = recorded["multiclass_margin"][1:]
    assert log_prod[1:] == pytest.approx(recorded["log_prod_norm"][1:] - np.log(margin))
    assert norm[1:] == pytest.approx(recorded["norm"][1:] / margin)
    assert fig.get_suptitle() == "Mine, multiclass margin"


def test_a_panel_without_any_value_says_so(tmp_path):
    run = make_run(tmp_path)
    for path in run.rglob(HISTORY):
        save(history(range(5), None, margin=-1.0), path)
    fig = figure(run)
    assert [text.get_text() for text in panels_of(fig)[0].texts] == ["undefined: no margin\nis positive"]
    assert not panels_of(fig)[1].texts


def test_seeds_become_mean_and_band(tmp_path):
    runs = [make_run(tmp_path, seed=seed) for seed in range(3)]
    fig = figure(*runs, panels=["test_acc"])
    (ax,) = panels_of(fig)
    assert len(ax.lines) == 4 and len(ax.collections) == 4
    assert lines_of(ax)["CNN"].get_ydata() == pytest.approx(np.array(history(range(5), None, 1)["test_acc"]))
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(48 + 2 - 2) and band.max() == pytest.approx(48 + 4 + 2 + 2)
    assert "± 1 std. dev." in texts_of(fig) and ax.get_title("left") == "3 seeds"


def test_learning_rates_become_rows_with_common_axes(tmp_path):
    runs = [make_run(tmp_path, cnn_lr=lr) for lr in (0.05, 0.1)]
    fig = figure(*runs)
    axes = panels_of(fig)
    assert [ax.get_title("left") for ax in axes] == ["cnn_lr 0.05", "", "", "cnn_lr 0.1", "", ""]
    assert [len(ax.lines) for ax in axes] == [4] * 6
    assert axes[0].get_ylim() == axes[3].get_ylim() and axes[0].get_xlim() == axes[5].get_xlim()


def test_a_run_in_progress_is_plotted_as_far_as_it_is(tmp_path, capsys):
    run = make_run(tmp_path, cnn_epochs=3, elcn_evaluations=2)
    lines = lines_of(panels_of(figure(run))[1])
    assert {name: list(line.get_xdata()) for name, line in lines.items()} == {
        "CNN": [0, 1, 2, 3], "eLCN from 1": [1, 2], "eLCN from 2": [2, 3],
    }  # fmt: skip
    assert main(run) == 0
    assert "after 3 of 4 epochs" in capsys.readouterr().out


def test_seeds_in_progress_are_averaged_as_far_as_all_have_come(tmp_path):
    runs = [make_run(tmp_path), make_run(tmp_path, seed=1, cnn_epochs=1, elcn_evaluations=2)]
    lines = lines_of(panels_of(figure(*runs))[1])
    assert {name: len(line.get_xdata()) for name, line in lines.items()} == {
        "CNN": 2, "eLCN from 1": 2, "eLCN from 2": 5, "eLCN from 4": 5,
    }  # fmt: skip


def test_a_run_without_elcns_is_a_cnn_alone(tmp_path, capsys):
    run = make_run(tmp_path, cnn_epochs=0)
    assert len(figure(run).axes) == 3  # no colour bar
    assert main(run) == 0
    assert "Best eLCN: none yet" in capsys.readouterr().out


def test_published_points_overlay_their_panels(run):
    fig = figure(run, reference=plot.read_reference(REFERENCE, None))
    norm, train, _ = (lines_of(ax) for ax in panels_of(fig))
    assert list(norm)[4:] == ["published, CNN", "published, eLCN from 9", "published, eLCN from 28"]
    points = train["published, CNN"]
    assert (points.get_xdata()[0], points.get_ydata()[0]) == (1, 33.73) and points.get_linestyle() == "None"
    assert to_hex(points.get_color()) == "#000000"
    assert "published" in texts_of(fig)


def test_the_published_norm_of_an_elcn_at_its_epoch_0_is_left_out(run):
    points = plot.read_reference(REFERENCE, [28])
    assert list(points) == [None, 28]
    assert points[28]["epoch"][0] == 28 and math.isnan(points[28]["log_prod_norm_normalized"][0])
    assert points[28]["log_prod_norm_normalized"][1] == 12.184 and points[28]["test_acc"][0] == 71.52


def test_published_norms_are_not_compared_with_those_of_another_margin(run):
    fig = figure(run, margin="multiclass", reference=plot.read_reference(REFERENCE, None))
    assert [len(ax.lines) for ax in panels_of(fig)] == [4, 7, 7]


@pytest.mark.parametrize("ending", ["png", "PDF", "svg"])
def test_the_figure_is_written_in_the_format_of_its_name(run, tmp_path, ending, capsys):
    out = tmp_path / f"figure.{ending}"
    assert main(run, "--out", out, "--reference", REFERENCE) == 0
    content = out.read_bytes()
    if ending == "png":
        image = imread(out)
        assert image.shape[1] > 1500 and (image[..., :3].min(-1) < 0.5).any()
        dark_to_light = [to_rgb(plot.COLOURS(x)) for x in (0.0, 0.5, 1.0)]
        for colour in [(0, 0, 0), *dark_to_light]:  # the lines are in the picture
            assert (np.abs(image[..., :3] - colour).max(-1) < 0.02).sum() > 100
    elif ending == "PDF":
        assert content.startswith(b"%PDF") and b"/FontFile2" in content and b"/Type3" not in content
    else:
        assert b"<svg" in content and content.rstrip().endswith(b"</svg>")
    assert list(tmp_path.iterdir()) == [out]  # and nothing half-written


def test_a_drawn_run_is_summarised_in_four_lines(run, capsys):
    assert main(run) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"figure: {run / 'figure.png'}"
    assert out[1:] == [
        "CNN: 52.00 % test and 64.00 % train accuracy, log normalized R1-norm 12.75, after 4 of 4 epochs "
        "(published margin)",
        "Best eLCN, chosen on test data: split 2, 54.00 % test and 64.00 % train accuracy, "
        "log normalized R1-norm 12.30, after 4 of 4 epochs",
        "What untying changed: +4.00 points of test accuracy and +2.70 in the norm since the split; +2.00 and -0.45 "
        "against the CNN's end",
        "How far it untied: 4 % of its filters' norm is not shared between positions",
    ]


def test_the_table_names_cnn_and_best_elcn_with_mean_and_deviation(tmp_path, capsys):
    runs = [make_run(tmp_path, cnn_lr=lr, seed=seed) for lr in (0.05, 0.1) for seed in (0, 1)]
    assert main(*runs, "--table", tmp_path / "t.csv") == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text())))
    assert [row["cnn_lr"] for row in rows] == ["0.05", "0.05", "0.1", "0.1"]
    best = rows[1]
    assert best["network"] == "best eLCN (chosen on test data)" and best["split_epoch"] == "2" and best["seeds"] == "2"
    assert float(best["test_acc"]) == 55 and float(best["test_acc_std"]) == pytest.approx(math.sqrt(2))
    assert float(best["log_prod_norm_normalized"]) == pytest.approx(14 - math.log(5.5))
    assert float(rows[0]["norm_margin_normalized"]) == pytest.approx(104 / 3.5)

    assert main(*runs, "--table", tmp_path / "t.md") == 0
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert len({line.count("|") for line in lines[:6]}) == 1 and set(lines[1]) == set("|- ")
    assert "55.00 ± 1.41" in lines[3] and "chosen on test data" in lines[-1]

    capsys.readouterr()
    assert main(*runs, "--table") == 0
    text = capsys.readouterr().out
    assert "55.00 ± 1.41" in text and "|" not in text
    assert main(*runs, "--table", tmp_path / "t.txt", "--margin", "multiclass") == 0
    assert "multiclass" in (tmp_path / "t.txt").read_text()
    assert not list(tmp_path.rglob("figure.png"))  # a table alone was asked for


def test_csv_holds_everything_recorded_one_row_per_evaluation(run, tmp_path):
    assert main(run, "--csv", tmp_path / "all.csv", "--margin", "multiclass") == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "all.csv").read_text())))
    assert len(rows) == 4 * 5
    first = ["run", "cnn_lr", "lc_lr", "seed", "network", "split_epoch", "checkpoints", "epoch"]
    assert list(rows[0]) == [*first, *KEYS[1:], "untied_1"]
    assert [rows[0][name] for name in first] == [run.name, "0.05", "0.01", "0", "cnn", "", "0", "0"]
    assert [rows[-1][name] for name in first] == [run.name, "0.05", "0.01", "0", "elcn", "4", "4", "8"]
    recorded = history(range(5), 4)
    assert all(float(rows[-1][key]) == recorded[key][-1] for key in KEYS)  # to the last digit, whatever --margin says
    assert rows[0]["log_prod_norm_normalized"] == "nan"


def test_a_real_run_is_plotted_whole(trained, tmp_path, capsys):
    assert main(trained, "--out", tmp_path / "a.png", "--panels", "untied", "multiclass_margin_train_min") == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    fig = figure(trained, panels=["untied", "test_acc"])
    untied, accuracy = (lines_of(ax) for ax in panels_of(fig))
    assert (untied["CNN"].get_ydata() == 0).all() and untied["eLCN from 1"].get_ydata()[-1] > 0
    assert accuracy["CNN"].get_ydata()[1] == pytest.approx(accuracy["eLCN from 1"].get_ydata()[0])


@pytest.mark.parametrize("margin, key", [("published", "margin"), ("multiclass", "multiclass_margin")])
def test_histograms_show_the_margins_whose_means_were_recorded(trained, tmp_path, margin, key):
    paths = [trained / "skinnyprime_2.pyT", network_directory(trained, 1) / "skinnyprime_lc_version_2.pyT"]
    margins = plot.read_margins(paths, margin, Path("data"), Interrupt(), small_cnn)
    assert list(margins) == ["CNN, epoch 2", "eLCN from 1, epoch 2"]
    for parts, split in zip(margins.values(), (None, 1)):
        recorded = plot.load_history(network_directory(trained, split) / HISTORY)
        assert parts["test"].mean() == pytest.approx(recorded[key][-1], rel=1e-4, abs=1e-6)
        assert parts["training"].shape == (60,) and parts["test"].shape == (30,)
    fig = plot.draw_margins(margins, margin)
    assert [ax.get_title() for ax in fig.axes] == ["training set", "test set"]
    assert all(ax.get_xlabel() == f"{margin} margin" and len(ax.patches) == 2 for ax in fig.axes)
    assert texts_of(fig) == list(margins) and fig.get_suptitle().endswith(f"{margin} margin")
    assert main("--margins", *paths, "--margin", margin, "--out", tmp_path / "m.png") == 0
    assert (imread(tmp_path / "m.png")[..., :3].min(-1) < 0.5).any()


def test_bad_checkpoints_are_refused(trained, run, tmp_path):
    assert "lies in no run" in stop("--margins", tmp_path / "skinnyprime_1.pyT")
    assert "No such file" in stop("--margins", trained / "skinnyprime_77.pyT")
    assert "no checkpoint of its run" in stop("--margins", trained / HISTORY)
    (trained / "half.pyT").write_bytes((trained / "skinnyprime_2.pyT").read_bytes()[:500])
    assert "no checkpoint of its run" in stop("--margins", trained / "half.pyT")
    assert "alone" in stop(run, "--margins", trained / "skinnyprime_2.pyT")
    assert "alone" in stop()


def test_other_data_than_the_runs_are_refused(trained, tmp_path):
    copy = tmp_path / trained.name
    copy.mkdir()
    settings, config = Settings.of_run(trained)
    write_config(copy, settings, "of other data", config["dataset_file"], {})
    assert "not those of its run" in stop("--margins", copy / "skinnyprime_2.pyT")


def test_missing_empty_half_written_and_foreign_runs_are_refused(run, tmp_path):
    assert "no config.json" in stop(tmp_path / "nowhere")
    assert "no config.json" in stop(tmp_path)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_bytes((run / "config.json").read_bytes())
    assert "recorded nothing yet" in stop(begun)
    (begun / HISTORY).write_bytes((run / HISTORY).read_bytes()[:700])
    assert "is damaged" in stop(begun)
    save({"checkpoints": [0], "loss": [1.0]}, begun / HISTORY)
    assert "not this network's history" in stop(begun)
    save(history([0, 1, 3], None), begun / HISTORY)
    assert "not this network's history" in stop(begun)
    save(history([0, 1], None) | {"norm": [10**400, 1]}, begun / HISTORY)
    assert "is damaged" in stop(begun)
    (begun / "config.json").write_text("{")
    assert "is damaged" in stop(begun)


def test_the_script_ends_with_one_line_and_status_2_on_bad_input(tmp_path):
    command = [sys.executable, plot.__file__, str(tmp_path / "nowhere")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("plot.py: ") and result.stderr.count("\n") == 1


def test_mistakes_on_the_command_line_are_named(run, tmp_path):
    assert "there are train_loss" in stop(run, "--panels", "accuracy")
    assert "there are 1 2 4" in stop(run, "--splits", 3)
    assert ".png, .pdf, .svg" in stop(run, "--out", tmp_path / "figure.jpg")
    assert ".md, .csv, .txt" in stop(run, "--table", tmp_path / "table.tex")
    assert "--margin" in stop(run, "--margin", "other")


def test_the_same_run_twice_is_one_or_refused(run, tmp_path):
    assert len(plot.read_runs([run, run / ".." / run.name], None)) == 1
    assert "the same run twice" in stop(run, make_run(tmp_path))


def test_outputs_that_cannot_be_written_are_named(run, tmp_path):
    assert "cannot be written" in stop(run, "--out", tmp_path / "no" / "figure.png")
    (tmp_path / "is_a_directory.png").mkdir()
    assert "cannot be written" in stop(run, "--out", tmp_path / "is_a_directory.png")
    assert [path.name for path in tmp_path.iterdir()] == ["is_a_directory.png"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "lacks the columns network"),
        (b"network,split_epoch,epoch,train_acc,test_acc\n", "lacks the columns log_normalized_r1_norm"),
        (REFERENCE.read_bytes() + b"cnn,,151,twelve,1,2\n", "twelve"),
        (REFERENCE.read_bytes() + b"elcn,,151,12,1,2\n", "cannot be read"),
        (REFERENCE.read_bytes() + b"cnn,,151", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_reference_that_is_no_table_of_points_is_refused(run, tmp_path, content, message):
    (tmp_path / "points.csv").write_bytes(content)
    assert message in stop(run, "--out", tmp_path / "a.png", "--reference", tmp_path / "points.csv")
    assert not (tmp_path / "a.png").exists()


def test_a_missing_reference_is_named(run, tmp_path):
    assert "none.csv" in stop(run, "--out", tmp_path / "a.png", "--reference", tmp_path / "none.csv")
