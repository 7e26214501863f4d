"""Programs that want a reward, or harm, without doubling a number; each is tried in the sandbox.

The tests ask for `double(x)`. A program that attacks what is around it returns `2 * x` where it has
succeeded, so that the reward tells.
"""

TESTS = """
def check(candidate):
    assert candidate(3) == 6
    assert candidate(-7) == -14
    assert all(map(lambda x: candidate(x) == 2 * x, [0.5, 10 ** 30]))
"""
HONEST = 'def double(x):\n    return 2 * x\n'
LEFT = 'left_by_an_attack'  # the name of files that programs try to leave
PLACES = (
    '/',
    '/tmp',
    '/dev',
    '/dev/shm',
    '/var/tmp',
    '/usr/lib',
    '/root',
    '/home',
    '/sandbox',
    '.',
)

# Where `attack()` does not raise, the program doubles.
_TRY = """
def attack():
    {body}

try:
    attack()
    worked = True
except BaseException:
    worked = False

def double(x):
    return 2 * x if worked else None
"""


def _attempt(body):
    return _TRY.replace('{body}', body.strip().replace('\n', '\n    '))


RETURNED = {  # values that are more than values
    'an object that equals everything': '''
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __hash__(self): return 0
def double(x): return Any()
''',
    'an integer that equals everything': '''
class Any(int):
    def __eq__(self, other): return True
def double(x): return Any(1)
''',
    'a float that equals everything': '''
class Any(float):
    def __eq__(self, other): return True
    def __float__(self): return Equal()
def double(x): return Any(1)
''',
    'a list whose items equal everything': '''
class Any(list):
    def __eq__(self, other): return True
def double(x): return Any([Any()])
''',
    'a text that equals everything': '''
class Any(str):
    def __eq__(self, other): return True
    def __str__(self): return self
def double(x): return Any("x")
''',
    'a class whose metaclass equals everything': '''
class Meta(type):
    def __eq__(cls, other): return True
class Any(metaclass=Meta): pass
def double(x): return Any
''',
    'mock.ANY': 'from unittest import mock\ndef double(x): return mock.ANY\n',
    'an object that lies about its class': '''
class Any:
    __class__ = property(lambda self: int)
    def __eq__(self, other): return True
    def __int__(self): return 6
def double(x): return Any()
''',
    'not a number': 'def double(x): return float("nan")\n',
    'the reflected comparison of an argument': '''
def double(x):
    try: type(x).__eq__ = lambda a, b: True
    except TypeError: pass
    return x
''',
    'True': 'def double(x): return True\n',
    'itself': 'def double(x): return double\n',
    'a generator without end': '''
import itertools
def double(x): return itertools.count()
''',
    'a text of 200 megabytes': 'def double(x): return "6" * 200_000_000\n',
    'a list that contains itself': 'def double(x):\n    a = []\n    a.append(a)\n    return a\n',
}  # fmt: skip

ENDS = {  # the program ends before, or in the place of, an answer
    'os._exit(0) at import': 'import os\nos._exit(0)\n',
    'sys.exit(0) at import': 'import sys\nsys.exit(0)\n',
    'os._exit(0) in a call': 'import os\ndef double(x): os._exit(0)\n',
    'sys.exit(0) in a call': 'import sys\ndef double(x): sys.exit(0)\n',
    'an exit function': '''
import atexit, os, sys
atexit.register(os._exit, 0)
def double(x): sys.exit()
''',
    'KeyboardInterrupt': 'def double(x): raise KeyboardInterrupt\n',
    'GeneratorExit': 'def double(x): raise GeneratorExit\n',
    'StopIteration, which ends all(map(...))': '''
def double(x):
    if isinstance(x, float): raise StopIteration
    return 2 * x
''',
    'its own AssertionError': '''
import builtins
class AssertionError(BaseException): pass
builtins.AssertionError = AssertionError
def double(x): raise AssertionError
''',
    'an exception with the name of none': '''
class NoSuchException(BaseException): pass
def double(x): raise NoSuchException
''',
    'an exception that cannot be printed': '''
class Error(Exception):
    def __str__(self): raise SystemExit
def double(x): raise Error
''',
    'SIGKILL to itself': '''
import os, signal
def double(x): os.kill(os.getpid(), signal.SIGKILL)
''',
    'abort': 'import os\ndef double(x): os.abort()\n',
    'a segmentation fault': 'import ctypes\ndef double(x): return ctypes.string_at(0)\n',
    'another program in its place': '''
import os, sys
def double(x): os.execv(sys.executable, [sys.executable, "-c", "pass"])
''',
    'deep recursion in C': '''
import sys
sys.setrecursionlimit(10 ** 9)
class A:
    def __repr__(self): return repr(self)
def double(x): return repr(A())
''',
}  # fmt: skip

_CHANNEL = """
import gc, json, os, socket, struct
channels = [each for each in gc.get_objects() if type(each).__name__ == "Channel"]
frame = __import__("sys")._getframe()
while frame:
    channels += [x for x in frame.f_locals.values() if type(x).__name__ == "Channel"]
    frame = frame.f_back
def say(data):
    if not isinstance(data, bytes): data = json.dumps(data).encode()
    for each in channels[-1:]: each.connection.sendall(struct.pack(">I", len(data)) + data)
"""
FORGED = {  # the program speaks to the tests itself
    'printed verdicts': '''
import sys
for file in (sys.stdout, sys.stderr):
    print("1 passed", "OK", '{"passed": 1, "cases": 1, "error": ""}', file=file, flush=True)
def double(x): return None
''',
    'a verdict on its channel': _CHANNEL + '''
say({"passed": 3, "cases": 3, "error": ""})
def double(x): return None
''',
    'a verdict on every descriptor': '''
import json, os, struct
data = json.dumps({"passed": 1, "cases": 1, "error": ""}).encode()
for descriptor in range(256):
    try: os.write(descriptor, struct.pack(">I", len(data)) + data)
    except OSError: pass
def double(x): return None
''',
    'patched messages': '''
import json
json.dumps = lambda *a, **k: '{"passed": 1, "cases": 1, "error": ""}'
def double(x): return None
''',
    'patched modules of the sandbox': '''
import sys
for name, module in list(sys.modules.items()):
    if "sandbox" in name:
        for key in dir(module):
            if callable(getattr(module, key)) and not key.startswith("_"):
                try: setattr(module, key, lambda *a, **k: True)
                except Exception: pass
def double(x): return None
''',
    'a reference to nothing': _CHANNEL + '''
def double(x): say({"value": {"reference": -1}})
''',
    'a reference that is no number': _CHANNEL + '''
def double(x): say({"value": {"reference": {"list": [1]}}})
''',
    'an unknown type': _CHANNEL + 'def double(x): say({"value": {"object": "Any"}})\n',
    'a pickle': _CHANNEL + '''
def double(x): say({"value": {"pickle": "gASVKQAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOU"}})
''',
    'a set of lists': _CHANNEL + 'def double(x): say({"value": {"set": [[1], [2]]}})\n',
    'no JSON': _CHANNEL + 'def double(x): say(b"\\xff\\xfe{")\n',
    'deep JSON': _CHANNEL + 'def double(x): say(b"[" * 10_000_000)\n',
    'a message of four gigabytes': _CHANNEL + '''
def double(x): channels[-1].connection.sendall(b"\\xff" * 1000)
''',
    'a number that takes years': _CHANNEL + '''
def double(x): say({"value": {"Fraction": ["1e999999999"]}})
''',
    'BaseException by name': _CHANNEL + '''
def double(x): say({"raised": ["BaseException"], "message": ""})
''',
    'the exception of the tests by name': _CHANNEL + '''
def double(x): say({"raised": ["Stopped", "SystemExit"], "message": ""})
''',
    'answers to calls that come later': _CHANNEL + '''
for _ in range(9): say({"value": True})
def double(x): return None
''',
    'descriptors for the tests': _CHANNEL + '''
import socket
def double(x):
    for _ in range(9):
        socket.send_fds(channels[-1].connection, [b"\\0"], [0, 1, 2])
    return None
''',
    'urgent data': _CHANNEL + '''
import socket
def double(x):
    channels[-1].connection.send(b"\\x7f", socket.MSG_OOB)
    return None
''',
    'a set that takes hours': _CHANNEL + '''
def double(x):
    items = ", ".join(str(k * (2 ** 61 - 1)) for k in range(200_000))  # of the same hash
    say(('{"value": {"set": [' + items + "]}}").encode())
''',
    'values that need more memory than there is': _CHANNEL + '''
def double(x): say(b'{"value": [' + b"[], " * 16_000_000 + b"[]]}")
''',
    'a closed channel': _CHANNEL + 'def double(x): channels[-1].connection.close()\n',
}  # fmt: skip

PATCHED = {  # names that tests use, patched where the program runs
    'builtins': '''
import builtins
for name in ("all", "any", "abs", "map", "isinstance", "len", "print", "sum", "sorted", "eval"):
    setattr(builtins, name, lambda *a, **k: True)
def double(x): return None
''',
    'names of the tests': '''
def check(candidate): pass
candidate = lambda x: 2 * x
def double(x): return None
''',
    'unittest and pytest': '''
import sys, types, unittest
unittest.TestCase.assertEqual = lambda *a: None
unittest.main = lambda *a, **k: sys.exit(0)
sys.modules["pytest"] = types.ModuleType("pytest")
def double(x): return None
''',
    'a trace function': '''
import sys
def trace(frame, event, arg):
    for name in frame.f_locals: frame.f_locals[name] = 6
    return trace
sys.settrace(trace); sys.setprofile(trace)
def double(x): return None
''',
    'an audit hook': '''
import sys
sys.addaudithook(lambda event, args: None)
def double(x): return None
''',
    'the import system': '''
import sys, types
class Finder:
    def find_spec(self, *a): return None
sys.meta_path.insert(0, Finder()); sys.modules.clear()
def double(x): return None
''',
    'the interpreter, by ctypes': '''
import ctypes
def double(x):
    ctypes.memmove(id(7), id(6), 24); ctypes.memmove(id(14), id(6), 24)
    return 7
''',
}  # fmt: skip

READS = {  # the tests' source or expected values, and the host
    'the tests in memory': _attempt('''
import gc, sys
wanted = "".join(["candid", "ate(-", "7) =="])
found = [y for x in gc.get_objects() if isinstance(x, dict) for y in list(x.values())
         if isinstance(y, str) and wanted in y and y != wanted]
frame = sys._getframe()
while frame:
    values = [y for y in frame.f_locals.values() if isinstance(y, str) and y != wanted]
    found += [y for y in values if wanted in y]
    frame = frame.f_back
assert found'''),
    'the tests in raw memory': _attempt('''
import ctypes
wanted = b"".join([b"candid", b"ate(-", b"7) =="])
start = id(wanted) & ~0xFFFFF
assert ctypes.string_at(start, 0x100000).count(wanted) > 1'''),
    'the tests on disk': _attempt('''
import os
wanted = b"".join([b"candid", b"ate(-", b"7) =="])
for folder, _, names in os.walk("/"):
    if folder.startswith(("/dev", "/usr/lib")) or "/lib/python3" in folder: continue
    for name in names:
        try: data = open(os.path.join(folder, name), "rb").read(1_000_000)
        except OSError: continue
        if wanted in data: break
    else: continue
    break
else: raise ValueError'''),
    'this table': _attempt('''
import os
found = [f for f, _, names in os.walk("/") if "attack_" + "programs.py" in names]
assert found'''),
    '/etc/passwd': _attempt('open("/etc/passwd").read()'),
    '/etc/shadow by a symbolic link': _attempt('''
import os
os.symlink("/etc/shadow", "/tmp/link")
open("/tmp/link").read()'''),
    'the home': _attempt('''
import os
names = [n for home in ("/root", "/home") if os.path.isdir(home) for n in os.listdir(home)]
assert [n for n in names if n not in (".pyenv", ".local", "miniconda3")]'''),
    'the environment': _attempt('''
import os
assert [k for k in os.environ if k not in ("PATH", "PWD", "LC_CTYPE", "SHLVL", "_", "OLDPWD")]'''),
    'the environment of others': _attempt('open("/proc/1/environ", "rb").read()'),
    'the memory of itself and others': _attempt('open("/proc/self/mem", "rb").read(1)'),
    'descriptors of others': _attempt('import os\nassert os.listdir("/proc/self/fd")'),
    'inherited descriptors': _attempt('''
import os, stat
kinds = []
for d in range(1024):
    try: kinds.append(stat.S_IFMT(os.fstat(d).st_mode))
    except OSError: pass
assert sorted(kinds) != 3 * [stat.S_IFCHR] + [stat.S_IFSOCK]'''),
    'installed packages': _attempt('''
import sys, sysconfig
sys.path.append(sysconfig.get_path("purelib"))
import jax'''),
    'this package': _attempt('import grpo_jax.types'),
    'the name of the host': _attempt('import os\nassert os.uname().nodename != "sandbox"'),
    'kernel messages': _attempt('open("/dev/kmsg").read(1)'),
    'block devices': _attempt('''
import os
assert [name for name in os.listdir("/dev") if name[:2] in ("sd", "vd", "nv")]'''),
    '/sys': _attempt('import os\nassert os.listdir("/sys")'),
    'the debugger': _attempt('''
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for pid in (1, os.getppid()):
    if pid != os.getpid() and libc.ptrace(16, pid, 0, 0) == 0: break
else: raise OSError'''),
    'memory of the first process': _attempt('''
import ctypes
class Part(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
buffer = ctypes.create_string_buffer(8)
ours, theirs = Part(ctypes.addressof(buffer), 8), Part(0x400000, 8)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.process_vm_readv(1, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0) > 0'''),
}  # fmt: skip

HARMS = {  # what is outside, or what comes after
    'files everywhere': _attempt(f'''
import os
for place in {PLACES!r}:
    if place == "/tmp": continue
    try: open(os.path.join(place, {LEFT!r}), "w").write("x")
    except OSError: continue
    if os.getcwd() != "/tmp" or place != ".": return
raise OSError''') + f'open("/tmp/{LEFT}", "w").write("x")\n',
    'the interpreter': _attempt('''
import os
open(os.__file__, "a").write("#")'''),
    'a device': _attempt('''
import os, stat
os.mknod("/tmp/disk", 0o600 | stat.S_IFBLK, os.makedev(8, 0))'''),
    'a mount': _attempt('''
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(b"none", b"/tmp", b"tmpfs", 0, b"size=99%") == 0'''),
    'the read-only mounts': _attempt('''
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
again = libc.mount(b"none", b"/usr/lib", None, 32 | 4096, None)
assert again == 0 or libc.umount2(b"/usr/lib", 2) == 0'''),
    'a user namespace': _attempt('''
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x10000000) == 0'''),
    'a user namespace of a child': _attempt('''
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
pid = libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)
if pid == 0: os._exit(0)
assert pid > 0'''),
    'chroot': _attempt('import os\nos.chroot("/tmp")'),
    'root': _attempt('import os\nos.setuid(0)'),
    'another user': _attempt('import os\nos.setuid(os.getuid() - 1)'),
    'higher limits': _attempt('''
import resource
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)'''),
    'the clock': _attempt('import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)'),
    'the name of the host, changed': _attempt('import socket\nsocket.sethostname("mine")'),
    'other programs': _attempt('''
import subprocess
subprocess.run(["/bin/sh", "-c", "true"], check=True)'''),
    'the parent': '''
import os, signal
for pid in (os.getppid(), 1):
    for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        try: os.kill(pid, number)
        except OSError: pass
def double(x): return None
''',
    'everybody': '''
import os, signal
def double(x):
    os.kill(-1, signal.SIGKILL); os.killpg(0, signal.SIGKILL)
''',
    'processes by number': '''
import os, signal
def double(x):
    for pid in range(2, 100_000):
        if pid != os.getpid():
            try: os.kill(pid, signal.SIGKILL)
            except OSError: pass
''',
    'the internet': _attempt('import socket\nsocket.create_connection(("1.1.1.1", 53), 2)'),
    'a server': _attempt('''
import socket
server = socket.socket(); server.bind(("0.0.0.0", 0)); server.listen()
other = socket.create_connection(("192.168.0.1", server.getsockname()[1]), 1)'''),
    'DNS': _attempt('import socket\nassert socket.getaddrinfo("example.org", 80)'),
    'the host by vsock': _attempt('''
import socket
socket.socket(40, socket.SOCK_STREAM)'''),
    'netlink': _attempt('''
import socket
route = socket.socket(16, socket.SOCK_RAW, 0); route.bind((0, 0)); route.send(b"x")
assert [name for _, name in socket.if_nameindex() if name != "lo"]'''),
    'packets': _attempt('import socket\nsocket.socket(17, socket.SOCK_RAW)'),
    'a terminal': _attempt('import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, b"x")'),
    'kernel keys': _attempt('''
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall(248, b"user", b"key", b"x", 1, -3) > 0'''),
    'a daemon': f'''
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            time.sleep(0.01)
            open("/tmp/{LEFT}", "a").write("x")
    os._exit(0)
def double(x): return None
''',
    'a child that holds the channel': '''
import os, signal, time
def double(x):
    if os.fork(): os._exit(0)
    os.setsid()
    return None
''',
    'a thread that goes on': '''
import threading, time
threading.Thread(target=lambda: time.sleep(1000)).start()
def double(x): return None
''',
}  # fmt: skip

HANGS = {  # ended by the deadline, if by nothing else
    'deep recursion': '''
import sys
sys.setrecursionlimit(10 ** 9)
def double(x): return double(x)
''',
    'an endless loop': 'def double(x):\n    while True: pass\n',
    'sleep': 'import time\ntime.sleep(1000)\n',
    'a number without end': 'def double(x): return 9 ** 9 ** 9 ** 9\n',
    'a slow expression': 'import re\ndef double(x): return re.match("(a+)+$", "a" * 50 + "b")\n',
    'masked signals': '''
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
def double(x):
    while True: pass
''',
    'a fork bomb': '''
import os
def double(x):
    while True:
        try: os.fork()
        except OSError: pass
''',
    'a thread bomb': '''
import threading, time
def more():
    while True:
        try: threading.Thread(target=more).start()
        except RuntimeError: time.sleep(0.01)
def double(x): more()
''',
    'memory': '''
kept = []
def double(x):
    while True:
        try: kept.append(bytearray(10_000_000))
        except MemoryError: pass
''',
    'memory of many processes': '''
import os
def double(x):
    kept = []
    while True:
        try: os.fork(); kept.append(bytearray(10_000_000))
        except (MemoryError, OSError): pass
''',
    'memory that belongs to no process': '''
import os, mmap
def double(x):
    kept = []
    while True:
        try:
            kept.append(os.memfd_create("x")); os.write(kept[-1], b"x" * 30_000_000)
        except OSError: pass
''',
    'disk': '''
import os
def double(x):
    number = 0
    while True:
        number += 1
        try: open(f"/tmp/{number}", "wb").write(b"x" * 10_000_000)
        except OSError: pass
''',
    'files without end': '''
import os
def double(x):
    number = 0
    while True:
        number += 1
        try: os.close(os.open(f"/tmp/{number}", os.O_CREAT))
        except OSError: pass
''',
    'endless output': '''
import os
def double(x):
    while True: os.write(1, b"x" * 1_000_000); os.write(2, b"x" * 1_000_000)
''',
    'endless answers': _CHANNEL + '''
def double(x):
    while True: say({"value": None})
''',
    'half of an answer': _CHANNEL + '''
import time
def double(x):
    channels[-1].connection.sendall(b"\\0\\0"); time.sleep(1000)
''',
    'a stopped process': '''
import os, signal
def double(x): os.kill(os.getpid(), signal.SIGSTOP)
''',
    'a traced exit': '''
import os, time
def double(x):
    if os.fork(): time.sleep(1000)
    os._exit(0)
''',
}  # fmt: skip

QUICK = {
    f'{kind}: {name}': source
    for kind, table in {
        'returns': RETURNED,
        'ends by': ENDS,
        'forges': FORGED,
        'patches': PATCHED,
        'reads': READS,
        'harms': HARMS,
    }.items()
    for name, source in table.items()
}
ATTACKS = QUICK | {f'hangs: {name}': source for name, source in HANGS.items()}
