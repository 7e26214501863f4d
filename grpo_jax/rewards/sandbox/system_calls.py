"""The system calls that programs in the sandbox cannot make: rules for seccomp."""

import functools
import importlib
import logging
import tempfile

log = logging.getLogger(__name__)

# Other processes, namespaces, devices, memory that no limit of a process counts, and large parts of
# the kernel that no tested program needs.
_REFUSED = (
    'acct', 'add_key', 'bpf', 'clock_settime', 'delete_module', 'fanotify_init', 'fsconfig',
    'fsmount', 'fsopen', 'fspick', 'init_module', 'finit_module', 'io_uring_enter',
    'io_uring_register', 'io_uring_setup', 'ioperm', 'iopl', 'kcmp', 'kexec_file_load',
    'kexec_load', 'keyctl', 'lookup_dcookie', 'mbind', 'memfd_create', 'memfd_secret',
    'migrate_pages', 'mount', 'mount_setattr', 'move_mount', 'move_pages', 'msgget',
    'name_to_handle_at', 'nfsservctl', 'open_by_handle_at', 'open_tree', 'perf_event_open',
    'personality', 'pidfd_getfd', 'pivot_root', 'process_madvise', 'process_vm_readv',
    'process_vm_writev', 'ptrace', 'quotactl', 'reboot', 'request_key', 'semget', 'set_mempolicy',
    'setns', 'shmat', 'shmget', 'swapoff', 'swapon', 'syslog', 'umount2', 'unshare', 'userfaultfd',
    'vmsplice',
)  # fmt: skip
_CLONE_NEWUSER = 0x10000000
_AF_UNIX = 1
_EPERM, _ENOSYS = 1, 38


@functools.cache
def system_call_filter() -> bytes:
    """Return the compiled rules; none, with a warning, where libseccomp is not installed."""
    try:
        seccomp = importlib.import_module('pyseccomp')
    except (ImportError, OSError, RuntimeError) as error:  # it loads libseccomp.so.2
        log.warning(
            'the sandbox has no filter of system calls (%s): pip install pyseccomp, and '
            'apt-get install libseccomp2', error,
        )  # fmt: skip
        return b''
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    refused = seccomp.ERRNO(_EPERM)
    for name in _REFUSED:
        try:
            rules.add_rule(refused, name)
        except (OSError, ValueError):  # this architecture has no such call
            log.debug('no system call %s', name)
    namespace = seccomp.Arg(0, seccomp.MASKED_EQ, _CLONE_NEWUSER, _CLONE_NEWUSER)
    rules.add_rule(refused, 'clone', namespace)
    rules.add_rule(seccomp.ERRNO(_ENOSYS), 'clone3')  # the C library goes on with `clone`
    rules.add_rule(refused, 'socket', seccomp.Arg(0, seccomp.NE, _AF_UNIX))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
