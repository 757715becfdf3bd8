# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "open_clip_torch>=3.3,<4", "tyro>=0.9", "tensorboard>=2.18", "numpy>=2.0", "tqdm>=4.66",
#                 "matplotlib>=3.9", "imageio>=2.36", "imageio-ffmpeg>=0.5"]
# ///
"""CartPole and MountainCar from one sentence: a vision-language model is the reward, PPO the learner.

Method: Rocamonde et al., "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning", ICLR 2024.

    python ppo_vlmrm_classic.py                                     # CartPole, on 2 CPU cores, offline, the tiny CLIP
    python ppo_vlmrm_classic.py --env-id MountainCarContinuous-v0   # textured; Gymnasium's drawing: --drawing original
    python ppo_vlmrm_classic.py --landscape-only --clip-model ViT-B-32/laion2b_s34b_b79k   # reward against angle
    python ppo_vlmrm_classic.py --reward ground-truth               # the learner without the VLM
    python ppo_vlmrm_classic.py --evaluate runs/RUN_NAME            # 100 episodes, success rate, video
    python ppo_vlmrm_classic.py --resume runs/RUN_NAME              # go on after a crash or Ctrl-C

The default reward model, tiny_clip/, was trained on pictures of these very scenes. It shows the method at work on
a laptop; it is not a zero-shot model. Any model that open_clip loads can take its place (--clip-model).

An iteration of the main loop (Algorithm 1 of the paper, with PPO in the place of SAC):
    collect  one whole episode in every environment
    score    draw the states, embed the pictures with CLIP in batches, compute the goal-baseline reward
    learn    GAE and a few epochs of PPO on these episodes
"""

import functools
import json
import os
import platform
import signal
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import imageio.v3 as iio
import numpy as np
import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch.distributions import Categorical, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
EPISODE_LENGTH = 200  # steps; every episode runs to its end (paper, section 4.2)


@dataclass
class Args:
    # what to learn
    env_id: Literal["CartPole-v1", "MountainCarContinuous-v0"] = "CartPole-v1"  # the scene; it has DEFAULTS of its own
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """what the picture should show; the paper's if not given; given several times, the embeddings are averaged"""
    baseline_prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """what it shows anyway (used when --clip-alpha > 0); the paper's if not given"""
    clip_alpha: float = 0.0  # strength of the goal-baseline regularisation, 0 (plain CLIP reward) to 1
    clip_model: str = "local-dir:tiny_clip"
    """NAME/TAG, NAME/weights.pt, hf-hub:ORG/REPO or local-dir:FOLDER, as open_clip knows them"""
    clip_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """precision of the image tower; bf16 and fp16 need a GPU. The reward itself is always fp32"""
    reward_batch_size: int = 50  # frames per forward pass of the image tower; more on a GPU
    reward: Literal["vlm", "ground-truth"] = "vlm"
    """ground-truth: +1 in the goal, -1 outside (CartPole); +1 at the goal less Gymnasium's action cost (MountainCar)"""

    # the picture
    drawing: Literal["textured", "original"] = "textured"  # of MountainCar: a picture, or Gymnasium's line drawing
    image_size: int = 0  # height and width in pixels; 0: the size the VLM takes

    # the run
    seed: int = 1  # of everything random
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA if there is one, else MPS, else the CPU
    run_name: str = ""  # folder below runs/; made from scene, seed and time if not given
    track: bool = False  # also log to Weights & Biases (needs wandb)
    wandb_project_name: str = "vlmrm"
    landscape_only: bool = False  # stop after the reward landscape and its EPIC distances
    resume: str = ""  # run folder to go on with; takes its flags, only --total-timesteps may be raised
    evaluate: str = ""  # run folder whose best policy to evaluate
    eval_episodes: int = 100  # episodes of the final evaluation
    eval_frequency: int = 8000  # steps between checkpoints, each with a short evaluation that decides the best policy
    select_episodes: int = 8  # episodes of that short evaluation

    # PPO
    total_timesteps: int = 100_000  # of all environments together
    num_envs: int = 8  # episodes collected side by side
    action_repeat: int = 1  # steps for which a chosen action is held; see DEFAULTS
    init_std: float = 1.0  # standard deviation of the Gaussian policy before training (continuous actions)
    learning_rate: float = 1e-3
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    gamma: float = 0.99  # discount per chosen action
    gae_lambda: float = 0.95
    num_minibatches: int = 8
    update_epochs: int = 8
    norm_adv: bool = True
    clip_coef: float = 0.2
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    standardize: bool = True  # scale the VLM reward to mean 0, deviation 1 over uniformly drawn states


# What each scene needs. MountainCar's engine is too weak to climb: the car must swing to and fro, some 36 steps each
# way, before it ever sees the top, and noise that is new at every step only makes it tremble. So an action is held for
# 20 steps and drawn wide; 1 in 3 such random episodes reaches the top (1 in 7 with 10 steps): examples to follow.
SWING = Args("MountainCarContinuous-v0", action_repeat=20, num_envs=16, total_timesteps=400_000, ent_coef=0.01)
DEFAULTS = {"CartPole-v1": Args(), "MountainCarContinuous-v0": SWING}


def check(ok, message):
    """End the program with one clear line if a user's input is not usable."""
    if not ok:
        raise SystemExit(f"error: {message}")


# ENVIRONMENT: what the camera sees. Both scenes are drawn in numpy, pixel for pixel a function of the state.
def fill(picture, points, color, radius=0.0):
    """Fill a convex polygon in picture (S, S, 3) uint8, grown by `radius`; one point makes a disc. Anti-aliased.

    Points (K, 2) and radius are shares of the picture's size: (0, 0) is the upper left corner, (1, 1) the lower right.
    """
    points, radius = np.asarray(points) * len(picture), radius * len(picture)
    x0, y0 = np.maximum(np.floor(points.min(0) - radius - 1).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(points.max(0) + radius + 1).astype(int), len(picture))
    if x0 >= x1 or y0 >= y1:
        return
    x, y = np.arange(x0, x1) + 0.5, np.arange(y0, y1)[:, None] + 0.5
    if len(points) == 1:
        distance = np.sqrt((x - points[0, 0]) ** 2 + (y - points[0, 1]) ** 2)  # (h, w)
    else:
        edges = np.roll(points, -1, 0) - points
        turn = np.sign(edges[0, 0] * edges[1, 1] - edges[0, 1] * edges[1, 0])
        normals = edges[:, ::-1] * [turn, -turn] / np.linalg.norm(edges, axis=1, keepdims=True)
        offsets = (normals * points).sum(1)
        distance = functools.reduce(np.maximum, [nx * x + ny * y - c for (nx, ny), c in zip(normals, offsets)])
    coverage = np.clip(radius + 0.5 - distance, 0, 1)[..., None]
    window = picture[y0:y1, x0:x1]
    window[:] = window + coverage * (np.asarray(color) - window) + 0.5


def rectangle(x0, y0, x1, y1):
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def noise_texture(rng, size, octaves, falloff=1.0):
    """Smooth, tileable value noise in [0, 1], (size, size): random grids of growing resolution, added up."""
    total = np.zeros((size, size))
    for cells in octaves:
        grid = np.pad(rng.random((cells, cells)), ((0, 1), (0, 1)), mode="wrap")
        x = np.linspace(0, cells, size, endpoint=False)
        i, f = x.astype(int), x % 1
        f = f * f * (3 - 2 * f)
        rows = grid[i] * (1 - f)[:, None] + grid[i + 1] * f[:, None]
        total += (rows[:, i] * (1 - f) + rows[:, i + 1] * f) / cells**falloff
    return total / sum(1 / cells**falloff for cells in octaves)


@functools.lru_cache
def cartpole_backdrop(size):
    """Everything that does not move, (size, size, 3) uint8."""
    y = (np.arange(size)[:, None, None] + 0.5) / size
    grain = noise_texture(np.random.default_rng(1), size, (4, 16, 64), 0.5)[..., None] - 0.5
    wall, floor = [222, 232, 240] - [26, 20, 12] * y + 6 * grain, [188, 150, 108] - 40 * (y - 0.86) / 0.14 + 40 * grain
    picture = np.where(y < 0.86, wall, floor).clip(0, 255).astype(np.uint8)
    for x in (0.05, 0.95):  # the track on two stands
        fill(picture, rectangle(x - 0.012, 0.54, x + 0.012, 0.92), (120, 128, 138))
    fill(picture, rectangle(0.02, 0.535, 0.98, 0.56), (110, 118, 128), radius=0.005)
    return picture


# MountainCar's picture is wider than its world, so that the goal is a peak with a far side and not the picture's edge.
LEFT, BOTTOM, METRES, STEEPEN = -1.4, -0.3, 2.3, 1.15  # its corner, its width, and how much heights are stretched


def on_track(x):
    """Point (..., 2) of the picture where the track is at x metres: Gymnasium's hill, 0.45 sin(3x) + 0.55 high."""
    return np.stack([(x - LEFT) / METRES, 1 - (0.45 * np.sin(3 * x) + 0.55 - BOTTOM) * STEEPEN / METRES], -1)


@functools.lru_cache
def mountain_backdrop(size, textured):
    """Everything that does not move, (size, size, 3) uint8."""
    fine = 4 * size  # drawn at four times the size and averaged
    y, x = (np.arange(fine)[:, None] + 0.5) / fine, LEFT + (np.arange(fine) + 0.5) / fine * METRES
    slope = STEEPEN * 1.35 * np.cos(3 * x)
    depth = (y - on_track(x)[:, 1]) / np.sqrt(1 + slope**2)  # (fine, fine), roughly the distance below the ground
    blend = lambda below, share, above: below + share[..., None] * (above - below)
    shade = lambda color, light: np.array(color) * light[..., None]
    if textured:
        rng = np.random.default_rng(4)
        clouds, rock = (noise_texture(rng, fine, cells, 0.7) for cells in ((3, 6, 12, 24), (6, 12, 24, 48, 96, 192)))
        picture = blend(np.array([96, 158, 222]), y**0.8 + 0 * x, np.array([214, 232, 244]))  # sky
        picture = blend(picture, np.clip((clouds - 0.5) / 0.2, 0, 0.85), 255)
        light = (np.gradient(rock, axis=1) - 0.6 * np.gradient(rock, axis=0)) * fine  # the sun stands upper left
        height = BOTTOM + (1 - y) * METRES / STEEPEN + 0.5 * (rock - 0.5)  # metres, blurred by the rock
        turf, snow = np.clip((0.05 + rock - height) / 0.1, 0, 1) * (depth < 0.03 * rock), (height - 0.8) / 0.05
        ground = shade((128, 112, 98), 0.66 + 0.55 * rock + light / 24) - 40 * depth[..., None].clip(0, 0.5)
        ground = blend(ground, turf, shade((96, 140, 66), 0.7 + 0.6 * rock))
        ground = blend(ground, snow.clip(0, 1), shade((240, 245, 252), 0.82 + 0.22 * rock + light / 40))
        picture = blend(picture, depth > 0, ground)
    else:  # as Gymnasium: a black line on white
        picture = shade((255, 255, 255), abs(depth) >= 0.004)
    picture = picture.clip(0, 255).reshape(size, 4, size, 4, 3).mean((1, 3)).astype(np.uint8)
    tall, wide, thick, pole, cloth = (0.235, 0.12, 0.007, (70, 60, 54), (252, 214, 20)) if textured else \
        (0.125, 0.05, 0.003, (0, 0, 0), (204, 204, 0))  # fmt: skip
    foot = on_track(MountainCar.GOAL)
    top = foot - [0, tall]
    fill(picture, rectangle(foot[0] - thick, top[1], foot[0] + thick, foot[1]), pole)
    fill(picture, [top, top + [0, 0.77 * wide], top + [wide, 0.385 * wide]], cloth)
    return picture


# ENVIRONMENT: physics of Gymnasium's CartPole-v1 and MountainCarContinuous-v0, N episodes side by side, no termination
class CartPole:
    """state (N, 4): x, its velocity, angle (0 up, > 0 right), its velocity. Actions (N,): 0 pushes left, 1 right."""

    PROMPT, BASELINE = "pole vertically upright on top of the cart", "pole and cart"
    X_CLAMP = 3.0  # metres; wider than the goal's 2.4, so that a cart that left the goal is seen to have left
    OBS_SCALE = np.array([2.4, 2.0, 1.0, 1.0, 2.5])
    LOW, HIGH = np.array([-X_CLAMP, 0, -np.pi, 0]), np.array([X_CLAMP, 0, np.pi, 0])  # of the pictures
    AXIS, AXIS_UNIT, AXIS_LABEL = 2, 180 / np.pi, "pole angle in degrees, 0 is up"  # of the landscape
    num_actions = 2

    def reset(self, seeds):
        self.state = np.stack([np.random.default_rng(seed).uniform(-0.05, 0.05, 4) for seed in seeds])

    def step(self, actions):
        x, x_dot, theta, theta_dot = self.state.T
        force, cos, sin = np.where(actions == 1, 10.0, -10.0), np.cos(theta), np.sin(theta)
        # cart 1 kg, pole 0.1 kg, half its length 0.5 m, g 9.8, Euler steps of 20 ms
        push = (force + 0.05 * theta_dot**2 * sin) / 1.1
        theta_acc = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        x_acc = push - 0.05 * theta_acc * cos / 1.1
        x, x_dot = x + 0.02 * x_dot, x_dot + 0.02 * x_acc
        theta, theta_dot = theta + 0.02 * theta_dot, theta_dot + 0.02 * theta_acc
        x_dot = np.where((abs(x) >= self.X_CLAMP) & (x * x_dot > 0), 0.0, x_dot)  # the stop at the end of the track
        theta = (theta + np.pi) % (2 * np.pi) - np.pi
        self.state = np.stack([x.clip(-self.X_CLAMP, self.X_CLAMP), x_dot, theta, theta_dot], 1)

    def observe(self):
        x, x_dot, theta, theta_dot = self.state.T  # cosine and sine do not jump where the angle wraps
        return (np.stack([x, x_dot, np.cos(theta), np.sin(theta), theta_dot], 1) / self.OBS_SCALE).astype(np.float32)

    def in_goal(self, state):
        """Ground truth (...) bool of states (..., 4), for reports and for --reward ground-truth."""
        return (abs(state[..., 2]) <= np.radians(12)) & (abs(state[..., 0]) <= 2.4)

    def success(self, in_goal):  # which episodes (E,) succeeded, of in_goal (E, T)
        return in_goal.all(1)

    def true_reward(self, state, actions):
        return np.where(self.in_goal(state), 1.0, -1.0)

    def draw(self, state, size, textured=True):
        """Frame (size, size, 3) uint8. Cart and pole are drawn larger than the track, or both would be tiny."""
        picture, center, theta = cartpole_backdrop(size).copy(), 0.5 + 0.135 * state[0], state[2]
        for wheel in (center - 0.05, center + 0.05):
            fill(picture, [(wheel, 0.52)], (44, 48, 56), radius=0.021)
        fill(picture, rectangle(center - 0.072, 0.435, center + 0.072, 0.5), (52, 92, 158), radius=0.012)
        axes = np.array([[np.sin(theta), -np.cos(theta)], [np.cos(theta), np.sin(theta)]])  # along the pole and across
        fill(picture, (center, 0.44) + rectangle(0, -0.014, 0.33, 0.014) @ axes, (196, 102, 40), radius=0.006)
        fill(picture, [(center, 0.44)], (236, 196, 88), radius=0.017)
        return picture


class MountainCar:
    """state (N, 2): x, velocity. Actions (N,) in [-1, 1]: the force to the right."""

    PROMPT, BASELINE = "a car at the peak of the mountain, next to the yellow flag", "a car in the mountain"
    LEFT_WALL, GOAL, RIGHT_WALL = -1.2, 0.45, 0.6  # metres
    OBS_SCALE = np.array([0.9, 0.07])
    LOW, HIGH = np.array([LEFT_WALL, 0]), np.array([RIGHT_WALL, 0])
    AXIS, AXIS_UNIT, AXIS_LABEL = 0, 1, "position of the car in metres"
    num_actions = 0  # continuous

    def reset(self, seeds):
        self.state = np.stack([[np.random.default_rng(seed).uniform(-0.6, -0.4), 0.0] for seed in seeds])

    def step(self, actions):
        x, v = self.state.T
        arrived = x >= self.GOAL
        v = (v + 0.0015 * actions.clip(-1, 1) - 0.0025 * np.cos(3 * x)).clip(-0.07, 0.07)
        v = np.where(arrived, 0.0, v)  # the goal is absorbing: the car stays where it arrived
        x = (x + v).clip(self.LEFT_WALL, self.RIGHT_WALL)
        v = np.where((x == self.LEFT_WALL) & (v < 0), 0.0, v)
        self.state = np.stack([x, v], 1)

    def observe(self):
        return ((self.state + [0.3, 0]) / self.OBS_SCALE).astype(np.float32)

    def in_goal(self, state):
        return state[..., 0] >= self.GOAL

    def success(self, in_goal):
        return in_goal.any(1)

    def true_reward(self, state, actions):
        return self.in_goal(state) - 0.1 * actions.clip(-1, 1) ** 2

    def draw(self, state, size, textured=True):
        """Frame (size, size, 3) uint8 of a car that is tilted with the slope."""
        picture, x = mountain_backdrop(size, textured).copy(), state[0]
        tilt = np.arctan(STEEPEN * 1.35 * np.cos(3 * x))
        axes = np.array([[np.cos(tilt), -np.sin(tilt)], [-np.sin(tilt), -np.cos(tilt)]])  # the car's forward and up
        part = lambda points, color, radius=0.0: fill(picture, on_track(x) + points @ axes, color, radius)
        if textured:
            red = (206, 34, 40)
            part([(-0.052, 0.058), (0.03, 0.058), (0.008, 0.098), (-0.036, 0.098)], red, radius=0.006)  # cabin
            body = [(-0.078, 0.03), (0.082, 0.03), (0.084, 0.05), (0.04, 0.062), (-0.076, 0.062)]
            part(body, red, radius=0.008)
            part([(-0.036, 0.064), (0.018, 0.064), (0.003, 0.092), (-0.028, 0.092)], (196, 226, 246))  # window
            wheels, radius, tyre = ([(-0.046, 0.025)], [(0.05, 0.025)]), 0.026, (28, 28, 32)
        else:
            part(rectangle(-0.033, 0.015, 0.033, 0.055), (0, 0, 0))
            wheels, radius, tyre = ([(-0.017, 0.018)], [(0.017, 0.018)]), 0.018, (128, 128, 128)
        for wheel in wheels:
            part(wheel, tyre, radius)
        return picture


SCENES = {"CartPole-v1": CartPole, "MountainCarContinuous-v0": MountainCar}


# REWARD
def local_folder(clip_model):
    """Folder of `local-dir:FOLDER`; looked for beside this script too, so that tiny_clip is found from anywhere."""
    folder = Path(clip_model.removeprefix("local-dir:")).expanduser()
    return HERE / folder if not folder.is_dir() and (HERE / folder).is_dir() else folder


def load_clip(clip_model, device, precision):
    """Model, preprocessing and tokenizer of any model that open_clip can load, always with its trained weights.

    `clip_model`: NAME/TAG, NAME/FILE, hf-hub:ORG/REPO or local-dir:FOLDER. Ends the program with one line if the model
    can't be loaded just as it was trained.
    """
    where, name, pretrained, preprocess_cfg = f"--clip-model {clip_model}:", clip_model, None, {}
    if clip_model.startswith("local-dir:"):
        folder = local_folder(clip_model)
        check((folder / "open_clip_config.json").is_file(), f"{where} there is no open_clip_config.json in {folder}")
        name = f"local-dir:{folder}"
    elif not clip_model.startswith("hf-hub:"):
        name, _, pretrained = clip_model.partition("/")
        check(name in open_clip.list_models(), f"{where} open_clip knows no model '{name}'; give NAME/TAG, NAME/FILE, "
              "hf-hub:ORG/REPO or local-dir:FOLDER; open_clip.list_pretrained() lists all NAME and TAG")  # fmt: skip
        tags = open_clip.list_pretrained_tags_by_model(name)
        check(pretrained in tags or Path(pretrained).is_file(), f"{where} '{pretrained}' is neither a file nor one of "
              f"the weights published for {name}: {', '.join(tags) or 'none'}")  # fmt: skip
        if pretrained in tags:
            quick_gelu = open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
            other = name.removesuffix("-quickgelu") + ("-quickgelu" if quick_gelu else "")
            check(quick_gelu == open_clip.get_model_config(name).get("quick_gelu", False),
                  f"{where} these weights were trained with another activation; use {other}/{pretrained}")  # fmt: skip
        elif tags:  # a file does not say how its pictures were normalised: ask the published weights
            keys = ("mean", "std", "interpolation", "resize_mode")
            ways = [{key: open_clip.get_pretrained_cfg(name, tag).get(key) for key in keys} for tag in tags]
            check(all(way == ways[0] for way in ways), f"{where} published weights of {name} normalise pictures in "
                  "different ways; put the file beside an open_clip_config.json and use local-dir:")  # fmt: skip
            preprocess_cfg = {key: value for key, value in ways[0].items() if value is not None}
    try:
        tokenizer = open_clip.get_tokenizer(name)
        model = open_clip.create_model(name, pretrained, precision=precision, device=device, require_pretrained=True,
                                       force_preprocess_cfg=preprocess_cfg)  # fmt: skip
    except ImportError as error:
        raise SystemExit(f"error: {where} needs a package: pip install transformers sentencepiece ({error})")
    except Exception as error:  # a broken or foreign file, a failed download: each library raises its own
        raise SystemExit(f"error: {where} can't be loaded: {(str(error).strip() or repr(error)).splitlines()[0][:300]}")
    preprocess_cfg = open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    preprocess = open_clip.transform.image_transform_v2(preprocess_cfg, is_train=False)
    return model.eval().requires_grad_(False), preprocess, tokenizer


def warn_about_prompts(clip_model, tokenizer, prompts):
    """Say which words of a prompt the model cuts off, or never saw in training (models that ship a vocabulary.txt)."""
    vocabulary = local_folder(clip_model) / "vocabulary.txt"
    known = set(vocabulary.read_text().split()) if vocabulary.is_file() else None
    for prompt in prompts:
        words, reads = prompt.split(), tokenizer.context_length
        tokens = [tokenizer([" ".join(words[: n + 1])], context_length=512)[0] for n in range(len(words))]
        cut = [word for word, t in zip(words, tokens) if (t != tokenizer([""])[0, -1]).sum() > reads]
        if cut:
            print(f'warning: the model reads {reads} tokens; of "{prompt}" it does not see "{" ".join(cut)}"')
        unknown = [word for word in prompt.lower().replace(",", " ").split() if known and word not in known]
        if unknown:
            print(f"warning: {clip_model} never saw the words {', '.join(unknown)}, and is no zero-shot model")


class CLIPReward(nn.Module):
    """Goal-baseline regularised CLIP reward (section 3.2 of the paper).

    With the L2-normalised embeddings g of the goal, b of the baseline and s of the frame, and d = g - b:
        P = alpha d d^T / |d|^2 + (1 - alpha) I            projects a share alpha onto the line through b and g
        R(s) = 1 - |P (s - g)|^2 / 2                       = cos(g, s) for alpha = 0

    Several prompts are averaged after normalisation, the mean is not normalised again.
    """

    def __init__(self, clip_model, goal_prompts, baseline_prompts=("a humanoid robot",), alpha=0.0, device="cpu",
                 precision="fp32", batch_size=400):  # fmt: skip
        super().__init__()
        self.clip, self.preprocess, self.tokenizer = load_clip(clip_model, device, precision)
        warn_about_prompts(clip_model, self.tokenizer, [*goal_prompts, *(baseline_prompts if alpha > 0 else ())])
        self.alpha, self.device, self.batch_size = alpha, device, batch_size
        self.dtype = open_clip.get_input_dtype(precision) or torch.float32
        self.image_size = np.ravel(self.clip.visual.image_size)[0].item()  # an int or a pair, depending on the model
        self.register_buffer("goal", self.embed_prompts(goal_prompts))  # (D,)
        self.register_buffer("baseline", self.embed_prompts(baseline_prompts))  # (D,)
        d = self.goal - self.baseline
        check(alpha == 0 or d.norm() > 1e-6, "goal and baseline prompt mean the same to this model, so there is no "
              "direction to project on; change one of them or use --clip-alpha 0")  # fmt: skip
        self.register_buffer("direction", d / d.norm().clamp(min=1e-12))  # (D,)
        for name, _ in [*self.clip.named_children(), *self.clip.named_parameters(recurse=False)]:
            if name != "visual":  # the prompts are embedded, so the text tower has done its work
                delattr(self.clip, name)

    @torch.inference_mode()
    def embed_prompts(self, prompts):
        """Mean of the normalised embeddings of several prompts, (D,) fp32."""
        tokens = self.tokenizer(list(prompts)).to(self.device)
        return F.normalize(self.clip.encode_text(tokens).float(), dim=-1).mean(0)

    @torch.inference_mode()
    def embed_images(self, frames):
        """Frames (N, H, W, 3) uint8 of any height and width to normalised embeddings (N, D) fp32."""
        embeddings = []
        for batch in torch.as_tensor(frames).split(self.batch_size):
            images = batch.to(self.device).permute(0, 3, 1, 2).float() / 255  # (n, 3, H, W), channels last in memory
            images = self.preprocess(images).to(self.dtype)
            embeddings.append(F.normalize(self.clip.encode_image(images).float(), dim=-1))
        return torch.cat(embeddings)

    def forward(self, embeddings):
        """Rewards (N,) of normalised embeddings (N, D)."""
        difference = embeddings - self.goal
        along = (difference @ self.direction)[:, None] * self.direction
        projected = self.alpha * along + (1 - self.alpha) * difference  # P (s - g)
        return 1 - 0.5 * projected.square().sum(-1)


# ALGO LOGIC: network and advantages
def layer_init(layer, std=2**0.5):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Policy and value. `num_actions` discrete actions, or, if it is 0, a continuous one. Actions have shape (B,)."""

    def __init__(self, obs_dim, num_actions, init_std):
        super().__init__()
        body = lambda: [layer_init(nn.Linear(obs_dim, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh()]
        self.critic = nn.Sequential(*body(), layer_init(nn.Linear(64, 1), std=1.0), nn.Flatten(-2))
        self.actor = nn.Sequential(*body(), layer_init(nn.Linear(64, num_actions or 1), std=0.01))
        self.actor_logstd = None if num_actions else nn.Parameter(torch.tensor([init_std]).log())

    def distribution(self, obs):
        if self.actor_logstd is None:
            return Categorical(logits=self.actor(obs), validate_args=False)
        return Normal(self.actor(obs).squeeze(-1), self.actor_logstd.exp(), validate_args=False)


def gae(rewards, values, gamma, gae_lambda):
    """Advantages (T, N) of rewards (T, N) and values (T + 1, N).

    No episode terminates. The time limit truncates it, so the last value stands in for the rewards that were cut off.
    """
    deltas = rewards + gamma * values[1:] - values[:-1]
    advantages, last = torch.zeros_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = last = deltas[t] + gamma * gae_lambda * last
    return advantages


def atomic_save(state, path):
    """Write aside, flush to disk, rename: a file of that name is always whole."""
    aside = path.with_suffix(".tmp")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's, when the disk is full
        aside.unlink(missing_ok=True)
        raise SystemExit(f"error: can't write {path}, is the disk full? ({error}). What was saved before is whole; "
                         "make room, then --resume")  # fmt: skip


def load_saved(path, keys, advice):
    """What atomic_save wrote. A damaged or foreign file ends the program with its name; code in it is never run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in keys}
    except Exception:  # truncated, not a zip file, a pickle with code in it: each raises its own
        raise SystemExit(f"error: {path} is damaged or no file of this script; {advice}")


# EVALUATION
@torch.inference_mode()
def rollout(scene, policy, seeds, action_repeat):
    """One whole episode for every seed, side by side. `policy`: obs (N, O) tensor -> actions (N,) tensor.

    Returns obs (T / repeat + 1, N, O), actions (T / repeat, N), both as tensors, and states (T, N, S) after every step.
    """
    scene.reset(seeds)
    obs, actions, states = [scene.observe()], [], []
    for t in range(EPISODE_LENGTH):
        if t % action_repeat == 0:
            actions.append(policy(torch.as_tensor(obs[-1])).cpu())
        scene.step(actions[-1].numpy())
        states.append(scene.state)
        if (t + 1) % action_repeat == 0:
            obs.append(scene.observe())
    return torch.as_tensor(np.stack(obs)), torch.stack(actions), np.stack(states)


def evaluate(scene, policy, score, episodes, seed, action_repeat):
    """Arrays with leading axis (E,): returns, success, in_goal (E, T) bool and states (E, T, S)."""
    _, actions, states = rollout(scene, policy, range(seed, seed + episodes), action_repeat)
    in_goal = scene.in_goal(states).T
    result = {"returns": score(states, actions).sum(0), "success": scene.success(in_goal), "in_goal": in_goal}
    return result | {"states": states.swapaxes(0, 1)}


def draw(scene, result, textured, video, sheet, rows=2, columns=3, size=240):
    """Video of the first episodes, contact sheet with one episode per row; edged in green while in the goal state."""
    frames = np.zeros((rows * columns, EPISODE_LENGTH, size, size, 3), dtype=np.uint8)
    for episode, t in np.ndindex(min(len(frames), len(result["states"])), EPISODE_LENGTH):
        frames[episode, t] = frame = scene.draw(result["states"][episode, t], size, textured)
        if result["in_goal"][episode, t]:
            frames[episode, t] = (40, 200, 80)
            frames[episode, t, 4:-4, 4:-4] = frame[4:-4, 4:-4]
    tiles = frames.reshape(rows, columns, EPISODE_LENGTH, size, size, 3).transpose(2, 0, 3, 1, 4, 5)
    iio.imwrite(video, tiles.reshape(EPISODE_LENGTH, rows * size, columns * size, 3), fps=50, macro_block_size=1)
    small = frames[:, 19::20, ::2, ::2].swapaxes(1, 2)  # every 20th step: (episodes, size / 2, 10, size / 2, 3)
    iio.imwrite(sheet, small.reshape(len(frames) * size // 2, -1, 3))


def final_evaluation(args, run_dir, scene, score, agent):
    """Success and return of the best policy, of doing nothing and of random actions; json, video, contact sheet."""
    check((run_dir / "best.pt").is_file(), f"{run_dir} has no best.pt: it has not reached its first evaluation")
    best = load_saved(run_dir / "best.pt", ("agent", "global_step"), "a --resume may write it anew")
    agent.load_state_dict(best["agent"])
    n = args.eval_episodes
    policies = {
        "greedy action": lambda obs: agent.distribution(obs.to(args.device)).mode,
        "zero action": lambda obs: torch.zeros(len(obs)),  # CartPole can't do nothing: action 0 pushes to the left
        "random action": lambda obs: torch.randint(2, (n,)) if scene.num_actions else torch.rand(n) * 2 - 1,
    }
    summary = {"prompt": args.prompt, "env_id": args.env_id, "episodes": n, "step": best["global_step"]}
    print(f"{n} episodes of the policy of step {best['global_step']}")
    for name, policy in policies.items():
        torch.manual_seed(0)
        result = evaluate(scene, policy, score, n, 1_000_000, args.action_repeat)
        row = {"return": result["returns"], "success_rate": result["success"], "share_in_goal": result["in_goal"]}
        summary[name] = row = {key: float(values.mean()) for key, values in row.items()}
        print(f"{name:15}", "  ".join(f"{key} {value:.2f}" for key, value in row.items()))
        if name == "greedy action":
            draw(scene, result, args.drawing == "textured", run_dir / "eval.mp4", run_dir / "eval.png")
    (run_dir / "eval.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"wrote {run_dir}/eval.json, eval.mp4 and eval.png")
    return summary


def landscape(args, run_dir, scene, clip_reward, embed):
    """Reward against angle or position, a curve per alpha (Fig. 2 of the paper), and EPIC distance over uniform states.

    Returns the figure, the distances, and mean and deviation of the run's own reward over the uniform states.
    """
    line = np.zeros((361, len(scene.LOW)))
    line[:, scene.AXIS] = np.linspace(scene.LOW[scene.AXIS], scene.HIGH[scene.AXIS], len(line))
    states = np.random.default_rng(0).uniform(scene.LOW, scene.HIGH, (2000, len(scene.LOW)))
    if clip_reward is None:
        own, curves = "ground truth", {"ground truth": [scene.true_reward(s, np.zeros(len(s))) for s in (line, states)]}
    else:
        own, curves, embeddings = f"alpha {args.clip_alpha:g}", {}, [embed(s) for s in (line, states)]
        for alpha in sorted({0.0, 0.25, 0.5, 0.75, 1.0, args.clip_alpha}):
            clip_reward.alpha = alpha
            curves[f"alpha {alpha:g}"] = [clip_reward(e).cpu().numpy() for e in embeddings]
        clip_reward.alpha = args.clip_alpha
    figure = Figure(figsize=(6, 3.6), layout="tight")
    axes = figure.add_subplot(xlabel=scene.AXIS_LABEL, ylabel="reward, rescaled to [0, 1]")
    axes.set_title(f"{args.env_id}, {args.clip_model}")
    x, goal, epic = line[:, scene.AXIS] * scene.AXIS_UNIT, scene.in_goal(line), {}
    axes.axvspan(x[goal].min(), x[goal].max(), color="tab:green", alpha=0.2, label="goal")
    for name, (on_line, on_states) in curves.items():
        rho = np.corrcoef(on_states, scene.in_goal(states))[0, 1]
        epic[name] = float(np.sqrt(max(0, 1 - rho) / 2))
        print(f"{name:12}  EPIC distance {epic[name]:.3f}")
        rescaled = (on_line - on_line.min()) / np.ptp(on_line).clip(1e-9)
        axes.plot(x, rescaled, linewidth=1.2, label=f"{name}, EPIC {epic[name]:.2f}")
    axes.legend(fontsize=7)
    figure.savefig(run_dir / "landscape.png", dpi=120)
    print(f"wrote {run_dir}/landscape.png")
    return figure, epic, float(curves[own][1].mean()), float(curves[own][1].std())


def parse_args(argv):
    """Flags from the command line: the scene's defaults, or those of the run to resume or evaluate."""
    args = tyro.cli(Args, args=argv)
    check(not (args.resume and args.evaluate), "give either --resume or --evaluate")
    run_dir, default = Path(args.resume or args.evaluate), DEFAULTS[args.env_id]
    if args.resume or args.evaluate:
        try:
            saved = json.loads((run_dir / "args.json").read_text())["args"]
        except (OSError, ValueError, KeyError):
            raise SystemExit(f"error: {run_dir} is not a run folder: it has no args.json that can be read")
        check(saved.keys() == asdict(args).keys(), f"{run_dir} is no run of this script, or of another version of it")
        default = Args(**{key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    args = tyro.cli(Args, default=default, args=argv)
    if args.resume:
        free = {"resume", "device", "total_timesteps", "track", "eval_episodes"}
        changed = [key for key, value in asdict(args).items() if value != getattr(default, key) and key not in free]
        check(not changed, f"--resume goes on with the run's own flags; changed: {', '.join(changed)}")
        check(args.total_timesteps >= default.total_timesteps, "--total-timesteps can only be raised")
        check(not args.landscape_only, f"{run_dir} holds a landscape only, no training to go on with")
    args.prompt = args.prompt or (SCENES[args.env_id].PROMPT,)
    args.baseline_prompt = args.baseline_prompt or (SCENES[args.env_id].BASELINE,)
    check(all(prompt.strip() for prompt in args.prompt + args.baseline_prompt), "a prompt is empty")
    check(0 <= args.clip_alpha <= 1, f"--clip-alpha {args.clip_alpha} is not between 0 and 1")
    for key, value in asdict(args).items():
        number = type(value) in (int, float) and key not in ("seed", "image_size", "clip_alpha", "ent_coef", "vf_coef")
        check(not number or 0 < value < float("inf"), f"--{key.replace('_', '-')} must be positive")
    check(args.seed >= 0, "--seed can't be negative")
    check(args.drawing == "textured" or "Mountain" in args.env_id, "--drawing original: CartPole has one drawing only")
    check(args.gamma < 1 and args.gae_lambda <= 1, "--gamma must be below 1, --gae-lambda at most 1")
    check(args.image_size == 0 or args.image_size >= 16, "--image-size must be at least 16, or 0 for the VLM's own")
    check(EPISODE_LENGTH % args.action_repeat == 0, f"--action-repeat must divide an episode's {EPISODE_LENGTH} steps")
    batch_size = args.num_envs * EPISODE_LENGTH // args.action_repeat
    check(2 * args.num_minibatches <= batch_size, f"--num-minibatches must leave 2 of {batch_size} actions for each")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    args.device = next(device for device in there if there[device]) if args.device == "auto" else args.device
    check(there[args.device], f"--device {args.device}: PyTorch sees no such GPU; use --device cpu")
    check(args.clip_precision == "fp32" or args.device != "cpu", f"--clip-precision {args.clip_precision} needs a GPU")
    return args


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    run_dir = Path(args.resume or args.evaluate)
    if not (args.resume or args.evaluate):
        args.run_name = args.run_name or f"{args.env_id}__ppo_vlmrm_classic__{args.seed}__{int(time.time())}"
        run_dir = Path("runs") / args.run_name
        check(not run_dir.exists(), f"{run_dir} exists; choose another --run-name, or --resume {run_dir}")
        parent = next(folder for folder in run_dir.absolute().parents if folder.exists())
        check(parent.is_dir() and os.access(parent, os.W_OK), f"{parent} is not writable: no run folder {run_dir}")
    torch.manual_seed(args.seed)

    # reward model and env setup
    scene, clip_reward = SCENES[args.env_id](), None
    if args.reward == "vlm":
        clip_reward = CLIPReward(args.clip_model, args.prompt, args.baseline_prompt, args.clip_alpha, args.device,
                                 args.clip_precision, args.reward_batch_size)  # fmt: skip

    def embed(states):
        """Embeddings (M, D) of states (M, S), drawn in batches when their turn comes."""
        size, textured = args.image_size or clip_reward.image_size, args.drawing == "textured"
        batches = np.split(states, range(args.reward_batch_size, len(states), args.reward_batch_size))
        frames = (np.stack([scene.draw(state, size, textured) for state in batch]) for batch in batches)
        return torch.cat([clip_reward.embed_images(batch) for batch in frames])

    def score(states, actions):
        """Rewards (T / repeat, N) of states (T, N, S) and actions (T / repeat, N), for what each action led to."""
        states = states[args.action_repeat - 1 :: args.action_repeat]
        if clip_reward is None:
            return scene.true_reward(states, actions.numpy())
        return clip_reward(embed(states.reshape(actions.numel(), -1))).cpu().numpy().reshape(actions.shape)

    agent = Agent(len(scene.OBS_SCALE), scene.num_actions, args.init_std).to(args.device)
    if args.evaluate:
        return final_evaluation(args, run_dir, scene, score, agent)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    state = {"global_step": 0, "best_return": -float("inf"), "reward_mean": 0.0, "reward_std": 1.0}

    # checkpoints: written where all episodes end, so that nothing of the environments needs saving
    def save_checkpoint():
        writer.flush()
        checkpoint = {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "state": state,
                      "torch_rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}  # fmt: skip
        atomic_save(checkpoint, run_dir / f"checkpoint_{state['global_step']:09d}.pt")
        for old in sorted(run_dir.glob("checkpoint_*.pt"))[:-2]:
            old.unlink()

    if args.resume:
        checkpoints = sorted(run_dir.glob("checkpoint_*.pt"))
        check(checkpoints, f"{run_dir} has no checkpoint to resume from")
        before = f"remove it to go on from {checkpoints[-2].name}" if checkpoints[1:] else "there is none before it"
        checkpoint = load_saved(checkpoints[-1], ("agent", "optimizer", "state", "torch_rng", "cuda_rng"), before)
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        state = checkpoint["state"]
        torch.set_rng_state(checkpoint["torch_rng"])
        torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])
    else:
        run_dir.mkdir(parents=True)
        packages = {name: version(name) for name in ("torch", "open_clip_torch", "numpy")}
        saved = {"args": asdict(args), "packages": packages | {"python": platform.python_version()}}
        (run_dir / "args.json").write_text(json.dumps(saved, indent=2) + "\n")
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project_name, name=args.run_name, config=asdict(args), sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=state["global_step"] + 1 if args.resume else None)
    if not args.resume:
        table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        figure, epic, reward_mean, reward_std = landscape(args, run_dir, scene, clip_reward, embed)
        (run_dir / "epic.json").write_text(json.dumps(epic, indent=2) + "\n")
        writer.add_figure("landscape", figure)
        if args.standardize and args.reward == "vlm":
            state |= {"reward_mean": reward_mean, "reward_std": max(reward_std, 1e-6)}
        save_checkpoint()
    if args.landscape_only:
        writer.close()
        return epic

    # ALGO LOGIC: training
    def update(obs, actions, old_log_prob, advantages, returns):
        distribution = agent.distribution(obs)
        log_ratio = distribution.log_prob(actions) - old_log_prob
        ratio = log_ratio.exp()
        if args.norm_adv:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        pg_loss = -torch.min(advantages * ratio, advantages * clipped).mean()
        v_loss = 0.5 * F.mse_loss(agent.critic(obs), returns)
        entropy = distribution.entropy().mean()
        optimizer.zero_grad()
        (pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss).backward()
        nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
        optimizer.step()
        approx_kl, clipfrac = (ratio - 1 - log_ratio).mean(), (ratio != clipped).float().mean()
        return {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy, "approx_kl": approx_kl,
                "clipfrac": clipfrac}  # fmt: skip

    stopping = []

    def on_signal(signum, _):
        stopping.append(signum)
        tqdm.write(f"{signal.Signals(signum).name}: stopping after this iteration; once more to stop at once")
        signal.signal(signum, signal.SIG_DFL)

    handlers = {signum: signal.signal(signum, on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
    before = f"what was saved before is whole: --resume {run_dir}"
    with tqdm(total=args.total_timesteps, initial=state["global_step"], unit="step", dynamic_ncols=True) as progress:
        while state["global_step"] < args.total_timesteps and not stopping:
            remaining = 1 - state["global_step"] / args.total_timesteps if args.anneal_lr else 1
            optimizer.param_groups[0]["lr"] = learning_rate = remaining * args.learning_rate

            # collect: a whole episode in every environment
            times = [time.perf_counter()]
            seeds = [args.seed * 10**9 + state["global_step"] + i for i in range(args.num_envs)]
            policy = lambda obs: agent.distribution(obs.to(args.device)).sample()
            obs, actions, states = rollout(scene, policy, seeds, args.action_repeat)
            times.append(time.perf_counter())

            # score: the VLM sees the pictures, the actions get their rewards
            rewards = score(states, actions)  # (T / repeat, N)
            check(np.isfinite(rewards).all(), f"a reward is not finite after step {state['global_step']}; {before}")
            state["global_step"] = global_step = state["global_step"] + args.num_envs * EPISODE_LENGTH
            times.append(time.perf_counter())

            # learn. Times 1 - gamma, a return is an average of rewards: of order 1 for the critic, whatever gamma is
            scaled = (rewards - state["reward_mean"]) / state["reward_std"] * (1 - args.gamma)
            obs, actions, scaled = (torch.as_tensor(x).float().to(args.device) for x in (obs, actions, scaled))
            with torch.no_grad():
                values = agent.critic(obs)  # (T / repeat + 1, N)
                advantages = gae(scaled, values, args.gamma, args.gae_lambda)
                log_prob = agent.distribution(obs[:-1]).log_prob(actions)
            batch = [x.flatten(0, 1) for x in (obs[:-1], actions, log_prob, advantages, advantages + values[:-1])]
            for _ in range(args.update_epochs):
                for rows in torch.randperm(actions.numel()).chunk(args.num_minibatches):
                    metrics = update(*(x[rows] for x in batch))
            finite = all(tensor.isfinite().all() for tensor in [*metrics.values(), *agent.parameters()])
            check(finite, f"a loss or a weight is not finite at step {global_step}; {before}")
            times.append(time.perf_counter())

            # log
            in_goal, mean_return = scene.in_goal(states).T, float(rewards.sum(0).mean())
            success = float(scene.success(in_goal).mean())
            scalars = {f"losses/{key}": value.item() for key, value in metrics.items()}
            scalars |= {f"time/{stage}": t for stage, t in zip(("collect", "score", "learn"), np.diff(times))}
            scalars |= {"charts/SPS": in_goal.size / (times[-1] - times[0]), "charts/learning_rate": learning_rate}
            scalars |= {"charts/vlm_return" if args.reward == "vlm" else "charts/episodic_return": mean_return}
            scalars |= {"charts/success_rate": success, "charts/share_in_goal": in_goal.mean()}
            progress.update(in_goal.size)
            progress.set_postfix(reward=f"{mean_return / len(rewards):.3f}", success=f"{success:.0%}")

            # evaluate the greedy action, keep the best policy, save
            due = global_step % args.eval_frequency < in_goal.size or global_step >= args.total_timesteps
            if due:
                policy = lambda obs: agent.distribution(obs.to(args.device)).mode
                result = evaluate(scene, policy, score, args.select_episodes, 2_000_000, args.action_repeat)
                scalars |= {"eval/return": result["returns"].mean(), "eval/success_rate": result["success"].mean()}
                if scalars["eval/return"] > state["best_return"]:
                    state["best_return"] = float(scalars["eval/return"])
                    atomic_save({"agent": agent.state_dict(), "global_step": global_step}, run_dir / "best.pt")
            for key, value in scalars.items():
                writer.add_scalar(key, value, global_step)
            if due or stopping:
                save_checkpoint()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    writer.close()
    if stopping:
        print(f"stopped at step {state['global_step']}; go on with --resume {run_dir}")
        return None
    return final_evaluation(args, run_dir, scene, score, agent)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, most of all
        raise SystemExit(f"error: {error}. What was saved before is whole; make room, then --resume")
