"""`python -m edgephi` is the command."""

from edgephi.commands.app import main

if __name__ == "__main__":
    main()
