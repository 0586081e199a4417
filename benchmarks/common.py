"Time things side by side: alternating in one process, medians, kept as JSON with the machine"
import json, platform, statistics, subprocess, sys, time
from pathlib import Path
import torch, torchvision, fastai, fgsynth
from fgsynth.runs.rows import code_commit, machine_name

root = Path(__file__).resolve().parent.parent
gtsrb = root.parent/'shared/data/gtsrb'

def now():
    "Seconds, after everything that the accelerator was asked for is done"
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()

def in_a_row(f, n):
    "Call `f` `n` times; the seconds of each call"
    ts = []
    for _ in range(n): t = now(); f(); ts.append(now()-t)
    return ts

def alternate(fs, rounds=5, warm=1):
    "Call each function of the dict `fs` in turn, `rounds` times; the seconds of each, without the first `warm`"
    res = {k:[] for k in fs}
    for r in range(rounds+warm):
        for k,f in fs.items():
            t = now(); out = f(); t = now()-t
            if r>=warm: res[k] += out if isinstance(out, list) else [t]     # a function may time its own parts
    return res

def rows_of(times, base):
    "Median, range and ratio to `base` of what `alternate` returned"
    med = {k:statistics.median(v) for k,v in times.items()}
    return [dict(name=k, seconds=med[k], low=min(v), high=max(v), n=len(v), ratio=med[k]/med[base])
            for k,v in times.items()]

def save(name, question, rows, **info):
    "Print the rows and write them to results/bench/NAME.json"
    cols = list(dict.fromkeys(k for r in rows for k in r))
    fmt = lambda v: f'{v:.3g}' if isinstance(v, float) else str(v)
    text = [[c for c in cols]] + [[fmt(r.get(c, '')) for c in cols] for r in rows]
    wide = [max(len(t[i]) for t in text) for i in range(len(cols))]
    print('\n'.join([question] + ['  '.join(s.ljust(w) for s,w in zip(t, wide)).rstrip() for t in text]), flush=True)
    out = root/'results/bench'/f'{name}.json'; out.parent.mkdir(parents=True, exist_ok=True)
    versions = {o.__name__:o.__version__ for o in (torch, torchvision, fastai, fgsynth)}
    head = dict(question=question, machine=machine_name(), cores=torch.get_num_threads(), commit=code_commit(),
                python=platform.python_version(), **versions,
                command=' '.join([Path(sys.argv[0]).name, *sys.argv[1:]]), **info)
    out.write_text(json.dumps(dict(head, rows=rows), indent=1)+'\n', encoding='utf-8')
    print(f'wrote {out.relative_to(root)}\n')
