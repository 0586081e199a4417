"""How well does a decoder draw, from the features or from an earlier layer of a frozen EfficientNet-Lite0 with ImageNet
weights? Test images: squared error, structural similarity, and what a probe trained on real features makes of the
decoded ones. One row is added to results/decoders.csv at a time:

  python benchmarks/decoders.py finches --layer body.blocks.2 --epochs 20
  python benchmarks/decoders.py gtsrb --path ../shared/data/gtsrb --epochs 20
"""
import csv, time
from fastcore.script import call_parse
from fastai.vision.all import *
from fgsynth.all import *
from torchmetrics.functional.image import structural_similarity_index_measure
from common import root

def draw(net, x):
    "Images as the decoder draws them"
    coder = coder_of(net)
    with torch.no_grad(): return torch.cat([net.decoder(coder(float_images(o))) for o in x.split(100)])

def similarity(p, q):
    "Structural similarity, a mean over images (Wang et al. 2004)"
    each = [structural_similarity_index_measure(a, b, data_range=1., reduction='none')
            for a,b in zip(p.split(200), q.split(200))]
    return torch.cat(each).mean().item()

@call_parse
def main(
    data:str, # Data set, or a folder
    path:str=None, # Where the data set lies
    layer:str=None, # Layer whose map is decoded; the features by default
    epochs:int=4, # Of the decoder
    bs:int=16, # Images in its batches
    lr:float=5e-3, # Its peak learning rate
    width:int=16, # Of the decoder
    size:int=64, # Of the images, pixels
    n:int=2000, # Most test images
    called:str=None, # What the row calls the data
    seed:int=0,
):
    torch.set_num_threads(1)
    set_seed(seed)
    items = get_dataset(data, path, **(dict(n_train=2000, n_test=1000, size=size) if data=='finches' else {}))
    learn = ssl_learner(ssl_dls(items, size=size, bs=64), 'lite0', MoCoV2(), pretrained=True,
                        cbs=synth_pairs(update='frozen', decoder_width=width, decoder_layer=layer))
    start = time.process_time()
    learn.pretrain_decoder(epochs, lr=lr, bs=bs)
    seconds = time.process_time()-start
    net,(x,good) = learn.model.eval(),items.load('test', size)
    x,y = x[:n],items.labels('test')[good][:n]
    drawn,real = draw(net, x),float_images(x)
    probe = fit_probe(*split_features(net.encoder, items, 'train', size), len(items.classes), seed=seed)
    right = [top_k(probe(features(net.encoder, o)), y) for o in (real, drawn)]
    row = dict(data=called or data, size=size, layer=layer or '', epochs=epochs, bs=bs, lr=f'{lr:g}', width=width,
               seed=seed, squared_error=f'{F.mse_loss(drawn, real):.4f}', ssim=f'{similarity(drawn, real):.3f}',
               real=f'{right[0]:.1f}', decoded=f'{right[1]:.1f}', chance=f'{100/len(items.classes):.1f}',
               cpu_seconds=f'{seconds:.0f}')
    file = root/'results'/'decoders.csv'
    new = not file.exists()
    with open(file, 'a', newline='', encoding='utf-8') as f:
        writer = csv.DictWriter(f, row, lineterminator='\n')
        if new: writer.writeheader()
        writer.writerow(row)
    print(row)
