"""hybrid_opt inside other people's training loops. Reading order: `transformers.py`, `training_arguments.py`, `label_losses.py`,
`step_batches.py`."""

import os

import torch

if not torch.cuda.is_available():  # otherwise DeepSpeed, which accelerate imports, warns of it
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
