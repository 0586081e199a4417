"The layout: folders in the order in which an image travels, imports that go one way, short lines, small cells"
import ast, filecmp, re, statistics, subprocess, sys
from functools import cache
from pathlib import Path
import pytest
from repo import cells, copy_repository, directives, hidden, ids, is_exported, module_of, modules
from repo import nbs, nbs_dir, only_imports, root, source

fastais = {'load','export','predict','show_results','add_cb','add_cbs','show_batch'} # learners have these anyway
wings = 'data nets methods synth evaluate show runs own'.split() # in the order in which an image travels through them

@cache
def reading_order():
    "Every module at its place: first what lies at the top, then wing by wing, `all` at the end"
    def place(nb):
        top = nb.parent==nbs_dir
        return (nb.stem.endswith('_all'), -1 if top else wings.index(nb.parent.name), nb.name)
    return {m:i for i,m in enumerate(module_of(o) for o in sorted((o for o in nbs if module_of(o)), key=place))}

def imported(file):
    "Modules of the package that a module imports, anywhere in it, with the names that it takes from them"
    parts = file.relative_to(root).with_suffix('').parts
    for o in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(o, ast.Import): yield from ((a.name[8:], '') for a in o.names if a.name.startswith('fgsynth.'))
        if not isinstance(o, ast.ImportFrom): continue
        name = '.'.join([*(parts[:-o.level] if o.level else ()), *([o.module] if o.module else [])])
        if name.startswith('fgsynth.'): yield from ((name[8:], a.name) for a in o.names)

def test_folders_are_the_wings():
    "Notebooks and modules have the same folders, and a module lies where its notebook does"
    assert {o.parent.name for o in (root/'fgsynth').rglob('*.py')} == {'fgsynth', *wings}
    for nb in nbs:
        if not (m := module_of(nb)): continue
        *folder,name = m.split('.')
        assert [*nb.relative_to(nbs_dir).parts[:-1]]==folder and nb.stem.split('_', 1)[1]==name, nb
    assert {m.replace('.', '/') for m in reading_order()} == {
        o.relative_to(root/'fgsynth').with_suffix('').as_posix() for o in modules if o.name[0]!='_'}

@pytest.mark.parametrize('file', [o for o in modules if o.name[0]!='_'],
                         ids=[o.relative_to(root/'fgsynth').as_posix() for o in modules if o.name[0]!='_'])
def test_imports_go_downwards(file):
    "A wing knows only the wings before it, a module only the modules before it, and nobody's private names"
    order = reading_order(); me = '.'.join(file.relative_to(root/'fgsynth').with_suffix('').parts)
    for other,name in imported(file):
        assert other in order, f'{me} imports {other}, which is no module'
        assert order[other]<order[me], f'{me} imports {other}, which comes after it'
        assert name[:1]!='_', f'{me} imports the private {name} of {other}'

def _closure(module, below):
    "All modules that a module imports, directly or not"
    todo,seen = [module],set()
    while todo:
        new = below[todo.pop()] - seen
        seen |= new; todo += new
    return seen

def _patched(tree):
    "Names of the methods that a module gives to learners"
    for o in ast.walk(tree):
        if not isinstance(o, ast.FunctionDef) or 'patch' not in map(ast.unparse, o.decorator_list): continue
        if ast.unparse(o.args.args[0].annotation or ast.Constant(0)) in ('Learner','SSLLearner'): yield o.name

def test_methods_of_learners_come_with_what_a_module_imports():
    "Whoever calls learn.attention_maps(...) imports the module that gives it to learners, directly or not"
    files = {m:root/'fgsynth'/f"{m.replace('.', '/')}.py" for m in reading_order()}
    code = {m:ast.parse(f.read_text(encoding='utf-8')) for m,f in files.items()}
    below = {m:{o for o,_ in imported(f)} for m,f in files.items()}
    gives = {m:set(_patched(t)) - fastais for m,t in code.items()}
    for m,tree in code.items():
        known = _closure(m, below) | {m}
        for o in ast.walk(tree):
            if not isinstance(o, ast.Attribute): continue
            givers = {g for g,names in gives.items() if o.attr in names}
            assert not givers or givers & known, f'{m} calls {o.attr}, which comes from {givers}'

def _lines(file):
    "(line, what a line may have at most) of a file"
    if file.suffix=='.py':
        text = file.read_text(encoding='utf-8')
        if file in modules: text = text[text.find('# %% ', text.find('__all__')):] # what nbdev writes above is its own
        return [(l, 120) for l in text.splitlines()]
    res = []
    for c in cells(file):
        if c['cell_type']!='code':
            fenced = re.findall(r'(?ms)^```(?!\{?mermaid).*?^```', source(c))
            res += [(l, 90) for o in fenced for l in o.splitlines()]
            continue
        unseen = hidden(c) or directives(c).get('echo','').strip()=='false'
        res += [(l, 120 if unseen else 90) for l in source(c).splitlines() if not re.match(r'#\|\s*fig-alt', l)]
    return res

written = [*nbs, *(o for o in modules if o.name!='_modidx.py'), root/'setup.py',
           *(o for d in ('tests','tools','benchmarks') for o in sorted((root/d).glob('*.py')))]

@pytest.mark.parametrize('file', written, ids=[o.relative_to(root).as_posix() for o in written])
def test_lines_are_short(file):
    "At most 120 characters, and 90 where a reader of the site sees them"
    assert not (bad := [f'{len(l)} characters: {l[:100]}' for l,most in _lines(file) if len(l)>most]), '\n'.join(bad)

def exported(nb):
    "Exported cells of a notebook, without their directives and without those that only import"
    for c in cells(nb):
        if c['cell_type']!='code' or not is_exported(c): continue
        if not only_imports(c): yield '\n'.join(l for l in source(c).splitlines() if not re.match(r'#\s*\|', l))

def test_cells_are_small():
    "One idea each: half of all exported cells have at most nine lines"
    assert statistics.median(len(o.splitlines()) for nb in nbs for o in exported(nb)) <= 9

@pytest.mark.parametrize('nb', [o for o in nbs if module_of(o) and not o.stem.endswith('_all')],
                         ids=[i for o,i in zip(nbs, ids) if module_of(o) and not o.stem.endswith('_all')])
def test_examples_follow(nb):
    "An exported cell is followed by its example: at most three in a row without one"
    row = 0
    for c in cells(nb):
        if c['cell_type']!='code': continue
        if is_exported(c):
            row += not only_imports(c)
            assert row<4, f'the fourth in a row:\n{source(c)[:200]}'
        elif not hidden(c) and not source(c).startswith('show_doc'): row = 0

def test_raise_stands_on_its_own_line():
    "What ends a function is seen at the left"
    for file in modules:
        for o in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            for b in [*getattr(o, 'body', []), *getattr(o, 'orelse', [])] if isinstance(o, ast.stmt) else []:
                assert not isinstance(b, ast.Raise) or b.lineno!=o.lineno, (file.name, b.lineno)

@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "A copy of the repository, exported and cleaned"
    top = tmp_path_factory.mktemp('fresh')/'top'; copy_repository(top, '_quarto.yml')
    for o in modules:
        if o.name!='__init__.py': (top/o.relative_to(root)).unlink()
    for o in 'nbdev_export','nbdev_clean':
        r = subprocess.run([Path(sys.executable).parent/o], cwd=top, capture_output=True, text=True)
        assert r.returncode==0, r.stdout + r.stderr
    return top

def _differ(fresh, files): return [str(o) for o in files if not filecmp.cmp(root/o, fresh/o, shallow=False)]

def test_modules_agree_with_notebooks(fresh):
    "Every module is what its notebook exports, and comes from one"
    now = {o.relative_to(fresh) for o in (fresh/'fgsynth').rglob('*.py')}
    assert {o.relative_to(root) for o in modules}==now, 'a module comes from no notebook, or was not exported'
    assert not _differ(fresh, now), 'run `make export`'

def test_notebooks_are_clean(fresh):
    "Nothing is saved in a notebook that does not belong in git"
    assert not _differ(fresh, [o.relative_to(root) for o in nbs]), 'run `make clean`'
