"""Answer one question with the model that lies beside this program, or where MODEL_FOLDER says.

python program.py "What is the capital of Japan?"
pyinstaller program.py
"""

import os
import sys
from pathlib import Path

import edgephi


def model_folder() -> Path:
    """The bundle: beside the program that PyInstaller made, or beside this file."""
    beside = Path(sys.executable if getattr(sys, "frozen", False) else __file__).resolve().parent
    return Path(os.environ.get("MODEL_FOLDER") or beside / "model")


def main() -> int:
    question = " ".join(sys.argv[1:]) or "What is the capital of Japan?"
    try:
        with edgephi.load(model_folder()) as model:
            for piece in model.chat(question, max_new_tokens=200):
                print(piece, end="", flush=True)
        print()
    except edgephi.EdgephiError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
