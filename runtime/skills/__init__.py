"""What apps ask of a language model most often: summarize, rewrite, make a table. Each is a function of a loaded model.

The prompts are the TOML files in `prompts/`; `prompts=` of every skill takes others. A skill holds what a program can
check, whatever the model's size: length, numbers, names, the shape of a table.
"""

from edgephi.runtime.skills.rewriting import Rewrite, RewrittenPart, Tone, rewrite
from edgephi.runtime.skills.run import SkillProgress, SkillStatistics
from edgephi.runtime.skills.summarizing import ConversationItem, InputKind, Kind, Summary, summarize
from edgephi.runtime.skills.tables import Table, text_to_table

__all__ = [
    "ConversationItem",
    "InputKind",
    "Kind",
    "Rewrite",
    "RewrittenPart",
    "SkillProgress",
    "SkillStatistics",
    "Summary",
    "Table",
    "Tone",
    "rewrite",
    "summarize",
    "text_to_table",
]
