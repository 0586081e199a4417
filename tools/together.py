"""Run commands at the same time, so that no core waits for the last one of either: what the first says is shown as it
comes, what the others say when all have ended. The last line is the sum over tests and notebooks, `N passed, N failed`.

  tools/together.py 'pytest tests' 'nbdev_test --timing'
"""
import re, shlex, subprocess, sys, tempfile

def counted(said):
    "Tests and notebooks that passed and failed, as pytest's closing line and nbdev_test's lists tell"
    passed,failed = 0,0
    for p,f in re.findall(r'^(\d+) passed, (\d+) failed$', said, re.M): passed,failed = passed+int(p),failed+int(f)
    passed += len(re.findall(r'^[\w.]+\.ipynb: \d+ secs$', said, re.M))
    failed += len(re.findall(r'^\t[\w.]+\.ipynb$', said, re.M))
    return passed,failed

def main(first, *others):
    logs = [tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') for _ in others]
    rest = [subprocess.Popen(shlex.split(o), stdout=log, stderr=log) for o,log in zip(others, logs)]
    shown = subprocess.Popen(shlex.split(first), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             encoding='utf-8', errors='replace')
    said = ''
    try:
        while part := shown.stdout.read(1): # dots, too, as they come
            said += part
            print(part, end='', flush=True)
        codes = [p.wait() for p in (shown, *rest)]
    except BaseException:
        for p in (shown, *rest): p.terminate()
        raise
    for log in logs:
        log.seek(0)
        said += (text := '\n'+log.read())
        print(text, end='')
    passed,failed = counted(said)
    if any(codes) and not failed: failed = 1 # something else went wrong
    print(f'{passed} passed, {failed} failed')
    sys.exit(any(codes))

if __name__=='__main__': main(*sys.argv[1:])
