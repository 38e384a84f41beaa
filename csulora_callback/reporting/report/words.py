"""What a report says in words: of penalties, of shares, of sizes."""

from __future__ import annotations

from csulora_callback.reporting.terminal import percent, signed

_SPACE = "\N{NO-BREAK SPACE}"  # no line break parts a number from its sign


def percents(share: float) -> str:
    """A share with its sign of percent; nothing and all of it are said plainly.

    Example:
        >>> [percents(share).replace(_SPACE, " ") for share in (0.1234, -0.5, 0.0, 1.0, 1e-7)]
        ['12.3 %', '−50.0 %', '0 %', '100 %', '< 0.01 %']
    """
    if share in (0.0, 1.0):
        return f"{100 * share:.0f}{_SPACE}%"
    text = percent(abs(share))
    return f"<{_SPACE}0.01{_SPACE}%" if text == "0.00" else f"{'−' if share < 0 else ''}{text}{_SPACE}%"


def signed_percents(share: float) -> str:
    """A share with plus or minus, as of :func:`~csulora_callback.reporting.terminal.signed`.

    Example:
        >>> [signed_percents(share).replace(_SPACE, " ") for share in (0.1234, -0.5, 0.0)]
        ['+12.3 %', '−50.0 %', '0.00 %']
    """
    return f"{signed(share)}{_SPACE}%".replace("-", "−")


def ratio(part: float, whole: float) -> float:
    """``part / whole``, and 0 where there is nothing.

    Example:
        >>> ratio(1.0, 4.0), ratio(0.0, 0.0)
        (0.25, 0.0)
    """
    return part / whole if whole else 0.0


def plain(value: object) -> str:
    """A setting as one would write it.

    Example:
        >>> plain(10.0), plain("inf"), plain(["v_proj", "q_proj"])
        ('10', 'inf', 'q_proj, v_proj')
    """
    if isinstance(value, list):
        return ", ".join(sorted(map(str, value)))
    return f"{value:g}" if isinstance(value, float) else str(value)


def change(before: float, after: float) -> str:
    """How much smaller or larger.

    Example:
        >>> [change(*sizes).replace(_SPACE, " ") for sizes in ((4.0, 3.0), (2.0, 3.0), (0.0, 0.0))]
        ['25 % smaller', '50 % larger', 'unchanged']
    """
    if before == after or before == 0.0:
        return "unchanged"
    return f"{100 * abs(1.0 - after / before):.0f}{_SPACE}% {'smaller' if after < before else 'larger'}"
