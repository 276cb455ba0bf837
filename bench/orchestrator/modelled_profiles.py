"""Latency profiles derived from a roofline, not measured: 1.3B and 14B causal Wan on H100, H200 and B300.

    python -m bench.orchestrator.modelled_profiles turboserve/sim/profiles

Per chunk of 12 frames at 480x832 and 16 fps, 12-frame window, four denoise passes and a context pass: 142 TFLOP (1.3B)
or 928 TFLOP (14B), at 60 % of the dense bf16 peak (compiled), plus 3 ms a pass for launching and 10 ms a session for
the light decoder. Weights are not amortised by batching (the work is 16 to 23 times above the ridge), so a batch of n
is the launches plus n times the rest. The 14B model needs four H100 or H200 for one stream in real time; sequence
parallelism is taken at 80 %. Transfers: 48 GB/s to the host per GPU, 120 GB/s within a node, 30 GB/s across nodes.
Price is in GPU-hours, for want of a list that holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DEVICES = {"h100": (989.0, 80.0), "h200": (989.0, 141.0), "b300": (2300.0, 288.0)}  # dense bf16 TFLOP/s, GB
MODELS = {"1.3b": (142.0, 2.8, 3.62), "14b": (928.0, 28.0, 15.83)}  # TFLOP a chunk, weights GB, session state GB
GPUS = {("14b", "h100"): 4, ("14b", "h200"): 4}  # per worker; 1 elsewhere
PEAK_SHARE, PARALLEL_SHARE = 0.6, 0.8
PASSES, DENOISE_PASSES = 5, 4
LAUNCH_S, DECODE_S = 0.003, 0.010
WORKSPACE_GB = 8.3  # per GPU; the text encoder lives elsewhere
HOST_GB_S, NODE_GB_S, NETWORK_GB_S = 48.0, 120.0, 30.0
CHUNK_S = 0.75


def profile(model: str, device: str) -> dict[str, Any]:
    """One profile in the format of sim/profiles."""
    tflop, weights_gb, state_gb = MODELS[model]
    peak, memory_gb = DEVICES[device]
    gpus = GPUS.get((model, device), 1)
    speed = peak * PEAK_SHARE * gpus * (PARALLEL_SHARE if gpus > 1 else 1.0)
    dit_s = tflop / speed
    table = [round(PASSES * LAUNCH_S + n * (dit_s + DECODE_S), 4) for n in range(1, 17)]
    resident = int((memory_gb * gpus - weights_gb - WORKSPACE_GB * gpus) / state_gb)
    share = DENOISE_PASSES * (LAUNCH_S + dit_s / PASSES) / table[0]
    return {
        "name": f"{model}-{device}" + (f"x{gpus}" if gpus > 1 else ""),
        "about": (
            f"MODELLED from a roofline, not measured: {tflop:g} TFLOP a chunk at {PEAK_SHARE:.0%} of {peak * gpus:g} "
            f"TFLOP/s"
            + (f" ({gpus} GPUs, {PARALLEL_SHARE:.0%} parallel)" if gpus > 1 else "")
            + f", {LAUNCH_S * 1000:g} "
            f"ms a pass, {DECODE_S * 1000:g} ms decode. Derivation: bench/orchestrator/modelled_profiles.py."
        ),
        "chunk_s": CHUNK_S,
        "chunk_target_s": CHUNK_S,
        "batch_latency_s": table,
        "capacity": max(1, sum(t <= CHUNK_S for t in table)),
        "resident_max": resident,
        "denoise_steps": DENOISE_PASSES,
        "denoise_steps_floor": 2,
        "step_latency_share": round(share, 3),
        "state_bytes": int(state_gb * 1e9),
        "offload_s": round(state_gb / (HOST_GB_S * gpus), 4),
        "resume_s": round(state_gb / (HOST_GB_S * gpus), 4),
        "migrate_s": round(state_gb / (NODE_GB_S * gpus), 4),
        "provision_s": 30.0,
        "release_s": 0.0,
        "provision_unit_workers": 1,
        "gpu_count": gpus,
        "migrate_cross_node_s": round(state_gb / (NETWORK_GB_S * gpus), 4),
        "price_per_worker_hour": float(gpus),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    for model in MODELS:
        for device in DEVICES:
            made = profile(model, device)
            (folder / f"{made['name']}.json").write_text(json.dumps(made, indent=1) + "\n")
            print(made["name"], "capacity", made["capacity"], "alone", made["batch_latency_s"][0], "s")


if __name__ == "__main__":
    main()
