"""Use the `aioboto3.Session` that your program has: its keys, its profile, or a role that it has assumed.

asyncds calls `session` in each process that needs a connection, so no key is ever pickled. Reads the pictures that
`tutorial.py` uploads. Needs `pip install "asyncds[vision,aioboto3]"`, and a file `.env` or an environment with
AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
"""

import asyncio
import os
import sys

from dotenv import load_dotenv
from torchvision.transforms import ToTensor

from asyncds import AsyncdsError, CachedS3MapDataset, ImageTransform

try:
    import aioboto3
except ModuleNotFoundError as error:
    sys.exit(f"{error}: pip install 'asyncds[vision,aioboto3]'")

NEEDED = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def session() -> aioboto3.Session:
    keys = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]  # from a vault, perhaps
    return aioboto3.Session(*keys, region_name="us-east-1")


async def size_of(key: str) -> int:
    """What else the program does with its session."""
    async with session().client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]) as client:
        return (await client.head_object(Bucket="mnist", Key=key))["ContentLength"]


def main() -> None:
    options = {"transform": ImageTransform(ToTensor(), mode="L"), "label": "parent", "session_factory": session}
    dataset = CachedS3MapDataset.from_prefix("s3://mnist/test/", endpoint=os.environ["AWS_ENDPOINT_URL"], **options)
    samples = sum(len(labels) for _, labels in dataset.loader(batch_size=100, num_workers=2))
    print(f"{samples} samples, {dataset.stats()['gets']} GETs, through two workers", flush=True)
    key = dataset.manifest[0].key
    print(f"{key} has {asyncio.run(size_of(key))} bytes")


if __name__ == "__main__":
    load_dotenv(".env")
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        sys.exit(f"{', '.join(missing)} not set: write NAME=value into the file .env of this directory")
    try:
        main()
    except AsyncdsError as error:
        sys.exit(f"error: {error}")
