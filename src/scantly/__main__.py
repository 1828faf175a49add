"""``python -m scantly``: the command line where the script ``scantly`` is not on the path."""

from scantly.cli import main

if __name__ == "__main__":
    main()
