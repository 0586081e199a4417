"Public data sets in the layouts in which people have them, by name, and their downloads"
import hashlib, pickle, shutil, tarfile
from pathlib import Path
from unittest.mock import patch
import numpy as np, pytest, torch
from scipy.io import savemat
from torchvision.datasets import CIFAR100, FGVCAircraft, GTSRB, StanfordCars
from conftest import root
from fgsynth.core import InputError
from fgsynth.data.datasets import Archive, DOWNLOADS, get_dataset
from fgsynth.data.loaders import ssl_dls
from fgsynth.data.readers import cmc100, signs
from tiny import caught, packed, save, write

# The miniatures have fewer images than were published
pytestmark = pytest.mark.filterwarnings('ignore:.* which has .* do not compare')

def refuses(words, *args, **kwargs):
    "`get_dataset` refuses, and says why"
    with pytest.raises(InputError) as e: get_dataset(*args, **kwargs)
    assert words in str(e.value)

def pairs(items):
    "(split, files, labels) of both splits"
    return ('train',items.train,items.train_labels), ('test',items.test,items.test_labels)

# The embedded data set

@pytest.fixture(scope='module')
def finches(): return get_dataset('finches', n_train=300, n_test=150, size=64)

def test_finches_have_images_labels_and_masks(finches):
    assert finches.train.shape==(300,3,64,64); assert finches.train.dtype==torch.uint8
    assert finches.test.shape==(150,3,64,64); assert finches.train_labels.dtype==torch.int64
    assert finches.train_masks.shape==(300,64,64); assert finches.test_masks.shape==(150,64,64)
    assert len(finches.classes)==8; assert 0<=finches.train_labels.min() and finches.train_labels.max()<8

def test_finches_are_seeded_and_named_in_any_case(finches):
    assert get_dataset('Finches', n_train=300, n_test=150).train.equal(finches.train)
    assert not get_dataset('finches', n_train=300, n_test=150, seed=1).train.equal(finches.train)

def test_no_finch_is_in_both_splits(finches):
    assert not any((o==finches.train).flatten(1).all(1).any() for o in finches.test)

# GTSRB

gtsrb_table = ('Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n' +
               ''.join(f'{i:05}.ppm;36;40;5;5;30;30;{c}\n' for i,c in enumerate((14,42,14))))

@pytest.fixture
def gtsrb(tmp_path):
    "Six training and three test images in torchvision's layout"
    d = tmp_path/'x/gtsrb'
    for c in (0,14,42):
        for i in range(2): save(d/f'GTSRB/Training/{c:05}/00000_{i:05}.ppm')
        write(d/f'GTSRB/Training/{c:05}/GT-{c:05}.csv', 'Filename;ClassId\n')
    for i in range(3): save(d/f'GTSRB/Final_Test/Images/{i:05}.ppm')
    write(d/'GT-final_test.csv', gtsrb_table)
    return d

def test_gtsrb_has_43_signs():
    assert len(signs)==43; assert len(set(signs))==43
    assert [signs[i] for i in (7,8,13,17)]==['speed limit 100 km/h','speed limit 120 km/h','give way','no entry']
    assert [signs[i] for i in (25,33,38,40)]==['road works','turn right ahead','keep right','roundabout']

def test_gtsrb_is_counted(gtsrb):
    _,ws = caught(lambda: get_dataset('gtsrb', gtsrb))
    assert '6 training and 3 test images of gtsrb, which has 26,640 training and 12,630' in ws[0] and len(ws)==1

def test_gtsrb_as_torchvision_reads_it(gtsrb):
    items = get_dataset('gtsrb', gtsrb)
    for split,fs,y in pairs(items):
        ref = GTSRB(gtsrb.parent, split)._samples
        assert sorted(map(str, fs))==sorted(o for o,_ in ref); assert len(fs)==len(y)
    assert items.test_labels.tolist()==[14,42,14]
    named = [items.classes[i] for i in items.train_labels[::2]]
    assert named==['speed limit 20 km/h','stop','end of no overtaking by lorries']

def test_gtsrb_is_found_in_and_below_the_folder(gtsrb):
    items = get_dataset('gtsrb', gtsrb)
    for p in (gtsrb.parent, gtsrb/'GTSRB'): assert get_dataset('gtsrb', p).train_labels.equal(items.train_labels)

def test_gtsrb_needs_its_table(gtsrb, tmp_path):
    write(gtsrb/'GT-final_test.csv', gtsrb_table.replace(';42\n', ';43\n')); refuses("the class '43'", 'gtsrb', gtsrb)
    write(gtsrb/'GT-final_test.csv', 'Filename;Width\n00000.ppm;36\n'); refuses("no column 'ClassId'", 'gtsrb', gtsrb)
    (gtsrb/'GT-final_test.csv').unlink(); refuses('GT-final_test.csv', 'gtsrb', gtsrb)

def test_gtsrb_needs_its_folders(gtsrb, tmp_path):
    save(tmp_path/'pets/cat/1.png'); refuses('GTSRB/Training', 'gtsrb', tmp_path/'pets')
    save(gtsrb/'GTSRB/Training/extra/0.ppm'); refuses('00000 to 00042', 'gtsrb', gtsrb)

def as_archives(d, items, to):
    "The same images in the folders of the official archives"
    shutil.copytree(d/'GTSRB/Training', to/'GTSRB/Final_Training/Images')
    shutil.copytree(d/'GTSRB/Final_Test', to/'GTSRB/Final_Test')
    write(to/'GTSRB/Final_Test/Images/GT-final_test.csv', gtsrb_table)

def as_kaggle(d, items, to):
    "The same images in the folders of Kaggle"
    for s,(_,fs,ys) in zip(('Train','Test'), pairs(items)):
        names = [f'{s}/{y}/{f.stem}.png' if s=='Train' else f'{s}/{f.stem}.png' for f,y in zip(fs,ys)]
        for f in names: save(to/f)
        write(to/f'{s}.csv', 'Width,Height,ClassId,Path\n'+''.join(f'36,40,{y},{f}\n' for f,y in zip(names,ys)))

@pytest.mark.parametrize('lay_out', [as_archives, as_kaggle])
def test_gtsrb_in_other_layouts(gtsrb, tmp_path, lay_out):
    items = get_dataset('gtsrb', gtsrb)
    lay_out(gtsrb, items, tmp_path/'other')
    other = get_dataset('gtsrb', tmp_path/'other')
    def told(o): return o.train_labels.tolist(), o.test_labels.tolist(), [f.stem for f in o.train], o.train_groups
    assert told(other)==told(items)

def test_gtsrb_in_two_layouts_at_once_is_refused(gtsrb, tmp_path):
    as_kaggle(gtsrb, get_dataset('gtsrb', gtsrb), tmp_path/'k')
    (tmp_path/'k/GTSRB/Training').mkdir(parents=True)
    refuses('two sources, GTSRB/Training and Train.csv', 'gtsrb', tmp_path/'k')

def test_gtsrb_paper_takes_all_of_few(gtsrb):
    assert str(get_dataset('gtsrb_paper', gtsrb))==str(get_dataset('gtsrb', gtsrb)).replace('gtsrb:', 'gtsrb_paper:')

# CUB-200-2011

cub_names = ['001.Black_footed_Albatross','002.Sooty_Tern','010.Red_Finch']
cub_files = [f'{n}/{n[4:]}_{i:04}.jpg' for n in cub_names for i in range(3)]

def table(d, file, values): write(d/file, '\n'.join(f'{i+1} {o}' for i,o in enumerate(values))+'\n')

@pytest.fixture
def cub(tmp_path):
    "Nine images of three birds"
    d = tmp_path/'CUB_200_2011'
    for f in cub_files: save(d/'images'/f)
    table(d, 'images.txt', cub_files); table(d, 'classes.txt', cub_names)
    table(d, 'image_class_labels.txt', [1,1,1,2,2,2,3,3,3]); table(d, 'train_test_split.txt', [1,0,1]*3)
    return d

def test_cub_has_its_split_labels_and_names(cub):
    items = get_dataset('cub200', cub.parent)
    assert items.train==[cub/'images'/f for f in cub_files if not f.endswith('1.jpg')]
    assert items.train_labels.tolist()==[0,0,1,1,2,2]
    assert items.test==[cub/'images'/f for f in cub_files if f.endswith('1.jpg')]
    assert items.test_labels.tolist()==[0,1,2]
    assert items.classes==['Black footed Albatross','Sooty Tern','Red Finch']

def test_cub_without_classes_and_labels_is_the_same(cub):
    items = get_dataset('cub200', cub)
    for f in ('classes.txt','image_class_labels.txt'): (cub/f).unlink()
    less = get_dataset('cub200', cub)
    assert less.train_labels.equal(items.train_labels); assert less.classes==items.classes; assert less.test==items.test

def test_cub_refuses_tables_that_disagree(cub):
    table(cub, 'image_class_labels.txt', [1,1,1,2,3,2,3,3,3]); refuses('its label is 010.Red_Finch', 'cub200', cub)

def test_cub_refuses_a_wrong_split(cub):
    table(cub, 'train_test_split.txt', [1,0,2]*3); refuses("not '2'", 'cub200', cub)
    table(cub, 'train_test_split.txt', [1,0]); refuses('do not belong together', 'cub200', cub)
    (cub/'train_test_split.txt').unlink(); refuses('train_test_split.txt', 'cub200', cub)

# Stanford Cars

car_classes = ['Audi A','BMW B','Fiat C']

def annotations(**columns):
    "A structure as MATLAB writes it"
    return np.array([*zip(*columns.values())], dtype=[(k,object) for k in columns])[None]

@pytest.fixture
def cars(tmp_path):
    "Three training and two test images in torchvision's layout"
    d = tmp_path/'stanford_cars'; (d/'devkit').mkdir(parents=True)
    for s,f,cs in (('train','devkit/cars_train_annos.mat',[2,1,3]), ('test','cars_test_annos_withlabels.mat',[3,3])):
        names = [f'{i:05}.jpg' for i in range(len(cs))]
        for n in names: save(d/f'cars_{s}/{n}')
        savemat(d/f, {'annotations':annotations(fname=names, **{'class':cs})})
    savemat(d/'devkit/cars_meta.mat', {'class_names':np.array([car_classes], dtype=object)})
    return d

def labelled(items): return [(f.name.split('_')[-1],int(y)) for _,fs,ys in pairs(items) for f,y in zip(fs,ys)]

def test_cars_as_torchvision_reads_them(cars):
    items = get_dataset('cars', cars.parent)
    for s,fs,y in pairs(items):
        ref = StanfordCars(cars.parent, s)
        assert [(str(f),int(c)) for f,c in zip(fs,y)]==ref._samples; assert items.classes==ref.classes
    assert get_dataset('cars', cars).train_labels.tolist()==[1,0,2]

def test_cars_need_the_labels_of_the_test_images(cars):
    (cars/'cars_test_annos_withlabels.mat').unlink(); refuses('cars_test_annos_withlabels.mat', 'cars', cars)

def one_archive(cars, d):
    "The same images in the layout of the single archive"
    names,labels = zip(*labelled(get_dataset('cars', cars)))
    tested = [0,0,0,1,1]
    paths = [f'car_ims/{t}_{n}' for t,n in zip(tested, names)]
    for o in paths: save(d/o)
    rows = annotations(relative_im_path=paths, **{'class':[y+1 for y in labels]}, test=tested)
    savemat(d/'cars_annos.mat', {'annotations':rows, 'class_names':np.array([car_classes], dtype=object)})
    return d

def put_into_themselves(d):
    "A folder into one of the same name, as Kaggle's archive unpacks them"
    d.rename(d.parent/'x'); d.mkdir(); (d.parent/'x').rename(d/d.name)

@pytest.mark.parametrize('layout', ['labels in devkit', 'folders in themselves', 'one archive'])
def test_cars_in_other_layouts(cars, tmp_path, layout):
    ref,d,table = labelled(get_dataset('cars', cars)),cars,'cars_test_annos_withlabels.mat'
    if layout=='labels in devkit': (d/table).rename(d/'devkit'/table)
    elif layout=='one archive': d = one_archive(cars, tmp_path/'one')
    else:
        for s in ('train','test'): put_into_themselves(d/f'cars_{s}')
    items = get_dataset('cars', d)
    assert labelled(items)==ref; assert items.classes==car_classes

def test_cars_in_class_folders(cars, tmp_path):
    items,d = get_dataset('cars', cars),tmp_path/'car_data/car_data'
    for s,fs,y in pairs(items):
        for f,c in zip(fs,y): save(d/s/items.classes[c]/f.name)
    other = get_dataset('cars', tmp_path/'car_data'); assert (other.name, other.classes)==('cars', items.classes)
    assert sorted(labelled(other))==sorted(labelled(items))
    (d/'devkit').mkdir(); refuses('two sources', 'cars', d)

def test_cars_refuse_what_is_no_mat_file(cars, tmp_path):
    d = one_archive(cars, tmp_path/'one')
    write(d/'cars_annos.mat', 'no mat file'); refuses('cars_annos.mat cannot be read', 'cars', d)

def test_cars_say_where_they_are_found(tmp_path):
    save(tmp_path/'pets/1.png'); refuses('jessicali9530', 'cars', tmp_path/'pets')

# FGVC-Aircraft

@pytest.fixture
def aircraft(tmp_path):
    "Three training and two test images with labels on three levels"
    d = tmp_path/'fgvc-aircraft-2013b/data'
    for i in range(5): save(d/f'images/{i:07}.jpg')
    for level,plural,cs in (('variant','variants',['707-320','A340 200']), ('family','families',['Boeing 707','A340']),
                            ('manufacturer','manufacturers',['Boeing','Airbus'])):
        write(d/f'{plural}.txt', '\n'.join(cs)+'\n')
        write(d/f'images_{level}_trainval.txt', ''.join(f'{i:07} {cs[y]}\n' for i,y in enumerate([0,1,1])))
        write(d/f'images_{level}_test.txt', ''.join(f'{i+3:07} {cs[y]}\n' for i,y in enumerate([1,0])))
    return d

@pytest.mark.parametrize('level', ['variant','family','manufacturer'])
def test_aircraft_as_torchvision_reads_it(aircraft, tmp_path, level):
    items = get_dataset('aircraft', tmp_path, level=level)
    for s,(_,fs,y) in zip(('trainval','test'), pairs(items)):
        ref = FGVCAircraft(tmp_path, s, annotation_level=level)
        assert [str(f) for f in fs]==ref._image_files; assert y.tolist()==ref._labels; assert items.classes==ref.classes

def test_aircraft_refuses_a_level_or_class_that_is_none(aircraft, tmp_path):
    refuses("did you mean 'variant'", 'aircraft', tmp_path, level='varian')
    write(aircraft/'variants.txt', 'A340 200\n'); refuses("names the class '707-320'", 'aircraft', tmp_path)

# ISIC 2017

isic_header = 'image_id,melanoma,seborrheic_keratosis\n'

@pytest.fixture
def isic(tmp_path):
    "Three training images and one for testing, with the masks that lie beside them"
    for s,rows in (('Training',[('a',1,0),('b',0,1),('c',0,0)]), ('Test_v2',[('d',0,0)])):
        for n,*_ in rows:
            for o in (f'{n}.jpg', f'{n}_superpixels.png'): save(tmp_path/f'ISIC-2017_{s}_Data/ISIC_{o}')
        table = isic_header + ''.join(f'ISIC_{n},{m}.0,{k}.0\n' for n,m,k in rows)
        write(tmp_path/f'ISIC-2017_{s}_Part3_GroundTruth.csv', table)
    return tmp_path

def test_isic_takes_three_classes_from_two_columns(isic):
    items = get_dataset('isic2017', isic)
    assert [f.name for f in items.train]==['ISIC_a.jpg','ISIC_b.jpg','ISIC_c.jpg']
    assert items.train_labels.tolist()==[0,1,2]; assert items.test_labels.tolist()==[2]

def test_isic_as_an_archive_unpacks_it(isic):
    d = isic/'ISIC-2017_Training_Data'; put_into_themselves(d)
    assert [f.parent.parent for f in get_dataset('isic2017', isic).train]==[d]*3

def test_isic_needs_its_ground_truth(isic):
    f = isic/'ISIC-2017_Test_v2_Part3_GroundTruth.csv'
    write(f, isic_header+'ISIC_d,1.0,1.0\n'); refuses("('1', '1')", 'isic2017', isic)
    f.unlink(); refuses(f.name, 'isic2017', isic)

# CIFAR-100

def test_cifar_is_read_by_torchvision(tmp_path):
    "torchvision's check of the md5 is set aside for the miniature"
    d,rng = tmp_path/'cifar-100-python',np.random.default_rng(0); d.mkdir()
    raw = {s:rng.integers(0, 255, (n,3072), dtype=np.uint8) for s,n in (('train',4),('test',2))}
    for s,a in raw.items(): (d/s).write_bytes(pickle.dumps({'data':a, 'fine_labels':list(range(len(a)))}))
    (d/'meta').write_bytes(pickle.dumps({'fine_label_names':['apple','aquarium_fish','baby','bear']}))
    refuses('incomplete or damaged', 'cifar100', tmp_path)
    unchecked = dict(train_list=[['train',None]], test_list=[['test',None]], meta={**CIFAR100.meta,'md5':None})
    with patch.multiple(CIFAR100, **unchecked):
        items = get_dataset('cifar100', tmp_path)
    assert items.train.tolist()==raw['train'].reshape(4,3,32,32).tolist(); assert items.test.shape==(2,3,32,32)
    assert items.test_labels.tolist()==[0,1]; assert items.classes[1]=='aquarium fish'

# ImageNet-100

more = cmc100 + [f'n0000000{i}' for i in range(5)]

def imagenet(d, train, val, shards=('train',)):
    "One image for each class, in the folders of the shards in turn"
    for i,c in enumerate(train): save(d/f'{shards[i%len(shards)]}/{c}/{c}_1.JPEG')
    for c in val: save(d/f'{"val" if len(shards)==1 else "val.X"}/{c}/v_{c}.JPEG')
    return d

def test_imagenet100_has_its_usual_classes():
    assert (len(cmc100), len(set(cmc100)), all(len(o)==9 and o[0]=='n' for o in cmc100))==(100, 100, True)

@pytest.mark.parametrize('classes,shards', [(cmc100,('train',)), (cmc100,('train.X1','train.X2')), (more,('train',))],
                         ids=['folders','shards','part of more'])
def test_imagenet100_in_its_layouts(tmp_path, classes, shards):
    items,ws = caught(lambda: get_dataset('imagenet100', imagenet(tmp_path, classes, classes, shards)))
    assert ws==[]
    assert (items.classes, len(items.train), len(items.test))==(sorted(cmc100), 100, 100)
    assert items.test_labels.tolist()==list(range(100))
    assert [f.parent.name for f in items.train]==[items.classes[i] for i in items.train_labels]

def test_imagenet100_with_classes_of_your_own(tmp_path):
    d,mine = imagenet(tmp_path/'net', more[98:], more[98:]),tmp_path/'mine.txt'
    write(mine, 'n00000003 three\nn00000001 one\n')
    assert get_dataset('imagenet100', d, classes=mine).classes==['n00000001','n00000003']
    write(mine, 'n99999999'); refuses('net/train/n99999999', 'imagenet100', d, classes=mine)
    refuses('none.txt', 'imagenet100', d, classes=tmp_path/'none.txt')

def test_imagenet100_warns_of_other_classes(tmp_path):
    _,ws = caught(lambda: get_dataset('imagenet100', imagenet(tmp_path, more[5:], more[5:])))
    assert 'not the usual ones' in ws[0]

def test_imagenet100_does_not_choose_among_unknown_classes(tmp_path):
    refuses('classes=FILE', 'imagenet100', imagenet(tmp_path, more[3:], more[3:]))

def test_imagenet100_needs_both_splits(tmp_path):
    d = imagenet(tmp_path/'net', more[:3], more[:3])
    shutil.rmtree(d/'val'); refuses('net/val', 'imagenet100', d)
    for i in range(3): save(d/f'val/{i}.JPEG')
    refuses('no images in class folders', 'imagenet100', d)
    save(tmp_path/'pets/1.png'); refuses('pets/train', 'imagenet100', tmp_path/'pets')

# Names and options

def test_names_and_paths_are_checked(tmp_path):
    (tmp_path/'void').mkdir(); save(tmp_path/'one.png')
    refuses("did you mean 'cub200'", 'cub20'); refuses("did you mean 'finches'", 'finchs')
    refuses('needs the folder', 'gtsrb')
    for args in (('./nowhere',), (tmp_path/'nowhere',), ('gtsrb',tmp_path/'nowhere')): refuses('does not', *args)
    refuses('no images', 'folder', tmp_path/'void')
    refuses('is a file', 'folder', tmp_path/'one.png'); refuses('is a file', tmp_path/'one.png')

def test_options_are_checked(tmp_path):
    for c in 'ab': save(tmp_path/f'{c}/1.png')
    refuses("no finches option 'n_trian': did you mean 'n_train'", 'finches', n_trian=3)
    refuses('takes no options', 'cub200', tmp_path, seed=3)
    refuses('below 1', tmp_path, test_pct=1.)

# Downloads

@pytest.fixture
def fetch(tmp_path, monkeypatch):
    "A function that downloads an archive with these members; `trusted`: its SHA-256 is the published one"
    def _f(members, trusted=True, name='cub200'):
        archive,u = packed(members),'torchvision.datasets.utils.'
        sha = hashlib.sha256(archive).hexdigest()
        known = [Archive(o.folder, o.url, sha if trusted else o.sha256) for o in DOWNLOADS.get(name, [])]
        if known: monkeypatch.setitem(DOWNLOADS, name, known)
        monkeypatch.setattr(u+'_urlretrieve', lambda url, file, *args, **kwargs: Path(file).write_bytes(archive))
        monkeypatch.setattr(u+'_get_redirect_url', lambda url, **kwargs: url)
        return get_dataset(name, tmp_path/'fetched', download=True)
    return _f

two_birds = {'CUB_200_2011/images.txt':'1 001.A/a.jpg\n2 002.B/b.jpg\n',
             'CUB_200_2011/train_test_split.txt':'1 1\n2 0\n',
             'CUB_200_2011/images/001.A/a.jpg':'', 'CUB_200_2011/images/002.B/b.jpg':''}

def test_download_is_unpacked_and_read(fetch):
    assert str(fetch(two_birds))=='cub200: 1 training and 1 test images; 2 classes: A, B'

def test_download_that_is_another_file_is_removed(fetch, tmp_path):
    with pytest.raises(InputError, match='SHA-256'): fetch(two_birds, trusted=False)
    assert not list((tmp_path/'fetched').iterdir())

@pytest.mark.parametrize('members', [
    {'../evil.txt':'x'}, {'/evil.txt':'x'}, {'CUB_200_2011':'->..', 'CUB_200_2011/evil.txt':'x'}],
    ids=['upwards','absolute','link'])
def test_download_cannot_write_outside_of_its_folder(fetch, tmp_path, members):
    members = {str(tmp_path)+k if k[0]=='/' else k:v for k,v in members.items()}
    with pytest.raises(InputError, match='outside|does not hold'): fetch(members)
    assert all('fetched' in f.parts for f in tmp_path.glob('**/evil.txt'))

def test_download_leaves_tarfile_as_it_was(fetch):
    with pytest.raises(InputError, match='outside'): fetch({'../evil.txt':'x'})
    assert tarfile.TarFile.__dict__.get('extraction_filter')==None

def test_download_that_no_program_can_do_says_where(fetch):
    with pytest.raises(InputError, match='jessicali9530'): fetch({}, name='cars')

# Real data, where it is at hand

def shared(name):
    if not (d := root/'../shared/data'/name).exists(): pytest.skip(f'../shared/data/{name} is absent')
    return d

def test_real_gtsrb():
    "As many images as in the paper"
    d = shared('gtsrb'); items,ws = caught(lambda: get_dataset('gtsrb', d)); assert ws==[]
    assert (len(items.train), len(items.test), len(items.classes))==(4800, 3750, 43)
    assert items.train_labels.unique().tolist()==list(range(43))
    assert items.test_labels.unique().tolist()==list(range(43))
    assert len(set(items.train))==4800; assert all(f.exists() for f in items.test)
    assert get_dataset('gtsrb_paper', d).train==items.train

def test_real_cub():
    "Ten of 200 birds"
    items,ws = caught(lambda: get_dataset('cub200', shared('cub10')))
    assert f'{len(items.train)} training and {len(items.test)} test images of cub200, which has 5,994 training' in ws[0]
    assert '5,994 training and 5,794 test images' in ws[0]
    assert (len(items.train)+len(items.test), len(items.classes))==(294, 10)
    for _,fs,y in pairs(items): assert [int(f.parent.name[:3])-1 for f in fs]==y.tolist()
    x,_ = ssl_dls(items, size=64, bs=32).one_batch(); assert x.shape==(32,3,64,64)
