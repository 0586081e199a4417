"Folders in the layouts in which people have them: which images are trained on, which labels are kept, what is said"
import json
from collections import Counter
import pytest
from PIL import Image
from conftest import call
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.data.finches import finches
from fgsynth.data.folders import is_run, list_images
from fgsynth.data.readers import read_cars
from fgsynth.runs.report import write_report
from tiny import caught, save, write

def lay(d, *files):
    "Images at these places; `{a,b}` in a name stands for one of each"
    for f in files:
        if '{' not in f: save(d/f'{f}.png'); continue
        head,_,rest = f.partition('{'); inner,_,tail = rest.partition('}')
        lay(d, *[head+o+tail for o in inner.split(',')])
    return d

def told(d):
    "Files with their labels for training and testing, what was warned of, and the sentence about the layout"
    items,ws = caught(lambda: get_dataset(d))
    def part(split):
        y = items.labels(split)
        names = [f.relative_to(d).as_posix()[:-4] for f in getattr(items, split)]
        return dict(zip(names, [items.classes[i] for i in y] if y is not None else [None]*len(names)))
    return part('train'), part('test'), ws, items.about

# Training and test folders

pairs = [('train','test'), ('Train','Test'), ('TRAIN','TEST'), ('training','testing'), ('Training','Validation'),
         ('train','val'), ('train','valid'), ('train_set','test_set'), ('training_set','test_set'), ('trainA','testA'),
         ('train_images','test_images'), ('train2017','val2017'), ('cars_train','cars_test'), ('seg_train','seg_test'),
         ('ISIC-2017_Training_Data','ISIC-2017_Test_v2_Data'), ('my train','my dev')]

@pytest.mark.parametrize('train,test', pairs)
def test_test_images_are_never_trained_on(tmp_path, train, test):
    lay(tmp_path, f'{train}/{{a,b}}/{{1,2}}', f'{test}/{{a,b}}/3')
    trained,tested,ws,about = told(tmp_path)
    assert trained=={f'{train}/{c}/{i}':c for c in 'ab' for i in (1,2)}
    assert tested=={f'{test}/{c}/3':c for c in 'ab'}
    assert ws==[] and train in about and test in about and 'classes by folder' in about

@pytest.mark.parametrize('files', [
    ('images/train/{a,b}/1', 'images/test/{a,b}/3'), ('train/images/{a,b}/1', 'test/images/{a,b}/3'),
    ('{a,b}/train/1', '{a,b}/test/3'), ('x/y/Training/{a,b}/1', 'x/y/Testing/{a,b}/3'),
    ('training_set/training_set/{a,b}/1', 'test_set/test_set/{a,b}/3')], ids=lambda o: o[0])
def test_split_is_found_at_any_depth(tmp_path, files):
    trained,tested,ws,_ = told(lay(tmp_path, *files))
    assert Counter(trained.values())==dict(a=1, b=1)==Counter(tested.values())
    assert all(o.endswith('3') for o in tested) and ws==[]

def test_val_beside_test_is_not_used_and_that_is_said(tmp_path):
    trained,tested,ws,about = told(lay(tmp_path, 'train/{a,b}/1', 'val/{a,b}/2', 'test/{a,b}/3'))
    assert {*trained, *tested}=={f'{s}/{c}/{i}' for s,i in (('train',1),('test',3)) for c in 'ab'}
    assert ws==[] and 'not used: 2 in val' in about

def test_images_beside_the_split_are_not_used_with_a_warning(tmp_path):
    trained,tested,ws,_ = told(lay(tmp_path, 'train/{a,b}/1', 'test/{a,b}/3', 'extra/5', '6'))
    assert not {'extra/5','6'} & {*trained, *tested}
    assert len(ws)==1 and '(2)' in ws[0] and 'extra/5.png' in ws[0]

@pytest.mark.parametrize('files', [('{cat,dog}/{1,2}', 'test/{3,4}'), ('{1,2}', 'Test/{3,4}'),
                                   ('{cat,dog}/1', 'cat/test/3', 'dog/testing/4'), ('{1,2}', 'a/b/test/{3,4}')],
                         ids=lambda o: o[-1])
def test_a_test_folder_among_others_is_not_trained_on(tmp_path, files):
    trained,tested,ws,_ = told(lay(tmp_path, *files))
    assert {o[-1] for o in tested}=={'3','4'} and not any(o[-1] in '34' for o in trained)
    assert 'for testing only' in ws[0]

def test_nothing_is_trained_on_where_there_are_only_test_images(tmp_path):
    trained,tested,_,about = told(lay(tmp_path, 'Test/{a,b}/1'))
    assert trained=={} and sorted(tested.values())==['a','b'] and 'no training images' in about

@pytest.mark.parametrize('names', ['train,plane,car', 'test_tube,train_station,zoo', 'valid,invalid', 'devil,angel',
                                   'training_shoe,sandal', 'testament,novel', 'Val,Bob'])
def test_classes_that_sound_like_a_split_are_classes(tmp_path, names):
    trained,tested,ws,_ = told(lay(tmp_path, f'{{{names}}}/{{1,2,3,4,5}}'))
    assert {*trained.values()}==set(names.split(',')) and len(tested)==len(names.split(',')) and ws==[]

def test_a_split_named_in_the_path_above_says_nothing(tmp_path):
    trained,tested,*_ = told(lay(tmp_path/'test', '{a,b}/{1,2,3,4,5}'))
    assert (len(trained), len(tested))==(8, 2)

# Labels

@pytest.mark.parametrize('files', ['train/{a,b}/{1,2,3,4,5}', 'images/{a,b}/{1,2,3,4,5}', 'x/images/{a,b}/{1,2,3,4,5}',
                                   'Training/Training/{a,b}/{1,2,3,4,5}'])
def test_class_folders_deeper_down_keep_their_labels(tmp_path, files):
    trained,tested,ws,about = told(lay(tmp_path, files))
    assert Counter(trained.values())==dict(a=4, b=4) and Counter(tested.values())==dict(a=1, b=1)
    assert ws==[] and about=='Understood: classes by folder; a part of each class held out for testing.'

def test_training_images_keep_their_labels_beside_flat_test_images(tmp_path):
    trained,tested,ws,about = told(lay(tmp_path, 'train/{a,b}/1', 'test/{3,4}'))
    assert trained=={'train/a/1':'a', 'train/b/1':'b'} and tested=={'test/3':None, 'test/4':None}
    assert 'no labels' in ws[0] and 'for the training images only' in about

def test_test_images_in_a_folder_that_is_no_class_have_no_labels(tmp_path):
    trained,tested,ws,_ = told(lay(tmp_path, 'train/{a,b}/1', 'test/unknown/{3,4}'))
    assert {*trained.values()}=={'a','b'} and {*tested.values()}=={None} and 'no labels' in ws[0]
    save(tmp_path/'test/a/5.png'); (tmp_path/'test/unknown/3.png').unlink(); (tmp_path/'test/unknown/4.png').unlink()
    assert told(tmp_path)[1]=={'test/a/5':'a'}

def test_test_images_keep_their_labels_beside_flat_training_images(tmp_path):
    trained,tested,_,about = told(lay(tmp_path, 'train/{1,2}', 'test/{a,b}/3'))
    assert {*trained.values()}=={None} and sorted(tested.values())==['a','b']
    assert 'for the test images only' in about
    assert '(of the test images only)' in str(get_dataset(tmp_path))

@pytest.mark.parametrize('files,words', [
    ('{1,2,3}', 'in one folder'), ('a/{1,2,3}', 'in one folder'), ('{x,y}/{a,b}/1', 'folders within folders'),
    ('{a,b,c/d}/1', 'different depths')])
def test_what_is_not_understood_is_said(tmp_path, files, words):
    trained,tested,_,about = told(lay(tmp_path, files))
    assert {*trained.values()}=={None} and not tested and words in about

def test_a_class_of_one_letter_composed_in_two_ways_is_one(tmp_path):
    a,b = 'Bu\u0308ffel','B\u00fcffel'
    trained,tested,ws,_ = told(lay(tmp_path, f'train/{{{a},owl}}/1', f'test/{{{b},owl}}/2'))
    assert {*trained.values()}=={b,'owl'}=={*tested.values()} and ws==[]

def test_names_that_are_no_text_can_be_printed_and_written(tmp_path):
    for c in (b'B\xe4r','Vogel'.encode()):
        try: save(tmp_path/c.decode('utf-8', 'surrogateescape')/'1.png')
        except OSError: pytest.skip('this file system takes only names in UTF-8')
    items = get_dataset(tmp_path)
    assert items.classes==['B\\udce4r','Vogel']; f'{items} {items.classes}'.encode('utf-8')

def test_a_report_holds_any_name(tmp_path):
    assert 'B\\udce4r' in write_report(tmp_path, 'x', dict(data='B\udce4r')).read_text(encoding='utf-8')

def test_cars_need_labels_of_both_splits(tmp_path):
    lay(tmp_path, 'train/{a,b}/1', 'test/3')
    with pytest.raises(InputError, match='one sub-folder per class'): caught(lambda: read_cars(tmp_path))

# Tables

table = 'file,label\n{0},a\n{1},b\n{2},a\n'

def test_table_may_name_whole_paths(tmp_path):
    lay(tmp_path/'photos', '{1,2,3}'); (tmp_path/'link').symlink_to(tmp_path/'photos', target_is_directory=True)
    for top in tmp_path/'photos',tmp_path/'link':
        write(tmp_path/'photos/labels.csv', table.format(*[top/f'{i}.png' for i in (1,2,3)]))
        for d in tmp_path/'photos',tmp_path/'link':
            trained,tested,ws,_ = told(d)
            assert {**trained, **tested}=={'1':'a', '2':'b', '3':'a'} and ws==[]

@pytest.mark.parametrize('there,told_', [('Mu\u0308cke','M\u00fccke'), ('M\u00fccke','Mu\u0308cke')])
def test_table_may_compose_letters_in_another_way(tmp_path, there, told_):
    lay(tmp_path, there, '2', '3'); write(tmp_path/'labels.csv', table.format(f'{told_}.png', '2.png', '3.png'))
    trained,tested,ws,_ = told(tmp_path)
    assert {**trained, **tested}[there]=='a' and ws==[]

def test_table_that_says_two_things_in_two_spellings_is_refused(tmp_path):
    lay(tmp_path, '1', '2')
    write(tmp_path/'labels.csv', table.format('1.png', '2.png', '2.png').replace('2.png,a', f'{tmp_path/"2.png"},a'))
    with pytest.raises(InputError, match='two things'): get_dataset(tmp_path)

def test_table_that_lacks_an_image_leaves_test_images_for_testing(tmp_path):
    lay(tmp_path, 'train/{1,2}', 'test/3'); write(tmp_path/'labels.csv', 'file,label\ntrain/1.png,a\n')
    trained,tested,ws,_ = told(tmp_path)
    assert (set(trained), set(tested))==({'train/1','train/2'}, {'test/3'}) and 'no label for 2' in ws[0]

def test_table_of_the_training_images_alone_keeps_their_labels(tmp_path):
    lay(tmp_path, 'train/{1,2,3}', 'test/{4,5}')
    write(tmp_path/'labels.csv', table.format(*[f'train/{i}.png' for i in (1,2,3)]))
    trained,tested,ws,about = told(tmp_path)
    assert trained=={'train/1':'a', 'train/2':'b', 'train/3':'a'} and tested=={'test/4':None, 'test/5':None}
    assert 'any of the 2 test images' in ws[0] and 'for the training images only' in about

# What fgsynth itself has written

def run_folder(d, **settings):
    "A folder with what a run leaves behind"
    write(d/'settings.json', json.dumps(dict(method='mocov2', synth='both', **settings)))
    lay(d, 'curves', 'views', 'index/x', 'checkpoints/y'); return d

@pytest.mark.parametrize('where', ['runs/last', 'runs/2024/a', '', 'a/run'])
def test_pictures_of_runs_are_no_data(tmp_path, where):
    lay(tmp_path/'photos', '{a,b}/{1,2,3,4,5}')
    if where: run_folder(tmp_path/'photos'/where)
    trained,tested,ws,_ = told(tmp_path/'photos')
    assert len(trained)+len(tested)==10 and ws==[] and {*trained.values()}=={'a','b'}

def test_training_among_the_photos_leaves_the_data_as_they_were(tmp_path, monkeypatch):
    "Folder and names as the commands write them"
    for i,b in enumerate(finches(20, 40, n_species=2, seed=3)):
        (tmp_path/b.species).mkdir(exist_ok=True)
        Image.fromarray(b.image.permute(1,2,0).numpy()).save(tmp_path/b.species/f'{i}.png')
    monkeypatch.chdir(tmp_path)
    before = told(tmp_path)
    call(monkeypatch, 'fgsynth_train', '--data', '.', *'--size 32 --bs 8 --epochs 1 --synth none'.split(),
         '--arch', 'timm/test_byobnet')
    assert (tmp_path/'runs/last/curves.png').is_file() and told(tmp_path)==before

def test_a_run_is_known_by_its_encoder_or_settings(tmp_path):
    write(lay(tmp_path/'old', '1')/'settings.json', '{"data": "x"}'); assert not is_run(tmp_path/'old')
    write(tmp_path/'old/encoder.safetensors', ''); assert is_run(tmp_path/'old')
    for text in '[1]', '{', '"method synth"', '{"method": 1}':
        write(lay(tmp_path/'other', '1')/'settings.json', text)
        assert not is_run(tmp_path/'other') and len(list_images(tmp_path/'other'))==1

def test_a_folder_of_decoded_images_is_no_class(tmp_path):
    lay(tmp_path, '{a,b}/{1,2,3}'); write(tmp_path/'cache/0a_64.u8', '')
    assert told(tmp_path)[2]==[]

def test_a_run_in_place_of_data_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match='holds a run'): get_dataset(run_folder(tmp_path))
