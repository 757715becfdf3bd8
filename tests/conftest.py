import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sac_vlmrm  # noqa: E402

sac_vlmrm.pick_gl_backend()


@pytest.fixture(scope="session")
def humanoid():
    """One environment for all the tests that only look at hand-made states."""
    env = sac_vlmrm.VLMHumanoid(64)
    yield env
    env.close()
