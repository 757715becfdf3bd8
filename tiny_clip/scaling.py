"""The paper's Fig. 4 in miniature: is a CLIP that took more compute to train a better reward?

    python tiny_clip/scaling.py              # hours, not timed as a whole; once more: goes on
    python tiny_clip/scaling.py --report     # only the table and the picture, of what is there

Tiny CLIPs of train.py, frames, passes and width growing together, two training seeds each, then
the shipped one; their EPIC distances on the same 4000 frames; and policies trained on each, two
poses, the policy of seed n with the CLIP of seed n. All of them have seen this simulator: this says
how the amount of training matters, nothing of models that were trained on other pictures.

Left in runs/scaling: the models and epic.json; in runs/: the policies, scaling-*; docs/scaling.png
and, on the terminal, the table of docs/results.md. What is there is not made again: after a change
to a recipe, delete runs/scaling*.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = str(ROOT), str(ROOT / "tiny_clip")
import torch  # before OpenGL: the other order segfaults

import numpy as np
import open_clip
import train
import tyro
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from sac_vlmrm import TASKS, check

# width of the image tower, and how often it was shown how many frames: [(frames, passes), ...]
SIZES = {
    "clip1": (4, [(1000, 1)]),
    "clip2": (6, [(2000, 3)]),
    "clip3": (10, [(5000, 5)]),
    "clip4": (16, [(12_000, 7)]),
    "shipped": (16, [(70_000, 9), *[(55_000, 3.5)] * 4, (33_000, 3)]),  # the card says how
}
STEPS = {"kneeling": 40_000, "arms-raised": 50_000}
SEEDS = 1, 2
HISTOGRAM = Path("runs/scaling/histogram_tiny_clip.png")


@dataclass
class Args:
    report: bool = False  # train nothing
    jobs: int = 2  # side by side, a thread each


def folder(size, seed):
    return Path("tiny_clip" if size == "shipped" else f"runs/scaling/{size}_s{seed}")


def run_dir(size, task, seed):
    return Path(f"runs/scaling-{size}-{task}-{seed}")


def work(made, *command):
    """Run a script, unless the file `made` that it leaves at its end is there."""
    if not made.is_file():
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *map(str, command)], env=environment, check=True)
        check(made.is_file(), f"stopped before {made} was there; the same command goes on")


def multiply_adds(size):
    """Of training: forward and backward through both towers, a batch as train.py makes them."""
    width, parts = SIZES[size]
    args = train.Args(width=width)
    with torch.device("meta"):
        model = open_clip.CLIP(**train.model_config(args)["model_cfg"])
        images = torch.empty(args.batch_size, 3, args.image_size, args.image_size)
        captions = torch.zeros(len(train.CONCEPTS), 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        features = model.encode_image(images) @ model.encode_text(captions).T
        features.sum().backward()
    samples = sum(frames * passes for frames, passes in parts)
    return counter.get_total_flops() / 2 * samples / args.batch_size


def train_all(jobs):
    clips, policies = [], []
    for size, (width, [(frames, passes), *_]) in SIZES.items():
        for seed in SEEDS:
            out = folder(size, seed)
            if size != "shipped":
                flags = f"--seed {seed} --data-seed {seed} --frames {frames} --passes {passes} "
                flags += f"--width {width} --classic-frames 0 --out {out}"
                clips.append([out / "report.json", "tiny_clip/train.py", *flags.split()])
            for task, steps in STEPS.items():
                run = run_dir(size, task, seed)
                flags = ["--prompt", TASKS[task], "--clip-model", f"local-dir:{out}"]
                flags += ["--total-timesteps", steps, "--seed", seed, "--run-name", run.name]
                flags = ["--resume", run] if any(run.glob("checkpoint_*.pt")) else flags
                policies.append([run / "eval.json", "sac_vlmrm.py", *flags])
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda job: work(*job), clips))
        models = dict.fromkeys(folder(size, seed) for size in SIZES for seed in SEEDS)
        flags = [word for model in models for word in ("--clip-model", f"local-dir:{model}")]
        # of the last one, which epic_vlmrm.py makes at its end
        work(HISTOGRAM, "epic_vlmrm.py", "--out", HISTOGRAM.parent, *flags)
        list(pool.map(lambda job: work(*job), policies))


def results():
    """The alphas, and {size: {"compute", "epic": (CLIPs, alphas), task: {seed: (success, share)}}}
    of what is there."""
    path = Path("runs/scaling/epic.json")
    check(path.is_file(), f"no {path} yet: first all CLIPs are trained and measured")
    vlms = json.loads(path.read_text())["vlms"]
    alphas, found = [float(alpha) for alpha in vlms[0]["epic"]["mean"]], {}
    for size in SIZES:
        names = [folder(size, seed).name for seed in SEEDS]
        epic = [list(vlm["epic"]["mean"].values()) for vlm in vlms if vlm["name"] in names]
        if not epic:  # epic_vlmrm.py was stopped before it
            continue
        found[size] = {"compute": multiply_adds(size), "epic": np.array(epic, dtype=float)}
        for task in STEPS:
            evals = {seed: run_dir(size, task, seed) / "eval.json" for seed in SEEDS}
            found[size][task] = {}
            for seed, path in evals.items():
                if path.is_file():
                    row = json.loads(path.read_text())["mean action"]
                    found[size][task][seed] = row["success_rate"], row["share_in_goal"]
    return alphas, found


def print_table(alphas, found):
    columns = ["CLIP", "width", "frames x passes", "multiply-adds", "EPIC, alpha 0"]
    columns += ["at the best alpha", *STEPS]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for size, row in found.items():
        width, parts = SIZES[size]
        best = [f"{epic.min():.3f} ({alphas[epic.argmin()]:g})" for epic in row["epic"]]
        seen = ", ".join(f"{frames:,} x {passes:g}" for frames, passes in parts)
        cells = [size, width, seen, f"{row['compute']:.1e}"]
        cells += [" / ".join(f"{epic[0]:.3f}" for epic in row["epic"]), " / ".join(best)]
        for task in STEPS:
            both = [row[task].get(seed) for seed in SEEDS]
            cells.append(" / ".join(f"{b[0]:.0%} ({b[1]:.0%})" if b else "-" for b in both))
        print(f"| {' | '.join(map(str, cells))} |")


def plot(alphas, found, path):
    figure = Figure(figsize=(7, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    compute = [row["compute"] for row in found.values()]
    best = [row["epic"].min(1) for row in found.values()]
    plain = [row["epic"][:, alphas.index(0)] for row in found.values()]
    curves = [(above, "mean of eight tasks, alpha 0", plain, "-o", "tab:blue")]
    curves += [(above, "at each model's best alpha", best, ":s", "tab:orange")]
    for task, style, color in zip(STEPS, ("-o", "-s"), ("tab:green", "tab:purple")):
        values = [np.array([100 * s for s, _ in row[task].values()]) for row in found.values()]
        if any(map(len, values)):
            curves.append((below, f"{task}, {STEPS[task]:,} steps", values, style, color))
    for ax, label, values, style, color in curves:
        there = [(x, v) for x, v in zip(compute, values) if len(v)]
        ax.plot(
            [x for x, _ in there], [v.mean() for _, v in there], style, color=color, label=label
        )
        for x, seeds in there:
            ax.plot([x] * len(seeds), seeds, style[-1], color=color, alpha=0.4, markersize=4)
    above.axhline(0.5**0.5, color="0.6", linestyle="--", label="a reward that knows nothing")
    for x, size in zip(compute, found):
        above.annotate(size, (x, 0.5**0.5), (0, 4), textcoords="offset points", ha="center")
    above.set(xscale="log", ylabel="EPIC distance")
    below.set(ylabel="success of the policy (%)", ylim=(-4, 104))
    below.set_xlabel("compute of the CLIP's training (multiply-adds)")
    for ax in (above, below):
        ax.margins(0.08, 0.12)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    args = tyro.cli(Args)
    os.chdir(ROOT)
    if not args.report:
        train_all(args.jobs)
    alphas, found = results()
    print_table(alphas, found)
    plot(alphas, found, "docs/scaling.png")


if __name__ == "__main__":
    main()
