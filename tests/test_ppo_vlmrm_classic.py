"""Facts about ppo_vlmrm_classic.py: the scenes, their pictures, PPO, resuming, bad input."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ppo_vlmrm_classic as ppo
from ppo_vlmrm_classic import CartPole, MountainCar

SCRIPT = [sys.executable, str(ROOT / "ppo_vlmrm_classic.py")]
SMALL = (
    "--reward ground-truth --num-envs 2 --eval-frequency 800 --select-episodes 2 "
    "--eval-episodes 2 --device cpu"
).split()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """A run in this process sets handlers of signals; pytest gets its own ones back."""
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = [signal.getsignal(signum) for signum in signals]
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    yield
    for signum, handler in zip(signals, handlers):
        signal.signal(signum, handler)


def scene_in(scene, state):
    scene.state = np.atleast_2d(np.array(state, dtype=np.float64))
    return scene


# the environments
@pytest.mark.parametrize("env_id", ppo.SCENES)
def test_physics_are_gymnasiums(env_id):
    """One step from many states, all short of the edges that this project treats differently."""
    rng, scene = np.random.default_rng(0), ppo.SCENES[env_id]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = gym.make(env_id).unwrapped
    theirs.reset(seed=0)
    for _ in range(300):
        if env_id == "CartPole-v1":
            state, action = rng.uniform((-2, -1, -3, -1), (2, 1, 3, 1)), rng.integers(2)
        else:
            state, action = rng.uniform((-1.2, -0.07), (0.44, 0.07)), rng.uniform(-1, 1)
        theirs.state, theirs.steps_beyond_terminated = state.copy(), None
        theirs.step(int(action) if scene.num_actions else np.array([action]))
        scene_in(scene, state).step(np.array([action]))
        assert np.allclose(scene.state[0], theirs.state, atol=1e-6)


@pytest.mark.parametrize("env_id", ppo.SCENES)
def test_no_termination_leaks(env_id):
    """Every episode has all its steps whatever happens in it; PPO bootstraps beyond the last."""
    scene, args = ppo.SCENES[env_id](), ppo.Args(env_id, **ppo.DEFAULTS[env_id])
    policy = lambda obs: torch.ones(len(obs))  # fails: the pole falls, the car never arrives
    obs, actions, states = ppo.rollout(scene, policy, range(3), args.action_repeat)
    decisions = 200 // args.action_repeat
    assert states.shape[:2] == (200, 3) and actions.shape == (decisions, 3)
    assert obs.shape[:2] == (decisions + 1, 3)
    assert not scene.success(scene.in_goal(states).T).any()
    moved = np.abs(np.diff(states, axis=0)).sum(-1)
    assert (moved[-50:] > 0).all(), "a fallen pole and a car on the slope go on moving"


def test_time_limit_is_bootstrapped():
    """With a constant reward and a critic that knows it, no step has an advantage: nor the last."""
    reward, gamma = 0.7, 0.9
    values = torch.full((11, 4), reward / (1 - gamma))
    assert ppo.gae(torch.full((10, 4), reward), values, gamma, 0.95).abs().max() < 1e-5


def test_gae_against_its_definition():
    """Sum over l of (gamma lambda)^l delta_{t+l}; for lambda 1 the bootstrapped discounted return
    minus the value."""
    torch.manual_seed(0)
    T, gamma, lam = 13, 0.97, 0.9
    rewards = torch.randn(T, 3, dtype=torch.float64)
    values = torch.randn(T + 1, 3, dtype=torch.float64)
    delta = lambda t: rewards[t] + gamma * values[t + 1] - values[t]
    direct = [sum((gamma * lam) ** (k - t) * delta(k) for k in range(t, T)) for t in range(T)]
    assert torch.allclose(ppo.gae(rewards, values, gamma, lam), torch.stack(direct))
    for t, advantage in enumerate(ppo.gae(rewards, values, gamma, 1.0)):
        discounted = sum(gamma ** (k - t) * rewards[k] for k in range(t, T))
        assert torch.allclose(advantage, discounted + gamma ** (T - t) * values[T] - values[t])


def test_cartpole_angle_wraps():
    scene = scene_in(CartPole(), [[0, 0, np.pi - 0.01, 2.0], [0, 0, -np.pi + 0.01, -2.0]])
    scene.step(np.array([1, 1]))
    assert scene.state[:, 2] == pytest.approx([-np.pi + 0.03, np.pi - 0.03])
    before = scene_in(CartPole(), [0, 0, np.pi - 1e-6, 0]).observe()
    after = scene_in(CartPole(), [0, 0, -np.pi + 1e-6, 0]).observe()
    assert np.allclose(before, after, atol=1e-5), "the policy sees no jump where the angle wraps"


def test_cartpole_position_is_clamped():
    scene = scene_in(CartPole(), [[2.99, 3.0, 0, 0], [-2.99, -3.0, 0, 0]])
    scene.step(np.array([1, 0]))
    assert scene.state[:, 0].tolist() == [3.0, -3.0] and scene.state[:, 1].tolist() == [0.0, 0.0]
    assert not scene.in_goal(scene.state).any(), "the track ends outside the goal"
    scene.step(np.array([0, 1]))
    scene.step(np.array([0, 1]))
    assert abs(scene.state[0, 0]) < 3 and abs(scene.state[1, 0]) < 3, "the cart can leave the stop"


def test_cartpole_success_is_decided_at_every_step():
    edge = np.radians(12)
    good = [[0, 0, edge, 0], [0, 0, -edge, 0], [2.4, 0, 0, 0]]
    states = np.array([*good, [0, 0, edge + 1e-6, 0], [2.41, 0, 0, 0], [0, 0, 3, 0]])
    assert CartPole().in_goal(states).tolist() == [True, True, True, False, False, False]
    in_goal = np.ones((2, 200), dtype=bool)
    in_goal[1, 57] = False
    assert CartPole().success(in_goal).tolist() == [True, False]
    assert CartPole().true_reward(states, None).tolist() == [1, 1, 1, -1, -1, -1]


def test_mountain_car_goal_is_absorbing():
    scene = scene_in(MountainCar(), [[0.44, 0.03], [0.44, -0.01]])
    scene.step(np.zeros(2))
    arrived = scene.state[0, 0]
    assert arrived >= 0.45 > scene.state[1, 0]
    for _ in range(50):
        scene.step(np.full(2, -1.0))
        assert scene.state[0].tolist() == [arrived, 0.0], "full reverse moves no car that arrived"
    assert scene.in_goal(scene.state).tolist() == [True, False]
    in_goal = np.array([[False] * 199 + [True], [False] * 200])
    assert scene.success(in_goal).tolist() == [True, False]
    assert np.allclose(scene.true_reward(scene.state, np.array([0.5, -3.0])), [1 - 0.025, -0.1])


def test_mountain_car_needs_a_swing():
    """Full throttle never arrives; pushing along with the movement does."""
    for policy, arrives in ((lambda v: 1.0, False), (lambda v: np.sign(v) or 1.0, True)):
        scene = scene_in(MountainCar(), [-0.5, 0.0])
        for _ in range(200):
            scene.step(np.array([policy(scene.state[0, 1])]))
        assert scene.in_goal(scene.state)[0] == arrives


# the pictures
@pytest.mark.parametrize("textured", [True, False])
@pytest.mark.parametrize("size", [64, 96, 224])
def test_pictures_are_functions_of_the_state(textured, size):
    poles = [(0, 0), (0.3, 0), (0, 0.1), (0, -0.1), (-3, 3.1)]
    cars = [-1.2, -0.5, -0.45, 0.4, 0.45, 0.6]
    for scene, states in (
        (CartPole(), [(x, 0, theta, 0) for x, theta in poles]),
        (MountainCar(), [(x, 0) for x in cars]),
    ):
        frames = [scene.draw(state, size, textured) for state in states]
        assert all(frame.shape == (size, size, 3) and frame.dtype == np.uint8 for frame in frames)
        for i, state in enumerate(states):
            scene.draw(states[(i + 1) % len(states)], size, textured)  # must leave no trace
            assert (scene.draw(state, size, textured) == frames[i]).all()
            assert all((frames[i] != frames[j]).any() for j in range(i)), "two states look the same"


@pytest.mark.parametrize("textured", [True, False])
def test_the_car_is_where_the_state_says(textured):
    """The centre of what differs between two pictures moves along the track, in metres."""
    for x in np.linspace(-1.1, 0.55, 12):
        far = 0.5 if x < -0.3 else -1.1
        car, elsewhere = (MountainCar().draw((at, 0), 192, textured) for at in (x, far))
        background = np.where((car == elsewhere).all(-1), 0, 1)
        background[:, : 70 if x >= -0.3 else 0] = 0  # leave out the other car
        background[:, 110 if x < -0.3 else 192 :] = 0
        rows, columns = np.nonzero(background)
        metres = (columns.mean() + 0.5) / 192 * 2.3 - 1.4
        assert abs(metres - x) < 0.12 and abs(rows.mean() / 192 - ppo.on_track(x)[1]) < 0.08


def test_the_car_tilts_with_the_slope():
    """A line through the car's red pixels rises to the right on the right slope, falls on the left
    one, is level in the valley."""
    for x, sign in ((-0.05, 1), (-0.95, -1), (-np.pi / 6, 0)):
        r, g, b = MountainCar().draw((x, 0), 240).astype(int).transpose(2, 0, 1)
        rows, columns = np.nonzero((r > 170) & (g < 70) & (b < 70))
        covariance = np.cov(columns, -rows)
        angle = 0.5 * np.arctan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1])
        assert angle * sign > 0.4 if sign else abs(angle) < 0.1


def test_the_pole_leans_to_where_the_angle_says():
    for theta in np.radians([-170, -90, -30, -5, 5, 30, 90, 170]):
        r, g, b = CartPole().draw((0, 0, theta, 0), 240).astype(int).transpose(2, 0, 1)
        rows, columns = np.nonzero((abs(r - 196) < 12) & (abs(g - 102) < 12) & (abs(b - 40) < 12))
        right, up = columns.mean() + 0.5 - 120, 0.44 * 240 - rows.mean()
        assert np.sign(right) == np.sign(theta)
        assert np.arctan2(right, up) == pytest.approx(theta, abs=0.1)


def test_textured_mountain_is_a_picture():
    """Thousands of colours where Gymnasium's line drawing has a few; both flags are yellow."""
    frames = [MountainCar().draw((-0.5, 0), 240, textured) for textured in (True, False)]
    colours = [len(np.unique(frame.reshape(-1, 3), axis=0)) for frame in frames]
    assert colours[0] > 3000 and colours[1] < 300
    for frame in frames:
        r, g, b = frame.astype(int).transpose(2, 0, 1)
        rows, columns = np.nonzero((r > 190) & (g > 180) & (b < 60))
        assert len(rows) > 20
        assert abs((columns.min() / 240 * 2.3 - 1.4) - MountainCar.GOAL) < 0.03


# PPO
@pytest.mark.parametrize("env_id, steps", [*zip(ppo.SCENES, (112_000, 128_000))])
def test_ppo_solves_the_scene_with_the_true_reward(env_id, steps):
    flags = f"--env-id {env_id} --reward ground-truth --seed 21 --total-timesteps {steps}"
    flags += " --eval-episodes 20 --device cpu --run-name solved"
    summary = ppo.main(flags.split())
    assert summary["greedy action"]["success_rate"] >= 0.9
    assert summary["zero action"]["success_rate"] == 0
    assert summary["random action"]["success_rate"] <= 0.3
    left = "args.json best.pt epic.json landscape.png eval.json eval.mp4 eval.png"
    assert set(left.split()) <= set(os.listdir("runs/solved"))
    again = ppo.main(["--evaluate", "runs/solved"])
    assert again == summary


def test_agent_distributions():
    torch.manual_seed(0)
    obs = torch.randn(7, 5)
    discrete, continuous = ppo.Agent(5, 2, 1.0), ppo.Agent(5, 0, 0.5)
    assert discrete.act(obs).shape == continuous.act(obs).shape == (7,)
    assert continuous.distribution(obs).stddev.tolist() == [0.5] * 7
    greedy = discrete.distribution(obs).probs.argmax(-1)
    assert torch.equal(discrete.act(obs, sample=False), greedy)
    assert torch.equal(continuous.act(obs, sample=False), continuous.distribution(obs).mean)
    assert discrete.critic(obs).shape == (7,)
    assert discrete.critic(obs.expand(3, 7, 5)).shape == (3, 7)


# resuming
def scalars(run_dir):
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    # sorted: of two writers of one process within a second, the 10th is read before the 9th
    return {
        tag: sorted((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
        if not tag.startswith("time/") and tag != "charts/SPS"
    }


def resume(run_dir):
    """In this process, after one that ended. TensorBoard reads event files by name, which is second
    and process number: of the same second, the one of the smaller number is taken for the older."""
    time.sleep(1)
    return ppo.main(["--resume", run_dir])


def assert_same(one, other):
    """Two runs agree in their last checkpoints, bit for bit, in their best policy and in all they
    logged, timings aside."""
    names = [sorted(path.name for path in run.glob("*.pt")) for run in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        a, b = (torch.load(run / name, weights_only=True) for run in (one, other))
        assert str(a) == str(b)
        for key in ("agent", *(["optimizer"] if "optimizer" in a else [])):
            leaves = [torch.utils._pytree.tree_leaves(saved[key]) for saved in (a, b)]
            one_by_one = [[x for x in values if torch.is_tensor(x)] for values in leaves]
            assert len(one_by_one[0]) == len(one_by_one[1]) > 0
            assert all(torch.equal(x, y) for x, y in zip(*one_by_one))
        if "rng" in a:
            assert torch.equal(a["rng"], b["rng"])
    assert scalars(one) == scalars(other)


def start(command, run_dir, step):
    """A process that has got to this step, or ended before."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None:
        checkpoints = Path(run_dir).glob("checkpoint_*.pt")
        if any(int(path.stem[-9:]) >= step for path in checkpoints):
            break
        time.sleep(0.005)
    return process


@pytest.mark.parametrize("env_id", ppo.SCENES)
def test_a_killed_run_resumes_bit_for_bit(env_id):
    """SIGKILL at two moments, each followed by --resume, against one uninterrupted run."""
    flags = ["--env-id", env_id, *SMALL, "--total-timesteps", "4000"]
    ppo.main([*flags, "--run-name", "whole"])
    command = [*SCRIPT, *flags, "--run-name", "killed"]
    for step in (800, 2400):  # kill once the run has got beyond these steps
        process = start(command, "runs/killed", step)
        process.kill()
        process.communicate()
        command = [*SCRIPT, "--resume", "runs/killed"]
    resume("runs/killed")
    assert_same(Path("runs/whole"), Path("runs/killed"))


def test_a_signal_ends_the_run_at_a_safe_point():
    """With a checkpoint and code 0; what follows is as if it had not been stopped."""
    flags = [*SMALL, "--total-timesteps", "4000"]
    ppo.main([*flags, "--run-name", "whole"])
    for signum in (signal.SIGTERM, signal.SIGHUP):
        run = f"runs/{signum.name}"
        process = start([*SCRIPT, *flags, "--run-name", signum.name], run, 800)
        process.send_signal(signum)
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0 and "Traceback" not in output
        if not Path(run, "checkpoint_000004000.pt").exists():  # else it outran the signal
            assert len(list(Path(run).glob("checkpoint_*.pt"))) == 2
            assert signum == signal.SIGHUP or f"go on with --resume {run}" in output
            resume(run)
        assert_same(Path("runs/whole"), Path(run))


def test_resume_may_go_further_but_not_elsewhere(capsys):
    ppo.main([*SMALL, "--total-timesteps", "800", "--run-name", "short"])
    with pytest.raises(SystemExit, match="gamma"):
        ppo.main(["--resume", "runs/short", "--gamma", "0.5"])
    with pytest.raises(SystemExit, match="raised"):
        ppo.main(["--resume", "runs/short", "--total-timesteps", "400"])
    ppo.main(["--resume", "runs/short", "--total-timesteps", "1600"])
    steps = [step for step, _ in scalars("runs/short")["losses/value_loss"]]
    assert steps == [400, 800, 1200, 1600]
    assert len(list(Path("runs/short").glob("checkpoint_*.pt"))) == 2


def test_resume_with_the_same_prompt_is_no_change():
    ppo.main([*SMALL, "--total-timesteps", "800", "--run-name", "run", "--prompt", "a pole"])
    ppo.main(["--resume", "runs/run", "--prompt", "a pole"])
    with pytest.raises(SystemExit, match="changed: prompt"):
        ppo.main(["--resume", "runs/run", "--prompt", "a pole", "--prompt", "a cart"])


def test_a_raised_goal_survives_a_kill_and_a_plain_resume():
    ppo.main([*SMALL, "--total-timesteps", "800", "--run-name", "run"])
    process = start(
        [*SCRIPT, *"--resume runs/run --total-timesteps 4000".split()], "runs/run", 1600
    )
    process.kill()
    process.communicate()
    resume("runs/run")
    assert Path("runs/run/checkpoint_000004000.pt").exists()
    assert json.loads(Path("runs/run/args.json").read_text())["args"]["total_timesteps"] == 4000


def test_damaged_checkpoint_is_named_and_the_one_before_offered():
    ppo.main([*SMALL, "--total-timesteps", "1600", "--run-name", "run"])
    before, last = sorted(Path("runs/run").glob("checkpoint_*.pt"))
    last.write_bytes(last.read_bytes()[:1000])
    hint = "remove the newest checkpoint to resume the one before"
    damaged = f"{last.name} is damaged or of another version; {hint}"
    with pytest.raises(SystemExit, match=damaged):
        ppo.main(["--resume", "runs/run"])
    last.unlink()
    assert before.exists() and ppo.main(["--resume", "runs/run"]) is not None


def test_checkpoint_is_whole_or_absent(tmp_path):
    """A full disk (here: a limit on the size of a file) is told in one line and leaves the
    checkpoint from before as it was."""
    path = tmp_path / "checkpoint.pt"
    ppo.atomic_save({"x": torch.arange(10)}, path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(SystemExit, match="can't write"):
            ppo.atomic_save({"x": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.load(path, weights_only=True)["x"].tolist() == list(range(10))


def test_not_a_number_stops_the_run(monkeypatch):
    """A reward that becomes NaN ends the run with the step, and --resume goes on from before as if
    nothing had been."""
    flags, honest, calls = [*SMALL, "--total-timesteps", "1600"], CartPole.true_reward, []
    ppo.main([*flags, "--run-name", "whole"])

    def spoilt(self, state, actions):
        calls.append(state.shape)
        spoil = np.nan if len(calls) == 6 else 1  # the third rollout
        return honest(self, state, actions) * spoil

    with monkeypatch.context() as patch:
        patch.setattr(CartPole, "true_reward", spoilt)
        with pytest.raises(SystemExit, match="reward is not finite after step 800"):
            ppo.main([*flags, "--run-name", "spoilt"])
    ppo.main(["--resume", "runs/spoilt"])
    assert_same(Path("runs/whole"), Path("runs/spoilt"))


def test_weights_that_are_not_numbers_are_never_saved():
    flags = [*SMALL, *"--total-timesteps 1600 --learning-rate 1e36 --run-name run".split()]
    with pytest.raises(SystemExit, match="a loss or a weight is not finite at step"):
        ppo.main(flags)
    for path in Path("runs/run").glob("checkpoint_*.pt"):
        agent = torch.load(path, weights_only=True)["agent"]
        assert all(weight.isfinite().all() for weight in agent.values())


def test_minibatches_are_of_equal_size():
    """Of 400 actions in 134 parts none is left over as one alone, which has no deviation."""
    flags = "--num-envs 2 --num-minibatches 134 --total-timesteps 400 --run-name run"
    assert ppo.main([*SMALL, *flags.split()])["step"] == 400


# what may fail without ending a run
def test_without_ffmpeg_there_is_a_warning_and_every_number():
    process = subprocess.run(
        [*SCRIPT, *SMALL, "--total-timesteps", "800", "--run-name", "run"],
        env=os.environ | {"IMAGEIO_FFMPEG_EXE": "/nonexistent"},
        capture_output=True,
        text=True,
        check=True,
    )
    output = process.stdout + process.stderr
    assert output.count("warning:") == 1 and "warning: no video" in output
    assert "Traceback" not in output
    summary = json.loads(Path("runs/run/eval.json").read_text())
    assert 0 <= summary["greedy action"]["success_rate"] <= 1
    assert Path("runs/run/eval.png").exists() and Path("runs/run/landscape.png").exists()


def test_without_its_picture_a_landscape_has_its_numbers(monkeypatch, capsys):
    """Here a folder stands where the picture should go; checkpoint and numbers come before it."""
    monkeypatch.setattr(ppo, "plot_landscape", blocking(ppo.plot_landscape))
    epic = ppo.main([*SMALL, "--landscape-only", "--run-name", "run"])
    assert capsys.readouterr().out.count("warning: no landscape.png") == 1
    assert json.loads(Path("runs/run/epic.json").read_text()) == epic
    assert Path("runs/run/checkpoint_000000000.pt").exists()


def blocking(plot_landscape):
    def blocked(*args):
        Path("runs/run/landscape.png").mkdir()
        plot_landscape(*args)

    return blocked


def test_the_backend_of_a_notebook_does_not_matter():
    process = subprocess.run(
        [*SCRIPT, "--help"],
        env=os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0 and "--landscape-only" in process.stdout, process.stderr


# bad input
BAD = [
    (["--env-id", "Acrobot-v1"], "Acrobot"),
    (["--prompt", "  "], "prompt is empty"),
    (["--baseline-prompt", ""], "prompt is empty"),
    (["--clip-alpha", "1.5"], "clip-alpha"),
    (["--clip-alpha", "nan"], "clip-alpha"),
    (["--clip-model", "ViT-Z-99/openai"], "ViT-Z-99"),
    (["--clip-model", "ViT-B-32/no_such_tag"], "no_such_tag"),
    (["--clip-model", "local-dir:nowhere"], "nowhere"),
    (["--clip-precision", "bf16", "--device", "cpu"], "GPU"),
    (["--total-timesteps", "0"], "total-timesteps"),
    (["--num-envs", "-1"], "num-envs"),
    (["--num-envs", "1", "--num-minibatches", "150"], "num-minibatches"),
    (["--action-repeat", "7"], "action-repeat"),
    (["--drawing", "original"], "CartPole"),
    (["--seed", "-1"], "--seed"),
    (["--image-size", "-5"], "image-size"),
    (["--image-size", "8"], "image-size"),
    (["--gamma", "1"], "gamma"),
    (["--gae-lambda", "1.1"], "gae-lambda"),
    (["--learning-rate", "nan"], "learning-rate"),
    (["--reward-batch-size", "0"], "reward-batch-size"),
    (["--resume", "nowhere"], "nowhere"),
    (["--evaluate", "nowhere"], "nowhere"),
    (["--resume", "a", "--evaluate", "b"], "either"),
    (["--reward", "ground-truth", "--run-name", "taken"], "exists"),
    (["--reward", "ground-truth", "--run-name", "file/x"], "writable"),
]


@pytest.mark.parametrize("flags, word", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_clear_line(flags, word, capsys):
    Path("runs/taken").mkdir(parents=True)
    Path("runs/file").write_text("")
    with pytest.raises(SystemExit) as end:
        ppo.main(flags)
    message = f"{end.value.code}{capsys.readouterr().err}"
    assert end.value.code not in (0, None) and word in message
    assert sorted(os.listdir("runs")) == ["file", "taken"], "a refused run leaves nothing behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_where_there_is_none():
    with pytest.raises(SystemExit, match="sees no such GPU"):
        ppo.main(["--device", "cuda"])


def test_bad_input_through_the_command_line():
    command = [*SCRIPT, "--clip-alpha", "1.5"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "error: --clip-alpha must be between 0 and 1\n"


# the reward
@pytest.fixture(scope="module")
def landscapes(tmp_path_factory):
    """Embeddings of a line of states for both scenes, by the shipped CLIP."""
    made = {}
    for env_id, scene_class in ppo.SCENES.items():
        scene = scene_class()
        reward = ppo.CLIPReward("local-dir:tiny_clip", (scene.PROMPT,), (scene.BASELINE,))
        line = np.zeros((121, len(scene.LOW)))
        line[:, scene.AXIS] = np.linspace(scene.LOW[scene.AXIS], scene.HIGH[scene.AXIS], 121)
        frames = np.stack([scene.draw(state, reward.image_size[0]) for state in line])
        made[env_id] = scene, reward, line, reward.embed_images(frames)
    return made


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 0.75, 1])
@pytest.mark.parametrize("env_id", ppo.SCENES)
def test_the_reward_is_highest_at_the_goal(landscapes, env_id, alpha):
    scene, reward, line, embeddings = landscapes[env_id]
    reward.alpha = alpha
    rewards = reward(embeddings).numpy()
    best = rewards.argmax()
    in_goal = scene.in_goal(line)
    assert in_goal[max(best - 2, 0) : best + 3].any()  # to two points: 3 cm, or 6 degrees
    assert rewards[in_goal].mean() > np.quantile(rewards[~in_goal], 0.9)


def test_the_reward_follows_the_slope_of_the_hill(landscapes):
    """On the textured mountain with alpha 1, the reward rises from the valley to the flag: by rank
    correlation with x."""
    _, reward, line, embeddings = landscapes["MountainCarContinuous-v0"]
    reward.alpha = 1.0
    right = (line[:, 0] > -0.52) & (line[:, 0] < 0.45)
    ranks = lambda values: np.argsort(np.argsort(values))
    rewards = reward(embeddings).numpy()[right]
    assert np.corrcoef(ranks(rewards), ranks(line[right, 0]))[0, 1] > 0.9


def test_landscape_only_stops_there(capsys):
    epic = ppo.main(["--landscape-only", "--run-name", "landscape", "--clip-alpha", "0.3"])
    assert list(epic) == [
        "alpha 0",
        "alpha 0.25",
        "alpha 0.3",
        "alpha 0.5",
        "alpha 0.75",
        "alpha 1",
    ]
    assert all(0 <= distance <= 1 for distance in epic.values())
    assert json.loads(Path("runs/landscape/epic.json").read_text()) == epic
    assert Path("runs/landscape/landscape.png").stat().st_size > 10_000
    assert not Path("runs/landscape/best.pt").exists()


def test_epic_distance_of_the_true_reward_is_zero():
    """Ground truth is an affine function of the goal's label; EPIC sees no scale and offset."""
    epic = ppo.main(["--reward", "ground-truth", "--landscape-only", "--run-name", "landscape"])
    assert epic["ground truth"] < 1e-6


def test_a_run_on_the_vlm_reward_resumes_bit_for_bit():
    flags = (
        "--env-id MountainCarContinuous-v0 --num-envs 2 --eval-frequency 400 --select-episodes 2 "
        "--eval-episodes 2 --device cpu --total-timesteps 1600"
    ).split()
    ppo.main([*flags, "--run-name", "whole"])
    ppo.main([*flags, "--run-name", "cut"])
    # as if killed before its last checkpoint; events and best policy of the lost steps are there
    Path("runs/cut/checkpoint_000001600.pt").unlink()
    ppo.main(["--resume", "runs/cut"])
    assert_same(Path("runs/whole"), Path("runs/cut"))
