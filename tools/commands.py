"""Write to fgsynth/commands.json what each command accepts, from the signature and docments of its function"""
import json
from pathlib import Path
from fastcore.script import anno_parser
from fgsynth.commands import describe_parser
from fgsynth.data.check import data_parser
from fgsynth.data.datasets import data_sets
from fgsynth.own.hub import export_run
from fgsynth.own.label import label_run
from fgsynth.own.search import search_run
from fgsynth.runs.demo import demo
from fgsynth.runs.measure import evaluate_run
from fgsynth.runs.table import table
from fgsynth.runs.train import train
from fgsynth.show.app import explore_in_browser

functions = dict(fgsynth_train=train, fgsynth_eval=evaluate_run, fgsynth_demo=demo, fgsynth_table=table,
                 fgsynth_search=search_run, fgsynth_label=label_run, fgsynth_export=export_run,
                 fgsynth_explore=explore_in_browser)
optional = dict(fgsynth_explore='run') # what is given without its name, or not at all
many = dict(fgsynth_export='to') # what may be several words
file = Path(__file__).resolve().parent.parent/'fgsynth'/'commands.json'

def described():
    "All commands, as text"
    parsers = {k:anno_parser(f, prog=k) for k,f in functions.items()} | dict(fgsynth_data=data_parser())
    commands = {k:describe_parser(p) for k,p in parsers.items()}
    for k,name in optional.items():
        option = next(o for o in commands[k]['options'] if o['dest']==name)
        option |= dict(flags=[], nargs='?')
    for k,name in many.items(): next(o for o in commands[k]['options'] if o['dest']==name)['nargs'] = '+'
    res = dict(commands=commands, data_sets=list(data_sets))
    return json.dumps(res, indent=1, ensure_ascii=False) + '\n'

if __name__=='__main__': file.write_text(described(), encoding='utf-8')
