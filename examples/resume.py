"""Go on in the middle of an epoch after the machine was taken away: a checkpoint that holds the sampler's state.

Reads the pictures that `tutorial.py` uploads, with its `.env` file. `--lose-after 20` kills the process after so many
batches, as a provider takes a spot instance back; then start it again, without.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.transforms import ToTensor

from asyncds import AsyncdsError, CachedS3MapDataset, ImageTransform

EVERY = 5  # batches between checkpoints


def save(path: Path, **state: Any) -> None:
    """Whoever kills this process leaves the old file, or the new one."""
    torch.save(state, unfinished := path.with_suffix(".new"))
    os.replace(unfinished, path)


def main(path: Path, epochs: int, lose_after: int | None) -> None:
    transform = ImageTransform(ToTensor(), mode="L")
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=transform, label="parent")
    # A generator of its own: then the epochs after a resumed one have the order of the uninterrupted run, too.
    loader = dataset.loader(batch_size=100, shuffle=True, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    first, done = 1, 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        loader.batch_sampler.load_state_dict(state["sampler"])
        first, done = state["epoch"], state["done"]
        print(f"goes on in epoch {first}, after batch {done} of {len(loader)}", flush=True)
    for epoch in range(first, epochs + 1):
        for images, labels in loader:
            done += 1
            loss = nn.functional.cross_entropy(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if done % EVERY == 0:
                sampler = loader.batch_sampler.state_dict(batches_done=done)
                parts = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "sampler": sampler}
                save(path, **parts, epoch=epoch, done=done)
                print(f"epoch {epoch}, batch {done} of {len(loader)}: loss {loss.item():.6f}, saved", flush=True)
            if lose_after is not None and (epoch - 1) * len(loader) + done == lose_after:
                os.kill(os.getpid(), signal.SIGKILL)
        done = 0
    print(f"weights sum up to {sum(p.sum().item() for p in model.parameters()):.6f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lose-after", type=int, help="be killed after so many batches")
    arguments = parser.parse_args()
    try:
        main(arguments.checkpoint, arguments.epochs, arguments.lose_after)
    except AsyncdsError as error:
        sys.exit(f"error: {error}")
