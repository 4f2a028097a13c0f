"""Tables of results in Markdown."""

import statistics
from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without a newline at its end."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def mean_and_deviation(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """Mean and standard deviation over seeds, such as `0.240 ± 0.005`, of values times `scale`.

    One value stands alone; without values the text is empty.
    """
    if not values:
        return ""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"
