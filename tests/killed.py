"""One run, killed 20 times and resumed each time: `test_resume.py` runs this in a process of its own.
Its children are forked, so that they need not import torch and fastai again, and end by SIGKILL, as by a power cut:
at any moment, soon after a checkpoint, or in the middle of writing one."""
import io, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
from fastcore.basics import noop
from fgsynth.data.datasets import get_dataset
from fgsynth.runs import train as training

kinds = ['anytime']*4 + ['after']*8 + ['half written','written','renamed','renamed, old not deleted']*2
settings = dict(arch='timm/test_byobnet', size=32, bs=16, epochs=9, pretrain_epochs=1, decoder_width=8, save_every=1)

def die(): os.kill(os.getpid(), signal.SIGKILL)

def trap(kind, n):
    "Let this process die at the `n`th checkpoint that it writes"
    count,save,replace = [0],torch.save,os.replace
    def now(k): return k==kind and count[0]==n
    def trapped_save(state, f):
        if isinstance(f, Path): return save(state, f)                        # the trial beforehand
        count[0] += 1
        save(state, buf := io.BytesIO()); b = buf.getvalue()
        f.write(b[:len(b)//2]); f.flush()
        if now('half written'): die()
        f.write(b[len(b)//2:]); f.flush()
        if now('written'): die()
    def trapped_replace(a, b):
        if now('renamed'): die()
        replace(a, b)
        if now('renamed, old not deleted'): die()
    torch.save,os.replace = trapped_save,trapped_replace

def start(out, kind=None, n=0):
    "Train in a child process"
    if pid := os.fork(): return pid
    try:
        with open(out.with_suffix('.log'), 'a') as f: os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)                          # what was said before a death is kept
        if kind: trap(kind, n)
        if kind not in (None,'anytime'): training.try_fit = noop # these die later, after a trial that changes nothing
        training.train(out=str(out), resume=True, **settings)
        sys.stdout.flush(); os._exit(0)
    except BaseException: traceback.print_exc(); sys.stderr.flush(); os._exit(1)

def ended(pid, flags=0):
    "How a child ended: a signal below 0, an exit code from 0 up, or None if it has not"
    got,status = os.waitpid(pid, flags)
    return os.waitstatus_to_exitcode(status) if got else None

def newest(out): return max([0]+[int(f.stem) for f in (out/'checkpoints').glob('[0-9]*.pt')])

def kill(out, rng, kind):
    "One life and one death of the run"
    n0 = newest(out)
    pid = start(out, None if kind in ('anytime','after') else kind, rng.randint(1, 3))
    if kind in ('anytime','after'):
        while kind=='after' and newest(out)==n0 and ended(pid, os.WNOHANG) is None: time.sleep(.005)
        time.sleep(rng.uniform(0, 1 if kind=='anytime' else .1))
        os.kill(pid, signal.SIGKILL)
    code = ended(pid)
    print(f'{kind}: checkpoints {n0} to {newest(out)}', flush=True)
    assert code==-signal.SIGKILL, (kind, code, out.with_suffix('.log').read_text()[-3000:])

def main(top):
    items = get_dataset('finches', n_train=128, n_test=16, size=32)
    training.run_items = lambda *args: items
    code = ended(start(top/'whole')); assert code==0, (top/'whole.log').read_text()[-3000:]
    rng = random.Random(0)
    order = rng.sample(kinds, len(kinds))
    order.insert(0, order.pop(order.index('renamed, old not deleted'))) # the first within the decoder's few steps
    for kind in order: kill(top/'killed', rng, kind)
    code = ended(start(top/'killed')); assert code==0, (top/'killed.log').read_text()[-3000:]

if __name__=='__main__':
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
