"""The shipped CLIP: finds its weights from anywhere, ranks poses, pays for nothing but pixels."""

import json
import shutil
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from poses import KNEEL, POSES, STAND, qpos_of
from safetensors.torch import load_file, save_file

import epic_vlmrm
import sac_vlmrm

ROOT = Path(sac_vlmrm.__file__).parent
sys.path.append(str(ROOT / "tiny_clip"))
import scaling
import train

KNEELING, BASELINE = "a humanoid robot kneeling", ("a humanoid robot",)


@pytest.fixture(scope="module")
def draw():
    """Frames (n, 96, 96, 3) of poses."""
    with closing(sac_vlmrm.Painter((96, 96), "modified", ("front",))) as painter:
        yield lambda poses: painter(np.stack([qpos_of(sac_vlmrm.HUMANOID, p) for p in poses]))[:, 0]


def reward_of(prompt, frames):
    clip_reward = sac_vlmrm.CLIPReward("local-dir:tiny_clip", (prompt,), BASELINE)
    return clip_reward(clip_reward.embed_images(frames))


def test_is_found_from_any_folder_and_fits_its_budget(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip_reward = sac_vlmrm.CLIPReward("local-dir:tiny_clip", (KNEELING,), BASELINE)
    assert clip_reward.goal.norm() == pytest.approx(1)
    assert sum(path.stat().st_size for path in ROOT.glob("tiny_clip/*.safetensors")) < 12e6


def test_kneeling_frame_scores_above_standing_and_lying(draw):
    frames = draw([KNEEL, STAND, {**STAND, "pitch": -90}, {**STAND, "pitch": 90}])
    kneeling, *others = reward_of(KNEELING, frames)
    assert kneeling > max(others)
    kneeling, standing, *_ = reward_of("a man standing", frames)
    assert standing > kneeling


@pytest.mark.parametrize("task, prompt", sac_vlmrm.TASKS.items())
def test_every_prompt_prefers_its_own_pose(draw, task, prompt):
    """The mean reward of a task's poses is above that of the poses that just miss it."""
    goal, near_misses = (draw(group.values()) for group in POSES[task])
    assert reward_of(prompt, goal).mean() > reward_of(prompt, near_misses).mean()


def test_reward_sees_pixels_only():
    rewards = reward_of(KNEELING, np.zeros((3, 96, 96, 3), dtype=np.uint8))
    assert torch.allclose(rewards, rewards[0])


@pytest.mark.parametrize(
    "load",
    [sac_vlmrm.CLIPReward, lambda model, goal, baseline: epic_vlmrm.Scorer(model, goal + baseline)],
    ids=["a run", "--glance"],
)
def test_unknown_words_draw_a_warning(load, printed):
    """In a run, and in `--glance`, where one tries them first."""
    juggling = printed(load, "local-dir:tiny_clip", ("a humanoid robot juggling",), BASELINE)
    assert juggling.startswith("warning: ") and "never saw juggling; it" in juggling
    # a sentence that it was taught, and where to find the others
    sentences = (ROOT / "tiny_clip" / "sentences.txt").read_text().splitlines()
    assert "sentences.txt" in juggling and juggling.split('"')[1] in sentences
    assert "warning" not in printed(load, "local-dir:tiny_clip", (KNEELING,), BASELINE)


def test_the_average_of_two_models_has_their_mean_weights(tmp_path):
    weights = load_file(ROOT / "tiny_clip" / "open_clip_model.safetensors")
    shutil.copytree(ROOT / "tiny_clip", tmp_path / "other")
    moved = {key: value + 2 for key, value in weights.items()}
    save_file(moved, tmp_path / "other" / "open_clip_model.safetensors")
    train.average([ROOT / "tiny_clip", tmp_path / "other"], tmp_path / "mean")
    for key, mean in load_file(tmp_path / "mean" / "open_clip_model.safetensors").items():
        torch.testing.assert_close(mean, weights[key] + 1, rtol=2e-3, atol=2e-3)
    open_clip.create_model(f"local-dir:{tmp_path}/mean")


def test_scaling_reads_what_is_there(tmp_path, monkeypatch, capsys):
    """A study that was stopped: one CLIP lacks three of its four policies, the other one."""
    monkeypatch.chdir(tmp_path)
    # of clip3 there is not even a distance yet
    sizes = {size: scaling.SIZES[size] for size in ("clip3", "clip4", "shipped")}
    monkeypatch.setattr(scaling, "SIZES", sizes)
    names, alphas = ("clip4_s1", "clip4_s2", "tiny_clip"), ("0.0", "0.5")
    means = [dict(zip(alphas, row)) for row in ([0.5, 0.4], [0.6, 0.7], [0.3, 0.35])]
    vlms = [{"name": name, "epic": {"mean": mean}} for name, mean in zip(names, means)]
    Path("runs/scaling").mkdir(parents=True)
    Path("runs/scaling/epic.json").write_text(json.dumps({"vlms": vlms}))
    evaluated = ("clip4", "kneeling", 2), ("shipped", "kneeling", 1), ("shipped", "kneeling", 2)
    for size, task, seed in (*evaluated, ("shipped", "arms-raised", 2)):
        run = scaling.run_dir(size, task, seed)
        run.mkdir()
        row = {"success_rate": seed / 4, "share_in_goal": 0.5}
        (run / "eval.json").write_text(json.dumps({"mean action": row}))
    found_alphas, found = scaling.results()
    assert found.keys() == {"clip4", "shipped"}
    scaling.print_table(found_alphas, found)
    scaling.plot(found_alphas, found, "scaling.png")
    printed = capsys.readouterr().out
    assert "| 0.500 / 0.600 | 0.400 (0.5) / 0.600 (0) | - / 50% (50%) | - / - |" in printed
    assert "| 0.300 | 0.300 (0) | 25% (50%) / 50% (50%) | - / 50% (50%) |" in printed
    samples = {
        "clip4": 12_000 * 7,
        "shipped": 70_000 * 9 + 4 * 55_000 * 3.5 + 33_000 * 3,
    }  # of equal size
    each = {found[size]["compute"] / count for size, count in samples.items()}
    assert max(each) == pytest.approx(min(each)) and Path("scaling.png").stat().st_size > 10_000
