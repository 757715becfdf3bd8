"""The environment: what it looks like, that its look does not touch the physics, and when an episode ends."""

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from poses import KNEEL, POSES, STAND, qpos_of

import sac_vlmrm
from sac_vlmrm import EPISODE_LENGTH, TASKS, VLMHumanoid, make_env, mirror_image

SIZE = 48


def actions(seed, high=0.4):
    return np.random.default_rng(seed).uniform(-high, high, (EPISODE_LENGTH, 17)).astype(np.float32)


def trajectory(env, seed):
    env.reset(seed=seed)
    return np.array([(env.step(action), env.unwrapped.data.qpos.copy())[1] for action in actions(seed)])


@pytest.fixture(scope="module")
def looks():
    """Environments by (textures, camera)."""
    envs = {(t, c): VLMHumanoid(SIZE, t, c) for t in ("modified", "original") for c in ("modified", "original")}
    yield envs
    for env in envs.values():
        env.close()


def test_same_state_same_frame(humanoid):
    """Whatever was drawn before, by this environment or by another one in the process."""
    other = VLMHumanoid(64)
    stand, kneel = qpos_of(humanoid.model, STAND), qpos_of(humanoid.model, KNEEL)
    first = humanoid.render_state(stand).copy()
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert (humanoid.render_state(kneel) != first).any()
    other.reset(seed=0)
    for action in actions(0)[:5]:
        other.step(action)
    assert (other.render_state(stand) == first).all()
    assert (humanoid.render_state(stand) == first).all()
    other.close()


def test_frame_after_a_step_shows_the_state_after_the_step():
    env = gym.wrappers.AddRenderObservation(VLMHumanoid(SIZE), render_only=False)
    env.reset(seed=3)
    seen = []
    for action in actions(3)[:10]:
        obs, *_ = env.step(action)
        seen.append((obs["pixels"].copy(), env.unwrapped.data.qpos.copy()))
    for pixels, qpos in seen:
        assert (env.unwrapped.render_state(qpos) == pixels).all()
    env.close()


def test_each_switch_changes_the_picture_alone(looks):
    qpos = qpos_of(looks["modified", "modified"].model, STAND)
    frames = {look: env.render_state(qpos).astype(float) for look, env in looks.items()}
    names = list(frames)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert np.abs(frames[a] - frames[b]).mean() > 10, (a, b)  # of 255 grey levels


@pytest.mark.parametrize("textures", ["modified", "original"])
def test_modified_camera_is_the_papers_and_stays(looks, textures):
    env = looks[textures, "modified"]
    for x in (0.0, 2.0):
        qpos = qpos_of(env.model, STAND)
        qpos[0] += x
        env.render_state(qpos)
        camera = env.mujoco_renderer._get_viewer("rgb_array").cam
        assert (camera.distance, camera.elevation, camera.azimuth) == (3.5, -10, 180)
        assert camera.lookat.tolist() == [0, 0, 1]


def test_original_camera_follows_the_robot(looks):
    """3 m further back the robot looks as large to the original camera, and much smaller to the modified one."""
    ratio = {}
    for camera in ("modified", "original"):
        env, pixels = looks["modified", camera], []
        reflectance = env.model.mat_reflectance.copy()
        env.model.mat_reflectance[:] = 0  # the mirror image is not the robot
        for x in (0.0, -3.0):
            qpos = qpos_of(env.model, STAND)
            qpos[0] = x
            frame, rgba = env.render_state(qpos).copy(), env.model.geom_rgba.copy()
            env.model.geom_rgba[1:, 3] = 0  # all but the floor
            pixels.append((env.render_state(qpos) != frame).any(-1).sum())
            env.model.geom_rgba[:] = rgba
        ratio[camera] = pixels[1] / pixels[0]
        env.model.mat_reflectance[:] = reflectance
    assert 0.9 < ratio["original"] < 1.1 and ratio["modified"] < 0.5


def test_shadows_are_a_switch(humanoid):
    shadows = VLMHumanoid(64, shadows=True)
    qpos = qpos_of(humanoid.model, STAND)
    difference = shadows.render_state(qpos).astype(int) - humanoid.render_state(qpos)
    assert (difference < -20).sum() > 20 and (difference > 20).sum() < 20  # some pixels darker, the others as they were
    shadows.close()


def test_look_does_not_touch_the_physics(looks):
    """Every look moves bit for bit like Gymnasium's own Humanoid, and is paid the same."""
    plain = gym.make("Humanoid-v5", terminate_when_unhealthy=False)
    expected = trajectory(plain, seed=1)
    for look, env in looks.items():
        assert (trajectory(env, seed=1) == expected).all(), look
    env = looks["modified", "modified"]
    plain.reset(seed=2), env.reset(seed=2)
    for action in actions(2):
        assert plain.step(action)[1] == env.step(action)[1]
    plain.close()


@pytest.mark.parametrize("fall", ["random torques", "no torque"])
def test_episode_is_truncated_after_100_steps_and_never_terminated(fall):
    env = make_env(32)()
    env.reset(seed=5)
    heights, ends = [], []
    for action in actions(5) * (fall == "random torques"):
        _, _, terminated, truncated, _ = env.step(action)
        heights.append(env.unwrapped.data.qpos[2])
        ends.append((terminated, truncated))
    assert min(heights) < 1.0  # below Gymnasium's healthy range, so its own environment would have ended
    assert ends == [(False, False)] * 99 + [(False, True)]
    env.close()


def test_an_environment_that_draws_nothing_moves_alike():
    seeing, blind = make_env(32)(), make_env(0)()
    for step in [lambda env: env.reset(seed=6), *(lambda env, action=action: env.step(action) for action in actions(6)[:20])]:
        (obs, *rest), (blind_obs, *blind_rest) = step(seeing), step(blind)
        np.testing.assert_array_equal(obs["state"], blind_obs["state"])
        assert rest[:-1] == blind_rest[:-1] and obs["pixels"].any() and not blind_obs["pixels"].any()
        assert obs in seeing.observation_space and blind_obs in blind.observation_space
    seeing.close(), blind.close()


def test_observation_is_of_joints_and_bodies(humanoid):
    humanoid.reset(seed=0)
    obs, *_ = humanoid.step(actions(0)[0])
    data = humanoid.data
    bodies = data.cinert[1:].ravel(), data.cvel[1:].ravel()
    np.testing.assert_array_equal(obs, np.concatenate([data.qpos, data.qvel, *bodies]))
    assert obs.shape == (255,)


@pytest.mark.parametrize("task, pose, other", [("kneeling", KNEEL, STAND), ("standing", STAND, KNEEL)])
def test_success_is_judged_on_the_state_that_the_observation_shows(humanoid, task, pose, other):
    env = VLMHumanoid(32, task=task)
    verdicts = {}
    for name, start in (("pose", pose), ("other", other)):
        env.reset(seed=0)
        env.set_state(qpos_of(env.model, start), np.zeros(23))
        verdicts[name] = []
        for action in actions(1) * 0.3:
            obs, _, _, _, info = env.step(action)
            humanoid.set_state(obs[:24], obs[24:47])
            assert info["success"] == bool(sac_vlmrm.TASKS[task](humanoid.data))
            verdicts[name].append(info["success"])
    assert verdicts["pose"][0] and not verdicts["other"][0]
    assert not all(verdicts["pose"])  # it falls over, so both answers were compared
    env.close()


def test_without_a_task_there_is_no_success(humanoid):
    humanoid.set_state(qpos_of(humanoid.model, KNEEL), np.zeros(23))
    assert humanoid.step(np.zeros(17))[4]["success"] is False


def test_worker_processes_give_what_one_process_gives():
    """Frames, observations, rewards and success through shared memory, each in the row of its own environment."""
    fn, seeds = make_env(32, "modified", "modified", False, "standing"), [11, 12]
    envs = gym.vector.AsyncVectorEnv([fn] * 2, context="forkserver", copy=False, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    torques = np.stack([actions(seed, 1.0) for seed in seeds], axis=1)  # (T, N, 17) in [-1, 1]
    try:
        runs = [sac_vlmrm.rollout(envs, lambda obs, t=iter(torques): next(t), seeds) for _ in range(2)]
    finally:
        envs.close()
    env = fn()
    for i, seed in enumerate(seeds):
        obs, _ = env.reset(seed=seed)
        for t in range(EPISODE_LENGTH):
            for run in runs:  # the second, after a reset, like the first
                np.testing.assert_array_equal(run["obs"][t, i], obs["state"].astype(np.float32))
            obs, reward, _, _, info = env.step(torques[t, i] * np.float32(0.4))
            for run in runs:
                np.testing.assert_array_equal(run["next_obs"][t, i], obs["state"].astype(np.float32))
                np.testing.assert_array_equal(run["frames"][t, i], obs["pixels"])
                assert (run["env_rewards"][t, i], run["success"][t, i]) == (reward, info["success"])
    env.close()


def test_mirrored_robot_moves_as_the_mirror_image():
    """Mirrored start and mirrored torques give the mirrored observations, once the model's two small asymmetries (see
    mirror_image) are gone and its solver no longer depends on the order of the contacts."""
    (obs_index, obs_sign), (action_index, action_sign) = mirror_image()
    env = VLMHumanoid(0)
    model = env.model
    for field, part in ((model.jnt_stiffness, "knee"), (model.dof_armature, "hip_y")):
        offset = 5 if field is model.dof_armature else 0  # the free joint has six of them
        field[offset + model.joint(f"right_{part}").id] = field[offset + model.joint(f"left_{part}").id]
    model.opt.solver, model.opt.tolerance = mujoco.mjtSolver.mjSOL_NEWTON, 0
    mujoco.mj_setConst(model, env.data)

    def play(start, actions):
        env.reset(seed=0)
        env.set_state(start[:24], start[24:47])
        env.data.qacc_warmstart[:] = 0
        return np.array([env.step(action)[0] for action in actions])

    start, _ = env.reset(seed=5)
    torques = actions(5)[:30]  # until both feet have left and met the floor
    there = play(start, torques)
    mirrored = play(start[obs_index] * obs_sign, torques[:, action_index] * action_sign)
    assert np.abs(there[:, obs_index] * obs_sign - mirrored).max() < 1e-3
    for part in (np.s_[:24], np.s_[24:47], np.s_[47:177], np.s_[177:]):  # qpos, qvel, inertia, velocity
        assert np.abs(there - mirrored)[:, part].max() > 0.1
    env.close()


@pytest.mark.parametrize("task", TASKS)
def test_mirror_image_is_seen_in_the_mirrored_frame_and_judged_alike(task):
    (index, sign), _ = mirror_image()
    env = VLMHumanoid(SIZE)
    for pose, expected in [(p, True) for p in POSES[task][0].values()] + [(p, False) for p in POSES[task][1].values()]:
        qpos = qpos_of(env.model, pose | {"yaw": 30})
        frame = env.render_state(qpos).astype(int)
        mirrored = env.render_state(qpos[index[:24]] * sign[:24]).astype(int)
        robot = np.abs(frame - frame[:, ::-1]).max(2) > 60  # where left and right differ by more than the wood's grain
        # the light comes from one side, so the shading is not the same
        assert np.abs(mirrored - frame[:, ::-1])[robot].mean() < 0.5 * np.abs(mirrored - frame)[robot].mean()
        assert TASKS[task](env.data) == expected
    env.close()
