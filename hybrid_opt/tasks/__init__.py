"""Built-in tasks: rows to learn from, and scorers that judge what a model wrote. No torch; nothing a model wrote is executed.

Reading order: `completions.py`, `scorers.py`, `exact_match.py`, `multiple_choice.py`, `conciseness.py`, `arithmetic.py`,
`expressions.py`, `countdown.py`, `sampling.py`, `rows.py`, `reasoning_gym.py`, `refused.py`, `reasoning_gym_rows.py`.
"""
