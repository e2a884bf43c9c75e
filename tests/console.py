"""Runs what docs/examples.md shows: each ```console block, in a folder with a `.env`, against a server with pictures.

    python tests/console.py [WORD]

writes what the commands print here and now into that page, and what the cells of the notebook print into it; with a
word, only where it occurs. Takes `pip install -e '.[test,aioboto3,frameworks]'`; a block whose program lacks something
is left as it is, and named. Where MinIO is found (`make servers`), that is the server.
"""

import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import boto3
import numpy as np
from botocore.config import Config
from PIL import Image

from asyncds.demo import bucket
from asyncds.testing import local_s3
from asyncds.testing.local import Kind

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "examples.md"
NOTEBOOK = ROOT / "examples" / "explore.ipynb"
SHOWN_ENDPOINT = "http://localhost:9000"

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPACES = re.compile(r" {2,}")
_NUMBER = re.compile(r"\d(?:[\d.,]*\d)?")
_CLASSES, _PICTURES, _EDGE = 8, 200, 96


class Server(NamedTuple):
    """Where a server is, and the keys it was started with."""

    endpoint: str
    access_key: str
    secret_key: str


@dataclass(frozen=True)
class Block:
    """Commands, each with the output that the page shows."""

    text: str
    commands: tuple[tuple[str, str], ...]

    @property
    def uploads(self) -> bool:
        """Whether it begins with an empty server."""
        return "tutorial.py" in self.text

    def __str__(self) -> str:
        return self.commands[-1][0].removeprefix("python examples/")


def blocks(page: str) -> list[Block]:
    found = []
    for text in _BLOCK.findall(page):
        parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)[1:]
        found.append(Block(text, tuple(zip(parts[::2], parts[1::2], strict=True))))
    return found


def shape(output: str) -> list[str]:
    """What stays the same from run to run: not numbers, nor how wide they are."""
    return [_SPACES.sub(" ", _NUMBER.sub("0", line)) for line in output.splitlines()]


def environment(server: Server) -> dict[str, str]:
    """The `.env` file of the examples: both families of names, for one server."""
    return {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_REGION": "us-east-1",
        "MINIO_URL": server.endpoint.removeprefix("http://"),
        "MINIO_ACCESS_KEY": server.access_key,
        "MINIO_SECRET_KEY": server.secret_key,
        "MINIO_SECURE": "false",
        "MNIST_BUCKET_NAME": "mnist",
        "IMAGENET_BUCKET_NAME": "imagenet",
    }


def pictures() -> dict[str, bytes]:
    """Noise in as many colours as there are classes, as JPEG files of a bucket that is laid out as ImageNet is."""
    found, random = {}, np.random.default_rng(0)
    colours = random.integers(0, 200, (_CLASSES, 3))
    for number in range(_PICTURES):
        noise = random.integers(0, 56, (_EDGE, _EDGE, 3)) + colours[number % _CLASSES]
        Image.fromarray(noise.astype(np.uint8)).save(file := io.BytesIO(), "JPEG")
        found[f"train/n{number % _CLASSES:08}/{number:04}.JPEG"] = file.getvalue()
    return found


def fill(server: Server) -> None:
    """Put the digits into the bucket `mnist`, and pictures in folders of classes into `imagenet`."""
    bucket.upload(bucket.Login(server.endpoint, (server.access_key, server.secret_key)), bucket.digits())
    keys = {"aws_access_key_id": server.access_key, "aws_secret_access_key": server.secret_key}
    path_style = Config(s3={"addressing_style": "path"})
    client = boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1", config=path_style, **keys)
    client.create_bucket(Bucket="imagenet")
    for key, body in pictures().items():
        client.put_object(Bucket="imagenet", Key=key, Body=body)
    client.close()


@contextmanager
def started(kind: Kind | None = None) -> Iterator[Server]:
    """A real server with nothing in it."""
    with local_s3(kind) as server:
        yield Server(server.endpoint, server.access_key, server.secret_key)


def prepared(folder: Path, server: Server) -> dict[str, str]:
    """Make a reader's folder: `.env`, and the examples below it. Returns the variables of the process."""
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in environment(server).items()))
    (folder / "examples").symlink_to(ROOT / "examples")
    own = {"ASYNCDS_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}  # others need the cores, too
    own |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return os.environ | own


def run(command: str, folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, shell=True, cwd=folder, env=variables, capture_output=True, text=True, errors="replace", timeout=150
    )


def execute(notebook: Path, folder: Path, variables: dict[str, str]) -> str:
    """The notebook with what its cells print, run by a kernel that works in the folder."""
    import nbformat
    from nbclient import NotebookClient

    read = nbformat.read(notebook, as_version=4)
    client = NotebookClient(read, timeout=120, record_timing=False, resources={"metadata": {"path": str(folder)}})
    client.execute(env=variables)
    read.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    written: str = nbformat.writes(read)
    return f"{written.rstrip()}\n"


def printed(notebook: str) -> list[str]:
    """What the cells of a notebook show."""
    outputs = [output for cell in json.loads(notebook)["cells"] for output in cell.get("outputs", ())]
    return ["".join(output.get("text") or output["data"]["text/plain"]) for output in outputs]


def as_shown(output: str, server: Server) -> str:
    return output.replace(server.endpoint, SHOWN_ENDPOINT)


def regenerated(block: Block, server: Server) -> str:
    """The block with what its commands print now."""
    with tempfile.TemporaryDirectory() as place:
        folder, lines = Path(place), []
        variables = prepared(folder, server)
        for command, shown in block.commands:
            done = run(command, folder, variables)
            if done.returncode not in (0, 137):
                print(f"{command}: {done.stderr.splitlines()[-1:]}", file=sys.stderr)
            output = done.stdout if done.returncode in (0, 137) else shown
            lines += [f"$ {command}\n", as_shown(output, server)]
            if done.returncode == 137:
                lines.append("Killed\n")
    return "".join(lines)


def main(word: str = "") -> None:
    page = PAGE.read_text()
    with started() as server:
        fill(server)
        for block in (block for block in blocks(page) if word in block.text):
            print(block, flush=True)
            if block.uploads:
                with started() as empty:
                    page = page.replace(block.text, regenerated(block, empty))
            else:
                page = page.replace(block.text, regenerated(block, server))
        PAGE.write_text(page)
        if word not in NOTEBOOK.name:
            return
        with tempfile.TemporaryDirectory() as place:
            NOTEBOOK.write_text(execute(NOTEBOOK, Path(place), prepared(Path(place), server)))


if __name__ == "__main__":
    main(*sys.argv[1:])
