"""The robots: they move like Gymnasium's, mirrored ones too; what the camera sees of them."""

from contextlib import closing

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from poses import KNEEL, POSES, STAND, qpos_of

from sac_vlmrm import (
    EPISODE_LENGTH,
    HUMANOID,
    TASKS,
    Painter,
    VLMHumanoid,
    collect,
    goal_states,
    mirror_image,
)

LOOKS = [(t, (c,)) for t in ("modified", "original") for c in ("front", "side", "original")]
OBS = {
    "terminate_when_unhealthy": False,
    "exclude_current_positions_from_observation": False,
    "include_qfrc_actuator_in_observation": False,
    "include_cfrc_ext_in_observation": False,
}


def torques(seed, num_envs, high=0.4):
    """(T, N, 17)"""
    shape = EPISODE_LENGTH, num_envs, 17
    return np.random.default_rng(seed).uniform(-high, high, shape).astype(np.float32)


# physics
@pytest.mark.parametrize("num_threads", [1, 2])
def test_robots_move_bit_for_bit_like_gymnasiums_and_are_paid_the_same(num_threads):
    """From reset with the seeds 7, 8, 9, through a whole episode, in which they fall; twice."""
    envs, actions = VLMHumanoid(3, num_threads), torques(0, 3)
    for seed in (7, 20):
        plain = [gym.make("Humanoid-v5", max_episode_steps=EPISODE_LENGTH, **OBS) for _ in range(3)]
        obs, _ = envs.reset(seed=seed)
        np.testing.assert_array_equal(obs, [e.reset(seed=seed + i)[0] for i, e in enumerate(plain)])
        for action in actions:
            obs, rewards, terminations, truncations, _ = envs.step(action)
            rows = [env.step(torque) for env, torque in zip(plain, action)]
            expected_obs, expected_rewards, *ends, _ = zip(*rows)
            np.testing.assert_array_equal(obs, expected_obs)
            np.testing.assert_allclose(rewards, expected_rewards, rtol=0, atol=1e-12)
            assert [terminations.tolist(), truncations.tolist()] == [list(end) for end in ends]
        assert (obs[:, 2] < 1).any()  # below Gymnasium's healthy range: it has not been paid for


def test_spaces_hold_what_reset_and_step_return():
    envs = VLMHumanoid(2)
    obs, infos = envs.reset(seed=0)
    assert isinstance(envs, gym.vector.VectorEnv) and obs in envs.observation_space
    assert obs[0] in envs.single_observation_space and infos == {}
    envs.action_space.seed(0)
    obs, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())
    assert obs in envs.observation_space and obs[1] in envs.single_observation_space
    assert rewards.shape == terminations.shape == truncations.shape == (2,)
    assert terminations.dtype == truncations.dtype == infos["unstable"].dtype == bool
    assert obs.shape == (2, 255) and envs.action_space.shape == (2, 17)


def test_an_observation_stays_as_it_was_when_the_robots_move_on():
    envs = VLMHumanoid(2)
    obs, _ = envs.reset(seed=0)
    before = obs.copy()
    after = envs.step(torques(0, 2)[0])[0]
    assert (obs == before).all() and (obs != after).any()


def test_episode_is_truncated_after_100_steps_and_never_terminated():
    """One robot with random torques, one with none: both fall."""
    envs, lowest, ends = VLMHumanoid(2), np.inf, []
    envs.reset(seed=5)
    for action in torques(5, 2) * np.float32([[1], [0]]):
        obs, _, terminations, truncations, _ = envs.step(action)
        lowest = np.minimum(lowest, obs[:, 2])
        ends.append((*terminations, *truncations))
    assert (lowest < 1).all()  # below Gymnasium's healthy range: its environment would have ended
    assert ends == [(False,) * 4] * 99 + [(False, False, True, True)]


def test_a_simulation_that_blows_up_is_reported_and_disturbs_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs there
    envs, twins, actions = VLMHumanoid(3), VLMHumanoid(3), torques(3, 3)
    envs.reset(seed=0), twins.reset(seed=0)
    envs.step(actions[0]), twins.step(actions[0])
    envs.sim.qvel[1] = 1e12
    for action in actions[1:4]:  # still reported when the robot is on its feet again
        obs, _, _, _, infos = envs.step(action)
        expected, _, _, _, calm = twins.step(action)
        assert infos["unstable"].tolist() == [False, True, False] and not calm["unstable"].any()
        assert np.isfinite(obs).all() and np.abs(obs[1, :24]).max() < 10
        np.testing.assert_array_equal(obs[[0, 2]], expected[[0, 2]])
    envs.reset(seed=0), twins.reset(seed=0)
    obs, _, _, _, infos = envs.step(actions[0])
    assert not infos["unstable"].any()
    np.testing.assert_array_equal(obs, twins.step(actions[0])[0])


def test_collect_returns_what_happened_in_order():
    """obs[:, t + 1] is what actions[:, t] at obs[:, t] led to."""
    envs, shares = VLMHumanoid(2), torques(1, 2, high=1.0)
    queue = iter(shares)
    seen = []
    obs, actions, rewards, infos = collect(envs, lambda o: (seen.append(o), next(queue))[1], 11)
    assert obs.shape == (2, EPISODE_LENGTH + 1, 255) and rewards.shape == (2, EPISODE_LENGTH)
    np.testing.assert_array_equal(actions, shares.swapaxes(0, 1))
    np.testing.assert_array_equal(obs[:, :-1], np.stack(seen, axis=1))
    np.testing.assert_array_equal(obs[:, 0], envs.reset(seed=11)[0])
    for t in range(EPISODE_LENGTH):
        after, reward, *_ = envs.step(shares[t] * np.float32(0.4))
        np.testing.assert_array_equal(obs[:, t + 1], after)
        np.testing.assert_array_equal(rewards[:, t], reward)


# the mirror
def test_mirrored_twice_is_as_before():
    mirror_obs, mirror_action = mirror_image("cpu")
    obs, actions = torch.randn(3, 5, 255), torch.randn(3, 5, 17)
    assert torch.equal(mirror_obs(mirror_obs(obs)), obs) and (mirror_obs(obs) != obs).any()
    assert torch.equal(mirror_action(mirror_action(actions)), actions)
    assert (mirror_action(actions) != actions).any()


def test_mirrored_robot_moves_as_the_mirror_image():
    """Mirrored start and torques give the mirrored observations, once the model's two small
    asymmetries (see mirror_image) are gone and its solver no longer depends on the order of the
    contacts."""
    mirror_obs, mirror_action = (
        lambda x, mirror=mirror: mirror(torch.as_tensor(x)).numpy()
        for mirror in mirror_image("cpu")
    )
    env = HumanoidEnv(**OBS)
    model = env.model
    for field, part in ((model.jnt_stiffness, "knee"), (model.dof_armature, "hip_y")):
        offset = 5 if field is model.dof_armature else 0  # the free joint has six of them
        right, left = (offset + model.joint(f"{side}_{part}").id for side in ("right", "left"))
        assert field[right] != field[left]
        field[right] = field[left]
    model.opt.solver, model.opt.tolerance = mujoco.mjtSolver.mjSOL_NEWTON, 0
    mujoco.mj_setConst(model, env.data)

    def play(start, actions):
        env.reset(seed=0)
        env.set_state(start[:24], start[24:47])
        env.data.qacc_warmstart[:] = 0
        return np.array([env.step(action)[0] for action in actions])

    start, _ = env.reset(seed=5)
    actions = torques(5, 1)[:30, 0]  # until both feet have left and met the floor
    there = play(start, actions)
    mirrored = play(mirror_obs(start), mirror_action(actions))
    assert np.abs(mirror_obs(there) - mirrored).max() < 1e-3
    for part in (np.s_[:24], np.s_[24:47], np.s_[47:177], np.s_[177:]):
        # qpos, qvel, inertia, velocity
        assert np.abs(there - mirrored)[:, part].max() > 0.1
    env.close()


def mirrored_qpos(qpos):
    obs = np.zeros((*qpos.shape[:-1], 255))
    obs[..., :24] = qpos
    return mirror_image("cpu")[0](torch.as_tensor(obs)).numpy()[..., :24]


@pytest.mark.parametrize("task", TASKS)
def test_mirror_image_is_seen_in_the_mirrored_frame_and_judged_alike(task, painter):
    goal, near_misses = POSES[task]
    poses = [*goal.values(), *near_misses.values()]
    qpos = np.stack([qpos_of(HUMANOID, pose | {"yaw": 30}) for pose in poses])
    mirrored = mirrored_qpos(qpos)
    for frame, other in zip(*(painter(x)[:, 0].astype(int) for x in (qpos, mirrored))):
        flipped = frame[:, ::-1]
        # where left and right differ by more than the wood's grain
        robot = np.abs(frame - flipped).max(2) > 60
        # the light comes from one side, so the shading is not the same
        distance, other_distance = np.abs(other - flipped)[robot], np.abs(other - frame)[robot]
        assert distance.mean() < 0.5 * other_distance.mean()
    expected = [True] * len(goal) + [False] * len(near_misses)
    assert goal_states(mirrored)[task].tolist() == goal_states(qpos)[task].tolist() == expected


# what the camera sees
@pytest.fixture(scope="module")
def looks():
    """Painters by (textures, camera)."""
    painters = {look: Painter((48, 48), *look) for look in LOOKS}
    yield painters
    for painter in painters.values():
        painter.close()


@pytest.fixture(scope="module")
def states():
    """Ten states of a fall, (2, 5, 24)."""
    envs = VLMHumanoid(2)
    return collect(envs, lambda obs, queue=iter(torques(2, 2, 1.0)): next(queue), 3)[0][
        :, ::25, :24
    ]


def test_same_state_same_frame(painter, states):
    """Whatever was drawn before, by this painter or by others in the process."""
    stand, kneel = qpos_of(HUMANOID, STAND), qpos_of(HUMANOID, KNEEL)
    first = painter(stand)
    assert first.shape == (1, 64, 64, 3) and first.dtype == np.uint8
    assert (painter(kneel) != first).any()
    with closing(Painter((64, 64), "modified", ("front",))) as other:
        other(states)
        with closing(Painter((30, 40), "original", ("original",))) as third:
            third(kneel)
            assert (other(stand) == first).all() and (painter(stand) == first).all()
        assert (other(stand) == first).all() and (painter(stand) == first).all()
    assert (painter(np.stack([kneel, stand]))[1] == first).all()


@pytest.mark.parametrize("textures", ["modified", "original"])
@pytest.mark.parametrize("cameras", [("front",), ("side", "original", "front")], ids=len)
def test_two_threads_draw_bit_for_bit_what_one_draws(textures, cameras, states):
    with closing(Painter((40, 56), textures, cameras, 1)) as one:
        expected = one(states)
        one_by_one = np.stack([one(qpos) for qpos in states.reshape(-1, 24)])
    assert expected.shape == (2, 5, len(cameras), 40, 56, 3)
    np.testing.assert_array_equal(one_by_one.reshape(expected.shape), expected)
    with closing(Painter((40, 56), textures, cameras, 2)) as two:
        np.testing.assert_array_equal(two(states), expected)
        np.testing.assert_array_equal(two(states[0, 0]), expected[0, 0])  # fewer than threads
        np.testing.assert_array_equal(two(states[:, :3]), expected[:, :3])


def test_each_switch_changes_the_picture(looks):
    frames = [looks[look](qpos_of(HUMANOID, STAND)).astype(float) for look in LOOKS]
    for i, one in enumerate(frames):
        for j, other in enumerate(frames[i + 1 :], i + 1):
            # of 255 grey levels; front and side share sky and floor, only the robot is turned
            least = 5 if {LOOKS[i][1], LOOKS[j][1]} == {("front",), ("side",)} else 10
            assert np.abs(one - other).mean() > least, (LOOKS[i], LOOKS[j])


def test_no_switch_changes_the_physics(looks):
    """A painter has a model of its own; bodies and joints are those that the robots move with."""
    for look, painter in looks.items():
        for field in ("body_mass", "body_inertia", "body_pos", "jnt_pos", "geom_size", "qpos0"):
            floor = HUMANOID.geom("floor").id if field == "geom_size" else None
            drawn, moved = getattr(painter.model, field).copy(), getattr(HUMANOID, field).copy()
            if floor is not None:
                drawn[floor] = moved[floor] = 0  # only the grid that is drawn
            np.testing.assert_array_equal(drawn, moved, err_msg=f"{look} {field}")


def test_original_look_is_gymnasiums(looks, states):
    """Up to the quality of edges and shadows; the other looks are far from it."""
    plain = gym.make(
        "Humanoid-v5", render_mode="rgb_array", width=48, height=48, camera_name="track"
    )
    plain.reset(seed=0)
    for qpos in states[0, :3]:
        plain.unwrapped.set_state(qpos, np.zeros(23))
        frame = plain.render().astype(int)
        distance = {look: np.abs(painter(qpos) - frame).mean() for look, painter in looks.items()}
        assert distance.pop(("original", ("original",))) < 3 < 10 < min(distance.values())
    plain.close()


@pytest.mark.parametrize("textures", ["modified", "original"])
def test_front_camera_is_the_papers(looks, textures):
    [camera] = looks[textures, ("front",)].cameras
    assert (camera.distance, camera.elevation, camera.azimuth) == (3.5, -10, 180)
    assert camera.lookat.tolist() == [0, 0, 1]


def test_several_views_are_what_each_camera_sees_alone(looks, states):
    views = "side", "original", "front"
    with closing(Painter((48, 48), "modified", views)) as painter:
        together = np.moveaxis(painter(states), 2, 0)  # (V, 2, 5, H, W, 3)
    for view, frames in zip(views, together):
        np.testing.assert_array_equal(frames, looks["modified", (view,)](states)[:, :, 0])


def test_front_camera_stays_and_original_camera_follows_the_robot(looks):
    """3 m further back the robot looks as large to the original camera, and much smaller to the
    one in front."""
    ratio = {}
    for camera in ("front", "original"):
        painter, pixels = looks["modified", (camera,)], []
        model = painter.model
        reflectance, rgba = model.mat_reflectance.copy(), model.geom_rgba.copy()
        model.mat_reflectance[:] = 0  # the mirror image is not the robot
        for x in (0.0, -3.0):
            qpos = qpos_of(HUMANOID, STAND)
            qpos[0] = x
            frame = painter(qpos)
            model.geom_rgba[1:, 3] = 0  # all but the floor
            pixels.append((painter(qpos) != frame).any(-1).sum())
            model.geom_rgba[:] = rgba
        ratio[camera] = pixels[1] / pixels[0]
        model.mat_reflectance[:] = reflectance
    assert 0.9 < ratio["original"] < 1.1 and ratio["front"] < 0.5
