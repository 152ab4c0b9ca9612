"""What a text shows of a model: layers run one at a time, statistics, fitted weights, sensitivities, budgets."""
