"""Environments for the libraries that are measured beside asyncds and whose pins may clash with its own.

    python tests/benchmarks/environments.py [--folder .venv-peers] [s3torchconnector] [litdata]

Each has the packages of one library, and finds all else, torch above all, in the environment that runs this. One that
cannot be made is named in a line, and again in the tables, in the place of its figures; that is no failure.
"""

import argparse
import contextlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-peers"
PACKAGES = {
    "s3torchconnector": ["s3torchconnector>=1.5"],
    "litdata": ["litdata>=0.2.76", "s3fs", "zstd"],  # the last two are what it lists with
    "s3fs": ["s3fs"],
}


def python_for(name: str, folder: Path) -> str:
    """The interpreter that has a library: that of its environment, or else this one."""
    interpreter = folder / name / "bin" / "python"
    return str(interpreter) if interpreter.exists() else sys.executable


def reason(name: str, folder: Path) -> str | None:
    """Why a library has no environment, if it should have one."""
    if name not in PACKAGES or (folder / name / "made").exists():
        return None
    with contextlib.suppress(OSError):
        return (folder / f"{name}.error").read_text()
    return "it has no environment: make bench-peers"


def make(name: str, folder: Path) -> None:
    """Make an environment, or leave a note why there is none."""
    place, note = folder / name, folder / f"{name}.error"
    note.unlink(missing_ok=True)
    venv.create(place, clear=True, with_pip=True)
    interpreter = python_for(name, folder)
    ask = [interpreter, "-c", "import site; print(site.getsitepackages()[0])"]
    own = Path(subprocess.run(ask, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (own / "shared.pth").write_text("\n".join([*shared, str(ROOT)]))
    pip = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES[name]]
    installed = subprocess.run(pip, stderr=subprocess.PIPE, text=True)
    if installed.returncode == 0:
        (place / "made").touch()
        return
    note.write_text((installed.stderr.strip().splitlines() or ["pip failed"])[-1])
    print(f"{name}: {note.read_text()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("names", nargs="*", choices=[*PACKAGES, []], default=[])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names or PACKAGES:
        if not (options.folder / name / "made").exists():
            make(name, options.folder)


if __name__ == "__main__":
    main()
