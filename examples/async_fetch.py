"""Read objects from asynchronous code: concurrent, one download per object, retried, checked, through the same cache.

Reads the pictures that `tutorial.py` uploads, with its `.env` file.
"""

import asyncio
import sys

from asyncds import AsyncdsError, Fetcher, Manifest, ObjectInfo


async def main() -> None:
    listed = await asyncio.to_thread(Manifest.from_prefix, "s3://mnist/test/")
    async with Fetcher.open(concurrency=64) as fetcher:
        total = 0
        async for _, body in fetcher.fetch(listed):  # as they arrive, in no particular order
            total += len(body)
        print(f"{len(listed)} objects, {total:,} bytes")

        wanted = [*listed.rows([0, 1]), ObjectInfo("mnist", "test/0/nothing.png")]
        async for info, result in fetcher.outcomes(wanted):  # a failure takes the place of its object
            print(f"{info.key}: {result if isinstance(result, AsyncdsError) else 'there'}")

        _, body = await fetcher.get(listed[0])
        print(f"{listed[0].key} is a {body[1:4].decode()}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except AsyncdsError as error:
        sys.exit(f"error: {error}")
