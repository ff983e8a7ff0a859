"""`python -m icsearch`."""

from icsearch.cli import main

if __name__ == "__main__":
    main()
