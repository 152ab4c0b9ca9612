"""`python -m edgephi` and the console script: the command, which Ctrl-C ends without a traceback from here on."""

from edgephi.commands.interrupts import end_at_once_on_ctrl_c


def main() -> None:
    """Run the command. Exit status: 0 done, 1 error, 2 usage, 130 interrupted, 143 terminated."""
    end_at_once_on_ctrl_c()
    from edgephi.commands.app import main as command

    command()


if __name__ == "__main__":
    main()
