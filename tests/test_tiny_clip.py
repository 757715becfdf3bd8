"""The shipped CLIP: finds its weights from anywhere, ranks poses, and pays for nothing but pixels."""

import numpy as np
import pytest
import torch
from poses import KNEEL, POSES, STAND, qpos_of

import sac_vlmrm


@pytest.fixture(scope="module")
def camera():
    camera = sac_vlmrm.VLMHumanoid(96)
    yield camera
    camera.close()


def frame_of(camera, pose):
    return camera.render_state(qpos_of(camera.model, pose)).copy()


def reward_of(prompt, frames):
    clip_reward = sac_vlmrm.CLIPReward("local-dir:tiny_clip", [prompt])
    return clip_reward(clip_reward.embed_images(np.stack(frames)))


def test_is_found_from_any_folder_and_fits_its_budget(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sac_vlmrm.CLIPReward("local-dir:tiny_clip", ["a humanoid robot kneeling"]).goal.norm() == pytest.approx(1)
    assert sum(path.stat().st_size for path in sac_vlmrm.HERE.glob("tiny_clip/*.safetensors")) < 12e6


def test_kneeling_frame_scores_above_standing_and_lying(camera):
    frames = [frame_of(camera, pose) for pose in (KNEEL, STAND, {**STAND, "pitch": -90}, {**STAND, "pitch": 90})]
    kneeling, *others = reward_of("a humanoid robot kneeling", frames)
    assert kneeling > max(others)
    kneeling, standing, *_ = reward_of("a man standing", frames)
    assert standing > kneeling


@pytest.mark.parametrize("prompt, task", sac_vlmrm.TASK_PROMPTS.items())
def test_every_prompt_prefers_its_own_pose(camera, prompt, task):
    """The mean reward of a task's poses is above that of the poses that just miss it."""
    goal, near_misses = ([frame_of(camera, pose) for pose in group.values()] for group in POSES[task])
    assert reward_of(prompt, goal).mean() > reward_of(prompt, near_misses).mean()


def test_reward_sees_pixels_only():
    blank = np.zeros((3, 96, 96, 3), dtype=np.uint8)
    rewards = reward_of("a humanoid robot kneeling", blank)
    assert torch.allclose(rewards, rewards[0])


def test_unknown_words_draw_a_warning(capsys):
    sac_vlmrm.CLIPReward("local-dir:tiny_clip", ["a humanoid robot juggling"])
    assert "never saw the words juggling" in capsys.readouterr().out
    sac_vlmrm.CLIPReward("local-dir:tiny_clip", ["a humanoid robot kneeling"])
    assert "warning" not in capsys.readouterr().out
