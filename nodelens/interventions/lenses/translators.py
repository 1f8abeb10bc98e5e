"""Affine translators of the residual stream, one per block, which make up a tuned lens."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nodelens.results.files import checked, reading, write


class Translators(nn.Module):
    """``h + A h + b`` for the states after each block, so that the model's own norm and head read them; at first the identity.

    blocks: indices of the blocks; a block without a translator is read as it is. Shapes: A (d, d), b (d,)
    Source: Belrose et al. 2023, 2303.08112, eq. 5
    """

    def __init__(self, blocks: list[int], width: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.maps = nn.ModuleDict({str(k): nn.Linear(width, width, dtype=dtype) for k in blocks})
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, block: int, states: Tensor) -> Tensor:
        """The translated states (..., d) of a block, in their own dtype."""
        if str(block) not in self.maps:
            return states
        own: nn.Linear = self.maps[str(block)]  # type: ignore[assignment]
        return states + own(states.to(own.weight.dtype)).to(states.dtype)

    def save(self, file: str | Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write(Path(file), lambda path: save_file(state, str(path)))

    @classmethod
    def load(cls, file: str | Path) -> "Translators":
        """Raises FileNotFoundError for a file that is missing, ValueError for one that is damaged or holds no translators."""
        if not Path(file).is_file():
            raise FileNotFoundError(f"no tuned lens at {str(file)!r}: give a file that analysis tuned_lens wrote")
        with reading(checked(Path(file))) as path:
            state = load_file(str(path))
        blocks = sorted({int(part) for name in state if (part := name.split(".")[1:2] and name.split(".")[1]) and part.isdigit()})
        weights = [state.get(f"maps.{k}.weight") for k in blocks]
        if (
            not blocks
            or any(w is None or w.ndim != 2 or w.shape[0] != w.shape[1] for w in weights)
            or len(state) != 2 * len(blocks)
        ):
            raise ValueError(f"{str(file)!r} holds no translators of a tuned lens, maps.<block>.weight (d, d) and .bias (d,)")
        found = cls(blocks, len(weights[0]), weights[0].dtype)  # type: ignore[arg-type, union-attr]
        found.load_state_dict(state)
        return found.requires_grad_(False)

    def check(self, width: int, blocks: int) -> None:
        """Raises ValueError for a model of another width, or of fewer blocks."""
        own = next(iter(self.parameters())).shape[-1]
        most = max(int(k) for k in self.maps)
        if own != width or most >= blocks:
            raise ValueError(
                f"the tuned lens is for states of width {own} and block {most}; the model has width {width} and {blocks} blocks: "
                "train one for this model"
            )
