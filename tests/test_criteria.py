"""The success criteria on hand-made poses (tests/poses.py) that are the pose, and that just miss it."""

import numpy as np
import pytest
from poses import POSES, qpos_of

import sac_vlmrm

CASES = [pytest.param(task, pose, wanted, id=f"{task}: {name}") for task, sets in POSES.items() for wanted, poses in zip((True, False), sets) for name, pose in poses.items()]


def holds(env, task, pose):
    env.set_state(qpos_of(env.model, pose), np.zeros(env.model.nv))
    return bool(sac_vlmrm.TASKS[task](env.data))


def test_every_task_has_poses():
    assert POSES.keys() == sac_vlmrm.TASKS.keys() == set(sac_vlmrm.TASK_PROMPTS.values())


@pytest.mark.parametrize("task, pose, wanted", CASES)
def test_criterion(humanoid, task, pose, wanted):
    assert holds(humanoid, task, pose) == wanted


@pytest.mark.parametrize("task", POSES)
def test_criterion_does_not_depend_on_place_or_heading(humanoid, task):
    """A robot that turned round or moved away is still in its pose."""
    for pose in POSES[task][0].values():
        assert holds(humanoid, task, {**pose, "yaw": 130})
        qpos = qpos_of(humanoid.model, pose)
        qpos[:2] += 3.0, -2.0
        humanoid.set_state(qpos, np.zeros(humanoid.model.nv))
        assert sac_vlmrm.TASKS[task](humanoid.data)


@pytest.mark.parametrize("task", POSES)
def test_criterion_treats_left_and_right_alike(humanoid, task):
    swap = {"left": "right", "right": "left"}
    for wanted, poses in zip((True, False), POSES[task]):
        for name, pose in poses.items():
            mirrored = {}
            for joint, degrees in pose.items():
                side, _, rest = joint.partition("_")
                mirrored[f"{swap[side]}_{rest}" if side in swap else joint] = -degrees if side in swap and "shoulder" in rest else degrees
            assert holds(humanoid, task, mirrored) == wanted, name
