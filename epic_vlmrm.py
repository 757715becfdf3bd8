# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.6", "open_clip_torch>=3.3,<4", "gymnasium[mujoco]>=1.2,<2", "tyro>=0.9", "numpy>=2.0",
#                 "tensorboard>=2.18", "tqdm>=4.66", "matplotlib>=3.9", "imageio>=2.36", "imageio-ffmpeg>=0.5"]
# ///
"""How good is a VLM as a reward model? Its EPIC distance to the truth, without training a policy (paper, section 4.4).

Method: Rocamonde et al., "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning", ICLR 2024.

    python epic_vlmrm.py                                           # the shipped tiny CLIP, eight tasks, offline
    python epic_vlmrm.py --run runs/RUN_NAME                       # also on states that this run visited
    python epic_vlmrm.py --clip-model ViT-L-14/laion2b_s32b_b82k --clip-model ViT-H-14/laion2b_s32b_b79k
    python epic_vlmrm.py --frames runs/epic/frames_1234abcd.npz --clip-model ViT-bigG-14/laion2b_s39b_b160k
    python epic_vlmrm.py --task kneeling --compare-prompt "a robot on its knees" --compare-prompt "a man kneeling"
    python epic_vlmrm.py --frames my_pictures                      # PNGs and a labels.csv of your own

The truth is 1 in goal states and 0 elsewhere, decided by geometry (TASKS in sac_vlmrm.py). With rho the correlation
of the VLM's reward with it over all frames, the distance is sqrt(1 - rho) / sqrt(2): 0 perfect, 0.707 unrelated,
1 inverted. It depends on the frames, so compare only what was measured on the same ones.

A labels.csv starts with a line like `file,kneeling,a robot waving`: the PNG's name, then a column per task, named as
in sac_vlmrm.py or by its prompt. Below it stands a line per PNG with 1 (goal state) or 0 in each of these columns.

Left in --out: epic.md and epic.json (all numbers), epic_alpha.png, epic_size.png, histogram_VLM.png; the frames, to be
scored again with other VLMs, elsewhere too; the embeddings, since each VLM sees each frame only once: another prompt,
another alpha or an interrupted run starts from them. VLMs whose names differ only in an ending _s1, _s2, ... are
training seeds of one recipe: the pictures show their mean as a line and each of them as a dot.
"""

import csv
import hashlib
import itertools
import json
import os
import re
import sys
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch  # before anything makes an EGL renderer

import imageio.v3 as iio
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro
from tqdm import tqdm

import sac_vlmrm
from sac_vlmrm import TASK_PROMPTS, TASKS, CLIPReward, VLMHumanoid, check

matplotlib.use("Agg")  # files, no windows

PROMPT_OF = {task: prompt for prompt, task in TASK_PROMPTS.items()}


@dataclass
class Args:
    # the reward models
    clip_model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """as in sac_vlmrm.py; give it several times to compare. local-dir:tiny_clip if not given"""
    clip_alpha: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """strengths of the goal-baseline regularisation"""
    clip_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    reward_batch_size: int = 50
    """frames per forward pass of the image tower"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    # the question
    task: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """what to score (may be repeated); every task that the frames are labelled for if not given"""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """instead of the paper's prompt for one --task; given several times, the embeddings are averaged, as in training"""
    compare_prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """another wording for one --task, scored on its own beside --prompt (may be repeated)"""
    baseline_prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """given several times, the embeddings are averaged; "a humanoid robot" if not given"""

    # the frames
    frames: str = ""
    """frames_*.npz written by this script, or a folder of PNGs with a labels.csv; made and saved if not given"""
    generated: int = 4000
    """frames of generated states, at least 5 % of them goal states of each task"""
    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """run folder of sac_vlmrm.py whose visited states to add (may be repeated)"""
    visited: int = 2000
    """frames to take from each of them, spread evenly over what its replay buffer holds"""
    image_size: int = 0
    """height and width of the frames; 0: the largest that one of the VLMs takes"""
    textures: Literal["modified", "original"] = "modified"
    camera: Literal["modified", "original"] = "modified"
    seed: int = 1

    # the report
    out: str = "runs/epic"
    histogram_alpha: float = 0.0
    """alpha of the histograms"""


# EPIC
def epic_distance(rewards, labels):
    """EPIC distance in [0, 1] of rewards (N,) to labels (N,) of 0 and 1; ValueError says why if there is none."""
    rewards, labels = np.asarray(rewards, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if not np.isfinite(rewards).all():
        raise ValueError("the reward is not finite")
    if labels.min() == labels.max():
        raise ValueError("only goal states among the frames" if labels.max() else "no goal state among the frames")
    if np.ptp(rewards) <= 1e-5 * np.abs(rewards).max():  # fp32 noise
        raise ValueError("the reward is the same for all frames")
    rho = np.corrcoef(rewards, labels)[0, 1]
    return float(np.sqrt(max(0.0, 1 - rho) / 2))


# REWARD
class Scorer(CLIPReward):
    """CLIPReward for many prompts and alphas at once: only `embed_images` needs the image tower."""

    def __init__(self, clip_model, prompts, device="cpu", precision="fp32", batch_size=400):
        super().__init__(clip_model, prompts, prompts[:1], 0.0, device, precision, batch_size)
        self.embedding_of = dict(zip(prompts, self.goal))  # prompt -> (D,)
        self.image_parameters = sum(p.numel() for p in self.clip.visual.parameters())

    def embed_prompts(self, prompts):
        """Normalised embedding of each prompt (P, D), where CLIPReward wants the mean of them."""
        self.parameter_count = sum(p.numel() for p in self.clip.parameters())  # the text tower is dropped after this
        return torch.stack([super(Scorer, self).embed_prompts([prompt]) for prompt in prompts])

    def rewards(self, embeddings, goal_prompts, baseline_prompts, alpha):
        """Rewards (N,) as training would compute them, numpy; ValueError if goal and baseline mean the same."""
        embeddings_of = [[self.embedding_of[p] for p in prompts] for prompts in (goal_prompts, baseline_prompts)]
        self.goal, self.baseline = (torch.stack(rows).mean(0) for rows in embeddings_of)
        self.alpha, d = alpha, self.goal - self.baseline
        if alpha > 0 and d.norm() <= 1e-6:
            raise ValueError("goal and baseline prompt mean the same to this model")
        self.direction = d / d.norm().clamp(min=1e-12)
        return self(embeddings.to(self.goal.device)).cpu().numpy()


def embed_frames(scorer, frames, cache):
    """Normalised embeddings (N, D) of all frames. Goes on from those in the file `cache`, if this VLM made them."""

    def embed(batch):
        if len({frame.shape for frame in batch}) > 1:  # pictures of different sizes
            return torch.cat([embed([frame]) for frame in batch])
        return scorer.embed_images(np.stack(batch)).cpu()

    embeddings, saved = embed(frames[:1])[:0], time.time()  # (0, D)
    if cache.is_file():
        embeddings = torch.load(cache, weights_only=True)
        again = embed(frames[: min(8, len(embeddings))])
        if embeddings.shape[1] != again.shape[1] or (again * embeddings[:8]).sum(1).min() < 0.9995:  # bf16: 0.9999
            print("the cached embeddings are of other weights; embedding again")
            embeddings = again[:0]
    cache.parent.mkdir(parents=True, exist_ok=True)
    progress = tqdm(total=len(frames), initial=len(embeddings), unit="frame", desc="embedding", dynamic_ncols=True)
    try:
        while len(embeddings) < len(frames):
            batch = embed(frames[len(embeddings) : len(embeddings) + scorer.batch_size])
            embeddings = torch.cat([embeddings, batch])
            progress.update(len(batch))
            if time.time() - saved > 10:
                saved = time.time()
                sac_vlmrm.atomic_save(embeddings, cache)
    finally:  # also after Ctrl-C
        progress.close()
        if len(embeddings):
            sac_vlmrm.atomic_save(embeddings, cache)
    return embeddings


# FRAMES
def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def generated_states(rng, count):
    """qpos (24,) one by one: first goal states of every task, 5 % of `count` each, then poses and falls as in the
    tiny CLIP's training, with random numbers of our own."""
    from tiny_clip.train import Poser

    poser, quota, made = Poser(rng, 64), -(-count // 20), 0
    missing = dict.fromkeys(TASKS, quota)
    for _ in range(5000 * quota):  # the rarest is about one pose in 400
        if not any(missing.values()):
            break
        qpos = poser.sample_pose()
        poser.forward(qpos)
        task = next((task for task in TASKS if missing[task] and TASKS[task](poser.data)), None)
        if task:
            missing[task] -= 1
            made += 1
            yield qpos
    check(not any(missing.values()), f"too few goal states found: {missing} are missing")
    while made < count:
        if rng.random() < 0.06:
            states = poser.sample_motion(int(rng.integers(12, 140)))
        else:
            states = [poser.settle(poser.sample_pose(), rng.integers(9)) for _ in range(4)]
        yield from states[: count - made]
        made += len(states)


def visited_states(run, count):
    """qpos (count, 24), spread evenly over the run: from its replay buffer, which reaches further back than its two
    checkpoints."""
    try:
        chunks = [torch.load(chunk, weights_only=True)["next_obs"] for chunk in sorted(Path(run).glob("replay_*.pt"))]
    except Exception as error:
        raise SystemExit(f"error: --run {run}: a replay chunk can't be read: {first_line(error)}")
    qpos = torch.cat(chunks)[:, :24].numpy().astype(np.float64)
    return qpos[np.linspace(0, len(qpos) - 1, min(count, len(qpos))).round().astype(int)]


def make_frames(args, size, path):
    """Draw and label all states, and save frames (N, H, W, 3) uint8, labels (N, T) bool, qpos (N, 24), source (N,)."""
    states = {Path(run).name: visited_states(run, args.visited) for run in args.run}
    source = [*["generated"] * args.generated, *(name for name in states for _ in states[name])]
    stream = generated_states(np.random.default_rng([args.seed, 2024]), args.generated)  # training's seeds are integers
    path.parent.mkdir(parents=True, exist_ok=True)
    env = VLMHumanoid(size, args.textures, args.camera)
    frames, labels, qpos = np.empty((len(source), size, size, 3), dtype=np.uint8), [], []
    progress = tqdm(itertools.chain(stream, *states.values()), total=len(source), unit="frame", desc="drawing")
    for i, state in enumerate(progress):
        frames[i] = env.render_state(state)
        labels.append([bool(is_goal(env.data)) for is_goal in TASKS.values()])
        qpos.append(state)
    env.close()
    aside = path.with_suffix(".tmp.npz")
    np.savez_compressed(aside, frames=frames, labels=labels, tasks=list(TASKS), qpos=qpos, source=source)
    os.replace(aside, path)


def frames_file(args, size):
    """Where the frames of these flags are kept. The scripts count too: another version may draw or label otherwise."""
    key = [Path(sac_vlmrm.__file__).read_text(), (sac_vlmrm.HERE / "tiny_clip" / "train.py").read_text()]
    key += [size, args.generated, args.visited, args.textures, args.camera, args.seed]
    key += [[run, sorted(chunk.name for chunk in Path(run).glob("replay_*.pt"))] for run in args.run]
    return Path(args.out) / f"frames_{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]}.npz"


def load_frames(path):
    """Frames (a sequence of (H, W, 3) uint8), labels {task or prompt: (N,) bool}, source of each frame (N,)."""
    path = Path(path)
    if path.is_dir():
        return load_pictures(path)
    try:
        file = np.load(path)
        frames, labels, tasks, source = (file[key] for key in ("frames", "labels", "tasks", "source"))
    except Exception as error:  # not there, not an npz, cut short, other arrays
        raise SystemExit(f"error: --frames {path} is not a frames file of this script: {first_line(error)}")
    usable = frames.dtype == np.uint8 and frames.ndim == 4 and labels.shape == (len(source), len(tasks)) != (0, 0)
    check(usable and len(frames) == len(source), f"--frames {path} is not a frames file of this script")
    return frames, {str(task): labels[:, i].astype(bool) for i, task in enumerate(tasks)}, source


def load_pictures(folder):
    """The same from a folder of PNGs and its labels.csv."""
    table = folder / "labels.csv"
    check(table.is_file(), f"--frames {folder}: there is no labels.csv in it")
    with open(table, newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    check(len(rows) > 1 and rows[0][0] == "file" and len(rows[0]) > 1 and all(rows[0]),
          f"{table} must start with a line `file,TASK,...` and have a line per PNG below it")  # fmt: skip
    frames = []
    for row in rows[1:]:
        check(len(row) == len(rows[0]) and set(row[1:]) <= {"0", "1"},
              f"{table}: `{','.join(row)}` is not a file name and {len(rows[0]) - 1} labels of 0 or 1")  # fmt: skip
        try:
            frames.append(iio.imread(folder / row[0], index=0, plugin="pillow", mode="RGB"))
        except Exception as error:
            raise SystemExit(f"error: {table}: {row[0]} can't be read as a picture: {first_line(error)}")
    labels = np.array([row[1:] for row in rows[1:]]) == "1"
    names = [TASK_PROMPTS.get(name, name) for name in rows[0][1:]]
    check(len(set(names)) == len(names), f"{table}: two columns label the same task")
    return frames, {name: labels[:, i] for i, name in enumerate(names)}, np.full(len(frames), folder.name)


def fingerprint(frames):
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(repr(frame.shape).encode() + np.ascontiguousarray(frame).tobytes())
    return digest.hexdigest()[:12]


# REPORT
def distances(scorer, embeddings, rows, labels, args):
    """Distances {row: {alpha: distance or None}}, and {row: why it has none}. rows: {name: (task, goal prompts)}."""
    epic, reasons = {name: dict.fromkeys(args.clip_alpha) for name in rows}, {}
    for name, (task, prompts) in rows.items():
        for alpha in args.clip_alpha:
            try:
                rewards = scorer.rewards(embeddings, prompts, args.baseline_prompt, alpha)
                epic[name][alpha] = epic_distance(rewards, labels[task])
            except ValueError as reason:
                reasons[name] = str(reason)
    if len(rows) > 1 and not args.compare_prompt:
        whole = [list(row.values()) for row in epic.values() if None not in row.values()]
        means = np.mean(whole, axis=0).tolist() if whole else itertools.repeat(None)
        epic["mean"] = dict(zip(args.clip_alpha, means))
    return epic, reasons


def report(result, goal_counts):
    """One VLM's distances as a markdown table, padded to read well in a terminal, and why some are missing."""
    header = ["EPIC distance", "goal states", *(f"alpha {alpha:g}" for alpha in next(iter(result["epic"].values())))]
    lines = [[name, goal_counts.get(name, ""), *("-" if v is None else f"{v:.3f}" for v in row.values())]
             for name, row in result["epic"].items()]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in [header, rule, *lines]]
    size, image_size = (f"{result[key] / 1e6:.3g}M" for key in ("parameters", "image_parameters"))
    title = f"**{result['name']}** ({size} parameters, {image_size} of them in the image tower)\n\n"
    notes = [f"- {name}: no distance, {reason}\n" for name, reason in result["no_distance"].items()]
    return title + "".join(f"| {' | '.join(line)} |\n" for line in padded) + "".join(["\n", *notes] if notes else [])


# PICTURES
def panels(titles, heading, ylabel="EPIC distance", xlabel="alpha"):
    """A figure with one small plot per title, in a grid."""
    columns = 3 if len(titles) in (3, 5, 6, 9) else min(len(titles), 4)
    rows = -(-len(titles) // columns)
    size = max(5.5, 3.0 * columns + 1.2), 2.4 * rows + 1.4
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False)
    for ax, title in zip(axes.flat, titles):
        ax.set_title(textwrap.fill(title, 38), fontsize=10)
        ax.grid(alpha=0.25)
        ax.set_xlabel(xlabel)
        if ylabel == "EPIC distance":
            ax.axhline(0.5**0.5, color="grey", linestyle=":", label="unrelated to the goal (0.707)")
    for ax in axes.flat[len(titles) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    figure.suptitle(heading, fontsize=12)
    return figure, axes.flat[: len(titles)]


def finish(figure, axes, path):
    """One legend for all plots below them, and to disk."""
    legend = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels())}
    columns = max(1, int(figure.get_figwidth() // (0.8 + 0.08 * max(map(len, legend), default=0))))
    lines = -(-len(legend) // columns)
    figure.legend(legend.values(), legend, loc="lower center", ncols=columns, frameon=False)
    figure.tight_layout(rect=(0, (0.1 + 0.22 * lines) / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def recipe(result):
    """Name of a VLM without its training seed."""
    return re.sub(r"[-_](s|seed)[0-9]+$", "", result["name"])


def plot_alpha(results, args, path):
    """EPIC against alpha (Fig. 4a): a plot per task with a line per VLM, or a plot per VLM with a line per wording."""
    curves = {}  # plot -> line -> one curve per training seed
    for result in results:
        for row, values in result["epic"].items():
            plot, line = (recipe(result), row) if args.compare_prompt else (row, recipe(result))
            curves.setdefault(plot, {}).setdefault(line, []).append(np.array(list(values.values()), dtype=float))
    figure, axes = panels(list(curves), "EPIC distance against alpha (lower is better)")
    for ax, lines in zip(axes, curves.values()):
        for i, (name, seeds) in enumerate(lines.items()):
            ax.plot(args.clip_alpha, np.mean(seeds, axis=0), "-o", color=f"C{i % 10}", markersize=4, label=name)
            ax.plot(args.clip_alpha, np.transpose(seeds), ".", color=f"C{i % 10}", markersize=3)
    finish(figure, axes, path)


def plot_size(results, args, path):
    """EPIC against parameters (Fig. 4b): a plot per task, a line per alpha. Of recipes of equal size the line follows
    the one that was given first, the others are hollow marks."""
    rows, on_line = list(results[0]["epic"]), {}
    for result in results:
        on_line.setdefault(result["image_parameters"], recipe(result))
    sizes = sorted(on_line)
    hollow = list(dict.fromkeys(recipe(result) for result in results if recipe(result) not in on_line.values()))
    figure, axes = panels(rows, "EPIC distance against size (lower is better)", xlabel="parameters of the image tower")
    for ax, row in zip(axes, rows):
        for i, alpha in enumerate(args.clip_alpha):
            color = plt.cm.viridis(0.9 * i / max(1, len(args.clip_alpha) - 1))
            points = {}  # (size, recipe) -> one distance per training seed
            for result in results:
                key = result["image_parameters"], recipe(result)
                points.setdefault(key, []).append(np.array(result["epic"][row][alpha], dtype=float))
            line = [np.mean(points[size, on_line[size]]) for size in sizes]
            ax.plot(sizes, line, "-o", color=color, markersize=4, label=f"alpha {alpha:g}")
            for (size, name), seeds in points.items():
                ax.plot([size] * len(seeds), seeds, ".", color=color, markersize=3)
                if name in hollow:
                    mark = {"marker": "Ds^vP*"[hollow.index(name) % 6], "markerfacecolor": "none", "linestyle": ""}
                    ax.plot(size, np.mean(seeds), color=color, label=name if i == 0 else None, **mark)
        ax.set_xscale("log")
        ax.set_xticks(sizes, [f"{size / 1e6:.2g}M" for size in sizes], fontsize=8)
        ax.set_xticks([], minor=True)
        ax.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
    finish(figure, axes, path)


def plot_histograms(scorer, embeddings, rows, labels, args, name, path):
    """Standardised reward of goal and other states (Fig. 7), a plot per task."""
    heading = f"{name}: reward of goal states and others, alpha {args.histogram_alpha:g}"
    figure, axes = panels(list(rows), heading, "density", "standardised reward")
    for ax, (task, prompts) in zip(axes, rows.values()):
        try:
            rewards = scorer.rewards(embeddings, prompts, args.baseline_prompt, args.histogram_alpha)
            note = f"EPIC {epic_distance(rewards, labels[task]):.2f}"
        except ValueError as reason:
            note = f"no distance: {reason}"
        else:
            z = (rewards - rewards.mean()) / rewards.std()
            bins = np.linspace(z.min(), z.max(), 40)
            ax.hist(z[~labels[task]], bins, density=True, color="0.65", label="other states")
            ax.hist(z[labels[task]], bins, density=True, color="tab:green", alpha=0.65, label="goal states")
        ax.text(0.03, 0.95, textwrap.fill(note, 30), transform=ax.transAxes, va="top", fontsize=9)
    finish(figure, axes, path)


# MAIN
def parse_args(argv):
    args = tyro.cli(Args, args=argv)
    args.clip_model = tuple(dict.fromkeys(args.clip_model)) or ("local-dir:tiny_clip",)
    args.baseline_prompt = args.baseline_prompt or ("a humanoid robot",)
    args.clip_alpha = tuple(sorted(set(args.clip_alpha)))
    check(args.clip_alpha, "--clip-alpha is empty")
    for alpha in (*args.clip_alpha, args.histogram_alpha):
        check(0 <= alpha <= 1, f"alpha {alpha} is not between 0 and 1")
    check(all(p.strip() for p in args.prompt + args.baseline_prompt + args.compare_prompt), "a prompt is empty")
    check(not (args.frames and args.run), "give either --frames, which has its states already, or --run")
    check(args.generated == 0 or args.generated >= 20, "--generated must be at least 20, or 0 for none")
    check(args.generated or args.run or args.frames, "--generated 0 leaves no frames; add --run")
    check(min(args.visited, args.reward_batch_size) > 0, "--visited and --reward-batch-size must be at least 1")
    check(args.image_size >= 0, "--image-size must be positive, or 0 for the size the VLMs take")
    for run in args.run:
        check(any(Path(run).glob("replay_*.pt")), f"--run {run}: there are no replay_*.pt in it")
    check(len({Path(run).name for run in args.run}) == len(args.run), "two --run have the same name")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    args.device = next(name for name in there if there[name]) if args.device == "auto" else args.device
    check(there[args.device], f"--device {args.device}: PyTorch sees no such GPU here; use --device cpu")
    check(args.clip_precision == "fp32" or args.device != "cpu", f"--clip-precision {args.clip_precision} needs a GPU")
    return args


def choose_rows(args, labels):
    """What is scored, {name: (task, goal prompts)}: a task per row, or a wording per row with --compare-prompt."""
    tasks = args.task or [TASK_PROMPTS[p] for p in args.prompt if p in TASK_PROMPTS][:1] or tuple(labels)
    for task in tasks:
        check(task in labels, f"--task {task}: the frames are labelled for {', '.join(labels)}")
    one_task = len(tasks) == 1 or not (args.prompt or args.compare_prompt)
    check(one_task, "--prompt and --compare-prompt need one --task, which says what the goal states are")
    rows = {task: (task, args.prompt or (PROMPT_OF.get(task, task),)) for task in tasks}
    if args.compare_prompt:
        [(task, prompts)] = rows.values()
        rows = {" + ".join(prompts): (task, prompts)} | {prompt: (task, (prompt,)) for prompt in args.compare_prompt}
    return rows


def name_models(models):
    """Names for tables and pictures: of a folder its last part, of the others all that tells them apart."""
    names = [Path(m.removeprefix("local-dir:")).resolve().name if m.startswith("local-dir:") else
             m.removeprefix("hf-hub:") for m in models]  # fmt: skip
    return {model: name if names.count(name) == 1 else model for model, name in zip(models, names)}


def score_all(args, rows, frames, labels, about):
    """Score one VLM after the other; the report is written anew after each, so that a crash costs one at most."""
    out, results = Path(args.out), []
    goal_counts = {name: str(int(labels[task].sum())) for name, (task, _) in rows.items()}
    prompts = list(dict.fromkeys([p for _, goal in rows.values() for p in goal] + list(args.baseline_prompt)))
    frames_key = fingerprint(frames)
    for model, name in name_models(args.clip_model).items():
        print(f"\n{model}")
        scorer = Scorer(model, prompts, torch.device(args.device), args.clip_precision, args.reward_batch_size)
        file_name = re.sub(r"[^A-Za-z0-9.]+", "_", name)
        cache = out / "embeddings" / f"{file_name}_{args.clip_precision}_{frames_key}.pt"
        embeddings = embed_frames(scorer, frames, cache)
        epic, reasons = distances(scorer, embeddings, rows, labels, args)
        size = {"parameters": scorer.parameter_count, "image_parameters": scorer.image_parameters}
        results.append({"name": name, "clip_model": model, **size, "epic": epic, "no_distance": reasons})
        print(f"\n{report(results[-1], goal_counts)}")
        tables = "\n".join(report(result, goal_counts) for result in results)
        (out / "epic.md").write_text(f"{about}\n{tables}")
        numbers = {"frames": about.strip(), "goal_states": goal_counts, "vlms": results, "args": asdict(args)}
        (out / "epic.json").write_text(json.dumps(numbers, indent=2) + "\n")
        plot_alpha(results, args, out / "epic_alpha.png")
        plot_size(results, args, out / "epic_size.png")
        plot_histograms(scorer, embeddings, rows, labels, args, name, out / f"histogram_{file_name}.png")
    return results


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    path = args.frames
    try:
        if not path:
            choose_rows(args, TASKS)  # a wrong name should not cost minutes
            size = args.image_size or max(Scorer(model, args.baseline_prompt).image_size for model in args.clip_model)
            path = frames_file(args, size)
            if not path.is_file():
                print(f"renderer: {sac_vlmrm.pick_gl_backend()}")
                make_frames(args, size, path)
        frames, labels, source = load_frames(path)
        counts = ", ".join(f"{count} {name}" for name, count in zip(*np.unique(source, return_counts=True)))
        about = f"{len(frames)} frames ({counts}) in {path}. EPIC distance: 0 perfect, 0.707 unrelated, 1 inverted.\n"
        print(about, end="")
        results = score_all(args, choose_rows(args, labels), frames, labels, about)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on with the embeddings made so far")
    print(f"wrote epic.md, epic.json, epic_alpha.png, epic_size.png and histogram_*.png to {args.out}")
    return results


if __name__ == "__main__":
    main()
