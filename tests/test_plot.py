"""plot.py draws what runs recorded, writes it where it was told to and nowhere else, and refuses with one line."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_arrays
from fake_runs import history, make_run, put
from matplotlib.colors import to_hex, to_rgb
from matplotlib.image import imread
from matplotlib.text import Text
from torch import nn

import plot
from models import NETWORKS, ConvNet
from rnorm.checkpoints import Track, save
from rnorm.cli import Stop
from rnorm.conversions import find_conversion
from rnorm.data import load_data
from rnorm.files import RnormError
from rnorm.measure import KEYS, evaluate
from rnorm.results import combine, read_reference, read_runs
from rnorm.runs import Member, Settings, read_config, write_config

REFERENCE = Path(__file__).parents[1] / "results" / "published_figure.csv"


def main(*arguments):
    return plot.main([str(a) for a in arguments])


def figure(*runs, margin="published", panels=plot.PANELS, splits=None, conversions=None, **kwargs):
    """The figure of runs, as `main` draws it, with its layout done."""
    groups = [combine(group, margin) for group in read_runs(list(runs), splits, conversions)]
    with plot.matplotlib.rc_context(plot.STYLE):
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


def test_the_three_published_panels_show_what_was_recorded_on_the_axis_of_the_cnn(run):
    fig = figure(run)
    labels = [ax.get_ylabel() for ax in panels_of(fig)]
    assert labels == ["log normalized $R_1$-norm", "train accuracy (%)", "test accuracy (%)"]
    assert all(ax.get_xlabel() == "epochs" for ax in panels_of(fig))
    assert fig.get_suptitle() == "cifar10, published margin"
    assert texts_of(fig) == ["CNN", "eLCN"] and not fig.legends[0].get_title().get_text()
    for ax, key in zip(panels_of(fig), plot.PANELS):
        assert list(lines_of(ax)) == ["CNN", "eLCN from 1", "eLCN from 2", "eLCN from 4"]
        for line, split in zip(ax.lines, (0, 1, 2, 4)):
            assert line.get_xdata() == pytest.approx([split + e for e in range(5)])
            assert line.get_ydata() == pytest.approx(history(range(5), split)[key], nan_ok=True)
            assert np.isfinite(line.get_ydata()[1:]).all()


def test_the_cnn_is_black_and_the_others_are_coloured_by_split_on_a_log_scale(run):
    fig = figure(run)
    for ax in panels_of(fig):
        colours = [to_hex(line.get_color()) for line in ax.lines]
        # 2 lies half way between 1 and 4
        assert colours == ["#000000", *(to_hex(plot.COLOURS(x)) for x in (0.0, 0.5, 1.0))]
    bar = bar_of(fig)
    assert bar.get_ylabel() == "split epoch" and bar.get_yscale() == "log"
    assert [label.get_text() for label in reversed(bar.get_yticklabels())] == ["1", "2", "4"]


def test_no_colour_is_as_pale_as_yellow_or_as_dark_as_the_cnn():
    luminance = np.array([to_rgb(plot.COLOURS(i)) for i in range(256)]) @ (0.2126, 0.7152, 0.0722)
    assert luminance.min() > 0.1 and luminance.max() < 0.8
    assert (np.diff(luminance) >= 0).all()  # in grey, too, the order can be read


def test_every_conversion_has_a_line_style_of_its_own_and_is_in_the_legend(tmp_path):
    odd = r"odd$\frac$"  # the name of a directory need not be valid mathtext
    run = make_run(tmp_path, conversions=("lc", "tied", "cnn", odd))
    fig = figure(run)
    styles = {name: line.get_linestyle() for name, line in lines_of(panels_of(fig)[0]).items()}
    assert styles["CNN"] == styles["eLCN from 1"] == "-"
    own = {name: styles[f"{name} from 1"] for name in ("cnn", odd, "tied")}
    assert len({"-", *own.values()}) == 4 and own["tied"] == styles["tied from 4"]
    colours = {to_hex(line.get_color()) for name, line in lines_of(panels_of(fig)[0]).items() if "from 2" in name}
    assert len(colours) == 1
    assert texts_of(fig) == ["CNN", "eLCN", "converted to cnn", f"converted to {odd}", "converted to tied"]
    assert [line.get_linestyle() for line in fig.legends[0].get_lines()] == ["-", "-", *own.values()]
    chosen = figure(run, splits=[2], conversions=["tied"])
    assert list(lines_of(panels_of(chosen)[0])) == ["CNN", "tied from 2"]
    assert texts_of(chosen) == ["CNN", "converted to tied"]


@pytest.mark.parametrize("splits", [(0,), (7,), (0, 1, 150), Settings().split_epochs])
def test_any_splits_can_be_coloured_and_labelled_without_overlap(splits, tmp_path):
    fig = figure(make_run(tmp_path, cnn_epochs=150, epochs=150, splits=tuple(splits)))
    assert len(panels_of(fig)[0].lines) == 1 + len(splits)
    boxes = sorted(t.get_window_extent().bounds[1::2] for t in bar_of(fig).get_yticklabels() if t.get_text())
    assert all(low + height <= high for (low, height), (high, _) in zip(boxes, boxes[1:]))


def drawn_texts(fig):
    """All texts of a figure but the labels of ticks outside the panels, which are not drawn."""
    outside = []
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = axis.get_view_interval()
            outside += [tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
    return [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible() and t not in outside]


@pytest.mark.parametrize("conversions", [("lc",), ("lc", "tied", "cnn", "lc1+5")])
@pytest.mark.parametrize("rows, panels", [(1, ["test_acc"]), (1, plot.PANELS), (2, plot.PANELS)])
def test_no_text_lies_on_another(tmp_path, rows, panels, conversions):
    runs = [make_run(tmp_path, conversions=conversions, cnn_lr=lr, seed=seed)
            for lr in (0.05, 0.1)[:rows] for seed in (0, 1)]  # fmt: skip
    for conversion in conversions[1:]:
        put(runs[0], Member(Settings(epochs=4, n_splits=3), conversion, 2), 2, diverged_at=2)
    fig = figure(*runs, panels=panels, reference=read_reference(REFERENCE), title="A title of some length")
    boxes = [text.get_window_extent() for text in drawn_texts(fig)]
    assert len(boxes) > 10
    for i, one in enumerate(boxes):
        assert fig.bbox.x0 <= one.x0 and one.x1 <= fig.bbox.x1 and fig.bbox.y0 <= one.y0 and one.y1 <= fig.bbox.y1
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])


def test_every_recorded_quantity_can_be_a_panel(run):
    keys = [*KEYS[1:], "untied_1"]
    fig = figure(run, panels=keys)
    assert len({ax.get_ylabel() for ax in panels_of(fig)}) == len(keys)
    assert lines_of(panels_of(fig)[keys.index("untied")])["eLCN from 2"].get_ydata()[-1] == pytest.approx(0.04)


def test_a_panel_without_any_value_says_so(tmp_path):
    run = make_run(tmp_path)
    for path in run.rglob("*.hist"):
        save(history(range(5), margin=-1.0), path)
    fig = figure(run, margin="published")
    assert [text.get_text() for text in panels_of(fig)[0].texts] == ["undefined: no margin\nis positive"]
    assert not panels_of(fig)[1].texts


def test_seeds_become_mean_and_band(tmp_path):
    fig = figure(*(make_run(tmp_path, seed=seed) for seed in range(3)), panels=["test_acc"])
    (ax,) = panels_of(fig)
    assert len(ax.lines) == 4 and len(ax.collections) == 4
    assert lines_of(ax)["CNN"].get_ydata() == pytest.approx(np.array(history(range(5), seed=1)["test_acc"]))
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(48 + 2 - 2) and band.max() == pytest.approx(48 + 4 + 2 + 2)
    assert "± 1 std. dev." in texts_of(fig) and ax.get_title("left") == "3 seeds"


def test_learning_rates_become_rows_with_common_axes(tmp_path):
    axes = panels_of(figure(*(make_run(tmp_path, cnn_lr=lr) for lr in (0.05, 0.1))))
    assert [ax.get_title("left") for ax in axes] == ["cnn_lr 0.05", "", "", "cnn_lr 0.1", "", ""]
    assert [len(ax.lines) for ax in axes] == [4] * 6
    assert axes[0].get_ylim() == axes[3].get_ylim() and axes[0].get_xlim() == axes[5].get_xlim()


def test_a_run_in_progress_is_drawn_as_far_as_it_is_and_says_so(tmp_path, capsys):
    run = make_run(tmp_path, cnn_epochs=3, evaluations=2)
    put(run, Member(Settings(epochs=4, n_splits=3), "lc", 2), 2, diverged_at=2)
    fig = figure(run, panels=["test_acc"])
    (ax,) = panels_of(fig)
    assert {name: list(line.get_xdata()) for name, line in lines_of(ax).items()} == {
        "CNN": [0, 1, 2, 3], "eLCN from 1": [1, 2], "eLCN from 2": [2, 3], "eLCN from 2, diverged": [3],
    }  # fmt: skip
    note = " ".join(fig.legends[0].get_title().get_text().split())
    assert note.startswith("Not complete: eLCN from 2 (1 of 4 epochs, diverged in epoch 2); CNN (3 of 4 epochs)")
    assert "diverged" in texts_of(fig)
    assert main(run) == 0
    assert "after 3 of 4 epochs" in capsys.readouterr().out
    assert len(figure(make_run(tmp_path / "begun", cnn_epochs=0)).axes) == 3  # without eLCNs, no colour bar


def test_published_points_overlay_their_panels(run):
    fig = figure(run, reference=read_reference(REFERENCE))
    norm, train, _ = (lines_of(ax) for ax in panels_of(fig))
    assert list(norm)[4:] == ["published, CNN", "published, eLCN from 9", "published, eLCN from 28"]
    points = train["published, CNN"]
    assert (points.get_xdata()[0], points.get_ydata()[0]) == (1, 33.73) and points.get_linestyle() == "None"
    assert to_hex(points.get_color()) == "#000000"
    assert "published" in texts_of(fig)


def test_without_the_cnn_only_converted_networks_set_the_axes(run, tmp_path):
    fig = figure(run, reference=read_reference(REFERENCE), cnn=False)
    norm = panels_of(fig)[0]
    assert list(lines_of(norm)) == [
        "eLCN from 1", "eLCN from 2", "eLCN from 4", "published, eLCN from 9", "published, eLCN from 28"
    ]  # fmt: skip
    assert "CNN" not in texts_of(fig) and norm.get_ylim()[1] < panels_of(figure(run))[0].get_ylim()[1]
    begun = make_run(tmp_path, cnn_epochs=0)
    assert "no network but the CNN" in stop(begun, "--no_cnn", "--out", tmp_path / "figure.png")


def test_another_margin_is_named_and_published_norms_are_not_compared_with_it(run):
    fig = figure(run, margin="multiclass", reference=read_reference(REFERENCE), title="Mine")
    assert [len(ax.lines) for ax in panels_of(fig)] == [4, 7, 7]
    assert fig.get_suptitle() == "Mine, multiclass margin"


@pytest.mark.parametrize("ending", ["png", "PDF", "svg"])
def test_the_figure_is_written_in_the_format_of_its_name(run, tmp_path, ending):
    out = tmp_path / f"figure.{ending}"
    assert main(run, "--out", out, "--reference", REFERENCE) == 0
    content = out.read_bytes()
    if ending == "png":
        image = imread(out)
        assert image.shape[1] > 1500
        dark_to_light = [to_rgb(plot.COLOURS(x)) for x in (0.0, 0.5, 1.0)]
        for colour in [(0, 0, 0), *dark_to_light]:  # the lines are in the picture
            assert (np.abs(image[..., :3] - colour).max(-1) < 0.02).sum() > 100
    elif ending == "PDF":
        assert content.startswith(b"%PDF") and b"/FontFile2" in content and b"/Type3" not in content
    else:
        assert b"<svg" in content and content.rstrip().endswith(b"</svg>")
    assert list(tmp_path.iterdir()) == [out]  # and nothing half-written


def test_outputs_go_where_they_are_asked_for(tmp_path, capsys):
    run = make_run(tmp_path / "published")
    assert main(run, "--table") == 0
    assert "chosen on test data" in capsys.readouterr().out and not list(tmp_path.rglob("figure.png"))
    assert main(run, "--table", tmp_path / "t.md", "--csv", tmp_path / "a.csv", "--margin", "multiclass") == 0
    assert "multiclass" in (tmp_path / "t.md").read_text() and (tmp_path / "a.csv").read_text().startswith("run,")
    capsys.readouterr()
    assert main(tmp_path / "published") == 0
    assert capsys.readouterr().out.splitlines()[0] == f"figure: {tmp_path / 'published' / 'figure.png'}"


def test_no_output_overwrites_a_file_of_a_run_its_input_or_another_output(tmp_path):
    run = make_run(tmp_path)
    put(run, Member(Settings(epochs=4, n_splits=3), "lc", 1), 2, diverged_at=2)  # there is a status.json, too
    (tmp_path / "link.csv").symlink_to(tmp_path / "a.csv")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flag in ("--csv", "--table", "--out"):
        for name in ("config.json", "status.json", "evaluation-history.hist", "skinnyprime_4.pyT"):
            assert "has to end in" in stop(run, flag, run / name)
    assert "has to end in .csv" in stop(run, "--csv", tmp_path / "x.png", "--out", tmp_path / "x.png")
    assert "that file is --table" in stop(run, "--table", tmp_path / "a.csv", "--csv", run / ".." / "link.csv")
    assert "that file is --reference" in stop(run, "--reference", tmp_path / "a.csv", "--csv", tmp_path / "a.csv")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_outputs_that_cannot_be_written_are_named(run, tmp_path):
    assert "cannot be written" in stop(run, "--out", tmp_path / "no" / "figure.png")
    (tmp_path / "is_a_directory.png").mkdir()
    assert "cannot be written" in stop(run, "--out", tmp_path / "is_a_directory.png")
    assert [path.name for path in tmp_path.iterdir()] == ["is_a_directory.png"]


def test_mistakes_on_the_command_line_are_named(run, tmp_path):
    assert "there are train_loss" in stop(run, "--panels", "accuracy")
    assert ".png, .pdf, .svg" in stop(run, "--out", tmp_path / "figure.jpg")
    assert ".md, .csv, .txt" in stop(run, "--table", tmp_path / "table.tex")
    assert "--margin" in stop(run, "--margin", "other")
    assert "alone" in stop(run, "--margins", run / "skinnyprime_2.pyT")
    assert "name runs" in stop()


def python(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(plot.__file__).parent)


def test_the_script_ends_with_one_line_and_status_2_on_bad_input(tmp_path):
    result = python("plot.py", tmp_path / "nowhere")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("plot.py: ") and result.stderr.count("\n") == 1


def test_a_figure_needs_neither_training_nor_images(run, tmp_path):
    code = "import sys, plot; plot.main(sys.argv[1:]); print('---', *sys.modules)"
    result = python("-c", code, run, "--out", tmp_path / "a.png")
    assert result.returncode == 0 and (tmp_path / "a.png").exists()
    modules = result.stdout.rpartition("---")[2].split()
    assert "rnorm.results" in modules
    assert not {"train", "convert", "experiments", "rnorm.data", "torchvision"} & set(modules)


def test_a_signal_while_drawing_stops_the_script_and_nothing_is_written(run, tmp_path):
    code = (
        "import runpy, signal, sys, rnorm.results as results\n"
        "results.read_runs = lambda *_: signal.raise_signal(signal.SIGINT)\n"
        "runpy.run_path('plot.py', run_name='__main__')"
    )
    result = python("-c", code, run, "--out", tmp_path / "a.png")
    assert result.returncode == 130 and "saved" not in result.stderr and "continue" not in result.stderr
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def small_cnn(num_classes=10):
    return ConvNet(
        nn.Conv2d(3, 4, 4, stride=4), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(4 * 9, num_classes)
    )  # fmt: skip


@pytest.fixture(scope="module", params=["tf32", "float64"])
def recorded(tmp_path_factory, request):
    """A run whose histories and checkpoints are those of networks, a CNN and its eLCN, on 60 images."""
    directory = tmp_path_factory.mktemp("recorded")
    np.savez(directory / "tiny.npz", **make_arrays())
    dtype = {"tf32": torch.float32, "float64": torch.float64}[request.param]
    data = load_data(str(directory / "tiny.npz"), Path("data"), 0, torch.device("cpu"), dtype)
    settings = Settings(epochs=1, splits=(1,), network="small", dataset="tiny", precision=request.param)
    run = directory / settings.run_name
    run.mkdir()
    write_config(run, settings, data.sha256, str(directory / "tiny.npz"), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "small", small_cnn)
        torch.manual_seed(0)
        cnn = small_cnn(data.num_classes).to(dtype)
        elcn = find_conversion("lc").convert(copy.deepcopy(cnn), data.image_shape)
        for member, model in ((Member(settings), cnn), (Member(settings, "lc", 1), elcn)):
            member.directory(run).mkdir(exist_ok=True)
            track = Track(run, member, model, [0.1] * len(list(model.parameters())))
            for track.epoch in (0, 1):
                track.record(evaluate(track.net, track.net, data))
                with torch.no_grad():  # in place of training
                    next(model.parameters()).mul_(1 + torch.rand_like(next(model.parameters())))
            track.writer.wait()
        yield run


def test_a_recorded_run_is_plotted_whole(recorded, tmp_path, capsys):
    assert main(recorded, "--out", tmp_path / "a.png", "--panels", "untied", "multiclass_margin_train_min") == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    (ax,) = panels_of(figure(recorded, panels=["untied"]))
    assert (lines_of(ax)["CNN"].get_ydata() == 0).all() and lines_of(ax)["eLCN from 1"].get_ydata()[-1] > 0


@pytest.mark.parametrize("margin, key", [("published", "margin"), ("multiclass", "multiclass_margin")])
def test_histograms_show_the_margins_whose_means_were_recorded(recorded, tmp_path, margin, key, monkeypatch):
    precisions = []
    monkeypatch.setattr(plot, "set_precision", precisions.append)
    members = [Member(Settings(epochs=1, network="small")), Member(Settings(epochs=1, network="small"), "lc", 1)]
    paths = [member.checkpoint(recorded, 1) for member in members]
    margins = plot.read_margins(paths, margin, Path("data"), "cpu")
    assert list(margins) == ["CNN, epoch 1", "eLCN from 1, epoch 1"]
    assert precisions == [read_config(recorded)[0].precision] * 2
    for parts, member in zip(margins.values(), members):
        means = torch.load(member.history(recorded))[key]
        assert parts["test"].mean() == pytest.approx(means[-1], rel=1e-4, abs=1e-6)
        assert parts["training"].shape == (60,) and parts["test"].shape == (30,)
    fig = plot.draw_margins(margins, margin)
    assert [ax.get_title() for ax in fig.axes] == ["training set", "test set"]
    assert all(ax.get_xlabel() == f"{margin} margin" and len(ax.patches) == 2 for ax in fig.axes)
    assert texts_of(fig) == list(margins) and fig.get_suptitle().endswith(f"{margin} margin")
    assert main("--margins", *paths, "--margin", margin, "--device", "cpu", "--out", tmp_path / "m.png") == 0
    assert (imread(tmp_path / "m.png")[..., :3].min(-1) < 0.5).any()


def test_bad_checkpoints_and_other_data_are_refused(recorded, tmp_path):
    good = recorded / "small_1.pyT"
    (tmp_path / good.name).write_bytes(good.read_bytes())
    assert "lies in no" in stop("--margins", tmp_path / good.name)
    assert "small_77.pyT is no file" in stop("--margins", recorded / "small_77.pyT")
    (recorded / "small_0.pyT").write_bytes(good.read_bytes()[:500])
    for name in ("evaluation-history.hist", "small_0.pyT"):
        with pytest.raises(RnormError, match=name):
            main("--margins", recorded / name)
    copied = tmp_path / recorded.name
    copied.mkdir()
    settings, config = read_config(recorded)
    write_config(copied, settings, "of other data", config["dataset_file"], {})
    (copied / good.name).write_bytes(good.read_bytes())
    assert "is not the data of" in stop("--margins", copied / good.name)
