#!/usr/bin/env bash
# What there is to measure on a machine with one GPU, in 13 minutes at most: bash tests/gpu.sh
# As a whole untested: on an H200 (11e73a2) such trainings, a resume and the first rounds of one-gpu
# ran beside others. A failed step does not stop the next; all is kept in runs/gpu.log.
set -o pipefail
cd "$(dirname "$0")/.." && mkdir -p runs
exec > >(tee runs/gpu.log) 2>&1
export TQDM_MININTERVAL=20

step() { # title, seconds at most, command
    echo; echo "== $1 ($SECONDS s since the start)"
    # the trap: bash waits for a run that time has stopped, until it has saved
    timeout "$2" bash -c "trap : TERM; $3" || echo "== FAILED or out of time: rc $?"
}
if ! python -c "import torch, sac_vlmrm; assert torch.cuda.is_available()"; then
    echo "error: no GPU that PyTorch sees, or requirements.txt is not installed"; exit 1
fi
step "what is there" 60 'nvidia-smi; nproc; python -c "
import torch, mujoco
print(torch.cuda.get_device_name(), torch.__version__, mujoco.__version__)"'
step "frames of 96 px per second, drawn by 1, 2, 4 and 8 threads" 60 'python -c "
import sac_vlmrm, time, numpy as np
from concurrent.futures import ThreadPoolExecutor
qpos = np.tile(sac_vlmrm.HUMANOID.qpos0, (400, 1))
painters = [sac_vlmrm.Painter((96, 96), \"modified\", (\"front\",)) for _ in range(8)]
for n in (1, 1, 2, 4, 8):
    start = time.time()
    list(ThreadPoolExecutor(n).map(lambda painter: painter(qpos), painters[:n]))
    print(n, \"threads\", round(n * len(qpos) / (time.time() - start)), painters[0].name)"'
step "the default command, cut to 48,000 steps" 160 \
    'time python sac_vlmrm.py --prompt "a humanoid robot kneeling" --device cuda \
        --total-timesteps 48000 --run-name gpu --eval-episodes 40'
step "resumed up to 57,600" 60 \
    'time python sac_vlmrm.py --resume runs/gpu --total-timesteps 57600 --eval-episodes 8'
step "the benchmark, as far as it comes (needs stable-baselines3)" 300 'time python tests/benchmark.py'
step "three rounds of one-gpu with random weights of ViT-bigG-14" 150 '
    (cd tests && python -c "import models; models.hollow_weights(\"ViT-bigG-14\", \"/tmp/bigG.pt\")")
    time python sac_vlmrm.py one-gpu --clip-model ViT-bigG-14//tmp/bigG.pt --run-name bigG \
        --prompt "a humanoid robot kneeling" --total-timesteps 14400 --learning-starts 4800 \
        --select-episodes 1 --eval-episodes 1'
