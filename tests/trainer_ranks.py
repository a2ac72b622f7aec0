"""What each of two processes of a Trainer does in tests/test_distributed_trainer.py; a script."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import mirrorflow as mf
from mirrorflow.integrations.huggingface import control_decay
from processes import WORLD
from test_huggingface import OFF, STOP, _StopAt, train, trainer

BATCH = 4
CASES = [("hold", False), ("switch", True)]
LOOPS = {
    "switch": lambda: mf.SwitchOff(0.5, at=OFF),
    "hold": lambda: mf.HoldRatio(1.8, 0.3, gain=0.8, deadband=0.0),
}


def run(folder, world, loop, lora, resume=None, stop=None):
    """Train with the same batches whatever the number of processes; give what has to be alike."""
    made = trainer(
        folder, lora=lora, per_device_train_batch_size=BATCH // world,
        ddp_backend="gloo" if world > 1 else None,
    )  # fmt: skip
    control = control_decay(made, LOOPS[loop](), track_every=3)
    if stop:
        made.add_callback(_StopAt(stop))
    weights = train(made, resume)
    return {
        "weights": weights,
        "a": control.scheduler.accumulated,
        "audit": control.scheduler.audit(),
        "ratios": [measured.mean_ratio for _, measured in control.measurements],
        "decays": [r["weight_decay"] for r in made.state.log_history if "weight_decay" in r],
    }


def both(folder, world, loop, lora):
    """Train without a stop, and with one."""
    whole = run(folder / "whole", world, loop, lora)
    run(folder / "parts", world, loop, lora, stop=STOP)
    resume = str(folder / "parts" / f"checkpoint-{STOP}")
    return whole, run(folder / "parts", world, loop, lora, resume=resume)


def main():
    """Be one of the processes."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[3])
    # As torchrun sets them; the address is not used, as the processes meet in a file below.
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD}
    os.environ |= {name: str(number) for name, number in names.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD,
        timeout=timedelta(minutes=10),
    )  # fmt: skip
    found = {
        (loop, lora): both(folder / f"{loop} {lora}", WORLD, loop, lora) for loop, lora in CASES
    }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
