"""The paper's setting, for a machine with a GPU: EfficientNet-Lite0 from ImageNet weights, 224 pixels, the preset
`paper` (MoCo v2 with SGD, cosine, batch norm that trains). Four rows in results/paper_scale.csv: the start, MoCo v2
alone, with synthesized pairs to the letter, and with pairs as this package draws them. Give the command again if it was
stopped: it goes on at the last checkpoint, and leaves out what is measured.

  python benchmarks/paper_scale.py --dry_run                # how long it would take
  python benchmarks/paper_scale.py --data ../shared/data/cars98
  python benchmarks/paper_scale.py --size 64 --epochs 1 --pretrain_epochs 1 --bs 64 --out /tmp/toy.csv  # does it run?
"""
from pathlib import Path
from fastcore.script import call_parse, store_true
from fastai.basics import default_device
from fgsynth.core import InputError
from fgsynth.evaluate.measures import evaluate
from fgsynth.nets.encoders import create_encoder, load_encoder
from fgsynth.runs.measure import read_complete_run
from fgsynth.runs.presets import Settings, pair_defaults
from fgsynth.runs.rows import append_run, code_commit, find_runs, machine_name, read_runs, row_key
from fgsynth.runs.train import estimate, run_items, train
from fgsynth.synth.callbacks import PAPER
import torch
from common import root

# what the paper settles, as this package has it: the defaults of `synth_pairs`, and a decoder that stays as it is
ours = {**{k:v for k,v in pair_defaults.items() if k in PAPER and k!='relative'}, 'absolute':False, 'update':'frozen'}
recipes = dict(start=dict(synth='none', epochs=0), moco=dict(synth='none'), letter={}, ours=ours)

def trained(name, s, folder):
    "The encoder of a recipe and the seconds of its training, which is done or gone on with where it must be"
    if not s.epochs: return create_encoder(s.arch, pretrained=True, size=s.size).to(default_device()),0.
    train(out=str(folder/name), resume=(folder/name/'settings.json').is_file(), **s.as_dict())
    encoder = load_encoder(folder/name/'encoder.safetensors').to(default_device())
    return encoder,read_complete_run(folder/name)['seconds']

@call_parse
def main(
    data:str=str(root.parent/'shared/data/cars98'), # Data set, or a folder with one sub-folder per class
    called:str='cars98', # What the rows call it
    path:str=None, # Where the data set lies
    size:int=224, # Of the images, pixels
    resize:str='squish', # How they become squares: squish (cars fill the width), or crop, the centre
    epochs:int=30, # Of each training; the paper takes 100
    pretrain_epochs:int=100, # Of the decoder; the paper takes 200
    bs:int=128, # Images in a batch
    seed:int=0,
    precision:str='auto', # fp32, bf16, or auto: whichever is faster
    runs:str='runs/paper_scale', # Folder of the runs
    out:str='results/paper_scale.csv', # File to add rows to
    dry_run:store_true=False, # Only say how long it would take
):
    if not torch.cuda.is_available() and size>=224 and not dry_run:
        raise InputError("There is no GPU, and without one this takes days: "
                         "give --dry_run for an estimate, or a --size of 64.")
    common = dict(arch='lite0', pretrained=True, size=size, resize=resize, bs=bs, seed=seed, precision=precision,
                  epochs=epochs, pretrain_epochs=pretrain_epochs)
    items = run_items(data, path, size, resize=resize)
    for name,changes in recipes.items():
        s = Settings.from_preset('paper', **{**common, **changes, 'data':data, 'path':path})
        if dry_run:
            if s.epochs: print(f'-- {name}', estimate(items, s), sep='\n', flush=True)
            continue
        row = s.changed(data=called)
        if len(find_runs(read_runs(out), row)): print(f'{name}: measured already'); continue
        encoder,seconds = trained(name, s, Path(runs)/f'{called}_{size}_{epochs}_{seed}')
        append_run(Path(out), dict(row_key(row), experiment='paper_scale', preset='paper', seconds=seconds,
                                   **evaluate(encoder, items, size, seed=seed),
                                   commit=code_commit(), machine=machine_name(), torch=torch.__version__))
        print(f'{name}: {seconds:.0f} s', flush=True)
