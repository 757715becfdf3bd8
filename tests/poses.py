"""Hand-made poses of the humanoid: joint angles in degrees, and a helper that puts them on the
floor.

Left and right share a name without a side: "knee" sets both knees. Zero is the model's own rest
pose: straight legs, upper arms forward, elbows bent. hip_y < 0 lifts the thigh forward, hip_x < 0
spreads the legs, hip_z < 0 turns the leg outwards, knee < 0 bends it; "pitch" leans the whole robot
forward, "roll" tilts it to its right; "height" lifts it (m).
"""

import mujoco
import numpy as np

DOWN = {"shoulder1": -10, "shoulder2": 60, "elbow": -85}  # arms hanging at the sides
UP = {"shoulder1": 60, "shoulder2": -20, "elbow": -80}
HIPS = {"shoulder1": -47, "shoulder2": 75, "elbow": -12}
CHEST = {"shoulder1": 64, "shoulder2": -55, "elbow": 12}
CROSSED = {"shoulder1": -57, "shoulder2": -2, "elbow": -24}
TOUCHING = {"shoulder1": -50, "shoulder2": 5, "elbow": -24}
FORWARD = {"shoulder1": -30, "shoulder2": 0, "elbow": -90}
STAND = {"knee": -2, **DOWN}
# the feet are thicker than the shins, so at 90 the knees would hang 3 cm above the floor
KNEEL = {"knee": -95, **DOWN}
LOTUS = {"hip_x": 5, "hip_z": -60, "hip_y": -80, "knee": -160, "abdomen_y": -60, "pitch": 0, **DOWN}
SPLITS = {"hip_x": -10, "hip_z": -60, "hip_y": -75, "knee": -2, "abdomen_y": -15, **DOWN}
BELLY = {"hip_x": -25, "hip_z": 17, "hip_y": 20, "knee": -155, "abdomen_y": 30, "pitch": 35, **DOWN}
HALF_KNEEL = {"left_hip_y": -87, "left_knee": -87, "right_knee": -97, **DOWN}
ROOT = ("yaw", "pitch", "roll", "height")


def qpos_of(model, pose):
    """qpos (24,) of a pose, its lowest geom just touching the floor, then lifted by "height"."""
    angles = {}
    for name, degrees in pose.items():
        if name in ROOT:
            continue
        if mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_JOINT, name) >= 0:
            angles[name] = degrees
        else:  # the model's shoulders turn in opposite senses
            right = -degrees if "shoulder" in name else degrees
            angles |= {f"left_{name}": degrees, f"right_{name}": right}
    data = mujoco.MjData(model)
    data.qpos[:3] = 0, 0, 3
    mujoco.mju_euler2Quat(data.qpos[3:7], np.radians([pose.get(k, 0) for k in ROOT[:3]]), "zyx")
    for name, degrees in angles.items():
        low, high = np.degrees(model.joint(name).range)
        inside = low - 1e-6 <= degrees <= high + 1e-6
        assert inside, f"{name} = {degrees} is outside its limits {low:.0f} .. {high:.0f}"
        data.joint(name).qpos[0] = np.radians(degrees)
    mujoco.mj_kinematics(model, data)
    floor = model.geom("floor").id
    gaps = [
        mujoco.mj_geomDistance(model, data, floor, geom, 10, None)
        for geom in range(model.ngeom)
        if geom != floor
    ]
    data.qpos[2] += pose.get("height", 0) - min(gaps)
    return data.qpos.copy()


# For each task: poses that are it, and poses that just miss it, named by what is missing.
POSES = {
    "kneeling": (
        {
            "upright on the knees": KNEEL,
            "leaning a little": {**KNEEL, "pitch": 20, "hip_y": -20},
            "sitting on the heels": {**KNEEL, "hip_y": -62, "knee": -157},
            "knees apart": {**KNEEL, "hip_x": -20},
            "arms raised": {**KNEEL, **UP},
        },
        {
            "5 cm in the air": {**KNEEL, "height": 0.05},
            "on one knee": HALF_KNEEL,
            "leaning far back": {**KNEEL, "pitch": -45, "knee": -140},
            "bent far forward": {**KNEEL, "pitch": 50, "hip_y": -50},
            "on all fours": {**KNEEL, "hip_y": -75, "pitch": 75, **FORWARD},
            "hands on the floor": {
                "pitch": 34,
                "hip_y": -96,
                "knee": -157,
                "shoulder1": -40,
                "shoulder2": 0,
                "elbow": -90,
            },
            "on the belly, chest up": BELLY,
            "crouching": {"hip_y": -100, "knee": -120, "pitch": 20, **DOWN},
            "standing": STAND,
        },
    ),
    "standing": (
        {
            "straight": STAND,
            "knees a little bent": {**STAND, "hip_y": -20, "knee": -40},
            "legs apart": {**STAND, "hip_x": -15},
            "leaning a little": {**STAND, "pitch": 10, "hip_y": -10},
            "arms raised": {**STAND, **UP},
        },
        {
            "crouching": {**STAND, "hip_y": -60, "knee": -100},
            "bowing": {**STAND, "hip_y": -50, "pitch": 50},
            "on one leg": {**STAND, "left_hip_y": -60, "left_knee": -60},
            "5 cm in the air": {**STAND, "height": 0.05},
            "kneeling": KNEEL,
            "lying on its back": {**STAND, "pitch": -90},
            "upside down": {**STAND, "roll": 180},
        },
    ),
    "arms-raised": (
        {"both hands up": {**STAND, **UP}, "legs apart": {**STAND, **UP, "hip_x": -15}},
        {
            "left hand only": {
                **STAND,
                "left_shoulder1": 60,
                "left_shoulder2": -20,
                "left_elbow": -80,
            },
            "right hand only": {
                **STAND,
                "right_shoulder1": -60,
                "right_shoulder2": 20,
                "right_elbow": -80,
            },
            "hands in front of the face": {**STAND, **CHEST},
            "hands at the height of the shoulders": {
                **STAND,
                "shoulder1": 15,
                "shoulder2": 0,
                "elbow": -60,
            },
            "on the knees": {**KNEEL, **UP},
            "arms hanging": STAND,
        },
    ),
    "hands-on-hips": (
        {"elbows out": {**STAND, **HIPS}},
        {
            "left hand only": {
                **STAND,
                "left_shoulder1": -47,
                "left_shoulder2": 75,
                "left_elbow": -12,
            },
            "hands on the chest": {**STAND, **CHEST},
            "arms hanging": STAND,
            "hands in front of the belly": {
                **STAND,
                "shoulder1": -60,
                "shoulder2": 30,
                "elbow": 10,
            },
            "on the knees": {**KNEEL, **HIPS},
        },
    ),
    "arms-crossed": (
        {"forearms crossed": {**STAND, **CROSSED}},
        {
            "hands just touching": {**STAND, **TOUCHING},
            "left hand past the middle only": {
                **STAND,
                **TOUCHING,
                "left_shoulder1": -59,
                "left_shoulder2": -1,
                "left_elbow": -40,
            },
            "right hand past the middle only": {
                **STAND,
                **TOUCHING,
                "right_shoulder1": 59,
                "right_shoulder2": 1,
                "right_elbow": -40,
            },
            "above the shoulders": {**STAND, "shoulder1": 4, "shoulder2": -59, "elbow": -20},
            "below the waist": {**STAND, "shoulder1": -58, "shoulder2": -7, "elbow": -79},
            "arms hanging": STAND,
            "hands on hips": {**STAND, **HIPS},
            "on the knees": {**KNEEL, **CROSSED},
        },
    ),
    "one-leg": (
        {
            "left knee lifted": {**STAND, "left_hip_y": -70, "left_knee": -90},
            "right foot behind": {**STAND, "right_hip_y": 5, "right_knee": -70},
            "leg straight out": {**STAND, "left_hip_y": -60},
        },
        {
            "both feet down": STAND,
            "foot lifted by 5 cm": {**STAND, "left_hip_y": -20, "left_knee": -40},
            "in the air": {**STAND, "left_hip_y": -70, "left_knee": -90, "height": 0.05},
            "standing leg deeply bent": {**STAND, "hip_y": -60, "knee": -100, "left_hip_y": -110},
            "on one knee": HALF_KNEEL,
        },
    ),
    "splits": (
        {
            "as wide as the hips go": SPLITS,
            "a little narrower": {"hip_x": 0, "hip_z": -52, "hip_y": -92, "knee": -2, **DOWN},
        },
        {
            "legs 80 degrees apart": {"hip_x": 0, "hip_z": -40, "hip_y": -92, "knee": -2, **DOWN},
            "legs together": {"hip_y": -92, "knee": -2, **DOWN},
            "one knee bent": {**SPLITS, "left_hip_y": -100, "left_knee": -45},
            "in the air": {**SPLITS, "height": 0.06},
            "feet off the floor": {**SPLITS, "hip_y": -95},
            "not down yet": {**SPLITS, "hip_y": -62},
            "bent forward to the floor": {**SPLITS, "abdomen_y": -75, "pitch": 66},
            "lying on its back": {**SPLITS, "pitch": -80},
            "lotus": LOTUS,
            "standing": STAND,
        },
    ),
    "lotus": (
        {
            "feet together": LOTUS,
            "knees higher": {**LOTUS, "hip_y": -86, "abdomen_y": -50, "pitch": -8},
        },
        {
            "legs stretched": {**LOTUS, "knee": -2},
            "feet in front of the knees": {**LOTUS, "hip_y": -92, "knee": -100},
            "knees drawn up": {**LOTUS, "hip_z": -35},
            "knees together": {**LOTUS, "hip_z": 0},
            "squatting on its feet": {
                "hip_x": -15,
                "hip_z": -60,
                "hip_y": -79,
                "knee": -160,
                "abdomen_y": 28,
                "pitch": 19,
                **DOWN,
            },
            "in the air": {**LOTUS, "height": 0.06},
            "lying on its back": {**LOTUS, "pitch": -60},
            "on the belly, chest up": BELLY,
            "crouching": {"hip_z": -45, "hip_y": -100, "knee": -140, "pitch": 10, **DOWN},
            "kneeling": KNEEL,
        },
    ),
}

OUT = {"shoulder1": 40, "shoulder2": 40, "elbow": -80}
SIT = {"hip_x": -5, "hip_y": -95, "knee": -5, **DOWN}
SQUAT = {"hip_x": -10, "hip_z": -25, "hip_y": -108, "knee": -150, "pitch": 25, **DOWN}
SQUAT |= {"abdomen_y": -30}
ONE_KNEE = {**HALF_KNEEL, "right_knee": -102, "left_hip_y": -90}
HEELS = {**KNEEL, "hip_y": -62, "knee": -157}
BOW = {**KNEEL, "pitch": 50, "hip_y": -50}
KNEES_UP = {"hip_x": -5, "hip_y": -110, "knee": -110, "abdomen_y": -30, **DOWN}
AT_HEAD = {"shoulder1": 5, "shoulder2": -55, "elbow": 40}
ONE_ARM = {"left_shoulder1": 60, "left_shoulder2": -20, "left_elbow": -80}

# The same for the sentences of tiny_clip/sentences.py, by the end of each.
SENTENCES = {
    "lying on its back": (
        [{**STAND, "pitch": -90}, {**STAND, "pitch": -85, "hip_y": -20, "knee": -40}],
        [
            {**STAND, "pitch": 90},
            {**STAND, "roll": 90},
            SIT,
            {**STAND, "pitch": -90, "height": 0.2},
        ],
    ),
    "sitting on the floor": (
        [SIT, {**SIT, "hip_x": -20}],
        [KNEEL, LOTUS, SQUAT, STAND, {**SIT, "pitch": -70}, {**SIT, "height": 0.1}],
    ),
    "in a deep squat": (
        [SQUAT],
        [STAND, KNEEL, SIT, LOTUS, {**STAND, "hip_y": -40, "knee": -80}, {**SQUAT, "height": 0.05}],
    ),
    "down on one knee": ([ONE_KNEE], [KNEEL, STAND, SQUAT, {**ONE_KNEE, "height": 0.05}]),
    "standing up with its arms out to the sides": (
        [{**STAND, **OUT}],
        [STAND, {**STAND, **UP}, {**STAND, **FORWARD}, {**KNEEL, **OUT}],
    ),
    "kneeling, with both arms raised": (
        [{**KNEEL, **UP}],
        [KNEEL, {**STAND, **UP}, {**KNEEL, **ONE_ARM}, {**ONE_KNEE, **UP}],
    ),
    "kneeling with its hands at its head": (
        [{**KNEEL, **AT_HEAD}],
        [KNEEL, {**KNEEL, **UP}, {**KNEEL, **CROSSED}, {**STAND, **AT_HEAD}],
    ),
    "sitting on its heels": ([HEELS], [KNEEL, SIT, LOTUS, SQUAT, {**HEELS, "height": 0.05}]),
    "bowing with knees on the floor": (
        [BOW, {**BOW, "pitch": 40, "hip_y": -40}],
        [KNEEL, BELLY, POSES["kneeling"][1]["on all fours"], {**STAND, "hip_y": -50, "pitch": 50}],
    ),
    "sitting with knees pulled up": (
        [KNEES_UP],
        [SIT, LOTUS, SQUAT, SPLITS, {**KNEES_UP, "pitch": -70}, {**KNEES_UP, "height": 0.1}],
    ),
    "lying face down": (
        [{**STAND, "pitch": 90}, {**STAND, "pitch": 88, "hip_x": -20}],
        [{**STAND, "pitch": -90}, BELLY, BOW, POSES["kneeling"][1]["on all fours"]],
    ),
    "kneeling with its arms out to the sides": (
        [{**KNEEL, **OUT}],
        [KNEEL, {**KNEEL, **UP}, {**KNEEL, **FORWARD}, {**STAND, **OUT}],
    ),
    "standing up with its hands at its head": (
        [{**STAND, **AT_HEAD}],
        [STAND, {**STAND, **UP}, {**STAND, **CROSSED}, {**KNEEL, **AT_HEAD}],
    ),
}
