# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch>=2.6", "open_clip_torch>=3.3,<4", "tyro>=0.9", "numpy>=2.0",
#   "tensorboard>=2.18", "tqdm>=4.66", "matplotlib>=3.9", "imageio>=2.36", "imageio-ffmpeg>=0.5"]
# ///
"""CartPole and MountainCar from one sentence: a vision-language model is the reward.

Method: Rocamonde et al., "Vision-Language Models are Zero-Shot Reward Models for Reinforcement
Learning", ICLR 2024. The learner is PPO.

    python ppo_vlmrm_classic.py                                    # CartPole, CPU, offline
    python ppo_vlmrm_classic.py --env-id MountainCarContinuous-v0  # textured, or --drawing original
    python ppo_vlmrm_classic.py --landscape-only                   # reward against the angle
    python ppo_vlmrm_classic.py --reward ground-truth              # the learner without the VLM
    python ppo_vlmrm_classic.py --evaluate runs/RUN_NAME           # success rate, video
    python ppo_vlmrm_classic.py --resume runs/RUN_NAME             # after a crash or Ctrl-C

The default reward model, tiny_clip/, was trained on pictures of these very scenes: it shows the
method at work on a laptop and is no zero-shot model. Any model that open_clip loads can take its
place, e.g. --clip-model ViT-B-32/laion2b_s34b_b79k

A round of the main loop (Algorithm 1 of the paper, PPO in place of SAC) handles whole episodes:
    collect  one episode in each of N environments: obs (T+1, N, O), actions (T, N), states
    draw     what the camera sees after each action: frames (T N, H, W, 3)
    score    CLIP compares the frames with the sentence: rewards (T, N)
    learn    advantages and a few epochs of PPO on these episodes
"""

import functools
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

os.environ["MPLBACKEND"] = "agg"  # only files are written, whatever the shell or notebook exports

import imageio.v3 as iio
import numpy as np
import open_clip
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch.distributions import Categorical, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

EPISODE_LENGTH = 200  # steps; every episode runs to its end (paper, section 4.2)
Prompts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass
class Args:
    # what to learn
    env_id: Literal["CartPole-v1", "MountainCarContinuous-v0"] = "CartPole-v1"  # the scene
    prompt: Prompts = ()  # what the picture should show; the paper's if not given; may be repeated
    baseline_prompt: Prompts = ()  # what any frame shows; the paper's if not given
    clip_alpha: float = 0.0  # goal-baseline regularisation, from 0 (plain CLIP reward) to 1
    clip_model: str = "local-dir:tiny_clip"  # or NAME/TAG, NAME/FILE, hf-hub:ORG/REPO
    clip_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    reward_batch_size: int = 50  # frames per forward pass of the image tower; more on a GPU
    reward: Literal["vlm", "ground-truth"] = "vlm"  # ground-truth: see true_reward of the scenes

    # the picture
    drawing: Literal["textured", "original"] = "textured"  # of MountainCar; original: Gymnasium's
    image_size: int = 0  # pixels; 0: the size the VLM takes

    # the run
    seed: int = 1  # of everything random
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU if there is one
    run_name: str = ""  # folder below runs/; made from scene, seed and time if not given
    landscape_only: bool = False  # stop after the reward landscape and its EPIC distances
    resume: str = ""  # run folder to go on with, with its own flags
    evaluate: str = ""  # run folder whose best policy to evaluate
    eval_episodes: int = 100  # of the final evaluation
    eval_frequency: int = 8000  # steps between checkpoints, each with a short evaluation
    select_episodes: int = 8  # of that short one, by which the best policy is chosen

    # PPO
    total_timesteps: int = 100_000  # of all environments together
    num_envs: int = 8  # episodes collected side by side
    action_repeat: int = 1  # steps for which a chosen action is held; see DEFAULTS
    init_std: float = 1.0  # of the Gaussian policy before training (continuous actions)
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
    standardize: bool = True  # VLM rewards to mean 0, deviation 1 over uniformly drawn states


# MountainCar's engine is too weak to climb: the car must swing to and fro, some 36 steps each way,
# before it ever sees the top, and noise that is new at every step only makes it tremble. So an
# action is held for 20 steps and drawn wide: 1 in 3 such random episodes reaches the top.
SWING = {"action_repeat": 20, "num_envs": 16, "total_timesteps": 400_000, "ent_coef": 0.01}
DEFAULTS = {"CartPole-v1": {}, "MountainCarContinuous-v0": SWING}
# flags that --resume may change
MAY_CHANGE = "resume", "device", "total_timesteps", "eval_episodes", "reward_batch_size"


def check(ok, message):
    """End the program with one clear line if a user's input is not usable."""
    if not ok:
        sys.exit(f"error: {message}")


class Patient:
    """A stream whose reader, a terminal or `| head`, may go away: what is written then is lost."""

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")  # a prompt in letters that it can't show

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


@functools.cache  # shows each message once
def warn(message):
    tqdm.write(f"warning: {message}")


# ENVIRONMENT: what the camera sees
# Drawn at four times the size and averaged, so that no edge is jagged. Points (..., 2) and radii
# are shares of the size; (0, 0) is the picture's upper left corner, (1, 1) its lower right one.
def polygon(picture, points, color):
    ImageDraw.Draw(picture).polygon((picture.width * np.asarray(points)).ravel().tolist(), color)


def disc(picture, center, radius, color):
    box = picture.width * np.array([np.subtract(center, radius), np.add(center, radius)])
    ImageDraw.Draw(picture).ellipse(box.ravel().tolist(), color)


def rectangle(left, top, right, bottom):
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def noise_texture(rng, size, octaves, falloff):
    """Smooth noise in [0, 1], (size, size, 1): random grids from coarse to fine, added up."""
    total = 0.0
    for cells in octaves:
        grid = np.pad(rng.random((cells, cells)), (0, 1), mode="wrap")
        near = (1 - abs(np.arange(size)[:, None] * cells / size - np.arange(cells + 1))).clip(0)
        weights = near**2 * (3 - 2 * near)  # (size, cells + 1), blends the two nearest
        total = total + weights @ grid @ weights.T / cells**falloff
    return total[..., None] / sum(1 / cells**falloff for cells in octaves)


@functools.cache
def cartpole_backdrop(size):
    """What does not move: a wall, a wooden floor, the track on two stands."""
    y = (np.arange(size)[:, None, None] + 0.5) / size
    grain = noise_texture(np.random.default_rng(1), size, (4, 16, 64), 0.5) - 0.5
    wall = [222, 232, 240] - [26, 20, 12] * y + 6 * grain
    floor = [188, 150, 108] - 40 * (y - 0.86) / 0.14 + 40 * grain
    pixels = np.where(y < 0.86, wall, floor).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels.repeat(4, 0).repeat(4, 1))
    for x in (0.05, 0.95):
        polygon(picture, rectangle(x - 0.012, 0.54, x + 0.012, 0.92), (120, 128, 138))
    polygon(picture, rectangle(0.015, 0.53, 0.985, 0.565), (110, 118, 128))
    return picture


# The picture is wider than the world: the goal is a peak with a far side, not the picture's edge.
LEFT, BOTTOM, WIDTH = -1.4, -0.3, 2.3  # metres: the picture's lower left corner, its width
STEEPEN = 1.15  # by how much heights are stretched


def on_track(x):
    """Point (..., 2) of the picture where the track is at x metres: Gymnasium's hill."""
    height = 0.45 * np.sin(3 * x) + 0.55
    return np.stack([(x - LEFT) / WIDTH, 1 - (height - BOTTOM) * STEEPEN / WIDTH], axis=-1)


def slope(x):
    return STEEPEN * 1.35 * np.cos(3 * x)


@functools.cache
def mountain_backdrop(size, textured):
    """What does not move: Gymnasium's black line on white, or rock under a sky; the flag."""
    y = (np.arange(4 * size)[:, None, None] + 0.5) / (4 * size)  # (H, 1, 1)
    x = LEFT + WIDTH * y.swapaxes(0, 1)  # (1, W, 1) metres
    depth = (y - on_track(x)[..., 1]) / np.hypot(1, slope(x))  # below the ground, (H, W, 1)
    pixels = np.where(abs(depth) < 0.004, 0, [255] * 3)
    if textured:
        rng, blend = np.random.default_rng(4), lambda a, b, share: a + share * (b - a)
        clouds = noise_texture(rng, 4 * size, (3, 6, 12, 24), 0.7)
        rock = noise_texture(rng, 4 * size, (6, 12, 24, 48, 96, 192), 0.7)
        light = (np.gradient(rock, axis=1) - 0.6 * np.gradient(rock, axis=0)) * 4 * size
        height = BOTTOM + (1 - y) * WIDTH / STEEPEN + 0.5 * (rock - 0.5)  # metres, blurred
        sky = blend(np.array([96, 158, 222]), np.array([214, 232, 244]), y**0.8)
        sky = blend(sky, 255, ((clouds - 0.5) / 0.2).clip(0, 0.85))
        ground = [128, 112, 98] * (0.66 + 0.55 * rock + light / 24) - 40 * depth.clip(0, 0.5)
        turf = ((0.05 + rock - height) / 0.1).clip(0, 1) * (depth < 0.03 * rock)
        ground = blend(ground, [96, 140, 66] * (0.7 + 0.6 * rock), turf)
        snow = [240, 245, 252] * (0.82 + 0.22 * rock + light / 40)
        ground = blend(ground, snow, ((height - 0.8) / 0.05).clip(0, 1))
        pixels = np.where(depth > 0, ground, sky)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    width, tall, length, pole, cloth = 0.006, 0.125, 0.05, (0, 0, 0), (204, 204, 0)
    if textured:
        width, tall, length, pole, cloth = 0.014, 0.235, 0.12, (70, 60, 54), (252, 214, 20)
    foot = on_track(MountainCar.GOAL)
    flag = foot - [(0, tall), (0, tall - 0.77 * length), (-length, tall - 0.385 * length)]
    polygon(picture, foot + rectangle(-width / 2, -tall, width / 2, 0), pole)
    polygon(picture, flag, cloth)
    return picture


# ENVIRONMENT: physics of Gymnasium's CartPole-v1 and MountainCarContinuous-v0, N episodes side by
# side, none of which terminates: states (N, S), actions (N,), observations (N, O)
class CartPole:
    """State: x, velocity, angle (0 up, > 0 right), its velocity. Action 1 pushes right, 0 left."""

    PROMPT, BASELINE = "pole vertically upright on top of the cart", "pole and cart"
    TRACK_END = 3.0  # metres; beyond the goal's 2.4, to show when the cart has left it
    OBS_SCALE = np.array([2.4, 2.0, 1.0, 1.0, 2.5])
    HIGH = np.array([TRACK_END, 0, np.pi, 0])  # bounds of a landscape, whose line is along AXIS
    LOW, AXIS, AXIS_UNIT, AXIS_LABEL = -HIGH, 2, 180 / np.pi, "pole angle in degrees, 0 is up"
    num_actions = 2

    def reset(self, seeds):
        self.state = np.stack([np.random.default_rng(s).uniform(-0.05, 0.05, 4) for s in seeds])

    def step(self, actions):
        x, x_dot, theta, theta_dot = self.state.T
        force, cos, sin = np.where(actions == 1, 10.0, -10.0), np.cos(theta), np.sin(theta)
        # cart 1 kg, pole 0.1 kg, half its length 0.5 m, g 9.8, Euler steps of 20 ms
        push = (force + 0.05 * theta_dot**2 * sin) / 1.1
        theta_acc = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        x_acc = push - 0.05 * theta_acc * cos / 1.1
        x, x_dot = x + 0.02 * x_dot, x_dot + 0.02 * x_acc
        theta, theta_dot = theta + 0.02 * theta_dot, theta_dot + 0.02 * theta_acc
        stopped = (abs(x) >= self.TRACK_END) & (x * x_dot > 0)
        x, x_dot = x.clip(-self.TRACK_END, self.TRACK_END), np.where(stopped, 0.0, x_dot)
        theta = (theta + np.pi) % (2 * np.pi) - np.pi
        self.state = np.stack([x, x_dot, theta, theta_dot], axis=1)

    def observe(self):
        x, x_dot, theta, theta_dot = self.state.T  # cosine and sine don't jump where theta wraps
        obs = np.stack([x, x_dot, np.cos(theta), np.sin(theta), theta_dot], axis=1)
        return (obs / self.OBS_SCALE).astype(np.float32)

    def in_goal(self, state):
        """Ground truth (...) bool of states (..., 4), for reports and --reward ground-truth."""
        return (abs(state[..., 2]) <= np.radians(12)) & (abs(state[..., 0]) <= 2.4)

    def success(self, in_goal):
        return in_goal.all(1)  # of episodes (E, T)

    def true_reward(self, state, actions):
        return np.where(self.in_goal(state), 1.0, -1.0)

    def draw(self, state, size, textured=True):
        """Frame (size, size, 3) uint8. Cart and pole are larger than the track's scale."""
        picture, center, theta = cartpole_backdrop(size).copy(), 0.5 + 0.135 * state[0], state[2]
        for wheel in (center - 0.05, center + 0.05):
            disc(picture, (wheel, 0.52), 0.021, (44, 48, 56))
        polygon(picture, rectangle(center - 0.084, 0.423, center + 0.084, 0.512), (52, 92, 158))
        axes = [[np.sin(theta), -np.cos(theta)], [np.cos(theta), np.sin(theta)]]  # along, across
        pole = rectangle(-0.006, -0.02, 0.336, 0.02) @ axes
        polygon(picture, (center, 0.44) + pole, (196, 102, 40))
        disc(picture, (center, 0.44), 0.017, (236, 196, 88))
        return np.array(picture.reduce(4))


class MountainCar:
    """State: x, velocity. Action: the force to the right, in [-1, 1]."""

    PROMPT = "a car at the peak of the mountain, next to the yellow flag"
    BASELINE = "a car in the mountain"
    LEFT_WALL, GOAL, RIGHT_WALL = -1.2, 0.45, 0.6  # metres
    OBS_SCALE = np.array([0.9, 0.07])
    LOW, HIGH = np.array([LEFT_WALL, 0]), np.array([RIGHT_WALL, 0])
    AXIS, AXIS_UNIT, AXIS_LABEL = 0, 1, "position of the car in metres"
    num_actions = 0  # continuous

    def reset(self, seeds):
        x = [np.random.default_rng(seed).uniform(-0.6, -0.4) for seed in seeds]
        self.state = np.stack([x, np.zeros(len(x))], axis=1)

    def step(self, actions):
        x, v = self.state.T
        arrived = x >= self.GOAL
        v = (v + 0.0015 * actions.clip(-1, 1) - 0.0025 * np.cos(3 * x)).clip(-0.07, 0.07)
        v = np.where(arrived, 0.0, v)  # the goal is absorbing: the car stays where it arrived
        x = (x + v).clip(self.LEFT_WALL, self.RIGHT_WALL)
        v = np.where((x == self.LEFT_WALL) & (v < 0), 0.0, v)
        self.state = np.stack([x, v], axis=1)

    def observe(self):
        return ((self.state + [0.3, 0]) / self.OBS_SCALE).astype(np.float32)

    def in_goal(self, state):
        return state[..., 0] >= self.GOAL

    def success(self, in_goal):
        return in_goal.any(1)

    def true_reward(self, state, actions):
        return self.in_goal(state) - 0.1 * actions.clip(-1, 1) ** 2

    def draw(self, state, size, textured=True):
        """Frame (size, size, 3) uint8. Car and flag are larger than Gymnasium's."""
        picture, x = mountain_backdrop(size, textured).copy(), state[0]
        tilt = np.arctan(slope(x))
        axes = [[np.cos(tilt), -np.sin(tilt)], [-np.sin(tilt), -np.cos(tilt)]]  # forward, up
        parts = [(rectangle(-0.033, 0.015, 0.033, 0.055), (0, 0, 0))]  # the body
        wheels, radius, tyre = [(-0.017, 0.018), (0.017, 0.018)], 0.018, (128, 128, 128)
        if textured:
            cabin = [(-0.061, 0.052), (0.04, 0.052), (0.012, 0.104), (-0.04, 0.104)]
            body = [(-0.087, 0.022), (0.089, 0.022), (0.093, 0.056), (0.041, 0.07), (-0.084, 0.07)]
            window = [(-0.036, 0.064), (0.018, 0.064), (0.003, 0.092), (-0.028, 0.092)]
            red, glass = (206, 34, 40), (196, 226, 246)
            parts = [(cabin, red), (body, red), (window, glass)]
            wheels, radius, tyre = [(-0.046, 0.025), (0.05, 0.025)], 0.026, (28, 28, 32)
        for points, color in parts:
            polygon(picture, on_track(x) + np.array(points) @ axes, color)
        for wheel in on_track(x) + np.array(wheels) @ axes:
            disc(picture, wheel, radius, tyre)
        return np.array(picture.reduce(4))


SCENES = {"CartPole-v1": CartPole, "MountainCarContinuous-v0": MountainCar}


# REWARD
def local_folder(clip_model):
    """Folder that local-dir:FOLDER names, if need be beside this script, as tiny_clip is."""
    folder = Path(clip_model.removeprefix("local-dir:")).expanduser()
    return folder if folder.is_dir() else Path(__file__).resolve().parent / folder


def load_clip(clip_model, device, precision):
    """Model, preprocessing and tokenizer, just as they were trained, or else one line of error.

    `clip_model`: NAME/TAG, NAME/FILE, hf-hub:ORG/REPO or local-dir:FOLDER, as open_clip knows them.
    """
    flag = f"--clip-model {clip_model}"
    name, _, pretrained = clip_model.partition("/")
    options = {"precision": precision, "device": device, "require_pretrained": True}
    if clip_model.startswith("hf-hub:"):
        name, pretrained = clip_model, None
    elif clip_model.startswith("local-dir:"):
        name, pretrained = f"local-dir:{local_folder(clip_model)}", None
    else:
        tags = open_clip.list_pretrained_tags_by_model(name)
        published = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in tags}
        known = pretrained in tags or Path(pretrained).is_file()
        tags = ", ".join(tags) or "none"
        check(known, f"{flag}: not NAME/TAG, nor NAME/FILE; tags of {name}: {tags}")
        if pretrained in published:
            options["force_quick_gelu"] = published[pretrained].get("quick_gelu", False)
        else:  # a file does not say how its pictures were normalised: ask the published weights
            keys = "mean", "std", "interpolation", "resize_mode"
            looks = [{k: cfg[k] for k in keys if cfg.get(k)} for cfg in published.values()] or [{}]
            alike, hint = looks.count(looks[0]) == len(looks), "use local-dir:FOLDER"
            check(alike, f"{flag}: the weights of {name} differ in how they normalise; {hint}")
            options["force_preprocess_cfg"] = looks[0]
            if f"{name}-quickgelu" in open_clip.list_models():
                warn(f"{flag} is taken for GELU; if with QuickGELU, use {name}-quickgelu/FILE")
    try:
        model = open_clip.create_model(name, pretrained, **options)
        tokenizer = open_clip.get_tokenizer(name)
    except ImportError as error:
        sys.exit(f"error: {flag}: pip install transformers sentencepiece ({error})")
    except Exception as error:  # a broken or foreign file, a failed download: each raises its own
        hint = "offline, download the whole repository and use local-dir:FOLDER"
        if re.search("weights_only|TorchScript", str(error)):
            hint = "it is more than weights; if you trust it, torch.save() its state_dict alone"
        reason = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(error).split()))[:200]
        sys.exit(f"error: {flag} can't be loaded ({reason}); {hint}")
    look = open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    preprocess = open_clip.transform.image_transform_v2(look, is_train=False)
    return model.eval().requires_grad_(False), preprocess, tokenizer


class CLIPReward(nn.Module):
    """Goal-baseline regularised CLIP reward (section 3.2 of the paper, equation 3).

    With the L2-normalised embeddings g of the goal, b of the baseline, s of the frame, d = g - b:
        P = alpha d d^T / |d|^2 + (1 - alpha) I
        R(s) = 1 - |P (s - g)|^2 / 2               = cos(g, s) for alpha = 0 and one prompt
    P (s - g) is the paper's alpha proj_L(s) + (1 - alpha) s - g: the line L from b to g holds g.

    Several prompts are averaged after normalisation, the mean is not normalised again.
    """

    def __init__(
        self, clip_model, goal, baseline, alpha=0.0, device="cpu", precision="fp32", batch_size=50
    ):
        super().__init__()
        self.clip, self.preprocess, self.tokenizer = load_clip(clip_model, device, precision)
        self.alpha, self.device, self.batch_size = alpha, device, batch_size
        self.dtype = open_clip.get_input_dtype(precision) or torch.float32
        self.image_size = tuple(np.broadcast_to(self.clip.visual.image_size, 2).tolist())  # (H, W)
        taught = local_folder(clip_model) / "sentences.txt"  # of a model that is not zero-shot
        for prompt in goal + (baseline if alpha > 0 else ()):
            # if the tokens stay the same with one more word, that word is not read
            if torch.equal(self.tokenizer([prompt]), self.tokenizer([f"{prompt} robot"])):
                length = self.tokenizer.context_length
                warn(f'"{prompt}" fills or exceeds the {length} tokens it reads')
            if taught.is_file():
                sentences = taught.read_text(encoding="utf-8").lower().splitlines()
                known = set(" ".join(sentences).replace(",", " ").split())
                words = dict.fromkeys(prompt.lower().replace(",", " ").split())
                if unknown := [word for word in words if word not in known]:
                    meant, embed = self.embed_prompts([prompt]), self.embed_prompts
                    nearest = max(sentences, key=lambda text: (embed([text]) * meant).sum())
                    warn(f"{clip_model}, no zero-shot model, never saw {', '.join(unknown)}; it "
                         f'takes this for "{nearest}"; what it was taught: {taught}')  # fmt: skip
        self.register_buffer("goal", self.embed_prompts(goal))  # (D,)
        self.register_buffer("baseline", self.embed_prompts(baseline))  # (D,)
        d = self.goal - self.baseline
        hint = "no direction to project on: change one, or use --clip-alpha 0"
        check(alpha == 0 or d.norm() > 1e-6, f"goal and baseline mean the same to the VLM, {hint}")
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
        """Frames (n, H, W, 3) uint8 of any size to normalised embeddings (n, D) fp32."""
        embeddings = []
        for i in range(0, len(frames), self.batch_size):
            batch = frames[i : i + self.batch_size]
            if batch.shape[1:3] == self.image_size:  # drawn at the model's own size: only normalise
                images = torch.as_tensor(batch).to(self.device).permute(0, 3, 1, 2).float() / 255
                images = self.preprocess.transforms[-1](images)
            else:
                images = torch.stack([self.preprocess(Image.fromarray(frame)) for frame in batch])
            images = images.to(self.device, self.dtype)
            embeddings.append(F.normalize(self.clip.encode_image(images).float(), dim=-1))
        return torch.cat(embeddings)

    def forward(self, embeddings):
        """Rewards (n,) of normalised embeddings (n, D)."""
        difference = embeddings - self.goal
        along = (difference @ self.direction)[:, None] * self.direction
        projected = self.alpha * along + (1 - self.alpha) * difference  # P (s - g)
        return 1 - 0.5 * projected.square().sum(-1)


# ALGO LOGIC: networks and advantages
def mlp(n_in, n_out, std_out):
    layers = []
    for fan_in, fan_out, std in ((n_in, 64, 2**0.5), (64, 64, 2**0.5), (64, n_out, std_out)):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        nn.init.orthogonal_(layers[-2].weight, std)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """Policy and value. `num_actions` discrete actions or, if it is 0, a continuous one."""

    def __init__(self, obs_dim, num_actions, init_std):
        super().__init__()
        self.critic = mlp(obs_dim, 1, 1.0).append(nn.Flatten(-2))  # (..., 1) to (...)
        self.actor = mlp(obs_dim, num_actions or 1, 0.01)
        self.actor_logstd = None if num_actions else nn.Parameter(torch.tensor([init_std]).log())

    def distribution(self, obs):
        """Of actions (...) for observations (..., O)."""
        if self.actor_logstd is None:
            return Categorical(logits=self.actor(obs), validate_args=False)
        return Normal(self.actor(obs).squeeze(-1), self.actor_logstd.exp(), validate_args=False)

    def act(self, obs, sample=True):
        distribution = self.distribution(obs.to(self.critic[0].weight.device))
        return distribution.sample() if sample else distribution.mode  # the greedy action


def gae(rewards, values, gamma, gae_lambda):
    """Advantages (T, N) of rewards (T, N) and values (T + 1, N).

    No episode terminates. The time limit truncates it, so the last value stands in for the rewards
    that were cut off.
    """
    deltas = rewards + gamma * values[1:] - values[:-1]
    advantages, last = torch.zeros_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = last = deltas[t] + gamma * gae_lambda * last
    return advantages


# RUN FOLDER
def atomic_save(state, path):
    """Write aside, flush to disk, rename: a file of that name is always whole."""
    try:
        with open(path.with_suffix(".tmp"), "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's, when the disk is full
        sys.exit(f"error: can't write {path} ({error}). Make room, then --resume")


def load_saved(path, keys):
    """What atomic_save wrote. A damaged file is named; code in a foreign one is never run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in keys}
    except Exception:  # cut short, no zip file, code in a pickle, a key less: each has its own
        hint = "; remove the newest checkpoint to resume the one before"
        hint = "" if path.name == "best.pt" else hint
        sys.exit(f"error: {path} is damaged or of another version{hint}")


# EVALUATION
@torch.inference_mode()
def rollout(scene, policy, seeds, action_repeat):
    """One episode per seed. `policy`: obs (N, O) tensor -> actions (N,) tensor.

    Returns obs (A+1, N, O), actions (A, N) and states (T, N, S) after each step; A = T / repeat.
    """
    scene.reset(seeds)
    obs, actions, states = [scene.observe()], [], []
    for _ in range(EPISODE_LENGTH // action_repeat):
        actions.append(policy(torch.as_tensor(obs[-1])).cpu())
        for _ in range(action_repeat):
            scene.step(actions[-1].numpy())
            states.append(scene.state)
        obs.append(scene.observe())
    return torch.as_tensor(np.stack(obs)), torch.stack(actions), np.stack(states)


def film(scene, states, in_goal, textured, path):
    """Episodes (E, T), green-edged in the goal: a video of four, a sheet with a row for each. No
    picture may end a run."""
    try:
        frames = [[scene.draw(state, 240, textured) for state in episode] for episode in states]
        frames = np.array(frames)  # (E, T, H, W, 3)
        edge = np.pad(np.zeros((232, 232), bool), 4, constant_values=True)
        frames[in_goal[..., None, None] & edge] = (40, 200, 80)
        rows = [np.concatenate(row, axis=1) for row in frames[:, 19::20, ::2, ::2]]
        iio.imwrite(path.with_suffix(".png"), np.concatenate(rows))
        video = np.concatenate(frames[:4], axis=2)
        iio.imwrite(path.with_suffix(".mp4"), video, fps=50, plugin="FFMPEG")
    except Exception as error:
        warn(f"no video: {' '.join(str(error).split())[:200]}")


def final_evaluation(args, run_dir, scene, play, agent):
    """Success and return of the best policy, of doing nothing and of random actions."""
    check((run_dir / "best.pt").is_file(), f"{run_dir} has not reached its first evaluation")
    best = load_saved(run_dir / "best.pt", ("agent", "global_step"))
    n, k = args.eval_episodes, scene.num_actions
    agent.load_state_dict(best["agent"])
    policies = {
        "greedy action": functools.partial(agent.act, sample=False),
        "zero action": lambda obs: torch.zeros(n),  # CartPole can't do nothing: 0 pushes left
        "random action": lambda obs: torch.randint(k, (n,)) if k else 2 * torch.rand(n) - 1,
    }
    summary = {"prompt": args.prompt, "env_id": args.env_id, "episodes": n}
    summary["step"] = best["global_step"]
    print(f"{n} episodes of the policy of step {best['global_step']}")
    for name, policy in policies.items():
        torch.manual_seed(0)
        _, _, rewards, states = play(policy, range(1_000_000, 1_000_000 + n))
        in_goal = scene.in_goal(states).T
        numbers = rewards.sum(0), scene.success(in_goal), in_goal
        keys = "return", "success_rate", "share_in_goal"
        summary[name] = row = {key: float(x.mean()) for key, x in zip(keys, numbers)}
        print(f"{name:15}", "  ".join(f"{key} {value:.2f}" for key, value in row.items()))
        if name == "greedy action":
            filmed = states[:, :6].swapaxes(0, 1), in_goal[:6]
    try:
        (run_dir / "eval.json").write_text(json.dumps(summary, indent=2) + "\n")
    except OSError as error:  # a run folder of somebody else's
        warn(f"no eval.json: {error}")
    film(scene, *filmed, args.drawing == "textured", run_dir / "eval")
    print(f"wrote {', '.join(map(str, sorted(run_dir.glob('eval.*'))))}")
    return summary


def landscape(args, scene, clip_reward, embed):
    """Rewards along a line of states and of uniformly drawn ones, per alpha (paper, Fig. 2).

    Returns the line (361, S), {name: (rewards of the line, of the drawn states)} and {name: EPIC
    distance between the latter and being in the goal}.
    """
    line = np.zeros((361, len(scene.LOW)))
    line[:, scene.AXIS] = np.linspace(scene.LOW[scene.AXIS], scene.HIGH[scene.AXIS], len(line))
    states = np.random.default_rng(0).uniform(scene.LOW, scene.HIGH, (2000, len(scene.LOW)))
    rewards, epic = {}, {}
    if clip_reward:
        embeddings = embed(line), embed(states)
        for alpha in sorted({0.0, 0.25, 0.5, 0.75, 1.0, args.clip_alpha}):
            clip_reward.alpha = alpha
            rewards[f"alpha {alpha:g}"] = [clip_reward(e).cpu().numpy() for e in embeddings]
        clip_reward.alpha = args.clip_alpha
    else:
        rewards["ground truth"] = [scene.true_reward(s, np.zeros(len(s))) for s in (line, states)]
    for name, (_, of_states) in rewards.items():
        rho = np.corrcoef(of_states, scene.in_goal(states))[0, 1]
        epic[name] = float(np.sqrt(max(0, 1 - rho) / 2))
        print(f"{name:12}  EPIC distance {epic[name]:.3f}")
    return line, rewards, epic


def plot_landscape(args, scene, line, rewards, epic, run_dir, writer):
    """A curve per alpha, against angle or position. No picture may end a run."""
    try:
        figure = Figure(figsize=(6, 3.6), layout="tight")
        axes = figure.add_subplot(xlabel=scene.AXIS_LABEL, ylabel="reward, rescaled to [0, 1]")
        axes.set_title(f"{args.env_id}, {args.clip_model}")
        x, goal = line[:, scene.AXIS] * scene.AXIS_UNIT, scene.in_goal(line)
        axes.axvspan(x[goal].min(), x[goal].max(), color="tab:green", alpha=0.2, label="goal")
        for name, (of_line, _) in rewards.items():
            rescaled = (of_line - of_line.min()) / np.ptp(of_line).clip(1e-9)
            axes.plot(x, rescaled, linewidth=1.2, label=f"{name}, EPIC {epic[name]:.2f}")
        axes.legend(fontsize=7)
        figure.savefig(run_dir / "landscape.png", dpi=120)
        writer.add_figure("landscape", figure)
    except Exception as error:
        warn(f"no landscape.png: {' '.join(str(error).split())[:200]}")


# MAIN
def parse_args(argv):
    """Flags of the command line over the scene's, or those of the run to resume or evaluate."""
    args = tyro.cli(Args, args=argv)
    check(not (args.resume and args.evaluate), "give either --resume or --evaluate")
    if run_dir := args.resume or args.evaluate:
        check(Path(run_dir).is_dir(), f"{run_dir}: there is no such folder")
        try:
            saved = json.loads(Path(run_dir, "args.json").read_text())["args"]
            saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
            kinds, now = ([(k, type(v)) for k, v in x.items()] for x in (saved, asdict(args)))
            if kinds != now:
                raise ValueError("flags of another version")
            saved = Args(**saved)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            check(False, f"{run_dir} is not a run folder of this version: no args.json that fits")
        # tyro would append to the saved prompts, so blank them
        blank = replace(saved, prompt=(), baseline_prompt=())
        args = tyro.cli(Args, default=blank, args=argv)
        args.prompt = args.prompt or saved.prompt
        args.baseline_prompt = args.baseline_prompt or saved.baseline_prompt
        check(args.env_id == saved.env_id, f"{run_dir} is a run of {saved.env_id}")
    else:
        args = tyro.cli(Args, default=Args(args.env_id, **DEFAULTS[args.env_id]), args=argv)
    scene = SCENES[args.env_id]
    args.prompt = args.prompt or (scene.PROMPT,)
    args.baseline_prompt = args.baseline_prompt or (scene.BASELINE,)
    check(all(p.strip() for p in args.prompt + args.baseline_prompt), "a prompt is empty")
    if args.resume:
        changed = [key for key, value in asdict(args).items() if value != getattr(saved, key)]
        changed = ", ".join(key for key in changed if key not in MAY_CHANGE)
        check(not changed, f"--resume goes on with the run's own flags; changed: {changed}")
        check(args.total_timesteps >= saved.total_timesteps, "--total-timesteps can only be raised")
        check(not args.landscape_only, f"{run_dir} holds a landscape only, nothing to go on with")
    lowest = dict.fromkeys(("seed", "image_size", "clip_alpha", "ent_coef", "vf_coef"), 0)
    for key, value in asdict(args).items():
        if type(value) in (int, float):
            ok = lowest.get(key, 1e-12) <= value < math.inf
            check(ok, f"--{key.replace('_', '-')} {value} is not a positive number")
    check(args.clip_alpha <= 1, "--clip-alpha must be between 0 and 1")
    check(args.gamma < 1, "--gamma must be below 1")
    check(args.gae_lambda <= 1, "--gae-lambda must be at most 1")
    check(args.drawing == "textured" or scene is MountainCar, "--drawing: CartPole has one only")
    check(args.image_size == 0 or args.image_size >= 16, "--image-size must be at least 16")
    whole = EPISODE_LENGTH % args.action_repeat == 0
    check(whole, f"--action-repeat must divide an episode's {EPISODE_LENGTH} steps")
    actions = args.num_envs * EPISODE_LENGTH // args.action_repeat
    enough = 2 * args.num_minibatches <= actions
    check(enough, f"--num-minibatches must leave 2 of a round's {actions} actions for each")
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    device = args.device
    if device == "auto":
        device = next((gpu for gpu in there if there[gpu]()), "cpu")
    check(device == "cpu" or there[device](), f"--device {device}: PyTorch sees no such GPU here")
    check(device != "cpu" or args.clip_precision == "fp32", "--clip-precision needs a GPU")
    check(args.seed < 2**32, "--seed must be below 2^32")
    good = args.run_name.isprintable() and len(args.run_name) < 100
    check(good, "--run-name must be printable and shorter than 100 characters")
    return args, device


def main(argv=None):
    args, device = parse_args(sys.argv[1:] if argv is None else argv)
    name = f"{args.env_id}__ppo_vlmrm_classic__{args.seed}__{int(time.time())}"
    run_dir = Path(args.resume or args.evaluate or Path("runs", args.run_name or name))
    if not (args.resume or args.evaluate):
        check(not run_dir.exists(), f"{run_dir} exists: --resume {run_dir}, or another --run-name")
        parent = next(folder for folder in run_dir.absolute().parents if folder.exists())
        check(parent.is_dir() and os.access(parent, os.W_OK), f"{parent} is not writable")
    torch.manual_seed(args.seed)
    scene, clip_reward, textured = SCENES[args.env_id](), None, args.drawing == "textured"
    if args.reward == "vlm":
        prompts = args.prompt, args.baseline_prompt
        options = args.clip_alpha, device, args.clip_precision, args.reward_batch_size
        clip_reward = CLIPReward(args.clip_model, *prompts, *options)
        size = args.image_size or max(clip_reward.image_size)
    agent = Agent(len(scene.OBS_SCALE), scene.num_actions, args.init_std).to(device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    parts = {"agent": agent, "optimizer": optimizer}
    counters = {"global_step": 0, "best_return": -math.inf, "reward_mean": 0.0, "reward_std": 1.0}
    batch_size = args.num_envs * EPISODE_LENGTH // args.action_repeat  # actions in a round
    # play restarts the clock; after a round: when collect, draw, score, learn began, and its end
    stopping, clock = [], []
    go_back = f"--resume {run_dir} goes on from the checkpoint before"

    def embed(states):
        """Embeddings (M, D) of states (M, S), a round's frames (one mark of the clock) at a time,
        since more may not fit."""
        embeddings = []
        for some in np.split(states, range(batch_size, len(states), batch_size)):
            frames = np.stack([scene.draw(state, size, textured) for state in some])
            clock.append(time.perf_counter())
            embeddings.append(clip_reward.embed_images(frames))
        return torch.cat(embeddings)

    def play(policy, seeds):
        """The stages before learning: as rollout, and rewards (A, N), of the state that each action
        ends in."""
        clock[:] = [time.perf_counter()]
        obs, actions, states = rollout(scene, policy, seeds, args.action_repeat)
        clock.append(time.perf_counter())
        after = states[args.action_repeat - 1 :: args.action_repeat]
        if clip_reward:
            rewards = clip_reward(embed(after.reshape(actions.numel(), -1)))
            rewards = rewards.cpu().numpy().reshape(actions.shape)
        else:
            rewards = scene.true_reward(after, actions.numpy())
            clock.append(clock[-1])  # nobody looks, so nothing is drawn
        clock.append(time.perf_counter())
        finite = np.isfinite(rewards).all()
        check(finite, f"a reward is not finite after step {counters['global_step']}; {go_back}")
        return obs, actions, rewards, states

    if args.evaluate:
        return final_evaluation(args, run_dir, scene, play, agent)

    def log(scalars):
        for key, value in scalars.items():
            writer.add_scalar(key, value, counters["global_step"])

    def save():
        """Between rounds every episode is over: nothing of the environments needs saving."""
        checkpoint = {name: part.state_dict() for name, part in parts.items()}
        checkpoint |= {"counters": counters, "rng": torch.get_rng_state()}
        checkpoint["cuda_rng"] = torch.cuda.get_rng_state() if device == "cuda" else None
        atomic_save(checkpoint, run_dir / f"checkpoint_{counters['global_step']:09d}.pt")
        for old in sorted(run_dir.glob("checkpoint_*.pt"))[:-2]:
            old.unlink()

    if args.resume:
        checkpoints = sorted(run_dir.glob("checkpoint_*.pt"))
        check(checkpoints, f"{run_dir} has no checkpoint to resume from")
        saved = load_saved(checkpoints[-1], [*parts, "counters", "rng", "cuda_rng"])
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        counters = saved["counters"]
        torch.set_rng_state(saved["rng"])
        if device == "cuda" and saved["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["cuda_rng"])
    else:
        line, curves, epic = landscape(args, scene, clip_reward, embed)
        if args.standardize and args.reward == "vlm":
            of_states = curves[f"alpha {args.clip_alpha:g}"][1]
            counters["reward_mean"] = float(of_states.mean())
            counters["reward_std"] = max(float(of_states.std()), 1e-6)
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    about = {"args": asdict(args) | {"resume": ""}, "torch": torch.__version__}
    (run_dir / "args.tmp").write_text(json.dumps(about, indent=2))
    os.replace(run_dir / "args.tmp", run_dir / "args.json")  # on resume too: it may have more steps
    if not args.resume:
        (run_dir / "epic.json").write_text(json.dumps(epic, indent=2) + "\n")
        save()  # from now on the run can be resumed

    def stop(signum, _):
        stopping.append(signum)
        tqdm.write(f"{signal.Signals(signum).name}: stopping after this round; once more: at once")
        signal.signal(signum, signal.SIG_DFL)

    signals = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]
    signals = [s for s in signals if signal.getsignal(s) != signal.SIG_IGN]  # ignored: by nohup
    for signum in signals:
        signal.signal(signum, stop)
    writer = SummaryWriter(run_dir, purge_step=counters["global_step"] + 1 if args.resume else None)
    if not args.resume:
        table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
        plot_landscape(args, scene, line, curves, epic, run_dir, writer)
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
        losses = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy}
        return losses | {"approx_kl": approx_kl, "clipfrac": clipfrac}

    total, round_steps = args.total_timesteps, args.num_envs * EPISODE_LENGTH
    bar = {"unit": "step", "dynamic_ncols": True}
    progress_bar = tqdm(total=total, initial=counters["global_step"], **bar)
    while (global_step := counters["global_step"]) < total and not stopping:
        remaining = 1 - global_step / total if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = learning_rate = remaining * args.learning_rate

        # collect, draw, score
        seeds = [args.seed * 10**9 + global_step + i for i in range(args.num_envs)]
        obs, actions, rewards, states = play(agent.act, seeds)
        counters["global_step"] = global_step = global_step + round_steps

        # learn. The factor 1 - gamma makes returns averages of rewards: of order 1 for any gamma
        scaled = (rewards - counters["reward_mean"]) / counters["reward_std"] * (1 - args.gamma)
        scaled = torch.as_tensor(scaled, dtype=torch.float32, device=device)
        obs, actions = obs.to(device), actions.to(device)
        with torch.no_grad():
            values = agent.critic(obs)  # (T / repeat + 1, N)
            advantages = gae(scaled, values, args.gamma, args.gae_lambda)
            log_prob = agent.distribution(obs[:-1]).log_prob(actions)
        returns = advantages + values[:-1]
        batch = [x.flatten(0, 1) for x in (obs[:-1], actions, log_prob, advantages, returns)]
        for _ in range(args.update_epochs):
            for rows in torch.randperm(batch_size).tensor_split(args.num_minibatches):
                losses = update(*(x[rows] for x in batch))
        finite = all(x.isfinite().all() for x in [*losses.values(), *agent.parameters()])
        check(finite, f"a loss or a weight is not finite at step {global_step}; {go_back}")
        clock.append(time.perf_counter())

        # log
        in_goal, seconds = scene.in_goal(states).T, np.diff(clock)
        success, mean_return = scene.success(in_goal).mean(), rewards.sum(0).mean()
        log({f"losses/{key}": value.item() for key, value in losses.items()})
        log(dict(zip(("time/collect", "time/draw", "time/score", "time/learn"), seconds)))
        log({"charts/episodic_return": mean_return})
        log({"charts/success_rate": success, "charts/share_in_goal": in_goal.mean()})
        log({"charts/SPS": round_steps / sum(seconds), "charts/learning_rate": learning_rate})
        progress_bar.set_postfix_str(f"reward {rewards.mean():.3f}, success {success:.0%}", False)
        progress_bar.update(round_steps)

        # evaluate the greedy action, keep the best policy, save
        due = global_step >= total or global_step % args.eval_frequency < round_steps
        if due:
            policy = functools.partial(agent.act, sample=False)
            _, _, rewards, states = play(policy, range(2_000_000, 2_000_000 + args.select_episodes))
            mean_return = float(rewards.sum(0).mean())
            success = scene.success(scene.in_goal(states).T).mean()
            log({"eval/return": mean_return, "eval/success_rate": success})
            if mean_return > counters["best_return"]:
                counters["best_return"] = mean_return
                best = {"agent": agent.state_dict(), "global_step": global_step}
                atomic_save(best, run_dir / "best.pt")
        if due or stopping:
            writer.flush()
            save()
    progress_bar.close()
    writer.close()
    if stopping:
        print(f"stopped at step {counters['global_step']}; go on with --resume {run_dir}")
        return None
    for signum in signals:  # end at once: all is saved, --evaluate can do the rest
        signal.signal(signum, lambda *_: sys.exit(0))
    return final_evaluation(args, run_dir, scene, play, agent)


if __name__ == "__main__":
    sys.stdout, sys.stderr = Patient(sys.stdout), Patient(sys.stderr)
    try:
        main()
    except OSError as error:  # a full disk, a folder of somebody else's
        sys.exit(f"error: {error}. What was saved before is whole; mend that, then --resume")
