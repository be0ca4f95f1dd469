"""The next token of each row: the likeliest, or sampled with random numbers that members have in common. Next: `adapters.py`.

One idea: a token is drawn as the winner of an exponential race, `argmax_v p_v / E_v` with E_v ~ Exp(1), which is distributed as p. With
the same E for all members of an example, members whose p differ by little seldom write different tokens, so that a difference of
rewards is one of weights and not of luck.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hybrid_opt.config.rewards import Generation

Choice = Callable[[Tensor, Tensor], Tensor]
"""Logits (rows, vocabulary) and the rows' numbers -> a token for each row, (rows,) int64; called once for each position."""


def build_choice(config: Generation, seeds: Tensor, device: torch.device) -> Choice:
    """The choice that a configuration describes.

    Args:
        seeds: of each row, (all rows,) int64; rows with equal seeds have their random numbers in common.
    """
    if config.temperature == 0:
        return lambda logits, rows: logits.argmax(dim=-1)
    return _Sampling(config, seeds, device)


class _Sampling:
    def __init__(self, config: Generation, seeds: Tensor, device: torch.device) -> None:
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(config.temperature)])
        if config.top_k is not None:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self.warpers.append(TopPLogitsWarper(config.top_p))
        distinct, self.stream = torch.unique(seeds, return_inverse=True)
        self.stream = self.stream.to(device)
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in distinct.tolist()]

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        wanted, which = torch.unique(self.stream[rows], return_inverse=True)
        draws = torch.empty(len(wanted), logits.shape[-1], device=logits.device)
        for row, stream in zip(draws, wanted.tolist(), strict=True):
            row.exponential_(generator=self.generators[stream])
        scores = self.warpers(None, logits.float())
        return (scores - draws.log_()[which]).argmax(dim=-1)
