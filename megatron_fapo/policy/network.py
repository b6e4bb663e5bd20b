"""Which network interface the ranks talk over."""

import socket

import psutil

from megatron_fapo.errors import PolicyError


def interface_towards(address: str) -> str:
    """The network interface through which this machine reaches `address`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # nothing is sent
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            return name
    raise PolicyError(f"no network interface of this machine has {own}, its address towards {address}")
