"The explorer as a person meets it: in a page without a kernel, and in JupyterLab, both in headless Chromium"
import base64, io, json, os, shutil, socket, subprocess, sys, time, urllib.request, warnings
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from fgsynth.all import *

sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
browsers = 'chromium','chromium-browser','google-chrome','google-chrome-stable'
chrome = next(filter(None, map(shutil.which, browsers)), None)
pytestmark = pytest.mark.skipif(chrome is None, reason='there is no Chromium or Chrome here')
shots = os.environ.get('FGSYNTH_SHOTS') # a folder for screenshots, to be looked at

@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as p:
        args = ['--headless','--no-sandbox','--disable-gpu','--disable-background-networking']
        b = p.chromium.launch(executable_path=chrome, args=args)
        yield b
        b.close()

@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    """What a run with synthesized pairs leaves for the explorer: networks as they are made, which is enough to move
    sliders"""
    out = tmp_path_factory.mktemp('run'); torch.manual_seed(0)
    enc = create_encoder('timm/test_byobnet', size=32); d = enc.num_features
    z = features(enc, torch.rand(64, 3, 32, 32))
    syn = Synthesizer(enc, Decoder(d, 32, 16), Saliency(MLPHead(d, d, 16), kind='neg_cosine'),
                      v=torch.nn.functional.normalize(z, dim=1).std(0), unit=z.std(0).mean())
    syn.save(out/'synth.safetensors')
    torch.save(torch.stack([b.image for b in finches(8, 32, seed=1)]), out/'examples.pt')
    return out

def shot(page, name):
    if not shots: return
    Path(shots).mkdir(exist_ok=True, parents=True)
    page.screenshot(path=Path(shots)/f'{name}.png', full_page=True)

def test_page_without_a_kernel(browser, run_folder, tmp_path):
    """Opened from the disk: sliders by keyboard and mouse move the perturbed images alone, and nothing is fetched from
    anywhere"""
    f = Explorer.from_run(run_folder).to_html(tmp_path/'a page.html')
    assert f.stat().st_size < 3_000_000
    page = browser.new_page(); asked,errors = [],[]
    page.on('request', lambda r: asked.append(r.url)); page.on('pageerror', lambda e: errors.append(e))
    page.goto(f.as_uri())
    def unmoved(): return [o.get_attribute('src') for o in page.locator('img:not(.moving)').all()]
    def moving(): return page.locator('img.moving').get_attribute('src')
    def says(): return page.locator('[aria-live]').inner_text()
    still,slider = unmoved(),page.get_by_label('noise (sigma)')
    seen,said = [moving()],[says()]
    page.keyboard.press('Tab')
    assert slider.evaluate('o => o===document.activeElement') # the first thing that Tab reaches
    page.keyboard.press('Home'); seen.append(moving()); said.append(says())
    assert page.locator('output').inner_text()=='0' and '1.00' in said[-1]
    page.keyboard.press('ArrowRight'); seen.append(moving())
    box = slider.bounding_box()
    page.mouse.click(box['x']+box['width']-2, box['y']+box['height']/2); seen.append(moving()); said.append(says())
    assert page.locator('output').inner_text()=='8'
    page.get_by_label('mode').select_option('random'); seen.append(moving())
    assert len(set(seen))==len(seen) and len(set(said))==len(said)
    assert still==unmoved()
    assert all(o.get_attribute('alt') for o in page.locator('img').all())
    assert page.evaluate("Array.from(document.images).every(o => o.complete && o.naturalWidth>0)")
    assert not errors and not [u for u in asked if not u.startswith(('file:','data:'))]
    shot(page, 'static'); page.close()

def test_each_control_of_a_page_leads_to_its_picture(browser, tmp_path):
    "Strengths apart, threshold, mode and draw: what is shown is what the synthesizer makes of them; a thumb hits them"
    ex = Explorer.from_example(max_n=3)
    f = ex.to_html(tmp_path/'x.html', sigmas=(0,4), sigma_vars=(0,4), taus=(.5,2), modes=('cam','low_var'), seeds=2)
    page = browser.new_page(viewport=dict(width=390, height=800)); page.goto(f.as_uri())
    def shown():
        src = page.locator('img.moving').get_attribute('src').split(',')[1]
        return np.array(Image.open(io.BytesIO(base64.b64decode(src))).convert('RGB')).astype(float)
    def drawn(seed, **kw):
        s = ex.syn(ex.images[:3], seed=seed, **kw)
        whole = [torch.nn.functional.pad(o, (1,1,1,1), value=1.) for o in s.pert]
        return 255*torch.cat(whole, -1).permute(1,2,0).detach().numpy()
    def set_to(**places):
        for name,k in places.items():
            control = page.get_by_label(dict(tau='tau · √d').get(name, name), exact=False)
            if name=='mode': control.select_option(index=k)
            else: control.fill(str(k))
    steps = (dict(sigma_cam=1, sigma_var=0, tau=0, mode=0, seed=0), dict(mode='cam', sigma_cam=4., seed=0)), \
            (dict(seed=1), dict(mode='cam', sigma_cam=4., seed=1)), \
            (dict(mode=1, sigma_var=1), dict(mode='low_var', sigma_var=4., tau=.5, seed=1)), \
            (dict(tau=1), dict(mode='low_var', sigma_var=4., tau=2., seed=1)), \
            (dict(sigma_var=0), dict(mode='low_var', sigma_var=0., tau=2., seed=1))
    expected = [drawn(**kw) for _,kw in steps]
    for i,(places,kw) in enumerate(steps):
        set_to(**places)
        off = [abs(shown()[:len(o)]-o).mean() for o in expected]
        assert off[i]==min(off) and off[i]<6, (kw, off) # WebP loses some
    boxes = [o.bounding_box() for o in page.locator('.controls input, .controls select').all()]
    assert len(boxes)==5 and all(b['height']>=44 for b in boxes) and all(b['width']>=150 for b in boxes)
    assert page.evaluate('document.documentElement.scrollWidth<=390')
    shot(page, 'controls'); page.close()

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@contextmanager
def served(args, folder, env, ready):
    "Inside, Python serves with these arguments; it begins when `ready()` raises no OSError"
    with open(folder/'server.log', 'w') as log:
        p = subprocess.Popen([sys.executable, *map(str, args)], cwd=folder, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            assert p.poll() is None, (folder/'server.log').read_text()[-3000:]
            try: ready(); break
            except OSError: time.sleep(.5)
        yield
    finally: p.terminate(); p.wait(30)

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab server: its address and its folder"
    pytest.importorskip('jupyterlab', reason='JupyterLab is not installed')
    folder,port = tmp_path_factory.mktemp('lab'),free_port()
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'}
    env |= {f'JUPYTER_{k}':str(folder/k.lower()) for k in ('CONFIG_DIR','DATA_DIR','RUNTIME_DIR')}
    env |= {'IPYTHONDIR':str(folder/'ipython'), 'JUPYTERLAB_SETTINGS_DIR':str(folder/'settings')}
    choices = {'notebook-extension/tracker':'{"autoStartDefaultKernel": true}',
               'apputils-extension/notification':'{"fetchNews": "false"}'} # or it asks
    for name,text in choices.items():
        f = folder/f'settings/@jupyterlab/{name}.jupyterlab-settings'; f.parent.mkdir(parents=True); f.write_text(text)
    args = ['--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={port}',
            '--ServerApp.port_retries=0', '--IdentityProvider.token=', '--LabApp.news_url=',
            '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    url = f'http://127.0.0.1:{port}'
    def ready(): urllib.request.urlopen(f'{url}/api', timeout=1)
    with served(['-m', 'jupyterlab', *args], folder, env, ready): yield url,folder

def notebook(path, *cells):
    def cell(i, source):
        return dict(cell_type='code', id=f'c{i}', metadata={}, source=source, outputs=[], execution_count=None)
    meta = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
    cells = [cell(i, c) for i,c in enumerate(cells)]
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=meta, cells=cells)))

def cut(png):
    "A picture of the explorer as an array for each of its rows"
    return np.split(np.array(Image.open(io.BytesIO(png)).convert('RGB')), len(Explorer.rows))

def rows(page):
    "The picture that the widget shows, cut into its rows by name"
    b = page.evaluate("""async () => {
        const r = await fetch(document.querySelector('img.widget-image').src);
        const a = new Uint8Array(await r.arrayBuffer());
        let s = ''; for (const o of a) s += String.fromCharCode(o); return btoa(s) }""")
    return dict(zip(Explorer.rows, cut(base64.b64decode(b))))

def changed(page, before, seconds=30):
    "The rows that differ from `before`, once the picture has come to rest"
    end,last = time.time()+seconds,None
    while time.time()<end:
        now = rows(page)
        diff = {k for k in now if (now[k]!=before[k]).any()}
        if diff and last is not None and all((now[k]==last[k]).all() for k in now): return diff
        last = now; time.sleep(.3)
    return set()

def run_all(page, url, name):
    "Open a notebook in JupyterLab and run all of its cells"
    page.goto(f'{url}/lab/tree/{name}?reset')
    page.get_by_text('(ipykernel) | Idle').wait_for(timeout=120_000)
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_text('Run All Cells', exact=True).click()

def bundle(run_folder):
    "What the explorer hands to a notebook"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return Explorer.from_run(run_folder)._repr_mimebundle_()

def saved_notebook(path, data):
    "A notebook with one output, as a run has left it, and without the state of its widgets"
    notebook(path, 'ex')
    nb = json.loads(path.read_text())
    nb['cells'][0].update(execution_count=1,
                          outputs=[dict(output_type='execute_result', execution_count=1, data=data, metadata={})])
    path.write_text(json.dumps(nb))

fallback = 'img[src^="data:image/png"]'

def is_rows(page):
    "Is the one picture that is shown the explorer's, and visible?"
    img = page.locator(fallback); assert img.count()==1 and img.is_visible()
    w,h = img.evaluate('o => [o.naturalWidth, o.naturalHeight]')
    return w>200 and h%len(Explorer.rows)==0

def test_the_explorer_offers_the_widget_and_the_picture(run_folder):
    "In one output, and without the words that a widget prints of itself"
    data = bundle(run_folder)
    assert set(data)=={'application/vnd.jupyter.widget-view+json','image/png','text/plain'}
    ex = Explorer.from_run(run_folder); ex.widget()
    assert base64.b64decode(data['image/png'])==ex.image.value and 'VBox' not in data['text/plain']

def test_without_a_picture_the_widget_is_still_shown(run_folder, monkeypatch):
    "An exception while drawing stands in the widget, as ever"
    def broken(self): raise RuntimeError('no memory')
    monkeypatch.setattr(Explorer, '_redraw', broken)
    assert set(bundle(run_folder))=={'application/vnd.jupyter.widget-view+json','text/plain'}

def test_exported_notebook(browser, run_folder, tmp_path):
    "An HTML export, which has no kernel and no state of widgets, shows the picture, and fetches nothing to do so"
    nbconvert = pytest.importorskip('nbconvert', reason='nbconvert is not installed')
    saved_notebook(tmp_path/'ex.ipynb', bundle(run_folder))
    body,_ = nbconvert.HTMLExporter().from_filename(str(tmp_path/'ex.ipynb'))
    (tmp_path/'ex.html').write_text(body, encoding='utf-8')
    page = browser.new_page(); page.route('http*://**', lambda r: r.abort()); page.goto((tmp_path/'ex.html').as_uri())
    assert is_rows(page) and 'VBox' not in page.inner_text('body')
    shot(page, 'exported'); page.close()

@pytest.fixture(scope='module')
def opened(browser, run_folder, lab):
    "A stranger's notebook in JupyterLab, after it was run, and whether only the picture was shown before"
    url,folder = lab
    saved_notebook(folder/'ex.ipynb', bundle(run_folder))
    nb = json.loads((folder/'ex.ipynb').read_text())
    nb['cells'][0]['source'] = f'from fgsynth.all import *\nExplorer.from_run({str(run_folder)!r})'
    (folder/'ex.ipynb').write_text(json.dumps(nb))
    page = browser.new_page(viewport=dict(width=1100, height=1300))
    page.goto(f'{url}/lab/tree/ex.ipynb?reset')
    page.locator(fallback).wait_for(timeout=120_000)
    alone = is_rows(page) and not page.locator('.widget-hslider').count() and 'VBox' not in page.inner_text('body')
    shot(page, 'untrusted')
    run_all(page, url, 'ex.ipynb')
    page.locator('img.widget-image').first.wait_for(timeout=180_000)
    yield page,alone
    page.close()

def test_untrusted_notebook(opened):
    "JupyterLab does not run what a stranger's notebook holds, and shows the picture; once the cell is run, the widget"
    page,alone = opened
    assert alone and page.locator('.widget-hslider').count() and not page.locator(fallback).count()

def test_jupyterlab(opened, run_folder):
    """The sigma slider, by keyboard and by mouse, changes the perturbed pictures and not the reconstructed ones;
    another draw too; reset undoes it all"""
    page,_ = opened
    moves = {'perturbed','difference'}
    start = rows(page)
    handle = page.locator('.widget-hslider', has_text='sigma_cam').locator('.noUi-handle')
    handle.focus(); page.keyboard.press('ArrowRight')
    assert changed(page, start)==moves
    before = rows(page)
    box = page.locator('.widget-hslider', has_text='sigma_cam').locator('.noUi-target').bounding_box()
    middle = 'o => { const r = o.getBoundingClientRect(); return [r.x+r.width/2, r.y+r.height/2] }'
    page.mouse.move(*handle.evaluate(middle)); page.mouse.down()
    page.mouse.move(box['x']+.9*box['width'], box['y']+box['height']/2, steps=20) # a burst of moves
    page.mouse.up()
    assert changed(page, before)==moves
    text = page.locator('.widget-hslider', has_text='sigma_cam').locator('.widget-readout').inner_text()
    assert 8 < float(text) < 10
    here = Explorer.from_run(run_folder); here.widget()
    here.controls.sigma_cam.value = float(text) # the last value of the burst is what is shown
    shown = cut(here.image.value)[2]
    assert abs(shown.astype(int) - rows(page)['perturbed']).max() <= 3
    before = rows(page)
    page.get_by_role('button', name='draw again').click()
    assert changed(page, before)==moves
    shot(page, 'jupyterlab')
    before = rows(page)
    page.get_by_role('button', name='reset').click()
    assert changed(page, before)==moves
    assert all((v==start[k]).all() for k,v in rows(page).items())

@pytest.fixture(scope='module')
def app(tmp_path_factory):
    "`fgsynth_explore` without a run: the address that it serves"
    pytest.importorskip('voila', reason='Voilà is not installed')
    folder,port = tmp_path_factory.mktemp('app'),free_port()
    code = 'from fgsynth.commands import fgsynth_explore; fgsynth_explore()'
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'} | {'PYTHONPATH':str(Path(__file__).resolve().parents[1])}
    def ready(): socket.create_connection(('127.0.0.1', port), 1).close() # a request would begin to run the notebook
    args = '-W', 'ignore', '-c', code, '--no_browser', '--port', port
    with served(args, folder, env, ready): yield f'http://127.0.0.1:{port}'

def test_the_app_moves_without_a_notebook(browser, app):
    "The page shows sliders and no code, and without noise the perturbed images are the reconstructed ones"
    page = browser.new_page(viewport=dict(width=1100, height=1300))
    page.goto(app, timeout=180_000)
    page.locator('img.widget-image').first.wait_for(timeout=180_000)
    assert 'Explorer.from' not in page.inner_text('body')
    before = rows(page)
    for i in range(2):
        handle = page.locator('.widget-hslider .noUi-handle').nth(i)
        handle.focus(); page.keyboard.press('Home')
    assert changed(page, before)=={'perturbed','difference'}
    now = {k:v[:,96:].astype(int) for k,v in rows(page).items()}
    assert abs(now['perturbed'] - now['reconstructed']).max()<=1
    shot(page, 'app'); page.close()
