"""One source of a mixture: what to read, and how large its share of the rows is."""

import math
from dataclasses import dataclass

from lin_jax.errors import UserError


@dataclass(frozen=True)
class MixturePart:
    """A source beside others; its fields mean what those of `DataConfig` do.

    Attributes:
        source: The text: "python-stdlib", the path of a file or folder, "hub:OWNER/NAME", or a list of paths.
        weight: Share of the rows, beside the weights of the other parts; they need not add up to one.
        subset: Configuration name of a hub data set.
        split: Split of a hub data set.
        text_field: Column that holds the text, in tables and hub data sets.
        document_separator: Marker between documents inside a text file; by default a file is one document.

    Raises:
        UserError: the weight is not a positive number.
    """

    source: str | tuple[str, ...]
    weight: float = 1.0
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    document_separator: str | None = None

    def __post_init__(self) -> None:
        """Checks the weight; the rest is checked as a configuration of its own."""
        if not 0 < self.weight < math.inf:
            raise UserError(f"weight {self.weight} of data source {self.source!r} must be a positive number, such as 1")


# What a mixture has in each of its parts, and not beside them.
PART_FIELDS = ("source", "subset", "split", "text_field", "document_separator")
