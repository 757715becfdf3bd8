"""Make the data for the tiny CLIP, train it, measure it: the method runs offline on a laptop.

    python tiny_clip/train.py                         # data, training, report: for hours, not timed
    python tiny_clip/train.py --visit runs/A runs/B   # first add states that policies visited

The model sees frames of the same simulator that the scripts reward, with captions made from the
simulator's state. It is not a zero-shot model and says nothing about how well one would do; it
stands in for one where none can be downloaded.

Captions describe the picture the way a person would. They come from the loose descriptions in
`describe`, which share no code with the success criteria of sac_vlmrm.py; those are used here only
to report EPIC distances at the end.
"""

import json
import multiprocessing
import os
import shutil
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch  # before OpenGL: the other order segfaults

import numpy as np
import open_clip
import torch.nn as nn
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file, save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import sac_vlmrm

import mujoco  # after sac_vlmrm.py, which says how it draws


@dataclass
class Args:
    seed: int = 1  # of the weights and of the order of the frames
    data_seed: int = 1  # of the frames
    out: Path = HERE  # folder for the model, its configuration, sentences.txt and report.json
    start: Path | None = None  # folder of a model to go on from, instead of random weights
    frames: int = 150_000  # humanoid frames, two of three from the front, one from the side
    classic_frames: int = 10_000  # frames of the two classic-control scenes
    passes: float = 9.0  # times every frame is seen
    batch_size: int = 64
    lr: float = 1.5e-3
    width: int = 16  # of the image tower (open_clip's ModifiedResNet with one block per stage)
    image_size: int = 96
    visit: tuple[Path, ...] = ()  # run folders whose states are added to visited_states.npz
    visit_states: int = 2000  # states to take from each of them
    unseen: tuple[Path, ...] = ()  # run folders whose states are only measured on
    average: tuple[Path, ...] = ()  # folders of models whose mean is put in --out and measured
    report_only: bool = False  # measure the model in --out again, do not train


# DATA: states
JOINTS = [
    *["abdomen_z", "abdomen_y", "abdomen_x"],
    *["right_hip_x", "right_hip_z", "right_hip_y", "right_knee"],
    *["left_hip_x", "left_hip_z", "left_hip_y", "left_knee"],
    *["right_shoulder1", "right_shoulder2", "right_elbow"],
    *["left_shoulder1", "left_shoulder2", "left_elbow"],
]
# the order of the model's motors
ACTUATED = [JOINTS.index(name) for name in ["abdomen_y", "abdomen_z"] + JOINTS[2:]]
LEG_JOINTS = ["hip_x", "hip_z", "hip_y", "knee"]

# Legs as (hip_x, hip_z, hip_y, knee) in degrees, right then left where they differ; torso pitch
# (forward is positive) and bend of the abdomen. Noise, blends of two poses, arms and physics come
# on top.
POSES = {
    "stand": dict(legs=(0, 0, 0, -3)),
    "stand wide": dict(legs=(-18, 0, -2, -5)),
    "bent knees": dict(legs=(-3, 0, -35, -60)),
    "squat": dict(legs=(-5, -10, -80, -120), pitch=15),
    "deep squat": dict(legs=(-10, -25, -108, -150), pitch=25, abdomen=-30),
    "bow": dict(legs=(0, 0, -70, -8), pitch=65, abdomen=-20),
    "lean back": dict(legs=(0, 0, 15, -30), pitch=-30),
    "step": dict(legs=(0, 0, -35, -25), left=(0, 0, 18, -15)),
    "one leg": dict(legs=(0, 0, 0, -4), left=(0, 0, -55, -80)),
    "one leg high": dict(legs=(0, 0, 0, -4), left=(-5, 0, -95, -100)),
    "one leg back": dict(legs=(0, 0, -2, -4), left=(0, 0, 15, -100)),
    "kneel": dict(legs=(-4, 0, 2, -92)),
    "kneel wide": dict(legs=(-15, -10, 2, -92)),
    "kneel low": dict(legs=(-5, 0, -35, -125)),
    "sit on heels": dict(legs=(-5, -5, -75, -155), pitch=5),
    "kneel back": dict(legs=(-5, 0, 15, -100), pitch=-30),
    "kneel far back": dict(legs=(-5, 0, 20, -120), pitch=-55, abdomen=20),
    "kneel forward": dict(legs=(-5, 0, -30, -95), pitch=35),
    "kneel far forward": dict(legs=(-5, 0, -75, -100), pitch=65, abdomen=-20),
    "half down": dict(legs=(-4, 0, -40, -105), pitch=5),
    "half down back": dict(legs=(-4, 0, 5, -75), pitch=-20),
    "knee lifted": dict(legs=(-4, 0, 0, -92), left=(-4, 0, -12, -100)),
    "one knee": dict(legs=(0, 0, 0, -95), left=(-3, 0, -88, -88)),
    "all fours": dict(legs=(-5, 0, -85, -88), pitch=82),
    "sit": dict(legs=(-5, -5, -95, -5)),
    "sit knees up": dict(legs=(-5, -5, -108, -100), pitch=-5, abdomen=-20),
    "sit back": dict(legs=(-5, -10, -70, -15), pitch=-35),
    "sit between heels": dict(legs=(5, 30, -85, -150)),
    "splits": dict(legs=(-4, -58, -88, -3)),
    "splits half": dict(legs=(-5, -38, -90, -4)),
    "splits forward": dict(legs=(-4, -55, -100, -5), pitch=25),
    "lotus": dict(legs=(5, -60, -80, -160), abdomen=-55),
    "lotus upright": dict(legs=(2, -58, -88, -155), abdomen=-25),
    "lotus half": dict(legs=(-2, -45, -100, -115)),
    "lotus, a knee ahead": dict(legs=(0, -60, -80, -160), left=(-8, -15, -70, -160), abdomen=-60),
    "lotus, a knee inward": dict(legs=(5, -60, -80, -160), left=(-22, 30, -55, -160), abdomen=-65),
    "lie on back": dict(legs=(-5, 0, -10, -20), pitch=-88),
    "lie on back knees up": dict(legs=(-5, 0, -70, -90), pitch=-85),
    "lie on front": dict(legs=(-5, 0, 0, -15), pitch=88),
    "lie on side": dict(legs=(0, 0, -30, -40), roll=88),
    "fold back": dict(legs=(-5, 0, 20, -150), pitch=-80, abdomen=25),
    "upside down": dict(legs=(-5, 0, -60, -40), pitch=140),
    "jump": dict(legs=(-5, 0, -20, -40), air=0.2),
    "kneel in the air": dict(legs=(-5, 0, 0, -95), air=0.25),
    "sit in the air": dict(legs=(-5, 0, -85, -90), air=0.2),
}  # fmt: skip
FREQUENT = {
    **{"stand": 10, "kneel": 5, "kneel wide": 2, "kneel low": 2, "half down": 3, "one leg": 3},
    **{"splits": 6, "splits half": 2, "lotus": 7, "lotus half": 2, "lotus upright": 5},
    **{"lotus, a knee ahead": 5, "lotus, a knee inward": 5},
    **{"bent knees": 2, "kneel back": 2, "kneel far back": 2},
    **{"sit on heels": 2, "one knee": 2, "knee lifted": 5, "stand wide": 2, "step": 2},
}

# Where the right hand is in the torso's frame, for each way to hold the arms.
ARMS = {
    "raised": lambda p: p[:, 2] > 0.3,
    "head": lambda p: (abs(p[:, 2] - 0.19) < 0.12) & (abs(p[:, 1]) < 0.25) & (p[:, 0] < 0.25),
    "hips": lambda p: np.linalg.norm(p - [0.0, -0.2, -0.345], axis=1) < 0.12,
    "crossed": lambda p: (p[:, 1] > 0.06) & (p[:, 0] > 0.08) & (abs(p[:, 2]) < 0.22),
    "together": lambda p: (abs(p[:, 1] + 0.03) < 0.06) & (p[:, 0] > 0.15) & (abs(p[:, 2]) < 0.25),
    "side": lambda p: (p[:, 1] < -0.6) & (abs(p[:, 2]) < 0.25),
    "front": lambda p: (p[:, 0] > 0.42) & (abs(p[:, 2]) < 0.25),
    "down": lambda p: p[:, 2] < -0.28,
    "any": lambda p: p[:, 2] > -9,
}


def seen_from(data, body, point):
    """A point (3,) in a body's frame: x forward, y left, z up."""
    return data.body(body).xmat.reshape(3, 3).T @ (point - data.body(body).xpos)


class Poser:
    """Makes states of the humanoid: poses with noise, blends of two, what physics does to them."""

    def __init__(self, rng):
        self.rng = rng
        self.model, self.data = sac_vlmrm.HUMANOID, mujoco.MjData(sac_vlmrm.HUMANOID)
        self.low, self.high = self.model.jnt_range[1:].T  # radians
        self.index = {name: i for i, name in enumerate(JOINTS)}
        arm = [self.index[f"right_{j}"] for j in ("shoulder1", "shoulder2", "elbow")]
        # random arms, and where each puts the hand
        self.arm_angles = rng.uniform(self.low[arm], self.high[arm], (6000, 3))
        hands = []
        for angles in self.arm_angles:
            qpos = np.concatenate([[0, 0, 1.4, 1, 0, 0, 0], np.zeros(17)])
            qpos[[7 + i for i in arm]] = angles
            self.forward(qpos)
            hands.append(seen_from(self.data, "torso", self.data.geom("right_hand").xpos))
        hands = np.array(hands)
        self.arm_table = {kind: self.arm_angles[fits(hands)] for kind, fits in ARMS.items()}

    def forward(self, qpos):
        self.data.qpos = qpos
        mujoco.mj_kinematics(self.model, self.data)

    def set_state(self, qpos, qvel):
        self.data.qpos, self.data.qvel = qpos, qvel
        mujoco.mj_forward(self.model, self.data)

    def step(self, action):
        """15 ms with shares (17,) of the largest torque, in the order of JOINTS."""
        self.data.ctrl = np.clip(action, -1, 1)[ACTUATED] * 0.4
        mujoco.mj_step(self.model, self.data, nstep=5)

    def lowest(self):
        """Height of the lowest point of any body part."""
        z, axis = self.data.geom_xpos[1:, 2], self.data.geom_xmat[1:, 8]
        r, half = self.model.geom_size[1:, :2].T
        half = np.where(self.model.geom_type[1:] == mujoco.mjtGeom.mjGEOM_CAPSULE, half, 0)
        return (z - r - half * abs(axis)).min()

    def joints(self, pose):
        legs, left = pose["legs"], pose.get("left", pose["legs"])
        if self.rng.random() < 0.5:
            legs, left = left, legs
        angles = np.zeros(17)
        for side, values in (("right", legs), ("left", left)):
            for joint, value in zip(LEG_JOINTS, values):
                angles[self.index[f"{side}_{joint}"]] = np.radians(value)
        angles[self.index["abdomen_y"]] = np.radians(pose.get("abdomen", 0))
        return angles

    def set_arms(self, angles):
        rng = self.rng
        kinds = ["raised", "raised", "raised", "head", "hips", "hips", *["crossed"] * 4]
        kinds += ["together", "side", "front", "down", "down", "any", "any", "zero", "zero", "zero"]
        kind = rng.choice(kinds)
        both = rng.random() < 0.8
        for side, sign in (("right", 1), ("left", -1)):
            use = kind if side == "right" or both else rng.choice(kinds)
            arm = np.zeros(3)
            if use != "zero":
                arm = self.arm_table[use][rng.integers(len(self.arm_table[use]))]
            for joint, value in zip(("shoulder1", "shoulder2", "elbow"), arm * [sign, sign, 1]):
                angles[self.index[f"{side}_{joint}"]] = value
        return angles

    def other_arms(self, qpos):
        """The same body with its arms held in another way, so that the arms are told apart in any
        lean; half the time a shoulder's two angles and an elbow's stay, each of either side."""
        angles, arm = self.set_arms(qpos[7:].copy()), ("shoulder1", "shoulder2", "elbow")
        if self.rng.random() < 0.5:
            kept = [self.index[f"{self.rng.choice(['right', 'left'])}_{j}"] for j in arm]
            angles[kept] = qpos[7:][kept]
        return np.concatenate([qpos[:7], angles])

    def other_legs(self, qpos):
        """The same body with one leg on its way, by some share, to what the other one does, so that
        it is told apart whether both or only one are as asked."""
        legs = [[7 + self.index[f"{side}_{j}"] for j in LEG_JOINTS] for side in ("right", "left")]
        self.rng.shuffle(legs)
        result, share = qpos.copy(), self.rng.random()
        result[legs[0]] += share * (qpos[legs[1]] - qpos[legs[0]])
        self.forward(result)
        result[2] -= self.lowest()
        return result

    def sample_pose(self):
        """A pose of the table, or a blend of two, with noise, on the floor (or above it); (24,)."""
        rng = self.rng
        names = list(POSES)
        p = np.array([FREQUENT.get(name, 1) for name in names], dtype=float)
        pose, other = (POSES[names[i]] for i in rng.choice(len(names), 2, p=p / p.sum()))
        blend = rng.random() if rng.random() < 0.3 else 0.0
        angles = (1 - blend) * self.joints(pose) + blend * self.joints(other)
        pitch, roll, air = (
            (1 - blend) * pose.get(key, 0) + blend * other.get(key, 0)
            for key in ("pitch", "roll", "air")
        )
        spread = rng.choice([2, 6, 12, 12, 30])  # degrees
        angles = self.set_arms(angles) + np.radians(spread) * rng.standard_normal(17)
        pitch, roll = np.radians(
            [pitch, roll * rng.choice([-1, 1])] + spread * rng.standard_normal(2)
        )
        yaw = np.radians(rng.choice([10, 10, 30, 120])) * rng.standard_normal()
        qpos = np.zeros(24)
        qpos[:2] = rng.normal(0, 0.15, 2)
        qpos[2], qpos[3:7] = 1.4, euler_to_quat(roll, pitch, yaw)
        qpos[7:] = np.clip(angles, self.low, self.high)
        self.forward(qpos)
        lift = 0.0
        if air:
            lift = air * rng.random() * 2
        elif rng.random() < 0.08:
            lift = 0.3 * rng.random() ** 2
        qpos[2] += lift - self.lowest()
        return qpos

    def settle(self, qpos, steps):
        """Let go of the robot while its joints hold the pose: it comes to rest on the floor."""
        self.set_state(qpos, np.zeros(23))
        for _ in range(steps):
            self.hold(qpos[7:], 0.0)
        return self.data.qpos.copy()

    def hold(self, target, action):
        """One step of 15 ms in which motors pull the joints towards `target` (17,) radians."""
        action = action + 3.0 * (target - self.data.qpos[7:]) - 0.1 * self.data.qvel[6:]
        self.step(action)

    def sample_motion(self, length):
        """States along a fall: from the start or a pose, under held, correlated or no torques."""
        rng = self.rng
        noise = np.random.default_rng(int(rng.integers(2**31))).uniform(-0.01, 0.01, 24 + 23)
        mujoco.mj_resetData(self.model, self.data)
        self.set_state(self.model.qpos0 + noise[:24], noise[24:])  # as Gymnasium starts
        if rng.random() < 0.5:
            self.set_state(self.sample_pose(), 0.3 * rng.standard_normal(23))
        scale, keep = rng.choice([0, 0.3, 0.6, 1.0]), rng.choice([0.8, 0.95, 1.0])
        torque, states = rng.standard_normal(17), []
        target = None
        if rng.random() < 0.6:
            target = self.set_arms(self.joints(POSES[list(POSES)[rng.integers(len(POSES))]]))
        for t in range(length):
            torque = keep * torque + (1 - keep**2) ** 0.5 * rng.standard_normal(17)
            if target is None:
                self.step(scale * torque)
            else:
                self.hold(target, 0.3 * scale * torque)
            if t % 12 == 11:
                states.append(self.data.qpos.copy())
        return states


def euler_to_quat(roll, pitch, yaw):
    (cr, cp, cy), (sr, sp, sy) = (f(np.array([roll, pitch, yaw]) / 2) for f in (np.cos, np.sin))
    w, x = cr * cp * cy + sr * sp * sy, sr * cp * cy - cr * sp * sy
    return [w, x, cr * sp * cy + sr * cp * sy, cr * cp * sy - sr * sp * cy]


# DATA: captions. A frame is described by several concepts; each concept has many wordings, {s} is
# who is in the picture.
SUBJECTS = [*["a humanoid robot"] * 3, "a robot", "a humanoid", "a man", "a person", "a figure"]
CONCEPTS = {
    "robot": [
        "{s}",
        "a picture of {s}",
        "{s} in a room with a wooden floor",
        "an image of {s} under a blue sky",
    ],
    "standing": [
        "{s} standing up",
        "{s} standing",
        "{s} standing upright",
        "{s} standing straight",
        "{s} on its feet",
        "{s} that stands on both legs",
    ],
    "standing with bent knees": [
        "{s} standing with bent knees",
        "{s} with slightly bent legs",
        "{s} dipping at the knees",
    ],
    "crouching": ["{s} crouching", "{s} squatting", "{s} half way down", "{s} in a squat"],
    "deep squat": ["{s} in a deep squat", "{s} squatting low over its feet"],
    "one leg": [
        "{s} standing up on one leg",
        "{s} on one leg",
        "{s} balancing on one foot",
        "{s} with one leg lifted",
        "{s} standing on one leg",
    ],
    "one foot lifted": [
        "{s} with one foot just off the floor",
        "{s} making a small step",
        "{s} lifting one foot a little",
    ],
    "kneeling": [
        "{s} kneeling",
        "{s} on its knees",
        "{s} kneeling upright",
        "{s} kneeling on the floor",
        "{s} that kneels on both knees",
        "{s} down on both knees",
        "{s} kneeling down",
    ],
    "sitting on heels": ["{s} sitting on its heels", "{s} kneeling, sitting back on the heels"],
    "kneeling leaning back": [
        "{s} leaning back on its knees",
        "{s} tilting backwards over its heels",
    ],
    "kneeling far back": [
        "{s} leaning far back, knees on the floor",
        "{s} falling over backwards from its knees",
    ],
    "kneeling leaning forward": [
        "{s} on the knees, bending forward",
        "{s} bowing with knees on the floor",
    ],
    "kneeling leaning sideways": [
        "{s} on the knees, tilting to one side",
        "{s} toppling sideways, knees on the floor",
    ],
    "about to kneel": [
        "{s} about to kneel",
        "{s} going down to its knees",
        "{s} with its knees just above the floor",
    ],
    "one knee": [
        "{s} down on one knee",
        "{s} with one knee on the floor",
        "{s} half kneeling, one foot forward",
    ],
    "one knee lifted": [
        "{s} leaning on one knee, the other knee just above the floor",
        "{s} with one knee lifted a little",
    ],
    "all fours": ["{s} on all fours", "{s} on hands and knees", "{s} crawling"],
    "propped on one hand": [
        "{s} propped on one hand, knees on the floor",
        "{s} on its knees and one hand",
    ],
    "kneeling in the air": ["{s} floating with bent knees", "{s} in the air, shins folded back"],
    "in the air": ["{s} in the air", "{s} jumping", "{s} floating above the floor"],
    "leaning forward": ["{s} leaning forward", "{s} tipping forwards", "{s} falling forward"],
    "leaning back": ["{s} leaning backwards", "{s} tipping over backwards", "{s} falling back"],
    "leaning sideways": ["{s} leaning to the side", "{s} tipping over sideways"],
    "bowing": ["{s} bending over", "{s} bowing deeply on straight legs"],
    "sitting": ["{s} sitting on the floor", "{s} seated with the legs stretched forward"],
    "sitting knees up": ["{s} sitting with knees pulled up", "{s} seated, knees in the air"],
    "sitting between heels": ["{s} sitting between its heels", "{s} seated with folded legs"],
    "sitting leaning back": ["{s} sitting, leaning back", "{s} seated and falling backwards"],
    "lotus": [
        "{s} seated down, meditating in the lotus position",
        "{s} meditating",
        "{s} in the lotus position",
        "{s} sitting cross-legged",
        "{s} meditating in lotus pose",
    ],
    "half lotus": ["{s} sitting with knees half apart", "{s} seated with loosely folded legs"],
    "sitting feet out": ["{s} sitting, feet out to the sides", "{s} seated, feet wider than knees"],
    "splits": [
        "{s} practicing gymnastics, doing the side splits",
        "{s} doing the splits",
        "{s} doing the side splits",
        "{s} with its legs spread wide on the floor",
    ],
    "half splits": ["{s} sitting with its legs apart", "{s} seated, legs opened a little"],
    "lying on back": ["{s} lying on its back", "{s} flat on its back"],
    "lying on front": ["{s} lying face down", "{s} flat on its belly"],
    "lying on side": ["{s} lying on its side", "{s} fallen over on one side"],
    "folded back": ["{s} bent over backwards on the floor", "{s} lying back over its folded legs"],
    "upside down": ["{s} upside down", "{s} standing on its head"],
    "toppling": ["{s} losing its balance", "{s} falling down", "{s} collapsing"],
    "arms raised": [
        "{s} with both arms raised",
        "{s} with its hands in the air",
        "{s} holding up both hands",
    ],
    "one arm raised": ["{s} with one arm raised", "{s} raising one hand"],
    "hands at head": [
        "{s} with its hands at its head",
        "{s} holding its head",
        "{s} with hands behind the head",
    ],
    "hands on hips": ["{s} with hands on hips", "{s} with both hands on the hips"],
    "arms crossed": [
        "{s} with its arms crossed",
        "{s} with folded arms",
        "{s} with arms crossed in front of the chest",
    ],
    "hands together": [
        "{s} with its hands together in front of the chest",
        "{s} with touching hands",
    ],
    "arms out": ["{s} with its arms stretched out to the sides", "{s} with arms spread"],
    "arms forward": ["{s} reaching forward with both arms", "{s} with its arms stretched forward"],
    "arms down": ["{s} with its arms hanging down", "{s} with lowered arms"],
    "arms bent": ["{s} with bent arms", "{s} holding its hands in front of the shoulders"],
}
# how the arms are held while it stands or kneels
for _pose, _verb in (("standing", "standing up"), ("kneeling", "kneeling")):
    CONCEPTS |= {
        f"{_pose}, arms raised": [
            f"{{s}} {_verb}, with both arms raised",
            f"{{s}} {_verb} with its hands in the air",
            f"{{s}} {_verb} with raised arms",
        ],
        f"{_pose}, one arm raised": [
            f"{{s}} {_verb} with one arm raised",
            f"{{s}} {_verb}, raising one hand",
        ],
        f"{_pose}, hands at head": [
            f"{{s}} {_verb} with its hands at its head",
            f"{{s}} {_verb}, holding its head",
        ],
        f"{_pose}, hands on hips": [
            f"{{s}} {_verb} with hands on hips",
            f"{{s}} {_verb}, both hands on the hips",
        ],
        f"{_pose}, arms crossed": [
            f"{{s}} {_verb}, with its arms crossed",
            f"{{s}} {_verb} with folded arms",
        ],
        f"{_pose}, hands together": [
            f"{{s}} {_verb} with its hands together",
            f"{{s}} {_verb} with touching hands",
        ],
        f"{_pose}, arms out": [f"{{s}} {_verb} with its arms out to the sides"],
        f"{_pose}, arms forward": [f"{{s}} {_verb} with its arms stretched forward"],
        f"{_pose}, arms down": [f"{{s}} {_verb} with its arms hanging down"],
    }


def describe(poser, qpos):
    """What a person would say of the robot in this state: concepts, first its posture."""
    poser.forward(qpos)
    data, sides = poser.data, ("left", "right")
    body, geom = (lambda name: data.body(name).xpos), (lambda name: data.geom(name).xpos)
    torso = data.body("torso").xmat.reshape(3, 3)
    tilt = np.degrees(np.arccos(np.clip(torso[2, 2], -1, 1)))  # of the torso against the vertical
    height = body("torso")[2]
    facing = torso[:2, 0] / max(np.linalg.norm(torso[:2, 0]), 1e-6)
    forward, sideways = torso[:2, 2] @ facing, abs(torso[:2, 2] @ [-facing[1], facing[0]])
    lean = "sideways" if sideways > abs(forward) else "forward" if forward > 0 else "back"
    knees = [body(f"{s}_shin")[2] - 0.05 for s in sides]  # heights of their undersides
    feet = [geom(f"{s}_foot")[2] - 0.075 for s in sides]
    hands = [geom(f"{s}_hand")[2] - 0.04 for s in sides]
    seat = geom("butt")[2] - 0.09
    bend = [-np.degrees(data.joint(f"{s}_knee").qpos[0]) for s in sides]
    thighs = [(body(f"{s}_shin") - body(f"{s}_thigh")) / 0.4 for s in sides]
    cosine = thighs[0] @ thighs[1] / np.linalg.norm(thighs[0]) / np.linalg.norm(thighs[1])
    spread = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    foot_at = [seen_from(data, "pelvis", geom(f"{s}_foot")) for s in sides]
    knee_at = [seen_from(data, "pelvis", body(f"{s}_shin")) for s in sides]
    airborne = poser.lowest() > 0.05
    # People differ in where they draw a line. A cosine that softmax has trained falls with the
    # logarithm of the odds, so with a logistic line the reward falls evenly: a slope to keep one's
    # balance on, where a sharp line would make a cliff.
    line = poser.rng.logistic
    # in degrees the torso, the knees, between the thighs; in metres the torso, the seat, a foot
    upright, straight, apart = line(18, 4.5), line(25, 5), line(92, 5)
    tall, low, lifted = line(1.22, 0.02), line(0.06, 0.015), line(0.12, 0.015)
    raised_above, near_hip = poser.rng.uniform(0.15, 0.4), poser.rng.uniform(0.06, 0.15)
    past_middle, at_chest = line(0.07, 0.02), line(0.2, 0.03)
    split = spread > apart and max(bend) < straight and max(feet) < line(0.03, 0.008)
    split = split and min(abs(k[1]) for k in knee_at) > line(0.25, 0.02)  # to the sides

    if airborne:
        posture = "kneeling in the air" if tilt < 40 and min(bend) > 60 else "in the air"
    elif torso[2, 2] < -0.4 and height > 0.3:
        posture = "upside down"
    elif max(knees) < 0.025 and tilt < 75:
        if seat < low and tilt < 50:
            posture = "sitting between heels" if max(bend) > 60 else "half splits"
            posture = "splits" if split else posture
            if tilt > upright + 12:
                posture = "sitting leaning back" if lean == "back" else "toppling"
        elif max(hands) < 0.06 and tilt > 30:
            posture = "all fours"
        elif min(hands) < 0.06:
            posture = "propped on one hand"
        elif tilt < upright:
            posture = "sitting on heels" if seat < 0.2 else "kneeling"
        else:
            posture = f"kneeling leaning {lean}"
            if lean == "back" and tilt > 38:
                posture = "kneeling far back"
    elif seat < low and tilt < 75:
        feet_inside = min(abs(k[1]) - abs(f[1]) for k, f in zip(knee_at, foot_at))
        wide = feet_inside > line(0.13, 0.05) and min(bend) > 70
        if tilt > upright + 12:
            posture = "sitting leaning back" if lean == "back" else "toppling"
        elif wide and max(knees) < line(0.26, 0.03) and max(feet) < line(0.02, 0.008):
            posture = "lotus"
        elif max(bend) < 40:
            posture = "half splits" if spread > 45 else "sitting"
            posture = "splits" if split else posture
        else:
            folded = "half lotus" if feet_inside > line(-0.03, 0.04) else "sitting feet out"
            posture = folded if spread > 55 else "sitting knees up"
    elif min(knees) < 0.025 and tilt < 40 and height > 0.6:
        posture = "one knee" if max(knees) > 0.12 else "one knee lifted"
    elif np.mean(knees) < 0.16 and tilt < 45 and 0.6 < height < 1.05 and seat > 0.12:
        posture = "about to kneel"
    elif tilt < upright and height > 1.0:
        if max(feet) > lifted and height > tall - 0.06:
            posture = "one leg"
        elif height < tall:
            posture = "standing with bent knees"
        else:
            posture = "one foot lifted" if max(feet) > 0.04 else "standing"
    elif tilt < 40 and height > 1.0:
        posture = f"leaning {lean}"
    elif tilt < 40:
        posture = "crouching" if height > 0.8 else "deep squat"
    elif height > 0.55 and seat > 0.3:
        straight = max(bend) < 45 and min(feet) < 0.1
        bowing = lean == "forward" and tilt > 45 and straight and seat > 0.6
        posture = "bowing" if bowing else f"leaning {lean}"
    elif min(bend) > 90 and np.mean(knees) < 0.2 and lean == "back":
        posture = "folded back"
    elif tilt > 60:
        up = torso[2, 0]  # where the chest points
        posture = (
            "lying on back" if up > 0.6 else "lying on front" if up < -0.6 else "lying on side"
        )
    else:
        posture = "toppling"

    concepts = ["robot"]
    side_of = {"left": 1, "right": -1}
    hold = []
    for side in sides:
        x, y, z = seen_from(data, "torso", geom(f"{side}_hand"))
        y *= side_of[side]  # positive: on its own side
        on_hip = seen_from(data, "pelvis", geom(f"{side}_hand")) - [0, 0.2 * side_of[side], 0.08]
        hip = np.linalg.norm(on_hip)
        if z > raised_above:
            hold.append("raised")
        elif z > 0.07 and abs(y) < 0.28 and x < 0.25:
            hold.append("head")
        elif hip < near_hip:
            hold.append("hips")
        elif y < -past_middle and x > 0.03 and abs(z) < at_chest:
            hold.append("crossed")
        elif y < 0.08 and 0.08 < x < 0.45 and abs(z) < 0.3:
            hold.append("together")
        elif y > 0.55 and abs(z) < 0.3:
            hold.append("out")
        elif x > 0.4 and abs(z) < 0.3:
            hold.append("forward")
        else:
            hold.append("down" if z < -0.25 else "bent")
    names = {"head": "hands at head", "hips": "hands on hips", "together": "hands together"}
    arms = None
    if hold[0] == hold[1]:
        arms = names.get(hold[0], f"arms {hold[0]}")
    elif "raised" in hold:
        arms = "one arm raised"
    elif set(hold) == {"crossed", "together"}:
        arms = "hands together"
    if arms and tilt < 40:
        concepts.append(arms)
        if f"{posture}, {arms}" in CONCEPTS:
            concepts.append(f"{posture}, {arms}")
    if upright < tilt < 65 and height > 0.5 and not posture.startswith(("sitting", "bowing")):
        concepts.append("toppling")
    return [posture] + [c for c in concepts if c != posture]


BODIES = ["torso", "pelvis", "left_shin", "right_shin", "left_foot", "right_foot"]
BODIES += ["left_lower_arm", "right_lower_arm"]


def make_chunk(job):
    """Frames, concepts and body positions of `count` states; runs in a worker process."""
    seed, count, image_size, visited, camera = job
    rng = np.random.default_rng(seed)
    poser = Poser(rng)
    states = list(visited) + [poser.other_arms(qpos) for qpos in visited[::2] if qpos[2] > 1]
    states += [poser.other_legs(qpos) for qpos in visited if qpos[2] < 0.7]
    while len(states) < count:
        if rng.random() < 0.06:
            states += poser.sample_motion(int(rng.integers(12, 140)))
        else:
            states += [poser.settle(poser.sample_pose(), rng.integers(9)) for _ in range(4)]
    qpos = np.stack(states[:count])
    concepts, positions = [], []
    for state in qpos:
        concepts.append(describe(poser, state))
        parts = [poser.data.body(name).xpos for name in BODIES]
        parts += [poser.data.geom(f"{side}_hand").xpos for side in ("left", "right")]
        positions.append(np.concatenate(parts))
    positions = np.stack(positions).astype(np.float32).reshape(count, -1, 3)
    if camera == "side":  # as the camera sees them: y is what is to its right
        positions[..., :2] = np.stack([-positions[..., 1], positions[..., 0]], axis=-1)
    labels = np.stack([*sac_vlmrm.goal_states(qpos).values()], axis=1)  # only for the report
    size = image_size, image_size
    with closing(sac_vlmrm.Painter(size, "modified", (camera,))) as painter:
        return painter(qpos)[:, 0], concepts, positions.reshape(count, -1), labels


# TRAINING
def model_config(args):
    """open_clip's own configuration: a ModifiedResNet with one block per stage, a two-layer text
    transformer."""
    vision = {"image_size": args.image_size, "layers": [1, 1, 1, 1], "width": args.width}
    vision |= {"head_width": 64, "patch_size": None}
    text = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    look = {"size": args.image_size, "mean": [0.5, 0.45, 0.45], "std": [0.25, 0.22, 0.25]}
    look |= {"interpolation": "bilinear", "resize_mode": "squash"}
    model = {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text}
    return {"model_cfg": model, "preprocess_cfg": look}


def targets_of(concepts, names):
    """Soft targets (N, C): which captions are true of a frame, the posture and the most specific
    ones counting most. A caption that several people gave counts as often."""
    index = {name: i for i, name in enumerate(names)}
    general = "robot", "pole and cart", "a car in the mountain"
    targets = np.zeros((len(concepts), len(names)), dtype=np.float32)
    for row, true in enumerate(concepts):
        for rank, name in enumerate(true):
            specific = rank == 0 or ", " in name
            targets[row, index[name]] += 1.0 if specific else 0.3 if name in general else 0.5
    return targets / targets.sum(1, keepdims=True)


def train(args, data, model, preprocess, tokenizer):
    """CLIP's two-way contrastive loss with soft targets, plus a head that regresses body positions
    and is dropped afterwards."""
    frames, balance = data["frames"], data["balance"]
    targets, positions = torch.as_tensor(data["targets"]), torch.as_tensor(data["positions"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    position_head = nn.Linear(128, positions.shape[1], device=device)
    always = torch.arange(targets.shape[1]) < len(CONCEPTS)
    parameters = [*model.parameters(), *position_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.05, fused=True)
    steps = int(args.passes * len(frames) / args.batch_size)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = one_cycle(optimizer, args.lr, total_steps=steps, pct_start=0.05)
    rng = np.random.default_rng(args.seed)
    bf16 = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    model.train()
    progress = tqdm(range(steps), dynamic_ncols=True, mininterval=5)
    for step in progress:
        rows = rng.choice(len(frames), args.batch_size, p=balance)
        images = torch.as_tensor(frames[rows]).to(device).permute(0, 3, 1, 2).float() / 255
        seen = targets[rows].sum(0) > 0
        # the batch's captions, and all of the humanoid: C of them
        used = torch.nonzero(seen | always)[:, 0].tolist()
        captions = []
        for texts in (data["wordings"][i] for i in used):
            wording = texts[rng.integers(len(texts))]
            captions.append(wording.replace("{s}", SUBJECTS[rng.integers(len(SUBJECTS))]))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):  # twice as fast on a CPU
            features = model.encode_image(preprocess(images))
            text = model.encode_text(tokenizer(captions).to(device))
        features, text = features.float(), F.normalize(text.float(), dim=-1)  # (B, 128), (C, 128)
        scale = model.logit_scale.exp()
        logits = scale.clamp(max=20) * F.normalize(features, dim=-1) @ text.T  # (B, C)
        target, seen = targets[rows][:, used].to(device), seen[used].to(device)
        of_text = (target / target.sum(0).clamp(min=1e-6)).T[seen]  # (C', B)
        loss_clip = F.cross_entropy(logits, target) + 0.5 * F.cross_entropy(logits.T[seen], of_text)
        where = torch.as_tensor(data["is_humanoid"][rows])
        there = positions[rows][where].to(device)
        loss_position = F.smooth_l1_loss(position_head(features)[where], there)
        loss = loss_clip + 2.0 * loss_position
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            scalars = {"clip": loss_clip, "position": loss_position, "scale": scale}
            progress.set_postfix({key: f"{value.item():.3f}" for key, value in scalars.items()})
    return model.cpu().eval()


def sentences_of(texts):
    """The wordings of a concept with one of the subjects; the model was taught all of them."""
    return [text.replace("{s}", SUBJECTS[0]) for text in texts]


def save(args, model, config, wordings):
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        model.logit_scale.clamp_(max=float(np.log(20)))
    (args.out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = model.state_dict()
    for name, value in weights.items():
        weights[name] = value.half().contiguous() if value.is_floating_point() else value
    save_file(weights, args.out / "open_clip_model.safetensors")
    sentences = dict.fromkeys(sum(map(sentences_of, wordings), []) + SUBJECTS)
    (args.out / "sentences.txt").write_text("\n".join(sentences) + "\n")


# REPORT
# concepts that say nothing of the posture
ATTRIBUTES = ("robot", "toppling", "arms", "hands", "one arm")


def epic_distance(reward, label):
    """sqrt(1 - rho) / sqrt(2), rho the correlation of reward and label (paper, section 4.4)."""
    return float(np.sqrt(max(0, 1 - np.corrcoef(reward, label)[0, 1]) / 2))


@torch.inference_mode()
def understood(embeddings, concepts, model, tokenizer):
    """For every sentence: of how many of the ten frames that it scores highest it is true. A rare
    posture has fewer than ten frames: then of as many as it has."""
    result = {}
    for name, texts in CONCEPTS.items():
        true = torch.tensor([name in of_frame for of_frame in concepts])
        for sentence in sentences_of(texts):
            rewards = embeddings @ F.normalize(model.encode_text(tokenizer([sentence]))[0], dim=0)
            best = rewards.topk(min(10, true.sum().item())).indices
            result[sentence] = f"{true[best].sum()} of {len(best)}"
            print(f"  {result[sentence]:8} {sentence}")
    return result


def report(args, tests):
    """Accuracy and EPIC distances on frames that were not trained on.
    `tests`: name -> (frames, concepts, labels)."""
    clip_model, robot = f"local-dir:{args.out}", "a humanoid robot"
    model, _, tokenizer = sac_vlmrm.load_clip(clip_model, "cpu", "fp32")
    clip = sac_vlmrm.CLIPReward(clip_model, (robot,), (robot,))
    postures = [name for name in CONCEPTS if not name.startswith(ATTRIBUTES) and ", " not in name]
    captions = [CONCEPTS[name][0].replace("{s}", robot) for name in postures]
    result = {}
    if not (args.average or args.report_only):
        # what the weights do not depend on
        other = "out", "visit", "visit_states", "unseen", "average", "report_only"
        result["args"] = {key: value for key, value in asdict(args).items() if key not in other}
    for test, (frames, concepts, labels) in tests.items():
        with torch.inference_mode():
            text = F.normalize(model.encode_text(tokenizer(captions)), dim=-1)
            embeddings = clip.embed_images(frames)
        named = (embeddings @ text.T).argmax(1).numpy()
        accuracy = float(np.mean([postures[i] == true[0] for i, true in zip(named, concepts)]))
        result[test] = {"frames": len(frames), "posture_accuracy": accuracy, "epic": {}}
        named_right = f"posture named right in {accuracy:.1%} of {len(frames)} frames"
        print(f"{test}: {named_right}, {len(postures)} postures")
        for (task, prompt), label in zip(sac_vlmrm.TASKS.items(), labels.T):
            if not label.any():
                continue
            row = {}
            for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
                with torch.inference_mode():
                    clip.goal = F.normalize(model.encode_text(tokenizer([prompt])), dim=-1)[0]
                    clip.direction = F.normalize(clip.goal - clip.baseline, dim=0)
                    clip.alpha = alpha
                    row[alpha] = epic_distance(clip(embeddings).numpy(), label)
            result[test]["epic"][task] = {"goal_states": int(label.sum()), **row}
            shown = "  ".join(f"alpha {alpha}: {distance:.3f}" for alpha, distance in row.items())
            print(f"  EPIC {task:14} {label.sum():5} goal states   {shown}")
        result[test]["sentences"] = understood(embeddings, concepts, model, tokenizer)
    (args.out / "report.json").write_text(json.dumps(result, indent=2, default=str) + "\n")


def visited_states(runs, count, rng):
    """States (N, 24) from the replay buffers of trained policies, most of them from the second half
    of training."""
    states = []
    for folder in runs:
        paths = sorted(folder.glob("replay_*.pt"), key=lambda path: path.stem.split("_")[::-1])
        obs = (torch.load(path, weights_only=True)["obs"] for path in paths)  # (E, T+1, 255)
        qpos = torch.cat([chunk[:, 1:, :24].reshape(-1, 24) for chunk in obs])
        late = rng.integers(len(qpos) // 2, len(qpos), count * 3 // 4)
        rows = np.concatenate([late, rng.integers(0, len(qpos), count - len(late))])
        states.append(qpos[rows].numpy())
    return np.concatenate(states)


def average(folders, out):
    """The mean of models that were trained from the same start (Wortsman et al., "Model soups:
    averaging weights of multiple fine-tuned models improves accuracy", 2022)."""
    models = [load_file(folder / "open_clip_model.safetensors") for folder in folders]
    shutil.copytree(folders[0], out, dirs_exist_ok=True)
    mean = {
        key: torch.stack([model[key].float() for model in models]).mean(0).to(value.dtype)
        for key, value in models[0].items()
    }
    save_file(mean, out / "open_clip_model.safetensors")


def main(argv=None):
    args = tyro.cli(Args, args=argv)
    for folder in (*args.average, *filter(None, [args.start])):
        there = (folder / "open_clip_model.safetensors").is_file()
        sac_vlmrm.check(there, f"{folder}: no open_clip_model.safetensors")
    if args.average:
        average(args.average, args.out)
    started = time.time()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.data_seed)
    visited_file = HERE / "visited_states.npz"
    visited = np.zeros((0, 24))
    if visited_file.exists():
        visited = np.load(visited_file)["qpos"].astype(np.float64)
    if args.visit:
        visited = np.concatenate([visited, visited_states(args.visit, args.visit_states, rng)])
        np.savez_compressed(visited_file, qpos=visited.astype(np.float16))  # to a millimetre

    # states, frames and captions, a thousand at a time; the last chunks are held out
    count = args.frames // 1000
    seed, size = args.data_seed * 100_000, args.image_size
    every = max(1.0, Args.frames / args.frames)  # the same share of fewer frames
    visited = visited[np.arange(0, len(visited), every).astype(int)]
    view = ("front", "front", "side")
    chunks = [(seed + i, 1000, size, visited[i::count][:1000], view[i % 3]) for i in range(count)]
    views = ["front"] * 4 + ["side"] * 2
    held_out = [(seed + count + i, 1000, size, [], camera) for i, camera in enumerate(views)]
    unseen = visited_states(args.unseen, args.visit_states, rng) if args.unseen else []
    parts = np.split(unseen, range(1000, len(unseen), 1000))
    held_out += [(0, len(part), size, part, "front") for part in parts if len(part)]
    trains = not (args.average or args.report_only)
    jobs = chunks + held_out if trains else held_out
    with multiprocessing.get_context("forkserver").Pool(os.cpu_count()) as pool:
        made = list(tqdm(pool.imap(make_chunk, jobs), total=len(jobs), desc="thousands of frames"))
    frames, concepts, positions, labels = zip(*made)
    frames, positions, labels = (np.concatenate(part) for part in (frames, positions, labels))
    concepts = sum(concepts, [])
    n = 1000 * count if trains else 0  # to train on
    parts = {"held out": slice(n, n + 4000), "from the side": slice(n + 4000, n + 6000)}
    parts["visited by unseen policies"] = slice(n + 6000, None)
    tests = {
        name: (frames[part], concepts[part], labels[part])
        for name, part in parts.items()
        if len(frames[part])
    }
    if not trains:
        return report(args, tests)
    frames, concepts, positions = frames[:n], concepts[:n], positions[:n]

    wordings = dict(CONCEPTS)
    is_humanoid = np.ones(len(frames), dtype=bool)
    if args.classic_frames:
        from classic_scenes import classic_examples

        classic, captions = classic_examples(rng, args.classic_frames, args.image_size)
        wordings |= {text: [text] for texts in captions for text in texts}
        frames, concepts = np.concatenate([frames, classic]), concepts + captions
        positions = np.pad(positions, ((0, len(classic)), (0, 0)))
        is_humanoid = np.pad(is_humanoid, (0, len(classic)))
    # half way to drawing every posture, told apart by what the arms do, equally often
    kinds = [
        next((name for name in true if name in CONCEPTS and ", " in name), true[0])
        for true in concepts
    ]
    names, counts = np.unique(kinds, return_counts=True)
    rarity = dict(zip(names, counts**-0.5))
    balance = np.array([rarity[kind] for kind in kinds])
    for part, share in ((is_humanoid, 0.8), (~is_humanoid, 0.2)):
        balance[part] *= share / max(balance[part].sum(), 1e-9)
    mean, std = positions[is_humanoid].mean(0), positions[is_humanoid].std(0)
    data = {
        "frames": frames,
        "targets": targets_of(concepts, list(wordings)),
        "positions": (positions - mean) / std,
        "balance": balance / balance.sum(),
        "wordings": list(wordings.values()),
        "is_humanoid": is_humanoid,
    }
    print(f"{len(frames)} frames, {len(wordings)} concepts, {time.time() - started:.0f} s")

    config = model_config(args)
    model = open_clip.CLIP(**config["model_cfg"]).to(memory_format=torch.channels_last)
    preprocess_cfg = open_clip.transform.PreprocessCfg(**config["preprocess_cfg"])
    preprocess = open_clip.transform.image_transform_v2(preprocess_cfg, is_train=False)
    if args.start:
        open_clip.load_checkpoint(model, str(args.start / "open_clip_model.safetensors"))
    train(args, data, model, preprocess, open_clip.SimpleTokenizer(context_length=24))
    save(args, model, config, list(wordings.values()))
    print(f"trained, {time.time() - started:.0f} s in all")
    report(args, tests)


if __name__ == "__main__":
    main()
