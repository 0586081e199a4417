"""Images per second from files, end to end: MoCo v2 here and in lightly, on the same files, network and batch"""
from copy import deepcopy
from fastcore.script import call_parse
from fastai.vision.all import *
from fgsynth.all import *
from common import alternate, gtsrb, now, rows_of, save

def lightly_epoch(folder, size, bs, workers, n):
    "MoCo v2 as lightly's documentation writes it: one epoch over the first `n` images"
    import torchvision
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform
    class MoCo(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
            self.head = MoCoProjectionHead(512, 512, 128)
            self.backbone_m,self.head_m = deepcopy(self.backbone),deepcopy(self.head)
            for m in self.backbone_m,self.head_m: deactivate_requires_grad(m)
        def forward(self, x): return self.head(self.backbone(x).flatten(start_dim=1))
        def momentum(self, x): return self.head_m(self.backbone_m(x).flatten(start_dim=1)).detach()
    dev = default_device()
    model = MoCo().to(dev)
    data = LightlyDataset(str(folder), transform=MoCoV2Transform(input_size=size))
    dl = torch.utils.data.DataLoader(torch.utils.data.Subset(data, range(n)), batch_size=bs, shuffle=True,
                                     drop_last=True, num_workers=workers, persistent_workers=workers>0)
    loss_func = NTXentLoss(memory_bank_size=(4096, 128))
    opt = torch.optim.SGD(model.parameters(), lr=0.06)
    def epoch():
        for batch in dl:
            q,k = (o.to(dev) for o in batch[0])
            update_momentum(model.backbone, model.backbone_m, m=0.99)
            update_momentum(model.head, model.head_m, m=0.99)
            loss = loss_func(model(q), model.momentum(k))
            loss.backward(); opt.step(); opt.zero_grad()
    return epoch

@call_parse
def main(
    path:str=None, # Folder with one sub-folder per class; by default the traffic signs
    size:int=64, # Side of the images, pixels
    bs:int=128, # Images in a batch
    workers:int=2, # Of lightly's loader
    n:int=1280, # Images in an epoch
    rounds:int=3, # Epochs of each after the first, which also starts workers
):
    folder = Path(path) if path else gtsrb/'gtsrb/GTSRB/Training'
    if not folder.is_dir(): folder = gtsrb/'GTSRB/Training'
    if not folder.is_dir():
        raise SystemExit('There are no image files to train on: give --path, a folder with one sub-folder per class.')
    items = get_dataset(str(folder)); items.train = items.train[:n]
    if items.train_labels is not None: items.train_labels = items.train_labels[:n]
    def ours(cache, precision='auto'):
        start = now()
        dls = ssl_dls(items, size=size, bs=bs, cache=cache)
        learn = ssl_learner(dls, 'resnet18', MoCoV2(momentum=.99), precision=precision)
        ready = now()-start
        def epoch():
            with learn.no_bar(), learn.no_logging(): learn.fit(1, .06)
        return epoch,ready
    kept,ready = ours(True)
    fs = {'lightly':lightly_epoch(folder, size, bs, workers, n), 'fgsynth':kept,
          'fgsynth, files decoded in each epoch':ours(False)[0], 'fgsynth, float32':ours(True, 'fp32')[0]}
    rows = rows_of(alternate(fs, rounds), 'lightly')
    for r in rows: r['images_per_second'] = n//bs*bs/r['seconds']; r['faster'] = 1/r['ratio']
    save('files', f'MoCo v2 from files, resnet18, {size} pixels, batch {bs}, {n} images', rows,
         decode_once_seconds=ready, workers=workers)
