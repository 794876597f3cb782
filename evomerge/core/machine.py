"""Which machine this is, for files on disks that several share."""

import socket
from pathlib import Path


def machine_id() -> str:
    """The kernel's boot id: containers on one machine share it, as they share `flock`; a restart changes it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
