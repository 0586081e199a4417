"""Draw what stands for the site elsewhere: nbs/images/card.png, which is shown where a page is shared, and
nbs/images/favicon.png, which is shown in a browser's tab. Networks and birds are those that come with fgsynth.

  tools/card.py
"""
from pathlib import Path
import matplotlib.pyplot as plt, torch
from torchvision.utils import make_grid
from fgsynth.data.finches import finches
from fgsynth.synth.example import example_synthesizer

images = Path(__file__).resolve().parent.parent/'nbs/images'
ink,paper,accent = '#222222','#ffffff','#2780e3'

def card(path):
    "Finches, their reconstructions and their perturbed pictures beside the name, 1200 x 630 pixels"
    torch.manual_seed(0)
    s = example_synthesizer()(finches(7, size=64, seed=5).images/255)
    fig = plt.figure(figsize=(12,6.3), dpi=100, facecolor=paper)
    fig.text(.04, .84, 'fgsynth', size=58, weight='bold', color=accent)
    fig.text(.042, .745, 'Self-supervised fine-grained recognition', size=25, color=ink)
    ax = fig.add_axes((.16, .04, .82, .66))
    grid = make_grid(torch.cat([s.x, s.rec, s.pert]), 7, pad_value=1)
    ax.imshow(grid.permute(1,2,0).clamp(0,1), interpolation='bicubic', aspect='equal', extent=(0, 7, 0, 3))
    ax.set(xticks=[], yticks=[2.5, 1.5, .5], frame_on=False, anchor='W')
    ax.set_yticklabels(['image', 'decoded', 'perturbed'], size=22, color=ink)
    ax.tick_params(length=0)
    fig.savefig(path)

def favicon(path):
    "The head of one finch in a circle, 64 x 64 pixels"
    bird = finches(5, size=256, seed=5).images[0].permute(1,2,0)
    fig = plt.figure(figsize=(1,1), dpi=64)
    ax = fig.add_axes((0, 0, 1, 1)); ax.axis('off')
    im = ax.imshow(bird, interpolation='antialiased')
    im.set_clip_path(plt.Circle((.5,.5), .5, transform=ax.transAxes))
    fig.savefig(path, transparent=True)

if __name__=='__main__': card(images/'card.png'); favicon(images/'favicon.png')
