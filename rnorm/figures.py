"""How all figures look, whatever the user's matplotlib is set to, and how they are written."""

import contextlib
import io
import os
import sys
import warnings

if "matplotlib" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"  # that of a notebook is not there in a script, and matplotlib would not load

from matplotlib import style
from matplotlib.figure import Figure

STYLE = {
    "font.size": 9, "axes.titlesize": 9, "figure.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.5, "axes.xmargin": 0.02, "axes.formatter.limits": (-3, 4),
    "lines.linewidth": 1.3, "savefig.dpi": 300, "savefig.bbox": "tight", "pdf.fonttype": 42, "text.parse_math": False,
    "legend.frameon": False, "legend.handlelength": 2.6, "legend.columnspacing": 1.4, "legend.borderaxespad": 0,
}  # fmt: skip
"""Settings of matplotlib, in place of its defaults."""


def styled() -> contextlib.AbstractContextManager:
    """Within it, also as a decorator, figures have STYLE alone and nothing of the user's matplotlibrc."""
    return style.context(STYLE, after_reset=True)


def render(figure: Figure, suffix: str) -> bytes:
    """A figure as the content of a file; `suffix` is .png, .pdf or .svg. A very tall one has fewer dots per inch."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks is drawn as a box
        figure.savefig(file, format=suffix[1:].lower(), dpi=min(300, 20000 / figure.get_figheight()))
    return file.getvalue()
