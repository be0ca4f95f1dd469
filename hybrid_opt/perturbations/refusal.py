"""What to tell a user about a parameter that low rank noise cannot reach; no torch, because `check` says it too. Next:
`member_hooks.py`, which finds the reasons."""


def refusal(name: str, reason: str) -> str:
    """What to tell a user about a parameter whose low rank noise cannot be evaluated."""
    return (
        f"policy: low rank noise cannot be evaluated for parameter {name} because {reason}; write in the estimator perturbation: "
        "{type: low_rank, otherwise: dense} (such parameters get dense noise, one member a forward pass) or otherwise: frozen, "
        "or a policy rule with use: frozen for it"
    )
