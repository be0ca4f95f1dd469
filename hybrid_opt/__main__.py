"""`python -m hybrid_opt`: the same as the command `hybrid-opt`. Next: `cli/__init__.py`."""

from hybrid_opt.cli import main

if __name__ == "__main__":
    main()
