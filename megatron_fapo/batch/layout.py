"""How many ranks a model is spread over, and along which axes."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the parallel axes.  Example: `Layout(tp=2, dp=4)` is eight ranks."""

    tp: int = 1
    """Tensor parallel: ranks that share each matrix."""
    pp: int = 1
    """Pipeline parallel: ranks that hold consecutive layers."""
    cp: int = 1
    """Context parallel: ranks that share each sequence."""
    dp: int = 1
    """Data parallel: copies that consume different sequences."""
    sp: bool = False
    """Sequence parallel: tensor-parallel ranks share positions between the matrices."""
    vpp: int = 1
    """Virtual pipeline: groups of layers on each pipeline rank."""

    packed: bool = False
    """Sequences lie end to end and attention knows their bounds; otherwise each has a row, padded at its end."""
    total_multiple: int = 1
    """A packed row is padded to a multiple of this by a sequence without loss, rows together at their ends."""
    crossover: float = math.inf
    """Length at which attention costs this model as much as everything else (`balance.crossover`)."""

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def length_multiple(self) -> int:
        """Rows are padded to a multiple of this: two chunks a context-parallel rank, each cut among the
        sequence-parallel ranks."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sp else 1)

    def width_multiple(self, rows: int) -> int:
        """Rows are padded to a multiple of this, so that `rows` of them together are one of `total_multiple`."""
        return math.lcm(self.length_multiple, self.total_multiple // math.gcd(self.total_multiple, rows))

    @property
    def microbatch_multiple(self) -> int:
        """A rank's number of microbatches is a multiple of this: the interleaved schedule works in rounds of as many
        as there are stages."""
        return self.pp if self.vpp > 1 else 1
