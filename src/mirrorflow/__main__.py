"""The command line as a module: ``python -m mirrorflow``."""

from .cli import main

if __name__ == "__main__":
    main()
