"""Which filesystem a path lies on: SQLite and record locks cannot be relied on across a network."""

import os
import re
from pathlib import Path

__all__ = ["network_filesystem"]

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = re.compile(
    r"(nfs\d*|cifs|smb\w*|lustre|ceph|9p|gpfs|beegfs\w*|glusterfs|afs|orangefs|pvfs2|panfs|wekafs|fuse(\..+)?)$"
)
_LOCAL = {"fuse.fuse-overlayfs", "fuse.overlayfs"}
_OCTAL = re.compile(r"\\([0-7]{3})")


def network_filesystem(path: Path) -> str | None:
    """The type of the filesystem if it is one of a network, or in user space; None if it is local, or not known.

    Reads `/proc/self/mountinfo` (see proc(5)); the path need not exist.
    """
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:
        return None
    real, best, kind = os.path.realpath(path), "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        place = _OCTAL.sub(lambda match: chr(int(match[1], 8)), before.split(" ")[4])
        inside = place == "/" or real == place or real.startswith(place + "/")
        if inside and len(place) >= len(best):  # a later mount on the same place hides the earlier
            best, kind = place, after.partition(" ")[0]
    return kind if _NETWORK.match(kind) and kind not in _LOCAL else None
