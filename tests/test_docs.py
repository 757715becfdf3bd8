"""What is written beside the code: commands that parse, links that lead somewhere, shared text."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

import epic_vlmrm
import ppo_vlmrm_classic
import sac_vlmrm
from tiny_clip import train

ROOT = Path(sac_vlmrm.__file__).parent
FRONT = [*ROOT.glob("*.md"), *ROOT.glob("tiny_clip/*.md")]
PAGES = FRONT + [*ROOT.glob("docs/*.md")]  # whose commands may be those of older commits
SCRIPTS = {
    "sac_vlmrm.py": sac_vlmrm,
    "ppo_vlmrm_classic.py": ppo_vlmrm_classic,
    "epic_vlmrm.py": epic_vlmrm,
    "tiny_clip/train.py": train,
}


def text_of(path):
    return path.read_text(encoding="utf-8")


def commands():
    """Every call of a script in the code blocks of READMEs and in the scripts' docstrings."""
    texts = [(page, re.findall(r"```bash\n(.*?)```", text_of(page), re.S)) for page in FRONT]
    texts += [(ROOT / name, [module.__doc__]) for name, module in SCRIPTS.items()]
    for path, blocks in texts:
        name = path.relative_to(ROOT)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            # of a line with `&&`, `||` or `;` each command
            for call in re.split(r"&&|\|\||;|\bdo\b", line):
                call = re.sub(r"\$\{?\w+\}?", "1", call)  # a loop's variable
                words = shlex.split(call, comments=True) if ".py" in call else []
                script = next((i for i, word in enumerate(words) if word in SCRIPTS), None)
                if script is not None and words[0] in ("python", "torchrun", "uv", *SCRIPTS):
                    yield pytest.param(words[script], words[script + 1 :], id=f"{name}: {call}")


@pytest.mark.parametrize("script, flags", list(commands()))
def test_every_command_that_is_written_down_parses(script, flags):
    presets = getattr(SCRIPTS[script], "PRESETS", {})
    if flags and flags[0] in presets:
        flags = flags[1:]
    if flags != ["--help"]:
        tyro.cli(SCRIPTS[script].Args, args=flags)


def anchors(page):
    """The addresses of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_something(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            other = page.parent / path if path else page
            assert other.exists(), target
            assert not anchor or anchor in anchors(other), target


def definitions(script):
    """Source text of every function and class of a script."""
    text = text_of(ROOT / script)
    kinds = ast.FunctionDef, ast.ClassDef
    nodes = (node for node in ast.parse(text).body if isinstance(node, kinds))
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


def test_what_both_scripts_need_is_the_same_text_in_both():
    own = {"Args", "parse_args", "main", "film", "final_evaluation"}  # alike, but not the same
    sac, ppo = definitions("sac_vlmrm.py"), definitions("ppo_vlmrm_classic.py")
    shared = (sac.keys() & ppo.keys()) - own
    assert {"CLIPReward", "load_clip", "atomic_save", "load_saved", "check", "warn"} <= shared
    for name in shared:
        assert sac[name] == ppo[name], name


def test_the_notebook_runs_and_every_sentence_in_it_pays_its_own_pose_best(tmp_path):
    """Its training is cut to two rounds of learning."""
    notebook = json.loads(text_of(ROOT / "docs" / "method.ipynb"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "rounds, random_rounds, returns = 20, 4, []" in cells[-2]
    cells[-2] = cells[-2].replace("20, 4, []", "4, 2, []")
    cells += ["assert (cosines.argmax(1) == torch.arange(8)).all()"]
    (tmp_path / "cells.py").write_text("\n".join(cells), encoding="utf-8")
    environment = {**os.environ, "MPLBACKEND": "agg"}
    command = [sys.executable, tmp_path / "cells.py"]
    subprocess.run(command, cwd=ROOT / "docs", env=environment, check=True)
