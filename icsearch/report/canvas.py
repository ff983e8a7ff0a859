"""A matplotlib Figure: how it is begun, fitted, and saved as PNG or put into a page as SVG.

No pyplot: a Figure belongs to its caller, and settings hold only while it is drawn. Colours are told apart by
colour-blind readers and in print; in a page they follow its light or dark scheme.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from icsearch.report import numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours for series, and classes of rising (h) and falling (c) losses. They are the page's variables of
# these names, each with a value of its own, by which a picture's colours are known.
PALETTE = {
    "paper": "#ffffff", "ink": "#1d232b", "muted": "#66707c", "line": "#e1e5ea", "ground": "#fafbfc",
    "full": "#0072b3", "shared": "#cfdfea", "uniform": "#c65103",
    "s0": "#0072b2", "s1": "#c65102", "s2": "#00805f", "s3": "#a3487e", "s4": "#8a6d00", "s5": "#3f4a56",
    "h0": "#e6e9ed", "h1": "#fff3b8", "h2": "#fedf8b", "h3": "#fdc05c", "h4": "#fb9a3c", "h5": "#f06a2b",
    "h6": "#d53e28", "h7": "#a31437", "h8": "#5f0b3c",
    "c1": "#c9def0", "c2": "#93c1e2", "c3": "#4a94cb", "c4": "#16609e",
}  # fmt: skip
INK, MUTED, LINE, PAPER = (PALETTE[name] for name in ("ink", "muted", "line", "paper"))
SERIES = [PALETTE[f"s{index}"] for index in range(6)]
FONT = "DejaVu Sans"  # comes with matplotlib; a page writes in its own
SETTINGS: dict[Any, Any] = {
    "font.sans-serif": [FONT],
    "font.size": 9,
    "text.parse_math": False,  # a model's name may have a $
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "icsearch",
}

PNG_DPI = 160
PIXEL = 1 / 96  # inch


@contextmanager
def drawing() -> Iterator[None]:
    """Our settings, whatever a user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a name that is not in this font
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def new_figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(facecolor=PAPER)
    return figure, figure.add_subplot()


def fit(
    figure: Figure, axes: Axes, width: float, height: float, margins: tuple[float, float, float, float], entry: float
) -> Figure:
    """The figure in a size that gives the axes `width` and `height` within the margins, and the legend below.

    Margins are left, right, top and bottom; `entry` is the width of an entry of the legend. All in inches.
    """
    left, right, top, bottom = margins
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, int((left + width + right) / entry))
    below = bottom + 0.19 * -(-len(handles) // columns) + 0.06
    whole, high = left + width + right, top + height + below
    figure.set_size_inches(whole, high)
    axes.yaxis.set_label_coords((0.2 - left) / width, 0.5)  # clear of the tick labels, however long
    figure.subplots_adjust(left=left / whole, right=1 - right / whole, top=1 - top / high, bottom=below / high)
    figure.legend(
        handles, labels, loc="lower left", ncols=columns, handlelength=1.3, handleheight=0.9, borderaxespad=0.1
    )
    return figure


def note(
    axes: Axes, text: str, xy: tuple[float, float], offset: tuple[float, float], colour: str, ha: str, **more: Any
) -> None:
    """Text beside a place, on a ground that keeps lines from striking it out and covers no mark."""
    ground = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8}
    given = {"fontsize": 8.5, "va": "center", "bbox": ground, "zorder": 1.6, **more}
    axes.annotate(text, xy, xytext=offset, textcoords="offset points", color=colour, ha=ha, **given)


def plain(name: str, width: int) -> str:
    """A name that a picture can hold: no control characters, no bytes that are no sign, and no _ in front.

    Matplotlib leaves a name that begins so out of the legend.
    """
    text = numbers.shortened("".join(sign if sign.isprintable() else "?" for sign in name), width)
    return f" {text}" if text.startswith("_") else text


# --- files and pages -------------------------------------------------------------------------------------------------


@drawing()
def png(figure: Figure) -> bytes:
    """The picture as PNG, the same bytes for the same numbers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=PNG_DPI)
    return buffer.getvalue()


@drawing()
def svg(figure: Figure, name: str, css: str, title: str, description: str) -> str:
    """The picture as an element of a page, in its colours, with title and description for those who do not see it.

    `name` begins its ids, so that pictures of one page do not take each other's.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_figure(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    variables = {colour: f"var(--{variable})" for variable, colour in PALETTE.items()}
    for element in [*root.iter()]:
        element.tag = _local(element.tag)
        for child in [*element]:
            if _local(child.tag) in ("metadata", "style"):  # its rule would be one for the whole page
                element.remove(child)
        given = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in given.items():
            if key == "id" and element.tag == "g":  # nothing refers to groups
                continue
            if key == "style":
                rules = [rule.split(": ", 1) for rule in value.split("; ") if rule and "font-family" not in rule]
                value = "; ".join(f"{rule}: {variables.get(to, to)}" for rule, to in rules)
            value = f"{name}-{value}" if key == "id" else f"#{name}-{value[1:]}" if key == "href" else value
            element.set(key, value.replace("url(#", f"url(#{name}-") if key == "clip-path" else value)
    root.attrib |= {"class": css, "role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, id=f"{name}-{tag}")
        element.text = text
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A name without its namespace, which a page implies."""
    return name.rpartition("}")[2]
