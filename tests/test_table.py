"Experiments: what a run is, the file of runs, and differences between configurations"
import random
import pytest, pandas as pd
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.evaluate.measures import evaluate
from fgsynth.runs import rows as experiments_room
from fgsynth.runs.compare import differences, means, measure_names, paired, runs_of, summary
from fgsynth.runs.presets import Settings, preset_names
from fgsynth.runs.rows import find_runs, read_runs, row_key, run_columns
from fgsynth.runs.table import experiments, table, vary, wanted_runs
from fgsynth.runs.tournament import competitor, measure_ceiling, next_trial
from fgsynth.runs.train import fit_run, make_learner

@pytest.fixture(scope='module')
def items(): return get_dataset('finches', n_train=128, n_test=64, size=32)

@pytest.fixture(scope='module', autouse=True)
def trial(items):
    "A small experiment on a small flock"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(experiments_room, 'run_items', lambda *args: items)
        m.setitem(experiments, 'trial', vary('synth', 'none', 'cam'))
        yield

@pytest.fixture(scope='module')
def runs(trial, tmp_path_factory):
    "Its rows, from two seeds"
    return table('trial', data='finches', seeds=2, preset='smoke', out=tmp_path_factory.mktemp('results')/'runs.csv')

def test_rows_of_an_experiment_are_by_seed_and_whole(runs):
    assert [list(runs.synth), list(runs.seed)]==[['none','cam']*2, ['0','0','1','1']]
    assert list(runs.columns)==run_columns
    measures = ('seconds cpu_seconds top1_100 top1_50 top1_20 rank1 rank5 map '
                'rank1_gallery map_gallery knn feat_std').split()
    assert runs[measures].notna().all(None)
    assert list(runs.decoded_top1.notna())==[False,True]*2
    assert (runs.cpu_seconds>.01).all()

def test_a_row_is_that_of_the_same_run_by_hand(runs, items):
    s = Settings.from_preset('smoke', data='finches', synth='none', seed=1)
    learn = make_learner(items, s)
    with learn.no_bar(), learn.no_logging(): fit_run(learn, s)
    again = evaluate(learn.model.encoder, items, 32, seed=1)
    for k in 'top1_20','map': assert float(f'{again[k]:.5g}')==pytest.approx(runs.iloc[2][k], abs=1e-6)

def test_a_file_that_is_older_than_a_setting(runs, tmp_path):
    "Its runs had the default, and the next row brings the column"
    old = tmp_path/'runs.csv'
    later = ['decoder_draw','decoder_grid','schedule','layer_decay','resize','crop','budget','cpu_seconds']
    runs.iloc[:3].drop(columns=later).to_csv(old, index=False)
    smoke = Settings.from_preset('smoke', data='finches', synth='cam', seed=0)
    assert len(find_runs(read_runs(old), smoke))==1
    again = table('trial', data='finches', seeds=2, preset='smoke', out=old)
    assert list(again.top1_20)[:3]==list(runs.top1_20)[:3]
    assert [list(read_runs(old).columns), list(pd.read_csv(old).columns)]==[run_columns, run_columns]
    assert len(read_runs(old))==4

def test_a_file_without_a_column_that_matters(runs, tmp_path):
    runs.drop(columns='tau').to_csv(tmp_path/'no_tau.csv', index=False)
    with pytest.raises(InputError, match='lacks the columns tau'): read_runs(tmp_path/'no_tau.csv')

def test_an_interrupted_experiment_keeps_its_rows(runs, tmp_path, monkeypatch):
    "What was measured before the interruption is not measured again"
    out,measure,seen = tmp_path/'runs.csv',experiments_room.measure_run,[]
    def interrupted(*args):
        if seen: raise KeyboardInterrupt
        seen.append(1)
        return measure(*args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(experiments_room, 'measure_run', interrupted)
        table('trial', data='finches', seeds=1, preset='smoke', out=out)
    one = read_runs(out)
    assert len(one)==1 and one.iloc[0].top1_20==runs.iloc[0].top1_20

def test_what_the_command_refuses(runs):
    for f,words in ((lambda: table('headlines'), "did you mean 'headline'?"),
                    (lambda: table('headline', preset='gpu'), 'preset'),
                    (lambda: table('headline', seeds=0), '--seeds is 0'),
                    (lambda: paired(runs[:1], runs[:1], 'map'), 'more --seeds')):
        with pytest.raises(InputError) as e: f()
        assert words in str(e.value)

@pytest.mark.parametrize('name', sorted(experiments))
def test_every_change_is_a_setting(name):
    for change in experiments[name]: assert Settings(**change)
    assert len(wanted_runs(name, range(3), 'cpu'))==3*len(experiments[name])

@pytest.mark.parametrize('name', preset_names())
def test_presets_work_with_experiments(name):
    s, = wanted_runs('start', [7], name, data='gtsrb')
    assert (s.seed, s.data, s.epochs, s.synth)==(7, 'gtsrb', 0, 'none')

def test_rows_of_earlier_versions_are_found():
    "The keys of the rows in results/runs.csv, as they were always written"
    runs = read_runs()
    for synth in 'none','both','random':
        assert len(runs_of(runs, data='gtsrb', synth=synth, keep=1., pretrain_bs=64))>=5, synth

def test_the_key_of_a_run():
    "Column by column, with the text that has always stood there"
    key = row_key(Settings(synth='both', distance=.03, max_pairs=None, residual=False))
    expected = dict(sigma_cam='3', distance='0.03', max_pairs='', residual='0', momentum='0.999', beta='0',
                    absolute='0', decoder_lr='0.001', tau='0.905', pretrained='0')
    assert {k:key[k] for k in expected}==expected
    assert row_key(Settings(method='simsiam'))['momentum']=='' and row_key(Settings(synth='within'))['tau']==''
    assert set(key)<set(run_columns)

def test_headings_say_gallery():
    assert [measure_names[k] for k in ('rank1_gallery','map_gallery')]==['rank-1, gallery','mAP, gallery']

def test_a_clear_difference_is_bold():
    none = pd.DataFrame(dict(seed=list('012'), map=[1.,2.,3.]))
    assert differences(none.assign(map=[2.,3.,4.1]), none, dict(map='mAP'))['mAP'].startswith('**+1.0 (')
    assert not differences(none.assign(map=[2.,4.,3.]), none, dict(map='mAP'))['mAP'].startswith('**')
    assert means(none[:1], dict(map='mAP'))=={'mAP':'1.0'}

def test_a_summary_compares_only_what_shares_two_seeds(runs):
    assert list(summary(runs).index)==['none','cam','cam - none']
    assert list(summary(runs[:2]).index)==['none','cam']

# the tournament

def test_the_winner_of_a_search_is_that_of_a_full_comparison(tmp_path):
    "Three rates, and faster heads at the best of them, whatever the order in which they are good"
    rng,s = random.Random(3),competitor('byol', 'smoke', data='finches')
    for _ in range(20):
        goodness,rows = {},[]
        trial,over = next_trial(s, frame(rows))
        while not over:
            goodness[trial.lr,trial.head_mult] = good = rng.random()
            rows.append(dict(row_key(trial, 'validation'), top1_100=good, top1_20=2*good, map=-good))
            trial,over = next_trial(s, frame(rows))
        assert len(goodness)==4 and (trial.lr, trial.head_mult)==max(goodness, key=goodness.get)

def frame(rows): return pd.DataFrame(rows or [dict(row_key(Settings(), 'test'), top1_100=0., top1_20=0., map=0.)])

def test_test_images_choose_nothing():
    "Rows of the same settings on test images are not looked at"
    s = competitor('byol', 'smoke', data='finches')
    tried = [s.changed(lr=float(f'{s.lr*f:.2g}')) for f in (1/3,1,3)]
    rows = [dict(row_key(o, 'test'), top1_100=50., top1_20=0., map=0.) for o in tried]
    trial,over = next_trial(s, frame(rows))
    assert not over and trial.lr==float(f'{s.lr/3:.2g}')

def test_momentum_is_a_setting_of_moco_and_what_stands_in_front_of_it():
    taken = {m:row_key(Settings(method=m, momentum=.5))['momentum'] for m in ('mocov2','lcr','sam_bilinear','byol')}
    assert taken==dict(mocov2='0.5', lcr='0.5', sam_bilinear='0.5', byol='')

@pytest.mark.parametrize('given,said', [(dict(only='mocov3'), "no competitor 'mocov3'"),
                                        (dict(validation=True), 'holds images out by itself')])
def test_a_tournament_that_cannot_be(tmp_path, given, said):
    with pytest.raises(InputError, match=said):
        table('tournament', data='finches', seeds=1, preset='smoke', out=tmp_path/'runs.csv', dry_run=True, **given)

def test_competitors_belong_to_a_tournament(tmp_path):
    with pytest.raises(InputError, match='no competitors'):
        table('trial', data='finches', preset='smoke', out=tmp_path/'runs.csv', only='mocov2')

def test_the_ceiling_learns_from_labels(items):
    "After a few epochs its encoder separates the classes better than one that has seen nothing"
    s = competitor('supervised', 'smoke', data='finches', epochs=8, lr=.1)
    row,start = [measure_ceiling(s.changed(epochs=n), items) for n in (8,0)]
    assert row['top1_100']>start['top1_100']+5 and row['cpu_seconds']>start['cpu_seconds']
    assert row['method']=='supervised'
