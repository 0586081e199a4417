"What is said about a data set, by `check_data` and by the command fgsynth_data"
import shutil
from pathlib import Path
import pytest
from conftest import call
from fgsynth.data.check import check_data
from fgsynth.data.datasets import data_sets, get_dataset
from tiny import solid, write

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder in which everything is wrong that can be wrong"
    d = tmp_path_factory.mktemp('bad')
    def square(file, c, size=(40,50)):
        im = solid((c,c//2,0), size); im.paste('white', (0,0,20,20))
        (d/file).parent.mkdir(parents=True, exist_ok=True); im.save(d/file)
    for i in range(12): square(f'train/cat/{i}.png', i); square(f'train/dog/{i}.png', 100+i, (60,30))
    for i in range(4): square(f'test/cat/{i}.png', 50+i); square(f'test/dog/{i}.png', 150+i)
    write(d/'train/cat/broken.jpg', 'no image')
    shutil.copy(d/'train/cat/0.png', d/'train/cat/again.png')   # twice
    shutil.copy(d/'train/cat/1.png', d/'train/dog/also.png')    # two labels
    shutil.copy(d/'train/dog/2.png', d/'test/dog/leak.png')     # in both splits
    return d

@pytest.fixture(scope='module')
def check(folder): return check_data(folder, small=14)

@pytest.fixture
def flat(folder, tmp_path):
    "Twelve cats without a label and without fault"
    shutil.copytree(folder/'train/cat', tmp_path/'flat', ignore=shutil.ignore_patterns('broken*', 'again*'))
    return tmp_path/'flat'

def names(check, groups): return [[Path(check.images[s][i]).name for s,i in g] for g in groups]

def test_equal_images_are_found(check):
    assert names(check, check.leaks)==[['2.png','leak.png']]
    assert names(check, check.contradictions)==[['1.png','also.png']]
    assert (check.repeats('train'), check.repeats('test'))==(2,0)

def test_broken_files_and_small_classes_are_found(check):
    assert [f.name for f in check.of('train', 'broken')]==['broken.jpg']; assert check.of('test', 'broken')==[]
    assert check.small_classes==[('dog',13)]

def test_table_counts(check):
    t = check.table()
    assert t.loc['images'].tolist()==['27','9']; assert t.loc['readable'].tolist()==['26','9']
    assert t.loc['width: smallest / median / largest'].tolist()==['40 / 40 / 60','40 / 40 / 60']
    assert t.loc['kinds'].tolist()==['PNG RGB']*2
    assert t.loc['images that the other split has too'].tolist()==['1','1']

def test_each_fault_is_one_finding(check): assert len(check.findings())==5

def test_nothing_is_found_where_nothing_is_wrong(flat):
    check = check_data(flat)
    assert str(check).endswith('Nothing to complain about.')
    assert (check.contradictions, check.small_classes, check.table().loc['classes','train'])==([], [], '-')

def test_images_in_memory_are_compared(folder):
    items = get_dataset('finches', n_train=60, n_test=20, size=32)
    items.test[3] = items.train[7]; check = check_data(items)
    assert check.leaks==[[('train',7),('test',3)]]
    assert len(check.contradictions)==int(items.train_labels[7]!=items.test_labels[3])

def test_split_without_images_is_counted():
    items = get_dataset('finches', n_train=60, n_test=20, size=32)
    items.train = items.train[:0]; items.train_labels = items.train_labels[:0]
    assert check_data(items).table().loc['images'].tolist()==['0','20']

def test_file_that_disappeared_is_found(flat):
    items = get_dataset(flat); items.train[0].unlink()
    assert '1 train image not found' in str(check_data(items))

def test_command_check_prints_the_report(flat, monkeypatch, capsys):
    call(monkeypatch, 'fgsynth_data', 'check', flat)
    assert capsys.readouterr().out==f'{check_data(flat)}\n'

def test_command_list_names_all_data_sets(monkeypatch, capsys):
    call(monkeypatch, 'fgsynth_data', 'list')
    lines = capsys.readouterr().out.splitlines()
    assert [l.split()[0] for l in lines]==list(data_sets)
    assert '5,994 / 5,794' in next(l for l in lines if l.startswith('cub200'))

@pytest.mark.parametrize('args,words', [
    (('check','gtrsb'), "did you mean 'gtsrb"), (('check','gtsrb','{}'), 'GTSRB/Training'),
    (('download','cars','{}/c'), 'jessicali9530'), (('check','{}/none'), 'does not exist')])
def test_command_says_in_one_sentence_what_is_wrong(flat, monkeypatch, args, words):
    with pytest.raises(SystemExit, match=words): call(monkeypatch, 'fgsynth_data', *[o.format(flat) for o in args])
