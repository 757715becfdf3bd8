"""The moving picture of README: shipped policies side by side, the sentence of each below it.

python docs/poses.py kneeling hands-on-hips lotus splits     # writes docs/poses.webp
"""

import json
import sys
import textwrap
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sac_vlmrm

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

SIZE, CAPTION = 240, 44  # pixels

columns = []
with closing(sac_vlmrm.Painter((SIZE, SIZE), "modified", ("front",))) as painter:
    for task in sys.argv[1:]:
        run = ROOT / "examples" / task
        args = json.loads((run / "args.json").read_text())["args"]
        [prompt] = args["prompt"]
        actor = sac_vlmrm.Actor(args["hidden"], args["normalize"])
        best = sac_vlmrm.load_saved(run / "best.pt", ("actor", "global_step"))
        actor.load_state_dict(best["actor"])
        torch.manual_seed(0)
        obs, *_ = sac_vlmrm.collect(
            sac_vlmrm.VLMHumanoid(1), lambda obs, actor=actor: actor.act(obs, sample=False), 0
        )
        frames = painter(obs[0, 1:, :24])[:, 0]  # (T, H, W, 3)
        caption = Image.new("RGB", (SIZE, CAPTION), "white")
        text = textwrap.fill(f"“{prompt}”", 38)
        ImageDraw.Draw(caption).text(
            (SIZE / 2, CAPTION / 2), text, "black", ImageFont.load_default(12), "mm", align="center"
        )
        below = np.broadcast_to(np.asarray(caption), (len(frames), CAPTION, SIZE, 3))
        columns.append(np.concatenate([frames, below], axis=1))
# every second frame, at half of the real speed; the last one stays for a second
film = np.concatenate(columns, axis=2)[1::2]
film = np.concatenate([film, np.repeat(film[-1:], 16, axis=0)])
path = ROOT / "docs/poses.webp"
iio.imwrite(path, film, duration=60, loop=0, quality=70, method=6)
print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")
