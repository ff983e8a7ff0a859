"""`python -m icsearch`."""

from icsearch.cli.app import main

if __name__ == "__main__":
    main()
