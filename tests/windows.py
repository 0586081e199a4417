"""What Windows refuses, refused on Linux: a file that is mapped into memory or open is neither replaced nor deleted, a
mapped one is not written over, and one that somebody has locked is not read. The kernel says which those are."""
import builtins, io, os
from contextlib import contextmanager, suppress
from pathlib import Path
import pytest

def mapped():
    "Files that this process maps into memory"
    lines = [l.split(maxsplit=5) for l in Path('/proc/self/maps').read_text().splitlines()]
    return {l[5] for l in lines if len(l)==6}

def opened():
    "Files that this process has open"
    found = set()
    for fd in Path('/proc/self/fd').iterdir():
        with suppress(OSError): found.add(os.readlink(fd))
    return found

def is_locked(path):
    "Does somebody hold a lock on this file?"
    try: inode = os.stat(path).st_ino
    except OSError: return False
    return any(int(l.split()[-3].split(':')[-1])==inode for l in Path('/proc/locks').read_text().splitlines())

@contextmanager
def like_windows():
    "Inside, files are as stubborn as those of Windows"
    real = dict(open=io.open, replace=os.replace, unlink=os.unlink)
    def stay(*paths):
        used = mapped() | opened()
        for p in paths:
            if os.path.realpath(p) in used: raise PermissionError(13, 'used by another process', str(p))
    def replace(a, b, **kw):
        stay(a, b)
        return real['replace'](a, b, **kw)
    def unlink(path, **kw):
        stay(path)
        return real['unlink'](path, **kw)
    def path_unlink(self, missing_ok=False):
        try: unlink(self)
        except FileNotFoundError:
            if not missing_ok: raise
    def open_(file, mode='r', *args, **kw):
        if not isinstance(file, int) and not str(file).startswith('/proc'):
            if 'w' in mode and os.path.realpath(file) in mapped():
                raise OSError(22, 'a user-mapped section is open', str(file))
            if is_locked(file): raise PermissionError(13, 'another process has locked a portion', str(file))
        return real['open'](file, mode, *args, **kw)
    with pytest.MonkeyPatch.context() as m:
        for o in io,builtins: m.setattr(o, 'open', open_)
        for name in 'replace','rename': m.setattr(os, name, replace)
        for name in 'unlink','remove': m.setattr(os, name, unlink)
        m.setattr(Path, 'unlink', path_unlink)
        m.setattr(Path, 'open', open_) # Python 3.10 keeps an `open` of its own
        for name in 'replace','rename': m.setattr(Path, name, lambda a, b: (replace(a, b), Path(b))[1])
        for name in 'posix_fallocate','O_DIRECTORY': m.delattr(os, name)
        yield
