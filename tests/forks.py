"""A process that imports torch, fastai and fgsynth once and then runs scripts in children of its own: each script meets
a fresh `__main__`, its own arguments and environment, and modules that nobody has used. With `n` above 1 it is run by
the agent of torchrun, in `n` processes that the agent forks."""
import json, os, runpy, signal, subprocess, sys, tempfile, traceback
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from figures import without_figures

def run_script(script, args):
    "What `python script args` does, once Python is there"
    sys.argv,sys.path[0] = [script, *args],str(Path(script).parent)
    try: runpy.run_path(script, run_name='__main__')
    except SystemExit as e: # the agent waits for a function that ends without returning
        if e.code: raise

def run_many(n, script, args):
    "What `torchrun --standalone --nproc_per_node n script args` does"
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    how = dict(rdzv_backend='c10d', rdzv_endpoint='localhost:0', run_id=str(os.getpid()), max_restarts=0)
    elastic_launch(LaunchConfig(1, 1, n, start_method='fork', **how), run_script)(script, args)

def child(job):
    "Do a job and end, in 15 minutes at most"
    code = 1
    os.setsid(); signal.alarm(900)
    try:
        for fd,k in (1,'out'),(2,'err'): os.dup2(os.open(job[k], os.O_WRONLY), fd)
        os.chdir(job['cwd']); os.environ.clear(); os.environ.update(job['env'])
        with nullcontext() if job['figures'] else without_figures():
            if job['n']>1: run_many(job['n'], job['script'], job['args'])
            else: run_script(job['script'], job['args'])
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)

def serve():
    "A job is a line of JSON, and so is how it ended"
    import torch, fastai.vision.all, fgsynth.all, fgsynth.runs.table, fgsynth.own.label, fgsynth.own.export # noqa
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), 'w')
    for line in sys.stdin:
        pid = os.fork() or child(json.loads(line))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(ProcessLookupError): os.killpg(pid, signal.SIGKILL)
        print(code, file=answers, flush=True)
    os._exit(0) # at once: there is nothing to put away

@contextmanager
def forking(env):
    "Inside, a function `run(script, *args, n=1, cwd=None, figures=True)` that returns a finished process"
    server = subprocess.Popen([sys.executable, '-W', 'ignore', __file__], env=env, text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    def run(script, *args, n=1, cwd=None, figures=True):
        with tempfile.TemporaryDirectory() as d:
            said = [Path(d)/k for k in ('out','err')]
            for f in said: f.touch()
            job = dict(script=str(script), args=[*map(str, args)], n=n, cwd=str(cwd or d), env=env,
                       figures=figures, out=str(said[0]), err=str(said[1]))
            print(json.dumps(job), file=server.stdin, flush=True)
            code = int(server.stdout.readline())
            return subprocess.CompletedProcess([script, *args], code, *[f.read_text() for f in said])
    try: yield run
    finally:
        server.stdin.close()
        server.wait(60)

if __name__=='__main__': serve()
