"""Two ranks under torchrun, on the CPU with gloo: one learner, two sets of robots."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_run import ROOT, SMALL, STANDING, assert_same, checkpoints, scalars, wait_for

import sac_vlmrm

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def small(clip_folder):
    return [*SMALL, *STANDING, "--clip-model", clip_folder]


def start(*flags, script=ROOT / "sac_vlmrm.py", **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*TORCHRUN, str(script), *flags], **pipes | options)


def finish(process):
    """What it printed."""
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small):
    """An uninterrupted run of two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    printed = finish(start(*small, cwd=folder))
    return folder / "runs/run", printed


def test_one_rank_speaks_and_every_rank_has_its_own_episodes(whole):
    run, printed = whole
    assert printed.count("renderer: ") == printed.count("mean action") == 1
    assert len(list(run.glob("events.*"))) == 1
    assert json.loads((run / "eval.json").read_text())["step"] in (400, 800)
    first, second = (
        torch.load(run / f"replay_{rank}_0000004.pt", weights_only=True) for rank in (0, 1)
    )
    assert first["obs"].shape == second["obs"].shape
    assert (first["obs"][:, 0] != second["obs"][:, 0]).any()  # other starts
    assert (first["actions"] != second["actions"]).any()  # other noise
    steps = [step for step, _ in scalars(run)["charts/episodic_return"]]
    assert steps == [200, 400, 600, 800]  # of both


def test_stopped_and_killed_run_ends_as_the_uninterrupted_one(whole, small):
    """Ctrl-C, which reaches the ranks and torchrun, which passes it on, stops both after the same
    round; a kill loses what came after the last checkpoint."""
    process = start(*small, start_new_session=True)
    wait_for(process, "events.*")
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=100)
    assert re.search("stopped at step (200|400|600); go on with --resume runs/run", printed), (
        printed
    )
    process = start("--resume", "runs/run", start_new_session=True)
    wait_for(process, "checkpoint_000000400.pt")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(start("--resume", "runs/run"))
    assert_same(Path("runs/run"), whole[0], ranks=2)
    one, other = (torch.load(run / "replay_1_0000004.pt") for run in (Path("runs/run"), whole[0]))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_lost_rank_ends_the_run_with_a_line_and_a_checkpoint(small):
    process = start(*small, "--total-timesteps", "100000", "--gradient-steps", "200")
    wait_for(process, "checkpoint_000000400.pt")
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert re.search("error: another rank is lost|stopped at step", printed), printed
    last = checkpoints("runs/run")[-1]
    process = start("--resume", "runs/run")
    while checkpoints("runs/run")[-1] == last:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=100)


def test_totals_that_do_not_divide_and_another_number_of_ranks(whole, small):
    process = start(*small, "--batch-size", "17")
    printed, _ = process.communicate(timeout=100)
    assert process.returncode != 0 and not Path("runs").exists()
    assert "error: --batch-size 17 can't be shared by 2 ranks" in printed
    shutil.copytree(whole[0], "runs/run")
    with pytest.raises(SystemExit, match="^error: .* was made by 2 ranks, these are 1"):
        sac_vlmrm.main(["--resume", "runs/run", "--total-timesteps", "1200"])


def test_only_torchrun_makes_ranks():
    """What a scheduler or another program exports under these names is not meant for us."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sac_vlmrm as s; "
    code += "print(s.RANK, s.LOCAL_RANK, s.WORLD_SIZE, s.LOCAL_WORLD_SIZE)"
    exported = {"RANK": "3", "WORLD_SIZE": "", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "0"}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | exported, capture_output=True, text=True
    )
    assert printed.stdout == "0 0 1 1\n", printed.stderr


TWO_LEARNERS = """
import sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
import sac_vlmrm as s
dist.init_process_group("gloo")
torch.manual_seed(0)
sac = s.SAC(s.Args(gradient_steps=3, batch_size=32), "cpu")
torch.manual_seed(1 + s.RANK)
rb = s.ReplayBuffer(3, "cpu")
for ring in rb.data.values():
    ring.normal_(s.RANK, 1)
rb.total = 3
mean = rb.data["obs"].mean()
s.average(mean)
sac.learn(rb, 0.1)
both = [None, None]
dist.all_gather_object(both, [*sac.state_dict().values()])
assert all(torch.equal(a, b) for a, b in zip(*both)), "the ranks have drifted apart"
assert not torch.equal(sac.critics.weights, sac.target_critics.weights), "nothing was learned"
assert abs(sac.actor.scale_obs.running_mean.mean() - mean) < 1e-3
# the average of the gradients of two halves of a batch is the gradient of the whole
x, y = torch.randn(2, 64, 255, generator=torch.Generator().manual_seed(0))
critics, half = s.MLP(2, 255, 1, 128, True), slice(32 * s.RANK, 32 * s.RANK + 32)
dist.broadcast(critics.weights.data, 0)
[whole] = torch.autograd.grad(critics(x, y).square().mean(), critics.weights)
[mine] = torch.autograd.grad(critics(x[half], y[half]).square().mean(), critics.weights)
assert (mine - whole).abs().max() > 1e-4
s.average(mine)
torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-6)
print(f"rank {{s.RANK}} is done\\n", end="", flush=True)  # one write: the ranks share a stream
"""


def test_ranks_learn_the_same_from_different_episodes(tmp_path):
    script = tmp_path / "two_learners.py"
    script.write_text(TWO_LEARNERS.format(root=str(ROOT)))
    printed = finish(start(script=script))
    assert "rank 0 is done" in printed and "rank 1 is done" in printed
