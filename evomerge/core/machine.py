"""An id of this machine, for files on disks shared by several machines."""

import socket
from pathlib import Path


def machine_id() -> str:
    """The kernel's boot id: containers on one machine share it, as they share `flock`; a reboot changes it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
