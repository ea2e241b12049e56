"""plot.py draws what runs recorded, writes it where it was told to and nowhere else, and refuses with one line."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_study
import torch
from conftest import make_arrays
from fake_runs import history, make_run, put
from matplotlib.colors import to_hex, to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

import plot
from rnorm.checkpoints import save
from rnorm.cli import Stop
from rnorm.files import RnormError
from rnorm.measure import KEYS
from rnorm.results import average, read_curves, read_reference, render
from rnorm.runs import Member, Settings, read_config

REFERENCE = Path(__file__).parents[1] / "results" / "published_figure.csv"
SETTINGS = Settings(epochs=4, n_splits=3)


def main(*arguments):
    return plot.main([str(a) for a in arguments])


def figure(*runs, margin="published", panels=plot.PANELS, splits=None, conversions=None, **kwargs):
    """The figure of runs, as `main` draws it, with its layout done."""
    groups = average(read_curves(list(runs), splits, conversions), margin)
    with plot.matplotlib.rc_context(plot.STYLE):
        fig = plot.draw(groups, panels, margin, **kwargs)
        fig.draw_without_rendering()
    return fig


def lines_of(ax):
    """By network; crosses and published points with `diverged ` and `published ` before it."""
    marked = {"diverged": "diverged ", "published": "published "}
    return {marked.get(line.get_label(), "") + line.get_gid(): line for line in ax.lines}


def bar_of(fig):
    """The colour bar; None if there is none."""
    return next((child for ax in fig.axes for child in ax.child_axes), None)


def legend_of(fig):
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


def test_the_published_panels_show_what_was_recorded_on_the_axis_of_the_cnn(run):
    fig = figure(run)
    labels = [ax.get_ylabel() for ax in fig.axes]
    assert labels == ["log normalized R₁-norm", "train accuracy (%)", "test accuracy (%)"]
    assert fig.get_suptitle() == "cifar10, published margin" and legend_of(fig) == ["CNN", "eLCN"]
    for ax, key in zip(fig.axes, plot.PANELS):
        assert ax.get_xlabel() == "epochs" and list(lines_of(ax)) == ["CNN", *(f"eLCN from {s}" for s in (1, 2, 4))]
        for line, split in zip(ax.lines, (0, 1, 2, 4)):
            assert line.get_xdata() == pytest.approx([split + e for e in range(5)])
            assert line.get_ydata() == pytest.approx(history(range(5), split)[key], nan_ok=True)
        # 2 lies half way between 1 and 4
        assert [to_hex(line.get_color()) for line in ax.lines] == [
            "#000000", *(to_hex(plot.BY_SPLIT(x)) for x in (0.0, 0.5, 1.0))
        ]  # fmt: skip
    assert [text.get_text() for text in bar_of(fig).get_yticklabels()] == ["4", "2", "1"]
    luminance = np.array([to_rgb(plot.BY_SPLIT(i)) for i in range(256)]) @ (0.2126, 0.7152, 0.0722)
    assert luminance.min() > 0.1 and luminance.max() < 0.8 and (np.diff(luminance) >= 0).all()  # neither black nor pale


@pytest.mark.parametrize("splits", [None, [2]])
def test_however_many_conversions_no_two_look_the_same_and_four_lines_at_most_are_below(tmp_path, splits):
    odd = r"odd$\frac$"  # the name of a directory need not be valid mathtext
    run = make_run(tmp_path, conversions=("lc", "tied", "cnn", odd, "tied5", *(f"lc{i}" for i in range(14))))
    fig = figure(run, splits=splits)
    looks = {str((line._dash_pattern, line.get_color())) for line in fig.legends[0].get_lines()}
    assert len(looks) == 20 and {odd, "CNN", "eLCN", "tied, eLCN's steps", "CNN at lc_lr"} < {*legend_of(fig)}
    assert fig.legends[0].get_window_extent().height < 4 * plot.LINE * fig.dpi
    if splits:  # a colour for each conversion, the same in other figures
        assert bar_of(fig) is None and fig.get_suptitle() == "cifar10, split at epoch 2, published margin"
        alone = figure(run, splits=[2], conversions=["cnn"])
        colours = [lines_of(of.axes[0])["cnn from 2"].get_color() for of in (fig, alone)]
        assert colours[0] == colours[1] not in ("grey", lines_of(fig.axes[0])["tied from 2"].get_color())
        assert len({lines_of(fig.axes[0])[f"{name} from 2"].get_color() for name in ("lc5", "tied5")}) == 1


MANY = {"cnn_lr": 0.1, "lc_lr": 0.5, "data_size": 1000, "batch_size": 77, "shuffle": True, "momentum": 0.9,
        "weight_decay": 0.0005, "precision": "float64", "network": "alexnetprime"}  # fmt: skip


@pytest.mark.parametrize("conversions", [("lc",), ("lc", "tied", "cnn", "lc1+5")])
@pytest.mark.parametrize("panels", [["test_acc"], plot.PANELS])
@pytest.mark.parametrize(
    "settings", [[{}], [{}, MANY], [{"epochs": 150, "n_splits": 20}], [{"splits": (0, 1, 3)}, {"splits": (0, 3)}]]
)
def test_no_text_lies_on_another_and_none_squeezes_the_panels(tmp_path, panels, settings, conversions):
    runs = [make_run(tmp_path, 150, conversions=conversions, seed=seed, **of) for of in settings for seed in (0, 1)]
    first, _ = read_config(runs[0])
    put(runs[0], first, conversions[-1], first.split_epochs[0], 2, diverged_at=2)
    fig = figure(*runs, panels=panels, reference=read_reference(REFERENCE), title="A title of some length")
    unseen = []  # labels of ticks outside the panels are not drawn
    for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = axis.get_view_interval()
        unseen += [tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
    texts = [text for text in fig.findobj(Text) if text.get_text().strip() and text.get_visible()]
    boxes = [text.get_window_extent() for text in texts if text not in unseen]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[i + 1 :])
    assert all(min(ax.bbox.width, ax.bbox.height) > 1.7 * fig.dpi for ax in fig.axes)


def test_a_hundred_rows_are_drawn_soon_and_are_no_picture_that_cannot_be_written(run):
    curves = []
    for curve in read_curves([run], None, None):
        for lr in range(1, 101):
            member = dataclasses.replace(curve.member, settings=Settings(epochs=4, n_splits=3, cnn_lr=lr))
            curves.append(dataclasses.replace(curve, member=member))
    start = time.process_time()
    with plot.matplotlib.rc_context(plot.STYLE):
        content = render(plot.draw(average(curves, "published"), ["test_acc"]), ".png")
    assert int.from_bytes(content[20:24], "big") < 2**15 and time.process_time() - start < 30


def test_every_recorded_quantity_can_be_a_panel_and_an_empty_one_says_why(run, tmp_path):
    keys = [*KEYS[1:], "untied_1"]
    fig = figure(run, panels=keys)
    assert len({ax.get_ylabel() for ax in fig.axes}) == len(keys)
    assert lines_of(fig.axes[keys.index("untied")])["eLCN from 2"].get_ydata()[-1] == pytest.approx(0.04)
    for path in (negative := make_run(tmp_path)).rglob("*.hist"):
        save(history(range(5), margin=-1.0), path)
    panels = figure(negative).axes
    assert [text.get_text() for text in panels[0].texts] == ["undefined: no margin\nis positive"]
    assert not panels[1].texts


def test_seeds_become_mean_and_band_and_learning_rates_rows_with_common_axes(tmp_path):
    fig = figure(*(make_run(tmp_path, seed=seed, cnn_lr=lr) for seed in range(3) for lr in (0.05, 0.1)))
    assert [ax.get_title("left") for ax in fig.axes] == ["cnn_lr=0.05", "", "", "cnn_lr=0.1", "", ""]
    assert len({(*ax.get_ylim(), *ax.get_xlim()) for ax in fig.axes[::3]}) == 1
    assert all(len(ax.lines) == 4 and len(ax.collections) == 4 for ax in fig.axes[1:3])
    assert lines_of(fig.axes[2])["CNN"].get_ydata() == pytest.approx(np.array(history(range(5), seed=1)["test_acc"]))
    band = fig.axes[2].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(48 + 2 - 2) and band.max() == pytest.approx(48 + 4 + 2 + 2)
    low, high = fig.axes[2].get_ylim()
    assert low < band.min() and band.max() < high
    assert plot.BAND in legend_of(fig)


def test_a_run_in_progress_is_drawn_as_far_as_it_is_and_says_so(tmp_path, capsys):
    run = make_run(tmp_path, cnn_epochs=3, evaluations=2)
    put(run, SETTINGS, "lc", 2, 2, diverged_at=2)
    fig = figure(run)
    assert {name: list(line.get_xdata()) for name, line in lines_of(fig.axes[2]).items()} == {
        "CNN": [0, 1, 2, 3], "eLCN from 1": [1, 2], "eLCN from 2": [2, 3], "diverged eLCN from 2": [3],
    }  # fmt: skip
    assert "diverged" in legend_of(fig)
    assert fig.legends[0].get_title().get_text() == "Not complete: CNN, eLCN from 1, eLCN from 2"
    assert main(run) == 0
    assert "| 1 of 4, seed 0 diverged in epoch 2 |" in capsys.readouterr().out
    assert bar_of(figure(make_run(tmp_path / "begun", cnn_epochs=0))) is None


def test_published_points_of_the_networks_drawn_are_hollow_and_on_top(tmp_path):
    run = make_run(tmp_path, cnn_epochs=50, epochs=50, splits=(9, 30))
    fig = figure(run, reference=read_reference(REFERENCE))
    norm, train, _ = (lines_of(ax) for ax in fig.axes)
    assert [name for name in norm if "published" in name] == ["published CNN", "published eLCN from 9"]
    points = train["published CNN"]
    assert (points.get_xdata()[0], points.get_ydata()[0], len(points.get_xdata())) == (1, 33.73, 59)
    assert points.get_linestyle() == "None" and points.get_markerfacecolor() == "white" and points.get_path_effects()
    assert points.get_zorder() > max(line.get_zorder() for name, line in train.items() if "published" not in name)
    assert to_hex(points.get_color()) == "#000000" and "published" in legend_of(fig)
    other = figure(run, margin="multiclass", reference=read_reference(REFERENCE), title="Mine")
    counts = [sum("published" in name for name in lines_of(ax)) for ax in other.axes]
    assert counts == [0, 2, 2] and other.get_suptitle() == "Mine, multiclass margin"


def test_own_epochs_count_from_the_split_and_the_cnn_can_be_left_out(run, tmp_path):
    (ax,) = figure(run, splits=[2], panels=["test_acc"], own_epochs=True).axes
    lines = {name: list(line.get_xdata()[-3:]) for name, line in lines_of(ax).items()}
    assert lines == {"CNN": [0, 1, 2], "eLCN from 2": [2, 3, 4]}
    assert ax.get_xlabel() == "epochs since the split" and ax.get_xscale() == "symlog"
    whole = figure(run).axes[0].get_ylim()[1]
    for without in (figure(run, own_epochs=True), figure(run, cnn=False)):  # of several splits; for its range
        assert "CNN" not in lines_of(without.axes[0]) and without.axes[0].get_ylim()[1] < whole
    begun = make_run(tmp_path, cnn_epochs=0)
    for flag in ("--no_cnn", "--own_epochs"):
        assert "and there are none" in stop(begun, flag, "--out", tmp_path / "figure.png")


def test_a_jump_of_the_loss_and_the_first_epochs_set_no_range_but_are_marked(tmp_path):
    run = make_run(tmp_path, conversions=(), cnn_epochs=150, epochs=150, splits=(1,))
    loss, accuracy = np.linspace(1, 0.5, 151), np.linspace(70, 72, 151)
    loss[77], accuracy[:2] = 40, (10, 40)
    put(run, Settings(epochs=150, splits=(1,)), "", 0, 151, train_loss=loss, test_acc=accuracy)
    loss, accuracy = figure(run, panels=["train_loss", "test_acc"]).axes
    assert loss.get_ylim()[1] < 2 and [text.get_text() for text in loss.texts] == ["40↑"]
    assert accuracy.get_ylim()[0] > 65 and [text.get_text() for text in accuracy.texts] == ["↓10"]


@pytest.mark.parametrize("ending", ["png", "PDF", "svg"])
def test_the_figure_is_written_in_the_format_of_its_name_and_from_a_csv_the_same(run, tmp_path, ending):
    out, again = tmp_path / f"figure.{ending}", tmp_path / f"again.{ending}"
    assert main(run, "--out", out, "--reference", REFERENCE, "--csv", tmp_path / "all.csv") == 0
    assert main(tmp_path / "all.csv", "--out", again, "--reference", REFERENCE) == 0
    content = out.read_bytes()
    if ending == "png":
        image = imread(out)
        assert image.shape[1] > 1500 and content == again.read_bytes()
        for colour in [(0, 0, 0), *(to_rgb(plot.BY_SPLIT(x)) for x in (0.0, 0.5, 1.0))]:  # the lines are in the picture
            assert (np.abs(image[..., :3] - colour).max(-1) < 0.02).sum() > 100
    elif ending == "PDF":
        assert content.startswith(b"%PDF") and b"/FontFile2" in content and b"/Type3" not in content
    else:
        assert b"<svg" in content and content.rstrip().endswith(b"</svg>")
    assert {path.name for path in tmp_path.iterdir()} == {out.name, again.name, "all.csv"}  # and nothing half-written


def test_outputs_go_where_they_are_asked_for(tmp_path, capsys):
    run = make_run(tmp_path / "published")
    assert main(run, "--table", tmp_path / "t.md", "--csv", tmp_path / "a.csv", "--margin", "multiclass") == 0
    assert "multiclass" in (tmp_path / "t.md").read_text() and (tmp_path / "a.csv").read_text().startswith("run,")
    assert (tmp_path / "t.md").read_text() in capsys.readouterr().out and not list(tmp_path.rglob("figure.png"))
    assert main(tmp_path / "published") == 0
    figure_line, titles, *_ = capsys.readouterr().out.splitlines()  # and below it the table
    assert figure_line == f"figure: {tmp_path / 'published' / 'figure.png'}" and titles.startswith("| network ")


def test_no_output_overwrites_a_file_of_a_run_or_an_input_and_mistakes_are_named(tmp_path):
    run, again = make_run(tmp_path), tmp_path / "a.csv"
    (tmp_path / "link.csv").symlink_to(again)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flag in ("--csv", "--table", "--out"):
        for name in ("config.json", "evaluation-history.hist", "skinnyprime_4.pyT"):
            assert "has to end in" in stop(run, flag, run / name)
    for inputs in ([run, again], [run, "--reference", again]):
        assert "that file is an input" in stop(*inputs, "--csv", run / ".." / "link.csv")
    assert "there are train_loss" in stop(run, "--panels", "accuracy") and "--margin" in stop(run, "--margin", "other")
    assert "alone" in stop(run, "--margins", run / "skinnyprime_2.pyT") and "name runs" in stop()
    for out in (tmp_path / "no" / "figure.png", tmp_path / "is_a_directory.png"):
        (tmp_path / "is_a_directory.png").mkdir(exist_ok=True)
        assert "cannot be written" in stop(run, "--out", out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(plot.__file__).parent)


def test_a_figure_needs_neither_training_nor_images(run, tmp_path):
    code = "import sys, plot; plot.main(sys.argv[1:]); print('---', *sys.modules)"
    modules = python(code, run, "--out", tmp_path / "a.png").stdout.rpartition("---")[2].split()
    assert "rnorm.results" in modules and not {"train", "convert", "experiments", "torchvision"} & set(modules)


def test_a_signal_while_drawing_stops_the_script_and_nothing_is_written(run, tmp_path):
    code = (
        "import runpy, signal, rnorm.results as results\n"
        "results.read_curves = lambda *_: signal.raise_signal(signal.SIGINT)\n"
        "runpy.run_path('plot.py', run_name='__main__')"
    )
    result = python(code, run, "--out", tmp_path / "a.png")
    assert result.returncode == 130 and result.stderr.endswith("stopped; nothing was written\n")
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of one epoch on 60 images, of the CNN and its eLCN."""
    root = tmp_path_factory.mktemp("recorded")
    np.savez(root / "tiny.npz", **make_arrays())
    flags = ["--dataset", root / "tiny.npz", "--epochs", 1, "--splits", 1, "--batch_size", 20, "--cnn_lr", 0.3]
    assert small_study.run("experiments.py", *flags, "--precision", "float64", "--results_dir", root / "runs") == 0
    return next((root / "runs").iterdir())


@pytest.mark.parametrize("margin, key", [("published", "margin"), ("multiclass", "multiclass_margin")])
def test_histograms_show_the_margins_whose_means_were_recorded(recorded, tmp_path, margin, key):
    settings, _ = read_config(recorded)
    members = [Member(recorded, settings), Member(recorded, settings, "lc", 1)]
    paths = [member.checkpoint(1) for member in members]
    margins = plot.read_margins(paths, margin, Path("data"), "cpu")
    assert list(margins) == ["CNN, epoch 1", "eLCN from 1, epoch 1"]
    for parts, member in zip(margins.values(), members):
        recorded_mean = torch.load(member.history_file)[key][-1]
        assert parts["test"].mean() == pytest.approx(recorded_mean, rel=1e-4, abs=1e-6)
        assert parts["training"].shape == (60,) and parts["test"].shape == (30,)
    fig = plot.draw_margins(margins, margin)
    assert [ax.get_title() for ax in fig.axes] == ["training set", "test set"]
    assert all(ax.get_xlabel() == f"{margin} margin" and len(ax.patches) == 2 for ax in fig.axes)
    assert legend_of(fig) == list(margins) and fig.get_suptitle().endswith(f"{margin} margin")
    assert main("--margins", *paths, "--margin", margin, "--device", "cpu", "--out", tmp_path / "m.png") == 0
    assert (imread(tmp_path / "m.png")[..., :3].min(-1) < 0.5).any()


def test_bad_checkpoints_are_refused(recorded, tmp_path):
    (tmp_path / "small_1.pyT").write_bytes((recorded / "small_1.pyT").read_bytes())
    assert "lies in no" in stop("--margins", tmp_path / "small_1.pyT")
    assert "small_77.pyT is no file" in stop("--margins", recorded / "small_77.pyT")
    (recorded / "small_0.pyT").write_bytes((recorded / "small_1.pyT").read_bytes()[:500])
    for name in ("evaluation-history.hist", "small_0.pyT"):
        with pytest.raises(RnormError, match=name):
            main("--margins", recorded / name)
