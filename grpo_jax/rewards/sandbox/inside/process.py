"""Give up privileges, resources and descriptors, before anything of others runs."""

import os
import resource
import socket
from collections.abc import Mapping


def connect(descriptor: int, user: int) -> socket.socket:
    """Become an unprivileged user for good, who has one connection and nothing else that is open.

    Args:
        descriptor: of the connection.
        user: the user to become, or -1 to stay the same one.
    """
    if user >= 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, 1024)
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)


def limit_resources(limits: Mapping[str, int]) -> None:
    """Set the limits of this process and its children, by the names of `resource`."""
    for name, value in limits.items():
        kind = getattr(resource, f'RLIMIT_{name}')
        _, hard = resource.getrlimit(kind)
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (least, least))
