import os
import signal
import sys
from contextlib import closing
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
# bit-exact comparisons need the same number of threads in every process
os.environ["OMP_NUM_THREADS"] = "1"
# a script's background job inherits an ignored SIGINT, and so would the runs that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models

import sac_vlmrm


@pytest.fixture(scope="session")
def painter():
    """One painter for all the tests that only look at hand-made states."""
    with closing(sac_vlmrm.Painter((64, 64), "modified", ("front",))) as painter:
        yield painter


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A small CLIP with random weights, as a name for --clip-model."""
    return models.local_dir(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def error_of(tmp_path, monkeypatch):
    """Run main(argv) in an empty folder; it must end with one line that says what is wrong, without
    colours, and leave nothing behind."""
    monkeypatch.chdir(tmp_path)

    def error(*argv):
        with pytest.raises(SystemExit) as exit:
            sac_vlmrm.main([str(word) for word in argv])
        line = exit.value.code
        assert isinstance(line, str) and line.startswith("error: ")
        assert "\n" not in line and "\x1b" not in line
        assert not (tmp_path / "runs").exists()
        return line

    return error


@pytest.fixture
def printed(capsys):
    """What a call prints; warnings that an earlier test has drawn count anew."""

    def output(function, *args):
        sac_vlmrm.warn.cache_clear()
        capsys.readouterr()
        function(*args)
        return capsys.readouterr().out

    return output
