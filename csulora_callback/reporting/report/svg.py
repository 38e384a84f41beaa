"""The look of all figures, and figures as SVG inside a page: in its colors, light or dark, with a title to hear."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, GROUND = "#010203", "#040506"  # stand for the page's own colors, which change with the scheme
_PAGE_COLORS = {INK: "currentColor", GROUND: "var(--ground)"}

WIDTH = 340  # pixels: what fits on a phone; where there is more room it is scaled up a little
_PER_INCH = 72  # of the units of an SVG
_RIGHT = 10.0  # a margin for half of the last number of an axis
_LETTER = 6.0  # wide, in the widest of the fonts that a page may be shown in

_STYLE = {
    "svg.fonttype": "none",  # letters stay letters: they can be read out, searched and copied
    "text.parse_math": False,  # names may hold dollars
    "font.size": 9.5,
    "axes.linewidth": 0.6,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid.axis": "y",
    "grid.alpha": 0.12,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.6,
}
_IN_INK = ("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color", "xtick.color", "ytick.color")
_NAMESPACE = re.compile(r"\{.*\}")
_FONT = re.compile(r"font-family:[^;]*;?\s*")
_REFERENCE = re.compile(r"#([\w.-]+)")


@contextmanager
def drawing(name: str, ink: str = INK, ground: str = GROUND) -> Iterator[None]:
    """Figures are drawn in here, whatever the user's own style is; of the same data they are the same.

    Args:
        name: the figure's, unlike any other's on the page: ids in it follow from it.
        ink: of letters and axes, by default the page's.
        ground: what they stand on.
    """
    colors = {**dict.fromkeys(_IN_INK, ink), "figure.facecolor": ground}
    with style.context(["default", {**_STYLE, **colors, "svg.hashsalt": name}]):
        yield


def new_axes(left: float, bottom: float, height: float, top: float) -> Axes:
    """Empty axes in a new figure of :data:`WIDTH`, with the margins that labels need; all in pixels.

    Margins are given, as to measure what stands in them costs more than to draw it, and as figures that stand above
    each other then begin in one line.
    """
    figure = Figure(figsize=(WIDTH / _PER_INCH, (bottom + height + top) / _PER_INCH))
    return add_axes(figure, left, bottom, height)


def add_axes(figure: Figure, left: float, bottom: float, height: float) -> Axes:
    """More of them, as wide as the figure allows."""
    whole = figure.get_figheight() * _PER_INCH
    return figure.add_axes((left / WIDTH, bottom / whole, (WIDTH - left - _RIGHT) / WIDTH, height / whole))


def width_of(labels: Iterable[str]) -> float:
    """Pixels that the longest label takes at most.

    Example:
        >>> width_of(["q_proj", "down_proj"])
        54.0
    """
    return _LETTER * max(map(len, labels))


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page, with a title that says what it shows.

    Example:
        >>> with drawing("empty"):
        ...     to_svg(Figure(figsize=(1, 1)), "Nothing & all")
        '<svg viewBox="0 0 72 72" role="img" aria-label="Nothing &amp; all"><title>Nothing &amp; all</title></svg>'
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    _tidy(root, set(_REFERENCE.findall(buffer.getvalue())))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    heading = ElementTree.Element("title")
    heading.text = title
    root.insert(0, heading)
    text = ElementTree.tostring(root, encoding="unicode")
    for stand_in, color in _PAGE_COLORS.items():
        text = text.replace(stand_in, color)
    return text


def _tidy(element: ElementTree.Element, referenced: set[str]) -> None:
    """Only what is seen stays: no namespaces, no ids that nothing refers to, no fonts, no groups that are empty."""
    element.tag = _NAMESPACE.sub("", element.tag)
    attributes = {_NAMESPACE.sub("", key): " ".join(value.split()) for key, value in element.attrib.items()}
    if attributes.get("id") not in referenced:
        attributes.pop("id", None)
    if "style" in attributes:
        attributes["style"] = _FONT.sub("", attributes["style"])
    if attributes.get("href", "").startswith("data:"):
        attributes["href"] = attributes["href"].replace(" ", "")
    element.attrib = attributes
    element.tail = None
    if element.tag != "text":
        element.text = None
    for child in list(element):
        _tidy(child, referenced)
        if _shows_nothing(child):
            element.remove(child)


def _shows_nothing(element: ElementTree.Element) -> bool:
    if element.tag in ("g", "defs"):
        return len(element) == 0
    return element.tag in ("style", "metadata") or element.attrib.get("style") == "fill: none"
