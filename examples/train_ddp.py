"""Train with several processes, one for each GPU or, as here, on CPUs: `torchrun --nproc-per-node 2 train_ddp.py`.

One rank lists for all, and ranks that share a cache directory download each object once. Reads the pictures that
`tutorial.py` uploads, with its `.env` file.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler
from torchvision.transforms import ToTensor

from asyncds import AsyncdsError, CachedS3MapDataset, ImageTransform


def main() -> None:
    transform = ImageTransform(ToTensor(), mode="L")
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=transform, label="parent")
    sampler = DistributedSampler(dataset, shuffle=True, seed=1)
    loader = dataset.loader(batch_size=100, sampler=sampler)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for epoch in range(1, 4):
        loader.batch_sampler.set_epoch(epoch)  # another order each time, the same for all ranks
        totals = torch.zeros(2)
        for images, labels in loader:
            scores = model(images)
            totals += torch.tensor([(scores.argmax(1) == labels).sum(), len(labels)])
            optimiser.zero_grad()
            nn.functional.cross_entropy(scores, labels).backward()
            optimiser.step()
        dist.all_reduce(totals)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: {totals[1]:,.0f} samples, {totals[0] / totals[1]:.1%} right", flush=True)
    gets = torch.tensor(dataset.stats()["gets"])
    dist.all_reduce(gets)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks took {gets:,} GETs for {len(dataset):,} pictures", flush=True)


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit("start this with torchrun --nproc-per-node 2, which tells each process its rank")
    dist.init_process_group("gloo")  # "nccl" for GPUs
    try:
        main()
    except AsyncdsError as error:
        sys.exit(f"error: {error}")
    finally:
        dist.destroy_process_group()
