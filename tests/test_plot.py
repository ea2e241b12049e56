"""plot.py draws what runs recorded, writes it where it was told to and nowhere else, and refuses with one line."""

import os
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
from matplotlib.transforms import IdentityTransform

import plot
from rnorm.store import save
from rnorm.cli import Stop
from rnorm.figures import styled
from rnorm.files import RnormError
from rnorm.measure import KEYS
from rnorm.results import grouped, read_curves, read_reference
from rnorm.runs import Member, Settings, read_config

REFERENCE = Path(__file__).parents[1] / "results" / "published_figure.csv"
SETTINGS = Settings(epochs=4, n_splits=3)


def main(*arguments):
    return plot.main([str(a) for a in arguments])


def figure(*arguments):
    """The figure of a command line, with its layout done."""
    args = plot.parse([str(argument) for argument in arguments])
    groups = grouped(read_curves(args.run, args.splits, args.convert_to), args.margin)
    with styled():
        fig = plot.draw(groups, args, read_reference(args.reference) if args.reference else [])
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


def notes_of(fig):
    return " ".join(fig.legends[0].get_title().get_text().split())


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


@pytest.mark.parametrize("flags", [[], ["--splits", 2]])
def test_however_many_conversions_no_two_look_the_same(tmp_path, flags):
    odd = r"odd$\frac$"  # the name of a directory need not be valid mathtext
    run = make_run(tmp_path, conversions=("lc", "tied", "cnn", odd, "tied5", *(f"lc{i}" for i in range(14))))
    fig = figure(run, *flags)
    looks = {str((line._dash_pattern, line.get_color())) for line in fig.legends[0].get_lines()}
    assert len(looks) == 20 and {odd, "CNN", "eLCN", "tied (eLCN's steps)", "cnn (CNN at lc_lr)"} < {*legend_of(fig)}
    if flags:  # a colour for each conversion, the same in other figures
        assert bar_of(fig) is None and fig.get_suptitle() == "cifar10, split at epoch 2, published margin"
        alone = figure(run, *flags, "--convert_to", "cnn")
        colours = [lines_of(drawn.axes[0])["cnn from 2"].get_color() for drawn in (fig, alone)]
        assert colours[0] == colours[1] not in ("grey", lines_of(fig.axes[0])["tied from 2"].get_color())
        assert len({lines_of(fig.axes[0])[f"{name} from 2"].get_color() for name in ("lc5", "tied5")}) == 1


MANY = {"cnn_lr": 0.1, "lc_lr": 0.5, "data_size": 1000, "batch_size": 77, "shuffle": True, "momentum": 0.9,
        "weight_decay": 0.0005, "precision": "float64", "network": "alexnetprime"}  # fmt: skip


@pytest.mark.parametrize("flags", [["--panels", "test_acc"], ["--reference", REFERENCE], ["--overlay"]])
@pytest.mark.parametrize("conversions", [("lc",), ("lc", "tied", "cnn", "lc1+5")])
@pytest.mark.parametrize(
    "settings", [[{}], [{}, MANY], [{"epochs": 150, "n_splits": 20}], [{"splits": (0, 1, 3)}, {"splits": (0, 3)}]]
)
def test_no_text_lies_on_another_or_on_a_line_and_none_squeezes_the_panels(tmp_path, flags, settings, conversions):
    runs = [make_run(tmp_path, 150, conversions=conversions, seed=seed, **changes)
            for changes in settings for seed in (0, 1)]  # fmt: skip
    first, _ = read_config(runs[0])
    put(runs[0], first, conversions[-1], first.split_epochs[0], 2, diverged_at=2)
    fig = figure(*runs, *flags, "--title", "A title of some length")
    unseen = []  # labels of ticks outside the panels are not drawn
    for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        unseen += [tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
        unseen += [tick.label1 for tick in axis.get_minor_ticks()]
    texts = [text for text in fig.findobj(Text) if text.get_text().strip() and text.get_visible()]
    boxes = [text.get_window_extent() for text in texts if text not in unseen]
    boxes += [ax.bbox for ax in fig.axes]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[i + 1 :])
    assert all(min(ax.bbox.width, ax.bbox.height) > 1.9 * fig.dpi for ax in fig.axes)


def test_sixty_rows_are_drawn_soon_and_are_no_picture_that_cannot_be_written(tmp_path):
    start = time.process_time()
    runs = [make_run(tmp_path, conversions=(), cnn_lr=float(lr)) for lr in range(1, 61)]
    assert main(*runs, "--panels", "test_acc", "--out", tmp_path / "a.png") == 0
    assert len(imread(tmp_path / "a.png")) < 2**15 and time.process_time() - start < 40


def test_every_recorded_quantity_can_be_a_panel_or_the_x_axis(run):
    keys = [*KEYS[1:], "untied_1", "log_path1_normalized"]
    fig = figure(run, "--panels", *keys)
    assert len({ax.get_ylabel() for ax in fig.axes}) == len(keys)
    assert lines_of(fig.axes[keys.index("untied")])["eLCN from 2"].get_ydata()[-1] == pytest.approx(0.04)
    (ax,) = figure(run, "--x", "untied", "--panels", "test_acc").axes
    assert ax.get_xlabel() == "distance from tied" and ax.get_xscale() == "linear"
    line = lines_of(ax)["eLCN from 2"]
    assert line.get_xdata() == pytest.approx(np.arange(5) / 100)
    assert line.get_ydata() == pytest.approx(50 + np.arange(5))


def test_over_train_loss_training_runs_to_the_right_and_each_loss_is_shown_where_it_first_was_reached(tmp_path):
    run = make_run(tmp_path, splits=(2,))
    put(run, Settings(epochs=4, splits=(2,)), "lc", 2, 5, train_loss=np.array([1, 0.1, 5, 0.2, 0.01]))
    (ax,) = figure(run, "--x", "train_loss", "--panels", "test_acc").axes
    assert ax.get_xscale() == "log" and ax.xaxis.get_inverted() and ax.get_xlabel() == "train loss, where lowest so far"
    assert list(lines_of(ax)["eLCN from 2"].get_xdata()) == [1, 0.1, 0.01]
    assert list(lines_of(ax)["eLCN from 2"].get_ydata()) == [50, 51, 54]


def test_a_network_without_a_value_is_named_and_a_panel_without_one_says_why(tmp_path):
    run = make_run(tmp_path)
    put(run, SETTINGS, "lc", 2, 5, margin=-1.0)
    fig = figure(run, "--panels", "log_prod_norm_normalized", "test_acc")
    assert notes_of(fig) == "No value: eLCN from 2 (log_prod_norm_normalized)"
    for path in run.rglob("*.hist"):
        save(history(range(5), margin=-1.0), path)
    panels = figure(run).axes
    assert [text.get_text() for text in panels[0].texts] == ["undefined: no margin\nis positive"]
    assert not panels[1].texts


def test_each_seed_is_a_thin_line_and_learning_rates_are_rows_with_common_axes(tmp_path):
    runs = [make_run(tmp_path, seed=seed, cnn_lr=lr) for seed in range(3) for lr in (0.05, 0.1)]
    fig = figure(*runs)
    assert [ax.get_title("left") for ax in fig.axes] == ["cnn_lr=0.05", "", "", "cnn_lr=0.1", "", ""]
    assert len({(*ax.get_ylim(), *ax.get_xlim()) for ax in fig.axes[::3]}) == 1
    cnns = [line for line in fig.axes[2].lines if line.get_gid() == "CNN"]
    assert [line.get_ydata()[0] for line in cnns] == [48, 50, 52] and legend_of(fig) == ["CNN", "eLCN"]
    alone = figure(runs[0]).axes[2].lines[0]
    assert all(line.get_linewidth() < 0.7 * alone.get_linewidth() for line in fig.axes[2].lines)


def test_overlaid_groups_share_a_panel_and_the_legend_tells_them_apart(tmp_path):
    runs = []
    for seed in (0, 1):
        runs.append(make_run(tmp_path, seed=seed, splits=(2,), conversions=("lc", "tied")))
        runs.append(make_run(tmp_path, seed=seed, splits=(2,), lc_lr=0.05, lc_epochs=3))
    fig = figure(*runs, "--overlay", "--panels", "test_acc")
    (ax,) = fig.axes
    assert legend_of(fig) == ["CNN", "eLCN, lc_lr=0.01", "tied, lc_lr=0.01", "eLCN, lc_lr=0.05"]
    assert len(ax.lines) == 2 + 2 * 3 and len({line.get_color() for line in ax.lines}) == 4  # the CNN of a seed is one
    other = figure(make_run(tmp_path / "b"), make_run(tmp_path / "c", cnn_lr=0.1), "--overlay", "--splits", 2)
    assert legend_of(other)[::2] == ["CNN, cnn_lr=0.05", "CNN, cnn_lr=0.1"]
    assert len({str((line._dash_pattern, line.get_color())) for line in other.axes[0].lines}) == 4


def test_a_run_in_progress_is_drawn_as_far_as_it_is_and_says_so(tmp_path, capsys):
    run = make_run(tmp_path, cnn_epochs=3, evaluations=2)
    put(run, SETTINGS, "lc", 2, 2, diverged_at=2)
    fig = figure(run)
    assert {name: list(line.get_xdata()) for name, line in lines_of(fig.axes[2]).items()} == {
        "CNN": [0, 1, 2, 3], "eLCN from 1": [1, 2], "eLCN from 2": [2, 3], "diverged eLCN from 2": [3],
    }  # fmt: skip
    assert "diverged" in legend_of(fig)
    assert notes_of(fig) == "Not complete: CNN (3 of 4), eLCN from 1 (1 of 4), eLCN from 2 (1 of 4)"
    assert main(run) == 0
    assert "| 1 of 4, seed 0 diverged in epoch 2 |" in capsys.readouterr().out
    assert bar_of(figure(make_run(tmp_path / "begun", cnn_epochs=0))) is None


def test_all_published_points_of_the_networks_drawn_are_rings_on_a_logarithmic_axis(tmp_path):
    run = make_run(tmp_path, cnn_epochs=50, epochs=50, splits=(9, 30))
    fig = figure(run, "--reference", REFERENCE)
    norm, train, _ = (lines_of(ax) for ax in fig.axes)
    assert [name for name in norm if "published" in name] == ["published CNN", "published eLCN from 9"]
    points = train["published CNN"]
    assert (points.get_xdata()[0], points.get_ydata()[0], len(points.get_xdata())) == (1, 33.73, 59)
    assert points.get_markevery() is None and points.get_linestyle() == "None"
    assert points.get_markerfacecolor() == "none"  # the line is seen through it
    assert to_hex(points.get_color()) == "#000000" and "published" in legend_of(fig)
    assert fig.axes[0].get_xscale() == "log" and train["CNN"].get_xdata()[0] == 1
    other = figure(run, "--margin", "multiclass", "--reference", REFERENCE, "--title", "Mine")
    counts = [sum("published" in name for name in lines_of(ax)) for ax in other.axes]
    assert counts == [0, 2, 2] and other.get_suptitle() == "Mine, multiclass margin"


def test_a_jump_here_does_not_cut_off_a_published_one():
    x = np.arange(100)
    curve, rings = (np.array([x, np.where(x == 60, top, 12)]) for top in (99, 14))
    along = IdentityTransform()
    assert plot.range_of([curve, rings], [], along)[1] < 14 < plot.range_of([curve], [rings], along)[1] < 20


def test_runs_with_other_settings_have_no_rings(tmp_path, capsys):
    runs = [make_run(tmp_path, cnn_epochs=50, epochs=50, splits=(9,), cnn_lr=lr) for lr in (0.05, 0.1)]
    fig = figure(*runs, "--reference", REFERENCE)
    assert [sum("published" in name for name in lines_of(ax)) for ax in fig.axes] == [2, 2, 2, 0, 0, 0]
    assert main(runs[1], "--reference", REFERENCE, "--out", tmp_path / "a.png") == 0
    assert capsys.readouterr().err == "--reference: no run has the published settings, so no points are drawn\n"


def test_own_epochs_count_from_the_split_and_the_cnn_can_be_left_out(run, tmp_path):
    (ax,) = figure(run, "--splits", 2, "--panels", "test_acc", "--own_epochs").axes
    lines = {name: list(line.get_xdata()[-3:]) for name, line in lines_of(ax).items()}
    assert lines == {"CNN": [0, 1, 2], "eLCN from 2": [2, 3, 4]}
    assert ax.get_xlabel() == "epochs since the split" and ax.get_xscale() == "symlog"
    whole = figure(run).axes[0].get_ylim()[1]
    for without in (figure(run, "--own_epochs"), figure(run, "--no_cnn")):  # of several splits; for its range
        assert "CNN" not in lines_of(without.axes[0]) and without.axes[0].get_ylim()[1] < whole
    begun = make_run(tmp_path, cnn_epochs=0)
    for flag in ("--no_cnn", "--own_epochs"):
        assert "and there are none" in stop(begun, flag, "--out", tmp_path / "figure.png")


def test_a_jump_of_the_loss_and_the_first_epochs_set_no_range(tmp_path):
    run = make_run(tmp_path, conversions=(), cnn_epochs=150, epochs=150, splits=(1,))
    loss, accuracy = np.linspace(1, 0.5, 151), np.linspace(70, 72, 151)
    loss[77], accuracy[:2] = 40, (10, 40)
    put(run, Settings(epochs=150, splits=(1,)), "", 0, 151, train_loss=loss, test_acc=accuracy)
    loss, accuracy = figure(run, "--panels", "train_loss", "test_acc").axes
    assert loss.get_ylim()[1] < 2 and accuracy.get_ylim()[0] > 65
    assert max(loss.lines[0].get_ydata()) == 40  # the line leaves the panel


@pytest.mark.parametrize("ending", ["png", "PDF", "svg"])
def test_the_figure_is_written_in_the_format_of_its_name(run, tmp_path, ending):
    out = tmp_path / f"figure.{ending}"
    assert main(run, "--out", out) == 0
    content = out.read_bytes()
    if ending == "png":
        image = imread(out)
        assert image.shape[1] > 1500
        for colour in [(0, 0, 0), *(to_rgb(plot.BY_SPLIT(x)) for x in (0.0, 0.5, 1.0))]:  # the lines are in the picture
            assert (np.abs(image[..., :3] - colour).max(-1) < 0.02).sum() > 100
    elif ending == "PDF":
        assert content.startswith(b"%PDF") and b"/FontFile2" in content and b"/Type3" not in content
    else:
        assert b"<svg" in content and content.rstrip().endswith(b"</svg>")
    assert [path.name for path in tmp_path.iterdir()] == [out.name]  # and nothing half-written


def test_outputs_go_where_they_are_asked_for_and_the_figure_is_drawn_with_each(tmp_path, capsys):
    run = make_run(tmp_path / "published")
    flags = ["--table", tmp_path / "t.md", "--csv", tmp_path / "a.csv", "--margin", "multiclass", "--best"]
    assert main(run, *flags) == 0
    text = (tmp_path / "t.md").read_text()
    assert "multiclass" in text and "highest test accuracy" in text
    assert (tmp_path / "a.csv").read_text().startswith("run,") and (run / "figure.png").exists()
    assert text in capsys.readouterr().out
    assert main(tmp_path / "published") == 0
    figure_line, titles, *_ = capsys.readouterr().out.splitlines()  # and below it the table
    assert figure_line == f"figure: {tmp_path / 'published' / 'figure.png'}" and titles.startswith("| network ")


def test_no_output_overwrites_a_file_of_a_run_or_an_input_and_mistakes_are_named(tmp_path):
    run, points = make_run(tmp_path), tmp_path / "a.csv"
    (tmp_path / "link.csv").symlink_to(points)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flag in ("--csv", "--table", "--out"):
        for name in ("config.json", "evaluation-history.hist", "skinnyprime_4.pyT"):
            assert "has to end in" in stop(run, flag, run / name)
    assert "that file is an input" in stop(run, "--reference", points, "--csv", run / ".." / "link.csv")
    assert "alone" in stop(run, "--margins", run / "skinnyprime_2.pyT") and "name runs" in stop()
    for flags in (["--x", "norm", "--own_epochs"], ["--log_epochs", "--own_epochs"]):
        assert "there is one x axis" in stop(run, *flags)
    assert "give no --x" in stop(run, "--x", "test_acc", "--reference", REFERENCE)
    for out in (tmp_path / "no" / "figure.png", tmp_path / "is_a_directory.png"):
        (tmp_path / "is_a_directory.png").mkdir(exist_ok=True)
        assert "cannot be written" in stop(run, "--out", out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_quantity_that_is_not_recorded_is_named_with_the_command_that_measures_it(tmp_path):
    """One that only later versions record is NaN in older runs."""
    run = make_run(tmp_path)
    for path in run.rglob("*.hist"):
        save(history(range(5), log_path1=np.nan), path)
    for flag, key in (("panels", "accuracy"), ("x", "accuracy"), ("panels", "log_path1_normalized"), ("margin", "norm"),
                      ("margin", "my_margin")):  # fmt: skip
        said = stop(run, f"--{flag}", key)
        assert said.startswith(f"--{flag} {key} is not recorded") and plot.MEASURE_AGAIN in said
    assert "log_path2_normalized" in stop(run, "--panels", "accuracy")
    assert "multiclass_margin_train_p10" in stop(run, "--margin", "norm")


def script(*arguments, **environment):
    command = [sys.executable, "plot.py", *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(plot.__file__).parent,
                          env=environment)  # fmt: skip


def test_figures_depend_on_the_style_of_the_repository_alone(run, tmp_path):
    """Not on a notebook's backend, nor on a matplotlibrc, nor on a home; and other libraries say nothing."""
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nfigure.constrained_layout.use: True\nfont.size: 30\nno.such.key: 1\nbackend: nonsense\n"
    )
    odd = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
           "HOME": "/dev/null", "XDG_CONFIG_HOME": "/dev/null"}  # fmt: skip
    for name, environment in (("plain.png", {}), ("odd.png", odd)):
        ended = script(run, "--out", tmp_path / name, "--title", "字\x07", **environment)
        assert (ended.returncode, ended.stderr) == (0, "")
    assert (imread(tmp_path / "plain.png") == imread(tmp_path / "odd.png")).all()


def test_a_figure_needs_neither_training_nor_images(run, tmp_path):
    code = "import sys, plot; plot.main(sys.argv[1:]); print('---', *sys.modules)"
    command = [sys.executable, "-c", code, run, "--out", tmp_path / "a.png"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(plot.__file__).parent)
    modules = ended.stdout.rpartition("---")[2].split()
    assert "rnorm.results" in modules and not {"train", "convert", "experiments", "torchvision"} & set(modules)


@pytest.mark.parametrize("module", ["matplotlib.backends.backend_agg", "matplotlib.ft2font"])
def test_ctrl_c_while_a_library_is_imported_stops_the_script_and_nothing_is_written(run, tmp_path, module):
    """A library that is stopped while it is imported may say that it cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, signal, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == '{module}':\n"
        "            sys.meta_path.remove(self)\n"
        "            try:\n"
        "                signal.raise_signal(signal.SIGINT)\n"
        "                [None for _ in range(9)]\n"  # the handler runs soon after
        "            except KeyboardInterrupt:\n"
        "                raise ImportError('initialization failed') from None\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    ended = script(run, "--out", tmp_path / "a.png", PYTHONPATH=str(tmp_path))
    assert (ended.returncode, ended.stderr) == (130, "plot.py: SIGINT: stopped; nothing was written\n")
    assert not (tmp_path / "a.png").exists()


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
    flags = ["--margin", margin, "--device", "cpu", "--out", tmp_path / "m.png"]
    margins = plot.read_margins(plot.parse([str(flag) for flag in ("--margins", *paths, *flags)]))
    assert [one.name for one in margins] == ["CNN, epoch 1", "eLCN from 1, epoch 1"]
    for one, member in zip(margins, members):
        values = torch.load(member.history_file)
        assert one.test.mean() == pytest.approx(values[key][-1], rel=1e-4, abs=1e-6)
        assert 100 * one.right.mean() == pytest.approx(values["test_acc"][-1])
        assert one.training.shape == (60,) and one.test.shape == (30,)
    fig = plot.draw_margins(margins, margin, "")
    assert [ax.get_title() for ax in fig.axes] == ["training set", "test set"]
    assert all(ax.get_xlabel() == f"{margin} margin" and len(ax.patches) == 2 for ax in fig.axes)
    assert legend_of(fig) == [one.name for one in margins] and fig.get_suptitle().endswith(f"{margin} margin")
    assert main("--margins", *paths, *flags) == 0
    assert (imread(tmp_path / "m.png")[..., :3].min(-1) < 0.5).any()


def test_two_test_accuracies_are_compared_image_by_image_worked_by_hand():
    """Of 4 images one is gained and none lost: +25 points, and a standard error of sqrt(1/4 * 3/4 / 3) = 1/4."""
    right = [np.array(bits, bool) for bits in ([1, 0, 0, 1], [1, 1, 0, 1])]
    a, b = (plot.Margins(name, right[0], right[0], bits, "same") for name, bits in zip("ab", right))
    assert plot.accuracies([a, b]).splitlines() == [
        "a: test accuracy 50.00", "b: test accuracy 75.00, +25.00 against the first (paired standard error 25.00)"
    ]  # fmt: skip
    assert "against" not in plot.accuracies([a, b._replace(data_sha256="other")])


def test_bad_checkpoints_are_refused(recorded, tmp_path):
    (tmp_path / "small_1.pyT").write_bytes((recorded / "small_1.pyT").read_bytes())
    assert "lies in no" in stop("--margins", tmp_path / "small_1.pyT")
    assert "published or multiclass" in stop("--margins", recorded / "small_1.pyT", "--margin", "other")
    assert "small_77.pyT is no file" in stop("--margins", recorded / "small_77.pyT")
    (recorded / "small_0.pyT").write_bytes((recorded / "small_1.pyT").read_bytes()[:500])
    for name in ("evaluation-history.hist", "small_0.pyT"):
        with pytest.raises(RnormError, match=name):
            main("--margins", recorded / name)
