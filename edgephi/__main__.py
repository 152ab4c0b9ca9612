"""`python -m edgephi` and the console script: the command, which Ctrl-C ends without a traceback from here on."""

# `signal` itself makes enumerations first, for some milliseconds without the guard below
import _signal as signal  # type: ignore[import-not-found]
import os
import sys

INTERRUPTED = 130


def _end(number: int, frame: object) -> None:
    try:
        os.write(2, b"error: interrupted\n")
    finally:
        os._exit(INTERRUPTED)


def main() -> None:
    """Run the command. Exit status: 0 done, 1 error, 2 usage, 130 interrupted, 143 terminated."""
    # an exception in the middle of the imports, or when the interpreter ends, would come out as a traceback
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    from edgephi.commands.app import main as command

    try:
        command()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            # CPython kills itself by SIGINT instead when the exception has passed an eval() on its way
            sys.stdout.flush()
            os._exit(INTERRUPTED)
        raise


if __name__ == "__main__":
    main()
