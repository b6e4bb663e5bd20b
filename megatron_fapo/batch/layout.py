"""How many ranks a model is spread over, and along which axes."""

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

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp
