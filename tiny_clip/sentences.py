"""Sentences beyond the paper's eight: how often their policies do what was asked, and a picture.

    python sac_vlmrm.py --prompt "a humanoid robot in a deep squat" --run-name squat
    python tiny_clip/sentences.py runs/squat runs/back   # docs/sentences.png has a row for each

Success is the paper's: in the goal state for half of an episode or more, of 100 episodes with the
mean action. The goal states are geometry, as in `goal_states` of sac_vlmrm.py, and were written
down before any of these policies was looked at.
"""

import functools
import json
import sys
import textwrap
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sac_vlmrm

import imageio.v3 as iio
import mujoco
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

SIZE = 120  # pixels
TOUCH = 0.02  # m


class Body:
    """What the goals below are said in, of one state qpos (24,): left and right as (2,), metres.
    `stands`, `kneels`: whether `goal_states` says so."""

    def __init__(self, qpos, stands, kneels):
        data = mujoco.MjData(sac_vlmrm.HUMANOID)
        data.qpos = qpos
        mujoco.mj_kinematics(sac_vlmrm.HUMANOID, data)
        sides = "left", "right"
        hand, foot = (
            np.array([data.geom(f"{side}_{part}").xpos for side in sides])
            for part in ("hand", "foot")
        )
        torso = data.body("torso").xmat.reshape(3, 3)
        self.upright, self.chest_up = torso[2, 2], torso[2, 0]  # cosines
        self.knees = np.array([data.body(f"{side}_shin").xpos[2] for side in sides]) - 0.049
        self.feet, self.hands = foot[:, 2] - 0.075, hand[:, 2]  # undersides' and centres' heights
        butt = data.geom("butt")
        self.seat = butt.xpos[2] - 0.07 * abs(butt.xmat[8]) - 0.09
        self.height, self.head = data.body("torso").xpos[2], data.geom("head").xpos[2]
        pelvis = data.body("pelvis")
        self.feet_ahead = ((foot - pelvis.xpos) @ pelvis.xmat.reshape(3, 3))[:, 0]
        _, self.hands_out, self.hands_up = ((hand - data.body("torso").xpos) @ torso).T
        self.hands_out = self.hands_out * [1, -1]  # to its own side
        self.from_head = np.linalg.norm(hand - data.geom("head").xpos, axis=1)
        self.stands, self.kneels = stands, kneels


def bodies(qpos):
    """One of each of the states qpos (..., 24), as a flat list."""
    goals = sac_vlmrm.goal_states(qpos)
    stands, kneels = goals["standing"].reshape(-1), goals["kneeling"].reshape(-1)
    return [Body(*state) for state in zip(qpos.reshape(-1, 24), stands, kneels)]


GOALS = {
    "a humanoid robot lying on its back": lambda b: (
        b.chest_up > 0.8 and b.height < 0.25 and b.seat < 0.1
    ),
    "a humanoid robot sitting on the floor": lambda b: (
        b.seat < 0.05 and b.upright > 0.7 and b.feet_ahead.min() > 0.3
    ),
    "a humanoid robot in a deep squat": lambda b: (
        b.feet.max() < TOUCH and b.knees.min() > 0.1 and 0.05 < b.seat < 0.4 and b.upright > 0.5
    ),
    "a humanoid robot down on one knee": lambda b: (
        b.knees.min() < TOUCH and b.knees.max() > 0.2 and b.feet.max() < 0.1 and b.upright > 0.8
    ),
    "a humanoid robot standing up with its arms out to the sides": lambda b: (
        b.stands and b.hands_out.min() > 0.5 and abs(b.hands_up).max() < 0.3
    ),
    "a humanoid robot kneeling, with both arms raised": lambda b: (
        b.kneels and b.hands_up.min() > 0 and b.hands.min() > b.head
    ),
    "a humanoid robot kneeling with its hands at its head": lambda b: (
        b.kneels and b.from_head.max() < 0.25
    ),
    "a humanoid robot sitting on its heels": lambda b: b.kneels and b.seat < 0.22,
    "a humanoid robot bowing with knees on the floor": lambda b: (
        b.knees.max() < TOUCH and b.chest_up < -0.5 and b.seat > 0.1 and b.hands.min() > 0.1
    ),
    "a humanoid robot sitting with knees pulled up": lambda b: (
        b.seat < 0.05 and b.upright > 0.7 and b.knees.min() > 0.25 and b.feet.max() < 0.1
    ),
    "a humanoid robot lying face down": lambda b: (
        b.chest_up < -0.8 and b.height < 0.25 and b.seat < 0.2 and b.knees.max() < 0.1
    ),
    "a humanoid robot kneeling with its arms out to the sides": lambda b: (
        b.kneels and b.hands_out.min() > 0.5 and abs(b.hands_up).max() < 0.3
    ),
    "a humanoid robot standing up with its hands at its head": lambda b: (
        b.stands and b.from_head.max() < 0.25
    ),
}


def play(run, episodes=100):
    """qpos (E, T, 24) of a run's best policy, if MuJoCo reset an episode (E,), prompt and step."""
    args = json.loads((run / "args.json").read_text())["args"]
    best = sac_vlmrm.load_saved(run / "best.pt", ("actor", "global_step"))
    actor = sac_vlmrm.Actor(args["hidden"], args["normalize"])
    actor.load_state_dict(best["actor"])
    envs = sac_vlmrm.VLMHumanoid(episodes, torch.get_num_threads())
    policy = functools.partial(actor.act, sample=False)
    obs, _, _, infos = sac_vlmrm.collect(envs, policy, 1_000_000)
    return obs[:, 1:, :24], infos["unstable"], " + ".join(args["prompt"]), best["global_step"]


def main():
    runs, rows = [Path(run) for run in sys.argv[1:]], []
    sac_vlmrm.check(runs, f"usage: {Path(sys.argv[0]).name} RUN_FOLDER ...")
    for run in runs:
        sac_vlmrm.check((run / "best.pt").is_file(), f"{run}: no best.pt")
    with closing(sac_vlmrm.Painter((SIZE, SIZE), "modified", ("front",))) as painter:
        for run in runs:
            qpos, unstable, prompt, step = play(run)
            said = f"“{prompt}”"
            if prompt in GOALS:
                goal = np.array([bool(GOALS[prompt](body)) for body in bodies(qpos)])
                goal = goal.reshape(qpos.shape[:2]) & ~unstable[:, None]  # (E, T)
                rate, share = sac_vlmrm.success_rate(goal), goal.mean()
                said += f"\n{rate:.0%} of 100 episodes"
                print(f"{run}: {prompt}: {rate:.0%}, in goal {share:.0%}, policy of step {step}")
            caption = Image.new("RGB", (2 * SIZE, SIZE), "white")
            text = "\n".join(textwrap.fill(line, 34) for line in said.splitlines())
            font = ImageFont.load_default(13)
            ImageDraw.Draw(caption).text((8, SIZE / 2), text, "black", font, "lm")
            frames = painter(qpos[0, 9::10])[:, 0]  # (10, H, W, 3)
            rows.append(np.concatenate([np.asarray(caption), *frames], axis=1))
    path = ROOT / "docs/sentences.png"
    iio.imwrite(path, np.concatenate(rows))
    print(f"wrote {path}, every tenth frame of an episode")


if __name__ == "__main__":
    main()
