"""How a run gets into results/published, and that nothing that is there is lost by it."""

import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from compare_runs import files, states
from fake_runs import make_run

sys.path.insert(0, str(Path(__file__).parents[1] / "results"))

import publish

from rnorm.cli import Stop
from rnorm.files import RnormError
from rnorm.results import read_curves, tidy
from rnorm.runs import Member, Settings, converted_members
from rnorm.signals import Signals


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """The directory of published runs, with one in it that has nothing to do with the others."""
    published = tmp_path / "published"
    make_run(published, seed=7)
    monkeypatch.setattr(publish, "PUBLISHED", published)
    return published


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "results")


def test_a_published_run_holds_all_histories_what_it_can_go_on_from_and_nothing_of_the_machine(tmp_path, published):
    run = make_run(tmp_path, conversions=("lc", "tied"), evaluations=2, splits=(1, 2))
    settings = Settings(epochs=4, splits=(1, 2))
    cnn, elcn, tied = (Member(run, settings, name, 2) for name in ("", "lc", "tied"))
    for member in converted_members(run, settings):
        if member.split == 1:
            shutil.rmtree(member.directory)
    for member in (cnn, elcn, tied):
        for epoch in (1, 2, 3, 4):
            member.checkpoint(epoch).write_bytes(bytes(publish.LARGE if member == elcn else 1))
    assert publish.main([str(run)]) == 0
    copy = published / run.name
    assert tidy(read_curves([copy], None, None)) == tidy(read_curves([run], None, None))
    assert str(tmp_path) not in (copy / "config.json").read_text()
    expected = [tied.checkpoint(1), *(cnn.checkpoint(epoch) for epoch in (1, 2, 4))]
    assert {path.name for path in copy.rglob("*.pyT")} == {path.name for path in expected}


@pytest.mark.parametrize("place, word", [("", "."), ("skinnyprime_lc_version_1", ".."), ("..", "{name}/")])
def test_wherever_it_is_called_from_a_run_is_published_by_its_name_and_no_other_is_touched(
    run, published, monkeypatch, place, word
):
    (published / run.name).mkdir()
    (published / run.name / "old").touch()
    before = states(published)
    monkeypatch.chdir(run / place)
    assert publish.main([word.format(name=run.name)]) == 0
    assert files(published / run.name) == files(run)
    assert {path: state for path, state in before.items() if path.name != "old"}.items() <= states(published).items()
    assert len(list(published.iterdir())) == 2


def test_a_published_run_and_one_that_holds_the_published_are_refused(run, published, monkeypatch):
    shutil.copytree(run, published / run.name)
    (run / "results").mkdir()
    shutil.copytree(published, run / "results" / "published")
    before = states(run.parents[1])
    inside = published / run.name / "skinnyprime_lc_version_1"
    for where, word in ((published, run.name), (inside, ".."), (inside.parent, "."), (run.parent, run.name)):
        monkeypatch.chdir(where)
        if where == run.parent:
            monkeypatch.setattr(publish, "PUBLISHED", run / "results" / "published")
        with pytest.raises(Stop, match="lies where its copy would"):
            publish.main([word])
        assert states(run.parents[1]) == before


@pytest.mark.parametrize("cause", ["disk", "signal", "no run", "same name"])
def test_all_runs_are_published_or_none(run, published, tmp_path, monkeypatch, cause):
    """What is there stays until all copies are made."""
    shutil.copytree(run, published / run.name)
    others = {"no run": tmp_path, "same name": shutil.copytree(run, tmp_path / "copy" / run.name)}
    second, before = others.get(cause, make_run(tmp_path / "results", seed=2)), states(published)
    if cause == "disk":
        fails = Mock(side_effect=[None, None, OSError("No space left on device")])
        monkeypatch.setattr(shutil, "copyfile", fails)
    if cause == "signal":
        monkeypatch.setattr(Signals, "received", 2)
    with pytest.raises((OSError, KeyboardInterrupt, RnormError)):
        publish.main([str(run), str(second)])
    assert states(published) == before
