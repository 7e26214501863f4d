"""Start Python in a sandbox of bubblewrap: no network, no files but Python's own, no way to stay.

The sandbox has namespaces of its own for users, processes, the network, IPC and host names. It
sees the libraries of the system and the interpreter, read-only, and a small `/tmp` in memory; no
`/proc`, no home, no `/etc`, no environment. What runs in it is an unprivileged user who cannot make
further user namespaces. When its first process ends, or this program, the kernel ends all others.

An ordinary user has such a namespace from bubblewrap. Where this program runs as root, the limit of
processes would not count, because Linux exempts root from it: there the sandbox gets a namespace
with all users, and every process becomes a user that no other sandbox has.
"""

import functools
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence

from grpo_jax.rewards.sandbox.system_calls import system_call_filter

INSTALL = 'apt-get install bubblewrap (0.8 or newer; dnf and pacman have it under the same name)'
TEMPORARY = 64 * 2**20  # bytes of /tmp
_INSIDE = pathlib.Path(__file__).with_name('inside')
_PACKAGE = pathlib.PurePath('grpo_jax', 'rewards', 'sandbox', 'inside')
_NOBODY = '65534'
# Where memory is short, the kernel ends programs before anything else.
_FIRST_TO_END = 'echo 1000 2>/dev/null >/proc/self/oom_score_adj; exec "$@"'
# Makes a user namespace, and forbids further ones in it when the users are there (a container may
# not allow that; the filter of system calls forbids them too).
_NAMESPACE = """
import ctypes, sys
if ctypes.CDLL(None, use_errno=True).unshare(0x10000000):
    sys.exit(1)
print(flush=True)
sys.stdin.readline()
try:
    open('/proc/sys/user/max_user_namespaces', 'w').write('0')
except OSError:
    pass
print(flush=True)
sys.stdin.readline()
"""


class SandboxError(ValueError):
    """Programs cannot be run in a sandbox here; the message says what to install."""


class Sandbox:
    """Starts the scripts of `inside`, in bubblewrap, or without it where `unsafe`.

    Raises:
        SandboxError: bubblewrap is missing.
    """

    def __init__(self, *, unsafe: bool = False):
        self.unsafe = unsafe
        self._users: Sequence[int] = ()
        self._count = itertools.count(os.getpid() * 1024)  # other users in each process of ours
        self._namespace: int | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if not sys.platform.startswith('linux'):
            raise SandboxError('programs of models run on Linux: use a reward of a service instead')
        if unsafe:
            self._folder = tempfile.TemporaryDirectory(prefix='unsafe_programs_')
            link = pathlib.Path(self._folder.name, _PACKAGE)
            link.parent.mkdir(parents=True)
            link.symlink_to(_INSIDE)
            return
        self._bwrap = shutil.which('bwrap')
        if self._bwrap is None:
            raise SandboxError(
                f'programs run in a sandbox of bubblewrap, which is not installed: {INSTALL}, or '
                'set unsafe=True to run them with no more than limits of time and memory, in a '
                'container that may be lost'
            )
        users = _unused_users()
        if os.geteuid() == 0 and users:
            self._namespace = _namespace_of_all_users()
            self._users = users

    def start(
        self, module: str, descriptor: int, *, errors: int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        """Start `main` of a module of `inside`.

        The kernel ends the process together with the thread that calls this.

        Args:
            module: its name.
            descriptor: of the socket that the process talks over; the caller closes its own copy.
            errors: where the standard error goes.
        """
        root = self._folder.name if self._folder else '/sandbox'
        main = f'{".".join(_PACKAGE.parts)}.{module}'
        code = (
            f'import sys; sys.path.insert(0, {root!r}); from {main} import main; del sys.path[0]; '
            f'main({descriptor}, {self._user()})'
        )
        python = [_interpreter(), '-I', '-S', '-B', '-X', 'utf8', '-c', code]
        passed = [descriptor]
        if not self._folder:
            python = [*self._command(passed), '--', *python]
        python = ['/bin/sh', '-c', _FIRST_TO_END, 'sh', *python]
        try:
            return subprocess.Popen(
                python,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=passed,
                env={'PATH': os.defpath},
                cwd=self._folder.name if self._folder else '/',
                start_new_session=True,
            )
        finally:
            for opened in passed[1:]:
                if opened != self._namespace:
                    os.close(opened)

    def _user(self) -> int:
        """Return the user that a process becomes; -1 for none."""
        return self._users[next(self._count) % len(self._users)] if self._users else -1

    def close(self) -> None:
        """Remove what starting processes needs; they go on."""
        if self._folder:
            self._folder.cleanup()
        if self._namespace is not None:
            os.close(self._namespace)
            self._namespace = None

    def _command(self, passed: list[int]) -> list[str]:
        """Return the command of bubblewrap; append the descriptors that it reads to `passed`."""
        command = [self._bwrap or '', *_fixed_options()]
        if self._namespace is None:
            command += ['--unshare-user', '--disable-userns', '--uid', _NOBODY, '--gid', _NOBODY]
        else:
            passed.append(self._namespace)
            command += ['--userns', str(self._namespace)]
            command += ['--cap-add', 'CAP_SETUID', '--cap-add', 'CAP_SETGID']
        if rules := system_call_filter():
            file = os.memfd_create('seccomp', 0)
            os.write(file, rules)
            os.lseek(file, 0, os.SEEK_SET)
            passed.append(file)
            command += ['--seccomp', str(file)]
        return command


@functools.cache
def _fixed_options() -> list[str]:
    """Return the options that are the same for every process."""
    options = ['--unshare-ipc', '--unshare-pid', '--unshare-net', '--unshare-uts']
    options += ['--unshare-cgroup-try', '--die-with-parent', '--new-session', '--clearenv']
    options += ['--hostname', 'sandbox']
    options += ['--cap-drop', 'ALL']
    for folder in ('/usr/lib', '/usr/lib32', '/usr/lib64', '/lib', '/lib32', '/lib64'):
        if os.path.islink(folder):
            options += ['--symlink', os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += _show(pathlib.Path(folder))
    options += _python_options()
    options += _show('/sandbox' / _PACKAGE, _INSIDE)
    options += ['--size', str(TEMPORARY), '--perms', '1777', '--tmpfs', '/tmp']
    options += ['--size', '4096', '--tmpfs', '/dev']
    for device in ('/dev/null', '/dev/zero', '/dev/urandom', '/dev/random'):
        options += ['--dev-bind', device, device]
    return [*options, '--remount-ro', '/dev', '--remount-ro', '/', '--chdir', '/tmp']


def _python_options() -> list[str]:
    """Return the options that show the interpreter and its library, without installed packages."""
    interpreter, library = pathlib.Path(_interpreter()), sysconfig.get_path('stdlib')
    options = _show(interpreter)
    for name in ('lib', 'lib64'):
        place = pathlib.Path(sys.base_prefix, name)
        if place.is_dir() and not place.is_symlink() and place.parent != pathlib.Path('/usr'):
            options += _show(place)
    for name in ('site-packages', 'dist-packages'):
        packages = os.path.join(library, name)
        if os.path.isdir(packages):
            options += ['--size', '4096', '--tmpfs', packages, '--remount-ro', packages]
    return options


def _show(place: pathlib.PurePath, source: pathlib.Path | None = None) -> list[str]:
    """Return the options that show a folder or file, read-only, in folders that all may enter."""
    options: list[str] = []
    for parent in reversed(list(place.parents)[:-1]):
        options += ['--perms', '0755', '--dir', str(parent)]
    return [*options, '--ro-bind', str(source or place), str(place)]


def _interpreter() -> str:
    return os.path.realpath(getattr(sys, '_base_executable', sys.executable))


def _namespace_of_all_users() -> int:
    """Return a descriptor of a user namespace that has this one's users and no more namespaces."""
    with subprocess.Popen(
        [_interpreter(), '-I', '-S', '-c', _NAMESPACE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin
        assert process.stdout
        if not process.stdout.readline():
            raise SandboxError(
                'this container allows no user namespaces, which the sandbox needs: allow them '
                '(sysctl user.max_user_namespaces; docker run --security-opt seccomp=unconfined), '
                'or set unsafe=True in a container that may be lost'
            )
        for kind in ('uid_map', 'gid_map'):
            lines = pathlib.Path('/proc/self', kind).read_text().splitlines()
            ranges = [line.split() for line in lines]
            text = '\n'.join(f'{inside} {inside} {count}' for inside, _, count in ranges)
            pathlib.Path('/proc', str(process.pid), kind).write_text(text)
        process.stdin.write(b'\n')
        process.stdin.flush()
        process.stdout.readline()
        return os.open(f'/proc/{process.pid}/ns/user', os.O_RDONLY)


def _unused_users() -> range:
    """Return users without accounts."""
    lines = pathlib.Path('/proc/self/uid_map').read_text().splitlines()
    start, count = max(
        ((int(start), int(count)) for start, _, count in map(str.split, lines)), key=lambda x: x[1]
    )
    return range(start + count // 2, start + count // 4 * 3)
