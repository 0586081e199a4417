"Items and parts of them, and folders of images that become Items"
import pickle
import pytest, torch
from fastcore.foundation import L
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.data.items import Items, hold_out, label_fraction, sample_items
from tiny import blue, caught, green, n_per_class, red, save, write

# Items

@pytest.fixture
def files(tmp_path):
    "Two images, and a file that is none"
    save(tmp_path/'a.png'); save(tmp_path/'b.png'); write(tmp_path/'c.png', 'not an image')
    return Items('squares', L(sorted(tmp_path.glob('*.png'))), L(), None, None)

def test_text_of_unlabelled_items(files):
    assert str(files)=='squares: 3 training and 0 test images; unlabelled'
    assert files.labelled==False

def test_load_decodes_each_size_once(files):
    (a,_),ws = caught(lambda: files.load('train', 32)); assert len(ws)==1
    (b,_),ws = caught(lambda: files.load('train', 32)); assert len(ws)==0; assert a is b
    assert caught(lambda: files.load('train', 40))[0][0].shape[-1]==40

def test_pickled_items_leave_decoded_images_out(files):
    caught(lambda: files.load('train', 32))
    assert '_kept' in files.__dict__
    assert '_kept' not in pickle.loads(pickle.dumps(files)).__dict__

# Parts

@pytest.fixture(scope='module')
def counts():
    "50, 10 and 1 images of three classes"
    labels = torch.tensor([0]*50 + [1]*10 + [2]*1)[torch.randperm(61, generator=torch.Generator().manual_seed(1))]
    return Items('counts', torch.zeros(61,3,32,32).byte(), [], labels, None, ['a','b','c'])

def test_fraction_is_sorted_and_without_repeats(counts):
    fifth = label_fraction(counts, 0.2)
    assert fifth.tolist()==sorted(set(fifth.tolist()))

def test_fraction_keeps_one_image_of_each_class_and_at_most_all(counts):
    assert label_fraction(counts, 1).tolist()==list(range(61))
    assert len(label_fraction(counts, 1e-6))==3

@pytest.mark.parametrize('pct', [0, -1, 1.01])
def test_fraction_must_be_one(counts, pct):
    with pytest.raises(InputError, match='above 0 and at most 1'): label_fraction(counts, pct)

@pytest.fixture(scope='module')
def many():
    "500, 300, 150 and 50 training images, and few test images"
    labels = torch.tensor([0]*500+[1]*300+[2]*150+[3]*50)
    return Items('many', L(range(1000)), L(range(60)), labels, torch.tensor([0,1]*30), list('abcd'),
                 train_groups=[f'{i//10}' for i in range(1000)])

def test_sample_keeps_a_split_that_is_small_enough(many):
    assert sample_items(many, 100, 80, 0, 'some').test==many.test

def test_sample_takes_labels_and_groups_along(many):
    some = sample_items(many, 100, 80, 0, 'some')
    assert some.train_labels.tolist()==many.train_labels[list(some.train)].tolist()
    assert some.train_groups==[f'{i//10}' for i in some.train]

def test_sample_is_seeded_and_without_repeats(many):
    some = sample_items(many, 100, 80, 0, 'some')
    assert len(set(some.train))==100
    assert sample_items(many, 100, 80, 1, 'some').train!=some.train==sample_items(many, 100, 80, 0, 'some').train

def test_held_out_images_keep_their_labels():
    y = torch.tensor([0]*6+[1]*9)
    few = Items('few', torch.arange(15), torch.zeros(0), y, y[:0], ['a','b'], train_groups=[i//3 for i in range(15)])
    held = hold_out(few, 1/3)
    assert held.test_labels.equal(y[held.test])

# Folders

@pytest.fixture
def pets(tmp_path):
    "Ten cats, five dogs and an emu, a note and a hidden file"
    for c,n,color in (('cat',10,red),('dog',5,green),('emu',1,blue)):
        for i in range(n): save(tmp_path/f'pets/{c}/{i:02}.png', color)
    write(tmp_path/'pets/notes.txt', 'not an image'); write(tmp_path/'pets/cat/.hidden.png', '')
    return tmp_path/'pets'

def test_class_folders_give_labels(pets):
    items = get_dataset(pets)
    assert items.classes==['cat','dog','emu']; assert items.name=='pets'
    for fs,y in ((items.train,items.train_labels), (items.test,items.test_labels)):
        assert [f.parent.name for f in fs]==[items.classes[i] for i in y]

def test_hold_out_is_stratified_and_takes_each_image_once(pets):
    items = get_dataset(pets)
    assert n_per_class(items.train_labels, 3)==[8,4,1]; assert n_per_class(items.test_labels, 3)==[2,1,0]
    assert sorted([*items.train, *items.test])==sorted(pets.glob('*/[0-9]*.png'))

def test_hold_out_follows_its_options(pets):
    items = get_dataset(pets)
    assert get_dataset('folder', pets).test==items.test
    assert any(get_dataset(pets, seed=s).test!=items.test for s in range(1,4))
    assert n_per_class(get_dataset(str(pets), test_pct=0.5).test_labels, 3)==[5,3,0]

def test_split_of_folders_is_kept(tmp_path):
    for s,n in (('train',3),('val',2)):
        for c in 'ab':
            for i in range(n): save(tmp_path/f'{s}/{c}/{i}.png')
    items = get_dataset(tmp_path)
    assert [f.parts[-3] for f in items.train]==['train']*6
    assert items.test_labels.tolist()==[0,0,1,1]
    assert items.classes==['a','b']

flat,nested = [f'{i}.PNG' for i in range(4)],[*[f'x{i%2}/y/{i}.png' for i in range(4)], 'z/5.png']

@pytest.mark.parametrize('names', [flat, nested], ids=['flat','nested'])
def test_other_folders_are_unlabelled(tmp_path, names):
    for n in names: save(tmp_path/n)
    items = get_dataset(tmp_path)
    assert (len(items.train), len(items.test), items.train_labels, items.labelled)==(len(names), 0, None, False)

def test_folder_in_order_brings_no_warning(pets): assert caught(lambda: get_dataset(pets))[1]==[]

def test_oversights_bring_one_warning_each(pets):
    (pets/'yak').mkdir(); _,ws = caught(lambda: get_dataset(pets))
    save(pets/'stray.png'); items,ws2 = caught(lambda: get_dataset(pets))
    assert (len(ws), len(ws2), items.labelled)==(1, 1, False)
    assert '1 of the 4 class folders' in ws[0] and 'stray.png' in ws2[0]

def test_archives_are_to_be_unpacked(tmp_path):
    write(tmp_path/'all.zip', '')
    with pytest.raises(InputError, match=r'only archives \(all.zip\)'): get_dataset(tmp_path)

def test_class_without_training_images_brings_a_warning(tmp_path):
    for f in ('train/a/1','train/b/1','test/a/1','test/c/1'): save(tmp_path/f'{f}.png')
    items,ws = caught(lambda: get_dataset(tmp_path))
    assert items.classes==['a','b','c']; assert ws[0].endswith('no training images: c')

# Tables of labels

lines = ['file;label;split', *[f'box {i%2}/{i}.png;{"ab"[i%2]};train' for i in range(4)], '4.png;a;test',
         '5.png;b;test']
rows = [','.join(o.split(';')[:2]) for o in lines]

@pytest.fixture
def shop(tmp_path):
    "Six images; returns a function that writes their table and gives the items and what was warned of"
    for i in range(4): save(tmp_path/f'box {i%2}/{i}.png')
    for i in (4,5): save(tmp_path/f'{i}.png')
    def _f(*lines, encoding='utf-8'):
        (tmp_path/'labels.csv').write_text('\n'.join(lines), encoding=encoding)
        return caught(lambda: get_dataset(tmp_path))
    return _f

def test_table_of_a_spreadsheet(shop):
    items,_ = shop(*lines, encoding='utf-8-sig')
    assert [f.name for f in items.train]==['0.png','2.png','1.png','3.png']
    assert items.train_labels.tolist()==[0,0,1,1]
    assert [f.name for f in items.test]==['4.png','5.png']
    assert items.test_labels.tolist()==[0,1]

def test_table_without_split_is_split(shop):
    items,ws = shop(*rows)
    assert (ws, n_per_class(items.train_labels, 2), n_per_class(items.test_labels, 2))==([], [2,2], [1,1])

def test_table_that_lacks_an_image(shop):
    items,ws = shop(*rows[:-1])
    assert (items.labelled, len(items.train))==(False, 6); assert '1 of 6 images (5.png)' in ws[0]

def test_table_that_names_a_missing_file(shop):
    items,ws = shop(*rows, 'gone.png,a')
    assert items.labelled and '1 of the 7' in ws[0] and 'gone.png' in ws[0]

def test_table_with_backslashes(shop):
    items,ws = shop(*[o.replace('/', '\\') for o in rows])
    assert ws==[]; assert items.labelled

def test_table_with_an_untrained_class(shop):
    _,ws = shop(*[o.replace(';', ',') for o in lines[:-1]], '5.png,c,test')
    assert 'c' in ws[0] and 'no training images' in ws[0]

@pytest.mark.parametrize('bad,words', [
    ([*rows, '4.png,b'], 'two things'), (['name,label', *rows[1:]], "no column 'file'"), ([], "no column 'file'"),
    (['file,label,split', '4.png,a,val'], 'train, test or nothing'), (rows[:1], 'a header and no rows'),
    (['file,label,split', *[o+',train' for o in rows[1:-1]], rows[-1]+','], 'empty for 1 of 6'),
    (['file,label', ',a'], 'names no file')])
def test_table_is_refused(shop, bad, words):
    with pytest.raises(InputError, match=words): shop(*bad)

def test_table_must_be_utf8(shop):
    with pytest.raises(InputError, match='UTF-8'): shop('file,label', '4.png,Bär', encoding='latin1')

def test_table_beside_class_folders_is_refused(tmp_path):
    save(tmp_path/'a/1.png'); save(tmp_path/'b/2.png'); write(tmp_path/'labels.csv', 'file,label\na/1.png,b\n')
    with pytest.raises(InputError, match='two sources'): get_dataset(tmp_path)

def test_table_beside_train_and_test(tmp_path):
    for f in ('train/1','train/2','train/x/3','test/4'): save(tmp_path/f'{f}.png')
    write(tmp_path/'labels.csv', 'file,label\ntrain/1.png,a\ntrain/2.png,b\ntrain/x/3.png,b\ntest/4.png,a\n')
    items,ws = caught(lambda: get_dataset(tmp_path))
    assert items.train_labels.tolist()==[0,1,1]; assert items.test_labels.tolist()==[0]
    assert (ws, [f.name for f in items.test])==([], ['4.png'])
