# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch>=2.6", "open_clip_torch>=3.3,<4", "gymnasium[mujoco]>=1.2,<2",
#   "mujoco>=3.17", "tyro>=0.9", "numpy>=2.0", "tensorboard>=2.18", "tqdm>=4.66", "imageio>=2.36",
#   "imageio-ffmpeg>=0.5", "stable-baselines3>=2.7"]
# ///
"""How fast is sac_vlmrm.py? One run, one table, some minutes; on Linux.

    uv run tests/benchmark.py      # or: pip install stable-baselines3; python tests/benchmark.py

A row compares two rates. They are measured in turns, because a shared machine has fast and slow
minutes; `ratio` is the median of the first over the second. Higher is better, but for memory.

(a) steps and frames: against Gymnasium's Humanoid-v5, drawn after every step
(b) each stage of a round: against its floor, the work that no code around it can save
(c) whole training steps: against Stable-Baselines3's SAC, its environment asking the same CLIP
    at every step, where the script asks at every fourth
(d) updates: against Stable-Baselines3's SAC
(e) growth: with robots, pixels, the VLM (random weights), and over a longer run, in memory

Where there is a GPU, all but the physics runs on it, and the VLMs of (e) in bf16. That is untested:
we had none.
"""

import functools
import logging
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sac_vlmrm  # before all that draws: it chooses an OpenGL for machines without a screen

import gymnasium as gym
import mujoco
import numpy as np
import open_clip
import torch
from sac_vlmrm import EPISODE_LENGTH
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

PROMPTS = ("a humanoid robot kneeling",), ("a humanoid robot",)  # goal, baseline
DEFAULT = sac_vlmrm.Args()
REPEATS = 5
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
THREADS = sac_vlmrm.usable_cores()
torch.set_num_threads(THREADS)


# MEASURING
def rates(*works):
    """Amounts per second (REPEATS, works). A work is a function that returns the amount it did."""
    table = np.empty((1 + REPEATS, len(works)))  # the first repeat warms up
    for i, j in np.ndindex(table.shape):
        start = time.perf_counter()
        amount = works[j]()
        if GPU:
            torch.cuda.synchronize()
        table[i, j] = amount / (time.perf_counter() - start)
    return table[1:]


def number(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def row(name, rate, unit, ratio="", spread="", other=""):
    print(f"| {ratio} | {spread} | {name} | {number(rate)} | {unit} | {other} |", flush=True)


def compare(unit, *works):
    """A row for each work (name, function) but the last, which the others are compared with.

    Returns the median rate of each.
    """
    table = rates(*(work for _, work in works))
    medians = np.median(table, axis=0)
    other = f"{works[-1][0]}: {number(medians[-1])}"
    for (name, _), rate, ratio in zip(works[:-1], medians, (table / table[:, -1:]).T):
        spread = f"{number(ratio.min())} to {number(ratio.max())}"
        row(name, rate, unit, number(np.median(ratio)), spread, other)
    return medians


class Products(TorchDispatchMode):
    """Notes the matrix products and convolutions that run under it, to run them alone."""

    names = "mm", "addmm", "bmm", "baddbmm", "linear", "conv2d", "scaled_dot_product_attention"

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        call = functools.partial(func, *args, **kwargs or {})
        if func.overloadpacket.__name__ in self.names:
            self.calls.append(call)
        return call()

    @torch.inference_mode()
    def again(self, times, amount):
        for _ in range(times):
            for call in self.calls:
                call()
        return amount


def peak_memory():
    """In GB, of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 * 1.024


# OURS
class Script:
    """The stages of a round as in the main loop of sac_vlmrm.py, and the floors of two of them.

    They return for how many steps they worked.
    """

    def __init__(self):
        self.envs = sac_vlmrm.VLMHumanoid(DEFAULT.num_envs, THREADS)
        options = DEFAULT.clip_alpha, DEVICE, "fp32", DEFAULT.reward_batch_size
        self.clip_reward = sac_vlmrm.CLIPReward(DEFAULT.clip_model, *PROMPTS, *options)
        self.painters = []
        self.scored = sac_vlmrm.scored_steps(DEFAULT.score_every)
        self.painter = self.new_painter(self.clip_reward.image_size)
        self.sac = sac_vlmrm.SAC(DEFAULT, DEVICE)
        self.rb = sac_vlmrm.ReplayBuffer(DEFAULT.buffer_size // EPISODE_LENGTH, DEVICE)

    def new_painter(self, size):
        look = DEFAULT.textures, DEFAULT.camera
        self.painters.append(sac_vlmrm.Painter(size, *look, THREADS))
        return self.painters[-1]

    def close(self):
        for painter in self.painters:
            painter.close()

    def collect(self, policy=None):
        policy = policy or self.sac.actor.act
        self.obs, self.actions, self.rewards, _ = sac_vlmrm.collect(self.envs, policy, seed=0)
        return self.rewards.size

    def only_step(self):
        """The physics of `collect` once more, with its torques, as one call of MuJoCo's."""
        self.envs.reset(seed=0)
        torques = self.actions * self.envs.single_action_space.high
        self.envs.sim.rollout(5 * EPISODE_LENGTH, torques.repeat(5, axis=1), record=())
        return self.rewards.size

    def draw(self, painter=None, states=slice(None)):
        """All states of the episodes, or some."""
        qpos = self.obs[:, 1:, : sac_vlmrm.HUMANOID.nq]
        self.frames = (painter or self.painter)(qpos[:, states])
        sac_vlmrm.goal_states(qpos)  # success, which the script counts as a part of this stage
        return self.rewards.size

    def draw_scored(self):
        return self.draw(states=self.scored)

    def only_render(self):
        """As many frames as `draw`, but all of one state: nothing moves."""

        def render(renderer, frames):
            for frame in frames:
                renderer.render(out=frame)

        frames = self.frames.reshape(-1, *self.frames.shape[-3:])
        shares = np.array_split(frames, len(self.painter.threads))
        self.painter.on_threads(render, self.painter.renderers, shares)
        return self.rewards.size

    def embed(self, count=None):
        frames = self.frames.reshape(-1, *self.frames.shape[-3:])
        return self.clip_reward.embed_images(frames[:count])

    def score(self):
        scores = self.clip_reward(self.embed()).cpu().numpy().reshape(self.frames.shape[:3])
        self.rewards = sac_vlmrm.fill_in(scores.mean(-1), self.scored)  # the mean of the views
        return self.rewards.size

    def learn(self):
        self.rb.add(obs=self.obs, actions=self.actions, rewards=self.rewards)
        self.sac.learn(self.rb, progress=0)
        return self.rewards.size

    def play(self):
        self.collect()
        self.draw_scored()
        return self.score()

    def round(self):
        self.play()
        return self.learn()

    def updates_of(self, args):
        """The work of updating a learner with other flags; it returns how many updates it did."""
        sac = sac_vlmrm.SAC(args, DEVICE)

        def update():
            sac.learn(self.rb, progress=0)
            return args.gradient_steps

        return update


# THEIRS, in a process of its own
@functools.cache
def gymnasium_humanoid(size):
    """With the 255 numbers that sac_vlmrm.py observes, and with episodes that never end early."""
    env = gym.make(
        "Humanoid-v5",
        exclude_current_positions_from_observation=False,
        include_qfrc_actuator_in_observation=False,
        include_cfrc_ext_in_observation=False,
        terminate_when_unhealthy=False,
        max_episode_steps=EPISODE_LENGTH,
        render_mode="rgb_array",
        width=size,
        height=size,
    )
    env.reset(seed=0)
    return env


def gymnasium_steps(steps, size, draw):
    env = gymnasium_humanoid(size)
    for _ in range(steps):
        truncated = env.step(env.action_space.sample())[3]
        if draw:
            env.render()
        if truncated:
            env.reset()
    return steps


class CLIPRewarded(gym.Wrapper):
    """What one would write first: every step is drawn, as Gymnasium draws it, and scored."""

    def __init__(self):
        super().__init__(gymnasium_humanoid(480))  # Gymnasium's own size
        self.clip_reward = sac_vlmrm.CLIPReward(DEFAULT.clip_model, *PROMPTS, device=DEVICE)

    def step(self, action):
        obs, _, terminated, truncated, info = self.env.step(action)
        embedding = self.clip_reward.embed_images(self.env.render()[None])
        return obs, self.clip_reward(embedding).item(), terminated, truncated, info


@functools.cache
def sb3_sac():
    from stable_baselines3 import SAC

    updates = Fraction(DEFAULT.gradient_steps, DEFAULT.num_envs * EPISODE_LENGTH)  # per step
    sac = SAC(
        "MlpPolicy",
        CLIPRewarded(),
        batch_size=DEFAULT.batch_size,
        train_freq=updates.denominator,
        gradient_steps=updates.numerator,
        policy_kwargs={"net_arch": [DEFAULT.hidden] * 2},
        learning_starts=0,
        buffer_size=30_000,
        device=DEVICE,
    )
    rb = sac.replay_buffer  # full, about as ours is by then
    for array in (rb.observations, rb.next_observations, rb.actions, rb.rewards):
        array[:] = np.random.uniform(-1, 1, array.shape)
    rb.full = True
    return sac.learn(1)  # sets up the logger that its train() needs


def sb3_steps(steps):
    sb3_sac().learn(steps, reset_num_timesteps=False)
    return steps


def sb3_updates(updates):
    sb3_sac().train(updates, DEFAULT.batch_size)
    return updates


# THE TABLE
def against_others(script, theirs):
    size = script.clip_reward.image_size[0]

    def physics():
        return script.collect(lambda obs: np.random.uniform(-1, 1, script.actions.shape[::2]))

    def frames():
        physics()
        return script.draw()

    gymnasium = "Gymnasium", theirs(gymnasium_steps, 300, 480, False)
    compare("steps/s", ("(a) physics", physics), gymnasium)
    for pixels in (480, size):
        gymnasium = f"Gymnasium, {pixels} px", theirs(gymnasium_steps, 20, pixels, True)
        compare("steps/s", (f"(a) physics and frames, {size} px", frames), gymnasium)
    compare("steps/s", ("(c) training", script.round), ("SB3", theirs(sb3_steps, 20)))
    plain = script.updates_of(replace(DEFAULT, normalize=False, mirror=False, n_step=1))
    updates = ("(d) plain SAC", plain), ("(d) default flags", script.updates_of(DEFAULT))
    compare("updates/s", *updates, ("SB3", theirs(sb3_updates, DEFAULT.gradient_steps)))


def against_floors(script):
    script.draw_scored()
    steps, batch = script.rewards.size, DEFAULT.reward_batch_size
    with Products() as products:
        script.embed(batch)
    frames = script.frames[..., 0, 0, 0].size
    batches = frames // batch
    score = functools.partial(products.again, batches, steps * batches * batch / frames)
    update = script.updates_of(replace(DEFAULT, gradient_steps=1))
    update()  # the first one also fits the scales of the inputs
    with Products() as products:
        update()
    learn = functools.partial(products.again, DEFAULT.gradient_steps, steps)
    compare("steps/s", ("(b) collect", script.collect), ("MuJoCo alone", script.only_step))
    compare("steps/s", ("(b) draw", script.draw_scored), ("rendering alone", script.only_render))
    compare("steps/s", ("(b) score", script.score), ("matrix products alone", score))
    compare("steps/s", ("(b) learn", script.learn), ("matrix products alone", learn))


def more_robots_and_pixels(script):
    """Returns the rate at which 224 px are drawn."""

    def play(num_envs):
        envs = sac_vlmrm.VLMHumanoid(num_envs, THREADS)

        def work():
            script.envs = envs
            return script.play()

        return f"(e) collect, draw and score, {num_envs} robots", work

    def draw(size):
        painter = script.new_painter((size, size))
        return f"(e) draw, {size} px", lambda: script.draw(painter)

    compare("steps/s", play(2), play(32), play(DEFAULT.num_envs))
    return compare("steps/s", draw(224), draw(480), draw(script.clip_reward.image_size[0]))[0]


def larger_vlms():
    """Returns the rate at which the largest one scores frames.

    Beside each stands one large matrix product. On a CPU the two largest are only computed.
    """
    precision, side, batch = ("bf16", 16384, 800) if GPU else ("fp32", 2048, 4)
    dtype = open_clip.get_input_dtype(precision) or torch.float32
    square = torch.randn(side, side, device=DEVICE, dtype=dtype)
    images = torch.randn(batch, 3, 224, 224, device=DEVICE, dtype=dtype)
    for name in ("ViT-B-32", "ViT-L-14", "ViT-H-14", "ViT-bigG-14"):
        with torch.device("meta"):  # nothing takes memory there, so the text tower never does
            options = {"load_weights": False, "precision": precision, "device": "meta"}
            tower = open_clip.create_model(name, **options).visual
        with FlopCounterMode(display=False) as counter:
            tower(images[:1].to("meta"))
        flop = counter.get_total_flops()  # per frame
        label = f"(e) score, {name} ({flop / 1e9:.0f} GFLOP)"
        if GPU or name in ("ViT-B-32", "ViT-L-14"):
            tower.to_empty(device=DEVICE).eval().requires_grad_(False)
            for weights in tower.parameters():
                weights.normal_(std=0.02)
            score = lambda: len(tower(images))
            multiply = lambda: 2 * len(square @ square) ** 3 / flop
            product = f"as many in a product of {side} x {side}"
            rate = compare("frames/s", (label, score), (product, multiply))[0]
            flop_rate = rate * flop
        else:
            rate = flop_rate / flop
            row(f"{label}, computed", rate, "frames/s")
    return rate


def whole_runs(script, draw_rate, score_rate):
    """How long this machine would train in the presets, all stages together, evaluation not."""
    for preset, unit, length in (("one-gpu", "minutes", 60), ("paper", "hours", 3600)):
        args = sac_vlmrm.PRESETS[preset]
        script.envs = sac_vlmrm.VLMHumanoid(args.num_envs, THREADS)
        works = script.collect, script.updates_of(args)
        collect_rate, update_rate = np.median(rates(*works), axis=0)
        updates = args.gradient_steps / (args.num_envs * EPISODE_LENGTH)  # per step
        frames = len(sac_vlmrm.scored_steps(args.score_every)) / EPISODE_LENGTH  # per step
        seconds = 1 / collect_rate + frames * (1 / draw_rate + 1 / score_rate)
        seconds += updates / update_rate
        label = f"(e) preset {preset}, {args.total_timesteps:,} steps, computed"
        row(label, args.total_timesteps * seconds / length, unit)


def table(script):
    cpu = re.search("model name.*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    gpu = torch.cuda.get_device_name() if GPU else "no GPU"
    commit = subprocess.getoutput(f'git -C "{ROOT}" describe --always --dirty')
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, mujoco, gym))
    print(f"{cpu}, {THREADS} cores, {gpu}, drawn by {script.painter.name}; {versions}; {commit}\n")
    print("| ratio | lowest to highest | what | rate | unit | beside it |")
    print("| ---: | --- | --- | ---: | --- | --- |", flush=True)
    peaks = []
    for _ in range(35):  # first, before anything else has needed memory; then all is warm, too
        script.round()
        peaks.append(peak_memory())
    # software OpenGL draws on all cores unless it is told otherwise, as sac_vlmrm.py does
    process = multiprocessing.get_context("spawn"), os.unsetenv, ("LP_NUM_THREADS",)
    with ProcessPoolExecutor(1, *process) as pool:
        against_others(script, lambda *call: lambda: pool.submit(*call).result())
    against_floors(script)
    whole_runs(script, more_robots_and_pixels(script), larger_vlms())
    growth = f"{peaks[-1] / peaks[4]:.3f}", "", f"5 rounds: {peaks[4]:.3f}"
    row("(e) most memory in 35 rounds", peaks[-1], "GB", *growth)


def main():
    hint = "pip install stable-baselines3, or: uv run tests/benchmark.py"
    sac_vlmrm.check(find_spec("stable_baselines3"), f"no Stable-Baselines3: {hint}")
    logging.disable()  # open_clip warns of random weights
    with closing(Script()) as script:
        table(script)


if __name__ == "__main__":
    main()
