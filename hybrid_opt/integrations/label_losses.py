"""The losses of transformers' models, an example at a time. Next: `../objectives/contract.py`.

One idea: transformers gives one number for a batch. Here the same number is the mean of one loss an example, so that a forward pass can hold the
examples of many ES members and still tell them apart.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import LOSS_MAPPING

from hybrid_opt.errors import UserError
from hybrid_opt.objectives.language_model import IGNORED, cross_entropies, unwrapped

SHARE = "hybrid_opt_share"
"""Key of a batch under which each example has its factor, see `LabelLosses`."""
Sums = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""`(model, logits, labels) -> (examples,)`."""


class LabelLosses:
    """What a transformers model gives as `loss` for a batch with `labels`, split over the examples.

    Of labels for tokens, with T_i of them not -100 in example i of E, the loss of example i is
    `E / sum_j T_j * sum_t -log p(label_t)`, the sum over j being over the whole batch of the step, also where a part of it is evaluated. So the
    mean over examples is the mean over tokens, as transformers' Trainer computes it (`num_items_in_batch`). Of one label an example it is that
    example's cross-entropy (or mean squared error, or mean binary cross-entropy, by `config.problem_type`).

    Args:
        model: whose `loss_function` is taken.

    Raises:
        ValueError: the loss of such a model is not known by example; see `knows`.
    """

    differentiable = True

    def __init__(self, model: nn.Module) -> None:
        if not self.knows(model):
            raise ValueError(
                f"LabelLosses: the loss of {type(unwrapped(model)).__name__} is not known by example; pass objective=, a function "
                "losses(model, batch) -> Tensor (examples,), or leave it out: then compute_loss is asked, one ES member a forward pass"
            )
        self.kind = _loss_of(model)

    @staticmethod
    def knows(model: nn.Module) -> bool:
        """Whether the model is a decoder or encoder with labels for tokens or for examples, and nothing else in its loss."""
        config = getattr(model, "config", None)
        adapters = getattr(model, "peft_config", None) or {}
        adds_tokens = any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values())
        adds_losses = getattr(config, "is_encoder_decoder", False) or getattr(config, "output_router_logits", False)
        return _loss_of(model) in SUMS and not adds_tokens and not adds_losses

    def losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """See `Objective.losses`: (examples,) float32.

        Raises:
            UserError: there are no labels.
        """
        if "labels" not in batch:
            raise UserError(
                f"data_collator: the batch has no labels, only {', '.join(batch)}; use one that adds them, such as "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False), or pass objective=, a function losses(model, batch)"
            )
        labels, share = batch["labels"], batch.get(SHARE)
        inputs = {key: value for key, value in batch.items() if key not in ("labels", SHARE)}
        sums = SUMS[self.kind](unwrapped(model), model(**inputs).logits, labels)
        return sums * (self.shares(labels) if share is None else share)

    def measures(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The losses."""
        return {"loss": self.losses(model, batch)}

    def shares(self, labels: Tensor) -> Tensor:
        """The factor `E / sum_j T_j` of each of a batch's examples, (examples,) float32; ones for labels of whole examples."""
        if self.kind is LOSS_MAPPING["ForSequenceClassification"]:
            return torch.ones(len(labels), device=labels.device)
        seen = labels[:, 1:] if self.kind is LOSS_MAPPING["ForCausalLM"] else labels
        return (len(labels) / (seen != IGNORED).sum().clamp(min=1)).expand(len(labels)).float()

    def weighed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See `WeighsExamples.weighed`: each example with its factor, so that parts of the batch are weighed as in the whole."""
        return {**batch, SHARE: self.shares(batch["labels"])} if "labels" in batch else dict(batch)


def _loss_of(model: nn.Module) -> Any:
    """The function that a transformers model computes its loss with, which somebody may have replaced."""
    return getattr(unwrapped(model), "loss_function", None)


def _next_tokens(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Labels are moved, not logits, which would be copied."""
    return cross_entropies(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORED)).sum(1)


def _tokens(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropies(logits, labels).sum(1)


def _examples(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """As `config.problem_type` says; where it says nothing transformers goes by the number and the type of labels."""
    whole = labels.dtype in (torch.int64, torch.int32)
    guessed = "single_label_classification" if whole else "multi_label_classification"
    problem = model.config.problem_type or ("regression" if model.config.num_labels == 1 else guessed)
    if problem == "regression":
        return F.mse_loss(logits.float().flatten(1), labels.float().view(len(labels), -1), reduction="none").mean(1)
    if problem == "single_label_classification":
        return F.cross_entropy(logits.float(), labels, reduction="none")
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(1)


SUMS: dict[Any, Sums] = {
    LOSS_MAPPING["ForCausalLM"]: _next_tokens,
    LOSS_MAPPING["ForMaskedLM"]: _tokens,
    LOSS_MAPPING["ForTokenClassification"]: _tokens,
    LOSS_MAPPING["ForSequenceClassification"]: _examples,
}
"""Of transformers' losses those that are known by example, and how."""
