# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch>=2.6", "open_clip_torch>=3.3,<4", "gymnasium[mujoco]>=1.2,<2",
#   "mujoco>=3.17", "tyro>=0.9", "numpy>=2.0", "tensorboard>=2.18", "tqdm>=4.66", "imageio>=2.36",
#   "imageio-ffmpeg>=0.5", "matplotlib>=3.9"]
# ///
"""How good is a VLM as a reward model? Its EPIC distance to the truth, without training a policy.

Method: Rocamonde et al., "Vision-Language Models are Zero-Shot Reward Models for Reinforcement
Learning", ICLR 2024, section 4.4.

    python epic_vlmrm.py --glance                                  # look before you train: below
    python epic_vlmrm.py                                           # tiny CLIP, offline
    python epic_vlmrm.py --clip-model ViT-L-14/laion2b_s32b_b82k   # another; repeat to compare
    python epic_vlmrm.py --run runs/RUN_NAME                       # also on states a run visited
    python epic_vlmrm.py --frames runs/epic/frames_1234abcd.npz    # on the same frames again
    python epic_vlmrm.py --frames my_pictures                      # PNGs and a labels.csv
    python epic_vlmrm.py --task kneeling --compare-prompt "a man kneeling"

The truth is 1 in goal states and 0 elsewhere, decided by geometry (goal_states in sac_vlmrm.py).
With rho the correlation of the VLM's reward with it over all frames, the distance is
sqrt(1 - rho) / sqrt(2): 0 perfect, 0.707 unrelated, 1 inverted. It depends on the frames, so
compare only what was measured on the same ones.

--glance takes seconds: how every task's prompt, and every --prompt, rewards (alpha 0) a hand-made
frame per posture, as numbers on a picture and as a sentence of verdict. It leaves glance.png,
glance.md and glance.json in --out, and the frames in glance_HEIGHTxWIDTH, a folder for --frames,
with --glance or without, on any machine: without OpenGL, too.

A labels.csv starts with a line like `file,kneeling,a robot waving`: the PNG's name, then a column
per task, named as in sac_vlmrm.py or by its prompt. Below it stands a line per PNG with 1 (goal
state) or 0 in each of these columns.

Left in --out: epic.md and epic.json (all numbers), epic_alpha.png, epic_size.png,
histogram_VLM.png; course_RUN_VLM.png, a run's return had it been paid by other sentences or
alphas; the frames, to be scored again with other VLMs, elsewhere too; the embeddings,
since each VLM sees each frame only once: another prompt, another alpha or an interrupted run starts
from them. VLMs whose names differ only in an ending _s1, _s2, ... are training seeds of one recipe:
the pictures show their mean as a line and each of them as a dot.
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
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch  # before OpenGL: the other order segfaults

import imageio.v3 as iio
import numpy as np
import torch.nn.functional as F
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under PYTHONSAFEPATH
import sac_vlmrm
from sac_vlmrm import (
    EPISODE_LENGTH,
    HUMANOID,
    TASKS,
    CLIPReward,
    Painter,
    Patient,
    atomic_save,
    check,
    goal_states,
    usable_cores,
    warn,
)

os.environ["MPLBACKEND"] = "agg"  # read by matplotlib: files, no windows, whatever a notebook says

import matplotlib
import mujoco  # after sac_vlmrm.py, which says how it draws
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

TASK_OF = {prompt: task for task, prompt in TASKS.items()}
Several = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]  # a flag that may be repeated


@dataclass
class Args:
    glance: bool = False  # only ask every prompt for its reward of some fifteen postures

    # the reward models
    clip_model: Several = ()  # as in sac_vlmrm.py; repeat to compare. local-dir:tiny_clip if none
    clip_alpha: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # goal-baseline regularisation
    clip_precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the image tower
    reward_batch_size: int = 50  # frames per forward pass of the image tower
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU if there is one

    # the question
    task: Several = ()  # what to score; if none, every task that the frames are labelled for
    # instead of the paper's for one --task; several are averaged. With --glance: rows of their own
    prompt: Several = ()
    compare_prompt: Several = ()  # another wording for one --task, scored on its own
    baseline_prompt: Several = ()  # several are averaged; "a humanoid robot" if none

    # the frames
    frames: str = ""  # frames_*.npz, or folder of PNGs with a labels.csv; made if not given
    generated: int = 4000  # frames of generated states, at least 5 % goal states of each task
    run: Several = ()  # run folder of sac_vlmrm.py whose visited states to add
    visited: int = 2000  # frames to take from each, spread evenly over what its replay buffer holds
    image_size: int = 0  # height and width of the frames; 0: the largest that one of the VLMs takes
    textures: Literal["modified", "original"] = "modified"  # modified: realistic (paper, Fig. 3)
    camera: Literal["front", "side", "original"] = "front"  # front: the paper's, fixed
    seed: int = 1  # of the generated states

    # the report
    out: str = "runs/epic"
    histogram_alpha: float = 0.0  # alpha of the histograms


# EPIC
def epic_distance(rewards, labels):
    """EPIC distance in [0, 1] of rewards (N,) to labels (N,) of 0 and 1; ValueError says why if
    there is none."""
    rewards, labels = (np.asarray(values, dtype=np.float64) for values in (rewards, labels))
    if not np.isfinite(rewards).all():
        raise ValueError("the reward is not finite")
    if labels.min() == labels.max():
        which = "only goal states" if labels.max() else "no goal state"
        raise ValueError(f"{which} among the frames")
    if np.ptp(rewards) <= 1e-5 * np.abs(rewards).max():  # fp32 noise
        raise ValueError("the reward is the same for all frames")
    rho = np.corrcoef(rewards, labels)[0, 1]
    return float(np.sqrt(max(0.0, 1 - rho) / 2))


# REWARD
class Scorer(CLIPReward):
    """CLIPReward for many prompts and alphas at once: only `embed_images` needs the image tower."""

    def __init__(self, clip_model, prompts, device="cpu", precision="fp32", batch_size=50):
        prompts = tuple(prompts)
        super().__init__(clip_model, prompts, prompts[:1], 0.0, device, precision, batch_size)
        self.embedding_of = dict(zip(prompts, self.goal))  # prompt -> (D,)
        self.image_parameters = sum(p.numel() for p in self.clip.visual.parameters())

    def embed_prompts(self, prompts):
        """Normalised embedding of each prompt (P, D), where CLIPReward wants the mean of them."""
        # the text tower is dropped after this
        self.parameter_count = sum(p.numel() for p in self.clip.parameters())
        return torch.stack([super(Scorer, self).embed_prompts([prompt]) for prompt in prompts])

    def rewards(self, embeddings, goal_prompts, baseline_prompts, alpha):
        """Rewards (N,) as training would compute them, numpy; ValueError if goal and baseline mean
        the same."""
        self.goal, self.baseline = (
            torch.stack([self.embedding_of[prompt] for prompt in prompts]).mean(0)
            for prompts in (goal_prompts, baseline_prompts)
        )
        self.alpha, d = alpha, self.goal - self.baseline
        if alpha > 0 and d.norm() <= 1e-6:
            raise ValueError("goal and baseline prompt mean the same to this model")
        self.direction = d / d.norm().clamp(min=1e-12)
        return self(embeddings.to(self.goal.device)).cpu().numpy()


def embed_frames(scorer, frames, cache):
    """Normalised embeddings (N, D) of all frames. Goes on from those in the file `cache`, if this
    VLM made them."""

    def embed(batch):
        if len({frame.shape for frame in batch}) > 1:  # pictures of different sizes
            return torch.cat([embed([frame]) for frame in batch])
        return scorer.embed_images(np.stack(batch)).cpu()

    embeddings, saved = embed(frames[:1])[:0], time.time()  # (0, D)
    if cache.is_file():
        again = embed(frames[:8])
        try:
            old = torch.load(cache, weights_only=True)
            same = (again[: len(old)] * old[:8]).sum(1).min() > 0.9995  # bf16: 0.9999
        except Exception:  # a damaged file, other sizes
            same = False
        if same:
            embeddings = old
        else:
            print("the cached embeddings are damaged or of other weights; embedding again")
    cache.parent.mkdir(parents=True, exist_ok=True)
    bar = {"unit": "frame", "desc": "embedding", "dynamic_ncols": True}
    progress = tqdm(total=len(frames), initial=len(embeddings), **bar)
    try:
        while len(embeddings) < len(frames):
            batch = embed(frames[len(embeddings) : len(embeddings) + scorer.batch_size])
            embeddings = torch.cat([embeddings, batch])
            progress.update(len(batch))
            if time.time() - saved > 10:
                saved = time.time()
                atomic_save(embeddings, cache)
    finally:  # also after Ctrl-C
        progress.close()
        if len(embeddings):
            atomic_save(embeddings, cache)
    return embeddings


# FRAMES
def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def generated_states(rng, count):
    """qpos (24,) one by one: first goal states of every task, 5 % of `count` each, then poses and
    falls as in the tiny CLIP's training, with random numbers of our own."""
    from tiny_clip.train import Poser

    poser, quota, made = Poser(rng), -(-count // 20), 0
    missing = dict.fromkeys(TASKS, quota)
    for _ in range(20 * quota):  # batches; the rarest goal state is about one pose in 400
        if not any(missing.values()):
            break
        poses, rng_after = [], []
        for _ in range(250):
            poses.append(poser.sample_pose())
            rng_after.append(rng.bit_generator.state)
        goals = goal_states(np.stack(poses))
        for i, qpos in enumerate(poses):
            task = next((task for task in TASKS if missing[task] and goals[task][i]), None)
            if task:
                missing[task] -= 1
                made += 1
                yield qpos
            if not any(missing.values()):
                rng.bit_generator.state = rng_after[i]  # as if the batch ended here
                break
    check(not any(missing.values()), f"too few goal states found: {missing} are missing")
    while made < count:
        if rng.random() < 0.06:
            states = poser.sample_motion(int(rng.integers(12, 140)))
        else:
            states = [poser.settle(poser.sample_pose(), rng.integers(9)) for _ in range(4)]
        yield from states[: count - made]
        made += len(states)


def visited_states(run, count):
    """qpos (count, 24), spread evenly over the run: from its replay buffer, which reaches further
    back than its two checkpoints."""
    qpos = [np.zeros((0, 24))]
    try:
        chunks = Path(run).glob("replay_*.pt")  # replay_RANK_EPISODES.pt
        for path in sorted(chunks, key=lambda path: path.stem.split("_")[::-1]):
            obs = torch.load(path, map_location="cpu", weights_only=True)["obs"]  # (E, T+1, 255)
            qpos.append(obs[:, 1:, :24].reshape(-1, 24).double().numpy())
    except Exception as error:  # damaged, or of another version
        sys.exit(f"error: --run {run}: {path.name} can't be read: {first_line(error)}")
    qpos = np.concatenate(qpos)
    check(len(qpos), f"--run {run}: it has no episodes yet")
    return qpos[np.linspace(0, len(qpos) - 1, min(count, len(qpos))).round().astype(int)]


def painter_of(args, size):
    return Painter(size, args.textures, (args.camera,), usable_cores())


def make_frames(args, size, path):
    """Draw and label all states, and save frames (N, H, W, 3) uint8, labels (N, T) bool,
    qpos (N, 24), source (N,)."""
    visited = {Path(run).name: visited_states(run, args.visited) for run in args.run}
    source = [*["generated"] * args.generated, *(run for run in visited for _ in visited[run])]
    rng = np.random.default_rng([args.seed, 2024])  # the seeds of the training are integers
    states = itertools.chain(generated_states(rng, args.generated), *visited.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = {"total": len(source), "unit": "frame", "desc": "drawing", "dynamic_ncols": True}
    frames, labels, qpos = np.empty((len(source), *size, 3), dtype=np.uint8), [], []
    with closing(painter_of(args, size)) as painter, tqdm(**bar) as progress:
        tqdm.write(f"renderer: {painter.name}")
        while batch := list(itertools.islice(states, 100)):
            frames[len(qpos) : len(qpos) + len(batch)] = painter(np.stack(batch))[:, 0]
            qpos += batch
            labels.append(np.stack([*goal_states(np.stack(batch)).values()], axis=1))
            progress.update(len(batch))
    labels, tasks, aside = np.concatenate(labels), list(TASKS), path.with_suffix(".tmp.npz")
    np.savez_compressed(aside, frames=frames, labels=labels, tasks=tasks, qpos=qpos, source=source)
    os.replace(aside, path)


def frames_file(args, size):
    """Where the frames of these flags are kept. The scripts count too: another version may draw or
    label otherwise."""
    here = Path(sac_vlmrm.__file__).resolve().parent
    key = [
        (here / name).read_text(encoding="utf-8") for name in ("sac_vlmrm.py", "tiny_clip/train.py")
    ]
    key += [size, args.generated, args.visited, args.textures, args.camera, args.seed]
    key += [[run, sorted(path.name for path in Path(run).glob("replay_*.pt"))] for run in args.run]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return Path(args.out) / f"frames_{digest[:8]}.npz"


def load_frames(path):
    """Frames (a sequence of (H, W, 3) uint8), labels {task or prompt: (N,) bool}, source of each
    frame (N,)."""
    path, keys = Path(path), ("frames", "labels", "tasks", "source")
    if path.is_dir():
        frames, labels, names = load_pictures(path)
        return frames, labels, np.full(len(names), path.name)
    wrong = f"--frames {path} is not a frames file of this script"
    try:
        file = np.load(path)
        frames, labels, tasks, source = (file[key] for key in keys)
    except Exception as error:  # not there, not an npz, cut short, other arrays
        sys.exit(f"error: {wrong}: {first_line(error)}")
    usable = frames.dtype == np.uint8 and frames.ndim == 4 and len(frames) == len(source)
    check(usable and labels.shape == (len(source), len(tasks)) != (0, 0), wrong)
    return frames, {str(task): labels[:, i].astype(bool) for i, task in enumerate(tasks)}, source


def load_pictures(folder):
    """The same from a folder of PNGs and its labels.csv, but the name of each frame."""
    table = folder / "labels.csv"
    check(table.is_file(), f"--frames {folder}: there is no labels.csv in it")
    with open(table, newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    head, *rows = [row for row in rows if any(row)] or [[""]]
    usable = rows and head[0] == "file" and len(head) > 1 and all(head)
    wanted = "a line `file,TASK,...` and have a line per PNG below it"
    check(usable, f"{table} must start with {wanted}")
    frames = []
    for row in rows:
        usable = len(row) == len(head) and set(row[1:]) <= {"0", "1"}
        wanted = f"a file name and {len(head) - 1} labels of 0 or 1"
        check(usable, f"{table}: `{','.join(row)}` is not {wanted}")
        try:
            frames.append(iio.imread(folder / row[0], index=0, plugin="pillow", mode="RGB"))
        except Exception as error:
            sys.exit(f"error: {table}: {row[0]} can't be read as a picture: {first_line(error)}")
    labels = np.array([row[1:] for row in rows]) == "1"
    names = [TASK_OF.get(name, name) for name in head[1:]]
    check(len(set(names)) == len(names), f"{table}: two columns label the same task")
    labels = {name: labels[:, i] for i, name in enumerate(names)}
    return frames, labels, [row[0].removesuffix(".png") for row in rows]


def fingerprint(frames):
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(repr(frame.shape).encode() + np.ascontiguousarray(frame).tobytes())
    return digest.hexdigest()[:12]


def cache_file(args, name, frames_key):
    """Where a VLM's embeddings of these frames are kept."""
    file_name = f"{for_files(name)}_{args.clip_precision}_{frames_key}.pt"
    return Path(args.out) / "embeddings" / file_name


# REPORT
def distances(scorer, embeddings, rows, labels, args):
    """Distances {row: {alpha: distance or None}}, and {row: why it has none}.
    rows: {name: (task, goal prompts)}."""
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


def table(header, lines):
    """A markdown table, padded to read well in a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    text = ""
    for first, *others in [header, rule, *lines]:
        cells = first.ljust(widths[0]), *map(str.rjust, others, widths[1:])
        text += f"| {' | '.join(cells)} |\n"
    return text


def report(result, goal_counts):
    """One VLM's distances as a markdown table, padded to read well in a terminal, and why some are
    missing."""
    alphas = next(iter(result["epic"].values()))
    header = ["EPIC distance", "goal states", *(f"alpha {alpha:g}" for alpha in alphas)]
    lines = [
        [name, goal_counts.get(name, ""), *("-" if v is None else f"{v:.3f}" for v in row.values())]
        for name, row in result["epic"].items()
    ]
    size, image_size = (f"{result[key] / 1e6:.3g}M" for key in ("parameters", "image_parameters"))
    text = f"**{result['name']}** ({size} parameters, {image_size} of them in the image tower)\n\n"
    text += table(header, lines)
    notes = [f"- {name}: no distance, {why}\n" for name, why in result["no_distance"].items()]
    return text + "".join(["\n", *notes] if notes else [])


# PICTURES
def panels(titles, heading, ylabel="EPIC distance", xlabel="alpha"):
    """A figure with one small plot per title, in a grid."""
    columns = 3 if len(titles) in (3, 5, 6, 9) else min(len(titles), 4)
    rows = -(-len(titles) // columns)
    size = max(5.5, 3.0 * columns + 1.2), 2.4 * rows + 1.4
    figure = Figure(figsize=size)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
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
    legend = {}
    for ax in axes:
        legend |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
    width = 0.8 + 0.08 * max(map(len, legend), default=0)
    columns = max(1, int(figure.get_figwidth() // width))
    lines = -(-len(legend) // columns)
    figure.legend(legend.values(), legend, loc="lower center", ncols=columns, frameon=False)
    figure.tight_layout(rect=(0, (0.1 + 0.22 * lines) / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)


def recipe(result):
    """Name of a VLM without its training seed."""
    return re.sub(r"[-_](s|seed)[0-9]+$", "", result["name"])


def plot_alpha(results, args, path):
    """EPIC against alpha (Fig. 4a): a plot per task with a line per VLM, or a plot per VLM with a
    line per wording."""
    curves = {}  # plot -> line -> one curve per training seed
    for result in results:
        for row, values in result["epic"].items():
            plot, line = (recipe(result), row) if args.compare_prompt else (row, recipe(result))
            curve = np.array(list(values.values()), dtype=float)  # None: nan
            curves.setdefault(plot, {}).setdefault(line, []).append(curve)
    figure, axes = panels(list(curves), "EPIC distance against alpha (lower is better)")
    for ax, lines in zip(axes, curves.values()):
        for i, (name, seeds) in enumerate(lines.items()):
            alphas, color = args.clip_alpha, f"C{i % 10}"
            ax.plot(alphas, np.mean(seeds, axis=0), "-o", color=color, markersize=4, label=name)
            ax.plot(alphas, np.transpose(seeds), ".", color=color, markersize=3)
    finish(figure, axes, path)


def plot_size(results, args, path):
    """EPIC against parameters (Fig. 4b): a plot per task, a line per alpha. Of recipes of equal
    size the line follows the one that was given first, the others are hollow marks."""
    rows, on_line = list(results[0]["epic"]), {}
    for result in results:
        on_line.setdefault(result["image_parameters"], recipe(result))
    sizes = sorted(on_line)
    recipes = dict.fromkeys(recipe(result) for result in results)
    hollow = [name for name in recipes if name not in on_line.values()]
    heading = "EPIC distance against size (lower is better)"
    figure, axes = panels(rows, heading, xlabel="parameters of the image tower")
    for ax, row in zip(axes, rows):
        for i, alpha in enumerate(args.clip_alpha):
            color = matplotlib.colormaps["viridis"](0.9 * i / max(1, len(args.clip_alpha) - 1))
            points = {}  # (size, recipe) -> one distance per training seed
            for result in results:
                key = result["image_parameters"], recipe(result)
                points.setdefault(key, []).append(np.array(result["epic"][row][alpha], dtype=float))
            line = [np.mean(points[size, on_line[size]]) for size in sizes]
            ax.plot(sizes, line, "-o", color=color, markersize=4, label=f"alpha {alpha:g}")
            for (size, name), seeds in points.items():
                ax.plot([size] * len(seeds), seeds, ".", color=color, markersize=3)
                if name in hollow:
                    style = {"color": color, "markerfacecolor": "none", "linestyle": ""}
                    style["marker"] = "Ds^vP*"[hollow.index(name) % 6]
                    ax.plot(size, np.mean(seeds), label=name if i == 0 else None, **style)
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
            about = prompts, args.baseline_prompt, args.histogram_alpha
            rewards = scorer.rewards(embeddings, *about)
            note = f"EPIC {epic_distance(rewards, labels[task]):.2f}"
        except ValueError as reason:
            note = f"no distance: {reason}"
        else:
            z = (rewards - rewards.mean()) / rewards.std()
            bins, goal = np.linspace(z.min(), z.max(), 40), {"color": "tab:green", "alpha": 0.65}
            ax.hist(z[~labels[task]], bins, density=True, color="0.65", label="other states")
            ax.hist(z[labels[task]], bins, density=True, label="goal states", **goal)
        ax.text(0.03, 0.95, textwrap.fill(note, 30), transform=ax.transAxes, va="top", fontsize=9)
    finish(figure, axes, path)


def course(values):
    """Means of twentieths of values (N,), or the values if there are fewer."""
    return [part.mean() for part in np.array_split(values, min(20, len(values)))]


def plot_course(scorer, embeddings, rows, labels, args, name, run, path):
    """A run's return under other sentences and alphas: of the states it visited, in twentieths from
    its first to its last, times the steps of an episode. Nothing is drawn or played again."""
    heading = f"{name}: what the run {run} would have earned, a plot per sentence"
    figure, axes = panels(list(rows), heading, "return of an episode", "time in the run")
    for ax, (task, prompts) in zip(axes, rows.values()):
        for alpha in args.clip_alpha:
            rewards = scorer.rewards(embeddings, prompts, args.baseline_prompt, alpha)
            returns = course(EPISODE_LENGTH * rewards)
            ax.plot(np.linspace(0, 1, len(returns)), returns, label=f"alpha {alpha:g}")
        other = ax.twinx()
        other.plot(np.linspace(0, 1, len(returns)), course(labels[task]), "k:")
        other.set_ylim(0, 1)
        ax.plot([], [], "k:", label="share of goal states (right)")
    finish(figure, axes, path)


def picture(plot, *arguments):
    """Call plot(*arguments), the last of which is a path. No picture may cost a number."""
    try:
        plot(*arguments)
    except Exception as error:
        warn(f"no {arguments[-1].name}: {first_line(error)}")


# GLANCE
# Angles in degrees, left and right alike where no side is named. Zero is the model's own rest pose,
# on straight legs; `pitch` tilts the whole robot forward, `roll` to its right.
DOWN = {"shoulder1": -10, "shoulder2": 60, "elbow": -85}  # arms hanging at the sides
UP = {"shoulder1": 60, "shoulder2": -20, "elbow": -80}
STAND = {"knee": -2, **DOWN}
POSTURES = {
    # a goal state of each task, in their order
    "kneeling": {"knee": -95, **DOWN},
    "lotus": {"hip_x": 5, "hip_z": -60, "hip_y": -80, "knee": -160, "abdomen_y": -60, **DOWN},
    "standing": STAND,
    "both arms raised": {**STAND, **UP},
    "side splits": {"hip_x": -10, "hip_z": -60, "hip_y": -75, "knee": -2, "abdomen_y": -15, **DOWN},
    "hands on hips": {**STAND, "shoulder1": -47, "shoulder2": 75, "elbow": -12},
    "arms crossed": {**STAND, "shoulder1": -57, "shoulder2": -2, "elbow": -24},
    "on one leg": {**STAND, "left_hip_y": -70, "left_knee": -90},
    # what they are mistaken for
    "on one knee": {
        **{"left_hip_y": -95, "left_knee": -90, "right_hip_y": -5, "right_knee": -100, **DOWN}
    },
    "crouching": {"hip_x": -5, "hip_y": -90, "knee": -120, "pitch": 20, **DOWN},
    "sitting": {"hip_x": -5, "hip_y": -95, "knee": -5, **DOWN},
    "one arm raised": {**STAND, **{f"left_{joint}": angle for joint, angle in UP.items()}},
    "hands behind the back": {**STAND, "shoulder1": -57, "shoulder2": 70, "elbow": -48},
    "falling to the side": {**STAND, "roll": 45, "shoulder1": 10, "shoulder2": 0},
    "lying on its side": {**STAND, "roll": 90, "hip_y": -15, "knee": -30},
}


def state_of(posture):
    """qpos (24,) of a posture, with its lowest point on the floor."""
    data, floor = mujoco.MjData(HUMANOID), HUMANOID.geom("floor").id
    tilt = np.radians([posture.get("pitch", 0), posture.get("roll", 0)])
    mujoco.mju_euler2Quat(data.qpos[3:7], [0, *tilt], "zyx")
    for i in range(1, HUMANOID.njnt):  # after the free one
        name = HUMANOID.joint(i).name
        degrees = posture.get(name, posture.get(name.partition("_")[2], 0))
        mirrored = name.startswith("right_shoulder")  # turns in the opposite sense
        data.joint(i).qpos = np.radians(-degrees if mirrored else degrees)
    data.qpos[2] = 3
    mujoco.mj_kinematics(HUMANOID, data)
    body = [geom for geom in range(HUMANOID.ngeom) if geom != floor]
    gaps = [mujoco.mj_geomDistance(HUMANOID, data, floor, geom, 10, None) for geom in body]
    data.qpos[2] -= min(gaps)
    return data.qpos.copy()


def draw_postures(args, size):
    """A folder for --frames: a PNG per posture, drawn as in training, and which tasks' goal states
    they are."""
    folder = Path(args.out) / "glance_{}x{}".format(*size)
    qpos = np.stack([state_of(posture) for posture in POSTURES.values()])
    with closing(painter_of(args, size)) as painter:
        frames = painter(qpos)[:, 0]
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in zip(POSTURES, frames):
        iio.imwrite(folder / f"{name}.png", frame)
    files, labels = (f"{name}.png" for name in POSTURES), goal_states(qpos)
    rows = zip(files, *(labels[task].astype(int) for task in TASKS))
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", *TASKS], *rows])
    return folder


def judge(prompts, names, rewards, own):
    """What to say of rewards (P, N) of frames with these names, if those in `own` (P, N) bool are
    each prompt's own pose: a line per prompt for the table, and the verdict."""
    best_own, best_other = (np.where(which, rewards, -np.inf) for which in (own, ~own))
    margins = best_own.max(1) - best_other.max(1)
    best_own, best_other = best_own.argmax(1), best_other.argmax(1)
    asked = own.any(1) & ~own.all(1)
    check(asked.any(), "no prompt has both a pose of its own and another among the frames")
    lines = []
    for i, prompt in enumerate(prompts):
        pairs = [(names[j], f"{rewards[i, j]:.3f}") for j in (best_own[i], best_other[i])]
        pairs[0] = pairs[0] if own[i].any() else ("-", "-")
        lines.append([prompt, *pairs[0], *pairs[1], f"{margins[i]:+.3f}" if asked[i] else "-"])
    least = np.where(asked, margins, np.inf).argmin()
    verdict = (
        f"of {asked.sum()} prompts, {(margins[asked] > 0).sum()} score their own pose highest; "
        f"the least margin, of '{names[best_own[least]]}' over '{names[best_other[least]]}', "
        f"is {margins[least]:.3f}"
    )
    for i in np.flatnonzero(~own.any(1)):
        verdict += f"; '{prompts[i]}' scores '{names[best_other[i]]}' highest"
    share = chance(rewards[asked], own[asked])
    if share > 0.01 and asked.sum() >= 5:  # fewer have too few exchanges to tell
        verdict += f"; exchanged at random, they fit as well in {share:.0%} of all cases: "
        verdict += "it understands nothing"
    return lines, verdict


def chance(rewards, own):
    """How often prompts exchanged at random fit the frames as well as they do, by the sum of the
    correlations that EPIC distances are made of."""
    rewards, own = (
        F.normalize(values - values.mean(1, keepdim=True))
        for values in (torch.as_tensor(rewards).double(), torch.as_tensor(own).double())
    )
    fit = (rewards @ own.T).numpy()  # (P, P)
    identity = np.arange(len(fit))
    exchanged = np.random.default_rng(0).permuted(np.tile(identity, (10_000, 1)), axis=1)
    return (fit[identity, exchanged].sum(1) > np.trace(fit) - 1e-6).mean()


def plot_glance(results, frames, path):
    """The frames, and below them a block per VLM with its rewards, the darker the higher in a row.
    A prompt's own pose has a frame, the best one a star. Everything is measured in inches."""
    names, left, y = results[0]["frames"], 3.2, 0.5
    wide = 11 * (len(names) + 3)  # characters
    blocks = [textwrap.wrap(f"{r['name']}: {r['verdict']}.", wide) for r in results]
    rows = sum(len(result["rewards"]) for result in results)
    height = y + 1 + 0.36 * rows + sum(0.2 * len(block) + 0.25 for block in blocks)
    figure = Figure(figsize=(left + len(names) + 0.1, height + 0.1))
    ax = figure.add_axes((0, 0, 1, 1))
    legend = "the reward of each frame\nframed: the prompt's own pose\n★: what it scores highest"
    ax.text(-0.1, y + 0.5, legend, ha="right", va="center", fontsize=9, color="0.4")
    for x, (name, frame) in enumerate(zip(names, frames)):
        style = {"ha": "center", "va": "bottom", "fontsize": 9}
        ax.text(x + 0.5, y - 0.04, textwrap.fill(name, 14), **style)
        ax.imshow(frame, extent=(x + 0.01, x + 0.99, y + 1, y))
    y += 1
    for result, block in zip(results, blocks):
        ax.text(0.1 - left, y + 0.15, "\n".join(block), va="top", fontsize=10, weight="bold")
        y += 0.2 * len(block) + 0.25
        for prompt, rewards in result["rewards"].items():
            ax.text(-0.1, y + 0.18, textwrap.fill(prompt, 46), ha="right", va="center", fontsize=9)
            extent, low, high = (0, len(names), y + 0.36, y), min(rewards), max(rewards)
            shades = {"cmap": "Greens", "vmin": low, "vmax": low + 1.6 * (high - low)}
            ax.imshow([rewards], extent=extent, **shades)
            for x, (name, reward) in enumerate(zip(names, rewards)):
                best, own = reward == high, name in result["own"][prompt]
                style = {"ha": "center", "va": "center", "weight": "bold" if best else "normal"}
                ax.text(x + 0.5, y + 0.18, f"{reward:.3f}{' ★' * best}", fontsize=9, **style)
                if own:
                    ax.add_patch(Rectangle((x + 0.03, y + 0.03), 0.94, 0.3, fill=False, lw=1.5))
            y += 0.36
    ax.set(xlim=(-left, len(names) + 0.1), ylim=(height + 0.1, 0))
    ax.set_axis_off()
    figure.savefig(path, dpi=110)


def glance(args):
    """Every prompt against every posture, for one VLM after the other."""
    out, results, text = Path(args.out), [], ""
    given = args.frames and load_pictures(Path(args.frames))
    goal_of = {TASKS.get(task, task): task for task in (given[1] if given else TASKS)}
    prompts = tuple(dict.fromkeys([*goal_of, *args.prompt]))
    options = args.device, args.clip_precision, args.reward_batch_size
    for model, name in name_models(args.clip_model).items():
        print(f"\n{model}")
        scorer = Scorer(model, prompts, *options)
        size = (args.image_size,) * 2 if args.image_size else scorer.image_size
        frames, labels, names = given or load_pictures(draw_postures(args, size))
        embeddings = embed_frames(scorer, frames, cache_file(args, name, fingerprint(frames)))
        rewards = np.stack([scorer.rewards(embeddings, [p], [p], 0.0) for p in prompts])  # (P, N)
        check(np.isfinite(rewards).all(), f"--clip-model {model}: a reward is not finite")
        own = np.stack([labels.get(goal_of.get(p), np.zeros(len(names), bool)) for p in prompts])
        lines, verdict = judge(prompts, names, rewards, own)
        header = ["prompt", "own pose", "reward", "best other", "reward", "margin"]
        text += f"**{name}**\n\n{table(header, lines)}\n{name}: {verdict}.\n\n"
        print(f"\n{table(header, lines)}\n{name}: {verdict}.")
        result = {"name": name, "clip_model": model, "verdict": verdict, "frames": names}
        result["rewards"] = dict(zip(prompts, rewards.tolist()))
        result["own"] = {p: [n for n, o in zip(names, row) if o] for p, row in zip(prompts, own)}
        results.append(result)
        (out / "glance.md").write_text(text, encoding="utf-8")
        numbers = {"args": asdict(args), "vlms": results}
        (out / "glance.json").write_text(json.dumps(numbers, indent=2) + "\n")
        picture(plot_glance, results, frames, out / "glance.png")
    print(f"wrote glance.png, glance.md and glance.json to {out}")
    return results


# MAIN
def parse_args(argv):
    args = tyro.cli(Args, args=argv)
    args.clip_model = tuple(dict.fromkeys(args.clip_model)) or ("local-dir:tiny_clip",)
    args.baseline_prompt = args.baseline_prompt or ("a humanoid robot",)
    args.clip_alpha = tuple(sorted(set(args.clip_alpha)))
    check(args.clip_alpha, "--clip-alpha is empty")
    for alpha in (*args.clip_alpha, args.histogram_alpha):
        check(0 <= alpha <= 1, f"alpha {alpha} is not between 0 and 1")
    prompts = args.prompt + args.baseline_prompt + args.compare_prompt
    check(all(prompt.strip() for prompt in prompts), "a prompt is empty")
    pictures = not args.frames or Path(args.frames).is_dir()
    wanted = "with --glance it must be a folder of PNGs and a labels.csv"
    check(not args.glance or pictures, f"--frames {args.frames}: {wanted}")
    elsewhere = args.glance and (args.task or args.compare_prompt or args.run)
    check(not elsewhere, "--glance asks for all tasks: no --task, --compare-prompt or --run")
    either = "give either --frames, which has its states already, or --run"
    check(not (args.frames and args.run), either)
    enough = args.generated == 0 or args.generated >= 20
    check(enough, "--generated must be at least 20, or 0 for none")
    check(args.generated or args.run or args.frames, "--generated 0 leaves no frames; add --run")
    positive = min(args.visited, args.reward_batch_size) > 0
    check(positive, "--visited and --reward-batch-size must be at least 1")
    check(args.image_size >= 0, "--image-size must be positive, or 0 for the size the VLMs take")
    for run in args.run:
        check(any(Path(run).glob("replay_*.pt")), f"--run {run}: there are no replay_*.pt in it")
    names = {Path(run).name for run in args.run}
    check(len(names) == len(args.run), "two --run have the same name")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["cpu"] = True
    if args.device == "auto":
        args.device = next(name for name in there if there[name])
    check(there[args.device], f"--device {args.device}: PyTorch sees no such GPU here")
    check(args.device != "cpu" or args.clip_precision == "fp32", "--clip-precision needs a GPU")
    return args


def choose_rows(args, labels):
    """What is scored, {name: (task, goal prompts)}: a task per row, or a wording per row with
    --compare-prompt."""
    prompted = [TASK_OF[prompt] for prompt in args.prompt if prompt in TASK_OF][:1]
    tasks = args.task or prompted or tuple(labels)
    for task in tasks:
        check(task in labels, f"--task {task}: the frames are labelled for {', '.join(labels)}")
    one_task = len(tasks) == 1 or not (args.prompt or args.compare_prompt)
    which = "which says what the goal states are"
    check(one_task, f"--prompt and --compare-prompt need one --task, {which}")
    rows = {task: (task, args.prompt or (TASKS.get(task, task),)) for task in tasks}
    if args.compare_prompt:
        [(task, prompts)] = rows.values()
        rows = {" + ".join(prompts): (task, prompts)}
        rows |= {prompt: (task, (prompt,)) for prompt in args.compare_prompt}
    return rows


def name_models(models):
    """Names for tables and pictures: of a folder its last part, of the others all that tells them
    apart."""
    names = [model.removeprefix("hf-hub:") for model in models]
    for i, model in enumerate(models):
        if model.startswith("local-dir:"):
            names[i] = Path(model.removeprefix("local-dir:")).resolve().name
    return {model: name if names.count(name) == 1 else model for model, name in zip(models, names)}


def for_files(name):
    return re.sub(r"[^A-Za-z0-9.]+", "_", name)


def score_all(args, rows, frames, labels, source, about):
    """Score one VLM after the other; the report is written anew after each, so that a crash costs
    one at most."""
    out, results = Path(args.out), []
    goal_counts = {name: str(int(labels[task].sum())) for name, (task, _) in rows.items()}
    goals = [prompt for _, prompts in rows.values() for prompt in prompts]
    prompts = tuple(dict.fromkeys([*goals, *args.baseline_prompt]))
    options = args.device, args.clip_precision, args.reward_batch_size
    frames_key = fingerprint(frames)
    for model, name in name_models(args.clip_model).items():
        print(f"\n{model}")
        scorer = Scorer(model, prompts, *options)
        embeddings = embed_frames(scorer, frames, cache_file(args, name, frames_key))
        epic, reasons = distances(scorer, embeddings, rows, labels, args)
        result = {"name": name, "clip_model": model, "parameters": scorer.parameter_count}
        result["image_parameters"] = scorer.image_parameters
        results.append(result | {"epic": epic, "no_distance": reasons})
        print(f"\n{report(results[-1], goal_counts)}")
        tables = "\n".join(report(result, goal_counts) for result in results)
        (out / "epic.md").write_text(f"{about}\n{tables}", encoding="utf-8")
        numbers = {"frames": about.strip(), "goal_states": goal_counts, "vlms": results}
        numbers["args"] = asdict(args)
        (out / "epic.json").write_text(json.dumps(numbers, indent=2) + "\n")
        picture(plot_alpha, results, args, out / "epic_alpha.png")
        picture(plot_size, results, args, out / "epic_size.png")
        histograms = args, name, out / f"histogram_{for_files(name)}.png"
        picture(plot_histograms, scorer, embeddings, rows, labels, *histograms)
        pictures = args.frames and Path(args.frames).is_dir()  # of nobody knows when
        for run in set() if pictures else set(source) - {"generated"}:
            mine = source == run
            of_run = {task: label[mine] for task, label in labels.items()}
            about_run = args, name, run, out / f"course_{for_files(run)}_{for_files(name)}.png"
            picture(plot_course, scorer, embeddings[mine], rows, of_run, *about_run)
    return results


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    path = args.frames
    try:
        if args.glance:
            return glance(args)
        if not path:
            choose_rows(args, TASKS)  # a wrong name should not cost minutes
            size = (args.image_size,) * 2  # (H, W)
            if not args.image_size:
                size = max(Scorer(vlm, args.baseline_prompt).image_size for vlm in args.clip_model)
            path = frames_file(args, size)
            if not path.is_file():
                make_frames(args, size, path)
        frames, labels, source = load_frames(path)
        counts = zip(*np.unique(source, return_counts=True))
        about = (
            f"{len(frames)} frames ({', '.join(f'{n} {name}' for name, n in counts)}) in {path}. "
        )
        about += "EPIC distance: 0 perfect, 0.707 unrelated, 1 inverted.\n"
        print(about, end="")
        results = score_all(args, choose_rows(args, labels), frames, labels, source, about)
    except OSError as error:
        sys.exit(f"error: --out {args.out}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on with the embeddings made so far")
    print(f"wrote epic.md, epic.json, epic_alpha.png, epic_size.png, histogram_*.png to {args.out}")
    return results


if __name__ == "__main__":
    sys.stdout, sys.stderr = Patient(sys.stdout), Patient(sys.stderr)
    main()
