"""CLIPReward against the paper's equation, written out with its matrix, and against open_clip's own preprocessing."""

import json

import models
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sac_vlmrm import CLIPReward

GOAL, BASELINE = ["a humanoid robot kneeling"], ["a humanoid robot"]
FRAMES = np.random.default_rng(0).integers(0, 256, (7, 48, 48, 3), dtype=np.uint8)


def reference(clip_folder):
    """The same model through open_clip alone: image embeddings of PIL images, text embeddings of prompts."""
    model, preprocess = open_clip.create_model_from_pretrained(clip_folder)
    tokenizer = open_clip.get_tokenizer(clip_folder)

    @torch.no_grad()
    def images(frames):
        return F.normalize(model.encode_image(torch.stack([preprocess(Image.fromarray(frame)) for frame in frames])), dim=-1)

    @torch.no_grad()
    def texts(prompts):
        return F.normalize(model.encode_text(tokenizer(prompts)), dim=-1)

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
    reward = CLIPReward(clip_folder, GOAL)
    torch.testing.assert_close(reward(reward.embed_images(FRAMES)), images(FRAMES) @ texts(GOAL)[0], rtol=0, atol=1e-5)


def test_alpha_one_sees_only_the_line_through_baseline_and_goal(clip_folder):
    reward = CLIPReward(clip_folder, GOAL, BASELINE, 1)
    d = reward.goal - reward.baseline
    s = F.normalize(torch.randn(10, len(d)), dim=-1)
    aside = torch.randn(10, len(d))
    aside -= (aside @ d)[:, None] / (d @ d) * d
    torch.testing.assert_close(reward(s + aside), reward(s), rtol=0, atol=1e-5)
    assert reward(reward.goal[None]) == 1 > reward(reward.baseline[None])


def test_several_prompts_are_averaged(clip_folder):
    prompts = [*GOAL, "a robot on its knees", "kneeling"]
    reward = CLIPReward(clip_folder, prompts, [*BASELINE, "a robot"], 0.5)
    _, texts = reference(clip_folder)
    torch.testing.assert_close(reward.goal, texts(prompts).mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(reward.baseline, texts([*BASELINE, "a robot"]).mean(0), rtol=0, atol=1e-6)


def test_goal_equal_to_baseline_has_no_direction(clip_folder):
    with pytest.raises(SystemExit, match="direction"):
        CLIPReward(clip_folder, GOAL, GOAL, 0.1)
    CLIPReward(clip_folder, GOAL, GOAL, 0)  # which needs none


def test_text_tower_is_dropped(clip_folder):
    reward = CLIPReward(clip_folder, GOAL, BASELINE, 0.5)
    visual = {f"clip.visual.{name}" for name, _ in open_clip.create_model(clip_folder).visual.named_parameters()}
    assert {name for name, _ in reward.named_parameters()} == visual


@pytest.mark.parametrize("shape", [(48, 48), (96, 96), (30, 70), (101, 40), (1, 1)])
def test_frames_of_any_size_in_batches_of_any_size(clip_folder, shape):
    frames = np.random.default_rng(1).integers(0, 256, (7, *shape, 3), dtype=np.uint8)
    whole, in_parts, one_by_one = (CLIPReward(clip_folder, GOAL, batch_size=n).embed_images(frames) for n in (100, 3, 1))
    assert whole.shape == (7, models.CLIP_CFG["embed_dim"]) and whole.dtype == torch.float32
    torch.testing.assert_close(whole.norm(dim=-1), torch.ones(7))
    torch.testing.assert_close(in_parts, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(one_by_one, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("shape, tolerance", [((48, 48), 1e-5), ((96, 96), 0.01), ((64, 100), 0.01), ((30, 20), 0.01)])
def test_preprocessing_is_open_clips_own(tmp_path, resize_mode, shape, tolerance):
    """Exactly, for a frame of the model's size; up to PIL's rounding to whole grey levels, where it is resized."""
    look = {"mean": [0.3, 0.5, 0.7], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "resize_mode": resize_mode}
    name = models.local_dir(tmp_path, models.CLIP_CFG, look)
    y, x = np.mgrid[: shape[0], : shape[1]] / 12
    frames = np.stack([np.stack([128 + 100 * np.sin(a * x + y + c) for c in range(3)], -1) for a in (0.5, 1, 2)]).astype(np.uint8)
    images, _ = reference(name)
    expected, embeddings = images(frames), CLIPReward(name, GOAL).embed_images(frames)
    assert (1 - (expected * embeddings).sum(-1)).max() < tolerance**2 / 2 + 1e-6  # a chord of that length, on the unit sphere
    assert (1 - expected[0] @ expected[2]) > 100 * tolerance**2 / 2  # different pictures are further apart


def test_siglip_preprocessing_and_tokenizer(tmp_path):
    """A SigLIP-type folder: frames are squashed and normalised with 0.5, prompts go through the folder's own vocabulary."""
    name = models.local_dir(tmp_path, models.SIGLIP_CFG, models.SIGLIP_LOOK)
    reward = CLIPReward(name, ["A humanoid robot, kneeling!"], ["a humanoid robot"], 0.5)
    assert reward.tokenizer(["A humanoid robot, kneeling!"]).tolist() == [[3, 4, 5, 6, 1, *[0] * 7]]  # canonical, ended, padded
    frames = np.random.default_rng(2).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    seen = reward.preprocess(torch.as_tensor(frames).permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(seen, torch.as_tensor(frames).permute(0, 3, 1, 2) / 127.5 - 1)
    assert reward.preprocess(torch.zeros(1, 3, 40, 200)).shape == (1, 3, 224, 224)
    images, texts = reference(name)
    expected = images(frames) @ texts(["a humanoid robot kneeling"])[0]
    torch.testing.assert_close(CLIPReward(name, ["a humanoid robot kneeling"])(reward.embed_images(frames)), expected, rtol=0, atol=1e-5)


def test_preprocessing_of_a_folder_is_read_from_its_config(tmp_path):
    black = np.zeros((1, 48, 48, 3), dtype=np.uint8)
    seen = []
    for mean in (0.2, 0.7):
        name = models.local_dir(tmp_path, look={"mean": [mean] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"})
        assert json.loads((tmp_path / "open_clip_config.json").read_text())["preprocess_cfg"]["mean"][0] == mean
        seen.append(CLIPReward(name, GOAL).preprocess(torch.as_tensor(black).permute(0, 3, 1, 2).float()).unique().item())
    assert seen == pytest.approx([-0.4, -1.4])
