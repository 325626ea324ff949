"""`python -m mminfer` is the command line."""

from mminfer.cli.main import main

if __name__ == "__main__":
    main()
