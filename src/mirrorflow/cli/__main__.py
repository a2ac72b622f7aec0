"""The command line as a module: python -m mirrorflow.cli."""

from . import main

if __name__ == "__main__":
    main()
