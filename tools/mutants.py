"""Change one thing at a time in a module and see whether a test notices.
`mutants.py [MODULE ...]`; a module is called as in `synth.perturb`. The changes are those of cosmic-ray, one
replacement for each operator; the judges are files of pytest. Everything slow is imported once, and each mutant is
tried in a fork. What was found is kept in results/mutants/MODULE.json, and only what is missing is run; reasons.json
says why survivors survive."""
import argparse, difflib, importlib.util, json, os, random, re, signal, sys, time
from importlib.machinery import SourceFileLoader
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='agg', PYTHONWARNINGS='ignore', IN_TEST='1')
root = Path(__file__).resolve().parent.parent
judges = {'nets.losses':'nets', 'nets.saliency':'nets', 'synth.perturb':'perturb', 'synth.decoding':'synth',
          'synth.callbacks':'synth', 'synth.controls':'synth', 'evaluate.features':'evaluate',
          'evaluate.probe':'evaluate', 'evaluate.retrieval':'evaluate', 'evaluate.measures':'evaluate',
          'methods.base':'methods', 'methods.mocov2':'methods', 'methods.simsiam':'methods',
          'methods.learner':'learner'}
judges = {m:[f'tests/test_{t}.py', 'tests/test_properties.py'] for m,t in judges.items()}
binary = 'Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Div Mod_Mul BitAnd_BitOr BitOr_BitAnd'
compare = 'Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Is_IsNot IsNot_Is'
operators = [*'''NumberReplacer AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd
                 ZeroIterationForLoop RemoveDecorator ExceptionReplacer ReplaceUnaryOperator_Delete_Not
                 ReplaceUnaryOperator_USub_UAdd ReplaceBreakWithContinue ReplaceContinueWithBreak'''.split(),
             *(f'ReplaceBinaryOperator_{o}' for o in binary.split()),
             *(f'ReplaceComparisonOperator_{o}' for o in compare.split())]

def file(module): return root/f"fgsynth/{module.replace('.', '/')}.py"
def source(module): return file(module).read_text(encoding='utf-8')

def mutants(module):
    "Every change as (operator and what it does to a line, source)"
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator
    src,seen,names = source(module),set(),{}
    head = src.index('# %%', src.index('__all__')) # what is above names the exported, and does nothing
    for op in operators:
        for i in range(10**6):
            try: new = mutate_code(src, get_operator(f'core/{op}')(), i)
            except Exception: continue
            if new is None: break
            same = re.sub(r'(?<=[(=])\+1(?=[,)])', '-1', new)==src # of a matrix, dimension 1 is dimension -1
            if new in seen or new==src or new[:head]!=src[:head] or same: continue
            seen.add(new)
            diff = difflib.unified_diff(src.splitlines(), new.splitlines(), n=0, lineterm='')
            lines = [l for l in diff if l[:1] in '-+' and l[:3] not in ('---','+++')]
            k = '\n'.join([op, *lines]); names[k] = names.get(k, 0)+1
            yield k + (f'\n{names[k]}' if names[k]>1 else ''), new           # the same line may stand in two places

class Mutated(SourceFileLoader):
    "The module with another text"
    def __init__(self, name, path, text): super().__init__(name, path); self.text = text
    def get_code(self, name): return compile(self.text, self.path, 'exec')

class Finder:
    def __init__(self, module, text): self.name,self.path,self.text = f'fgsynth.{module}',str(file(module)),text
    def find_spec(self, name, path=None, target=None):
        if name!=self.name: return
        return importlib.util.spec_from_loader(name, Mutated(name, self.path, self.text), origin=self.path)

def judge(f):
    "Do the tests in this file pass?"
    import pytest
    return pytest.main(['-q', '-x', '-p', 'no:cacheprovider', str(root/f)])==0

def start(module, text, f):
    "Begin to judge a text in a process of its own"
    pid = os.fork()
    if pid: return pid
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0,1,2): os.dup2(null, fd)
    ok = False
    try:
        sys.meta_path.insert(0, Finder(module, text)); os.chdir(root)
        ok = judge(f)
    finally: os._exit(0 if ok else 1)

def verdicts(module, jobs, limits, workers):
    "For each (key, text) the judge that noticed, '' if none did; in the order in which they end"
    todo,running = [(k,t,list(judges[module])) for k,t in jobs][::-1],{}
    while todo or running:
        while todo and len(running)<workers:
            k,t,js = todo.pop(); running[start(module, t, js[0])] = k,t,js,time.time()
        time.sleep(.02)
        for pid,(k,t,js,begin) in list(running.items()):
            done,status = os.waitpid(pid, os.WNOHANG); late = time.time()-begin > limits[js[0]]
            if not done and not late: continue
            if not done: os.killpg(pid, signal.SIGKILL); os.waitpid(pid, 0)
            del running[pid]
            if not done or status: yield k, js[0] + (' (endless)' if not done else '')
            elif js[1:]: todo.append((k, t, js[1:]))
            else: yield k, ''

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('modules', nargs='*', help=f"by default all of {', '.join(judges)}")
    p.add_argument('--workers', type=int, default=os.cpu_count())
    p.add_argument('--sample', type=int, help='only so many of each module, drawn at random')
    a = p.parse_args()
    sys.path[:0] = [str(root/'tools'), str(root)]
    # once for all
    import fastai.vision.all, fastai.callback.all, timm, torchvision, sklearn.linear_model, sklearn.metrics
    import matplotlib.pyplot, pytest, hypothesis, pytorch_grad_cam
    reasons = json.loads((root/'results/mutants/reasons.json').read_text(encoding='utf-8'))
    for m in a.modules or judges:
        found = list(mutants(m)); random.Random(0).shuffle(found)
        out = root/f'results/mutants/{m}.json'; out.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(out.read_text(encoding='utf-8')) if out.exists() else {}
        res = {k:before.get(k) for k,_ in found}
        src,limits = source(m),{}
        for j in judges[m]:
            begin = time.time(); pid = start(m, src, j)
            if os.waitpid(pid, 0)[1]: sys.exit(f'{j} fails as it is: mend it first.')
            limits[j] = 20 + 4*(time.time()-begin)*max(1, a.workers/2)
        known = reasons.get(m, {})
        again = [o for o in found if res[o[0]]=='' and o[0] not in known]     # tests may have learned
        new = [o for o in found if res[o[0]] is None]
        jobs = again + (new if a.sample is None else new[:max(0, a.sample-len(found)+len(new))])
        print(f'{m}: {len(found)} mutants, {len(jobs)} to try', flush=True)
        def keep(): # null: not tried
            out.write_text(json.dumps(res, indent=1, sort_keys=True)+'\n', encoding='utf-8')
        keep()
        for i,(k,v) in enumerate(verdicts(m, jobs, limits, a.workers), 1):
            res[k] = v; keep()
            if i%25==0: print(f'  {i} of {len(jobs)}', flush=True)
        tried = {k:v for k,v in res.items() if v is not None}; killed = sum(map(bool, tried.values()))
        left = f'; {len(res)-len(tried)} were not tried' if len(tried)<len(res) else ''
        print(f'{m}: {killed} of {len(tried)} noticed, {100*killed/max(1, len(tried)):.1f} %{left}', flush=True)
        for k,v in sorted(tried.items()):
            why = f'\n    ({known[k]})' if k in known else ''
            if not v: print('  survived', k.replace('\n', '\n    ') + why)

if __name__=='__main__': main()
