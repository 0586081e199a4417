"""What `make test` runs: notebooks and modules agree, every notebook runs, pytest. Ends with `N passed, N failed`.
With --coverage, what `make coverage` runs: the same, on the modules (see as_module.py), and then how many of their lines were run."""
import difflib, os, shutil, signal, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

root = Path(__file__).resolve().parent.parent
bin_ = Path(sys.executable).parent
timeout = 1800 # seconds for one notebook; far above what any needs, so that a hanging one is reported
passed,failed,running = [],[],set()

def report(name, problem='', secs=None, what='ok'):
    "Print and count one result"
    (failed if problem else passed).append(name)
    took = '' if secs is None else f' ({secs:.0f} s)'
    print(f"{'FAILED' if problem else what} {name}{took}" + (f'\n{problem.rstrip()}\n' if problem else ''), flush=True)

def notebooks():
    "The notebooks that nbdev tests and exports, as paths relative to the repository"
    from nbdev.doclinks import nbglob
    return [o.resolve().relative_to(root) for o in sorted(nbglob(root/'nbs', as_path=True))]

def stop(pid):
    "End a process with all that it started"
    try: os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError: pass

def sh(*cmd, cwd=root, **env):
    "Run `cmd` and return its exit code and everything that it printed"
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'} | {'PYTHONWARNINGS':'ignore'} | env
    with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as f:
        p = subprocess.Popen([str(o) for o in cmd], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=f, stderr=f, start_new_session=True)
        running.add(p.pid)
        try: rc,late = p.wait(timeout),''
        except subprocess.TimeoutExpired:
            stop(p.pid)
            rc,late = p.wait() or 1, f'\nIt did not end within {timeout} seconds.'
        finally: running.discard(p.pid)
        f.seek(0)
        return rc, f.read() + late

def diff(a, b, name, n=40):
    "The first `n` lines of the difference between two texts"
    ls = list(difflib.unified_diff(a.splitlines(), b.splitlines(), f'{name} as it is', f'{name} as it should be', lineterm='', n=1))
    return '\n'.join(l[:200] for l in ls[:n]) + ('\n...' if len(ls)>n else '')

def compare(fresh, names, fix):
    "What differs between the files `names` here and in the copy `fresh`, with the command that would mend it"
    res = []
    for o in names:
        if   not (root/o).exists():  res.append(f'{o} is missing')
        elif not (fresh/o).exists(): res.append(f'{o} comes from no notebook: delete it')
        else:
            a,b = [(p/o).read_text(encoding='utf-8') for p in (root,fresh)]
            if a!=b: res.append(diff(a, b, o))
    return '\n'.join(res + [f'Run `{fix}`.']) if res else ''

def agreement(nbs):
    "Export and clean a copy of the repository, and compare it with the repository itself, which is not touched"
    with tempfile.TemporaryDirectory() as d:
        d = Path(d).resolve()
        for o in nbs + [Path(o) for o in ('settings.ini','pyproject.toml','fgsynth/__init__.py')]:
            (d/o).parent.mkdir(parents=True, exist_ok=True)
            if (root/o).exists(): shutil.copy(root/o, d/o)
        rc,out = sh(bin_/'nbdev_export', cwd=d)
        mods = {o.relative_to(p) for p in (root,d) for o in (p/'fgsynth').rglob('*.py')}
        report('modules agree with notebooks', out if rc else compare(d, sorted(mods)+[Path('pyproject.toml')], 'make export'))
        rc,out = sh(bin_/'nbdev_clean', cwd=d)
        report('notebooks are clean', out if rc else compare(d, nbs, 'make clean'))

measure = [sys.executable, '-m', 'coverage', 'run'] if '--coverage' in sys.argv else []

def run_nb(nb, threads):
    "Run one notebook by `nbdev_test` in a process of its own; a failure comes with its traceback"
    start = time.time()
    how = [*measure, root/'tools/as_module.py', nb] if measure else [bin_/'nbdev_test', '--path', nb, '--n_workers', '0']
    rc,out = sh(*how, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    report(nb, (out or f'nbdev_test ended with exit code {rc}') if rc else '', time.time()-start,
           'not run' if 'No files were eligible' in out else 'ok')

def run_tests(file, threads):
    "Run one file of pytest's in a process of its own, and count its tests"
    start = time.time()
    with tempfile.TemporaryDirectory() as d:
        xml = Path(d)/'junit.xml'
        rc,out = sh(*(measure or [sys.executable]), '-m', 'pytest', file, '-q', '-rs', f'--junitxml={xml}', OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        cases = list(ElementTree.parse(xml).getroot().iter('testcase')) if xml.exists() else []
    kinds = [{o.tag for o in c} & {'failure','error','skipped'} or {'passed'} for c in cases]
    n = {k: sum(k in o for o in kinds) for k in ('passed','skipped')}
    bad = [f'{file}::{c.get("name")}' for c,k in zip(cases, kinds) if k & {'failure','error'}] or ([str(file)] if rc not in (0,5) else []) # interrupted, say
    passed.extend([file]*n['passed']); failed.extend(bad)
    more = [f"{n[k]} {k}" for k in n if n[k]] + ([f'{len(bad)} failed'] if bad else []) or ['no test']
    print(f"{'FAILED' if bad else 'ok'} {file}: {', '.join(more)} ({time.time()-start:.0f} s)" + (f'\n{out.rstrip()}\n' if bad else ''.join(f'\n  {l}' for l in out.splitlines() if l.startswith('SKIPPED'))), flush=True)

def run_all(nbs):
    "Run tests and notebooks, a few at a time; the cores are shared out between them"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    workers = max(1, min(cores, 4)); threads = max(1, cores//workers)
    jobs = [partial(run_tests, o.relative_to(root)) for o in sorted((root/'tests').glob('test_*.py'))] + [partial(run_nb, o) for o in nbs]
    with ThreadPoolExecutor(workers) as ex:
        try: list(ex.map(lambda job: job(threads), jobs))
        except KeyboardInterrupt:
            for pid in list(running): stop(pid)
            raise

def main():
    done = False
    try:
        os.chdir(root)
        if measure: os.environ |= dict(COVERAGE_FILE=str(root/'.coverage'), COVERAGE_RCFILE=str(root/'pyproject.toml'))
        nbs = notebooks()
        agreement(nbs)
        run_all(nbs)
        if measure:
            for o in ('combine','--quiet'),('report',):
                if subprocess.run([*measure[:-1], *o]).returncode: failed.append(f'coverage {o[0]}') # fewer lines than pyproject.toml asks for
        done = True
    except KeyboardInterrupt: print('Interrupted.')
    finally:
        if failed: print('Failed: ' + ', '.join(map(str, failed)))
        print(f'{len(passed)} passed, {len(failed) + (not done)} failed', flush=True)
    return 0 if done and not failed else 1

if __name__=='__main__': sys.exit(main())
