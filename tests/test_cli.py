"The commands as a user meets them: what goes right, and the one sentence for what goes wrong"
import csv, json, sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path
import pytest, torch
from PIL import Image
from conftest import call
from figures import without_figures
from fgsynth.data.finches import finches
from fgsynth.methods.learner import methods
from fgsynth.nets.encoders import create_encoder, load_encoder
from fgsynth.runs.rows import read_runs
from fgsynth.synth.controls import synth_modes
from fgsynth.synth.perturb import MODES

small = '--size 32 --bs 16 --epochs 1 --pretrain_epochs 1 --decoder_width 8 --arch timm/test_byobnet'.split()

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder with one sub-folder for each class, in every kind of image that people have, and two broken files"
    top = tmp_path_factory.mktemp('photos')
    for i,b in enumerate(finches(64, 40, n_species=2, seed=3)):
        d = top/b.species; d.mkdir(exist_ok=True)
        im = Image.fromarray(b.image.permute(1,2,0).numpy())
        mode,ext = [('RGB','jpg'), ('L','png'), ('P','png'), ('CMYK','jpg'), ('RGBA','png'), ('RGB','webp')][i%6]
        im.convert(mode).save(d/f'{i} Vogel ü.{ext}')
    first = sorted(top.glob('*/*.jpg'))[0]
    (first.parent/'cut.jpg').write_bytes(first.read_bytes()[:300])
    (first.parent/'text.jpg').write_text('not an image')
    return top

@pytest.fixture(scope='module')
def trained(photos, tmp_path_factory):
    "A finished run on that folder"
    out = tmp_path_factory.mktemp('runs')/'photos'
    with pytest.MonkeyPatch.context() as m, pytest.warns(UserWarning, match=r'cut\.jpg'):
        call(m, 'fgsynth_train', '--data', photos, *small, '--out', out)
    return out

def test_own_folder(trained, photos, monkeypatch, capsys):
    assert (trained/'report.html').stat().st_size > 50_000
    assert load_encoder(trained/'encoder.safetensors').num_features == 256
    call(monkeypatch, 'fgsynth_eval', trained)
    table = capsys.readouterr().out
    assert 'mAP' in table and (trained/'metrics.csv').exists()

def test_export(trained, monkeypatch, tmp_path, capsys):
    x,enc = torch.rand(3,3,32,32),load_encoder(trained/'encoder.safetensors')
    call(monkeypatch, 'fgsynth_export', trained, '--format', 'exported', '--out', tmp_path/'new/e.pt2')
    with torch.no_grad(): assert torch.allclose(torch.export.load(tmp_path/'new/e.pt2').module()(x), enc(x), atol=1e-4)
    call(monkeypatch, 'fgsynth_export', trained, '--out', tmp_path/'e.pth')
    import timm
    written = torch.load(tmp_path/'e.pth', weights_only=True)
    timm.create_model('test_byobnet', num_classes=0).load_state_dict(written, strict=True)
    assert 'e.pth' in capsys.readouterr().out
    for args,words in (([trained,'--format','onxx'], "did you mean 'onnx'"), ([tmp_path], 'no finished run'),
                       ([trained,'--out',trained/'encoder.safetensors'], "run's own")):
        with pytest.raises(SystemExit) as e: call(monkeypatch, 'fgsynth_export', *args)
        assert words in str(e.value)

def test_export_to_a_folder(trained, monkeypatch, tmp_path, capsys):
    "The encoder with its card; what was measured is in it, and no path of this machine"
    if not (trained/'metrics.csv').is_file(): call(monkeypatch, 'fgsynth_eval', trained)
    call(monkeypatch, 'fgsynth_export', trained, '--to', tmp_path/'own', '--license', 'mit')
    x,enc = torch.rand(3,3,32,32),load_encoder(trained/'encoder.safetensors')
    import timm
    net = timm.create_model(f'local-dir:{tmp_path}/own', pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(create_encoder(f'local-dir:{tmp_path}/own').eval()(x), enc(x), atol=1e-5)
        assert torch.allclose(net((x-enc.mean)/enc.std), enc(x), atol=1e-4)
    card = (tmp_path/'own/README.md').read_text(encoding='utf-8')
    assert 'license: mit' in card and str(trained.parent) not in card and '/tmp' not in card
    with open(trained/'metrics.csv', newline='', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    for row in rows: assert f"| {row['method']} |" in card and f"{float(row['map']):.1f}" in card
    capsys.readouterr()
    for args,words in ((['--to','hub'], '--to hub USER/NAME'), (['--to','hub','a','b'], '--to hub USER/NAME'),
                       (['--to',trained], 'something else than an encoder'), (['--to','x','--size','32'], 'leave out')):
        with pytest.raises(SystemExit) as e: call(monkeypatch, 'fgsynth_export', trained, *args)
        assert words in str(e.value)

def test_flat_folder_trains_but_cannot_be_evaluated(photos, tmp_path, monkeypatch, undrawn):
    flat = tmp_path/'flat'; flat.mkdir()
    for i,f in enumerate(sorted(photos.glob('*/*.png'))): (flat/f'{i}.png').write_bytes(f.read_bytes())
    call(monkeypatch, 'fgsynth_train', '--data', flat, *small, '--synth', 'none', '--out', tmp_path/'run')
    with pytest.raises(SystemExit) as e: call(monkeypatch, 'fgsynth_eval', tmp_path/'run')
    assert 'no labels' in str(e.value)

# Figures are drawn from tensors that look the same for every method and mode, but for DINO's smaller views and the
# noise within a class; `trained` draws those of MoCo v2 and both noises
drawn = {('within','mocov2'), ('both','dino')}

# A method meets a mode where it explains features ('both' and 'cam'); other modes differ in the images of the pair
@pytest.mark.parametrize('synth,method', [*product(synth_modes, ['mocov2']), ('cam','simsiam'),
                                          *product(['both'], sorted(set(methods)-{'mocov2'}))])
def test_every_method_and_mode(synth, method, photos, tmp_path, monkeypatch):
    larger = ['--size', 64] if method=='lewel' else [] # whose cells are to be as long as its features
    with nullcontext() if (synth,method) in drawn else without_figures():
        call(monkeypatch, 'fgsynth_train', '--data', photos, *small, *larger, '--method', method, '--synth', synth,
             '--out', tmp_path/'run')
    assert (tmp_path/'run/synth.safetensors').exists() == (synth in (*MODES, 'within'))

def test_pairs_of_the_paper(photos, tmp_path, monkeypatch, undrawn):
    pairs = '--residual 0 --augment none --anchor rec --norm rank --distance .01 --update frozen --max_pairs 8'.split()
    call(monkeypatch, 'fgsynth_train', '--data', photos, *small, *pairs, '--out', tmp_path/'run')
    s = json.loads((tmp_path/'run/settings.json').read_text())
    given = dict(residual=0, augment='none', anchor='rec', norm='rank', distance=.01, update='frozen', max_pairs=8)
    assert {k:s[k] for k in given}==given

def test_preset_and_dry_run(photos, tmp_path, monkeypatch, capsys, undrawn):
    "A preset fills in what the command leaves out, even where the command says what the default is"
    mine,args = tmp_path/'my.toml', ['--data', photos, '--bs', 16, '--out', tmp_path/'run']
    mine.write_text('# Mine\nbase = "smoke"\nlam = 0.25  # a guess\nepochs = 7\nbs = 2\n')
    call(monkeypatch, 'fgsynth_train', '--preset', mine, *args, '--dry_run')
    said = capsys.readouterr().out
    for words in 'training: 7 epochs of 3 steps','decoder:  1 epochs of 3 steps','GB': assert words in said
    assert not (tmp_path/'run').exists()
    call(monkeypatch, 'fgsynth_train', '--preset', mine, *args, '--epochs', 5, '--synth', 'none') # 5 is the default
    s = json.loads((tmp_path/'run/settings.json').read_text())
    assert (s['epochs'], s['lam'], s['bs'], s['arch'], s['size']) == (5, .25, 16, 'timm/test_byobnet', 32)
    assert f'<td>lam</td><td>0.25</td><td>{mine}: a guess</td>' in (tmp_path/'run/report.html').read_text()
    call(monkeypatch, 'fgsynth_train', '--preset', mine, *args, '--epochs', 5, '--synth', 'none', '--resume')
    assert 'is complete' in capsys.readouterr().out
    for name,words in (('smock', "did you mean 'smoke'"), (tmp_path/'none.toml', 'no preset')):
        bad = ['--preset', name, *args[:-1], tmp_path/'new']
        with pytest.raises(SystemExit) as e: call(monkeypatch, 'fgsynth_train', *bad)
        assert words in str(e.value)

def test_table(photos, tmp_path, monkeypatch, capsys):
    (tmp_path/'small.toml').write_text('base = "smoke"\nbs = 16\n')
    out = tmp_path/'results/runs.csv'
    args = ['tau', '--data', photos, '--preset', tmp_path/'small.toml', '--seeds', 1, '--out', out]
    call(monkeypatch, 'fgsynth_table', *args, '--dry_run')
    assert '3 to do' in capsys.readouterr().out and not out.exists()
    call(monkeypatch, 'fgsynth_table', *args)
    assert list(read_runs(out).tau) == ['0.453','0.905','1.81']
    call(monkeypatch, 'fgsynth_table', *args)
    assert '0 to do' in capsys.readouterr().out
    out.write_text('a,b\n1,2\n')
    for bad,words in (([*args], 'lacks the columns'), (['sigma', *args[1:]], "did you mean 'sigma_")):
        with pytest.raises(SystemExit) as e: call(monkeypatch, 'fgsynth_table', *bad)
        assert words in str(e.value)

def wrong(tmp, photos, trained):
    "Arguments of fgsynth_train that cannot work, and words of the sentence that says so"
    (tmp/'empty').mkdir(); (tmp/'file').write_text('x'); torch.save(torch.nn.Linear(2,2).state_dict(), tmp/'other.pth')
    few = tmp/'few'; few.mkdir()
    for f in sorted(photos.glob('*/*.png'))[:5]: (few/f.name).write_bytes(f.read_bytes())
    return [(['--data','gtsbr'], "did you mean 'gtsrb'"), (['--data',tmp/'nowhere'], 'nowhere'),
        (['--data',tmp/'empty'], 'empty'),
        (['--data','gtsrb','--path',tmp/'nowhere'], 'nowhere'), (['--data','cub200','--path',tmp/'empty'], 'images'),
        (['--arch','resnet81'], "did you mean 'resnet"), (['--method','mocov3'], "did you mean 'mocov2'"),
        (['--synth','bth'], "did you mean 'both'"),
        (['--size','16'], '32'), (['--size','-1'], '--size'), (['--epochs','0'], '--epochs'), (['--bs','0'], '--bs'),
        (['--sigma_cam','-1'], 'from 0 up'),
        (['--data',few,'--bs','16'], '16'), (['--weights',tmp/'nothing.pth'], 'nothing.pth'),
        (['--weights',tmp/'other.pth'], 'do not fit'), (['--weights',tmp/'file'], 'cannot be read'),
        (['--out',trained], 'already holds another run'), (['--out',tmp/'empty/../few'], 'not empty'),
        (['--out',tmp/'file'], 'is a file')]

def test_one_sentence_for_every_mistake(tmp_path, photos, trained, monkeypatch):
    for args,words in wrong(tmp_path, photos, trained):
        out = [] if '--out' in args else ['--out', tmp_path/'out']
        data = [] if '--data' in args else ['--data', photos]
        with pytest.raises(SystemExit) as e: call(monkeypatch, 'fgsynth_train', *data, *[a for a in small], *args, *out)
        said = str(e.value.code)
        assert words in said and said.startswith('fgsynth_train: ') and '\n' not in said, (args, said)
        assert not (tmp_path/'out').exists(), f'{args} left a folder behind'

def test_explosion(tmp_path, photos, monkeypatch):
    "A learning rate without measure ends in a sentence, and in no files that look like results"
    with pytest.raises(SystemExit) as e:
        call(monkeypatch, 'fgsynth_train', '--data', photos, *small, '--lr', 1e30, '--out', tmp_path/'run')
    said = str(e.value.code)
    assert 'was not finite at step' in said and said.startswith('fgsynth_train: ') and '\n' not in said, said
    assert not (tmp_path/'run/encoder.safetensors').exists()

def test_exit_code_and_no_traceback(forked, tmp_path):
    "As a process of its own: a sentence on stderr, nothing else, and an exit code"
    r = forked(Path(sys.executable).parent/'fgsynth_eval', tmp_path)
    assert r.returncode==1 and 'no finished run' in r.stderr and 'Traceback' not in r.stderr

def test_a_warning_is_a_sentence(tmp_path, forked):
    "Without the file and line that Python puts in front; what libraries say about each other is left out"
    (tmp_path/'odd.py').write_text("import argparse, warnings\nfrom fgsynth.cli import run_command\n"
        "warnings.simplefilter('ignore')\nfor o in UserWarning,RuntimeWarning: warnings.simplefilter('default', o)\n"
        "def f():\n    'Warns'\n"
        "    warnings.warn('One image is odd.')\n    warnings.warn('old', FutureWarning)\n"
        "    warnings.warn('strange', RuntimeWarning)\nrun_command(f, 'fgsynth_data', argparse.ArgumentParser())")
    r = forked(tmp_path/'odd.py'); said = r.stderr.splitlines()
    assert r.returncode==0, r.stderr
    assert said[0]=='fgsynth_data: One image is odd.' and said[1].endswith('RuntimeWarning: strange'), said
    assert not any('old' in l for l in said), said
