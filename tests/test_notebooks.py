"The notebooks' habits: what a page begins and ends with, and what is saved in it"
import ast, json, re
import pytest
from repo import cells, directives, each_nb, hidden, ids, is_exported, nbs, nbs_dir, pictured, root, source

@each_nb
def test_first_cell(nb):
    "A title and a one-line description, and nothing else: nbdev drops whatever follows them in the same cell"
    c = cells(nb)[0]
    assert c['cell_type']=='markdown'
    assert re.fullmatch(r'# \S[^\n]*\n\n> \S[^\n]*', source(c).rstrip('\n')), source(c)

@each_nb
def test_saved_outputs_are_small(nb):
    "Less than 1 MB in one notebook, so that the repository stays small"
    n = len(json.dumps([c.get('outputs',[]) for c in cells(nb)]))
    assert n < 1_000_000, f'{n/1e6:.1f} MB of saved outputs'
    about = json.loads(nb.read_text(encoding='utf-8'))['metadata']
    assert 'widgets' not in about, 'the state of widgets was saved, which no page shows'

@each_nb
def test_no_errors_saved(nb):
    "No notebook was saved half run"
    bad = [source(c)[:80] for c in cells(nb) for o in c.get('outputs',[]) if o['output_type']=='error']
    assert not bad, bad

@each_nb
def test_cell_ids_differ(nb):
    "The modules name the cells that they came from"
    found = [c['id'] for c in cells(nb)]
    assert len(set(found))==len(found)

def shown(nb):
    "Code cells that a reader sees, and which of them end in an expression whose value would show"
    for c in cells(nb):
        if c['cell_type']!='code' or hidden(c): continue
        d = directives(c)
        try: last = (ast.parse(source(c)).body or [None])[-1]
        except SyntaxError: last = None # a magic
        value = isinstance(last, ast.Expr) and not source(c).rstrip().endswith(';')
        if value and isinstance(last.value, ast.Call): # a test returns nothing
            value = not re.match(r'test_|expect_|write_|plt\.close$|\w+_close$|.*\.(unlink|save|mkdir|cleanup)$',
                                 ast.unparse(last.value.func))
        yield c, d, value

@each_nb
def test_outputs_are_saved(nb):
    "What a page should show was there when it was saved"
    bad = [source(c)[-80:] for c,d,value in shown(nb)
           if value and not c.get('outputs') and d.get('output','').strip()!='false']
    assert not bad, 'run the notebook from top to bottom:\n' + '\n---\n'.join(bad)

@each_nb
def test_alt_texts(nb):
    "Every picture says in words what it shows: in a cell by `#| fig-alt:`, in prose by ![words](...)"
    bad = [source(c)[:80] for c,d,_ in shown(nb) if pictured(c) and len(d.get('fig-alt','').strip(' "'))<10]
    text = [m for c in cells(nb) if c['cell_type']=='markdown' for m in re.findall(r'!\[\s*\]\([^)]*\)', source(c))]
    pages = [''.join(o.get('data',{}).get('text/html','')) for c,_,_ in shown(nb) for o in c.get('outputs',[])]
    made = [m for o in pages for m in re.findall(r'<img\b(?![^>]*\balt="[^"]+")[^>]*>', o)]
    assert not bad + text + made, bad + text + made

@each_nb
def test_picture_comes_early(nb):
    "A picture is among the first six cells that a reader sees"
    seen = [c for c in cells(nb) if not hidden(c)][:6]
    assert any(re.search(r'!\[[^\]]*\]\(', source(c)) if c['cell_type']=='markdown' else pictured(c) for c in seen)

@pytest.mark.parametrize('nb', [o for o in nbs if o!=nbs_dir/'index.ipynb'], ids=[o for o in ids if o!='index.ipynb'])
def test_says_what_is_next(nb):
    "The last words of a page lead to another"
    last = [source(c) for c in cells(nb) if c['cell_type']=='markdown'][-1]
    assert re.search(r'\bNext: [^\n]*\]\([^)]+\)', last), last[-200:]

@each_nb
def test_imports_stand_alone(nb):
    "For the documentation nbdev runs exported cells and those with an import: other code in these would fail"
    bad = []
    for c in cells(nb):
        if c['cell_type']!='code' or is_exported(c) or directives(c).get('eval','').strip()=='false': continue
        try: body = ast.parse(source(c)).body
        except SyntaxError: continue # a magic
        imports = any(isinstance(o, (ast.Import,ast.ImportFrom)) for b in body for o in ast.walk(b))
        harmless = ast.Import,ast.ImportFrom,ast.FunctionDef,ast.ClassDef
        if imports and not all(isinstance(b, harmless) for b in body): bad.append(source(c)[:200])
    assert not bad, 'give the imports a cell of their own:\n' + '\n---\n'.join(bad)

def test_no_machine_paths():
    "Nothing that is published names a folder of the machine on which it was written"
    own = re.compile(r'(?<![\w.~-])/(work|root|home|Users|tmp/bash)/[\w.-]')
    files = nbs + [*(root/'fgsynth').rglob('*.py'), *root.glob('*.md'), *nbs_dir.rglob('*.yml'), *root.glob('*.yml')]
    bad = [f'{o.relative_to(root)}: {m[0]}' for o in files for m in own.finditer(_without_pictures(o))]
    assert not bad, bad

def _without_pictures(p):
    return re.sub(r'[A-Za-z0-9+/=]{400,}', '', p.read_text(encoding='utf-8'))
