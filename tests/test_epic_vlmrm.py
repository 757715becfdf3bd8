"""EPIC distances by hand, labelled frames, the cache of embeddings, and the whole command with
small random CLIPs."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import imageio.v3 as iio
import models
import numpy as np
import pytest
import torch
from poses import POSES, qpos_of

import epic_vlmrm
import sac_vlmrm
from epic_vlmrm import Scorer, embed_frames, epic_distance, main

KNEELING, WAVING, BASELINE = "a humanoid robot kneeling", "a robot waving", "a humanoid robot"
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


# EPIC
@pytest.mark.parametrize("rewards, labels, distance", [
    pytest.param([0, 1, 1, 0], [0, 1, 1, 0], 0, id="perfect"),
    pytest.param([-3, 5, 5, -3], [0, 1, 1, 0], 0, id="perfect, scaled and shifted"),
    pytest.param([1, 0, 0, 1], [0, 1, 1, 0], 1, id="inverted"),
    pytest.param([0, 1, 0, 1], [0, 0, 1, 1], 0.5**0.5, id="uncorrelated"),
    pytest.param([0, 1, 2, 3], [0, 0, 1, 1], ((1 - 2 / 5**0.5) / 2) ** 0.5, id="rho = 2 / sqrt(5)"),
    pytest.param([1, 0, 0, 0], [1, 1, 0, 0], ((1 - 1 / 3**0.5) / 2) ** 0.5, id="rho = 1 / sqrt(3)"),
])  # fmt: skip
def test_epic_worked_out_by_hand(rewards, labels, distance):
    expected = pytest.approx(distance, abs=1e-7)
    assert epic_distance(rewards, np.array(labels, dtype=bool)) == expected
    assert epic_distance(np.array(rewards, dtype=np.float32), labels) == expected


def test_rewards_without_any_relation_to_the_label_come_near_0_707():
    rng = np.random.default_rng(0)
    rewards, labels = rng.random(20_000), rng.random(20_000) < 0.1
    assert epic_distance(rewards, labels) == pytest.approx(0.7071, abs=0.01)


@pytest.mark.parametrize("rewards, labels, reason", [
    ([2, 2, 2], [0, 1, 1], "same for all frames"),
    ([0, 0, 0], [0, 1, 1], "same for all frames"),
    ([0.25, 0.25 + 3e-8, 0.25], [0, 1, 1], "same for all frames"),
    ([1, 2, 3], [0, 0, 0], "no goal state"),
    ([1, 2, 3], [1, 1, 1], "only goal states"),
    ([1, 2, float("nan")], [0, 1, 1], "not finite"),
])  # fmt: skip
def test_no_distance_has_a_reason(rewards, labels, reason):
    with pytest.raises(ValueError, match=reason):
        epic_distance(rewards, labels)


# REWARD
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_scorer_gives_the_rewards_of_training(clip_folder, alpha):
    goals, baselines = (KNEELING, "a robot on its knees"), (BASELINE, "a robot")
    frames = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), dtype=np.uint8)
    trained_on = sac_vlmrm.CLIPReward(clip_folder, goals, baselines, alpha)
    expected = trained_on(trained_on.embed_images(frames)).numpy()
    scorer = Scorer(clip_folder, [WAVING, *baselines, *goals])
    embeddings = scorer.embed_images(frames)
    scorer.rewards(embeddings, [WAVING], [BASELINE], 0.25)  # what was asked before must not matter
    rewards = scorer.rewards(embeddings, goals, baselines, alpha)
    np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-6)


def test_scorer_without_a_direction(clip_folder):
    scorer = Scorer(clip_folder, [BASELINE])
    embeddings = torch.nn.functional.normalize(torch.randn(4, len(scorer.goal[0])), dim=-1)
    expected = (embeddings @ scorer.embedding_of[BASELINE]).numpy()
    rewards = scorer.rewards(embeddings, [BASELINE], [BASELINE], 0)
    np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="mean the same"):
        scorer.rewards(embeddings, [BASELINE], [BASELINE], 0.5)


def test_scorer_counts_parameters(clip_folder):
    scorer = Scorer(clip_folder, [KNEELING])
    whole, _, _ = sac_vlmrm.load_clip(clip_folder, "cpu", "fp32")
    assert scorer.parameter_count == sum(p.numel() for p in whole.parameters())
    visual = [p for name, p in whole.named_parameters() if name.startswith("visual.")]
    assert scorer.image_parameters == sum(p.numel() for p in visual)


# EMBEDDINGS
@pytest.fixture
def scorer(clip_folder):
    """Embeds 4 frames at a time; `scorer.seen` counts the frames that its image tower saw."""
    scorer = Scorer(clip_folder, [KNEELING], batch_size=4)
    scorer.seen = 0

    def count(module, inputs, output):
        scorer.seen += len(inputs[0])

    scorer.clip.visual.register_forward_hook(count)
    return scorer


FRAMES = np.random.default_rng(1).integers(0, 256, (40, 48, 48, 3), dtype=np.uint8)
PROBE = 9  # frames at most that are embedded again to see whether the cache is of this VLM


def test_embeddings_are_reused(scorer, tmp_path):
    expected = scorer.embed_images(FRAMES)
    embeddings = embed_frames(scorer, FRAMES, tmp_path / "cache.pt")
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-6)
    scorer.seen = 0
    embeddings = embed_frames(scorer, FRAMES, tmp_path / "cache.pt")
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-6)
    assert scorer.seen <= PROBE


def test_interrupted_embedding_goes_on(scorer, tmp_path):
    def interrupt(module, inputs, output):
        if scorer.seen > 20:
            raise KeyboardInterrupt

    hook = scorer.clip.visual.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        embed_frames(scorer, FRAMES, tmp_path / "cache.pt")
    hook.remove()
    kept = len(torch.load(tmp_path / "cache.pt"))
    assert 12 <= kept <= 20
    scorer.seen = 0
    embeddings = embed_frames(scorer, FRAMES, tmp_path / "cache.pt")
    assert scorer.seen <= len(FRAMES) - kept + PROBE
    torch.testing.assert_close(embeddings, scorer.embed_images(FRAMES), rtol=0, atol=1e-6)


def test_embeddings_of_other_weights_are_not_reused(scorer, tmp_path):
    old = embed_frames(scorer, FRAMES, tmp_path / "cache.pt")
    torch.manual_seed(0)
    for parameter in scorer.clip.visual.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    new = embed_frames(scorer, FRAMES, tmp_path / "cache.pt")
    torch.testing.assert_close(new, scorer.embed_images(FRAMES), rtol=0, atol=1e-6)
    assert (old - new).abs().max() > 0.01


# OWN PICTURES
@pytest.fixture
def pictures(tmp_path):
    """16 PNGs of two sizes with labels of a task of sac_vlmrm.py and of one that only its prompt
    names."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(2)
    folder.mkdir()
    lines = [f'file,kneeling,"{WAVING}"']
    for i in range(16):
        shape = (48, 48 if i % 3 else 60, 3)
        iio.imwrite(folder / f"{i}.png", rng.integers(0, 256, shape, dtype=np.uint8))
        lines.append(f"{i}.png,{i % 2},{int(i < 5)}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def strict_json(path):
    def no_nan(word):
        raise AssertionError(f"{word} in {path}")

    return json.loads(path.read_text(), parse_constant=no_nan)


def test_own_pictures(pictures, clip_folder, tmp_path, capsys):
    flags = ["--clip-alpha", "0", "0.5", "--out", str(tmp_path / "out")]
    main(["--frames", str(pictures), "--clip-model", clip_folder, *flags])
    [vlm] = strict_json(tmp_path / "out" / "epic.json")["vlms"]
    assert set(vlm["epic"]) == {"kneeling", WAVING, "mean"}
    frames = [iio.imread(pictures / f"{i}.png")[None] for i in range(16)]
    tasks = ("kneeling", KNEELING, np.arange(16) % 2), (WAVING, WAVING, np.arange(16) < 5)
    for task, prompt, label in tasks:
        for alpha in (0.0, 0.5):
            reward = sac_vlmrm.CLIPReward(clip_folder, (prompt,), (BASELINE,), alpha)
            rewards = [reward(reward.embed_images(frame)).item() for frame in frames]
            rho = np.corrcoef(rewards, label)[0, 1]
            assert vlm["epic"][task][str(alpha)] == pytest.approx(((1 - rho) / 2) ** 0.5, abs=1e-4)
    assert f"{vlm['epic']['kneeling']['0.5']:.3f}" in capsys.readouterr().out


def test_wordings_side_by_side(pictures, clip_folder, tmp_path):
    argv = ["--frames", str(pictures), "--clip-model", clip_folder, "--task", "kneeling"]
    argv += ["--out", str(tmp_path / "out")]
    wordings = ["a robot on its knees", "sitting"]
    compared = [word for wording in wordings for word in ("--compare-prompt", wording)]
    [together] = main([*argv, *compared])
    assert list(together["epic"]) == [KNEELING, *wordings]
    for wording in together["epic"]:
        [alone] = main([*argv, "--prompt", wording])
        assert alone["epic"] == {"kneeling": together["epic"][wording]}
    [averaged] = main([*argv, "--prompt", KNEELING, "--prompt", "sitting"])
    alone = {row[0.0] for row in together["epic"].values()}
    assert averaged["epic"]["kneeling"][0.0] not in alone


def test_identical_pictures_and_single_class_labels_get_an_answer(clip_folder, tmp_path):
    for i in range(4):
        iio.imwrite(tmp_path / f"{i}.png", np.full((48, 48, 3), 90, dtype=np.uint8))
    lines = ["file,kneeling,lotus", *(f"{i}.png,{i % 2},0" for i in range(4))]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    main(["--frames", str(tmp_path), "--clip-model", clip_folder, "--out", str(tmp_path / "out")])
    [vlm] = strict_json(tmp_path / "out" / "epic.json")["vlms"]
    assert all(value is None for row in vlm["epic"].values() for value in row.values())
    report = (tmp_path / "out" / "epic.md").read_text()
    assert "kneeling: no distance, the reward is the same for all frames" in report
    assert "lotus: no distance, no goal state among the frames" in report
    assert "nan" not in report


def test_a_picture_that_fails_costs_no_number(pictures, clip_folder, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise MemoryError("no room for a picture\nat all")

    sac_vlmrm.warn.cache_clear()
    monkeypatch.setattr(epic_vlmrm.Figure, "savefig", fail)
    argv = ["--frames", str(pictures), "--clip-model", clip_folder, "--out", str(tmp_path / "out")]
    [vlm] = main(argv)
    [written] = strict_json(tmp_path / "out" / "epic.json")["vlms"]
    assert written["epic"]["mean"]["0.5"] == vlm["epic"]["mean"][0.5]
    assert f"{vlm['epic']['mean'][0.5]:.3f}" in (tmp_path / "out" / "epic.md").read_text()
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    names = "epic_alpha", "epic_size", f"histogram_{vlm['name']}"
    assert warnings == [f"warning: no {name}.png: no room for a picture" for name in names]


def test_the_plots_that_a_notebook_asks_for_do_not_matter():
    """Every notebook exports this, and so hands it to the commands that it starts."""
    notebook = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, Path(epic_vlmrm.__file__), "--help"]
    result = subprocess.run(command, env=notebook, capture_output=True, text=True)
    assert result.returncode == 0 and "--compare-prompt" in result.stdout, result.stderr


@pytest.mark.parametrize("table, message", [
    (None, "no labels.csv"),
    ("", "must start with"),
    ("file,kneeling\n", "must start with"),
    ("name,kneeling\n0.png,1\n", "must start with"),
    ("file,kneeling\n0.png,yes\n", "labels of 0 or 1"),
    ("file,kneeling\n0.png,1,0\n", "labels of 0 or 1"),
    ("file,kneeling\n99.png,1\n", "99.png can't be read"),
    ("file,kneeling\nlabels.csv,1\n", "labels.csv can't be read"),
    (f"file,kneeling,{KNEELING}\n0.png,1,0\n", "two columns"),
])  # fmt: skip
def test_bad_labels(pictures, tmp_path, table, message):
    (pictures / "labels.csv").unlink()
    if table is not None:
        (pictures / "labels.csv").write_text(table)
    assert message in error("--frames", pictures, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def error(*argv):
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in argv])
    assert exit.value.code.startswith("error: ") and "\n" not in exit.value.code
    return exit.value.code


@pytest.mark.parametrize("argv, message", [
    ("--clip-alpha 0 1.5", "not between 0 and 1"),
    ("--run nowhere", "no replay_*.pt"),
    ("--frames nowhere.npz", "not a frames file"),
    ("--frames a --run b", "either --frames"),
    ("--generated 5", "at least 20"),
    ("--generated 0", "add --run"),
    ("--task dancing", "labelled for kneeling, lotus"),
    ("--compare-prompt kneeling", "one --task"),
    ("--task lotus --task splits --prompt sitting", "one --task"),
    ("--clip-model RN50/nothing", "nothing"),
])  # fmt: skip
def test_bad_flags(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error(*argv.split())
    assert not list(tmp_path.iterdir())


def test_frames_file_cut_short(tmp_path):
    frames, labels = np.zeros((3, 8, 8, 3), dtype=np.uint8), np.zeros((2, 8), dtype=bool)
    others = {"tasks": list(sac_vlmrm.TASKS), "source": ["a"] * 3}
    np.savez(tmp_path / "frames.npz", frames=frames, labels=labels, **others)
    assert "not a frames file" in error("--frames", tmp_path / "frames.npz")
    whole = (tmp_path / "frames.npz").read_bytes()
    (tmp_path / "frames.npz").write_bytes(whole[: len(whole) // 2])
    assert "not a frames file" in error("--frames", tmp_path / "frames.npz")


# THE WHOLE COMMAND
@pytest.fixture(scope="module")
def study(tmp_path_factory, clip_folder):
    """Two VLMs on 60 generated frames and a run of two episodes that kneels in its first and stands
    in its second."""
    folder = tmp_path_factory.mktemp("study")
    wide = models.CLIP_CFG | {"vision_cfg": models.CLIP_CFG["vision_cfg"] | {"width": 96}}
    other = models.local_dir(folder / "wide_s2", wide)
    rb = sac_vlmrm.ReplayBuffer(10, "cpu")
    (folder / "my_run").mkdir()
    rb.save(folder / "my_run")  # as at the start of a run
    for task in ("kneeling", "standing"):
        qpos = qpos_of(sac_vlmrm.HUMANOID, next(iter(POSES[task][0].values())))
        obs = np.tile(np.concatenate([qpos, np.zeros(231)]), (1, 101, 1))
        obs[:, 0] = 0  # what no action led to
        rb.add(obs=obs, actions=np.zeros((1, 100, 17)), rewards=np.zeros((1, 100)))
        rb.save(folder / "my_run")
    argv = ["--generated", "60", "--run", str(folder / "my_run"), "--visited", "8"]
    argv += ["--out", str(folder / "out"), "--clip-model", clip_folder, "--clip-model", other]
    main(argv)
    [frames] = (folder / "out").glob("frames_*.npz")
    return folder, argv, frames


def test_frames_are_labelled_and_every_task_has_goal_states(study):
    with np.load(study[2]) as file:
        frames, labels, qpos, source = (file[key] for key in ("frames", "labels", "qpos", "source"))
    assert frames.shape == (68, 48, 48, 3) and frames.dtype == np.uint8  # 48: what both VLMs take
    assert labels[:60].sum(0).min() >= 3 and labels[:60].mean(0).max() < 0.8
    for state, label in zip(qpos, labels):
        goals = sac_vlmrm.goal_states(state)
        assert [bool(goals[task]) for task in sac_vlmrm.TASKS] == label.tolist()
    with closing(sac_vlmrm.Painter((48, 48), "modified", ("front",))) as painter:
        for i in range(0, 68, 7):
            assert np.array_equal(painter(qpos[i])[0], frames[i])
    assert source.tolist() == ["generated"] * 60 + ["my_run"] * 8
    kneeling, standing = (list(sac_vlmrm.TASKS).index(task) for task in ("kneeling", "standing"))
    assert labels[60:, kneeling].tolist() == [True] * 4 + [False] * 4  # the whole run, in order
    assert labels[60:, standing].tolist() == [False] * 4 + [True] * 4
    assert len(np.unique(qpos[:60].round(6), axis=0)) == 60


def test_the_course_of_a_run_is_its_returns_in_order(study):
    with np.load(study[2]) as file:
        labels = file["labels"][file["source"] == "my_run"]
    kneeling = list(sac_vlmrm.TASKS).index("kneeling")
    assert epic_vlmrm.course(100.0 * labels[:, kneeling]) == [100] * 4 + [0] * 4
    assert epic_vlmrm.course(np.arange(200)) == [4.5 + 10 * i for i in range(20)]


def test_states_of_several_ranks_are_read_in_order_of_time(tmp_path):
    for rank in (0, 1):
        rb = sac_vlmrm.ReplayBuffer(10, "cpu")
        rb.name = f"replay_{rank}_"
        for time in (1.0, 2.0):
            data = {"obs": (1, 101, 255), "actions": (1, 100, 17), "rewards": (1, 100)}
            rb.add(**{key: np.full(shape, time) for key, shape in data.items()})
            rb.save(tmp_path)
    assert epic_vlmrm.visited_states(tmp_path, 400)[:, 0].tolist() == [1] * 200 + [2] * 200


def test_runs_whose_states_can_not_be_read_are_named(tmp_path):
    rb, run = sac_vlmrm.ReplayBuffer(10, "cpu"), tmp_path / "my_run"
    run.mkdir()
    rb.save(run)
    argv = "--run", run, "--generated", "0", "--image-size", "48", "--out", tmp_path / "out"
    assert "no episodes yet" in error(*argv)
    [chunk] = run.glob("replay_*.pt")
    chunk.write_bytes(chunk.read_bytes()[:-300])
    assert f"{chunk.name} can't be read" in error(*argv)
    torch.save({"obs": torch.zeros(10, 255), "next_obs": torch.zeros(10, 255)}, chunk)  # of 0fcf5b4
    assert f"{chunk.name} can't be read" in error(*argv)
    assert not (tmp_path / "out").exists()


def test_states_are_not_those_of_the_training(study):
    from tiny_clip.train import Poser

    with np.load(study[2]) as file:
        mine = file["qpos"]
    for seed in (1, 2024, 100_000):
        poser = Poser(np.random.default_rng(seed))
        theirs = np.array([poser.sample_pose() for _ in range(50)])
        assert np.abs(mine[:, None] - theirs).max(-1).min() > 1e-3


def test_report_and_pictures(study):
    folder, _, frames = study
    numbers = strict_json(folder / "out" / "epic.json")
    report = (folder / "out" / "epic.md").read_text()
    assert [vlm["name"] for vlm in numbers["vlms"]][1] == "wide_s2"
    assert numbers["vlms"][0]["image_parameters"] < numbers["vlms"][1]["image_parameters"]
    for vlm in numbers["vlms"]:
        assert list(vlm["epic"]) == [*sac_vlmrm.TASKS, "mean"]
        table = np.array([[row[str(alpha)] for alpha in ALPHAS] for row in vlm["epic"].values()])
        assert (table > 0).all() and (table < 1).all()
        np.testing.assert_allclose(table[:-1].mean(0), table[-1])
        assert all(f"{value:.3f}" in report for value in table.flat)
    counted = np.load(frames)["labels"].sum(0).astype(str).tolist()
    assert list(numbers["goal_states"].values()) == counted
    pictures = sorted(path.name for path in (folder / "out").glob("*.png"))
    assert len(pictures) == 6 and pictures[2:4] == ["epic_alpha.png", "epic_size.png"]
    for name in pictures:
        picture = iio.imread(folder / "out" / name)[..., :3]
        assert picture.shape[0] > 500 and (picture.min(-1) < 250).mean() > 0.02


def test_same_command_again_draws_and_embeds_nothing(study, capsys):
    folder, argv, frames = study
    before, written = (folder / "out" / "epic.json").read_text(), frames.stat().st_mtime_ns
    caches = {path: torch.load(path) for path in (folder / "out" / "embeddings").iterdir()}
    assert len(caches) == 2
    main(argv)
    assert frames.stat().st_mtime_ns == written
    assert list((folder / "out").glob("frames_*.npz")) == [frames]
    assert all(torch.equal(torch.load(path), cache) for path, cache in caches.items())
    assert (folder / "out" / "epic.json").read_text() == before
    assert "drawing" not in capsys.readouterr().err


def test_frames_file_can_be_scored_elsewhere(study, clip_folder, tmp_path):
    folder, _, frames = study
    (tmp_path / "copied.npz").write_bytes(frames.read_bytes())
    argv = ["--frames", str(tmp_path / "copied.npz"), "--clip-model", clip_folder]
    [vlm] = main([*argv, "--out", str(tmp_path / "out"), "--task", "splits"])
    there = strict_json(folder / "out" / "epic.json")["vlms"][0]["epic"]["splits"]
    same = {alpha: pytest.approx(there[str(alpha)], abs=1e-6) for alpha in ALPHAS}
    assert vlm["epic"] == {"splits": same}


def test_seeds_of_one_recipe_share_a_name():
    names = ["w16_s1", "w16_s2", "w16-seed3", "w16", "w16_quarter_s1", "ViT-B-32/laion2b_s34b_b79k"]
    assert [epic_vlmrm.recipe({"name": name}) for name in names] == ["w16"] * 4 + [
        "w16_quarter",
        names[-1],
    ]
    same = ["local-dir:a/w16_s1", "local-dir:b/w16_s1"]
    named = epic_vlmrm.name_models([*same, "local-dir:a/w8_s1", "hf-hub:someone/a"])
    assert list(named.values()) == [*same, "w8_s1", "someone/a"]
