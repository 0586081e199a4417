"What an export refuses, in one sentence, and that nothing wrong is left behind"
import sys
import pytest, torch
from fgsynth.core import InputError
from fgsynth.nets.encoders import create_encoder
from fgsynth.own import export
from fgsynth.own.export import export_encoder

@pytest.fixture(scope='module')
def enc():
    torch.manual_seed(0)
    return create_encoder('timm/test_byobnet').eval()

@pytest.mark.parametrize('name,kw,words', [
    ('a.xyz', {}, 'does not say a format'),
    ('a.bin', dict(format='onx'), "did you mean 'onnx'"),
    ('a.pt2', {}, 'give size=')])
def test_what_a_request_lacks_is_one_sentence(enc, tmp_path, name, kw, words):
    with pytest.raises(InputError, match=words): export_encoder(enc, tmp_path/name, **kw)

def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises(InputError, match='no finished run'): export_encoder(str(tmp_path), tmp_path/'a.onnx', size=64)

def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(InputError, match='no encoder file'): export_encoder(f'{tmp_path}/none', tmp_path/'a.pth')

def test_missing_packages_are_told(enc, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(InputError, match=r"pip install 'fgsynth\[onnx\]'"):
        export_encoder(enc, tmp_path/'b.onnx', size=64)

def test_a_file_that_computes_something_else_does_not_survive(enc, tmp_path, monkeypatch):
    def write_nonsense(enc, path, size):
        path.write_text('x')
        return lambda x: 1.01*enc(x)
    monkeypatch.setitem(export._writers, 'exported', write_nonsense)
    with pytest.raises(RuntimeError, match='other features'): export_encoder(enc, tmp_path/'c.pt2', size=64)
    assert not list(tmp_path.glob('c*'))

def test_a_token_is_never_printed(tmp_path, monkeypatch):
    "Neither of a name that is one, nor of an error that repeats it"
    from fgsynth.own.hub import upload
    class Api:
        def __init__(self, **kw): pass
        def create_repo(self, name, **kw):
            raise OSError('401 for token hf_abcDEF123')
    monkeypatch.setattr('huggingface_hub.HfApi', Api)
    with pytest.raises(InputError, match='failed') as e: upload(tmp_path, 'hf_secretNAME')
    assert 'abcDEF' not in str(e.value) and 'secret' not in str(e.value)

@pytest.mark.parametrize('text,words', [
    ('{}', 'something else'), ('{"architecture": "resnet18"}', 'something else'), ('not json', 'no config.json'),
    ('{"architecture": "nonesuch", "mean": [0,0,0], "std": [1,1,1]}', 'no architecture')])
def test_a_folder_that_is_no_encoder_is_told(tmp_path, text, words):
    (tmp_path/'config.json').write_text(text, encoding='utf-8')
    with pytest.raises(InputError, match=words): create_encoder(f'local-dir:{tmp_path}')

def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(InputError, match='no config.json'): create_encoder(f'local-dir:{tmp_path}/none')
