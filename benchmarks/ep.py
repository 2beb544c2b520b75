"""How fast are dispatch and combine, against NCCL and plain copies between GPUs?

`dualpipe bench ep` under another name, so that `make bench` runs it too; its protocol is described
in dualpipe_ext/bench (timing.py, ep_cases.py, beside_gemm.py, sm_time.py).

    python benchmarks/ep.py [arguments of `dualpipe bench ep`]

Appends rows to benchmarks/results/ep.csv. Without a GPU and without arguments it measures nothing.
"""

from __future__ import annotations

import sys

import torch

from dualpipe_ext.cli.main import main

if __name__ == "__main__":
    if len(sys.argv) == 1 and not torch.cuda.is_available():
        print("dispatch and combine are measured on GPUs only: none here, nothing done")
        sys.exit(0)
    sys.exit(main(["bench", "ep", *sys.argv[1:]]))
