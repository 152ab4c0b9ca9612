"""An answer in a window: a thread computes, the window shows what there is and stays alive, a button stops it.

python examples/stop_from_a_window.py phi-4-mini
"""

import sched
import sys
import threading
from queue import SimpleQueue

import edgephi

window = sched.scheduler()  # stands for a toolkit's event loop; its `enter` is Tk's `after`, or a timer of Qt's
pieces: SimpleQueue[str] = SimpleQueue()

with edgephi.load(sys.argv[1]) as model:
    stream = model.chat("Tell me a very long story about a lighthouse.", max_new_tokens=2000)
    worker = threading.Thread(target=lambda: [pieces.put(piece) for piece in stream])

    def press_stop() -> None:
        print("[Stop]", end="", flush=True)
        stream.cancel()  # returns at once; the answer ends behind the token that is being computed

    def show(begun: bool = False) -> None:
        while not pieces.empty():
            print(pieces.get(), end="", flush=True)
            if not begun:  # whoever sits there presses the button half a second later
                begun = window.enter(0.5, 1, press_stop) is not None
        if worker.is_alive():
            window.enter(0.05, 1, show, (begun,))

    worker.start()
    window.enter(0, 1, show)
    window.run()
    answer = stream.result()
    print(f"\n{answer.new_tokens} tokens, ended by {answer.finish}")
