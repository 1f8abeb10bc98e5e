"""Soft prompts: rows of embeddings behind which a hidden state is read, one prompt per block."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nodelens.interventions.token_model import TokenModel
from nodelens.results.files import checked, reading, write


class SoftPrompts(nn.Module):
    """A prompt of embeddings for each block, ``{block: (length, d)}``; the state takes the place of the last row at that block."""

    def __init__(self, prompts: Mapping[int, Tensor]):
        super().__init__()
        self.prompts = nn.ParameterDict({str(block): nn.Parameter(rows.clone().float()) for block, rows in prompts.items()})

    def of(self, block: int) -> Tensor:
        """The prompt of a block, (length, d). Raises ValueError for a block without one."""
        if str(block) not in self.prompts:
            raise ValueError(f"there is no learned prompt for block {block}, only for {', '.join(self.prompts)}: train it")
        return self.prompts[str(block)]

    @classmethod
    def of_tokens(cls, model: TokenModel, blocks: list[int], length: int, generator: torch.Generator) -> "SoftPrompts":
        """The embeddings of random tokens, other ones for each block."""
        table = model.embeddings.weight
        return cls({k: table[torch.randint(len(table), (length,), generator=generator)].detach() for k in blocks})

    def save(self, file: str | Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write(Path(file), lambda path: save_file(state, str(path)))

    @classmethod
    def load(cls, file: str | Path) -> "SoftPrompts":
        """Raises FileNotFoundError for a file that is missing, ValueError for one that is damaged or holds no soft prompts."""
        if not Path(file).is_file():
            raise FileNotFoundError(f"no soft prompts at {str(file)!r}: give a file that analysis learned_prompt wrote")
        with reading(checked(Path(file))) as path:
            state = load_file(str(path))
        found = {name.removeprefix("prompts."): rows for name, rows in state.items() if name.startswith("prompts.")}
        whole = all(block.isdigit() and rows.ndim == 2 and rows.numel() for block, rows in found.items())
        if not found or len(found) < len(state) or not whole or len({rows.shape for rows in found.values()}) > 1:
            raise ValueError(f"{str(file)!r} holds no soft prompts, prompts.<block> (length, d), of a learned prompt")
        return cls({int(block): found[block] for block in sorted(found, key=int)}).requires_grad_(False)

    def check(self, model: TokenModel) -> "SoftPrompts":
        """Raises ValueError for a model of another width, or of fewer blocks."""
        width, blocks = model.embeddings.weight.shape[1], len(model.roles.blocks)
        own, most = next(iter(self.parameters())).shape[-1], max(map(int, self.prompts))
        if own != width or most >= blocks:
            raise ValueError(
                f"the learned prompt is for embeddings of width {own} and block {most}; the model has width {width} and {blocks} "
                "blocks: train one for this model"
            )
        return self
