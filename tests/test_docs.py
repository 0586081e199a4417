"Written files and the documentation: README, workflows, sidebars, links, and pages as their readers see them"
import importlib.util, re, subprocess, sys, tempfile
from pathlib import Path
import pages, pytest, yaml
from repo import cells, cfg, copy_repository, ids, nbs_dir, root, source

def test_readme_and_contributing_agree():
    "README.md and CONTRIBUTING.md, and the pictures in them, are what their notebooks give"
    import readme
    for name,nb in readme.pages.items(): assert (root/name).exists() and (nbs_dir/nb).exists(), name
    assert not list(readme.differences()), 'run `make readme`'

def test_ten_lines_of_the_first_page(monkeypatch, tmp_path, capsys):
    "They do what they say, here on a tenth of the images and for an epoch (the quickstart does the whole)"
    made = tempfile.mkdtemp # which libraries call with arguments
    monkeypatch.setattr('tempfile.mkdtemp', lambda *args: made(*args) if args else str(tmp_path))
    code = [source(c) for c in cells(nbs_dir/'index.ipynb') if c['cell_type']=='code']
    first = next(i for i,o in enumerate(code) if 'ssl_learner(' in o)
    lines = '\n'.join(code[first-1:first+3])
    for long,short in ('n_train=600', 'n_train=64'), ('n_test=500', 'n_test=48'), \
                      ('pretrain_decoder(8)', 'pretrain_decoder(1)'), ('one_cycle(4', 'one_cycle(1'):
        assert lines.count(long)==1, long
        lines = lines.replace(long, short)
    exec(lines, {})
    assert re.search(r'[\d.]+ before, [\d.]+ after; mAP [\d.]+$', capsys.readouterr().out.strip())
    assert (tmp_path/'enc.safetensors').exists()

def test_readme_links():
    "Every relative link and picture of README.md and CONTRIBUTING.md exists"
    for name in ('README.md','CONTRIBUTING.md'):
        text = re.sub(r'(?s)```.*?```', '', (root/name).read_text(encoding='utf-8'))
        targets = re.findall(r'\]\(([^)\s]+)', text) + re.findall(r'(?:src|href)="([^"]+)"', text)
        missing = [o for o in targets if not re.match(r'[a-z]+:|#', o) and not (root/o.split('#')[0]).exists()]
        assert not missing, f'{name}: {missing}'

@pytest.mark.parametrize('name', ['_quarto.yml', 'nbs/_quarto.yml', 'nbs/sidebar.yml',
                                  '.github/workflows/test.yml', '.github/workflows/docs.yml'])
def test_yaml(name): assert isinstance(yaml.safe_load((root/name).read_text()), dict)

def test_workflow_runs_what_make_test_runs():
    "Notebooks by `nbdev_test`, tests by pytest, both by name"
    steps = yaml.safe_load((root/'.github/workflows/test.yml').read_text())['jobs']['test']['steps']
    ran = ' '.join(o.get('run', '') for o in steps)
    recipe = re.search(r'(?s)^test:.*?\n\n', (root/'Makefile').read_text(), flags=re.M)[0]
    for o in 'nbdev_test','-m pytest tests': assert o in ran and o in recipe, o

def listed(o):
    "The pages named in a sidebar"
    if isinstance(o, str): return [o]
    if isinstance(o, list): return [p for q in o for p in listed(q)]
    return listed(o.get('contents', [])) + ([o['href']] if 'href' in o else [])

settings_of_site = yaml.safe_load((root/'_quarto.yml').read_text())
sidebars = yaml.safe_load((nbs_dir/'sidebar.yml').read_text())['website']['sidebar']

def test_sidebars():
    "Every page is in one of the sidebars, once, and every page that they list exists"
    assert sorted(listed(sidebars))==sorted(ids)

def test_sidebar_of_the_api():
    "It has what the page of all modules links to, in the same order"
    api = next(o for o in sidebars if o['id']=='api')
    linked = re.findall(r'\]\(([\w/]+\.ipynb)\)', '\n'.join(map(source, cells(nbs_dir/'05_all.ipynb'))))
    assert [o for o in listed(api) if o!='05_all.ipynb']==[o for o in dict.fromkeys(linked) if o in listed(api)]

def test_titles_differ():
    "No two pages have the same name"
    titles = [source(cells(nbs_dir/o)[0]).splitlines()[0][2:].lower().removeprefix('the ') for o in ids]
    assert not (same := sorted({t for t in titles if titles.count(t)>1})), same

@pytest.mark.parametrize('page', sorted(o for o in ids if o.startswith('tutorials/')))
def test_tutorials_open_in_colab(page):
    "By a button that names this page, and with a first cell of code that installs the package there"
    there = cells(nbs_dir/page)
    address = f"https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}/blob/main/nbs/{page}"
    assert source(there[1]).endswith(f']({address})')
    assert re.search(r"if 'google.colab' in .*\n    %pip install", source(there[2]))

def test_version_in_the_footer():
    assert settings_of_site['website']['page-footer']['left'].split()[-1]==cfg['version']

def test_navbar():
    "So do the links in the bar at the top"
    bar = settings_of_site['website']['navbar']
    hrefs = [o['href'] for side in ('left','right') for o in bar.get(side,[])]
    assert not [o for o in hrefs if not o.startswith('http') and o not in ids]

@pytest.fixture(scope='module')
def site(forked, tmp_path_factory):
    "What nbdev hands to Quarto, made from a copy of the repository"
    top = tmp_path_factory.mktemp('site')/'top'
    copy_repository(top, '_quarto.yml')
    (top.parent/'proc.py').write_text('from nbdev.serve import proc_nbs\n'
        'proc_nbs(n_workers=0)') # as nbdev_proc_nbs, which would install Quarto
    r = forked(top.parent/'proc.py', cwd=top)
    why = re.search(r'(?s)Error in notebook.*?(?="""|\n\n)', r.stderr)
    assert r.returncode==0, why[0] if why else r.stderr[-4000:]
    return top/'_proc'

def test_proc_nbs(site):
    "nbdev turns every notebook into a page with a title"
    done = {o.relative_to(site).as_posix() for o in site.rglob('*.ipynb')}
    assert done==set(ids)
    for o in ids:
        c = cells(site/o)[0]
        assert c['cell_type']=='raw' and 'title:' in source(c), o

# What Quarto reads and smalldocs does not
quartos_own = 'output-file','unknown key image','respect-user-color-scheme','format.html.grid','canonical-url','alt.lua'

def smalldocs(*args):
    if not importlib.util.find_spec('smalldocs'): pytest.skip('smalldocs, a Quarto in Python, needs Python 3.11')
    return subprocess.run([Path(sys.executable).parent/'smalldocs', *map(str, args)], text=True, capture_output=True)

def test_links(site):
    "No page links to a page, picture or notebook that does not exist"
    r = smalldocs('check', site)
    problems = [l for l in r.stdout.splitlines() if l.strip() and not any(o in l for o in quartos_own)]
    assert not problems, '\n'.join(problems)
    assert 'page(s)' in r.stderr, r.stderr

@pytest.fixture(scope='module')
def built(site):
    "The site as smalldocs builds it"
    r = smalldocs('render', site)
    assert r.returncode==0, r.stderr
    return site/'_docs'

def test_text_of_the_pages(built):
    "Every picture has an alternative text, no heading skips a level, and no path is one of this machine"
    assert len(pages.pages(built))==len(ids)+1 # and the page for what is not there
    assert not (bad := list(pages.in_text(built))), '\n'.join(bad)

def test_pages_on_a_phone(built):
    "No page scrolls sideways (their widest column is Quarto's, and so is asked of what Quarto builds)"
    if pages.chrome is None: pytest.skip('there is no Chromium or Chrome here')
    some = 'index','tutorials/concepts','tutorials/quickstart','paper/method','paper/evidence','synth/02_callbacks'
    bad = list(pages.on_screen(built, [f'{o}.html' for o in some], ask=['sideways']))
    assert not bad, '\n'.join(bad)

def test_what_hurts_is_found(tmp_path):
    "Each kind of fault in a page is named"
    if pages.chrome is None: pytest.skip('there is no Chromium or Chrome here')
    (tmp_path/'index.html').write_text('<main><h1>A</h1><h3>B</h3><img src="c.png"><p style="color:#eee">D</p>'
        f'<pre style="overflow:auto">{"e"*400}</pre><div style="width:600px">{tmp_path}/</div></main>',
        encoding='utf-8')
    found = '\n'.join([*pages.in_text(tmp_path), *pages.on_screen(tmp_path)])
    for o in ('h3 skips a level: B', 'alternative text: c.png', 'a path of this machine', 'contrast 1.2: D',
              'too long: eee', 'pixels too wide'):
        assert o in found, o

def test_links_to_symbols(site):
    "Names in backticks lead to entries that their pages show"
    shown = set()
    for o in site.rglob('*.ipynb'):
        page = re.search(r'output-file: (\S+)', source(cells(o)[0]))
        if not page: continue
        at = (o.parent.relative_to(site)/page[1]).as_posix()
        code = '\n'.join(source(c) for c in cells(o) if c['cell_type']=='code')
        shown |= {f'{at}#{m.lower()}' for m in re.findall(r'^show_doc\(([\w.]+)', code, re.M)}
    base = f"{cfg['doc_host']}{cfg['doc_baseurl']}/"
    link = re.compile(re.escape(base)+r'([\w/]+\.html#[\w.]+)')
    found = {m for o in site.rglob('*.ipynb') for c in cells(o) for m in link.findall(source(c))}
    assert len(found)>50
    assert not found-shown, f'no show_doc for {sorted(found-shown)}'
