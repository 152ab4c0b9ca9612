"""How far a bundle is from the float model it was made from.

python examples/quality_check.py smollm2 SmolLM2-135M-Instruct.Q4_1.gguf text.txt
"""

import sys
from pathlib import Path

from edgephi.benchmarks.evaluate.evaluation import evaluate

bundle, checkpoint, text = sys.argv[1:4]
figures = evaluate(Path(bundle), against=checkpoint, text=Path(text), windows=2, window_length=128).figures
assert figures is not None and figures.kl_mean is not None and figures.top1_agreement is not None
print(f"perplexity {figures.perplexity:.2f}, of the float model {figures.against_perplexity:.2f}")
print(f"KL divergence {figures.kl_mean:.4f} nats, top-1 agreement {100 * figures.top1_agreement:.1f} %")
if figures.kl_mean > 0.5:
    sys.exit("this bundle has lost too much")
