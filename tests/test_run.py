"""Whole runs of sac_vlmrm.py: what they leave behind, resuming, signals, faults and bad input."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sac_vlmrm

ROOT = Path(sac_vlmrm.__file__).parent
SMALL = ["--num-envs", "2", "--exploring-share", "0.5", "--learning-starts", "200", "--gradient-steps", "4",
         "--batch-size", "16", "--select-episodes", "1", "--eval-episodes", "1", "--image-size", "32",
         "--eval-frequency", "400", "--buffer-size", "600", "--device", "cpu"]  # fmt: skip
STANDING = [*SMALL, "--reward", "ground-truth", "--task", "standing"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LP_NUM_THREADS", "1")


def scalars(run_dir):
    """All that TensorBoard shows of a run, timings aside: tag -> [(step, value)]."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
            if not tag.startswith("time/") and tag != "charts/SPS"}  # fmt: skip


def leaves(saved):
    return torch.utils._pytree.tree_leaves(saved)


def assert_same(one, other):
    """Two runs agree bit for bit in checkpoints, replay buffer and best policy, and in all they logged, timings aside."""
    names = [sorted(path.name for path in run.glob("*.pt")) for run in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        a, b = (leaves(torch.load(run / name, weights_only=True)) for run in (one, other))
        assert len(a) == len(b) > 1
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b)), name
    assert scalars(one) == scalars(other)


def start(*flags):
    """The script in a process of its own, in a session of its own, so that its workers can be found."""
    command = [sys.executable, str(ROOT / "sac_vlmrm.py"), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for(process, pattern, folder="runs/run"):
    """Until a file of that name is there."""
    while not list(Path(folder).glob(pattern)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def members(session):
    """Living processes of a session: the script and its workers."""
    listing = subprocess.run(["ps", "-eo", "pid,sid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()[1:]]
    return [int(pid) for pid, sid, stat in rows if int(sid) == session and not stat.startswith("Z")]


def assert_no_orphans(session):
    deadline = time.time() + 20
    while members(session) and time.time() < deadline:
        time.sleep(0.1)
    assert not members(session)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run of 1200 steps: the ring buffer of 600 goes round twice."""
    folder = tmp_path_factory.mktemp("whole")
    before = os.getcwd()
    os.chdir(folder)
    summary = sac_vlmrm.main([*STANDING, "--total-timesteps", "1200", "--run-name", "run"])
    os.chdir(before)
    return folder / "runs/run", summary


def test_what_a_run_leaves(whole):
    run, summary = whole
    names = {path.name for path in run.iterdir()}
    assert {"args.json", "best.pt", "curves.png", "eval.json", "eval.mp4", "eval.png", "video_000001200.mp4"} <= names
    assert [path.name for path in sorted(run.glob("checkpoint_*.pt"))] == ["checkpoint_000000800.pt", "checkpoint_000001200.pt"]
    assert json.loads((run / "eval.json").read_text()) == json.loads(json.dumps(summary))
    assert set(summary) >= {"mean action", "sampled action", "zero action", "random action"}
    logged = scalars(run)
    assert [step for step, _ in logged["charts/success_rate"]] == list(range(200, 1201, 200))
    assert [step for step, _ in logged["eval/return"]] == [400, 800, 1200]
    assert {"losses/qf1_loss", "losses/actor_loss", "losses/alpha", "charts/episodic_return"} <= set(logged)
    best = max(logged["eval/return"], key=lambda row: row[1])  # by return, never by success
    assert torch.load(run / "best.pt", weights_only=True)["global_step"] == best[0]


def test_a_joint_or_it_and_its_twin_is_held_in_the_exploring_environment_only(whole):
    chunk = torch.load(whole[0] / "replay_000000800_000001200.pt", weights_only=True)
    actions = chunk["actions"].reshape(-1, 2, 17)[100:]  # (T, environment, joint) of the last episode
    held = actions[1:] == actions[:-1]
    twin, sign = map(torch.tensor, sac_vlmrm.mirror_image()[1])
    count = held[:, 0].sum(1)
    assert set(count.tolist()) == {0, 1, 2} and count.bool().float().mean() > 0.7
    pairs = held[count == 2, 0]
    assert torch.equal(pairs, pairs[:, twin])
    torques = actions[1:, 0][count == 2]
    assert torch.equal(torques[pairs], (torques[:, twin] * sign)[pairs])  # as in the mirror
    assert len(set(held[:, 0].nonzero()[:, 1].tolist())) > 1
    assert not held[:, 1].any()


def test_evaluate_repeats_the_final_evaluation(whole):
    run, summary = whole
    assert sac_vlmrm.main(["--evaluate", str(run)]) == summary


def test_a_killed_run_resumes_bit_for_bit(whole):
    """SIGKILL at three moments, each followed by --resume, against the uninterrupted run."""
    flags = [*STANDING, "--total-timesteps", "1200", "--run-name", "run"]
    for checkpoint, delay in ((400, 0.0), (800, 0.3), (1200, 0.0)):
        process = start(*flags)
        wait_for(process, f"checkpoint_{checkpoint:09d}.pt")
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert_no_orphans(process.pid)
        flags = ["--resume", "runs/run"]
    sac_vlmrm.main(flags)
    assert_same(whole[0], Path("runs/run"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(signum, whole):
    process = start(*STANDING, "--total-timesteps", "1200", "--run-name", "run")
    wait_for(process, "checkpoint_000000400.pt")
    os.killpg(process.pid, signum) if signum == signal.SIGINT else process.send_signal(signum)  # Ctrl-C reaches all
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "go on with --resume runs/run" in output and "Traceback" not in output
    assert_no_orphans(process.pid)
    stopped = torch.load(sorted(Path("runs/run").glob("checkpoint_*.pt"))[-1], weights_only=True)["state"]["global_step"]
    assert 400 <= stopped < 1200
    if signum == signal.SIGTERM:
        sac_vlmrm.main(["--resume", "runs/run"])
        assert scalars("runs/run") == scalars(whole[0])
        assert torch.equal(*(leaves(torch.load(run / "best.pt", weights_only=True))[0] for run in (whole[0], Path("runs/run"))))


def test_a_second_signal_ends_at_once():
    process = start(*STANDING, "--total-timesteps", "100000", "--gradient-steps", "50000", "--run-name", "run")
    wait_for(process, "events*")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    while "stopping after this round" not in process.stdout.readline():  # two signals at once would count as one
        assert process.poll() is None
    time.sleep(1)
    assert process.poll() is None, "the first signal waits for the end of the round, here minutes away"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert_no_orphans(process.pid)


def test_resume_may_go_further_but_not_elsewhere(whole, tmp_path):
    run = tmp_path / "runs/run"
    shutil.copytree(whole[0], run)
    with pytest.raises(SystemExit, match="changed: gamma"):
        sac_vlmrm.main(["--resume", "runs/run", "--gamma", "0.5"])
    with pytest.raises(SystemExit, match="raised"):
        sac_vlmrm.main(["--resume", "runs/run", "--total-timesteps", "800"])
    sac_vlmrm.main(["--resume", "runs/run", "--total-timesteps", "1400"])
    assert [step for step, _ in scalars(run)["charts/episodic_return"]] == list(range(200, 1401, 200))


def test_the_shipped_policy_kneels(tmp_path):
    """Its reward was what the tiny CLIP saw; the criterion is geometry."""
    shutil.copytree(ROOT / "examples/kneeling", tmp_path / "kneeling")
    summary = sac_vlmrm.main(["--evaluate", "kneeling", "--eval-episodes", "4", "--num-envs", "2"])
    assert summary["mean action"]["success_rate"] >= 0.75 and summary["mean action"]["share_in_goal"] > 0.5
    assert summary["zero action"]["success_rate"] == summary["random action"]["success_rate"] == 0
    assert summary["mean action"]["return"] > summary["random action"]["return"] + 20


def header(script):
    """The requirements in a script's head, which `uv run` installs (PEP 723)."""
    block = (ROOT / script).read_text().split("# /// script\n")[1].split("# ///")[0]
    return set(tomllib.loads(re.sub("^# ", "", block, flags=re.MULTILINE))["dependencies"])


def test_requirements_and_script_headers_are_in_step():
    """What `uv run` installs for the scripts is what pip installs, but for the packages of special VLMs and the tests."""
    listed = {line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()} - {""}
    sac, ppo, epic = (header(script) for script in ("sac_vlmrm.py", "ppo_vlmrm_classic.py", "epic_vlmrm.py"))
    assert sac == epic and ppo == sac - {"gymnasium[mujoco]>=1.2,<2"}
    assert {re.split("[^a-z_-]", name)[0] for name in listed ^ sac} == {"transformers", "sentencepiece", "pytest", "pytest-xdist"}


# faults
def test_a_worker_that_dies_ends_the_run_with_the_cause():
    process = start(*STANDING, "--total-timesteps", "100000", "--run-name", "run")
    wait_for(process, "checkpoint_000000400.pt")
    workers = subprocess.run(["pgrep", "-f", "forkserver.*main", "-s", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "an environment process died (exit code -9)" in output and "Traceback" not in output
    assert_no_orphans(process.pid)
    assert torch.load(sorted(Path("runs/run").glob("checkpoint_*.pt"))[-1], weights_only=True)["state"]["global_step"] >= 400


def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(whole, tmp_path):
    run = tmp_path / "runs/run"
    shutil.copytree(whole[0], run)
    before, last = sorted(run.glob("checkpoint_*.pt"))
    chunk = run / "replay_000000800_000001200.pt"
    intact = last.read_bytes()
    for path, content in ((last, intact[: len(intact) // 2]), (last, pickle.dumps(Malice(tmp_path / "run_by_pickle"))), (chunk, b"")):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=f"{path.name} is damaged.*remove it.*to go on from") as error:
            sac_vlmrm.main(["--resume", "runs/run"])
        assert path == chunk or before.name in str(error.value)
        last.write_bytes(intact)
    assert not (tmp_path / "run_by_pickle").exists()
    last.unlink()
    sac_vlmrm.main(["--resume", "runs/run"])
    assert_same(whole[0], run)


class Malice:
    """A pickle that makes a file when it is loaded the unsafe way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_malice_works_when_loaded_the_unsafe_way(tmp_path):
    pickle.loads(pickle.dumps(Malice(tmp_path / "run_by_pickle")))
    assert (tmp_path / "run_by_pickle").exists()


@pytest.fixture
def small_files():
    """No file may grow beyond 1 MB: what a full disk does to a checkpoint."""
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)


def test_disk_full(whole, tmp_path, small_files):
    """The run ends with a clear line, and goes on from the checkpoint before once there is room."""
    run = tmp_path / "runs/run"
    shutil.copytree(whole[0], run)
    (run / "checkpoint_000001200.pt").unlink()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    small_files()
    with pytest.raises(SystemExit, match="can't write runs/run/(best|checkpoint_000001200).pt.*make room, then --resume"):
        sac_vlmrm.main(["--resume", "runs/run"])
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    sac_vlmrm.main(["--resume", "runs/run"])
    assert_same(whole[0], run)


def test_not_a_number_stops_the_run_before_it_is_saved(monkeypatch):
    with pytest.raises(SystemExit, match=r"a (loss|weight) is not finite at step \d+; what was saved before is whole"):
        sac_vlmrm.main([*STANDING, "--total-timesteps", "4000", "--q-lr", "1e37", "--run-name", "run"])
    for path in Path("runs/run").glob("checkpoint_*.pt"):
        assert all(x.isfinite().all() for x in leaves(torch.load(path, weights_only=True)["qf1"]))
    monkeypatch.setattr(sac_vlmrm.CLIPReward, "forward", lambda self, embeddings: embeddings[:, 0] * np.nan)
    with pytest.raises(SystemExit, match="a reward is not finite after step 0"):
        sac_vlmrm.main([*SMALL, "--prompt", "a humanoid robot kneeling", "--total-timesteps", "4000", "--run-name", "nan"])


# the reward in a run
def test_rewards_land_at_the_right_transition(clip_folder):
    """Render the states of the replay buffer again, score them, and find the rewards that the run wrote there."""
    prompt = "a humanoid robot kneeling"
    sac_vlmrm.main([*SMALL, "--clip-model", clip_folder, "--prompt", prompt, "--total-timesteps", "400", "--run-name", "run"])
    data = torch.load("runs/run/replay_000000000_000000400.pt", weights_only=True)
    clip_reward = sac_vlmrm.CLIPReward(clip_folder, [prompt])
    env = sac_vlmrm.VLMHumanoid(32)
    frames = np.stack([env.render_state(obs[:24]).copy() for obs in data["next_obs"].numpy()[::7]])
    env.close()
    rewards = clip_reward(clip_reward.embed_images(frames))
    # The buffer's states are rounded to float32: in some frames a pixel at an edge turns out one shade off, worth up to 2.4e-5.
    assert torch.allclose(rewards, data["rewards"][::7], atol=1e-4)
    assert rewards.std() > 50 * 1e-4


def test_rewards_of_several_steps_stay_in_their_episode():
    """Targets of a batch against the sum that defines them, from episodes kept apart; the ring has gone round."""
    T, num_envs, n_step, gamma = sac_vlmrm.EPISODE_LENGTH, 3, 5, 0.9
    rewards, values = np.random.default_rng(0).normal(size=(2, 3, T, num_envs))  # three rounds; values after the step
    rb = sac_vlmrm.ReplayBuffer(2 * T * num_envs + 100, num_envs, 3, 1, "cpu")  # keeps two rounds
    for i in range(3):
        place = np.stack(np.broadcast_arrays(i, *np.mgrid[:T, :num_envs]), -1).reshape(-1, 3)  # round, step, environment
        rb.add(obs=place, actions=place[:, :1], next_obs=values[i].reshape(-1, 1).repeat(3, 1), rewards=rewards[i].reshape(-1))
    torch.manual_seed(0)
    batch = rb.batch(torch.randint(len(rb), (2000,)), n_step, gamma)
    targets = (batch["discounts"] * batch["rewards"]).sum(1) + batch["bootstrap"] * batch["next_obs"][:, 0]
    for (i, t, env), target in zip(batch["obs"].int().tolist(), targets.tolist()):
        ahead = range(min(n_step, T - t))
        wanted = sum(gamma**k * rewards[i, t + k, env] for k in ahead) + gamma ** len(ahead) * values[i, t + len(ahead) - 1, env]
        assert target == pytest.approx(wanted, abs=1e-5)
    assert set(batch["obs"][:, 0].int().tolist()) == {1, 2} and T - 1 in batch["obs"][:, 1]


# bad input
KNEEL = ["--prompt", "a humanoid robot kneeling"]
BAD = [
    ([], "tell the robot what to do"),
    (["--prompt", " "], "a prompt is empty"),
    ([*KNEEL, "--baseline-prompt", ""], "a prompt is empty"),
    ([*KNEEL, "--clip-alpha", "1.1"], "--clip-alpha"),
    ([*KNEEL, "--clip-alpha", "nan"], "--clip-alpha"),
    ([*KNEEL, "--task", "dancing"], "dancing"),
    ([*KNEEL, "--clip-model", "ViT-Z-99/openai"], "ViT-Z-99"),
    ([*KNEEL, "--clip-model", "ViT-B-32/no_such_tag"], "no_such_tag"),
    ([*KNEEL, "--clip-model", "local-dir:nowhere"], "nowhere"),
    ([*KNEEL, "--clip-model", "hf-hub:nobody/nothing"], "can't be loaded"),
    ([*KNEEL, "--clip-precision", "bf16", "--device", "cpu"], "GPU"),
    ([*KNEEL, "--baseline-prompt", KNEEL[1], "--clip-alpha", "0.5"], "direction"),
    ([*KNEEL, "--num-envs", "0"], "--num-envs"),
    ([*KNEEL, "--total-timesteps", "-5"], "--total-timesteps"),
    ([*KNEEL, "--gamma", "1.5"], "--gamma"),
    ([*KNEEL, "--policy-lr", "nan"], "--policy-lr"),
    ([*KNEEL, "--batch-size", "300000"], "--batch-size"),
    ([*KNEEL, "--buffer-size", "300"], "--buffer-size"),
    ([*KNEEL, "--buffer-size", "9000000000"], "memory"),
    ([*KNEEL, "--learning-starts", "100000"], "--learning-starts"),
    ([*KNEEL, "--exploring-share", "1"], "--exploring-share"),
    ([*KNEEL, "--image-size", "-1"], "--image-size"),
    ([*KNEEL, "--seed", "-1"], "--seed"),
    ([*KNEEL, "--reward-batch-size", "0"], "--reward-batch-size"),
    ([*KNEEL, "--run-name", "taken"], "exists"),
    ([*KNEEL, "--run-name", "file/x"], "not writable"),
    (["--resume", "nowhere"], "not a run folder"),
    (["--evaluate", "nowhere"], "not a run folder"),
    (["--evaluate", "runs/taken"], "not a run folder"),
    (["--resume", "a", "--evaluate", "b"], "either"),
]  # fmt: skip


@pytest.mark.parametrize("flags, words", BAD, ids=[" ".join(flags[2:] or flags) for flags, _ in BAD])
def test_bad_input_is_one_clear_line(flags, words, capsys):
    Path("runs/taken").mkdir(parents=True)
    Path("runs/file").write_text("")
    with pytest.raises(SystemExit) as end:
        sac_vlmrm.main(flags)
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code and words in end.value.code
    assert sorted(os.listdir("runs")) == ["file", "taken"], "a refused run leaves nothing behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_where_there_is_none():
    with pytest.raises(SystemExit, match="sees no such GPU"):
        sac_vlmrm.main([*KNEEL, "--device", "cuda"])


@pytest.mark.parametrize("flags, environ, words", [
    (["--clip-alpha", "2"], {}, "--clip-alpha 2.0 is not between 0 and 1"),
    ([], {"MUJOCO_GL": "opengl"}, "MUJOCO_GL=opengl does not work here"),
    (["--device", "tpu"], {}, "tpu"),
    (["--no-such-flag"], {}, "no-such-flag"),
])  # fmt: skip
def test_bad_input_on_the_command_line(flags, environ, words):
    command = [sys.executable, str(ROOT / "sac_vlmrm.py"), *KNEEL, *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environ})
    assert result.returncode not in (0, None) and words in result.stderr and "Traceback" not in result.stderr
    assert not Path("runs").exists()
