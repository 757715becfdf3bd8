"""CLIPReward against the paper's equation, written out with its matrix, and against open_clip's own
preprocessing."""

import json

import models
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sac_vlmrm import CLIPReward, fill_in, scored_steps

GOAL, BASELINE = ("a humanoid robot kneeling",), ("a humanoid robot",)
FRAMES = np.random.default_rng(0).integers(0, 256, (7, 48, 48, 3), dtype=np.uint8)


def waves(height, width):
    """Three smooth pictures, (3, H, W, 3) uint8: noise would hide how a frame is resized."""
    y, x = np.mgrid[:height, :width] / 12
    pictures = [
        np.stack([128 + 100 * np.sin(a * x + y + c) for c in range(3)], -1) for a in (0.5, 1, 2)
    ]
    return np.stack(pictures).astype(np.uint8)


def reference(clip_folder):
    """The same model through open_clip alone: embeddings of frames and of prompts."""
    model, preprocess = open_clip.create_model_from_pretrained(clip_folder)
    tokenizer = open_clip.get_tokenizer(clip_folder)

    @torch.no_grad()
    def images(frames):
        batch = torch.stack([preprocess(Image.fromarray(frame)) for frame in frames])
        return F.normalize(model.encode_image(batch), dim=-1)

    @torch.no_grad()
    def texts(prompts):
        return F.normalize(model.encode_text(tokenizer(list(prompts))), dim=-1)

    return images, texts


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 0.9, 1])
def test_reward_is_the_papers_equation(clip_folder, alpha):
    reward = CLIPReward(clip_folder, GOAL, BASELINE, alpha)
    _, texts = reference(clip_folder)
    g, b = texts(GOAL)[0], texts(BASELINE)[0]
    s = F.normalize(torch.randn(50, len(g)), dim=-1)
    d = g - b
    P = alpha * torch.outer(d, d) / (d @ d) + (1 - alpha) * torch.eye(len(g))
    expected = 1 - 0.5 * ((s - g) @ P.T).square().sum(1)
    torch.testing.assert_close(reward(s), expected, rtol=0, atol=1e-6)


def test_alpha_zero_is_the_cosine(clip_folder):
    images, texts = reference(clip_folder)
    reward = CLIPReward(clip_folder, GOAL, BASELINE)
    expected = images(FRAMES) @ texts(GOAL)[0]
    torch.testing.assert_close(reward(reward.embed_images(FRAMES)), expected, rtol=0, atol=1e-5)


def test_alpha_one_sees_only_the_line_through_baseline_and_goal(clip_folder):
    reward = CLIPReward(clip_folder, GOAL, BASELINE, 1)
    d = reward.goal - reward.baseline
    s = F.normalize(torch.randn(10, len(d)), dim=-1)
    aside = torch.randn(10, len(d))
    aside -= (aside @ d)[:, None] / (d @ d) * d
    torch.testing.assert_close(reward(s + aside), reward(s), rtol=0, atol=1e-5)
    assert reward(reward.goal[None]) == 1 > reward(reward.baseline[None])


def test_several_prompts_are_averaged(clip_folder):
    prompts, baselines = (*GOAL, "a robot on its knees", "kneeling"), (*BASELINE, "a robot")
    reward = CLIPReward(clip_folder, prompts, baselines, 0.5)
    _, texts = reference(clip_folder)
    torch.testing.assert_close(reward.goal, texts(prompts).mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(reward.baseline, texts(baselines).mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("every", [1, 4, 7, 100])
def test_between_scored_steps_rewards_lie_on_straight_lines(every):
    scored = scored_steps(every)
    assert scored[0] == 0 and scored[-1] == 99 and np.diff(scored).max() <= every
    line, scores = np.linspace(-1, 1, 100), np.random.default_rng(0).normal(size=(2, 100))
    np.testing.assert_allclose(fill_in(line[None, scored], scored)[0], line, atol=1e-12)
    rewards = fill_in(scores[:, scored], scored)
    np.testing.assert_array_equal(rewards[:, scored], scores[:, scored])
    assert rewards.shape == (2, 100) and (every > 1) == (rewards != scores).any()


def test_goal_equal_to_baseline_has_no_direction(clip_folder):
    with pytest.raises(SystemExit, match="direction"):
        CLIPReward(clip_folder, GOAL, GOAL, 0.1)
    CLIPReward(clip_folder, GOAL, GOAL, 0)  # which needs none


@pytest.mark.parametrize("kind", ["clip", "coca", "siglip"])
def test_text_tower_is_dropped(kind, tmp_path):
    config = {"clip": models.CLIP_CFG, "coca": models.COCA_CFG, "siglip": models.SIGLIP_CFG}[kind]
    name = models.local_dir(tmp_path, config)
    reward = CLIPReward(name, GOAL, BASELINE, 0.5)
    visual = open_clip.create_model(name).visual
    expected = {f"clip.visual.{name}" for name, _ in visual.named_parameters()}
    assert {name for name, _ in reward.named_parameters()} == expected


@pytest.mark.parametrize("shape", [(48, 48), (96, 96), (30, 70), (101, 40), (1, 1)])
def test_frames_of_any_size_in_batches_of_any_size(clip_folder, shape):
    frames = np.random.default_rng(1).integers(0, 256, (7, *shape, 3), dtype=np.uint8)
    whole, in_parts, one_by_one = (
        CLIPReward(clip_folder, GOAL, BASELINE, batch_size=n).embed_images(frames)
        for n in (100, 3, 1)
    )
    assert whole.shape == (7, models.CLIP_CFG["embed_dim"]) and whole.dtype == torch.float32
    torch.testing.assert_close(whole.norm(dim=-1), torch.ones(7))
    torch.testing.assert_close(in_parts, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(one_by_one, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("tower", ["square", "wide"])
@pytest.mark.parametrize("shape", [(48, 48), (64, 32), (96, 96), (64, 100), (30, 20)])
def test_preprocessing_is_open_clips_own(tmp_path, tower, resize_mode, shape):
    """For a tower of 48 x 48 and one of 64 x 32, and frames of these sizes among others."""
    look = models.CLIP_LOOK | {"resize_mode": resize_mode}
    config = models.CLIP_CFG if tower == "square" else models.WIDE_CFG
    name = models.local_dir(tmp_path, config, look)
    images, _ = reference(name)
    reward = CLIPReward(name, GOAL, BASELINE)
    assert reward.image_size == ((48, 48) if tower == "square" else (64, 32))
    expected, embeddings = images(waves(*shape)), reward.embed_images(waves(*shape))
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)
    assert (expected[0] - expected[2]).norm() > 1e-3  # pictures are far apart, compared with that


def test_coca_is_scored_like_any_other(tmp_path):
    """Its towers return more than one tensor."""
    name = models.local_dir(tmp_path, models.COCA_CFG)
    images, texts = reference(name)
    reward = CLIPReward(name, GOAL, BASELINE)
    expected = images(FRAMES) @ texts(GOAL)[0]
    torch.testing.assert_close(reward(reward.embed_images(FRAMES)), expected, rtol=0, atol=1e-5)


def test_siglip_preprocessing_and_tokenizer(tmp_path):
    """A SigLIP-type folder: frames are squashed and normalised with 0.5, prompts go through the
    folder's own vocabulary."""
    name = models.local_dir(tmp_path, models.SIGLIP_CFG, models.SIGLIP_LOOK)
    reward = CLIPReward(name, ("A humanoid robot, kneeling!",), BASELINE, 0.5)
    tokens = reward.tokenizer(["A humanoid robot, kneeling!"])
    assert tokens.tolist() == [[3, 4, 5, 6, 1, *[0] * 7]]  # canonical, ended, padded
    frames = np.random.default_rng(2).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    seen = torch.stack([reward.preprocess(Image.fromarray(frame)) for frame in frames])
    torch.testing.assert_close(seen, torch.as_tensor(frames).permute(0, 3, 1, 2) / 127.5 - 1)
    assert reward.preprocess(Image.new("RGB", (200, 40))).shape == (3, 224, 224)
    images, texts = reference(name)
    reward = CLIPReward(name, GOAL, BASELINE)
    expected = images(frames) @ texts(GOAL)[0]
    torch.testing.assert_close(reward(reward.embed_images(frames)), expected, rtol=0, atol=1e-5)


def test_preprocessing_of_a_folder_is_read_from_its_config(tmp_path):
    seen = []
    for mean in (0.2, 0.7):
        look = models.CLIP_LOOK | {"mean": [mean] * 3, "std": [0.5] * 3}
        name = models.local_dir(tmp_path, look=look)
        config = json.loads((tmp_path / "open_clip_config.json").read_text())
        assert config["preprocess_cfg"]["mean"][0] == mean
        black = CLIPReward(name, GOAL, BASELINE).preprocess(Image.new("RGB", (48, 48)))
        seen.append(black.unique().item())
    assert seen == pytest.approx([-0.4, -1.4])
