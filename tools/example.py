"""Make the networks that come with fgsynth, and write beside them how they were made and what they are worth:

  python tools/example.py        # a quarter of an hour on one core
"""
import json, time
from hashlib import sha256
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from fastai.basics import *
from fgsynth.all import *
from fgsynth.runs.demo import warm_start

folder = Path(__file__).resolve().parent.parent/'fgsynth'/'example'
arch,size = 'timm/test_byobnet',64

def halve(file):
    "The same file with numbers of 16 bits"
    with safe_open(file, 'pt') as f: about = f.metadata()
    state = {k:v.half() if v.is_floating_point() else v for k,v in load_file(file).items()}
    save_file(state, file, about)
    return file

def make_start():
    "Labels, but of other species than those that will be looked at"
    start = warm_start(arch, size, n=4000, epochs=6)
    return load_encoder(halve(save_encoder(start, folder/'start.safetensors')))

def make_synthesizer(start, items):
    "MoCo v2 with pairs from that start, and a decoder that was trained for long behind the result"
    set_seed(0)
    pairs = synth_pairs(decoder_width=16, decoder_grid=8)
    learn = ssl_learner(ssl_dls(items, size=size, bs=64), start, MoCoV2(momentum=.99), frozen_bn=True, cbs=pairs)
    learn.pretrain_decoder(6)
    learn.fit_one_cycle(4, slice(.001, .03))
    learn.pretrain_decoder(40)
    halve(learn.synthesizer().save(folder/'finches.safetensors'))

def main():
    begin = time.time()
    folder.mkdir(exist_ok=True)
    items = get_dataset('finches', n_train=3000, n_test=2000, size=size)
    start = make_start()
    measures = dict(start=evaluate(start, items, size))
    make_synthesizer(start, items)
    syn = example_synthesizer()
    measures['finches'] = evaluate(syn.encoder, items, size)
    x = float_images(items.test[:500])
    error = F.mse_loss(syn.prepare(x).rec, x)
    about = dict(made_by='python tools/example.py', seconds=round(time.time()-begin), torch=torch.__version__,
                 measures={k:{n:round(m, 1) for n,m in v.items()} for k,v in measures.items()},
                 squared_error=round(error.item(), 5),
                 sha256={f.name:sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob('*.safetensors'))})
    (folder/'about.json').write_text(json.dumps(about, indent=1)+'\n')
    print(json.dumps(about, indent=1))

if __name__=='__main__': main()
