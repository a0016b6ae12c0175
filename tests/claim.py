"""The paper's claim on a laptop: train, evaluate and judge finetuning, GR and GD on the real Fashion-MNIST.

The claim is about means over the paper's three seeds; single seeds scatter by a fifth. Half an hour on two cores;
finished runs and evaluations are not done again.  Run: python tests/claim.py [seed ...]
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"finetune": ["train_gr.py", "--replay", "none"], "gr-2": ["train_gr.py"], "gd-2": ["train_gd.py"]}

frd, old = {name: [] for name in RUNS}, {name: [] for name in RUNS}
for seed in sys.argv[1:] or ["42", "69", "1714"]:
    for name, command in RUNS.items():
        folder = Path("runs/fashion-mnist") / f"{name}-laptop" / f"seed{seed}"
        for arguments in ([*command, "--scale", "laptop", "--seed", seed], ["eval_fid.py", str(folder)]):
            subprocess.run([sys.executable, str(ROOT / arguments[0]), *arguments[1:]], check=True)
        last = max(json.loads((folder / "eval.json").read_text()), key=lambda record: record["task"])
        frd[name].append(last["frd"])
        old[name].append(last["share_old"])

for name in RUNS:
    print(f"{name}: frd {mean(frd[name]):.1f} of {[round(v, 1) for v in frd[name]]}, images of old classes "
          f"{mean(old[name]):.1%} of {[round(v, 3) for v in old[name]]}")
claims = {"frd of GD is under half of GR's": 2 * mean(frd["gd-2"]) < mean(frd["gr-2"]),
          "frd of GD is under half of finetuning's": 2 * mean(frd["gd-2"]) < mean(frd["finetune"]),
          "over 40 % of GD's images are of old classes": mean(old["gd-2"]) > 0.4,
          "under 10 % of finetuning's images are of old classes": mean(old["finetune"]) < 0.1}
for claim, holds in claims.items():
    print("holds:" if holds else "FAILS:", claim)
sys.exit(0 if all(claims.values()) else 1)
