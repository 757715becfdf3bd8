"""A glance: the hand-made postures, the verdict by hand, and the whole command for every kind of
VLM."""

import json
from contextlib import closing

import imageio.v3 as iio
import models
import numpy as np
import open_clip
import pytest
import torch
from poses import qpos_of

import sac_vlmrm
from epic_vlmrm import POSTURES, chance, judge, main, state_of
from sac_vlmrm import TASKS

GOALS = {
    "kneeling": ["kneeling"],
    "lotus": ["lotus"],
    "standing": ["standing"],
    "both arms raised": ["standing", "arms-raised"],
    "side splits": ["splits"],
    "hands on hips": ["standing", "hands-on-hips"],
    "arms crossed": ["standing", "arms-crossed"],
    "on one leg": ["one-leg"],
    "on one knee": [],
    "crouching": [],
    "sitting": [],
    "one arm raised": ["standing"],
    "hands behind the back": ["standing"],
    "falling to the side": [],
    "lying on its side": [],
}


# POSTURES
def test_postures_are_goal_states_of_their_tasks_and_of_no_other():
    goals = sac_vlmrm.goal_states(np.stack([state_of(posture) for posture in POSTURES.values()]))
    reached = {name: [t for t in TASKS if goals[t][i]] for i, name in enumerate(POSTURES)}
    assert reached == GOALS


@pytest.mark.parametrize("name", POSTURES)
def test_postures_keep_within_the_joints_and_touch_the_floor(name):
    """As the helper of these tests, which looks at the limits, makes them."""
    expected = qpos_of(sac_vlmrm.HUMANOID, POSTURES[name])
    np.testing.assert_allclose(state_of(POSTURES[name]), expected, rtol=0, atol=1e-6)


# VERDICT
def test_verdict_worked_out_by_hand():
    rewards = np.array([[0.5, 0.4, 0.1], [0.6, 0.2, 0.3], [0.1, 0.2, 0.9], [0.3, 0.8, 0.1]])
    own = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=bool)
    lines, verdict = judge(["kneel", "stand", "sit", "wave"], ["A", "B", "C"], rewards, own)
    assert lines == [
        ["kneel", "A", "0.500", "B", "0.400", "+0.100"],
        ["stand", "B", "0.200", "A", "0.600", "-0.400"],
        ["sit", "C", "0.900", "B", "0.200", "+0.700"],
        ["wave", "-", "-", "B", "0.800", "-"],
    ]
    assert verdict.startswith(
        "of 3 prompts, 2 score their own pose highest; "
        "the least margin, of 'B' over 'A', is -0.400; 'wave' scores 'B' highest"
    )


def test_who_rewards_its_own_pose_is_no_chance():
    own = np.eye(8, 15, dtype=bool)
    assert chance(own + 0.1 * np.random.default_rng(0).standard_normal(own.shape), own) < 0.001


def test_who_likes_the_same_frames_whatever_the_prompt_understands_nothing():
    """Even if half of the prompts ask for its favourite."""
    own = np.eye(8, 15, dtype=bool)
    own[:4, 0] = True
    rewards = np.tile(np.arange(15, 0, -1.0), (8, 1)) + np.arange(8)[:, None]
    assert chance(rewards, own) == 1
    assert "it understands nothing" in judge(list(TASKS), list(GOALS), rewards, own)[1]


def test_one_in_a_hundred_random_rewards_passes():
    rng, own = np.random.default_rng(0), np.eye(8, 15, dtype=bool)
    passed = sum(chance(rng.standard_normal(own.shape), own) <= 0.01 for _ in range(300))
    assert passed <= 9  # 3 expected; 10 or more have a chance of 1 in 1000


def test_four_prompts_are_too_few_to_say_that_nothing_is_understood():
    """They can be exchanged in 24 ways only: chance alone is above 4 %."""
    rewards = np.eye(4, 6)
    _, verdict = judge(list("abcd"), list("ABCDEF"), rewards, rewards > 0)
    assert verdict.startswith("of 4 prompts, 4") and "nothing" not in verdict


# THE WHOLE COMMAND
@pytest.fixture(scope="module", params=["clip", "coca", "siglip", "ViT-B-32"])
def vlm(request, tmp_path_factory):
    """Random weights of every kind of VLM, as a name for --clip-model."""
    folder = tmp_path_factory.mktemp("vlm")
    if request.param == "ViT-B-32":
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-B-32", load_weights=False)
        torch.save(model.state_dict(), folder / "weights.pt")
        yield f"ViT-B-32/{folder / 'weights.pt'}"
        (folder / "weights.pt").unlink()  # 600 MB
    else:
        clip, siglip = (models.CLIP_CFG, models.CLIP_LOOK), (models.SIGLIP_CFG, models.SIGLIP_LOOK)
        kinds = {"clip": clip, "coca": (models.COCA_CFG, models.CLIP_LOOK), "siglip": siglip}
        yield models.local_dir(folder, *kinds[request.param])


def glance(out, *argv):
    main(["--glance", "--out", str(out), *map(str, argv)])
    return json.loads((out / "glance.json").read_text())["vlms"]


def test_random_weights_understand_nothing(vlm, tmp_path):
    [result] = glance(tmp_path, "--clip-model", vlm)
    assert list(result["rewards"]) == list(TASKS.values())
    for name, tasks in GOALS.items():
        assert [t for t in TASKS if name in result["own"][TASKS[t]]] == tasks
    assert result["verdict"].startswith("of 8 prompts, ")
    assert result["verdict"].endswith("it understands nothing")
    assert result["verdict"] in (tmp_path / "glance.md").read_text()
    picture = iio.imread(tmp_path / "glance.png")[..., :3]
    assert picture.shape[1] > 1500 and (picture.min(-1) < 250).mean() > 0.2


def test_tiny_clip_understands_what_it_was_taught(tmp_path):
    [result] = glance(tmp_path)
    assert "nothing" not in result["verdict"]
    assert result["verdict"].startswith(tuple(f"of 8 prompts, {n} score" for n in (6, 7, 8)))


def test_several_models_and_a_sentence_of_ones_own(clip_folder, tmp_path):
    other = models.local_dir(tmp_path / "wide", models.WIDE_CFG)
    argv = "--clip-model", clip_folder, "--clip-model", other, "--prompt", "a robot waving"
    square, wide = glance(tmp_path / "out", *argv)
    assert square["rewards"] != wide["rewards"]
    for result in square, wide:
        rewards = result["rewards"]["a robot waving"]
        favourite = list(GOALS)[np.argmax(rewards)]
        assert f"'a robot waving' scores '{favourite}' highest" in result["verdict"]
        assert result["own"]["a robot waving"] == []
    # each sees frames of the size that it takes
    for name, size in (("48x48", (48, 48)), ("64x32", (64, 32))):
        frame = iio.imread(tmp_path / "out" / f"glance_{name}" / "kneeling.png")
        assert frame.shape == (*size, 3)


@pytest.mark.parametrize(
    "size, textures, camera", [(0, "modified", "front"), (64, "original", "side")]
)
def test_rewards_are_those_of_training_whoever_scores_the_frames(
    clip_folder, tmp_path, size, textures, camera
):
    flags = "--clip-model", clip_folder, "--textures", textures, "--camera", camera
    [drawn] = glance(tmp_path / "here", *flags, "--image-size", size)
    [folder] = (tmp_path / "here").glob("glance_*x*")
    with closing(sac_vlmrm.Painter((size or 48,) * 2, textures, (camera,))) as painter:
        frames = painter(np.stack([state_of(posture) for posture in POSTURES.values()]))[:, 0]
    for prompt in (TASKS["kneeling"], TASKS["one-leg"]):
        reward = sac_vlmrm.CLIPReward(clip_folder, (prompt,), ("a humanoid robot",))
        expected = reward(reward.embed_images(frames)).numpy()
        np.testing.assert_allclose(drawn["rewards"][prompt], expected, rtol=0, atol=1e-6)
    [scored] = glance(tmp_path / "there", "--clip-model", clip_folder, "--frames", folder)
    assert scored == drawn
    assert not list((tmp_path / "there").glob("glance_*"))


def test_the_frames_are_labelled_for_an_epic_distance(clip_folder, tmp_path):
    glance(tmp_path, "--clip-model", clip_folder)
    argv = "--frames", tmp_path / "glance_48x48", "--clip-model", clip_folder, "--out", tmp_path
    [vlm] = main([*map(str, argv), "--clip-alpha", "0"])
    assert list(vlm["epic"]) == [*TASKS, "mean"] and vlm["epic"]["mean"][0] is not None


@pytest.mark.parametrize("argv, message", [
    ("--task kneeling", "no --task"),
    ("--compare-prompt kneeling", "no --task, --compare-prompt"),
    ("--frames frames_1234.npz", "a folder of PNGs"),
    ("--clip-model local-dir:nowhere", "nowhere"),
])  # fmt: skip
def test_bad_flags(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["--glance", *argv.split()])
    assert exit.value.code.startswith("error: ") and message in exit.value.code
    assert not list(tmp_path.iterdir())


def test_frames_without_any_pose_to_tell_apart(clip_folder, tmp_path):
    iio.imwrite(tmp_path / "a.png", np.zeros((48, 48, 3), dtype=np.uint8))
    (tmp_path / "labels.csv").write_text("file,kneeling\na.png,1\n")
    with pytest.raises(SystemExit, match="no prompt has both"):
        glance(tmp_path / "out", "--frames", tmp_path, "--clip-model", clip_folder)
