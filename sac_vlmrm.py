# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "open_clip_torch>=3.3,<4", "gymnasium[mujoco]>=1.2,<2", "tyro>=0.9", "numpy>=2.0",
#                 "tensorboard>=2.18", "tqdm>=4.66", "matplotlib>=3.9", "imageio>=2.36", "imageio-ffmpeg>=0.5"]
# ///
"""Teach the MuJoCo humanoid a pose with one sentence: a vision-language model is the reward, SAC the learner.

Method: Rocamonde et al., "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning", ICLR 2024.

    python sac_vlmrm.py --prompt "a humanoid robot kneeling"          # 2 CPU cores, offline, with the shipped tiny CLIP
    python sac_vlmrm.py paper --prompt "a humanoid robot kneeling"    # the paper's set-up: ViT-bigG-14, 10M steps, GPU
    python sac_vlmrm.py --clip-model ViT-B-32/laion2b_s34b_b79k --prompt "a humanoid robot doing the splits"
    python sac_vlmrm.py --evaluate runs/RUN_NAME                            # 100 episodes, success rate, video
    python sac_vlmrm.py --resume runs/RUN_NAME                              # go on after a crash or Ctrl-C

The default reward model, tiny_clip/, was trained on pictures of this very simulator. It shows the method at work on
a laptop; it is not a zero-shot model. Any model that open_clip loads can take its place (--clip-model).

A round of the main loop (Algorithm 1 of the paper):
    collect  one whole episode in every environment, frames kept aside
    score    embed all frames with CLIP in batches, compute the goal-baseline reward, write it into the replay buffer
    learn    gradient steps on the relabelled buffer
"""

import copy
import json
import multiprocessing.connection
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch  # before anything makes an EGL renderer: the other order segfaults when torchvision is imported

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import open_clip
import torch.nn as nn
import torch.nn.functional as F
import tyro

try:
    import mujoco
except Exception as error:  # it loads OpenGL the way MUJOCO_GL says
    raise SystemExit(f"error: MUJOCO_GL={os.environ.get('MUJOCO_GL')} does not work here ({error}); unset it")
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
EPISODE_LENGTH = 100  # steps of 15 ms; every episode runs to its end (paper, section 4.3)


@dataclass
class Args:
    # what to learn
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """what the robot should do, e.g. "a humanoid robot kneeling"; given several times, the embeddings are averaged"""
    baseline_prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """what it looks like anyway (used when --clip-alpha > 0); "a humanoid robot" if not given"""
    clip_alpha: float = 0.0  # strength of the goal-baseline regularisation, 0 (plain CLIP reward) to 1
    clip_model: str = "local-dir:tiny_clip"
    """NAME/TAG, NAME/weights.pt, hf-hub:ORG/REPO or local-dir:FOLDER, as open_clip knows them"""
    clip_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """precision of the image tower; bf16 and fp16 need a GPU. The reward itself is always fp32"""
    reward_batch_size: int = 50  # frames per forward pass of the image tower; more on a GPU
    reward: Literal["vlm", "ground-truth"] = "vlm"
    """ground-truth: Gymnasium's own Humanoid reward, which pays for running; a reference for the learner"""
    task: str = ""  # whose success to report (see TASKS); if not given, recognised from the prompt. Not for the learner

    # the picture
    textures: Literal["modified", "original"] = "modified"  # modified: realistic sky, floor and robot (paper, Fig. 3)
    camera: Literal["modified", "original"] = "modified"
    """modified: fixed, in front of the robot, slightly angled down (paper, Fig. 3)"""
    shadows: bool = False  # cast shadows; costs a factor of 3 to 5 on a software renderer
    image_size: int = 0  # rendered height and width in pixels; 0: the size the VLM takes

    # the run
    seed: int = 1  # of everything random
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA if there is one, else MPS, else the CPU
    run_name: str = ""  # folder below runs/; made from task, seed and time if not given
    track: bool = False  # also log to Weights & Biases (needs wandb)
    wandb_project_name: str = "vlmrm"
    resume: str = ""  # run folder to go on with; takes its flags, only --total-timesteps may be raised
    evaluate: str = ""  # run folder whose best policy to evaluate
    eval_episodes: int = 100  # episodes of the final evaluation
    eval_frequency: int = 10_000
    """steps between checkpoints, each with a short evaluation of the mean action that decides the best policy"""
    select_episodes: int = 8  # episodes of that short evaluation; a new best must win on twice as many more

    # SAC
    total_timesteps: int = 80_000  # of all environments together
    num_envs: int = 8  # each in a process of its own
    learning_starts: int = 5000  # steps of random, time-correlated actions before the first gradient step
    exploring_share: float = 0.25
    """share of the environments, rounded down, where a random joint, or it and its twin, is held at a random torque"""
    gradient_steps: int = 400  # updates per round (one episode of every environment)
    buffer_size: int = 200_000
    batch_size: int = 128
    gamma: float = 0.98  # sees 50 steps ahead; with the paper's 0.95, 20, the robot learns to balance more slowly
    n_step: int = 5  # rewards summed up before the critic's estimate takes over; 1 is plain SAC, and balances far later
    tau: float = 0.005
    policy_lr: float = 6e-4
    q_lr: float = 6e-4
    policy_frequency: int = 1  # critic updates per actor update
    alpha: float = 0.1  # entropy coefficient to start from; it is tuned automatically
    target_entropy: float = -17.0
    """the entropy it is tuned to, for the first half of training (SAC's usual choice: minus the number of actions)"""
    final_target_entropy: float = -51.0
    """and at the end, falling over the second half: explore first, then make the mean action good on its own"""
    anneal_lr: bool = True  # learning rates fall to a tenth over the second half, so that the policy comes to rest
    standardize: bool = True  # scale observations and rewards to mean 0, deviation 1 over the random warm-up steps
    layer_norm: bool = True  # LayerNorm in actor and critics
    mirror: bool = True
    """learn half of every batch with left and right exchanged; turn off for a prompt that tells left from right"""


# The paper's set-up (its appendix C), chosen by the word `paper` as the first argument. Four GPUs with 8 environments
# each became one process with 32.
PAPER = Args(
    clip_model="ViT-bigG-14/laion2b_s39b_b160k", clip_precision="bf16", reward_batch_size=800,
    total_timesteps=10_000_000, num_envs=32, learning_starts=50_000, exploring_share=0.0, gradient_steps=100,
    buffer_size=1_000_000, batch_size=512, gamma=0.95, n_step=1, eval_frequency=128_000, alpha=1.0,
    final_target_entropy=-17.0, anneal_lr=False, standardize=False, layer_norm=False, mirror=False,
)  # fmt: skip


def check(ok, message):
    """End the program with one clear line if a user's input is not usable."""
    if not ok:
        raise SystemExit(f"error: {message}")


# ENVIRONMENT: what the camera sees
def modify_textures(spec):
    """Give Gymnasium's humanoid a sky, a wooden floor and a robot's shell. Colours only: bodies stay as they are."""
    rng = np.random.default_rng(0)
    for item in [*spec.textures, *spec.materials]:
        spec.delete(item)
    spec.add_texture(
        name="sky", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
        rgb1=[0.35, 0.55, 0.85], rgb2=[0.85, 0.90, 0.95], width=128, height=128,
    )  # fmt: skip
    size, planks = 256, 8
    height = size // planks
    grain = rng.uniform(0.9, 1.1, (size, 4)).repeat(size // 4, 1)  # stretched along the planks
    wood = rng.uniform(0.85, 1.1, planks).repeat(height)[:, None] * grain
    wood[::height] *= 0.55  # the gaps between planks, and the two ends of each
    for row, end in enumerate(rng.integers(0, size, planks)):
        wood[row * height : (row + 1) * height, end] *= 0.6
    wood = np.clip(wood[..., None] * [168, 122, 82], 0, 255).astype(np.uint8)
    texture = spec.add_texture(name="wood", type=mujoco.mjtTexture.mjTEXTURE_2D, width=size, height=size, nchannel=3)
    texture.data = wood.tobytes()
    floor = spec.add_material(name="floor", texrepeat=[0.5, 0.5], texuniform=True)
    floor.reflectance = 0.4  # polished: the gap to its mirror image shows whether a knee or a foot touches the floor
    floor.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "wood"
    shell, joint = [0.92, 0.93, 0.95, 1], [0.22, 0.24, 0.28, 1]
    face, grip = [0.15, 0.35, 0.65, 1], [0.95, 0.55, 0.15, 1]
    spec.add_material(name="metal", specular=0.4, shininess=0.6)
    for geom in spec.geoms:
        name = geom.name
        geom.material, geom.rgba = ("floor", [1, 1, 1, 1]) if name == "floor" else ("metal", joint)
        if name in ("torso1", "butt") or "thigh" in name or "uarm" in name:
            geom.rgba = shell
        elif name == "head":
            geom.rgba = face
        elif "hand" in name or "foot" in name:
            geom.rgba = grip
    spec.visual.headlight.ambient, spec.visual.headlight.diffuse = [0.35] * 3, [0.25] * 3
    sun = spec.lights[0]
    sun.dir, sun.pos, sun.diffuse = [-0.4, 0.3, -1], [1, -1, 4], [0.7] * 3


MODIFIED_CAMERA = {"type": mujoco.mjtCamera.mjCAMERA_FREE, "trackbodyid": -1, "distance": 3.5,
                   "lookat": np.array([0.0, 0.0, 1.0]), "elevation": -10.0, "azimuth": 180.0}  # fmt: skip


class VLMHumanoid(HumanoidEnv):
    """Gymnasium's Humanoid-v5 as the paper uses it: modified look, fixed camera, no early termination.

    Observation (255,): qpos (24) and qvel (23), x and y included because the fixed camera makes the reward depend on
    them; then inertia (10) and velocity (6) of each of the 13 bodies about the robot's centre of mass, along the axes
    of the world: without them it is slow to learn to balance.
    `info["success"]` says whether the robot is in the task's goal state; the learner never sees it. With image_size 0
    nothing is drawn, and a frame is one black pixel.
    """

    def __init__(self, image_size, textures="modified", camera="modified", shadows=False, task=""):
        self.textures, self.shadows, self.in_goal_state = textures, shadows, TASKS.get(task)
        super().__init__(
            render_mode="rgb_array", width=image_size, height=image_size, terminate_when_unhealthy=False,
            default_camera_config=MODIFIED_CAMERA, camera_id=-1 if camera == "modified" else 0,  # 0: tracking
            exclude_current_positions_from_observation=False, include_qfrc_actuator_in_observation=False,
            include_cfrc_ext_in_observation=False,
        )  # fmt: skip

    def _initialize_simulation(self):
        spec = mujoco.MjSpec.from_file(self.fullpath)
        if self.textures == "modified":
            modify_textures(spec)
        spec.geom("floor").size[2] = 5  # spacing of the drawn grid: 0.125 means tens of thousands of lit quads
        spec.visual.quality.offsamples = 0  # 4x MSAA is wasted on a frame that CLIP blurs anyway
        spec.visual.quality.numslices, spec.visual.quality.numstacks = 12, 8  # 28 and 16 cost half of the frame rate
        spec.visual.quality.shadowsize = 512 if self.shadows else 0
        for light in spec.lights:
            light.castshadow = self.shadows
        model = spec.compile()
        model.vis.global_.offwidth = model.vis.global_.offheight = self.width
        return model, mujoco.MjData(model)

    def step(self, action):
        obs, reward, _, _, _ = super().step(action)
        lagging = self.data.xipos.copy()
        mujoco.mj_kinematics(self.model, self.data)  # mj_step leaves the body positions one substep behind qpos
        self.data.xipos[:] = lagging  # Gymnasium's own reward takes the robot's speed from these
        success = self.in_goal_state is not None and bool(self.in_goal_state(self.data))
        return obs, float(reward), False, False, {"success": success}

    def render(self):
        if not self.width:
            return np.zeros((1, 1, 3), dtype=np.uint8)
        self.mujoco_renderer._get_viewer("rgb_array").make_context_current()  # another one in this process may hold it
        return super().render()

    def close(self):
        viewers = self.mujoco_renderer._viewers
        while viewers:
            viewer = viewers.popitem()[1]
            viewer.make_context_current()  # freed in another's context, it would delete that one's textures
            viewer.con.free()
            viewer.close()

    def render_state(self, qpos):
        """Frame (H, W, 3) uint8 of the robot at rest in qpos (24,)."""
        self.set_state(np.asarray(qpos, dtype=np.float64), np.zeros(self.model.nv))
        return self.render()


def mirror_image():
    """Index and sign, of an observation (255,) and of an action (17,): `x[..., index] * sign` is the mirrored robot's.

    The humanoid is symmetric but for the spring of one knee and the armature of one hip, both small; the camera looks
    along the plane of symmetry, so it sees the mirrored robot in the mirrored frame (but for the grain of the floor).
    """
    model = HumanoidEnv().model
    joints = [model.joint(i).name for i in range(1, model.njnt)]  # after the free one
    motors = [model.actuator(i).name for i in range(model.nu)]  # named like their joints, in another order
    bodies = [model.body(i).name for i in range(1, model.nbody)]  # after the world
    twin = {n: n.replace("left", "right") if "left" in n else n.replace("right", "left") for n in joints + bodies}
    # mirrored at y = 0, a rotation about (x, y, z) is one about (-x, y, -z)
    turn = {n: round(model.joint(n).axis * [-1, 1, -1] @ model.joint(twin[n]).axis) for n in joints}
    order, signs = [joints.index(twin[n]) for n in joints], [turn[n] for n in joints]
    obs_index = [*range(7), *(7 + i for i in order), *range(24, 30), *(30 + i for i in order)]
    obs_sign = [1, -1, 1, 1, -1, 1, -1, *signs, 1, -1, 1, -1, 1, -1, *signs]  # position, quaternion; both velocities
    # of each body: inertia (xx, yy, zz, xy, xz, yz), mass times position, mass; then rotational and linear velocity
    for of_body in ([1, 1, 1, -1, 1, -1, 1, -1, 1, 1], [-1, 1, -1, 1, -1, 1]):
        start, size = len(obs_sign), len(of_body)
        obs_index += [start + size * bodies.index(twin[n]) + i for n in bodies for i in range(size)]
        obs_sign += of_body * len(bodies)
    return (obs_index, obs_sign), ([motors.index(twin[n]) for n in motors], [turn[n] for n in motors])


def make_env(*env_args):
    def thunk():
        if multiprocessing.parent_process():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
        env = gym.wrappers.TimeLimit(VLMHumanoid(*env_args), EPISODE_LENGTH)  # truncates, never terminates
        return gym.wrappers.AddRenderObservation(env, render_only=False)

    return thunk


# Success, decided by geometry (paper, Table 2). Heights and distances in metres. A body part touches the floor when its
# lowest point is within 2 cm of it: contacts of a rigid robot chatter from step to step, clearances do not.
TOUCH = 0.02
RADIUS = {"foot": 0.075, "hand": 0.04, "shin": 0.049, "head": 0.09, "butt": 0.09}  # of the model's spheres and capsules


def clearance(data, part, side=""):
    """Height of the lowest point of a part above the floor. The knee is the upper end of the shin."""
    if part == "knee":
        return data.body(f"{side}_shin").xpos[2] - RADIUS["shin"]
    geom = data.geom(f"{side}_{part}" if side else part)
    half_length = 0.07 if part == "butt" else 0.0  # a capsule lying along its own z axis
    return geom.xpos[2] - half_length * abs(geom.xmat[8]) - RADIUS[part]


def touching(data, part):
    """How many of the two feet, knees or hands touch the floor."""
    return sum(clearance(data, part, side) < TOUCH for side in ("left", "right"))


def upright(data):
    """Cosine between the torso's axis and the vertical."""
    return data.body("torso").xmat[8]


def seen_from(data, body, part):
    """Position of a hand, foot (geoms) or shin (its body: the knee) in a body's frame: x forward, y left, z up."""
    position = data.body(part).xpos if part.endswith("shin") else data.geom(part).xpos
    return data.body(body).xmat.reshape(3, 3).T @ (position - data.body(body).xpos)


def is_kneeling(data):
    """Both knees on the floor, torso within 37 degrees of upright, not sitting on the floor, not on all fours."""
    off_the_floor = clearance(data, "butt") > 0.1 and not touching(data, "hand")
    return touching(data, "knee") == 2 and upright(data) > 0.8 and off_the_floor


def is_tall(data):
    """On its legs: torso upright (37 degrees) and above 1.1 m (1.28 m with straight legs), knees off the floor."""
    return upright(data) > 0.8 and data.body("torso").xpos[2] > 1.1 and not touching(data, "knee")


def is_standing(data):
    return is_tall(data) and touching(data, "foot") == 2


def is_arms_raised(data):
    """Standing, both hands above the centre of the head."""
    head = data.geom("head").xpos[2]
    return is_standing(data) and all(data.geom(f"{side}_hand").xpos[2] > head for side in ("left", "right"))


def is_hands_on_hips(data):
    """Standing, each hand within 12 cm of where it would rest on the hips: beside and above the hip joint."""
    return is_standing(data) and all(
        np.linalg.norm(seen_from(data, "pelvis", f"{side}_hand") - [0, sign * 0.2, 0.08]) < 0.12
        for side, sign in (("left", 1), ("right", -1))
    )


def is_arms_crossed(data):
    """Standing, each hand at least 5 cm past the middle of the chest and in front of it (the joints allow 14 cm)."""
    left, right = seen_from(data, "torso", "left_hand"), seen_from(data, "torso", "right_hand")
    in_front = all(hand[0] > 0.05 and abs(hand[2]) < 0.25 for hand in (left, right))
    return is_standing(data) and left[1] < -0.05 and right[1] > 0.05 and in_front


def is_on_one_leg(data):
    """Tall, one foot on the floor, the other at least 10 cm above it."""
    feet = sorted(clearance(data, "foot", side) for side in ("left", "right"))
    return is_tall(data) and feet[0] < TOUCH and feet[1] > 0.1


def is_side_splits(data):
    """Seated with both feet on the floor, knees within 30 degrees of straight, thighs at least 90 degrees apart.

    Turned alike, the hip joints open the thighs to 123 degrees, so a textbook 180 is out of reach. (With one thigh to
    the front and one to the back they reach 167.)
    """
    thighs = [data.body(f"{side}_shin").xpos - data.body(f"{side}_thigh").xpos for side in ("left", "right")]
    cosine = thighs[0] @ thighs[1] / (np.linalg.norm(thighs[0]) * np.linalg.norm(thighs[1]))
    straight = all(data.joint(f"{side}_knee").qpos[0] > np.radians(-30) for side in ("left", "right"))
    seated = clearance(data, "butt") < 0.05 and upright(data) > 0.5
    return seated and touching(data, "foot") == 2 and straight and cosine < 0


def is_lotus(data):
    """Seated upright, knees low and wider than the feet by 10 cm on each side, feet on the floor and drawn in.

    The shin folds only in the thigh's plane, so crossed shins flat on the floor are out of reach: seated with the feet
    together the knees stay 17 to 24 cm above the floor.
    """
    knees = [seen_from(data, "pelvis", f"{side}_shin") for side in ("left", "right")]
    feet = [seen_from(data, "pelvis", f"{side}_foot") for side in ("left", "right")]
    drawn_in = all(abs(k[1]) > abs(f[1]) + 0.1 and np.linalg.norm(f[:2]) < 0.4 for k, f in zip(knees, feet))
    low = all(clearance(data, "knee", side) < 0.25 for side in ("left", "right"))
    seated = clearance(data, "butt") < 0.05 and upright(data) > 0.8
    return seated and low and touching(data, "foot") == 2 and drawn_in


TASKS = {"kneeling": is_kneeling, "lotus": is_lotus, "standing": is_standing, "arms-raised": is_arms_raised,
         "splits": is_side_splits, "hands-on-hips": is_hands_on_hips, "arms-crossed": is_arms_crossed,
         "one-leg": is_on_one_leg}  # fmt: skip
TASK_PROMPTS = {  # Table 3 of the paper
    "a humanoid robot kneeling": "kneeling",
    "a humanoid robot seated down, meditating in the lotus position": "lotus",
    "a humanoid robot standing up": "standing",
    "a humanoid robot standing up, with both arms raised": "arms-raised",
    "a humanoid robot practicing gymnastics, doing the side splits": "splits",
    "a humanoid robot standing up with hands on hips": "hands-on-hips",
    "a humanoid robot standing up, with its arms crossed": "arms-crossed",
    "a humanoid robot standing up on one leg": "one-leg",
}


def pick_gl_backend():
    """Set MUJOCO_GL to a backend that works on this machine, if the user did not, and say who draws."""
    asked = os.environ.get("MUJOCO_GL")
    headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
    probe = ("import mujoco; context = mujoco.GLContext(8, 8); context.make_current(); from OpenGL import GL;"
             "print('renderer:', GL.glGetString(GL.GL_RENDERER).decode())")  # fmt: skip
    for backend in [asked] if asked else ["egl", "osmesa"] if headless else ["glfw", "egl", "osmesa"]:
        # in a process of its own: a failed import of one backend spoils the next, and a bad driver may crash
        environ = {**os.environ, "MUJOCO_GL": backend}
        result = subprocess.run([sys.executable, "-c", probe], env=environ, capture_output=True, text=True)
        if result.returncode == 0 and "renderer:" in result.stdout:
            os.environ["MUJOCO_GL"] = backend
            renderer = result.stdout.split("renderer:")[1].strip()
            software = any(word in renderer.lower() for word in ("llvmpipe", "softpipe", "swrast", "swiftshader"))
            note = ": a software rasteriser, a GPU would draw many times faster" if software else ""
            return f"{renderer} through {backend}{note}"
    check(not asked, f"MUJOCO_GL={asked} does not work here; unset it, or try egl, osmesa or glfw")
    check(False, "no OpenGL for offscreen rendering; on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri")


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


# ALGO LOGIC: networks
class Standardize(nn.Module):
    """Subtracts a mean and divides by a deviation that are set once, from the warm-up steps."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, x):
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0).clamp(min=1e-3))

    def forward(self, x):
        return (x - self.mean) / self.std


def hidden_layers(in_dim, layer_norm):
    norm = nn.LayerNorm if layer_norm else nn.Identity
    relu = nn.ReLU(inplace=True)  # fewer allocations: a tenth of the update's time on a CPU
    return [nn.Linear(in_dim, 256), norm(256), relu, nn.Linear(256, 256), norm(256), relu]


class SoftQNetwork(nn.Module):
    """Critic: obs (B, O), action (B, A) -> value (B,)."""

    def __init__(self, obs_dim, action_dim, layer_norm):
        super().__init__()
        self.net = nn.Sequential(*hidden_layers(obs_dim + action_dim, layer_norm), nn.Linear(256, 1))

    def forward(self, obs, action):
        return self.net(torch.cat([obs, action], -1)).squeeze(-1)


class Actor(nn.Module):
    """Tanh-squashed Gaussian policy; the action is in [-1, 1] and is scaled to the joints' torques by `rollout`."""

    def __init__(self, obs_dim, action_dim, layer_norm):
        super().__init__()
        self.net = nn.Sequential(*hidden_layers(obs_dim, layer_norm))
        self.fc_mean = nn.Linear(256, action_dim)
        self.fc_logstd = nn.Linear(256, action_dim)

    def forward(self, obs):
        h = self.net(obs)
        return self.fc_mean(h), -5 + 3.5 * (torch.tanh(self.fc_logstd(h)) + 1)  # log std in [-5, 2]

    def get_action(self, obs):
        """Sampled action (B, A) and its log-probability (B,)."""
        mean, log_std = self(obs)
        noise = torch.randn_like(mean)
        x = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.9189385  # log sqrt(2 pi)
        log_prob = log_prob - 2 * (0.6931472 - x - F.softplus(-2 * x))  # log(1 - tanh(x)^2), stable for large |x|
        return torch.tanh(x), log_prob.sum(-1)

    def mean_action(self, obs):
        return torch.tanh(self(obs)[0])


@torch.inference_mode()
def act(policy, standardize, obs):
    """Actions (N, 17) of a policy, as numpy."""
    return policy(standardize(torch.as_tensor(obs, device=standardize.mean.device))).cpu().numpy()


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


class ReplayBuffer:
    """Ring buffer of transitions. Saving appends what is new since the last time as one chunk file, so that a million
    transitions are neither a pause nor a second copy in memory; chunks that the ring has overwritten are deleted.

    It holds whole rounds: one episode of every environment, all first steps, then all second steps, and so on.
    """

    def __init__(self, size, num_envs, obs_dim, action_dim, device):
        size -= size % (num_envs * EPISODE_LENGTH)
        self.size, self.num_envs, self.total, self.saved = size, num_envs, 0, 0  # total: transitions ever added
        shapes = {"obs": (obs_dim,), "actions": (action_dim,), "next_obs": (obs_dim,), "rewards": ()}
        self.data = {key: torch.zeros(size, *shape, device=device) for key, shape in shapes.items()}

    def __len__(self):
        return min(self.total, self.size)

    def add(self, **transitions):
        rows = torch.arange(self.total, self.total + len(transitions["rewards"])) % self.size
        for key, values in transitions.items():
            self.data[key][rows] = torch.as_tensor(values, dtype=torch.float32, device=self.data[key].device)
        self.total += len(rows)

    def batch(self, rows, n_step, gamma):
        """The transitions of these rows (B,): each with the rewards (B, n_step) from there on, the next_obs after them.

        `discounts` (B, n_step) are those of the rewards, 0 beyond the end of the episode; `bootstrap` (B,) that of the
        value of next_obs.
        """
        left = EPISODE_LENGTH - rows[:, None] // self.num_envs % EPISODE_LENGTH  # (B, 1) steps to the episode's end
        ahead = torch.arange(n_step, device=rows.device)
        later = rows[:, None] + self.num_envs * torch.minimum(ahead, left - 1)  # (B, n_step)
        batch = {"obs": self.data["obs"][rows], "actions": self.data["actions"][rows],
                 "next_obs": self.data["next_obs"][later[:, -1]], "rewards": self.data["rewards"][later]}  # fmt: skip
        discounts, bootstrap = gamma**ahead * (ahead < left), gamma ** left[:, 0].clamp(max=n_step)
        return batch | {"discounts": discounts, "bootstrap": bootstrap}

    def save(self, folder, previous_total):
        """Append a chunk. `previous_total`: that of the older checkpoint, which must stay loadable."""
        rows = torch.arange(max(self.saved, self.total - self.size), self.total) % self.size
        chunk = {key: values[rows].cpu() for key, values in self.data.items()}
        atomic_save(chunk, folder / f"replay_{self.saved:09d}_{self.total:09d}.pt")
        self.saved = self.total
        for old in folder.glob("replay_*.pt"):
            if int(old.stem.split("_")[2]) <= previous_total - self.size:
                old.unlink()

    def load(self, folder, total):
        """Read the chunks up to `total`; later ones, of a run killed before its checkpoint, are removed."""
        for path in sorted(folder.glob("replay_*.pt")):
            stop = int(path.stem.split("_")[2])
            if stop > total:
                path.unlink()
                continue
            before = f"remove it and checkpoint_{stop:09d}.pt to go on from the checkpoint before"
            chunk = load_saved(path, self.data, before)
            self.total = stop - len(chunk["rewards"])
            self.add(**chunk)
        check(self.total == total, f"{folder}: the replay chunks end at step {self.total}, the checkpoint at {total}")
        self.saved = self.total


# EVALUATION
def rollout(envs, policy, seeds):
    """One whole episode in every environment, reset together. `policy`: obs (N, 255) fp32 -> actions (N, 17).

    Returns arrays with leading axes (T, N): obs, actions, next_obs, env_rewards (Gymnasium's own), success (bool), and
    frames (T, N, H, W, 3) uint8, what the camera sees after the step.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the policy's idle threads would spin on the cores that the environments need
    states, _ = envs.reset(seed=seeds)
    obs = states["state"].astype(np.float32)
    steps = {"obs": [], "actions": [], "next_obs": [], "env_rewards": [], "success": []}
    frames = np.empty((EPISODE_LENGTH, *states["pixels"].shape), dtype=np.uint8)
    for t in range(EPISODE_LENGTH):
        actions = policy(obs)
        states, env_rewards, _, _, infos = envs.step(actions * envs.single_action_space.high)
        next_obs = states["state"].astype(np.float32)
        frames[t] = states["pixels"]
        for key, value in zip(steps, (obs, actions, next_obs, env_rewards, infos["success"])):
            steps[key].append(value)
        obs = next_obs
    torch.set_num_threads(threads)
    return {key: np.stack(values) for key, values in steps.items()} | {"frames": frames}


def evaluate(envs, policy, score, episodes, seed):
    """Run episodes. Returns arrays with leading axis (E,): returns, success (E, T) bool, qpos (E, T, 24)."""
    parts = []
    for first in range(0, episodes, envs.num_envs):
        steps = rollout(envs, policy, [seed + first + i for i in range(envs.num_envs)])
        parts.append((score(steps).sum(0), steps["success"].T, steps["next_obs"][..., :24].swapaxes(0, 1)))
    returns, success, qpos = (np.concatenate(part)[:episodes] for part in zip(*parts))
    return {"returns": returns, "success": success, "qpos": qpos}


def success_rate(success):
    """Share of episodes in the goal state for at least half of their steps (paper, section 4.3); (E, T) bool."""
    return float((success.mean(1) >= 0.5).mean())


def film(args, result, episodes, every, size):
    """Frames (E, T / every, size, size, 3) of the first episodes, with shadows, edged in green in the goal state."""
    camera = VLMHumanoid(size, args.textures, args.camera, shadows=True)
    shown = np.s_[:episodes, every - 1 :: every]
    frames = np.stack([[camera.render_state(qpos).copy() for qpos in episode] for episode in result["qpos"][shown]])
    camera.close()
    edge = np.ones((size, size), dtype=bool)
    edge[3:-3, 3:-3] = False
    frames[result["success"][shown][..., None, None] & edge] = (40, 200, 80)
    return frames


def write_video(path, frames):
    """Episodes side by side, at half speed. frames: (E, T, H, W, 3)."""
    episodes, steps, height, width, _ = frames.shape
    iio.imwrite(path, frames.transpose(1, 2, 0, 3, 4).reshape(steps, height, episodes * width, 3), fps=33)


def final_evaluation(args, run_dir, envs, score, actor, standardize):
    """Success and return of the best policy, of doing nothing and of random actions; json, video, contact sheet."""
    check((run_dir / "best.pt").is_file(), f"{run_dir} has no best.pt: it has not reached its first evaluation")
    best = load_saved(run_dir / "best.pt", ("actor", "standardize", "global_step"), "a --resume may write it anew")
    actor.load_state_dict(best["actor"])
    standardize.load_state_dict(best["standardize"])
    shape = (envs.num_envs, envs.single_action_space.shape[0])
    enough = -(-args.eval_episodes // 4)  # to see that doing nothing, or anything, fails
    policies = {
        "mean action": (lambda obs: act(actor.mean_action, standardize, obs), args.eval_episodes),
        "sampled action": (lambda obs: act(lambda x: actor.get_action(x)[0], standardize, obs), args.eval_episodes),
        "zero action": (lambda obs: np.zeros(shape, dtype=np.float32), enough),
        "random action": (lambda obs: torch.rand(shape).numpy() * 2 - 1, enough),
    }
    summary = {"prompt": args.prompt, "task": args.task, "step": best["global_step"]}
    print(f"policy of step {best['global_step']}")
    for name, (policy, episodes) in policies.items():
        torch.manual_seed(0)
        result = evaluate(envs, policy, score, episodes, seed=1_000_000)
        row = {"episodes": episodes, "return": float(result["returns"].mean())}
        if args.task:
            row |= {"success_rate": success_rate(result["success"]), "share_in_goal": float(result["success"].mean())}
        print(f"{name:15}", "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
        summary[name] = row
        if name == "mean action":
            write_video(run_dir / "eval.mp4", film(args, result, episodes=4, every=1, size=240))
            sheet = film(args, result, episodes=6, every=10, size=120)  # a row per episode
            iio.imwrite(run_dir / "eval.png", np.concatenate([np.concatenate(row, axis=1) for row in sheet]))
    (run_dir / "eval.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"wrote {run_dir}/eval.json, eval.mp4 and eval.png")
    return summary


def plot_curves(history, path):
    """Return and success of the training episodes against steps, one point per round."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    steps, *curves = np.transpose(history)
    titles = "return per episode", "success rate, sampled actions"
    for axis, title, curve in zip(figure.subplots(1, 2), titles, curves):
        axis.plot(steps / 1000, curve, linewidth=0.8)
        axis.set(xlabel="thousand steps", title=title)
    figure.savefig(path, dpi=120)


def parse_args(argv):
    """Flags from the command line: the defaults, the paper's set-up, or those of the run to resume or evaluate."""
    default, argv = (PAPER, argv[1:]) if argv[:1] == ["paper"] else (Args(), argv)
    args = tyro.cli(Args, default=default, args=argv)
    check(not (args.resume and args.evaluate), "give either --resume or --evaluate")
    if args.resume or args.evaluate:
        run_dir = Path(args.resume or args.evaluate)
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
    if args.reward == "vlm":
        args.baseline_prompt = args.baseline_prompt or ("a humanoid robot",)
        check(args.prompt, 'tell the robot what to do, e.g. --prompt "a humanoid robot kneeling"')
        check(all(prompt.strip() for prompt in args.prompt + args.baseline_prompt), "a prompt is empty")
    args.task = args.task or next((TASK_PROMPTS[prompt] for prompt in args.prompt if prompt in TASK_PROMPTS), "")
    check(not args.task or args.task in TASKS, f"--task {args.task}: unknown; one of {', '.join(TASKS)}")
    check(0 <= args.clip_alpha <= 1, f"--clip-alpha {args.clip_alpha} is not between 0 and 1")
    may_be_zero = ("seed", "image_size", "learning_starts", "exploring_share")
    for key, value in asdict(args).items():
        if type(value) in (int, float) and "entropy" not in key and key != "clip_alpha":
            low, wanted = (0, "at least 0") if key in may_be_zero else (1e-12, "positive")
            check(low <= value < float("inf"), f"--{key.replace('_', '-')} must be {wanted}")
    check(args.gamma < 1 and args.tau <= 1, "--gamma must be below 1, --tau at most 1")
    check(args.batch_size <= args.buffer_size, "--batch-size is larger than --buffer-size")
    check(args.exploring_share < 1, "--exploring-share must be below 1, to leave an environment to the policy alone")
    check(args.num_envs * EPISODE_LENGTH <= args.buffer_size, "--buffer-size is below one episode of every environment")
    enough = args.evaluate or args.learning_starts < args.total_timesteps
    check(enough, "--learning-starts is not below --total-timesteps")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    args.device = next(device for device in there if there[device]) if args.device == "auto" else args.device
    check(there[args.device], f"--device {args.device}: PyTorch sees no such GPU; use --device cpu")
    check(args.clip_precision == "fp32" or args.device != "cpu", f"--clip-precision {args.clip_precision} needs a GPU")
    return args


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    run_dir = Path(args.resume or args.evaluate)
    if not (args.resume or args.evaluate):
        args.run_name = args.run_name or f"humanoid-{args.task or 'prompt'}__sac_vlmrm__{args.seed}__{int(time.time())}"
        run_dir = Path("runs") / args.run_name
        check(not run_dir.exists(), f"{run_dir} exists; choose another --run-name, or --resume {run_dir}")
        parent = next(folder for folder in run_dir.absolute().parents if folder.exists())
        check(parent.is_dir() and os.access(parent, os.W_OK), f"{parent} is not writable, so there can be no {run_dir}")
    needed = args.buffer_size * 4 * (255 + 17 + 255 + 1)  # bytes: obs, action, next_obs, reward
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = torch.cuda.mem_get_info()[0] if args.device == "cuda" else memory
    check(needed < 0.9 * memory, f"--buffer-size {args.buffer_size} takes {needed / 1e9:.1f} GB of memory, there are "
          f"{memory / 1e9:.1f} GB")  # fmt: skip
    print(f"renderer: {pick_gl_backend()}")
    torch.manual_seed(args.seed)

    # reward model: before the environments, so that a wrong name costs seconds
    clip_reward, image_size = None, 0  # without a reward model nobody looks at the frames
    if args.reward == "vlm":
        clip_reward = CLIPReward(args.clip_model, args.prompt, args.baseline_prompt, args.clip_alpha, args.device,
                                 args.clip_precision, args.reward_batch_size)  # fmt: skip
        image_size = args.image_size or clip_reward.image_size

    def score(steps):
        """Rewards (T, N) of a rollout: of its frames, in batches."""
        if clip_reward is None:
            return steps["env_rewards"].astype(np.float32)
        frames = steps["frames"]  # (T, N, H, W, 3)
        rewards = clip_reward(clip_reward.embed_images(frames.reshape(-1, *frames.shape[2:])))
        return rewards.cpu().numpy().reshape(frames.shape[:2])

    # env setup
    print(f"task: {args.task or 'not one of TASKS, so there is no success rate, only the reward'}")
    env_fn = make_env(image_size, args.textures, args.camera, args.shadows, args.task)
    # workers fork from a process that has imported these once: started in half the time, in a quarter of the memory
    multiprocessing.set_forkserver_preload(["torch", "open_clip", "gymnasium.envs.mujoco.humanoid_v5", "imageio.v3",
                                            "matplotlib.figure", "tyro", "torch.utils.tensorboard"])  # fmt: skip
    disabled = gym.vector.AutoresetMode.DISABLED  # all episodes end together, and are reset together
    envs = gym.vector.AsyncVectorEnv([env_fn] * args.num_envs, context="forkserver", copy=False,
                                     autoreset_mode=disabled)  # fmt: skip
    try:
        return run(args, run_dir, envs, score)
    except (EOFError, OSError) as error:
        # until the system knows how a process ended
        multiprocessing.connection.wait([process.sentinel for process in envs.processes], timeout=5)
        envs._state = gym.vector.async_vector_env.AsyncState.DEFAULT  # else close() asks the dead one for its answer
        codes = [process.exitcode for process in envs.processes if process.exitcode]
        cause = f"an environment process died (exit code {codes[0]})" if codes else f"{run_dir}: {error}"
        raise SystemExit(f"error: {cause}; what was saved before is whole: --resume {run_dir}")
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; what was saved is in {run_dir}")
    finally:
        envs.close(terminate=True)


def run(args, run_dir, envs, score):
    """Train, or with --evaluate only evaluate; returns the summary of the final evaluation."""
    device = torch.device(args.device)
    obs_dim, action_dim = envs.single_observation_space["state"].shape[0], envs.single_action_space.shape[0]
    actor = Actor(obs_dim, action_dim, args.layer_norm).to(device)
    standardize, standardize_reward = Standardize(obs_dim).to(device), Standardize(1).to(device)
    if args.evaluate:
        return final_evaluation(args, run_dir, envs, score, actor, standardize)

    qf1, qf2 = (SoftQNetwork(obs_dim, action_dim, args.layer_norm).to(device) for _ in range(2))
    # copies that follow slowly; the average of the actor, over some 5000 updates, is what is evaluated and kept
    qf1_target, qf2_target, average_actor = (copy.deepcopy(net).requires_grad_(False) for net in (qf1, qf2, actor))
    q_parameters = [*qf1.parameters(), *qf2.parameters()]
    target_parameters = [*qf1_target.parameters(), *qf2_target.parameters()]
    actor_parameters, average_parameters = [*actor.parameters()], [*average_actor.parameters()]
    log_alpha = torch.tensor([args.alpha], device=device).log().requires_grad_()
    actor_groups = [{"params": actor_parameters}, {"params": [log_alpha], "lr": args.q_lr}]
    actor_optimizer = torch.optim.Adam(actor_groups, lr=args.policy_lr, fused=True)
    q_optimizer = torch.optim.Adam(q_parameters, lr=args.q_lr, fused=True)
    rb = ReplayBuffer(args.buffer_size, args.num_envs, obs_dim, action_dim, device)
    of_obs, of_action = ([torch.tensor(part, device=device) for part in image] for image in mirror_image())
    modules = {"actor": actor, "average_actor": average_actor, "qf1": qf1, "qf2": qf2, "qf1_target": qf1_target,
               "qf2_target": qf2_target, "standardize": standardize, "standardize_reward": standardize_reward,
               "actor_optimizer": actor_optimizer, "q_optimizer": q_optimizer}  # fmt: skip
    explorers = int(args.exploring_share * args.num_envs)  # the first environments; what is logged is of the others
    state = {"global_step": 0, "previous_step": 0, "fitted": False, "best_return": -float("inf"), "history": []}

    # ALGO LOGIC: training
    def hold():
        """Torques (17,), NaN where the policy decides: of one joint or of it and its twin on the other side, random.

        Noise that changes at every step never moves an arm from the end of its range, so some torques are held (as in
        Dabney et al., "Temporally-Extended epsilon-Greedy Exploration", ICLR 2021).
        """
        joint, torque = torch.randint(action_dim, ()).item(), 2 * torch.rand(()).item() - 1
        twin, sign = (part[joint].item() for part in of_action)
        torques = np.full(action_dim, np.nan, dtype=np.float32)
        torques[twin] = torque * sign if torch.rand(()) < 0.5 else np.nan
        torques[joint] = torque
        return torques

    def update_critics(obs, actions, next_obs, rewards, bootstrap):
        with torch.no_grad():
            next_actions, next_log_prob = actor.get_action(next_obs)
            next_q = torch.min(qf1_target(next_obs, next_actions), qf2_target(next_obs, next_actions))
            next_value = next_q - log_alpha.exp() * next_log_prob  # also after the last step: no episode terminates
            target = rewards + bootstrap * next_value  # (B,); the entropy of the steps between is left out, as is usual
        qf1_values, qf2_values = qf1(obs, actions), qf2(obs, actions)
        qf1_loss, qf2_loss = F.mse_loss(qf1_values, target), F.mse_loss(qf2_values, target)
        q_optimizer.zero_grad()
        (qf1_loss + qf2_loss).backward()
        q_optimizer.step()
        with torch.no_grad():  # else autograd remembers every one of these steps
            torch._foreach_lerp_(target_parameters, q_parameters, args.tau)
        return {"qf1_values": qf1_values, "qf2_values": qf2_values, "qf1_loss": qf1_loss, "qf2_loss": qf2_loss}

    def update_actor(obs, target_entropy):
        pi, log_prob = actor.get_action(obs)
        actor_loss = (log_alpha.detach().exp() * log_prob - torch.min(qf1(obs, pi), qf2(obs, pi))).mean()
        alpha_loss = (-log_alpha.exp() * (log_prob.detach() + target_entropy)).mean()
        actor_optimizer.zero_grad()
        # not into the critics' weights: a third of the time
        (actor_loss + alpha_loss).backward(inputs=[*actor_parameters, log_alpha])
        actor_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average_parameters, actor_parameters, 0.0002)
        return {"actor_loss": actor_loss, "alpha_loss": alpha_loss, "alpha": log_alpha.exp(), "entropy": -log_prob}

    # checkpoints: written where all episodes end, so that nothing of the simulators needs saving
    def save_checkpoint():
        rb.save(run_dir, state["previous_step"])
        writer.flush()
        checkpoint = {name: module.state_dict() for name, module in modules.items()}
        checkpoint |= {"log_alpha": log_alpha.detach(), "state": state, "torch_rng": torch.get_rng_state()}
        checkpoint |= {"cuda_rng": torch.cuda.get_rng_state_all()}
        atomic_save(checkpoint, run_dir / f"checkpoint_{state['global_step']:09d}.pt")
        for old in sorted(run_dir.glob("checkpoint_*.pt"))[:-2]:
            old.unlink()
        state["previous_step"] = state["global_step"]

    if args.resume:
        checkpoints = sorted(run_dir.glob("checkpoint_*.pt"))
        check(checkpoints, f"{run_dir} has no checkpoint to resume from")
        before = f"remove it to go on from {checkpoints[-2].name}" if checkpoints[1:] else "there is none before it"
        checkpoint = load_saved(checkpoints[-1], [*modules, "log_alpha", "state", "torch_rng", "cuda_rng"], before)
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
        log_alpha.data.copy_(checkpoint["log_alpha"])
        state = checkpoint["state"]
        rb.load(run_dir, state["global_step"])
        state["previous_step"] = state["global_step"]
        torch.set_rng_state(checkpoint["torch_rng"])
        torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])
    else:
        run_dir.mkdir(parents=True)
        packages = {name: version(name) for name in ("torch", "open_clip_torch", "gymnasium", "mujoco", "numpy")}
        saved = {"args": asdict(args), "packages": packages | {"python": platform.python_version()}}
        (run_dir / "args.json").write_text(json.dumps(saved, indent=2) + "\n")
    if args.track:
        import wandb

        wandb.init(project=args.wandb_project_name, name=args.run_name, config=asdict(args), sync_tensorboard=True)
    writer = SummaryWriter(run_dir, purge_step=state["global_step"] + 1 if args.resume else None)
    if not args.resume:
        table = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")

    stopping = []

    def on_signal(signum, _):
        stopping.append(signum)
        tqdm.write(f"{signal.Signals(signum).name}: stopping after this round; once more to stop at once")
        signal.signal(signum, signal.SIG_DFL)

    handlers = {signum: signal.signal(signum, on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
    before = f"what was saved before is whole: --resume {run_dir}"
    with tqdm(total=args.total_timesteps, initial=state["global_step"], unit="step", dynamic_ncols=True) as progress:
        while state["global_step"] < args.total_timesteps and not stopping:
            # collect: a whole episode in every environment
            times = [time.perf_counter()]
            noise, held = torch.randn(args.num_envs, action_dim), [hold() for _ in range(explorers)]
            if state["global_step"] < args.learning_starts:

                def policy(obs):  # N(0, 1), correlated in time, squashed
                    noise.mul_(0.9).add_(torch.randn_like(noise), alpha=(1 - 0.9**2) ** 0.5)
                    return torch.tanh(noise).numpy()
            else:

                def policy(obs):
                    actions = act(lambda x: actor.get_action(x)[0], standardize, obs)
                    for row in range(explorers):
                        held[row] = hold() if torch.rand(()) < 1 / 15 else held[row]  # for 0.2 s or so
                        actions[row] = np.where(np.isnan(held[row]), actions[row], held[row])
                    return actions

            seeds = [args.seed * 10**9 + state["global_step"] + i for i in range(args.num_envs)]
            steps = rollout(envs, policy, seeds)
            times.append(time.perf_counter())

            # score: the VLM sees the frames, the transitions get their rewards
            rewards = score(steps)  # (T, N)
            for name, values in (("an observation", steps["next_obs"]), ("a reward", rewards)):
                check(np.isfinite(values).all(), f"{name} is not finite after step {state['global_step']}; {before}")
            transitions = {key: steps[key].reshape(rewards.size, -1) for key in ("obs", "actions", "next_obs")}
            rb.add(**transitions, rewards=rewards.reshape(-1))
            state["global_step"] = global_step = state["global_step"] + rewards.size
            times.append(time.perf_counter())

            # learn
            metrics = {}
            if global_step >= args.learning_starts:
                if args.standardize and not state["fitted"]:
                    standardize.fit(rb.data["obs"][: len(rb)])
                    standardize_reward.fit(rb.data["rewards"][: len(rb), None])
                    state["fitted"] = True
                late = max(0.0, 2 * global_step / args.total_timesteps - 1)  # 0 until half time, then up to 1
                target_entropy = (1 - late) * args.target_entropy + late * args.final_target_entropy
                if args.anneal_lr:
                    actor_optimizer.param_groups[0]["lr"] = (1 - 0.9 * late) * args.policy_lr
                    q_optimizer.param_groups[0]["lr"] = (1 - 0.9 * late) * args.q_lr
                rows = torch.randint(len(rb), (args.gradient_steps, args.batch_size), device=device)
                for update in range(args.gradient_steps):
                    batch = rb.batch(rows[update], args.n_step, args.gamma)
                    if args.mirror:
                        half = args.batch_size // 2
                        for key, (index, sign) in {"obs": of_obs, "next_obs": of_obs, "actions": of_action}.items():
                            batch[key][:half] = batch[key][:half, index] * sign
                    batch["obs"], batch["next_obs"] = standardize(batch["obs"]), standardize(batch["next_obs"])
                    batch["rewards"] = (batch.pop("discounts") * standardize_reward(batch["rewards"])).sum(-1)
                    metrics |= update_critics(**batch)
                    if update % args.policy_frequency == 0:
                        metrics |= update_actor(batch["obs"], target_entropy)
            finite = all(tensor.isfinite().all() for tensor in [*metrics.values(), *actor_parameters, *q_parameters])
            check(finite, f"a loss or a weight is not finite at step {global_step}; {before}")
            times.append(time.perf_counter())

            # log
            success = success_rate(steps["success"].T[explorers:])
            vlm_return = rewards[:, explorers:].sum(0).mean()
            state["history"].append((global_step, float(vlm_return), success))
            scalars = {f"losses/{key}": value.mean().item() for key, value in metrics.items()}
            scalars |= {f"time/{stage}": t for stage, t in zip(("collect", "score", "learn"), np.diff(times))}
            scalars |= {"charts/SPS": rewards.size / (times[-1] - times[0])}
            scalars |= {"charts/episodic_return": steps["env_rewards"][:, explorers:].sum(0).mean()}
            scalars |= {"charts/vlm_return": vlm_return} if args.reward == "vlm" else {}
            scalars |= {"charts/success_rate": success} if args.task else {}
            progress.update(rewards.size)
            recent = np.mean([row[1:] for row in state["history"][-10:]], axis=0)
            shown = {"reward": f"{recent[0] / EPISODE_LENGTH:.3f}", "success": f"{recent[1]:.0%}" if args.task else "?"}
            progress.set_postfix(shown)

            # evaluate the mean action, keep the best policy, save
            due = global_step % args.eval_frequency < rewards.size or global_step >= args.total_timesteps
            if due:
                mean_policy = lambda obs: act(average_actor.mean_action, standardize, obs)  # noqa: E731
                result = evaluate(envs, mean_policy, score, args.select_episodes, seed=2_000_000)
                if metrics and result["returns"].mean() > state["best_return"]:  # by luck? more episodes decide
                    result = evaluate(envs, mean_policy, score, 2 * args.select_episodes, seed=3_000_000)
                mean_return = float(result["returns"].mean())
                scalars |= {"eval/return": mean_return}
                scalars |= {"eval/success_rate": success_rate(result["success"])} if args.task else {}
                if metrics and mean_return > state["best_return"]:
                    state["best_return"] = mean_return
                    best = {"actor": average_actor.state_dict(), "standardize": standardize.state_dict()}
                    atomic_save(best | {"global_step": global_step}, run_dir / "best.pt")
                write_video(run_dir / f"video_{global_step:09d}.mp4", film(args, result, episodes=2, every=2, size=240))
            for key, value in scalars.items():
                writer.add_scalar(key, value, global_step)
            if due or stopping:
                save_checkpoint()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    writer.close()
    plot_curves(state["history"], run_dir / "curves.png")
    if stopping:
        print(f"stopped at step {state['global_step']}; go on with --resume {run_dir}")
        return None
    return final_evaluation(args, run_dir, envs, score, actor, standardize)


if __name__ == "__main__":
    main()
