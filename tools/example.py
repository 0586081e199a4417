"""Make the networks that come with fgsynth, and write beside them what they are worth:

  python tools/example.py        # ten minutes on one core; the start is made anew if its file is deleted
"""
import json
from hashlib import sha256
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from fastai.basics import *
from fgsynth.all import *
from fgsynth.data.drawing import SPECIES, draw_finches
from fgsynth.data.loaders import labelled_dls

folder = Path(__file__).resolve().parent.parent/'fgsynth'/'example'
arch,size = 'timm/test_byobnet',64

def halve(file):
    "The same file with numbers of 16 bits"
    with safe_open(file, 'pt') as f: about = f.metadata()
    state = {k:v.half() if v.is_floating_point() else v for k,v in load_file(file).items()}
    save_file(state, file, about)
    file.chmod(0o644)
    return file

def make_start(n=4000, epochs=6):
    "Labels, but of other species than those that will be looked at"
    y = torch.arange(n)%8
    x,_ = draw_finches(y+8, size, seed=1000)
    items = Items('other finches', x, x[:64], y, y[:64], [s.name for s in SPECIES[8:]])
    set_seed(0)
    start = create_encoder(arch, size=size)
    classifier = nn.Sequential(start, nn.Linear(start.num_features, 8))
    learn = Learner(labelled_dls(items, size=size, bs=64), classifier, loss_func=CrossEntropyLossFlat())
    learn.fit_one_cycle(epochs, 4e-3)
    return load_encoder(halve(save_encoder(start.eval(), folder/'start.safetensors')))

def make_synthesizer(encoder, items):
    "MoCo v2 with pairs that are decoded from an early layer, where a bird has not lost its outline yet"
    set_seed(0)
    noise = dict(sigma_cam=1., sigma_var=1.) # with which one still sees a bird
    pairs = synth_pairs(update='frozen', decoder_width=16, decoder_layer='body.stages.1', **noise)
    learn = ssl_learner(ssl_dls(items, size=size, bs=64), encoder, MoCoV2(momentum=.99), frozen_bn=True, cbs=pairs)
    learn.pretrain_decoder(24, lr=2e-3, bs=64)
    learn.fit_one_cycle(2, slice(.0003, .01))
    learn.pretrain_decoder(6, lr=5e-4, bs=64) # for the encoder as it is now
    halve(learn.synthesizer().save(folder/'finches.safetensors'))

def main():
    folder.mkdir(exist_ok=True)
    items = get_dataset('finches', n_train=3000, n_test=2000, size=size)
    start = example_start() if (folder/'start.safetensors').exists() else make_start()
    measures = dict(start=evaluate(start, items, size))
    make_synthesizer(start, items)
    syn = example_synthesizer()
    measures['finches'] = evaluate(syn.encoder, items, size)
    x = float_images(items.test[:500])
    error = F.mse_loss(syn.prepare(x).rec, x)
    about = dict(made_by='python tools/example.py', torch=torch.__version__,
                 measures={k:{n:round(m, 1) for n,m in v.items()} for k,v in measures.items()},
                 squared_error=round(error.item(), 5),
                 sha256={f.name:sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob('*.safetensors'))})
    (folder/'about.json').write_text(json.dumps(about, indent=1)+'\n', encoding='utf-8')
    print(json.dumps(about, indent=1))

if __name__=='__main__': main()
