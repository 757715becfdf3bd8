"""The success criteria on hand-made poses (tests/poses.py): the pose, and what just misses it."""

import sys
from pathlib import Path

import numpy as np
import pytest
from poses import POSES, SENTENCES, qpos_of

from sac_vlmrm import HUMANOID, TASKS, goal_states

sys.path.append(str(Path(__file__).parent.parent / "tiny_clip"))
from sentences import GOALS, bodies

CASES = [
    pytest.param(task, pose, wanted, id=f"{task}: {name}")
    for task, sets in POSES.items()
    for wanted, poses in zip((True, False), sets)
    for name, pose in poses.items()
]


def holds(task, pose):
    return bool(goal_states(qpos_of(HUMANOID, pose))[task])


def test_every_task_has_poses():
    assert goal_states(np.zeros((1, 24))).keys() == TASKS.keys() == POSES.keys()


@pytest.mark.parametrize("task, pose, wanted", CASES)
def test_criterion(task, pose, wanted):
    assert holds(task, pose) == wanted


def test_many_states_at_once_are_judged_like_one_by_one():
    qpos = np.stack([qpos_of(HUMANOID, case.values[1]) for case in CASES[:60]]).reshape(4, 5, 3, 24)
    together = goal_states(qpos)
    for task in TASKS:
        assert together[task].shape == (4, 5, 3) and together[task].dtype == bool
    for index in np.ndindex(4, 5, 3):
        alone = goal_states(qpos[index])
        assert {task: goal[index] for task, goal in together.items()} == alone


@pytest.mark.parametrize("task", POSES)
def test_criterion_does_not_depend_on_place_or_heading(task):
    """A robot that turned round or moved away is still in its pose."""
    for pose in POSES[task][0].values():
        assert holds(task, {**pose, "yaw": 130})
        qpos = qpos_of(HUMANOID, pose)
        qpos[:2] += 3.0, -2.0
        assert goal_states(qpos)[task]


@pytest.mark.parametrize("task", POSES)
def test_criterion_treats_left_and_right_alike(task):
    swap = {"left": "right", "right": "left"}
    for wanted, poses in zip((True, False), POSES[task]):
        for name, pose in poses.items():
            mirrored = {}
            for joint, degrees in pose.items():
                side, _, rest = joint.partition("_")
                twin = f"{swap[side]}_{rest}" if side in swap else joint
                mirrored[twin] = -degrees if side in swap and "shoulder" in rest else degrees
            assert holds(task, mirrored) == wanted, name


def test_goal_states_of_the_other_sentences():
    """Those of tiny_clip/sentences.py."""
    assert GOALS.keys() == {f"a humanoid robot {end}" for end in SENTENCES}
    for end, sets in SENTENCES.items():
        for wanted, poses in zip((True, False), sets):
            for pose in poses:
                (body,) = bodies(qpos_of(HUMANOID, pose))
                got = GOALS[f"a humanoid robot {end}"](body)
                assert got == wanted, (end, pose)
