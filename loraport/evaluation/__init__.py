"""Say with numbers what an adapter gains, what it costs, and whether it does anything at all."""

from loraport.evaluation.evaluate import Evaluation, Scores, evaluate
from loraport.evaluation.scores import RowScore

__all__ = ["Evaluation", "RowScore", "Scores", "evaluate"]
