"""One base and one run a session, copied for each test."""

import shutil

import pytest

from tests.helpers.command import train
from tests.helpers.tiny import write_run


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A base, data, a config, and the output of a run that has ended."""
    folder = write_run(tmp_path_factory.mktemp("faults"))
    ended = train(folder)
    assert ended.code == 0, ended
    return folder


@pytest.fixture
def folder(prepared, tmp_path):
    """A copy of it all, with the output of a run that has ended."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def fresh(prepared, tmp_path):
    """A copy without any output: ready to train."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("out"))
    return tmp_path
