"Runs without figures, whose drawing is most of the work of a small run"
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

@contextmanager
def without_figures():
    "Inside, runs compute what their figures would show, and leave all files but those that Matplotlib draws"
    from fastai.learner import Learner
    from fgsynth.runs import report
    shown = 'health','attention','pairs','noise','variance','retrieval'
    with ExitStack() as s:
        for o in shown: s.enter_context(patch.object(report, f'show_{o}', lambda *a, **k: None))
        s.enter_context(patch.object(report, 'save_figure', lambda fig, path: None))
        s.enter_context(patch.object(report.Explorer, 'to_html', lambda *a, **k: ''))
        s.enter_context(patch.object(Learner, 'show_batch', lambda *a, **k: None))
        yield
