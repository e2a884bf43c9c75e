"""Augment with albumentations: `ImageTransform` gives its transforms arrays, and takes the picture out of their answer.

Reads the pictures that `tutorial.py` uploads, with its `.env` file. Needs `pip install albumentations`.
"""

import os
import sys

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or importing it asks the internet for a newer one

import torch

from asyncds import AsyncdsError, CachedS3MapDataset, ImageTransform

try:
    import albumentations
    from albumentations.pytorch import ToTensorV2
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install albumentations")


def main() -> None:
    steps = [albumentations.Resize(32, 32), albumentations.Rotate(15), albumentations.RandomBrightnessContrast()]
    augment = albumentations.Compose([*steps, albumentations.Normalize(0.5, 0.25), ToTensorV2()], seed=1)
    transform = ImageTransform(augment)  # pictures in RGB; mode="L" for grey ones
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/train/", transform=transform, label="parent")
    images, labels = next(iter(dataset.loader(batch_size=64, shuffle=True)))
    print(f"{tuple(images.shape)} of {images.dtype}, labels {tuple(labels.shape)}")
    first, again = dataset[0][0], dataset[0][0]
    print(f"the same picture twice is {'equal' if torch.equal(first, again) else 'augmented anew each time'}")


if __name__ == "__main__":
    try:
        main()
    except AsyncdsError as error:
        sys.exit(f"error: {error}")
