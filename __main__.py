"""``python -m effvit`` is the command ``effvit``."""

from effvit.cli import main

if __name__ == "__main__":
    main()
