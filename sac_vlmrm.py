# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch>=2.6", "open_clip_torch>=3.3,<4", "gymnasium[mujoco]>=1.2,<2",
#   "mujoco>=3.17", "tyro>=0.9", "numpy>=2.0", "tensorboard>=2.18", "tqdm>=4.66", "imageio>=2.36",
#   "imageio-ffmpeg>=0.5"]
# ///
r"""Teach the MuJoCo humanoid a pose with one sentence: a vision-language model is the reward.

Rocamonde et al., "Vision-Language Models are Zero-Shot Reward Models for RL", ICLR 2024, with SAC.

    python sac_vlmrm.py --prompt "a humanoid robot kneeling"         # 2 CPU cores, offline
    python sac_vlmrm.py one-gpu --prompt "a humanoid robot kneeling" # a real VLM on one GPU
    torchrun --nproc-per-node 4 sac_vlmrm.py paper --prompt "a humanoid robot kneeling"
    python sac_vlmrm.py --evaluate runs/RUN_NAME                     # success rate, video
    python sac_vlmrm.py --resume runs/RUN_NAME                       # after a crash or Ctrl-C

With torchrun each rank has robots, an image tower and a replay buffer of its own; their gradients
are averaged. --num-envs, --batch-size and --buffer-size are totals, shared out among the ranks;
every rank scores --reward-batch-size frames at a time; rank 0 alone evaluates and logs. On each of
two nodes that share a file system:
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        sac_vlmrm.py paper --prompt "a humanoid robot kneeling"

The default VLM, tiny_clip/, was trained on pictures of this simulator: it is not zero-shot. Any of
open_clip's can replace it, e.g. --clip-model ViT-B-32/laion2b_s34b_b79k

A round of the main loop (Algorithm 1 of the paper) handles one episode of each of N robots:
    collect  physics: obs (N, T+1, O), actions (N, T, A)
    draw     every fourth state, as V cameras see it: frames (N, T', V, H, W, 3); and, for the
             report, whether it succeeds
    score    CLIP compares the frames with the sentence; between frames rewards (N, T) are
             interpolated
    learn    fill the replay buffer; SAC takes gradient steps on it
docs/fork.md says which function to change for another reward, VLM, robot or learner.
"""

import copy
import functools
import json
import math
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from ctypes.util import find_library
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

# torchrun starts processes, ranks, one per GPU, and tells each its number, how many there are, and
# both on this machine alone (LOCAL). Without it, whatever the shell exports, this is rank 0 of 1.
torchrun = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}
RANK, LOCAL_RANK = (int(torchrun.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD_SIZE = int(torchrun.get("WORLD_SIZE", 1))
LOCAL_WORLD_SIZE = int(torchrun.get("LOCAL_WORLD_SIZE", 1))
if LOCAL_WORLD_SIZE > 1 and Path(f"/dev/nvidia{LOCAL_RANK}").exists():
    os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", str(LOCAL_RANK))  # each draws on its own GPU
# Settings that OpenGL reads when it is loaded; no window is opened.
os.environ.pop("PYOPENGL_PLATFORM", None)  # MUJOCO_GL decides
os.environ.setdefault("LP_NUM_THREADS", "0")  # none of llvmpipe's own: Painter has some
if sys.platform == "linux":
    os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL", "egl").lower()
    if os.environ["MUJOCO_GL"] not in ("egl", "osmesa", "glfw"):
        sys.exit("error: MUJOCO_GL must be egl, osmesa or glfw; or unset it")
    if os.environ["MUJOCO_GL"] == "osmesa" and not find_library("OSMesa"):
        sys.exit("error: MUJOCO_GL=osmesa, but there is no OSMesa library; unset it")

import torch  # before OpenGL: the other order segfaults

import gymnasium as gym
import imageio.v3 as iio
import mujoco
import numpy as np
import open_clip
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from mujoco.batch import Batch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

HUMANOID_XML = f"{Path(gym.__file__).parent}/envs/mujoco/assets/humanoid.xml"
HUMANOID = mujoco.MjModel.from_xml_path(HUMANOID_XML)
OBS_DIM = HUMANOID.nq + HUMANOID.nv + 16 * (HUMANOID.nbody - 1)  # 255, see VLMHumanoid
ACTION_DIM = HUMANOID.nu  # 17
FRAME_SKIP = 5  # of MuJoCo's steps of 3 ms in one of ours
# MuJoCo's warnings of a state that can't be
ABSURD = [getattr(mujoco.mjtWarning, f"mjWARN_BADQ{x}").value for x in ("POS", "VEL", "ACC")]
EPISODE_LENGTH = 100  # steps of 15 ms; every episode runs to its end (paper, section 4.3)
# azimuth, in degrees, of cameras that stand still ("front" is the paper's); None: Gymnasium's,
# which moves with the robot
CAMERAS = {"front": 180, "side": 90, "original": None}
TASKS = {  # the paper's prompts (Table 3)
    "kneeling": "a humanoid robot kneeling",
    "lotus": "a humanoid robot seated down, meditating in the lotus position",
    "standing": "a humanoid robot standing up",
    "arms-raised": "a humanoid robot standing up, with both arms raised",
    "splits": "a humanoid robot practicing gymnastics, doing the side splits",
    "hands-on-hips": "a humanoid robot standing up with hands on hips",
    "arms-crossed": "a humanoid robot standing up, with its arms crossed",
    "one-leg": "a humanoid robot standing up on one leg",
}
Prompts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass
class Args:
    # what to learn
    prompt: Prompts = ()  # what the robot should do; may be repeated: embeddings are averaged
    baseline_prompt: Prompts = ()  # what any frame shows; "a humanoid robot" if not given
    clip_alpha: float = 0.0  # goal-baseline regularisation, from 0 (no baseline) to 1
    # the VLM: local-dir:FOLDER, NAME/TAG, NAME/FILE or hf-hub:ORG/REPO, as open_clip knows them
    clip_model: str = "local-dir:tiny_clip"
    clip_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    reward_batch_size: int = 50  # frames per forward pass of the image tower; more on a GPU
    score_every: int = 4  # steps from one scored frame to the next; 1: all, as in the paper
    reward: Literal["vlm", "ground-truth"] = "vlm"  # ground-truth: Gymnasium's, for walking
    task: Literal["", *TASKS] = ""  # to report success at; by default that of the prompt, if any
    # the picture
    textures: Literal["modified", "original"] = "modified"  # modified: realistic (paper, Fig. 3)
    # one view or several, e.g. front side: then the reward is their mean
    camera: tuple[Literal[*CAMERAS], ...] = ("front",)
    image_size: int = 0  # pixels; 0: the size the VLM takes
    # the run
    seed: int = 1  # of everything random
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU if there is one
    run_name: str = ""  # folder below runs/; made from task, seed and time if not given
    resume: str = ""  # run folder to go on with, with its own flags
    evaluate: str = ""  # run folder whose best policy to evaluate
    eval_episodes: int = 100  # of the final evaluation
    eval_frequency: int = 24_000  # steps between checkpoints; once it learns, with an evaluation
    select_episodes: int = 24  # of such an evaluation; twice as many more confirm a new best policy
    # SAC
    total_timesteps: int = 96_000  # of all robots
    num_envs: int = 24  # robots
    learning_starts: int = 5000  # steps of random torques before the first update
    gradient_steps: int = 400  # updates per round (one episode of every robot)
    buffer_size: int = 24_000  # steps: the last ten rounds, since in older ones robots fall sooner
    batch_size: int = 128  # transitions per update
    hidden: int = 128  # units of each of the two hidden layers; 256 take twice the time
    gamma: float = 0.98  # discount per step: looks 50 steps ahead, the paper's 0.95 only 20
    n_step: int = 10  # rewards summed up before the critics' estimate takes over; 1: as in SAC
    tau: float = 0.005  # share by which the target critics follow at every update
    learning_rate: float = 6e-4  # of actor, critics and entropy coefficient; see anneal
    alpha: float = 0.1  # SAC's entropy coefficient at first; the paper's alpha is --clip-alpha
    target_entropy: float = -4.0  # what alpha is tuned to; by custom -17, minus the motors
    noise_correlation: float = 0.8  # of a robot's exploration from step to step; 0: as in SAC
    # second half of the run: rates of actor and critics fall to a tenth, target entropy to -51
    anneal: bool = True
    normalize: bool = True  # scales of observations and rewards; LayerNorm in the hidden layers
    mirror: bool = True  # half of every batch with left and right exchanged, as if worth the same


# A word before the flags stands for other defaults. `paper`: the numbers of its appendix C, which
# ran on four GPUs; the observation, slow random torques, the bootstrap at the time limit, the
# average actor and an actor that learns from the target critics are this file's. `one-gpu`: the
# paper's VLM, twice the default's robots and updates.
BIG_G = {"clip_model": "ViT-bigG-14/laion2b_s39b_b160k", "clip_precision": "bf16"}
PRESETS = {
    "one-gpu": Args(
        **BIG_G, total_timesteps=192_000, num_envs=48, reward_batch_size=400, gradient_steps=800,
        buffer_size=48_000, eval_frequency=48_000,
    ),
    "paper": Args(
        **BIG_G, num_envs=32, reward_batch_size=800, score_every=1, total_timesteps=10_000_000,
        learning_starts=50_000, alpha=1.0, gradient_steps=100, buffer_size=1_000_000,
        batch_size=512, hidden=256, gamma=0.95, n_step=1, eval_frequency=128_000,
        target_entropy=-17.0, noise_correlation=0.0, anneal=False, normalize=False, mirror=False,
    ),
}  # fmt: skip
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


# ENVIRONMENT: physics
class VLMHumanoid(gym.vector.VectorEnv):
    """Robots of Gymnasium's Humanoid-v5, with its rewards (N,). No episode ends early.

    Observations (N, 255): qpos (24) and qvel (23), with x and y because the camera stands still;
    then inertia (10) and velocity (6) of each of 13 bodies, without which balance is slow to learn.
    Actions (N, 17), in [-0.4, 0.4]: torques, divided by each motor's gear. infos["unstable"] (N,):
    MuJoCo found a state absurd and reset it.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}  # all episodes end together
    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float64)
    single_action_space = gym.spaces.Box(-0.4, 0.4, (ACTION_DIM,))

    def __init__(self, num_envs, num_threads=1):
        self.num_envs, self.scratch = num_envs, mujoco.MjData(HUMANOID)
        # MuJoCo's loop over robots, on threads; persistent: get_data can read all of a robot
        self.sim = Batch(HUMANOID, num_envs, num_threads, persistent=True)
        for field in ("cinert", "cvel", "subtree_com"):
            self.sim.bind(field)  # so that they are filled from the first call on
        batch_space = gym.vector.utils.batch_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def observe(self):
        sim, n = self.sim, self.num_envs
        # body 0 is the world; as in Gymnasium, these two are one substep older than qpos
        bodies = sim.cinert[:, 1:].reshape(n, -1), sim.cvel[:, 1:].reshape(n, -1)
        return np.concatenate([sim.qpos, sim.qvel, *bodies], axis=1)

    def reset(self, *, seed=None, options=None):
        """`seed`: a number from which the robots count up."""
        self.sim.reset(stage=mujoco.mjtStage.mjSTAGE_NONE)  # `forward` comes below
        for i in range(self.num_envs):
            rng = np.random.default_rng(seed if seed is None else seed + i)
            self.sim.qpos[i] = HUMANOID.qpos0 + rng.uniform(-0.01, 0.01, HUMANOID.nq)
            self.sim.qvel[i] = rng.uniform(-0.01, 0.01, HUMANOID.nv)
        self.sim.forward()
        self.elapsed_steps = 0
        return self.observe(), {}

    def step(self, actions):
        sim, n = self.sim, self.num_envs
        before = sim.subtree_com[:, 0, 0].copy()  # x of the centre of mass
        sim.ctrl = actions
        sim.step(nstep=FRAME_SKIP)
        self.elapsed_steps += 1
        velocity = (sim.subtree_com[:, 0, 0] - before) / (FRAME_SKIP * HUMANOID.opt.timestep)
        healthy = 5.0 * ((sim.qpos[:, 2] > 1) & (sim.qpos[:, 2] < 2))
        contact = np.empty(n)
        for i in range(n):
            mujoco.mj_rnePostConstraint(HUMANOID, sim.get_data(i, self.scratch))
            contact[i] = min(5e-7 * np.square(self.scratch.cfrc_ext).sum(), 10)
        # the weights are Humanoid-v5's
        rewards = 1.25 * velocity + healthy - (0.1 * np.square(sim.ctrl).sum(1) + contact)
        truncations = np.full(n, self.elapsed_steps >= EPISODE_LENGTH)
        infos = {"unstable": sim.warning[:, ABSURD, 1].any(1)}  # [..., 1]: how often since reset
        return self.observe(), rewards, np.zeros(n, bool), truncations, infos


def mirror_image(device):
    """Functions of observations (..., 255) and of actions (..., 17) to the mirrored robot's.

    The robot is symmetric but for a knee's spring and a hip's armature. So is its picture from the
    front, but for sun and floor; of that from the side, only the outline.
    """
    joints = [HUMANOID.joint(i).name for i in range(1, HUMANOID.njnt)]  # after the free one
    motors = [HUMANOID.actuator(i).name for i in range(HUMANOID.nu)]  # named like their joints
    bodies = [HUMANOID.body(i).name for i in range(1, HUMANOID.nbody)]  # after the world
    vector, rotation, inertia = [1, -1, 1], [-1, 1, -1], [1, 1, 1, -1, 1, -1]  # xx yy zz xy xz yz

    def twin(name):
        return re.sub("left|right", lambda side: {"left": "right", "right": "left"}[side[0]], name)

    def turn(joint):  # mirrored at y = 0, a rotation about (x, y, z) is one about (-x, y, -z)
        axis, other = HUMANOID.joint(joint).axis, HUMANOID.joint(twin(joint)).axis
        return [round((axis * rotation) @ other)]

    def reflection(*blocks):
        """Blocks of a vector, e.g. (joints, turn): a number per joint, whose sign turn(joint) says.
        Labels such as "1 left_knee 0" pair each number with the one that takes its place.
        """
        names, signs = [], []
        for block, (owners, signs_of) in enumerate(blocks):
            for owner in owners:
                names += [f"{block} {owner} {i}" for i in range(len(signs_of(owner)))]
                signs += signs_of(owner)
        index = torch.tensor([names.index(twin(name)) for name in names], device=device)
        signs = torch.tensor(signs, device=device)
        return lambda x: x[..., index] * signs

    of_obs = reflection(
        (["root"], lambda _: [*vector, 1, *rotation]),  # position, quaternion
        (joints, turn),
        (["root"], lambda _: [*vector, *rotation]),  # velocities
        (joints, turn),
        (bodies, lambda _: [*inertia, *vector, 1]),  # inertia, mass times position, mass
        (bodies, lambda _: [*rotation, *vector]),  # velocities, MuJoCo's cvel: rotation first
    )
    return of_obs, reflection((motors, turn))


# ENVIRONMENT: what the camera sees
def modify_textures(spec):
    """A sky, a wooden floor and a robot's shell. Bodies stay as they are."""
    rng, size, planks = np.random.default_rng(0), 256, 8
    for item in [*spec.textures, *spec.materials]:
        spec.delete(item)
    sky = spec.add_texture(name="sky", width=128, height=128)
    sky.type, sky.rgb1 = mujoco.mjtTexture.mjTEXTURE_SKYBOX, [0.35, 0.55, 0.85]
    sky.builtin, sky.rgb2 = mujoco.mjtBuiltin.mjBUILTIN_GRADIENT, [0.85, 0.90, 0.95]
    grain = rng.uniform(0.9, 1.1, (size, 4)).repeat(size // 4, 1)  # stretched along the planks
    wood = rng.uniform(0.85, 1.1, planks).repeat(size // planks)[:, None] * grain
    wood[:: size // planks] *= 0.55  # the gaps between planks, and the two ends of each
    for plank, end in zip(np.split(wood, planks), rng.integers(0, size, planks)):
        plank[:, end] *= 0.6
    wood = np.clip(wood[..., None] * [168, 122, 82], 0, 255).astype(np.uint8)
    texture = spec.add_texture(name="wood", width=size, height=size, nchannel=3)
    texture.type, texture.data = mujoco.mjtTexture.mjTEXTURE_2D, wood.tobytes()
    # polished: the gap to its mirror image shows whether a knee or a foot touches the floor
    floor = spec.add_material(name="floor", texrepeat=[0.5, 0.5], texuniform=True, reflectance=0.4)
    floor.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "wood"
    spec.add_material(name="metal", specular=0.4, shininess=0.6)
    white, orange = [0.92, 0.93, 0.95], [0.95, 0.55, 0.15]
    colors = {"floor": [1, 1, 1], "torso1|butt|thigh|uarm": white, "hand|foot": orange}
    colors |= {"head": [0.15, 0.35, 0.65], "": [0.22, 0.24, 0.28]}  # the first that matches
    for geom in spec.geoms:
        geom.material = "floor" if geom.name == "floor" else "metal"
        geom.rgba = [*next(rgb for part, rgb in colors.items() if re.search(part, geom.name)), 1]
    spec.visual.headlight.ambient, spec.visual.headlight.diffuse = [0.35] * 3, [0.25] * 3
    sun = spec.lights[0]
    sun.dir, sun.pos, sun.diffuse = [-0.4, 0.3, -1], [1, -1, 4], [0.7] * 3


class Painter:
    """Draws states on several threads, each with its own `mujoco.Renderer`, whose OpenGL context
    only that thread may use. `size`: (H, W)."""

    def __init__(self, size, textures, cameras, num_threads=1):
        spec = mujoco.MjSpec.from_file(HUMANOID_XML)
        if textures == "modified":
            modify_textures(spec)
        spec.geom("floor").size[2] = 5  # m between grid corners: Gymnasium's 0.125 are slow
        spec.lights[0].castshadow = False
        quality = spec.visual.quality
        quality.shadowsize = quality.offsamples = 0  # CLIP blurs a frame anyway: no 4x MSAA
        quality.numslices, quality.numstacks = 12, 8  # 28 and 16 cost half of the frame rate
        self.model, self.size, self.cameras = spec.compile(), size, []
        self.model.vis.global_.offheight, self.model.vis.global_.offwidth = size
        for azimuth in (CAMERAS[name] for name in cameras):
            camera = 0  # the number of Gymnasium's in the model
            if azimuth is not None:
                camera = mujoco.MjvCamera()
                camera.distance, camera.azimuth, camera.elevation = 3.5, azimuth, -10
                camera.lookat = [0, 0, 1]
            self.cameras.append(camera)
        self.threads, self.renderers = [], []
        try:
            for _ in range(num_threads):
                self.threads.append(thread := ThreadPoolExecutor(1))
                self.renderers.append(thread.submit(mujoco.Renderer, self.model, *size).result())
                from OpenGL import GL  # of the platform that MuJoCo has chosen

                self.name = thread.submit(GL.glGetString, GL.GL_RENDERER).result().decode()
                if "NVIDIA" in self.name:  # on an H200 16 threads drew no faster than one
                    break
        except Exception as error:  # every platform raises its own
            packages = "apt-get install libegl1 libgl1-mesa-dri, or a smaller --image-size"
            sys.exit(f"error: OpenGL can't draw ({error}): {packages}")

    def on_threads(self, function, *shares):
        """Call the function on every thread with its share of the arguments."""
        futures = [thread.submit(function, *share) for thread, *share in zip(self.threads, *shares)]
        return [future.result() for future in futures]

    def close(self):
        self.on_threads(mujoco.Renderer.close, self.renderers)
        for thread in self.threads:
            thread.shutdown()

    def draw(self, renderer, states, frames):
        """States (n, 24) into frames (n, V, H, W, 3), on one thread."""
        data = mujoco.MjData(self.model)
        for qpos, views in zip(states, frames):
            data.qpos = qpos
            mujoco.mj_kinematics(self.model, data)
            mujoco.mj_comPos(self.model, data)  # Gymnasium's camera follows the centre of mass
            mujoco.mj_camlight(self.model, data)
            for camera, frame in zip(self.cameras, views):
                renderer.update_scene(data, camera)
                renderer.render(out=frame)

    def __call__(self, qpos):
        """Frames (..., V, H, W, 3) uint8, one per view, of states qpos (..., 24)."""
        states = qpos.reshape(-1, HUMANOID.nq)
        frames = np.empty((len(states), len(self.cameras), *self.size, 3), dtype=np.uint8)
        shares = (np.array_split(array, len(self.threads)) for array in (states, frames))
        self.on_threads(self.draw, self.renderers, *shares)
        return frames.reshape(*qpos.shape[:-1], *frames.shape[1:])


# SUCCESS
def goal_states(qpos):
    """Whether states qpos (..., 24) are the paper's goal states (Table 2): {task: (...) bool}.

    Geometry in metres, which the learner never sees. To touch the floor is to come within 2 cm of
    it: contacts of a rigid robot chatter, heights do not.
    """
    touch = 0.02
    sim = Batch(HUMANOID, qpos[..., 0].size, torch.get_num_threads())
    sim.qpos = qpos.reshape(-1, HUMANOID.nq)
    for field in ("xpos", "xmat", "geom_xpos", "geom_xmat"):
        sim.bind(field)
    sim.forward(stage=mujoco.mjtStage.mjSTAGE_POS)

    def both(view, part):
        return np.stack([view(f"{side}_{part}") for side in ("left", "right")])  # (2, n, ...)

    def seen_from(body, points):
        """Positions (2, n, 3) in a body's frame: x forward, y to the point's own side, z up."""
        axes = sim.body(body).xmat.reshape(-1, 3, 3)
        position = np.einsum("sni,nij->snj", points - sim.body(body).xpos, axes)
        return position * [[[1, 1, 1]], [[1, -1, 1]]]  # left, right

    foot, hand = (both(lambda name: sim.geom(name).xpos, part) for part in ("foot", "hand"))
    hip, knee = (both(lambda name: sim.body(name).xpos, part) for part in ("thigh", "shin"))
    bend = both(lambda name: sim.joint(name).qpos[:, 0], "knee")  # 0: straight
    # undersides over the floor: the numbers are radii of the model's spheres and capsules
    foot_gap, hand_gap, knee_gap = foot[..., 2] - 0.075, hand[..., 2] - 0.04, knee[..., 2] - 0.049
    head, butt, torso = sim.geom("head"), sim.geom("butt"), sim.body("torso")
    seat = butt.xpos[:, 2] - 0.07 * abs(butt.xmat[:, 8]) - 0.09
    uprightness = torso.xmat[:, 8]  # cosine between the torso's axis and the vertical
    upright, feet_down = uprightness > 0.8, foot_gap.max(0) < touch
    tall = upright & (torso.xpos[:, 2] > 1.1) & (knee_gap.min(0) > touch)  # torso straight: 1.28
    standing, seated = tall & feet_down, (seat < 0.05) & feet_down
    on_hips = np.linalg.norm(seen_from("pelvis", hand) - [0, 0.2, 0.08], axis=-1) < 0.12
    x, y, z = np.moveaxis(seen_from("torso", hand), -1, 0)
    past_middle = (x > 0.05) & (y < -0.05) & (abs(z) < 0.25)  # the joints allow y = -0.14
    left_thigh, right_thigh = knee - hip
    # more than 90 degrees apart, of 123 that the hip joints allow (one front and one back: of 167)
    apart = (left_thigh * right_thigh).sum(-1) < 0
    # the shin folds in the thigh's plane only: with the feet together the knees stay 17 cm high, so
    # lotus allows 25
    knee_y, foot_xy = seen_from("pelvis", knee)[..., 1], seen_from("pelvis", foot)[..., :2]
    wide = (abs(knee_y) > abs(foot_xy[..., 1]) + 0.1) & (np.linalg.norm(foot_xy, axis=-1) < 0.4)
    goals = {
        "kneeling": (knee_gap.max(0) < touch) & upright & (seat > 0.1) & (hand_gap.min(0) > touch),
        "lotus": seated & upright & (wide & (knee_gap < 0.25)).all(0),
        "standing": standing,
        "arms-raised": standing & (hand[..., 2] > head.xpos[:, 2]).all(0),
        "splits": seated & (uprightness > 0.5) & (bend > np.radians(-30)).all(0) & apart,
        "hands-on-hips": standing & on_hips.all(0),
        "arms-crossed": standing & past_middle.all(0),
        "one-leg": tall & (foot_gap.min(0) < touch) & (foot_gap.max(0) > 0.1),
    }
    return {task: goal.reshape(qpos.shape[:-1]) for task, goal in goals.items()}


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


# ALGO LOGIC: networks
class MLP(nn.Module):
    """`members` networks evaluated as one: obs (B, 255) [, action (B, 17)] -> (members, B, n_out).

    `scale_obs` holds mean and deviation of the observations, which `SAC.fit` updates once a round;
    with --no-normalize it changes nothing. (A BatchNorm that only `fit` sets to training mode;
    momentum=None makes plain means.) All weights are one parameter: an Adam step, a moving average
    or an average over ranks is one operation. `layers()` cuts it up into views, through which the
    gradient flows.
    """

    def __init__(self, members, action_dim, n_out, hidden, normalize):
        super().__init__()
        self.scale_obs = nn.BatchNorm1d(OBS_DIM, eps=1e-6, momentum=None, affine=False).eval()
        self.members, self.shapes, weights = members, [], []
        for fan_in, fan_out in ((OBS_DIM + action_dim, hidden), (hidden, hidden), (hidden, n_out)):
            shapes = [(members, fan_in, fan_out), (members, 1, fan_out)]  # weight, bias
            weights += [torch.empty(s).uniform_(-(fan_in**-0.5), fan_in**-0.5) for s in shapes]
            if normalize and len(self.shapes) < 2:  # gain and shift of a hidden layer's LayerNorm
                shapes += [(members, 1, hidden)] * 2
                weights += [torch.ones(shapes[2]), torch.zeros(shapes[3])]
            self.shapes.append(shapes)
        self.sizes = [weight.numel() for weight in weights]
        self.weights = nn.Parameter(torch.cat([weight.flatten() for weight in weights]))

    def layers(self):
        """Weight, bias [, LayerNorm's gain and shift] of each layer: views of `weights`."""
        parts = iter(self.weights.split(self.sizes))
        return [[next(parts).view(shape) for shape in shapes] for shapes in self.shapes]

    def forward(self, obs, *action):
        x = torch.cat([self.scale_obs(obs), *action], -1).expand(self.members, -1, -1)
        for i, (weight, bias, *norm) in enumerate(self.layers()):
            x = torch.baddbmm(bias, x, weight)  # (members, B, fan_out)
            if norm:
                x = torch.addcmul(norm[1], F.layer_norm(x, x.shape[-1:]), norm[0])
            x = F.relu(x) if i < 2 else x
        return x


class Actor(MLP):
    """Tanh-squashed Gaussian policy. Its actions, in [-1, 1], are shares of the largest torque."""

    def __init__(self, hidden, normalize):
        super().__init__(1, 0, 2 * ACTION_DIM, hidden, normalize)

    def get_action(self, obs, noise=None):
        """Sampled action (B, 17), its log-probability (B,), and the mean action (B, 17). `noise`
        (B, 17): in place of independent N(0, 1)."""
        mean, log_std = self(obs)[0].chunk(2, -1)
        log_std = 3.5 * torch.tanh(log_std) - 1.5  # in [-5, 2]
        noise = torch.randn_like(mean) if noise is None else noise
        x = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob -= 2 * (math.log(2) - x - F.softplus(-2 * x))  # log(1 - tanh(x)^2), but stable
        return torch.tanh(x), log_prob.sum(-1), torch.tanh(mean)

    @torch.inference_mode()
    def act(self, obs, sample=True, noise=None):
        """Actions (N, 17) for observations (N, 255), both numpy: sampled, or the mean. `noise`: as
        in get_action."""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.weights.device)
        action, _, mean = self.get_action(obs, noise)
        return (action if sample else mean).cpu().numpy()


# ALGO LOGIC: replay buffer and learner
class ReplayBuffer:
    """Ring of whole episodes: obs (E, T+1, 255), actions (E, T, 17), rewards (E, T). `newest`: the
    rows of those that were added last.

    Saving writes only what is new, as one chunk: a million steps are neither a pause nor a copy.
    `on_disk`: episodes to leave there, if more, for epic_vlmrm.py --run.
    """

    def __init__(self, episodes, device, on_disk=0):
        T = EPISODE_LENGTH
        shapes = {"obs": (T + 1, OBS_DIM), "actions": (T, ACTION_DIM), "rewards": (T,)}
        self.data = {key: torch.zeros(episodes, *shapes[key], device=device) for key in shapes}
        self.size, self.total, self.saved = episodes, 0, 0  # total: episodes ever added
        self.on_disk = max(episodes, on_disk)
        self.name = f"replay_{RANK}_"

    def __len__(self):
        return min(self.total, self.size)

    def add(self, **episodes):
        rows = torch.arange(self.total, self.total + len(episodes["rewards"])) % self.size
        for key, values in episodes.items():
            self.data[key][rows] = torch.as_tensor(values).to(self.data[key])
        self.total, self.newest = self.total + len(rows), rows

    def save(self, folder):
        """Write what is new; delete chunks that end `on_disk` episodes before the previous save."""
        previous, self.saved = self.saved, self.total
        rows = torch.arange(max(previous, self.total - self.size), self.total) % self.size
        chunk = {key: ring[rows].cpu() for key, ring in self.data.items()}
        atomic_save(chunk, folder / f"{self.name}{self.total:07d}.pt")
        for path in folder.glob(f"{self.name}*.pt"):
            if int(path.stem.removeprefix(self.name)) <= previous - self.on_disk:
                path.unlink()

    def load(self, folder, total):
        """Read the chunks up to `total`. Later ones, of a run killed before its checkpoint, are
        deleted."""
        for path in sorted(folder.glob(f"{self.name}*.pt")):
            end = int(path.stem.removeprefix(self.name))
            if end > total:
                path.unlink()
                continue
            chunk = load_saved(path, self.data)
            start = end - len(chunk["rewards"])
            whole = start == self.total or start <= total - self.size
            check(whole, f"{folder}: the chunk before {path.name} is missing")
            self.total = start
            self.add(**chunk)
        check(self.total == total, f"{folder}: the replay chunks end before episode {total}")
        self.saved = total


class SAC(nn.Module):
    """Soft actor-critic (Haarnoja et al., 2018). Not theirs: n-step targets, an actor that learns
    from the target critics and is averaged, annealing, mirror images, scales and LayerNorm; and
    the noise it explores with (`explore`)."""

    def __init__(self, args, device):
        super().__init__()
        self.args, self.mirror = args, mirror_image(device) if args.mirror else (None, None)
        size = args.hidden, args.normalize
        self.actor, self.critics = Actor(*size), MLP(2, ACTION_DIM, 1, *size)
        self.scale_reward = nn.BatchNorm1d(1, eps=1e-6, momentum=None, affine=False).eval()
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha).log())
        # the target critics follow the critics slowly, the average actor, which is
        # evaluated and kept, the actor. All networks share one scale
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.average_actor = copy.deepcopy(self.actor).requires_grad_(False)
        for net in (self.critics, self.target_critics, self.average_actor):
            net.scale_obs = self.actor.scale_obs
        self.to(device)
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True)
        self.q_optimizer = adam([self.critics.weights])
        self.actor_optimizer = adam([{"params": [p]} for p in (self.actor.weights, self.log_alpha)])

    def fit(self, rb):
        """The scale of rewards is set once, by the random steps. That of observations follows the
        policy, as the mean over the random steps and every round since: a robot that keeps its
        balance moves far less than one that falls."""
        first = self.scale_reward.num_batches_tracked == 0
        rows = torch.arange(len(rb)) if first else rb.newest
        obs, _, rewards = (ring[rows].flatten(0, 1) for ring in rb.data.values())
        self.actor.scale_obs.train()(obs)
        if first:
            self.scale_reward.train()(rewards[:, None])
        self.eval()
        for scale in (self.actor.scale_obs, self.scale_reward):
            average(scale.running_mean, scale.running_var)  # the ranks' statistics, not joint ones

    def update_critics(self, obs, actions, n_step_rewards, next_obs, discount):
        """A batch of B: obs (B, 255), actions (B, 17), what n steps earned (B,), the obs after them
        and gamma^n (B,). Entropy is left out of these n steps, and nothing corrects for their
        actions being an older policy's."""
        with torch.no_grad():
            next_actions, next_log_prob, _ = self.actor.get_action(next_obs)
            next_q = self.target_critics(next_obs, next_actions).amin(0)[:, 0]
            next_value = next_q - self.log_alpha.exp() * next_log_prob
            target = n_step_rewards + discount * next_value  # (B,); no episode terminates
        q_values = self.critics(obs, actions)[..., 0]  # (2, B)
        qf1_loss, qf2_loss = (q_values - target).square().mean(1)
        self.q_optimizer.zero_grad()
        (qf1_loss + qf2_loss).backward()
        average(self.critics.weights.grad)
        self.q_optimizer.step()
        self.target_critics.weights.lerp_(self.critics.weights.detach(), self.args.tau)
        return {"qf1_values": q_values[0], "qf1_loss": qf1_loss, "qf2_loss": qf2_loss}

    def update_actor(self, obs, target_entropy):
        pi, log_prob, _ = self.actor.get_action(obs)
        # the target critics, an average of some 1 / tau updates: their slope is less noisy
        alpha, qf_pi = self.log_alpha.exp(), self.target_critics(obs, pi).amin(0)[:, 0]
        actor_loss = (alpha.detach() * log_prob - qf_pi).mean()
        alpha_loss = -(alpha * (log_prob.detach() + target_entropy)).mean()
        self.actor_optimizer.zero_grad()
        (actor_loss + alpha_loss).backward()
        average(self.actor.weights.grad, self.log_alpha.grad)
        self.actor_optimizer.step()
        self.average_actor.weights.lerp_(self.actor.weights.detach(), 0.001)  # of some 1000 updates
        return {"actor_loss": actor_loss, "alpha": alpha, "entropy": -log_prob}

    def batches(self, rb):
        """obs, actions, sum of gamma^k rewards of n steps, the obs after them, gamma^steps."""
        args, T = self.args, EPISODE_LENGTH
        obs, actions, rewards = (ring[: len(rb)] for ring in rb.data.values())
        rewards = self.scale_reward(rewards.reshape(-1, 1)).reshape(-1, T)
        n_step_rewards = torch.zeros_like(rewards)  # (E, T)
        for k in range(args.n_step):  # fewer at the end of an episode
            n_step_rewards[:, : T - k] += args.gamma**k * rewards[:, k:]
        batch_size = args.batch_size // WORLD_SIZE
        shape, half = (args.gradient_steps, batch_size), batch_size // 2
        mirror_obs, mirror_action = self.mirror
        randint = functools.partial(torch.randint, size=shape, device=obs.device)
        for e, t in zip(randint(len(rb)), randint(T)):
            after = (t + args.n_step).clamp(max=T)
            batch = obs[e, t], actions[e, t], n_step_rewards[e, t], obs[e, after]  # copies
            for x, mirror in zip(batch, (mirror_obs, mirror_action, None, mirror_obs)):
                if mirror:
                    x[:half] = mirror(x[:half])
            yield *batch, args.gamma ** (after - t)

    def learn(self, rb, progress):
        """A round's updates, after a share `progress` of the run. Returns the last one's losses."""
        args = self.args
        late = args.anneal * max(0.0, 2 * min(progress, 1.0) - 1)  # 0 until half time, then to 1
        # at first it explores, at the end its actions hardly differ: -3 per motor
        target_entropy = (1 - late) * args.target_entropy - 3 * late * ACTION_DIM
        # group 1, the entropy coefficient, keeps its rate: it has to follow the falling target
        for optimizer in (self.q_optimizer, self.actor_optimizer):
            optimizer.param_groups[0]["lr"] = (1 - 0.9 * late) * args.learning_rate
        if args.normalize:
            self.fit(rb)
        for batch in self.batches(rb):
            losses = self.update_critics(*batch)
            losses |= self.update_actor(batch[0], target_entropy)
        return {key: value.mean().item() for key, value in losses.items()}


def average(*tensors):
    """Average all of them over the ranks, in place. The mean gradient of equal shares of a batch is
    the gradient of the batch. As one message, since each costs the same, however short."""
    if WORLD_SIZE > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / WORLD_SIZE).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means):
            tensor.copy_(mean.view_as(tensor))


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


def save_checkpoint(run_dir, rb, parts, counters):
    """Simulators and generators have nothing to save: each round has its own seed. Keeps the last
    two."""
    rb.save(run_dir)
    if WORLD_SIZE > 1:
        dist.barrier()  # every rank has saved its episodes
    if RANK > 0:
        return
    checkpoint = {name: part.state_dict() for name, part in parts.items()} | {"counters": counters}
    atomic_save(checkpoint, run_dir / f"checkpoint_{counters['global_step']:09d}.pt")
    for old in sorted(run_dir.glob("checkpoint_*.pt"))[:-2]:
        old.unlink()


def load_checkpoint(run_dir, rb, parts, counters):
    """The latest one."""
    checkpoints = sorted(run_dir.glob("checkpoint_*.pt"))
    check(checkpoints, f"{run_dir} has no checkpoint to resume from")
    saved = load_saved(checkpoints[-1], [*parts, "counters"])
    ranks = saved["counters"]["ranks"]
    hint = f"start it with torchrun --nproc-per-node {ranks}" if ranks > 1 else "no torchrun"
    made = f"{run_dir} was made by {ranks} ranks, these are {WORLD_SIZE}"
    check(ranks == WORLD_SIZE, f"{made}: {hint}")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    counters.update(saved["counters"])
    rb.load(run_dir, counters["global_step"] // EPISODE_LENGTH // WORLD_SIZE)


# ROLLOUT AND EVALUATION
def collect(envs, policy, seed):
    """One episode: obs (N, T+1, 255), actions (N, T, 17) in [-1, 1], Gymnasium's rewards (N, T),
    the last infos. `policy`: obs (N, 255) -> actions (N, 17)."""
    obs, actions, rewards = [envs.reset(seed=seed)[0]], [], []
    for _ in range(EPISODE_LENGTH):
        actions.append(policy(obs[-1]))
        after, reward, _, _, infos = envs.step(actions[-1] * envs.single_action_space.high)
        obs.append(after)
        rewards.append(reward)
    obs, actions, rewards = (np.stack(steps, axis=1) for steps in (obs, actions, rewards))
    return obs, actions, rewards, infos


def slow_noise(noise, correlation):
    """Noise (N, 17), N(0, 1), that changes slowly: each call moves it on by a step, in place."""
    return noise.mul_(correlation).add_(torch.randn_like(noise), alpha=(1 - correlation**2) ** 0.5)


def random_torques(noise, obs):
    """The policy of the first steps."""
    return torch.tanh(slow_noise(noise, 0.9)).cpu().numpy()


def explore(actor, noise, correlation, obs):
    """The policy in training: the actor's, but with slow noise. Noise drawn anew every 15 ms is
    lost in the robot's inertia (Eberhard et al., 2023: "Pink noise is all you need")."""
    return actor.act(obs, noise=slow_noise(noise, correlation))


def scored_steps(every):
    """Which of an episode's states are scored; the last one, too, so that none is extrapolated."""
    return np.unique([*range(0, EPISODE_LENGTH, every), EPISODE_LENGTH - 1])


def fill_in(scores, scored):
    """Rewards (N, T) of all states, on straight lines between the scores (N, T') of those of
    scored_steps: in so short a time a robot moves little."""
    steps = np.arange(EPISODE_LENGTH)
    return np.stack([np.interp(steps, scored, score) for score in scores])


def success_rate(in_goal):
    """Share of episodes, in_goal (E, T) bool, in the goal state for half of their steps or more
    (paper, section 4.3)."""
    return float((in_goal.mean(1) >= 0.5).mean())


def evaluate(play, policy, episodes, seed):
    """Rewards (E, T), in_goal (E, T) bool and qpos (E, T, 24) of that many episodes."""
    results = []
    while sum(len(rewards) for rewards, _, _ in results) < episodes:
        obs, _, rewards, in_goal = play(policy, seed + 1000 * len(results))
        results.append((rewards, in_goal, obs[:, 1:, : HUMANOID.nq]))
    return [np.concatenate(result)[:episodes] for result in zip(*results)]


def film(painter, qpos, in_goal, path):
    """Episodes (E, T) as a sheet, every tenth frame, and the first four as a video at half speed;
    green edge: in the goal state. Never ends a run."""
    try:
        views = np.moveaxis(painter(qpos), 2, 0)
        frames = np.concatenate(views, axis=3)  # side by side: (E, T, H, V W, 3)
        edge = np.pad(np.zeros(np.subtract(frames.shape[2:4], 6), bool), 3, constant_values=True)
        frames[in_goal[..., None, None] & edge] = (40, 200, 80)
        rows = [np.concatenate(row, axis=1) for row in frames[:, 9::10, ::2, ::2]]
        iio.imwrite(path.with_suffix(".png"), np.concatenate(rows))
        video = np.concatenate(frames[:4], axis=2)
        iio.imwrite(path.with_suffix(".mp4"), video, fps=33, plugin="FFMPEG")
    except Exception as error:
        warn(f"no video: {' '.join(str(error).split())[:200]}")


def final_evaluation(args, run_dir, play, actor, painter):
    """Success and return of the best policy, of doing nothing and of random actions."""
    check((run_dir / "best.pt").is_file(), f"{run_dir} has not reached its first evaluation")
    best = load_saved(run_dir / "best.pt", ("actor", "global_step"))
    actor.load_state_dict(best["actor"])
    many, few = args.eval_episodes, args.select_episodes  # few: enough to see them fail
    policies = {
        "mean action": (many, lambda obs: actor.act(obs, sample=False)),
        "sampled action": (many, actor.act),
        "zero action": (few, lambda obs: np.zeros((len(obs), ACTION_DIM))),
        "random action": (few, lambda obs: 2 * torch.rand(len(obs), ACTION_DIM).numpy() - 1),
    }
    summary, pictures = {"prompt": args.prompt, "task": args.task, "step": best["global_step"]}, []
    print(f"policy of step {best['global_step']}")
    for name, (episodes, policy) in policies.items():
        torch.manual_seed(0)
        rewards, in_goal, qpos = evaluate(play, policy, episodes, 1_000_000)
        summary[name] = row = {"episodes": episodes, "return": float(rewards.sum(1).mean())}
        if args.task:
            row |= {"success_rate": success_rate(in_goal), "share_in_goal": float(in_goal.mean())}
        print(f"{name:15}", "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
        pictures = pictures or [qpos[:6], in_goal[:6]]
    try:
        (run_dir / "eval.json").write_text(json.dumps(summary, indent=2) + "\n")
    except OSError as error:  # a run folder of somebody else's
        warn(f"no eval.json: {error}")
    film(painter, *pictures, run_dir / "eval")
    print(f"wrote {', '.join(map(str, sorted(run_dir.glob('eval.*'))))}")
    return summary


# MAIN
def usable_cores():
    """Cores that this rank may use; in a container, its share of those of the cgroup."""
    cores = torch.get_num_threads()
    if LOCAL_WORLD_SIZE > 1:  # torchrun sets OMP_NUM_THREADS=1
        affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
        cores = len(affinity(0))
    cpu = Path("/sys/fs/cgroup/cpu.max")
    if cpu.is_file() and not cpu.read_text().startswith("max"):
        quota, period = map(int, cpu.read_text().split())
        cores = min(cores, max(1, quota // period))
    return max(1, cores // LOCAL_WORLD_SIZE)


def parse_args(argv):
    """Flags over a preset's, or those of the run to resume or evaluate; and the device to use."""
    word = argv[0] if argv else ""
    argv = argv[1:] if word in PRESETS else argv
    presets = f"A first word, {' or '.join(PRESETS)}, stands for other defaults."
    about = f"{__doc__.splitlines()[0]} {presets}"
    args = tyro.cli(Args, args=argv, default=PRESETS.get(word, Args()), description=about)
    check(not (args.resume and args.evaluate), "give either --resume or --evaluate")
    if run_dir := args.resume or args.evaluate:
        check(Path(run_dir).is_dir(), f"{run_dir}: there is no such folder")
        try:
            saved = json.loads(Path(run_dir, "args.json").read_text())["args"]
            saved = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
            kinds, now = ([(k, type(v)) for k, v in x.items()] for x in (saved, asdict(args)))
            if kinds != now:
                raise ValueError
            saved = Args(**saved)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            check(False, f"{run_dir} is not a run folder of this version: no args.json that fits")
        # tyro would append to the saved prompts, so blank them; a new prompt drops the saved task
        blank = replace(saved, prompt=(), baseline_prompt=(), task="")
        args = tyro.cli(Args, default=blank, args=argv)
        args.task = args.task or (saved.task if args.prompt in ((), saved.prompt) else "")
        args.prompt = args.prompt or saved.prompt
        args.baseline_prompt = args.baseline_prompt or saved.baseline_prompt
        same = (args.hidden, args.normalize) == (saved.hidden, saved.normalize)
        check(same, "--hidden and --normalize are part of the policy: no change")
    if args.reward == "vlm":
        args.baseline_prompt = args.baseline_prompt or ("a humanoid robot",)
        check(args.prompt, 'tell the robot what to do, e.g. --prompt "a humanoid robot kneeling"')
        check(all(p.strip() for p in args.prompt + args.baseline_prompt), "a prompt is empty")
        if args.mirror and re.search(r"\b(left|right)\b", " ".join(args.prompt)):
            warn("the learner exchanges left and right; --no-mirror if the prompt tells them apart")
    args.task = args.task or next((task for task in TASKS if TASKS[task] in args.prompt), "")
    if args.resume:
        changed = [k for k, v in vars(args).items() if k not in MAY_CHANGE and v != vars(saved)[k]]
        changed = ", ".join(changed)
        check(not changed, f"--resume goes on with the run's own flags; changed: {changed}")
        check(args.total_timesteps >= saved.total_timesteps, "--total-timesteps can only be raised")
    may_be_zero = "seed", "image_size", "learning_starts", "clip_alpha", "noise_correlation"
    lowest = dict.fromkeys(may_be_zero, 0) | {"target_entropy": -1e12}
    for key, value in asdict(args).items():
        if type(value) in (int, float):
            ok = lowest.get(key, 1e-12) <= value < math.inf
            check(ok, f"--{key.replace('_', '-')} {value} is too low, or not finite")
    check(args.clip_alpha <= 1, "--clip-alpha must be between 0 and 1")
    check(args.noise_correlation <= 1, "--noise-correlation must be between 0 and 1")
    check(args.gamma < 1 and args.tau <= 1, "--gamma must be below 1, --tau at most 1")
    longest = max(args.n_step, args.score_every)
    check(longest <= EPISODE_LENGTH, f"--n-step, --score-every: {EPISODE_LENGTH} at most")
    room = max(args.batch_size, args.num_envs * EPISODE_LENGTH)
    check(args.buffer_size >= room, f"--buffer-size must be at least {room}")
    learns = args.learning_starts < args.total_timesteps or args.evaluate
    check(learns, "--learning-starts must be below --total-timesteps")
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    device = args.device
    if device == "auto":
        device = next((gpu for gpu in there if there[gpu]()), "cpu")
    check(device == "cpu" or there[device](), f"--device {device}: PyTorch sees no such GPU here")
    if device == "cuda":
        gpus = torch.cuda.device_count()
        check(LOCAL_WORLD_SIZE <= gpus, f"{LOCAL_WORLD_SIZE} ranks, but PyTorch sees {gpus} GPUs")
        torch.cuda.set_device(LOCAL_RANK)
    precision = f"--clip-precision {args.clip_precision} (of {' and '.join(PRESETS)}, too)"
    check(device != "cpu" or args.clip_precision == "fp32", f"{precision} needs a GPU")
    check(args.camera, f"--camera: one or more of {', '.join(CAMERAS)}")
    args.camera = tuple(dict.fromkeys(args.camera))
    trains = device != "mps" and not args.evaluate
    check(WORLD_SIZE == 1 or trains, "torchrun is for training, on CUDA or the CPU")
    for key in ("num_envs", "batch_size", "buffer_size"):
        value, flag = getattr(args, key), f"--{key.replace('_', '-')}"
        check(value % WORLD_SIZE == 0, f"{flag} {value} can't be shared by {WORLD_SIZE} ranks")
    check(args.seed < 2**32, "--seed must be below 2^32")
    good = args.run_name.isprintable() and len(args.run_name) < 100
    check(good, "--run-name must be printable and shorter than 100 characters")
    return args, device


def main(argv=None):
    args, device = parse_args(sys.argv[1:] if argv is None else argv)
    started = [int(time.time())]
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        dist.broadcast_object_list(started)  # one name for all ranks
    name = f"humanoid-{args.task or 'prompt'}__sac_vlmrm__{args.seed}__{started[0]}"
    run_dir = Path(args.resume or args.evaluate or Path("runs", args.run_name or name))
    if RANK == 0 and not (args.resume or args.evaluate):
        check(not run_dir.exists(), f"{run_dir} exists: --resume {run_dir}, or another --run-name")
        parent = next(folder for folder in run_dir.absolute().parents if folder.exists())
        check(parent.is_dir() and os.access(parent, os.W_OK), f"{parent} is not writable")
    torch.manual_seed(args.seed)
    threads = usable_cores()
    torch.set_num_threads(threads)
    clip_reward, size = None, (240, 240)
    if args.reward == "vlm":
        prompts = args.prompt, args.baseline_prompt
        options = args.clip_alpha, device, args.clip_precision, args.reward_batch_size
        clip_reward = CLIPReward(args.clip_model, *prompts, *options)
        size = (args.image_size,) * 2 if args.image_size else clip_reward.image_size
    envs = VLMHumanoid(args.num_envs // WORLD_SIZE, threads)
    look = args.textures, args.camera, threads
    with closing(Painter(size, *look)) as painter, closing(Painter((240, 240), *look)) as filmer:
        print(f"renderer: {painter.name}; task: {args.task or 'not in TASKS, so no success rate'}")
        if "llvmpipe" in painter.name and Path("/dev/nvidiactl").exists():
            warn("the NVIDIA GPU does not draw: in a container, NVIDIA_DRIVER_CAPABILITIES=all is "
                 "missing, elsewhere its EGL vendor file (glvnd/egl_vendor.d)")  # fmt: skip
        return train(args, device, run_dir, envs, painter, filmer, clip_reward)


def stop_on_signals(stopping):
    """Note SIGINT, SIGTERM and SIGHUP in the list `stopping`; returns which it handles."""

    def stop(signum, _):
        stopping.append(signum)
        again = "once more: at once" if WORLD_SIZE == 1 else "torchrun kills after 30 s"
        tqdm.write(f"{signal.Signals(signum).name}: stopping after this round; {again}")
        if WORLD_SIZE == 1:  # torchrun passes on what a terminal has sent to every rank already
            signal.signal(signum, signal.SIG_DFL)

    signals = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]
    signals = [s for s in signals if signal.getsignal(s) != signal.SIG_IGN]  # ignored: by nohup
    for signum in signals:
        signal.signal(signum, stop)
    return signals


def train(args, device, run_dir, envs, painter, filmer, clip_reward):
    """Train, or with --evaluate only evaluate; returns the summary of the final evaluation."""
    sac, stopping = SAC(args, device), []  # main's seed: the same weights on every rank
    clock = []  # when a round began to collect, draw, score and learn, and its end
    scored = scored_steps(args.score_every)
    go_back = f"--resume {run_dir} goes on from the checkpoint before"

    def play(policy, seed):
        """The stages before learning: obs, actions, rewards (N, T), in_goal (N, T) bool."""
        clock[:] = [time.perf_counter()]
        obs, actions, rewards, infos = collect(envs, policy, seed)  # Gymnasium's rewards
        clock.append(time.perf_counter())
        qpos = obs[:, 1:, : HUMANOID.nq]  # reward t is that of the state after action t
        frames = painter(qpos[:, scored]) if clip_reward else None  # (N, T', V, H, W, 3)
        in_goal = goal_states(qpos)[args.task] if args.task else np.zeros(rewards.shape, bool)
        in_goal &= ~infos["unstable"][:, None]
        clock.append(time.perf_counter())
        if clip_reward:
            embeddings = clip_reward.embed_images(frames.reshape(-1, *frames.shape[3:]))
            scores = clip_reward(embeddings).cpu().numpy().reshape(frames.shape[:3])
            rewards = fill_in(scores.mean(-1), scored)  # replace Gymnasium's
        clock.append(time.perf_counter())
        if infos["unstable"].any():
            warn("MuJoCo reset a simulation that blew up; its episode counts as no success, its "
                 "rewards as they are")  # fmt: skip
        finite = np.isfinite(rewards).all() and np.isfinite(obs).all()
        check(finite, f"a reward or an observation is not finite; {go_back}")
        return obs, actions, rewards, in_goal

    if args.evaluate:
        return final_evaluation(args, run_dir, play, sac.average_actor, filmer)
    episodes, on_disk = args.buffer_size // EPISODE_LENGTH, 2000  # for epic_vlmrm.py --run
    try:
        rb = ReplayBuffer(episodes // WORLD_SIZE, device, on_disk // WORLD_SIZE)
    except RuntimeError as error:  # torch's, of the CPU or of a GPU
        sys.exit(f"error: no memory for --buffer-size {args.buffer_size} ({str(error)[:100]})")
    parts = {"sac": sac, "q_optimizer": sac.q_optimizer, "actor_optimizer": sac.actor_optimizer}
    counters = {"global_step": 0, "best_return": -math.inf, "ranks": WORLD_SIZE}
    robots, round_steps = args.num_envs // WORLD_SIZE, args.num_envs * EPISODE_LENGTH
    if args.resume:
        load_checkpoint(run_dir, rb, parts, counters)
    if RANK == 0:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        about = {"args": asdict(args) | {"resume": ""}, "torch": torch.__version__}
        about["mujoco"] = mujoco.__version__
        (run_dir / "args.tmp").write_text(json.dumps(about, indent=2))
        os.replace(run_dir / "args.tmp", run_dir / "args.json")  # on resume: it may have more steps
    if WORLD_SIZE > 1:
        dist.barrier()  # the folder is there
    if not args.resume:
        save_checkpoint(run_dir, rb, parts, counters)  # from now on the run can be resumed
    signals = stop_on_signals(stopping)
    purge_step = counters["global_step"] + 1 if args.resume else None
    writer = SummaryWriter(run_dir, purge_step=purge_step) if RANK == 0 else None
    if writer and not args.resume:
        table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    total, stop_now = args.total_timesteps, False
    bar = {"unit": "step", "dynamic_ncols": True, "disable": RANK > 0}
    progress_bar = tqdm(total=total, initial=counters["global_step"], **bar)

    def log(scalars):
        for key, value in scalars.items() if writer else ():
            writer.add_scalar(key, value, counters["global_step"])

    def log_round(rewards, in_goal, losses):
        shown = {"reward": f"{rewards.mean():.3f}"}
        log({f"losses/{key}": value for key, value in losses.items()})
        log(dict(zip(("time/collect", "time/draw", "time/score", "time/learn"), np.diff(clock))))
        log({"charts/SPS": round_steps / (clock[-1] - clock[0])})
        log({"charts/episodic_return": rewards.sum(1).mean()})
        if args.task:
            log({"charts/success_rate": success_rate(in_goal)})
            shown["success"] = f"{success_rate(in_goal):.0%}"
        progress_bar.set_postfix(shown, refresh=False)
        progress_bar.update(round_steps)

    def keep_best():
        """A short evaluation. Is it the best by luck? Twice as many more episodes decide."""
        policy, few = functools.partial(sac.average_actor.act, sample=False), args.select_episodes
        rewards, in_goal, qpos = evaluate(play, policy, few, 2_000_000)
        if rewards.sum(1).mean() > counters["best_return"]:
            rewards, in_goal, qpos = evaluate(play, policy, 2 * few, 3_000_000)
        if rewards.sum(1).mean() > counters["best_return"]:
            counters["best_return"] = float(rewards.sum(1).mean())
            best = {"actor": sac.average_actor.state_dict(), "global_step": counters["global_step"]}
            atomic_save(best, run_dir / "best.pt")
        # the longer evaluation if there was one: so the curve's highest point is the best policy
        log({"eval/return": rewards.sum(1).mean()})
        log({"eval/success_rate": success_rate(in_goal)} if args.task else {})
        return qpos[:2], in_goal[:2]

    while counters["global_step"] < total and not stop_now:
        # collect, draw, score. A round has a seed of its own, so that a resumed run goes on bit
        # for bit; evaluations have theirs from 1, 2 and 3 million
        round_seed = (args.seed + 1) * 10**9 + counters["global_step"] + RANK * robots
        torch.manual_seed(round_seed)
        noise = torch.randn(robots, ACTION_DIM, device=device)
        policy = functools.partial(explore, sac.actor, noise, args.noise_correlation)
        if counters["global_step"] < args.learning_starts:
            policy = functools.partial(random_torques, noise)
        obs, actions, rewards, in_goal = play(policy, round_seed)
        # learn
        rb.add(obs=obs, actions=actions, rewards=rewards)
        counters["global_step"] = global_step = counters["global_step"] + round_steps
        losses = sac.learn(rb, global_step / total) if global_step >= args.learning_starts else {}
        clock.append(time.perf_counter())
        finite = all(weights.isfinite().all() for weights in sac.parameters())
        check(finite, f"a weight is not finite at step {global_step}; {go_back}")
        # report, before keep_best's evaluation resets the clock, and save
        log_round(rewards, in_goal, losses)
        due = global_step >= total or global_step % args.eval_frequency < round_steps
        pictures = keep_best() if due and losses and RANK == 0 else None  # the others wait below
        signalled = torch.tensor(float(len(stopping)), device=device)
        average(signalled)  # all ranks stop after the same round
        stop_now = signalled.item() > 0
        if due or stop_now:
            if writer:
                writer.flush()
            save_checkpoint(run_dir, rb, parts, counters)
        if pictures:
            film(filmer, *pictures, run_dir / f"video_{global_step:09d}")
    progress_bar.close()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return None
    writer.close()
    if stop_now:
        print(f"stopped at step {counters['global_step']}; go on with --resume {run_dir}")
        return None
    for signum in signals:  # end at once: all is saved, --evaluate can do the rest
        signal.signal(signum, lambda *_: sys.exit(0))
    return final_evaluation(args, run_dir, play, sac.average_actor, filmer)


if __name__ == "__main__":
    sys.stdout, sys.stderr = Patient(sys.stdout), Patient(sys.stderr)
    if RANK > 0:  # rank 0 prints for all; errors are everyone's
        sys.stdout = open(os.devnull, "w")
    try:
        main()
    except RuntimeError as error:
        if WORLD_SIZE == 1 or not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        hint = "its own error stands above, if it had one; --resume goes on from a checkpoint"
        sys.exit(f"error: another rank is lost ({str(error)[:200]}); {hint}")
    except OSError as error:  # a full disk, a folder of somebody else's
        sys.exit(f"error: {error}. What was saved before is whole; mend that, then --resume")
