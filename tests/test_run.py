"""Whole runs of sac_vlmrm.py: what they leave behind, resuming, signals, faults and bad input."""

import ast
import importlib.metadata
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sac_vlmrm

ROOT = Path(sac_vlmrm.__file__).parent
STANDING = ["--prompt", "a humanoid robot standing up"]
SMALL = ["--total-timesteps", "800", "--num-envs", "2", "--learning-starts", "200",
         "--gradient-steps", "4", "--batch-size", "16", "--select-episodes", "1",
         "--eval-episodes", "1", "--eval-frequency", "400", "--buffer-size", "400",
         "--device", "cpu", "--run-name", "run"]  # fmt: skip
RUNNING = [*SMALL, "--reward", "ground-truth", "--task", "standing"]
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
HANDLERS = {signum: signal.getsignal(signum) for signum in SIGNALS}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test runs in one."""
    monkeypatch.chdir(tmp_path)
    yield
    restore_handlers()


def restore_handlers():
    """A run that has ended leaves its own behind."""
    for signum, handler in HANDLERS.items():
        signal.signal(signum, handler)


def scalars(run):
    """All that TensorBoard shows of a run, timings aside: tag -> [(step, value)]."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "time/" not in tag and tag != "charts/SPS"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def checkpoints(run):
    return sorted(Path(run).glob("checkpoint_*.pt"))


def leaves(path):
    return torch.utils._pytree.tree_leaves(torch.load(path, weights_only=True))


def assert_same(one, other, ranks=1):
    """Two runs agree bit for bit in the last checkpoint, the replay buffer (rank 0's), the best
    policy, and in all they logged, timings aside."""
    assert checkpoints(one)[-1].name == checkpoints(other)[-1].name
    for name in ("best.pt", checkpoints(one)[-1].name):
        a, b = leaves(one / name), leaves(other / name)
        assert len(a) == len(b) > 1
        assert all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b)), name
    buffers = [sac_vlmrm.ReplayBuffer(4, "cpu") for _ in range(2)]
    for buffer, run in zip(buffers, (one, other)):
        steps = int(checkpoints(one)[-1].stem[11:])
        buffer.load(run, steps // sac_vlmrm.EPISODE_LENGTH // ranks)
    assert all(torch.equal(ring, buffers[1].data[key]) for key, ring in buffers[0].data.items())
    assert scalars(one) == scalars(other)


def start(*flags, before=(), **options):
    """The script in a process and a session of its own, so that all it starts can be found."""
    command = [*before, sys.executable, str(ROOT / "sac_vlmrm.py"), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    return subprocess.Popen(command, text=True, **pipes | options)


def wait_for(process, pattern, folder="runs/run"):
    """Until a file of that name is there."""
    while not list(Path(folder).glob(pattern)):
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.01)


def living(*selection):
    """(id, command) of processes that `ps` selects, but those that only wait to be reaped."""
    listing = subprocess.run(
        ["ps", *selection, "-o", "pid=,stat=,comm="], capture_output=True, text=True, check=False
    ).stdout
    rows = [line.split(None, 2) for line in listing.splitlines()]
    return [(int(pid), command) for pid, stat, command in rows if not stat.startswith("Z")]


def assert_no_orphans(session):
    deadline = time.time() + 20
    while living("--sid", str(session)) and time.time() < deadline:
        time.sleep(0.1)
    assert not living("--sid", str(session))


@pytest.fixture(scope="module")
def small(clip_folder):
    """Flags of a run of 800 steps, whose ring buffer of 400 goes round twice."""
    return [*SMALL, *STANDING, "--clip-model", clip_folder]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small):
    """That run, uninterrupted."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("whole"))
    summary = sac_vlmrm.main(small)
    run = Path("runs/run").absolute()
    os.chdir(before)
    restore_handlers()
    return run, json.loads(json.dumps(summary))


@pytest.fixture
def copy(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "runs/run")
    return tmp_path / "runs/run"


# what a run leaves
def test_what_a_run_leaves(whole):
    run, summary = whole
    names = {path.name for path in run.iterdir()}
    pictures = {
        f"{name}.{suffix}" for name in ("eval", "video_000000800") for suffix in ("mp4", "png")
    }
    assert {"args.json", "best.pt", "eval.json"} | pictures <= names
    assert [path.name for path in checkpoints(run)] == [
        "checkpoint_000000400.pt",
        "checkpoint_000000800.pt",
    ]
    assert json.loads((run / "eval.json").read_text()) == summary
    assert set(summary) >= {"mean action", "sampled action", "zero action", "random action"}
    assert not list(run.glob("*.tmp"))


def test_what_a_run_logs(whole):
    logged = scalars(whole[0])
    assert [step for step, _ in logged["charts/success_rate"]] == [200, 400, 600, 800]
    assert [step for step, _ in logged["eval/return"]] == [400, 800]
    names = "qf1_values qf1_loss qf2_loss actor_loss alpha entropy".split()
    assert {f"losses/{name}" for name in names} | {"charts/episodic_return"} <= set(logged)
    best = max(logged["eval/return"], key=lambda row: row[1])  # by return, never by success
    assert torch.load(whole[0] / "best.pt", weights_only=True)["global_step"] == best[0]


def buffer_of(run):
    """The 400 steps that the ring holds at the end: obs, actions, rewards of two rounds."""
    chunk = torch.load(run / "replay_0_0000008.pt", weights_only=True)
    return chunk["obs"].numpy(), chunk["actions"].numpy(), chunk["rewards"]


def replay(actions):
    """What the run observed, in double precision: the same torques from the same start."""
    envs, episodes = sac_vlmrm.VLMHumanoid(2), []
    for round, step in enumerate((400, 600)):
        queue = iter(actions[2 * round : 2 * round + 2].swapaxes(0, 1))
        episodes.append(sac_vlmrm.collect(envs, lambda obs: next(queue), 2 * 10**9 + step)[0])
    return np.concatenate(episodes)


def test_rewards_land_at_the_right_transition(whole, clip_folder):
    """Draw the run's states again, score them, and find the rewards that it wrote to the replay
    buffer: for the state after the step."""
    _, actions, expected = buffer_of(whole[0])
    clip_reward = sac_vlmrm.CLIPReward(clip_folder, (STANDING[1],), ("a humanoid robot",))
    # not the buffer's states: in some frames float32 draws a pixel at an edge in another shade
    states = replay(actions)[:, 1::4, :24]  # --score-every 4
    with closing(sac_vlmrm.Painter((48, 48), "modified", ("front",))) as painter:
        frames = painter(states)[:, :, 0]
    rewards = clip_reward(clip_reward.embed_images(frames.reshape(-1, 48, 48, 3)))
    assert torch.allclose(rewards, expected[:, ::4].flatten(), atol=1e-5)
    assert rewards.std() > 50 * 1e-4


def test_the_buffer_holds_what_the_robots_did(whole):
    """The same torques from the same start lead to the same states."""
    obs, actions, _ = buffer_of(whole[0])
    np.testing.assert_array_equal(replay(actions).astype(np.float32), obs)
    assert np.abs(actions).max() <= 1 and (obs[:2] != obs[2:]).any()


def test_ground_truth_is_gymnasiums_reward(tmp_path):
    """In a run that draws nothing but its films."""
    sac_vlmrm.main([*RUNNING, "--total-timesteps", "400"])
    chunk = torch.load("runs/run/replay_0_0000004.pt", weights_only=True)
    queue = iter(chunk["actions"][2:].numpy().swapaxes(0, 1))
    seed = 2 * 10**9 + 200
    rewards = sac_vlmrm.collect(sac_vlmrm.VLMHumanoid(2), lambda obs: next(queue), seed)[2]
    np.testing.assert_array_equal(rewards.astype(np.float32), chunk["rewards"][2:].numpy())
    summary = json.loads(Path("runs/run/eval.json").read_text())
    assert summary["task"] == "standing" and summary["prompt"] == []


# evaluate
# every shell or notebook that exports one of these once broke a run
SHELL = {
    "MUJOCO_GL": "EGL",
    "PYOPENGL_PLATFORM": "osmesa",
    "DISPLAY": ":99",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "LP_NUM_THREADS": "1",
}


@pytest.mark.skipif(sys.platform != "linux", reason="EGL")
def test_evaluate_repeats_the_final_evaluation_whatever_the_shell_exports(whole, copy):
    (copy / "eval.json").unlink()
    (copy / "eval.mp4").unlink()
    process = start("--evaluate", "runs/run", env=os.environ | SHELL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert json.loads((copy / "eval.json").read_text()) == whole[1]
    assert (copy / "eval.mp4").stat().st_size > 1000 and "warning" not in output


def test_evaluate_with_another_prompt_scores_that_alone_and_its_task(whole, copy, clip_folder):
    prompt = "a humanoid robot kneeling"
    summary = sac_vlmrm.main(["--evaluate", "runs/run", "--prompt", prompt])
    assert summary["prompt"] == (prompt,) and summary["task"] == "kneeling"
    assert summary["mean action"]["return"] != whole[1]["mean action"]["return"]
    checked = json.loads((copy / "eval.json").read_text())
    assert checked == json.loads(json.dumps(summary))


def test_the_shipped_policy_kneels(tmp_path):
    """Its reward was what the tiny CLIP saw; the criterion is geometry."""
    shutil.copytree(ROOT / "examples/kneeling", tmp_path / "kneeling")
    summary = sac_vlmrm.main(["--evaluate", "kneeling", "--eval-episodes", "4", "--num-envs", "2"])
    mean, still, random = (summary[f"{name} action"] for name in ("mean", "zero", "random"))
    assert mean["success_rate"] >= 0.75 and mean["share_in_goal"] > 0.5
    assert still["success_rate"] == random["success_rate"] == 0
    assert mean["return"] > random["return"] + 20


# resume
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(whole, small):
    """SIGKILL at three random moments, each followed by --resume, against the uninterrupted run."""
    flags = small
    for step in (0, 400, 400):
        process, delay = start(*flags), random.uniform(0, 1.5)
        wait_for(process, f"checkpoint_{step:09d}.pt")
        time.sleep(delay)
        print(f"killed {delay:.3f} s after the checkpoint of step {step}")
        process.kill()
        process.communicate()
        assert_no_orphans(process.pid)
        flags = ["--resume", "runs/run"]
    sac_vlmrm.main(flags)
    assert_same(whole[0], Path("runs/run"))


def test_without_the_last_checkpoint_it_goes_on_from_the_one_before(whole, copy):
    """Which a machine that crashes may leave as the only whole one."""
    checkpoints(copy)[-1].unlink()
    (copy / "checkpoint_000000800.tmp").write_bytes(b"cut short")
    sac_vlmrm.main(["--resume", "runs/run"])
    assert_same(whole[0], copy)


def test_what_resume_may_change_is_remembered(copy):
    """Killed at once, and resumed without a flag; the prompt, the same, is no change."""
    flags = ["--total-timesteps", "1000", "--reward-batch-size", "7", *STANDING]
    process = start("--resume", "runs/run", *flags)
    while json.loads((copy / "args.json").read_text())["args"]["total_timesteps"] != 1000:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    # a process of its own: TensorBoard tells the files of one second apart by the process id alone
    resumed = start("--resume", "runs/run")
    printed, _ = resumed.communicate()
    assert resumed.returncode == 0, printed
    steps = [step for step, _ in scalars(copy)["charts/episodic_return"]]
    assert steps == [200, 400, 600, 800, 1000]
    assert json.loads((copy / "args.json").read_text())["args"]["reward_batch_size"] == 7


def saved_run(run, *flags):
    """A run folder with nothing but its args.json."""
    args, _ = sac_vlmrm.parse_args([*flags])
    run.mkdir(parents=True)
    (run / "args.json").write_text(json.dumps({"args": asdict(args)}))
    return args


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gamma", "0.5"], "changed: gamma"),
        (["--no-mirror", "--seed", "2"], "changed: seed, mirror"),
        (["--prompt", "a humanoid robot kneeling"], "changed: prompt, task"),
        (["--total-timesteps", "10000"], "can only be raised"),
        (["--clip-model", "ViT-B-32/openai"], "changed: clip_model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_resume_goes_nowhere_else(flags, words):
    saved_run(Path("runs/run"), *STANDING)
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        sac_vlmrm.main(["--resume", "runs/run", *flags])


@pytest.mark.parametrize(
    "flags",
    [
        STANDING,
        [*STANDING, "--prompt", "a man standing"],
        ["--prompt", "a robot on its knees", "--task", "kneeling"],
        [*STANDING, "--baseline-prompt", "a robot", "--clip-alpha", "0.5"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_resume_with_the_flags_of_the_start(flags):
    """Or with some of them is no change."""
    saved = saved_run(Path("runs/run"), *flags)
    words = zip(flags[::2], flags[1::2])
    prompts = [word for pair in words if pair[0] == "--prompt" for word in pair]
    for given in ([], flags, prompts):
        args, _ = sac_vlmrm.parse_args(["--resume", "runs/run", *given])
        assert asdict(args) == asdict(saved) | {"resume": "runs/run"}


def test_a_preset_is_other_defaults_that_flags_override():
    flags = ["paper", *STANDING, "--clip-precision", "fp32", "--num-envs", "4"]
    args, _ = sac_vlmrm.parse_args(flags)
    assert (args.num_envs, args.batch_size, args.n_step, args.gamma) == (4, 512, 1, 0.95)
    assert args.hidden == 256  # units of its networks' layers
    assert args.score_every == 1  # the paper scores every state
    assert not (args.anneal or args.normalize or args.mirror or args.noise_correlation)
    assert args.clip_model == "ViT-bigG-14/laion2b_s39b_b160k" and args.task == "standing"
    plain, _ = sac_vlmrm.parse_args(STANDING)
    what = {"prompt": plain.prompt, "baseline_prompt": plain.baseline_prompt, "task": plain.task}
    for preset, defaults in sac_vlmrm.PRESETS.items():
        args, _ = sac_vlmrm.parse_args([preset, *STANDING, "--clip-precision", "fp32"])
        assert args == replace(defaults, **what, clip_precision="fp32") != plain


# signals
@pytest.mark.parametrize(
    "signum, to",  # a hang-up of the group: below, with the terminal that closes
    [
        (signal.SIGINT, "group"),
        (signal.SIGTERM, "group"),
        (signal.SIGTERM, "process"),
        (signal.SIGHUP, "process"),
    ],
    ids=lambda which: getattr(which, "name", which),
)
def test_a_signal_ends_the_run_with_a_checkpoint_to_go_on_from(signum, to, whole, small):
    """To the process while it trains, to the whole group (as Ctrl-C does) while it may draw."""
    process = start(*small)
    wait_for(process, "checkpoint_000000400.pt" if to == "group" else "events*")
    if to == "group":
        os.killpg(process.pid, signum)
    else:
        time.sleep(0.5)
        process.send_signal(signum)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "Traceback" not in output, output
    assert signum == signal.SIGHUP or "go on with --resume runs/run" in output
    assert_no_orphans(process.pid)
    stopped = checkpoints("runs/run")[-1]
    assert stopped.name < "checkpoint_000000800.pt"
    step = torch.load(stopped, weights_only=True)["counters"]["global_step"]
    assert scalars("runs/run")["charts/episodic_return"][-1][0] == step
    sac_vlmrm.main(["--resume", "runs/run"])
    assert_same(whole[0], Path("runs/run"))


@pytest.mark.skipif(not shutil.which("setsid"), reason="util-linux")
def test_a_closed_terminal_ends_the_run_with_a_checkpoint_to_go_on_from(whole, small):
    """Whatever it prints afterwards fails; the hang-up reaches all processes of the session."""
    terminal, end = os.openpty()
    streams = {"stdin": end, "stdout": end, "stderr": end, "start_new_session": False}
    process = start(*small, before=["setsid", "--ctty"], **streams)
    os.close(end)
    wait_for(process, "events*")
    time.sleep(0.5)
    os.close(terminal)
    assert process.wait(timeout=120) == 0
    assert_no_orphans(process.pid)
    assert checkpoints("runs/run")[-1].name < "checkpoint_000000800.pt"
    sac_vlmrm.main(["--resume", "runs/run"])
    assert_same(whole[0], Path("runs/run"))


def test_a_second_signal_ends_at_once():
    process = start(*RUNNING, "--total-timesteps", "100000", "--gradient-steps", "50000")
    wait_for(process, "events*")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    # two signals at once would count as one
    while "stopping after this round" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(1)
    assert process.poll() is None, "the first waits for the end of the round, here minutes away"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert_no_orphans(process.pid)


# what must not end a run
@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small):
    """A run under nohup that is hung up on, without ffmpeg.

    Its folder, output, exit status, and the children that it ever had for more than a second.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    environ = {"IMAGEIO_FFMPEG_EXE": "/nonexistent/ffmpeg"}
    process = start(*small, before=["nohup"], cwd=folder, env=os.environ | environ, stdin=-3)
    wait_for(process, "checkpoint_*.pt", folder / "runs/run")
    first_seen, children, hung_up = {}, set(), False
    while process.poll() is None:
        for child in living("--ppid", str(process.pid)):
            if time.time() - first_seen.setdefault(child, time.time()) > 1:
                children.add(child)  # no mere fork that looks for an ffmpeg
        if not hung_up and checkpoints(folder / "runs/run")[-1].name > "checkpoint_000000000.pt":
            os.killpg(process.pid, signal.SIGHUP)
            hung_up = True
        time.sleep(0.02)
    assert hung_up
    return folder / "runs/run", process.communicate()[0], process.returncode, children


def test_under_nohup_a_run_outlives_its_terminal(undisturbed, whole):
    run, output, status, _ = undisturbed
    assert status == 0, output
    assert_same(whole[0], run)


def test_it_is_one_process(undisturbed):
    """Physics, drawing and learning have threads; only an ffmpeg comes and goes, here there is
    none."""
    assert undisturbed[3] == set()


def test_a_run_outlives_a_missing_ffmpeg(undisturbed, whole):
    """One line tells of it."""
    run, output, status, _ = undisturbed
    assert status == 0 and json.loads((run / "eval.json").read_text()) == whole[1]
    assert not list(run.glob("*.mp4")) and "Traceback" not in output
    warnings = re.findall(r"warning: (.*)", output)
    assert len(warnings) == 1 and "no video" in warnings[0], warnings


# faults
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(whole, copy, tmp_path):
    before, last = checkpoints(copy)
    chunk = copy / "replay_0_0000008.pt"
    intact = last.read_bytes()
    malice = pickle.dumps(Malice(tmp_path / "run_by_pickle"))
    for path, content in ((last, intact[: len(intact) // 2]), (last, malice), (chunk, b"")):
        path.write_bytes(content)
        hint = "remove the newest checkpoint to resume the one before"
        words = f"{path.name} is damaged or of another version; {hint}"
        with pytest.raises(SystemExit, match=words):
            sac_vlmrm.main(["--resume", "runs/run"])
        last.write_bytes(intact)
    assert not (tmp_path / "run_by_pickle").exists()
    last.unlink()
    sac_vlmrm.main(["--resume", "runs/run"])
    assert_same(whole[0], copy)


def test_a_buffer_smaller_than_the_way_between_checkpoints_resumes(small):
    """The ring has overwritten what no chunk holds; a missing chunk that is needed is named."""
    flags = [*small, "--buffer-size", "200", "--run-name", "tiny"]
    sac_vlmrm.main(flags)
    sac_vlmrm.main(["--resume", "runs/tiny", "--total-timesteps", "1000"])
    run = Path("runs/tiny")
    assert checkpoints(run)[-1].name == "checkpoint_000001000.pt"


def test_a_reader_that_goes_away_ends_nothing(small):
    """As `2>&1 | head` does; and the stream can't show the prompt that it is told of."""
    flags = ["--reward", "vlm", "--prompt", "a \N{ROBOT FACE} standing", "--total-timesteps", "400"]
    process = start(*small, *flags, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    while "task:" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert Path("runs/run/eval.json").exists()


def test_a_policy_is_evaluated_with_the_networks_it_has(copy):
    with pytest.raises(SystemExit, match="--normalize are part of the policy"):
        sac_vlmrm.main(["--evaluate", "runs/run", "--no-normalize"])
    saved = json.loads((copy / "args.json").read_text())
    del saved["args"]["mirror"]
    (copy / "args.json").write_text(json.dumps(saved))
    with pytest.raises(SystemExit, match="not a run folder of this version"):
        sac_vlmrm.main(["--evaluate", "runs/run"])


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
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, handler)


def test_disk_full(whole, copy, small_files):
    """The run ends with a clear line, and goes on from the checkpoint before once there is room."""
    checkpoints(copy)[-1].unlink()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    small_files()
    words = r"can't write runs/run/(best|checkpoint_000000800).pt.*Make room, then --resume"
    with pytest.raises(SystemExit, match=words):
        sac_vlmrm.main(["--resume", "runs/run"])
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    sac_vlmrm.main(["--resume", "runs/run"])
    assert_same(whole[0], copy)


def test_not_a_number_stops_the_run_before_it_is_saved(small, monkeypatch):
    words = r"a weight is not finite at step \d+; --resume runs/run goes on from"
    with pytest.raises(SystemExit, match=words):
        sac_vlmrm.main([*RUNNING, "--total-timesteps", "4000", "--learning-rate", "1e37"])
    for path in checkpoints("runs/run"):
        weights = torch.load(path, weights_only=True)["sac"].values()
        assert all(weight.isfinite().all() for weight in weights)
    broken = lambda self, embeddings: embeddings[:, 0] * np.nan
    monkeypatch.setattr(sac_vlmrm.CLIPReward, "forward", broken)
    with pytest.raises(SystemExit, match="a reward or an observation is not finite"):
        sac_vlmrm.main([*small, "--run-name", "nan"])


# bad input
KNEEL = ["--prompt", "a humanoid robot kneeling"]
BAD = [
    ([], "tell the robot what to do"),
    (["--prompt", " "], "a prompt is empty"),
    ([*KNEEL, "--baseline-prompt", ""], "a prompt is empty"),
    ([*KNEEL, "--clip-alpha", "1.1"], "--clip-alpha must be between 0 and 1"),
    ([*KNEEL, "--clip-alpha", "-0.1"], "--clip-alpha"),
    ([*KNEEL, "--clip-alpha", "nan"], "--clip-alpha"),
    ([*KNEEL, "--clip-model", "ViT-Z-99/openai"], "ViT-Z-99"),
    ([*KNEEL, "--clip-model", "ViT-B-32/no_such_tag"], "no_such_tag"),
    ([*KNEEL, "--clip-model", "local-dir:nowhere"], "nowhere"),
    ([*KNEEL, "--clip-model", "hf-hub:nobody/nothing"], "can't be loaded"),
    ([*KNEEL, "--clip-precision", "bf16", "--device", "cpu"], "GPU"),
    (["one-gpu", *KNEEL, "--device", "cpu"], "(of one-gpu and paper, too) needs a GPU"),
    ([*KNEEL, "--camera"], "--camera: one or more of front, side, original"),
    ([*KNEEL, "--baseline-prompt", KNEEL[1], "--clip-alpha", "0.5"], "direction"),
    ([*KNEEL, "--num-envs", "0"], "--num-envs"),
    ([*KNEEL, "--total-timesteps", "-5"], "--total-timesteps"),
    ([*KNEEL, "--gamma", "1.5"], "--gamma"),
    ([*KNEEL, "--gamma", "1"], "--gamma"),
    ([*KNEEL, "--tau", "2"], "--tau"),
    ([*KNEEL, "--n-step", "101"], "--n-step, --score-every: 100 at most"),
    ([*KNEEL, "--score-every", "101"], "--n-step, --score-every: 100 at most"),
    ([*KNEEL, "--n-step", "0"], "--n-step"),
    ([*KNEEL, "--noise-correlation", "1.5"], "--noise-correlation must be between 0 and 1"),
    ([*KNEEL, "--learning-rate", "nan"], "--learning-rate"),
    ([*KNEEL, "--learning-rate", "0"], "--learning-rate"),
    ([*KNEEL, "--alpha", "inf"], "--alpha"),
    ([*KNEEL, "--target-entropy", "nan"], "--target-entropy"),
    ([*KNEEL, "--batch-size", "300000"], "--buffer-size must be at least 300000"),
    ([*KNEEL, "--buffer-size", "300"], "--buffer-size must be at least 2400"),
    ([*KNEEL, "--buffer-size", "9000000000"], "memory"),
    ([*KNEEL, "--learning-starts", "100000"], "--learning-starts"),
    ([*KNEEL, "--image-size", "-1"], "--image-size"),
    ([*KNEEL, "--image-size", "100000"], "--image-size"),
    ([*KNEEL, "--seed", "-1"], "--seed"),
    ([*KNEEL, "--seed", str(10**20)], "--seed"),
    ([*KNEEL, "--run-name", "a" * 300], "--run-name"),
    ([*KNEEL, "--run-name", "caf\udce9"], "--run-name"),
    ([*KNEEL, "--reward-batch-size", "0"], "--reward-batch-size"),
    ([*KNEEL, "--eval-episodes", "0"], "--eval-episodes"),
    ([*KNEEL, "--run-name", "taken"], "exists"),
    ([*KNEEL, "--run-name", "file/x"], "not writable"),
    (["--resume", "nowhere"], "there is no such folder"),
    (["--evaluate", "nowhere"], "there is no such folder"),
    (["--evaluate", "runs/taken"], "not a run folder"),
    (["--evaluate", "runs/file"], "there is no such folder"),
    (["--resume", "a", "--evaluate", "b"], "either"),
]  # fmt: skip


@pytest.mark.parametrize(
    "flags, words", BAD, ids=[" ".join(flags[2:] or flags) for flags, _ in BAD]
)
def test_bad_input_is_one_clear_line(flags, words):
    Path("runs/taken").mkdir(parents=True)
    Path("runs/file").write_text("")
    with pytest.raises(SystemExit) as end:
        sac_vlmrm.main(flags)
    line = end.value.code
    assert line.startswith("error: ") and "\n" not in line and words in line
    assert sorted(os.listdir("runs")) == ["file", "taken"], "a refused run leaves nothing behind"


def test_an_unknown_task_is_answered_with_those_that_there_are(capsys):
    """By tyro, as every flag with a fixed choice."""
    with pytest.raises(SystemExit) as end:
        sac_vlmrm.main([*KNEEL, "--task", "dancing"])
    output = "".join(capsys.readouterr())
    assert end.value.code and "dancing" in output and "kneeling" in output, output
    assert not list(Path("runs").glob("*"))


OLD_CAMERA = json.dumps({"args": asdict(sac_vlmrm.Args()) | {"camera": "modified"}})  # 409b71c's


@pytest.mark.parametrize(
    "content", ["", "[]", '{"args": {"no_such_flag": 1}}', '{"args": 3}', "{}", OLD_CAMERA]
)
def test_a_folder_of_another_version_is_no_run_folder(content):
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/args.json").write_text(content)
    for flag in ("--resume", "--evaluate"):
        with pytest.raises(
            SystemExit, match="^error: runs/run is not a run folder of this version"
        ):
            sac_vlmrm.main([flag, "runs/run"])


def test_a_folder_of_another_version_is_none_under_python_O_either():
    """Which leaves out every `assert`."""
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/args.json").write_text('{"args": {}}')
    command = [sys.executable, "-O", str(ROOT / "sac_vlmrm.py"), "--resume", "runs/run"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: runs/run is not a run folder of this version")


def test_a_run_without_an_evaluation_has_nothing_to_evaluate(clip_folder):
    saved_run(Path("runs/run"), *STANDING, "--clip-model", clip_folder)
    with pytest.raises(SystemExit, match="^error: runs/run has not reached its first evaluation"):
        sac_vlmrm.main(["--evaluate", "runs/run"])
    with pytest.raises(SystemExit, match="^error: runs/run has no checkpoint"):
        sac_vlmrm.main(["--resume", "runs/run"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_where_there_is_none():
    with pytest.raises(SystemExit, match="sees no such GPU"):
        sac_vlmrm.main([*KNEEL, "--device", "cuda"])


@pytest.mark.parametrize(
    "flags, words", [(["--device", "tpu"], "tpu"), (["--no-such-flag"], "flag")]
)
def test_words_that_no_flag_knows(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        sac_vlmrm.main([*KNEEL, *flags])
    assert end.value.code == 2 and words in capsys.readouterr().err and not Path("runs").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo chooses by itself")
def test_a_renderer_that_mujoco_does_not_know():
    process = start(*KNEEL, env=os.environ | {"MUJOCO_GL": "opengl"})
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and not Path("runs").exists()
    assert output == "error: MUJOCO_GL must be egl, osmesa or glfw; or unset it\n"


# what pip and uv install
SCRIPTS = "sac_vlmrm.py", "ppo_vlmrm_classic.py", "epic_vlmrm.py"


def header(script):
    """The requirements in a script's head, which `uv run` installs (PEP 723)."""
    block = (ROOT / script).read_text().split("# /// script\n")[1].split("# ///")[0]
    return set(tomllib.loads(re.sub("^# ", "", block, flags=re.MULTILINE))["dependencies"])


def modules(script):
    """What a script imports at the top, but Python's own."""
    names = set()
    for node in ast.parse((ROOT / script).read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
            names |= {"tensorboard"} if node.module == "torch.utils.tensorboard" else set()
    return names - sys.stdlib_module_names


@pytest.mark.parametrize("script", SCRIPTS)
def test_headers_hold_what_a_script_imports_and_no_more_than_pip_installs(script):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert header(script) <= {line.split("#")[0].strip() for line in lines}
    needed = header(script)
    for local in modules(script) & {Path(other).stem for other in SCRIPTS}:
        assert header(f"{local}.py") <= needed, f"{script} imports {local}"
    named = {re.split(r"[^\w-]", line)[0].replace("_", "-") for line in needed}
    packages = importlib.metadata.packages_distributions()
    for module in modules(script) - {Path(other).stem for other in SCRIPTS}:
        owners = {name.replace("_", "-").lower() for name in packages[module]}
        # of the requirements, gymnasium, imageio and torchvision (of open_clip) bring pillow
        assert owners & named or module == "PIL", f"{script} imports {module}"


def test_requirements_beyond_the_headers_are_of_other_vlms_and_tests():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {line.split("#")[0].strip() for line in lines} - {""}
    beyond = listed - set.union(*map(header, SCRIPTS))
    names = {re.split("[^a-z_-]", line)[0] for line in beyond}
    assert names == {"transformers", "sentencepiece", "pytest", "pytest-xdist", "ruff"}
