"""Where the weights live and how they are moved.

Reading order: `contract.py`, `update_rules.py`, `rounding.py`, `master_weights.py`, `direct.py`, `torch_optimizer.py`, `local.py`;
then for many processes `ranks.py`, `rank_loss.py`, `deepspeed_config.py`, `zero_stages.py`, `zero.py`; and `build.py`.
"""
