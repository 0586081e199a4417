"""Does the gain hold on other images? One recipe of pairs on three data sets, each with a base that was made strong on
held-out images: its learning rate, length and frozen stages stand in benchmarks/general.

  python benchmarks/general.py gtsrb --path ../shared/data/gtsrb
  python benchmarks/general.py finches
  python benchmarks/general.py cars98 --data ../shared/data/cars98

For each seed: the start, MoCo v2, synthesized pairs, and MoCo v2 for as many epochs as take the time of the pairs; the
first seed settles how many those are. Then synthesized pairs at whichever of the two lengths is the better one for MoCo
v2 on held-out images, and last the whole image in other colours without a decoder. The rows of results/runs.csv that
are there already are not run again, so the same command goes on where it was stopped.
"""
from pathlib import Path
from fastcore.script import call_parse, store_true
from fgsynth.core import InputError
from fgsynth.runs.presets import Settings
from fgsynth.runs.rows import find_runs, read_runs, run_missing
from fgsynth.runs.tournament import score
from common import root

def seconds_of(out, s, split):
    "Mean processor seconds of the runs of one configuration, whatever their seed"
    return find_runs(read_runs(out), s.changed(seed=None), split).cpu_seconds.mean()

def epochs_in_time(out, moco, pairs, split):
    "Epochs of MoCo v2 that take the seconds of a run with pairs: as earlier seeds had them, or by the rows so far"
    runs = read_runs(out)
    earlier = runs[(runs.budget=='seconds') & (runs.data==moco.data) & (runs.split==split)]
    if len(earlier): return int(earlier.epochs.iloc[0])
    return round(moco.epochs*seconds_of(out, pairs, split)/seconds_of(out, moco, split))

@call_parse
def main(
    called:str, # Data set: gtsrb, finches or cars98, or the name of your own preset in benchmarks/general
    data:str=None, # Folder of its images, where it has no name of its own
    path:str=None, # Where the data set lies
    seeds:int=5, # Runs of each configuration
    first_seed:int=0, # Seed of the first of them
    searched:int=2, # Seeds with which the best length is found
    out:str='results/runs.csv', # File to add rows to
    validation:store_true=False, # On a third of the training images, held out by group
):
    preset = root/'benchmarks/general'/f'{called}.toml'
    if not preset.is_file():
        raise InputError(f"There is no {str(preset)!r}: write the settings of the base there, as in cars98.toml.")
    out,split = Path(out),'validation' if validation else 'test'
    def row(seed, budget, split=split, **changes):
        s = Settings.from_preset(str(preset), data=called, path=path, seed=seed, **changes)
        run_missing([s], out, split, data, experiment='general', preset=called, budget=budget)
        return s
    def held_out(epochs):
        "How good MoCo v2 is on held-out images, in the mean over some seeds"
        tried = [row(seed, 'best', 'validation', synth='none', epochs=epochs) for seed in range(searched)]
        return sum(score(find_runs(read_runs(out), o, 'validation').iloc[0]) for o in tried)/searched
    chosen = range(first_seed, first_seed+seeds)
    for seed in chosen:
        row(seed, '', synth='none', epochs=0)
        moco,pairs = row(seed, 'epochs', synth='none'),row(seed, 'epochs', synth='both')
        row(seed, 'seconds', synth='none', epochs=epochs_in_time(out, moco, pairs, split))
    best = max([moco.epochs, epochs_in_time(out, moco, pairs, split)], key=held_out)
    print(f'MoCo v2 is best with {best} epochs')
    for seed in chosen: row(seed, 'best', synth='both', epochs=best)
    for seed in chosen: row(seed, 'epochs', synth='jitter')
