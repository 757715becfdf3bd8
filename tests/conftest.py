import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
os.environ["OMP_NUM_THREADS"] = "1"  # bit-exact comparisons need the same number of threads in every process
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models  # noqa: E402

import sac_vlmrm  # noqa: E402

sac_vlmrm.pick_gl_backend()


@pytest.fixture(scope="session")
def humanoid():
    """One environment for all the tests that only look at hand-made states."""
    env = sac_vlmrm.VLMHumanoid(64)
    yield env
    env.close()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A small CLIP with random weights, as a name for --clip-model."""
    return models.local_dir(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def error_of(tmp_path, monkeypatch):
    """Run main(argv) in an empty folder; it must end with one line that says what is wrong, and leave nothing behind."""
    monkeypatch.chdir(tmp_path)

    def error(*argv):
        with pytest.raises(SystemExit) as exit:
            sac_vlmrm.main([str(word) for word in argv])
        assert isinstance(exit.value.code, str) and exit.value.code.startswith("error: ") and "\n" not in exit.value.code
        assert not (tmp_path / "runs").exists()
        return exit.value.code

    return error
