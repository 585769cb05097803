"""How a feature map is cut into overlapping patches."""

from __future__ import annotations

from dataclasses import dataclass

from scatterbrain.errors import UserError


@dataclass(frozen=True)
class Patches:
    """Square patches of a feature map, as `F.unfold` cuts them.

    Attributes:
        kernel: height and width of a patch in pixels.
        stride: step between patches in pixels, down and across.
        padding: zeros around the map in pixels.
    """

    kernel: int
    stride: int
    padding: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Number of patches down and across a map of `height` by `width` pixels.

        Raises:
            UserError: the map is smaller than a patch.
        """
        rows, columns = ((size + 2 * self.padding - self.kernel) // self.stride + 1 for size in (height, width))
        if min(rows, columns) < 1:
            raise UserError(
                f"A map of {height} x {width} pixels holds no patch of {self.kernel} x {self.kernel} with a padding "
                f"of {self.padding}; give a larger map."
            )
        return rows, columns
